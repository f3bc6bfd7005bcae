"""The torch face: groups, names, state, resuming bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from models import batch, changed, next_token_loss, same_bits, snapshot, tiny
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import zokern

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()


def run(model: nn.Module, optimizer, steps: int) -> list[tuple]:
    return [zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS)).losses for _ in range(steps)]


def saved(state: dict) -> dict:
    """Through torch.save and the safe loader."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_is_a_torch_optimizer() -> None:
    optimizer = zokern.MeZO(tiny(), lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert set(optimizer.param_groups[0]) >= {"params", "param_names", "lr", "eps", "weight_decay"}
    optimizer.zero_grad()
    assert "MeZO" in repr(optimizer)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "nearest"),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "residual"),
    ],
)
def test_resume_is_exact(dtype: torch.dtype, rounding: str) -> None:
    """Three steps, save, three more: the bits of six steps in one go;
    also when the optimizer was built with other options."""
    options = {
        "lr": 1e-2,
        "eps": 2e-3,
        "weight_decay": 0.1,
        "seed": 2**64 - 5,
        "queries": 2,
        "rounding": rounding,
    }
    model = tiny(dtype)
    whole = run(model, zokern.MeZO(model, **options), 6)

    first = tiny(dtype)
    optimizer = zokern.MeZO(first, **options)
    losses = run(first, optimizer, 3)
    weights, state = saved(first.state_dict()), saved(optimizer.state_dict())
    if rounding == "residual":
        assert (
            all(values["residual"].dtype == torch.int16 for values in state["state"].values())
            and state["state"]
        )

    second = tiny(dtype)
    second.load_state_dict(weights)
    resumed = zokern.MeZO(second, lr=1.0, eps=0.5, seed=1, queries=2, rounding=rounding)
    resumed.load_state_dict(state)
    assert resumed.steps == 3 and resumed.seed == 2**64 - 5 and resumed.param_groups[0]["lr"] == 1e-2
    losses += run(second, resumed, 3)
    assert losses == whole
    assert changed(second, snapshot(model)) == []

    # the check sees a resume that forgets the step number, and one that forgets the low bits
    for forget in ("step", "state"):
        if forget == "state" and rounding != "residual":
            continue
        third = tiny(dtype)
        third.load_state_dict(weights)
        wrong = copy.deepcopy(state)
        wrong["state"] = {} if forget == "state" else wrong["state"]
        wrong["zokern"]["step"] = 0 if forget == "step" else 3
        resumed = zokern.MeZO(third, queries=2, rounding=rounding)
        resumed.load_state_dict(wrong)
        run(third, resumed, 3)
        assert changed(third, snapshot(model)) != []


def test_load_state_dict_copies() -> None:
    """Two optimizers that loaded one state do not share low bits."""
    model = tiny(torch.bfloat16)
    optimizer = zokern.MeZO(model, lr=1e-2, rounding="residual")
    run(model, optimizer, 1)
    state = optimizer.state_dict()
    other = zokern.MeZO(model, rounding="residual")
    other.load_state_dict(state)
    p = model.up.weight
    assert same_bits(other.state[p]["residual"], optimizer.state[p]["residual"])
    assert other.state[p]["residual"].data_ptr() != optimizer.state[p]["residual"].data_ptr()


def test_load_state_dict_refuses_other_runs() -> None:
    model = tiny()
    named = list(model.named_parameters())
    optimizer = zokern.MeZO(named, seed=3)
    good = optimizer.state_dict()
    renamed = zokern.MeZO([("x." + name, p) for name, p in named])
    with pytest.raises(
        ValueError, match="other parameters.*embed.weight.*x.embed.weight|other parameters.*x.embed"
    ):
        renamed.load_state_dict(good)
    with pytest.raises(ValueError, match="zokern"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    with pytest.raises(ValueError, match="stream version 2"):
        optimizer.load_state_dict({**good, "zokern": {**good["zokern"], "stream": 2}})
    assert optimizer.seed == 3 and optimizer.steps == 0
    optimizer.load_state_dict(good)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**64),
        ("seed", -1),
        ("seed", 1.5),
        ("step", -3),
        ("step", 2**32 + 1),
        ("step", True),
        ("dead", None),
        ("skips", -1),
    ],
)
def test_numbers_of_a_state_are_checked(key: str, value) -> None:
    optimizer = zokern.MeZO(tiny(), seed=3, lr=0.1)
    state = optimizer.state_dict()
    for wrong in ({**state["zokern"], key: value}, {k: v for k, v in state["zokern"].items() if k != key}):
        shown = wrong.get(key)
        state["param_groups"][0]["lr"] = 0.5
        with pytest.raises(ValueError, match=f"{key} = {shown!r}; expected an integer, 0 <= {key} < "):
            optimizer.load_state_dict({**state, "zokern": wrong})
        assert optimizer.seed == 3 and optimizer.steps == 0 and optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"direction": "rademacher"}, "direction"),
        ({"queries": 3}, "estimator.queries"),
        ({"stencil": "forward"}, "estimator.stencil"),
    ],
)
def test_state_of_other_draws_is_not_loaded(options: dict, key: str) -> None:
    state = saved(zokern.MeZO(tiny()).state_dict())
    other = zokern.MeZO(tiny(), seed=5, **options)
    with pytest.raises(ValueError, match=f"with {key}=.*recipe"):
        other.load_state_dict(state)
    assert other.seed == 5
    with pytest.raises(ValueError, match="direction='normal'.*'subspace and normal'"):
        zokern.SubZero(tiny()).load_state_dict(state)
    zokern.MeZO(tiny()).load_state_dict(state)
    del state["zokern"]["recipe"]
    other.load_state_dict(state)  # as an older version wrote it
    assert other.seed == 0


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, pickle.dumps, lambda o: torch.save(o, io.BytesIO())]
)
def test_optimizer_is_not_copied(copied) -> None:
    with pytest.raises(TypeError, match="MeZO cannot be copied or pickled.*load_state_dict"):
        copied(zokern.MeZO(tiny()))


KEEPS = {
    "residual": lambda model: zokern.MeZO(model, lr=1e-3, eps=0.1, rounding="residual"),
    "momentum": lambda model: zokern.MeZO(model, lr=1e-3, eps=0.1, rule=zokern.Momentum()),
    "second": lambda model: zokern.MeZO(model, lr=1e-3, eps=0.1, rule=zokern.Adam()),
}
FACTORED = {
    "subzero": lambda model, rank: zokern.SubZero(
        model, eps=0.1, rank=rank, reshape="none", rule=zokern.Momentum()
    ),
    "lozo": lambda model, rank: zokern.LOZO(model, eps=0.1, rank=rank, momentum=0.9),
    "tezo": lambda model, rank: zokern.TeZO(model, eps=0.1, rank=rank, rule="adam"),
}


def matrix(rows: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(rows, 8, dtype=dtype))
    return model


def square(model: nn.Module, optimizer) -> zokern.StepResult:
    return zokern.step(optimizer, lambda: model.w.float().square().sum())


@pytest.mark.parametrize("key", KEEPS)
def test_state_of_another_shape_is_not_loaded(key: str) -> None:
    """Kernels get its address alone; nothing of the optimizer has changed when it is refused."""
    small, large = matrix(8), matrix(16)
    optimizer = KEEPS[key](small)
    square(small, optimizer)
    other = KEEPS[key](large)
    with pytest.raises(ValueError, match=r"state.*'w'.*\[8, 8\].*\[16, 8\].*state_dict\['state'\]\.clear"):
        other.load_state_dict(optimizer.state_dict())
    assert other.steps == 0 and not other.state
    state = optimizer.state_dict()
    state["state"][0][key] = state["state"][0][key].double()
    with pytest.raises(ValueError, match=f"'{key}'.*'w'.*float64"):
        KEEPS[key](matrix(8)).load_state_dict(state)
    state["state"] = {3: {}}
    with pytest.raises(ValueError, match=r"number \[3\].*\[0\]"):
        KEEPS[key](matrix(8)).load_state_dict(state)
    state["state"].clear()
    square(large, other)
    other.load_state_dict(state)  # the way out


@pytest.mark.parametrize("rule", ["momentum", "second"])
@pytest.mark.parametrize(
    "change", [lambda s: s.update(updates=-1), lambda s: s.pop("updates"), lambda s: s.update(updates=1.5)]
)
def test_count_of_updates_is_checked(rule: str, change) -> None:
    model = matrix(8)
    optimizer = KEEPS[rule](model)
    square(model, optimizer)
    change(optimizer.state[model.w])
    with pytest.raises(ValueError, match="'w'.*updates"):
        KEEPS[rule](matrix(8)).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", FACTORED)
def test_state_of_another_rank_is_not_loaded(name: str) -> None:
    model = matrix(16, torch.float32)
    optimizer = FACTORED[name](model, 4)
    square(model, optimizer)
    FACTORED[name](matrix(16, torch.float32), 4).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="rank=4"):
        FACTORED[name](matrix(16, torch.float32), 2).load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    state["zokern"]["recipe"] = None
    with pytest.raises(ValueError, match="state.*'w'.*needs a contiguous"):
        FACTORED[name](matrix(16, torch.float32), 2).load_state_dict(state)
    optimizer.flush()
    model.w.data = torch.ones(24, 8)
    if name == "lozo":  # whose momentum has a row for each of the matrix
        with pytest.raises(ValueError, match=r"'momentum'.*'w'.*\[16, 4\].*\[24, 4\].*del optimizer.state"):
            square(model, optimizer)
        del optimizer.state[model.w]
    square(model, optimizer)
    assert optimizer.matrices[id(model.w)].rows == 24


OTHER_STATES = {
    "float64": lambda t: t.double(),
    "with strides": lambda t: t.t().contiguous().t(),
    "[7, 8]": lambda t: t[1:],
    "on meta": lambda t: t.to("meta"),
    "NoneType": lambda t: None,
    "sparse_coo": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("shown", OTHER_STATES)
@pytest.mark.parametrize("key", KEEPS)
def test_state_that_was_replaced_is_checked_at_the_next_step(key: str, shown: str) -> None:
    model = matrix(8)
    optimizer = KEEPS[key](model)
    for _ in range(2):
        square(model, optimizer)
    before = snapshot(model)
    good = optimizer.state[model.w][key]
    optimizer.state[model.w][key] = OTHER_STATES[shown](good)
    with pytest.raises(ValueError, match=f"state '{key}' of parameter 'w'.*del optimizer.state") as caught:
        square(model, optimizer)
    assert shown in str(caught.value) and changed(model, before) == []
    optimizer.state[model.w][key] = good.clone()
    square(model, optimizer)


def test_state_that_was_replaced_while_its_parameter_was_frozen() -> None:
    model = tiny()
    optimizer = zokern.MeZO(model, lr=0.1, rule=zokern.Momentum())
    run(model, optimizer, 2)
    model.up.weight.requires_grad_(False)
    optimizer.state[model.up.weight]["momentum"] = torch.zeros(3)
    run(model, optimizer, 2)
    model.up.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="'up.weight'"):
        run(model, optimizer, 1)


@pytest.mark.parametrize("key", KEEPS)
def test_parameter_of_another_shape_does_not_get_its_old_state(key: str) -> None:
    model = matrix(8)
    optimizer = KEEPS[key](model)
    square(model, optimizer)
    model.w.data = torch.ones(16, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"'{key}|state.*'w'.*\[8, 8\].*\[16, 8\].*del optimizer.state"):
        square(model, optimizer)
    assert (model.w == 1).all()
    del optimizer.state[model.w]  # the way out
    square(model, optimizer)


def test_names() -> None:
    """From a module, from (name, tensor) pairs, from groups of them, or made up in order;
    a name decides z, so it is unique."""
    model = tiny()
    names = [name for name, _ in model.named_parameters()]

    def of(optimizer) -> list[str]:
        return [name for group in optimizer.param_groups for name in group["param_names"]]

    assert of(zokern.MeZO(model)) == of(zokern.MeZO(model.named_parameters())) == names
    assert of(zokern.MeZO([{"params": model.named_parameters()}])) == names
    assert of(zokern.MeZO(model.parameters())) == [f"param.{i}" for i in range(len(names))]
    unnamed = zokern.MeZO([{"params": model.norm.parameters()}, {"params": [model.gain], "lr": 0.1}])
    assert of(unnamed) == ["param.0", "param.1", "param.2"]
    with pytest.raises(ValueError, match="not unique.*a"):
        zokern.MeZO([("a", model.gain), ("a", model.up.bias)])
    ends = []
    for source in (lambda m: m, lambda m: m.named_parameters(), lambda m: [{"params": m}]):
        model = tiny()
        run(model, zokern.MeZO(source(model), lr=0.1, seed=1), 2)
        ends.append(snapshot(model))
    assert all(same_bits(end[name], ends[0][name]) for end in ends for name in names)


COMPILED = {
    "whole": lambda model, whole: whole,
    "pairs": lambda model, whole: list(whole.named_parameters()),
    "group": lambda model, whole: [{"params": whole}],
    "part": lambda model, whole: (setattr(model, "up", torch.compile(model.up, backend="eager")), model)[1],
}


@pytest.mark.parametrize("given", COMPILED)
def test_compiled_module_has_the_names_of_its_inner_one(given: str) -> None:
    """The same z and the same states as without torch.compile, whichever module is handed over."""
    model, other = tiny(), tiny()
    make = partial(zokern.MeZO, lr=0.1, evaluation="master")
    eager = make(model, rule=zokern.Momentum())
    optimizer = make(COMPILED[given](other, torch.compile(other, backend="eager")), rule=zokern.Momentum())
    assert run(model, eager, 2) == run(other, optimizer, 2)
    if given in ("whole", "group"):
        assert optimizer.param_groups[0]["param_names"] == eager.param_groups[0]["param_names"]
    optimizer.load_state_dict(saved(eager.state_dict()))
    eager.load_state_dict(saved(optimizer.state_dict()))
    assert run(model, eager, 1) == run(other, optimizer, 1)


def test_ranks_of_a_compiled_module() -> None:
    from zokern.methods.tezo import spectral_ranks

    model = tiny()
    compiled = torch.compile(model, backend="eager")
    assert spectral_ranks(compiled) == spectral_ranks(model)
    optimizer = zokern.TeZO(compiled, rank={"_orig_mod.up.weight": 3})
    run(model, optimizer, 1)
    assert {m.name: m.rank for m in optimizer.matrices.values()}["up.weight"] == 3


def test_colliding_ids_are_resolved_the_same_way_in_any_order() -> None:
    from zokern import parameters
    from zokern.parameters import names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "parameter_id", lambda name: len(name))
        first, salted = parameters.ids(["bb", "aa", "c"])
        assert first == parameters.ids(["c", "aa", "bb"])[0] and len(set(first.values())) == 3
        assert salted == {"bb": "bb#1"}
        assert parameters.ids(["dd"], first)[0]["aa"] == first["aa"]


def test_add_param_group() -> None:
    """A group added later trains as one that was there from the start, for the steps that it sees."""
    model = tiny()
    optimizer = zokern.MeZO([("gain", model.gain)], lr=0.1, seed=1)
    optimizer.add_param_group({"params": [("up.weight", model.up.weight)], "lr": 0.2, "eps": 2e-3})
    together = tiny()
    other = zokern.MeZO(
        [
            {"params": [("gain", together.gain)]},
            {"params": [("up.weight", together.up.weight)], "lr": 0.2, "eps": 2e-3},
        ],
        lr=0.1,
        seed=1,
    )
    assert run(model, optimizer, 2) == run(together, other, 2)
    assert changed(model, snapshot(together)) == []
    with pytest.raises(ValueError, match="not unique|more than one"):
        optimizer.add_param_group({"params": [("gain", model.gain)]})
    for same in (model.gain, nn.Parameter(model.gain.data)):
        with pytest.raises(ValueError, match="'gain' and 'again' are the same elements.*one group"):
            optimizer.add_param_group({"params": [("again", same)]})
    with pytest.raises(ValueError, match="eps is 0"):
        optimizer.add_param_group({"params": [("up.bias", model.up.bias)], "eps": 0.0})
    assert run(model, optimizer, 1) == run(together, other, 1)  # the refused groups left nothing behind
    assert len(optimizer.param_groups) == 2


EDITS = {
    "removed": lambda groups, p: groups[0]["params"].pop(),
    "added": lambda groups, p: groups[0]["params"].append(p),
    "replaced": lambda groups, p: groups[0]["params"].__setitem__(0, p),
    "reordered": lambda groups, p: groups[0]["params"].reverse(),
    "group_added": lambda groups, p: groups.append({**groups[0], "params": [p]}),
    "group_removed": lambda groups, p: groups.pop(),
    "groups_reordered": lambda groups, p: groups.reverse(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_lists_of_parameters_are_refused(edit: str) -> None:
    model = tiny()
    named = list(model.named_parameters())
    optimizer = zokern.MeZO([{"params": named[:2]}, {"params": named[2:-1]}], lr=0.1)
    run(model, optimizer, 1)
    before = snapshot(model)
    EDITS[edit](optimizer.param_groups, named[-1][1])
    with pytest.raises(
        RuntimeError, match=r"param_groups\[\d\]\['params'\].*edited.*add_param_group.*new optimizer"
    ):
        run(model, optimizer, 1)
    assert changed(model, before) == [] and optimizer.steps == 1


def test_thawed_parameter_joins_under_its_own_name() -> None:
    model = tiny()
    model.up.weight.requires_grad_(False)
    optimizer = zokern.MeZO(model, lr=0.1, seed=1)
    run(model, optimizer, 1)
    model.up.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="up.weight.*add_param_group"):
        run(model, optimizer, 1)
    optimizer.add_param_group({"params": [model.up.weight]})
    assert optimizer.param_groups[1]["param_names"] == ["up.weight"]
    before = model.up.weight.detach().clone()
    run(model, optimizer, 1)
    assert not same_bits(model.up.weight, before)


def test_editing_lr_takes_effect() -> None:
    model = tiny()
    optimizer = zokern.MeZO(model, lr=0.1, seed=1)
    run(model, optimizer, 1)
    before = snapshot(model)
    optimizer.param_groups[0]["lr"] = 0.0
    run(model, optimizer, 1)
    assert changed(model, before) == []
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    run(model, optimizer, 1)
    assert len(changed(model, before)) == len(before)
    for bad in (float("nan"), -0.1, "0.1", None):
        optimizer.param_groups[0]["lr"] = bad
        weights = snapshot(model)
        with pytest.raises(ValueError, match="lr is"):
            run(model, optimizer, 1)
        assert changed(model, weights) == []


def test_step_of_the_optimizer_itself() -> None:
    """optimizer.step(closure) is the same step and returns the mean loss."""
    ends = []
    for own in (False, True):
        model = tiny()
        optimizer = zokern.MeZO(model, lr=0.1, seed=1)

        def closure(model=model):
            return next_token_loss(model(IDS), IDS)

        loss = optimizer.step(closure) if own else zokern.step(optimizer, closure).loss
        ends.append((loss, snapshot(model)))
    assert ends[0][0] == ends[1][0] == optimizer.result.loss
    assert all(same_bits(ends[0][1][name], t) for name, t in ends[1][1].items())
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


class Wrapper(torch.optim.Optimizer):
    """As accelerate's AcceleratedOptimizer: hands everything on, and is no zokern optimizer."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure=None) -> None:
        self.optimizer.step(closure)


def accelerated(optimizer):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.parametrize("wrap", [Wrapper, accelerated])
def test_step_of_a_wrapped_optimizer(wrap) -> None:
    model, right = tiny(), tiny()
    optimizer = zokern.MeZO(model, lr=0.1, seed=1)
    losses = run(model, wrap(optimizer), 2)
    assert losses == run(right, zokern.MeZO(right, lr=0.1, seed=1), 2)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), right.parameters()))


class Bare(zokern.MeZO):
    """Runs no hooks, and tells torch that its step has them already."""

    def step(self, closure, first_order=None, reads=True):
        return self._step(closure, first_order, reads)

    step.hooked = True


@pytest.mark.parametrize("way", ["zokern.step", "optimizer.step"])
def test_hooks_and_the_profiler_see_a_step_once(way: str, kind: type = zokern.MeZO) -> None:
    model, seen = tiny(), []
    optimizer = kind(model, lr=0.1)
    call = partial(*{"zokern.step": (zokern.step, optimizer), "optimizer.step": (optimizer.step,)}[way])
    call = partial(call, lambda: next_token_loss(model(IDS), IDS))
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: seen.append(("before", optimizer.steps))),
        optimizer.register_step_post_hook(lambda *_: seen.append(("after", optimizer.steps))),
    ]
    call()
    assert seen == [("before", 0), ("after", 1)]
    for hook in hooks:
        hook.remove()
    hook = register_optimizer_step_post_hook(lambda *_: seen.append(("everywhere", optimizer.steps)))
    call()
    hook.remove()
    call()
    assert seen[2:] == [("everywhere", 2)]
    with torch.profiler.profile() as found:
        call()
    assert [e.count for e in found.key_averages() if e.key.startswith("Optimizer.step#")] == [1]


def test_a_step_without_hooks_is_rejected() -> None:
    with pytest.raises(AssertionError):
        test_hooks_and_the_profiler_see_a_step_once("zokern.step", Bare)


OTHERS = {
    "module": lambda model: model,
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
    "scheduler": lambda model: torch.optim.lr_scheduler.LinearLR(zokern.MeZO(model, lr=1.0)),
    "wrapped SGD": lambda model: Wrapper(torch.optim.SGD(model.parameters(), lr=1.0)),
    "None": lambda model: None,
}


@pytest.mark.parametrize("other", OTHERS)
def test_step_refuses_other_optimizers(other: str) -> None:
    """Before the loss is read or anything moves."""
    model = tiny()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    weights, calls = snapshot(model), []
    with pytest.raises(
        TypeError,
        match=r"optimizer is \w+; expected a zokern optimizer: zokern.step\(zokern.MeZO\(model\), closure\)",
    ):
        zokern.step(OTHERS[other](model), lambda: calls.append(0) or 0.0)
    assert changed(model, weights) == [] and not calls


def test_step_refuses_a_loss_in_place_of_a_closure() -> None:
    with pytest.raises(
        TypeError, match=r"closure is Tensor tensor\(1.\); expected a function .*lambda: model"
    ):
        zokern.step(zokern.MeZO(tiny()), torch.tensor(1.0))


BAD_OPTIONS = {
    "queries": [0, -1, 1.5, True, 2**24],
    "rounding": ["up", None],
    "evaluation": ["pairwise", 3],
    "backend": ["gpu"],
    "direction": ["uniform", 3],
    "stencil": ["backward", zokern.Stencil("wrong", (1.0, -1.0), (1.0, -0.5))],
    "estimator": [3, zokern.Spsa, "spsa"],
    "nonfinite": ["keep"],
    "weight_decay": [-0.1, float("inf"), "no"],
    "lr": [torch.tensor([0.1, 0.2]), torch.tensor(1j), 10**39],
    "eps": [torch.ones(2), 1e-60, 1e-39, 1e39],
    "paired_check": [-5, 1.5, "3", True],
    "max_skips": [-1, 0.5, "10"],
    "dead_limit": [0, -1, 20.0, False],
    "maximize": ["no", 1, None],
    "force": ["no", 0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_OPTIONS.items() for value in values]
)
def test_bad_option_is_refused_by_name(name: str, value) -> None:
    with pytest.raises((ValueError, TypeError), match=name) as caught:
        zokern.MeZO(tiny(), **{name: value})
    shown = value if isinstance(value, str) else getattr(value, "name", None) or repr(value)
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    "params", [[], nn.Identity(), torch.ones(3), nn.Linear(2, 2).requires_grad_(False), ["weight"]]
)
def test_nothing_to_train_is_refused(params) -> None:
    with pytest.raises((ValueError, TypeError), match="param"):
        zokern.MeZO(params)


def test_scratch_budget_is_checked() -> None:
    for budget in (0, -1, 1 << 19, 1.5e6, "64MB"):
        with pytest.raises(ValueError, match="budget"):
            zokern.Scratch(budget)
