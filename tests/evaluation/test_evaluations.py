"""What every evaluation promises: the same losses, and everything as it was.
Wrong evaluations are rejected by each check."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from unittest.mock import patch

import models
import numpy as np
import pytest
import readings
import torch
import torch.nn.functional as F
from models import build, changed, next_token_loss, same_bits, snapshot, tiny
from recipes import METHODS
from torch import Tensor, nn

import zokern
from zokern import gemm
from zokern.estimator import Oracle
from zokern.evaluation import THETA, Point, copies
from zokern.gemm import lowrank
from zokern.modules import has_memory

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = models.batch()
WAYS: dict[str, Callable] = {
    "master": zokern.Master, "paired": lambda: zokern.Paired(check=False),
    "scratch": lambda: zokern.Scratch(check=False),
    "inplace": zokern.InPlace,
}  # fmt: skip
FAST = ("paired", "scratch")
DIRECTIONS: dict[str, Callable] = {
    "dense": zokern.MeZO, "rademacher": lambda model, **o: zokern.MeZO(model, direction="rademacher", **o),
    **{name: METHODS[name] for name in ("subzero", "subzero_adapters", "lozo", "tezo", "pgap", "right_drawn",
        "both_drawn")},
}  # fmt: skip
# relative: sums in another order; bfloat16 results, rounded anew
BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 2.0**-6}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# The same losses --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def large(join: int | None = None) -> Iterator[None]:
    """Matrices above 64 elements take the paths of large ones; join=0 multiplies each side's rows apart."""
    places = copies.Copies.__init__

    def small_budget(self, plan, points, arena) -> None:
        with patch.object(copies.Copies, "_size", staticmethod(lambda tensor: arena.size(tensor.device))):
            places(self, plan, points, arena)

    joined = gemm.JOIN if join is None else join
    with (
        patch.object(copies, "RESIDENT", 64),
        patch.object(lowrank, "JOIN", joined),
        patch.object(copies.Copies, "__init__", small_budget),
    ):
        yield


def losses(
    make: Callable, evaluation: object, model: nn.Module, closure: Callable, **options
) -> zokern.StepResult:
    options = {"eps": 2e-2, "seed": 7, "lr": 0.0, "force": True, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "eps = |the loss did not read|the perturbed losses|.*running statistics|the padding row"
        )
        return zokern.step(make(model, evaluation=evaluation, paired_check=None, **options), closure)


def check_losses(
    model: nn.Module, closure: Callable, evaluation: object, make=zokern.MeZO, bound: float = 4e-6, **options
) -> zokern.StepResult:
    """The losses of 'master' within the bound, which tells the sides apart;
    no bit of a weight has changed."""
    before = snapshot(model)
    right = losses(make, "master", model, closure, **options)
    found = losses(make, evaluation, model, closure, **options)
    if found.evaluation != "inplace":
        assert changed(model, before) == []
    pairs = [(a, b) for one, two in zip(right.losses, found.losses) for a, b in zip(one, two)]
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    apart = max(abs(a - b) / abs(a) for a, b in right.losses)
    assert worst <= bound, f"{found.losses} against {right.losses}: {worst:.2g} apart, bound {bound:.2g}"
    assert apart > bound, f"sides differ by {apart:.2g}, too little to tell them apart"
    return found


def of_architecture(
    name: str, dtype: torch.dtype = torch.float32, train: bool = True
) -> tuple[nn.Module, Callable]:
    model, inputs = build(models.ARCHITECTURES[name], dtype).train(train), models.inputs(name)
    if dtype == torch.float32:
        return model, lambda: model(**inputs).loss
    return model, lambda: model(**inputs).logits.float().square().mean()  # its own loss is a bfloat16 number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", [*FAST, "inplace"])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_losses_of_an_architecture(name: str, way: str, dtype: torch.dtype, both_products) -> None:
    """Tied heads (opt, gpt2, t5) and experts (mixtral) among them; 30 others are in test_architectures.py."""
    model, closure = of_architecture(name, dtype)
    bound = 2e-5 if way == "inplace" and dtype == torch.float32 else 2 * BOUNDS[dtype]
    for size in (large(), contextlib.nullcontext()):
        with size:
            result = check_losses(model, closure, WAYS[way](), bound=bound, eps=6e-2, queries=2)
            assert result.evaluation == way and (way != "master" or result.unseen == ())


OPTIONS = [
    {"queries": 3}, {"queries": 3, "join": 0}, {"queries": 2, "stencil": "forward"},
    {"queries": 3, "way": lambda: zokern.Paired(sides=2, check=False)},
    {"queries": 3, "stencil": "forward", "way": lambda: zokern.Paired(sides=3, check=False)},
    {"way": lambda: zokern.Paired(1 << 20, check=False)},
    {"way": WAYS["scratch"]}, {"queries": 2, "stencil": "forward", "way": WAYS["scratch"]},
    {"queries": 2, "way": zokern.InPlace, "bound": 2e-5},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_losses_of_a_direction(direction: str, number: int, both_products) -> None:
    model, closure = of_architecture("gpt2")
    options = dict(OPTIONS[number])
    way, join = options.pop("way", WAYS["paired"]), options.pop("join", None)
    with large(join):
        check_losses(model, closure, way(), DIRECTIONS[direction], **options)


@pytest.mark.parametrize("way", FAST)
def test_losses_of_adapters(way: str) -> None:
    for make in (zokern.MeZO, DIRECTIONS["subzero_adapters"], DIRECTIONS["lozo"]):
        with large():
            check_losses(*models.lora(), WAYS[way](), make, eps=0.05, queries=2)


@pytest.mark.parametrize("way", [*FAST, "inplace"])
def test_losses_with_dropout_and_autocast(way: str) -> None:
    """Equal masks on both sides, those of 'master'; bfloat16 products of float32 weights."""
    model = tiny(dropout=0.5, width=16)
    bound = 1e-5 if way == "inplace" else 4e-6
    check_losses(model, lambda: next_token_loss(model(IDS), IDS), WAYS[way](), queries=2, bound=bound)
    model, _ = of_architecture("opt")
    inputs = models.inputs("opt")

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**inputs).logits.float().square().mean()

    for make in (zokern.MeZO, DIRECTIONS["subzero"]):
        with large():
            check_losses(model, closure, WAYS[way](), make, bound=BOUNDS[torch.bfloat16], eps=6e-2)


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("direction", ["subzero", "lozo", "tezo", "pgap", "right_drawn"])
def test_deferred_updates_are_read(direction: str, way: str) -> None:
    """With weight decay and updates deferred, the sides still read theta: the losses of a run that writes at
    once, to rounding."""
    ends = []
    for defer in (True, False):
        model, closure = of_architecture("opt")
        with large():
            optimizer = DIRECTIONS[direction](
                model,
                lr=3e-3,
                weight_decay=1.0,
                seed=2,
                queries=2,
                evaluation=WAYS[way](),
                eps=1e-2,
                defer=defer,
            )
            ends.append([zokern.step(optimizer, closure).losses for _ in range(2)])
            assert optimizer.pending == defer
            ends[-1] += [zokern.step(optimizer, closure).losses for _ in range(2)]
    for one, two in zip(*ends):
        assert all(abs(a - b) <= 1e-5 * abs(a) for x, y in zip(one, two) for a, b in zip(x, y)), (one, two)
    assert abs(ends[0][0][0][0] - ends[0][3][0][0]) > 1e-3


def test_the_closure_is_called_once_for_all_sides() -> None:
    model, calls = tiny(), []
    closure = lambda: (calls.append(1), next_token_loss(model(IDS), IDS))[1]  # noqa: E731
    optimizer = zokern.MeZO(model, lr=0.0, queries=3, evaluation=zokern.Paired(check=False))
    for _ in range(3):
        calls.clear()
        zokern.step(optimizer, closure)
    assert len(calls) == 1
    optimizer = zokern.PGAP(
        model, rank=4, probes=5, interval=2, evaluation=zokern.Paired(sides=2, check=False)
    )
    seen = []
    for _ in range(3):
        zokern.step(optimizer, lambda: (seen.append(model.up.weight + 0), closure())[1])
    sizes = {
        torch._C._functorch.get_unwrapped(w).shape[0] for w in seen if torch._C._functorch.is_batchedtensor(w)
    }
    assert sizes <= {1, 2}, "more sides live at once than were allowed"


# Models that only real parameters serve ---------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t() * 2.0

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        return None, None


def scripted() -> tuple[nn.Module, Callable]:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    model = torch.jit.script(build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))))
    return model, lambda: model(x).square().mean()


def recurrent() -> tuple[nn.Module, Callable]:
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))
    model = build(lambda: nn.LSTM(6, 8, 2))
    return model, lambda: model(x)[0].square().mean()


def custom() -> tuple[nn.Module, Callable]:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    model = build(lambda: nn.Linear(6, 5))
    return model, lambda: Doubled.apply(x, model.weight).square().mean() + model.bias.sum()


def functional() -> tuple[nn.Module, Callable]:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    return (
        model,
        lambda: torch.func.functional_call(model, dict(model.named_parameters()), (x,)).square().mean(),
    )


def generating() -> tuple[nn.Module, Callable]:
    model = build(models.llama).eval()
    prompt = models.inputs("llama")["input_ids"][:2, :4]

    def closure() -> Tensor:
        out = model.generate(
            prompt,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=0,
        )
        return torch.stack(out.scores).float().logsumexp(-1).mean()

    return model, closure


REAL = {
    "TorchScript": scripted,
    "LSTM": recurrent,
    "autograd.Function": custom,
    "functional_call": functional,
    "generate": generating,
}


def by_hand(model: nn.Module, closure: Callable, eps: float, seed: int) -> tuple[float, ...]:
    """The losses of weights that were written and put back."""
    theta = readings.clones(model)
    found = []
    for sign in (1.0, -1.0):
        readings.write(model, theta, sign * eps, lambda *where: readings.dense(*where), seed, 0, 0)
        with torch.no_grad():
            found.append(float(closure()))
    readings.write(model, theta, 0.0, readings.dense, seed, 0, 0)
    return tuple(found)


@pytest.mark.parametrize("way", ["master", "auto", "inplace"])
@pytest.mark.parametrize("kind", REAL)
def test_real_parameters_serve_any_model(kind: str, way: str) -> None:
    model, closure = REAL[kind]()
    before = snapshot(model)
    expected = by_hand(model, closure, 1e-2, 3)
    optimizer = zokern.MeZO(model, lr=0.0, eps=1e-2, seed=3, evaluation=way)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this closure is read by evaluation|torch.jit")
        result = zokern.step(optimizer, closure)
        optimizer.run.step = 0
        assert zokern.step(optimizer, closure).losses[0] == pytest.approx(expected, rel=1e-5)
    assert result.losses[0] == pytest.approx(expected, rel=1e-6) and expected[0] != expected[1]
    assert way == "inplace" or changed(model, before) == []


def test_generation_is_read_by_master() -> None:
    model, closure = generating()
    optimizer = zokern.MeZO(model, lr=0.0)
    records = [zokern.step(optimizer, closure) for _ in range(3)]
    assert {r.evaluation for r in records} == {"master"} and "forwards in one closure" in records[-1].why


# Nothing moves ----------------------------------------------------------------------------------------------

STAYS = [
    *itertools.product(["auto", "master", "paired", "scratch"], DTYPES, ["nearest"]),
    *itertools.product(["auto", "master", "paired", "scratch"], [torch.bfloat16], ["stochastic", "residual"]),
    ("inplace", torch.float32, "nearest"),
]  # fmt: skip


def check_stays(
    evaluation: object, dtype: torch.dtype, rounding: str, steps: int, make: Callable = zokern.MeZO
) -> None:
    """Steps at lr = 0 with weight decay: no bit of a weight has changed;
    in place, as many roundings as there were moves."""
    model = build(lambda: nn.Sequential(nn.Embedding(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)), dtype)
    with torch.no_grad():  # of the size that language models have, so that eps is not below an ulp
        model[2].weight.mul_(0.05)
        model[0].weight.mul_(0.05)
    before, ids = snapshot(model), torch.arange(5)
    optimizer = make(model, lr=0.0, weight_decay=0.1, seed=1, rounding=rounding, evaluation=evaluation)
    for _ in range(steps):
        zokern.step(optimizer, lambda: model(ids).float().square().mean())
    assert optimizer.steps == steps
    if getattr(optimizer.evaluation, "name", "") == "inplace":
        assert all((p - before[n]).abs().max() < 1e-4 for n, p in model.named_parameters())
    else:
        assert changed(model, before) == []


@pytest.mark.parametrize(("evaluation", "dtype", "rounding"), STAYS)
def test_1000_steps_of_nothing_change_no_bit(evaluation: str, dtype: torch.dtype, rounding: str) -> None:
    check_stays(evaluation, dtype, rounding, 1000 if rounding == "nearest" else 100)


@pytest.mark.parametrize("evaluation", ["auto", "master", "paired", "scratch"])
@pytest.mark.parametrize("method", ["SubZero", "LOZO", "TeZO"])
def test_steps_of_nothing_of_a_low_rank_method(method: str, evaluation: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_stays(evaluation, dtype, "nearest", 30, getattr(zokern, method))


class Messy(nn.Module):
    """Leaves in itself what it computed: attributes of every kind,
    buffers that are written, filled and registered."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.calls, self.seen, self.kept, self.inside = 0, [], {}, None
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.rand(()) + random.random() + float(np.random.rand())
        y = self.linear(x) if type(x) is not Tensor or not self.training else self.norm(self.linear(x))
        self.calls, self.inside = self.calls + 1, y
        self.seen.append(y)
        self.kept[self.calls] = y
        self.more = y.mean()
        self.empty = y[0]
        if type(self.linear.weight) is nn.Parameter:  # real parameters, which may be written to buffers
            self.mean.add_(y.mean(0))
            self.register_buffer(f"late_{self.calls}", y)
        return y


def everything(model: nn.Module) -> dict:
    """All that a step must leave alone, beside the weights."""
    state = {
        "torch": torch.get_rng_state().tolist(), "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "grad": torch.is_grad_enabled(), "modes": torch.overrides._get_current_function_mode_stack(),
    }  # fmt: skip
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        state[name] = {
            k: (id(v), list(v) if isinstance(v, (list, dict)) else v if isinstance(v, (int, bool)) else 0)
            for k, v in own.items()
        }
        state[name + " buffers"] = [
            (k, id(b), None if b is None else b.tolist()) for k, b in module._buffers.items()
        ]
        state[name + " hidden"] = set(module._non_persistent_buffers_set)
        state[name + " parameters"] = [
            (k, id(p), p.data_ptr(), p.requires_grad) for k, p in module._parameters.items() if p is not None
        ]
        state[name + " hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    return state


def check_untouched(evaluation: object) -> None:
    """Weights, streams, flags, buffers, attributes and the tree are as before;
    both sides see the same random numbers."""
    model, x = build(Messy), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    optimizer = zokern.MeZO(model, lr=0.0, evaluation=evaluation)
    before, around = snapshot(model), everything(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*running statistics|this closure is read")
        for _ in range(3):
            result = zokern.step(
                optimizer,
                lambda: (
                    model.eval() if result_is_mapped(evaluation) else model.train(),
                    model(x).square().mean(),
                )[1],
            )
            assert everything(model) == around, (
                f"changed: {[k for k, v in everything(model).items() if around.get(k) != v]}"
            )
    if result.evaluation != "inplace":
        assert changed(model, before) == []


def result_is_mapped(evaluation: object) -> bool:
    return getattr(evaluation, "name", evaluation) in ("paired", "auto")


@pytest.mark.parametrize("evaluation", ["auto", "master", "paired", "scratch", "inplace"])
def test_everything_is_as_before(evaluation: str) -> None:
    check_untouched(evaluation)


# Resume -----------------------------------------------------------------------------------------------------

RULES = {
    "sgd": dict,
    "momentum": lambda: {"rule": zokern.Momentum(0.9)},
    "adam": lambda: {"rule": zokern.Adam()},
}
OWN = {
    ("LOZO", "momentum"): {"momentum": 0.6},
    ("TeZO", "momentum"): {"rule": "momentum"},
    ("TeZO", "adam"): {"rule": "adam"},
}
RUNS = {
    "MeZO": lambda m, **o: zokern.MeZO(m, **o), "FZOO": lambda m, **o: zokern.FZOO(m, **{"queries": 2, **o}),
    "SubZero": lambda m, **o: zokern.SubZero(m, rank=2, interval=4, **o), "LOZO": lambda m,
    **o: zokern.LOZO(m, rank=2, interval=4, **o),
    "TeZO": lambda m, **o: zokern.TeZO(m, rank=2, **o), "PGAP": lambda m,
    **o: zokern.PGAP(m, rank=2, interval=4, probes=2, **o),
}  # fmt: skip


def small(dtype: torch.dtype) -> tuple[nn.Module, Callable]:
    model = build(lambda: nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 9, bias=False)), dtype)
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    return model, lambda: model(x).float().square().mean()


def run(
    method: str, rule: str, rounding: str, evaluation: str, freeze: bool, resumes: bool, after: int = 3
) -> dict[str, Tensor]:
    """Six steps, saved after some; the run goes on, or another optimizer resumes it."""
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    model, closure = small(dtype)
    options = {
        "lr": 1e-2,
        "eps": 1e-2,
        "seed": 3,
        "rounding": rounding,
        "evaluation": evaluation,
        "force": True,
        "weight_decay": 0.1,
    }
    make = lambda m: RUNS[method](m, **options, **(OWN.get((method, rule)) or RULES[rule]()))  # noqa: E731
    optimizer = make(model)
    for step in range(6):
        if freeze:
            model[0].weight.requires_grad_(step not in (2, 3, 4))
        if step == after:
            saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
            if resumes:
                model, closure = small(dtype)
                model.load_state_dict(saved[1])
                optimizer = make(model)
                optimizer.load_state_dict(saved[0])
                if freeze:
                    model[0].weight.requires_grad_(False)
        zokern.step(optimizer, closure)
    optimizer.flush()
    low = {
        f"low {n}": v["residual"]
        for n, p in model.named_parameters()
        if "residual" in (v := optimizer.state[p])
    }
    return {**snapshot(model), **low}


@pytest.mark.parametrize("evaluation", ["auto", "master", "paired", "scratch", "inplace"])
@pytest.mark.parametrize("method", RUNS)
def test_resume_has_the_bits_of_the_run_that_went_on(method: str, evaluation: str) -> None:
    """Rules, roundings and freezing; what a method does not take as a rule it says when it is built."""
    rules = [rule for rule in RULES if method in ("MeZO", "FZOO", "TeZO") or rule != "adam"]
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rule, rounding, freeze in itertools.product(
            rules, ("nearest", "stochastic", "residual"), (False, True)
        ):
            went, resumed = (
                run(method, rule, rounding, evaluation, freeze, resumes) for resumes in (False, True)
            )
            if not all(same_bits(went[n], resumed[n]) for n in went):
                wrong.append((rule, rounding, freeze))
    assert wrong == []


# Master -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("method", RUNS)
def test_resume_before_auto_has_chosen(method: str, after: int) -> None:
    """The choice is made from what the first step saw, also by the run that resumes after it."""
    went, resumed = (
        run(method, "sgd", "nearest", "auto", False, resumes, after) for resumes in (False, True)
    )
    assert all(same_bits(went[n], resumed[n]) for n in went)
    if after == 1 and method not in ("MeZO", "FZOO"):  # whose losses have the same bits in both ways here
        with patch.object(zokern.Auto, "state", {}):
            assert not all(
                same_bits(went[n], value)
                for n, value in run(method, "sgd", "nearest", "auto", False, True, after).items()
            )


class Repacked(nn.Linear):
    """A frozen layer whose weights take another layout, and an attribute says so, in its first forward."""

    packed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            with torch.no_grad():
                self.weight.copy_(self.weight.flip(0))
            self.packed = True
        return F.linear(x, self.weight.flip(0), self.bias)


@pytest.mark.parametrize("evaluation", ["auto", "master", "paired", "scratch", "inplace"])
def test_frozen_weights_that_are_repacked_stay_so(evaluation: str) -> None:
    """In the first step as in the next, and the losses are those of weights that were packed before."""
    model = build(lambda: nn.Sequential(Repacked(6, 4), nn.Linear(4, 3)))
    model[0].requires_grad_(False)
    x, twin = torch.randn(2, 6), copy.deepcopy(model)
    twin(x)
    losses = []
    for net in (model, twin):
        optimizer = zokern.MeZO(net, lr=1e-3, evaluation=evaluation)
        loss = lambda net=net: net(x).square().mean()  # noqa: E731
        losses.append([zokern.step(optimizer, loss).losses for _ in range(2)])
    assert losses[0] == losses[1] and model[0].packed
    assert torch.equal(model[0](x), twin[0](x))


def test_master_holds_one_copy() -> None:
    """By its record; test_step.py measures it."""
    model = tiny()
    result = zokern.step(
        zokern.MeZO(model, lr=0.0, evaluation="master"), lambda: next_token_loss(model(IDS), IDS)
    )
    assert result.scratch_bytes == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("way", ["auto", "paired", "scratch"])
def test_the_copy_of_a_comparison_is_let_go(way: str) -> None:
    """From the third step on a run holds its budget, and the copy of the weights no more."""
    model = build(lambda: nn.Linear(301, 299, bias=False))
    x = torch.ones(2, 301)

    def held() -> int:
        mine = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.shape == (299, 301)]
        mine = [t for t in mine if has_memory(t)]  # mapped copies have none of their own
        return len(
            {t.untyped_storage().data_ptr() for t in mine if t.untyped_storage().nbytes() == 4 * 299 * 301}
        )

    optimizer = zokern.MeZO(model, lr=0.0, evaluation=way)
    counts = []
    for _ in range(4):
        zokern.step(optimizer, lambda: model(x).square().mean())
        counts.append(held())
    assert counts[0] == 2 and counts[2:] == [1, 1], counts


@pytest.mark.parametrize("size", [(24, 40), (700, 600)], ids=["resident", "large"])
@pytest.mark.parametrize("method", ["MeZO", "SubZero", "LOZO"])
@pytest.mark.parametrize("way", [zokern.Scratch, zokern.Paired])
def test_low_bits_are_read_at_every_point(way: type, method: str, size: tuple[int, int]) -> None:
    """Under rounding='residual' a whole copy and looked-up rows have the bits that 'master' writes: at theta,
    along one draw and two."""
    weight = nn.Parameter(torch.linspace(-0.3, 0.4, size[0] * size[1]).view(size).bfloat16())
    probe, rows = torch.rand(size, dtype=torch.float64), torch.tensor([3, 0, 17, 3])

    def closure() -> Tensor:
        return (weight.double() * probe).sum() + (F.embedding(rows, weight).double() * probe[:4]).sum()

    options = {"lr": 1e-3, "eps": 1e-2, "rounding": "residual", "paired_check": None, "queries": 2}
    optimizer = getattr(zokern, method)([("w", weight)], evaluation="master", **options)
    for _ in range(3):
        zokern.step(optimizer, closure)
    assert optimizer.state[weight]["residual"].any()
    plan = optimizer.plan()
    optimizer.prepare(plan, Oracle(optimizer.evaluation, plan, closure))
    one, two = plan.draw(0), plan.draw(1)
    points = [THETA, Point(((one, 1.0),)), Point(((one, 1.0), (two, -0.5)))]
    right = zokern.Master().losses(plan, points, closure)
    found = way(budget=1 << 20, check=False).losses(plan, points, closure)
    assert torch.allclose(found, right, rtol=1e-12), (found - right).tolist()
    low = plan.groups[0].residuals
    plan.groups[0].residuals = None
    without = way(budget=1 << 20, check=False).losses(plan, points, closure)
    plan.groups[0].residuals = low
    assert not torch.isclose(without, right, rtol=1e-12)[1:].any(), "the low bits decide nothing here"


def swallowed(rounding: str) -> tuple[zokern.StepResult, Tensor, Tensor, list[Tensor]]:
    weight = nn.Parameter(torch.linspace(0.2, 3.0, 500).view(20, 25).bfloat16())
    before, seen = weight.detach().float().clone(), []
    optimizer = zokern.MeZO(
        [("w", weight)],
        lr=0.0,
        eps=2e-3,
        seed=4,
        evaluation=zokern.Master(rounding),
        force=True,
        paired_check=None,
        dead_limit=None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = zokern.step(
            optimizer, lambda: (seen.append(weight.detach().float().clone()), weight.float().sum())[1]
        )
    return result, zokern.draw("normal", (20, 25), seed=4, who="w", step=0), before, seen


def test_what_rounding_swallows_is_measured_and_said() -> None:
    result, _, before, seen = swallowed("nearest")
    share = float((seen[0] == before).double().mean())
    assert result.swallowed == pytest.approx(share, abs=1e-9) and 0.3 < share < 1.0
    weight = nn.Parameter(torch.ones(20, 25).bfloat16())
    optimizer = zokern.MeZO([("w", weight)], eps=1e-3, evaluation="master", force=True)
    with pytest.warns(RuntimeWarning, match="swallows .*rounding='stochastic'"):
        zokern.step(optimizer, lambda: weight.float().sum())
    with pytest.raises(ValueError, match="rounding is 'up'"):
        zokern.Master("up")


def test_stochastic_copies_keep_small_perturbations() -> None:
    """In expectation; both sides spend the same random bits."""
    kept = {}
    for rounding in ("nearest", "stochastic"):
        result, z, before, (up, down) = swallowed(rounding)
        kept[rounding] = float(((up - down) * z).sum() / (2 * 2e-3 * z.square().sum()))
    assert abs(kept["stochastic"] - 1.0) < 0.35 < abs(kept["nearest"] - 1.0) + 0.3, kept
    ulp = torch.finfo(torch.bfloat16).eps * 2.0 ** before.log2().floor()
    assert bool(((up - before).abs() <= ulp + 2e-3 * z.abs()).all())
    alone = float(((up - before) * z).sum() / (2e-3 * z.square().sum()))
    print(f"share of the perturbation that arrives: {kept}, of one side {alone:.2f}")


# Auto and trust ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, rows, chosen", [
    ("MeZO", 2, "paired"), ("MeZO", 513, "scratch"), ("SubZero", 256, "paired"), ("SubZero", 257, "scratch"),
    ("LOZO", 257, "scratch"),
    ("PGAP", 256, "paired"), ("PGAP", 257, "scratch"),
])  # fmt: skip
def test_auto_chooses_by_rows(method: str, rows: int, chosen: str) -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    x = torch.randn(rows, 30, generator=torch.Generator().manual_seed(0))
    make = getattr(zokern, method)
    optimizer = make(model, lr=0.0, seed=2, **({"probes": 2} if method == "PGAP" else {}))
    closure = lambda: model(x).square().mean()  # noqa: E731
    results = [zokern.step(optimizer, closure) for _ in range(3)]
    assert [r.evaluation for r in results] == ["master", chosen, chosen] and f"{rows} rows" in results[1].why
    other = make(model, lr=0.0, seed=2, **({"probes": 2} if method == "PGAP" else {}))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert zokern.step(other, closure).evaluation == chosen, (
        "a resumed run reads as the run that it continues"
    )


def test_auto_goes_on_with_another_way_and_one_warning() -> None:
    model = nn.Linear(6, 5)
    optimizer = zokern.MeZO(model, lr=0.0)
    closure = lambda: float(model(torch.ones(2, 6)).square().mean())  # noqa: E731
    zokern.step(optimizer, closure)
    with pytest.warns(RuntimeWarning, match="read by evaluation 'scratch' .*'paired': ") as caught:
        records = [zokern.step(optimizer, closure) for _ in range(3)]
    assert (
        {r.evaluation for r in records} == {"scratch"} and len(caught) == 1 and caught[0].filename == __file__
    )


@pytest.mark.parametrize("change", ["flags", "rows"])
@pytest.mark.parametrize("way", FAST)
def test_other_flags_and_larger_inputs_are_compared_again(way: str, change: str) -> None:
    """A stand-in that is wrong in train mode, or for many rows, as a cache can be."""
    model = nn.Sequential(nn.Linear(6, 5))
    kept = model[0].weight.detach()  # a view that no stand-in shows
    short, long = torch.ones(2, 6), torch.ones(20, 6)

    def closure() -> Tensor:
        x = long if change == "rows" and where == "new" else short
        wrong = model.training if change == "flags" else len(x) > 2
        return (F.linear(x, kept, model[0].bias) if wrong else model[0](x)).square().mean() + 0 * model(
            x
        ).mean()

    optimizer, where = zokern.MeZO(model, lr=0.0, eps=1e-2, evaluation=way), "old"
    model.eval()
    for _ in range(3):
        zokern.step(optimizer, closure)
    where = "new"
    model.train(change == "flags")
    with pytest.raises(zokern.Refused, match="cannot follow; use evaluation='master'"):
        zokern.step(optimizer, closure)


# Wrong evaluations ------------------------------------------------------------------------------------------


class Wrong:
    """Evaluation 'master' with one promise broken."""

    name, defers, exact, stands_in, state = "master", False, True, False, {}

    def __init__(self, how: str = "") -> None:
        self.how, self.inside = how, zokern.Master()

    @property
    def record(self):
        return self.inside.record

    def losses(self, plan, points, closure):
        group, root = plan.groups[-1], plan.tree.roots[0]
        i = max(range(len(group.theta)), key=lambda i: group.theta[i].numel())
        theta, last = group.theta[i].clone(), group.tensors[i].data

        def all_but_one():
            moved = last.clone()
            last.copy_(theta)  # where no version counter tells
            try:
                return closure()
            finally:
                last.copy_(moved)

        found = self.inside.losses(plan, points, all_but_one if self.how == "one parameter" else closure)
        if self.how == "sides":
            return found.flip(0)
        if self.how == "weight":
            group.theta[-1].view(-1)[:1].add_(2.0**-5)
        elif self.how == "buffer":
            next(root.buffers()).add_(1.0)
        elif self.how == "attribute":
            root.left_behind = found
        elif self.how == "random":
            torch.rand(1)
        elif self.how == "flag":
            root.training = not root.training
        return found


def same_losses(evaluation: object) -> None:
    check_losses(*of_architecture("opt"), evaluation)


CHECKS: dict[str, Callable] = {
    "losses": same_losses, "untouched": check_untouched,
    "stays": lambda e: check_stays(e, torch.bfloat16, "nearest", 5),
}  # fmt: skip


@pytest.mark.parametrize("how, check", [
    ("sides", "losses"), ("one parameter", "losses"), ("weight", "losses"), ("weight", "stays"),
    ("weight", "untouched"),
    ("buffer", "untouched"), ("attribute", "untouched"), ("random", "untouched"), ("flag", "untouched"),
])  # fmt: skip
def test_wrong_evaluations_are_rejected(how: str, check: str) -> None:
    CHECKS[check](Wrong())
    with pytest.raises((AssertionError, zokern.evaluation.NotRepeatable)):
        CHECKS[check](Wrong(how))


@pytest.mark.parametrize("how", ["sides", "one parameter"])
def test_trust_rejects_a_wrong_reading_and_cannot_be_passed_by(how: str) -> None:
    class Fast(zokern.Scratch):
        def read(self, plan, points, closure, isolation):
            wrong = Wrong(how)
            found = wrong.losses(plan, points, closure)
            self.record = wrong.record
            return found

    model, closure = of_architecture("opt")
    before = snapshot(model)
    with pytest.raises(zokern.Refused, match="cannot follow"):
        losses(zokern.MeZO, Fast(), model, closure)
    assert changed(model, before) == []
    with pytest.raises(AssertionError):  # one that passes the comparison by
        same_losses(Fast(check=False))


# Objective --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("withhold", ["labels", ("labels",)])
def test_an_objective_is_the_closure(withhold: str | tuple[str, ...]) -> None:
    model, inputs = build(models.llama).eval(), models.inputs("llama")
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    objective = zokern.Objective(
        model, inputs, lambda out, batch: next_token_loss(out.logits, batch["labels"]), withhold=withhold
    )
    found = [losses(zokern.MeZO, WAYS["paired"](), model, closure).losses for closure in (
        objective, lambda: next_token_loss(model(input_ids=inputs["input_ids"]).logits, inputs["labels"]),
    )]  # fmt: skip
    hook.remove()
    assert found[0] == found[1] and all(keys == ["input_ids"] for keys in seen)


@pytest.mark.parametrize("batch", [{"input_ids": torch.zeros(1, 2)}, (torch.zeros(1, 2),)])
def test_only_keys_of_the_batch_are_withheld(batch) -> None:
    with pytest.raises(ValueError, match=r"withhold names \['label'\]; expected keys of a mapping"):
        zokern.Objective(nn.Identity(), batch, lambda out, batch: out, withhold="label")
