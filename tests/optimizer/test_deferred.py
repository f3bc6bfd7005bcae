"""Updates that wait: the run is the one that writes at once, to rounding; who looks sees theta; what could
lose an update is refused."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from models import batch, changed, next_token_loss, same_bits, snapshot, tiny
from recipes import METHODS
from torch import Tensor, nn

import zokern
from zokern.evaluation import trust
from zokern.group import Group
from zokern.optimizer import deferred
from zokern.rule import momentum, sgd, waiting

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()
PARTS = {name: METHODS[name](tiny()) for name in METHODS}
# Those whose updates of matrices can wait.
DEFER = [
    name for name, o in PARTS.items() if o.factored is not None and o.rule.defers and not o.factored.joins
]
SOME = ("subzero", "lozo", "lozo_m", "tezo_m", "pgap")


def given_alone() -> dict:
    """Options for losses that are given one after the other:
    each is read once, and no two readings are compared."""
    return {"evaluation": zokern.Scratch(check=False), "paired_check": None}


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: next_token_loss(model(IDS), IDS)


def given(model: nn.Module, numbers) -> Callable[[], float]:
    """Losses that do not depend on the weights' last bits, from a model that is read all the same."""
    return lambda: float(model(IDS).sum()) * 0 + next(numbers)


def losses(count: int = 500, seed: int = 1) -> list[float]:
    return (4 + 0.002 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def waits(optimizer) -> list[str]:
    return sorted(m.name for m in optimizer.matrices.values() if m.pending is not None)


def run(name: str, steps: int, dtype: torch.dtype = torch.float32, model=None, **options):
    model = tiny(dtype, width=16) if model is None else model
    optimizer = METHODS[name](model, **{"seed": 3, "force": True, **given_alone(), **options})
    numbers = iter(losses())
    for _ in range(steps):
        zokern.step(optimizer, given(model, numbers))
    return model, optimizer


# Equal to updates at once -----------------------------------------------------------------------------------


def check_deferred(
    name: str, steps: int = 7, dtype: torch.dtype = torch.float32, rounding: str = "nearest", **options
) -> None:
    """Weights within a rounding a step of those of immediate writes (float32: 2^-24 of the largest weight,
    each), for given losses."""
    model, optimizer = run(name, steps, dtype, defer=True, rounding=rounding, **options)
    other, immediate = run(name, steps, dtype, defer=False, rounding=rounding, **options)
    assert waits(immediate) == []
    if steps % 3:  # every third step is the last of its basis
        assert waits(optimizer) == [n for n, p in sorted(model.named_parameters()) if p.dim() > 1]
    optimizer.flush()
    start = dict(tiny(dtype, width=16).named_parameters())
    for (n, a), (_, b) in zip(model.named_parameters(), other.named_parameters()):
        low = [0.0, 0.0]
        if rounding == "residual":
            low = [
                (o.state[p]["residual"].double() * 2.0**-16 * p.detach().double().abs() * 2.0**-7)
                .abs()
                .max()
                .item()
                for o, p in ((optimizer, a), (immediate, b))
            ]
        scale = max(a.abs().max().item(), (a - start[n]).abs().max().item())
        unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
        bound = (4 if dtype == torch.float32 else 1) * (steps + 2) * unit * scale + sum(low)
        worst = (a.double() - b.double()).abs().max().item()
        assert worst <= bound, f"{n}: {worst:.2g} from immediate updates, bound {bound:.2g}"
        moved = (a.double() - start[n].double()).abs().max().item()
        assert moved > 4 * bound, f"{n} moved by {moved:.2g} only"


@pytest.mark.parametrize("name", DEFER)
def test_waiting_equals_writing_at_once(name: str) -> None:
    """Two changes of the basis in seven steps."""
    check_deferred(name)


@pytest.mark.parametrize("name", DEFER)
def test_decay_while_updates_wait(name: str) -> None:
    check_deferred(name, weight_decay=10.0)


@pytest.mark.parametrize("name", ["subzero", "lozo_m"])
@pytest.mark.parametrize("rounding", ["stochastic", "residual"])
def test_roundings_of_16_bit_weights(name: str, rounding: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_deferred(name, dtype=torch.bfloat16, rounding=rounding, lr=0.3)


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    """Updates of less than half an ulp: written one by one most of the way is lost,
    and a sum of thirty arrives."""

    def way(dtype: torch.dtype, defer: bool) -> Tensor:
        model = tiny(torch.bfloat16, width=16).to(dtype)
        before = snapshot(model)
        optimizer = zokern.LOZO(model, lr=1e-4, interval=30, seed=1, defer=defer, force=True, **given_alone())
        numbers = iter(losses())
        for _ in range(30):
            zokern.step(optimizer, given(model, numbers))
        return torch.cat(
            [(p.double() - before[n].double()).flatten() for n, p in model.named_parameters() if p.dim() > 1]
        ).detach()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact, at_once = way(torch.float32, True), way(torch.bfloat16, False)
        together = way(torch.bfloat16, True)
    shares = [float(w @ exact / (exact @ exact)) for w in (at_once, together)]
    print(f"share of the float32 run's way: {shares[0]:.2f} written at once, {shares[1]:.2f} together")
    assert shares[0] < 0.75 < 0.85 < shares[1] < 1.1


@contextmanager
def patched_deposit(change: Callable) -> Iterator[None]:
    right = waiting.deposit

    def deposit(p, group, updates, decay, defer):
        return right(p, group, *change(group, updates, decay, defer))

    with patch.object(momentum, "deposit", deposit), patch.object(sgd, "deposit", deposit):
        yield


def forget_decay(group, updates, decay, defer):
    return updates, 1.0 if defer else decay, defer


def decay_once(group, updates, decay, defer):
    """The weights shrink, and what waits does not."""
    if defer:
        for matrix in group.matrices:
            if matrix.pending is not None:
                matrix.pending = matrix.pending / decay
    return updates, decay, defer


def keep_the_last(group, updates, decay, defer):
    for matrix in group.matrices:
        if matrix.pending is not None:
            matrix.pending = torch.zeros_like(matrix.pending)
    return updates, decay, defer


@pytest.mark.parametrize("change", [forget_decay, decay_once, keep_the_last])
def test_check_rejects_wrong_deposit(change: Callable) -> None:
    with patched_deposit(change), pytest.raises(AssertionError, match="from immediate updates"):
        check_deferred("subzero", weight_decay=10.0)


def test_check_rejects_a_write_after_the_basis_changed() -> None:
    """What waits belongs to the old basis."""
    with (
        patch.object(zokern.optimizer.ZerothOrder, "defers", lambda self: bool(self.deferred.wanted)),
        patch.object(deferred.Deferred, "settle", lambda self, p: None),
        pytest.raises((AssertionError, RuntimeError)),
    ):
        check_deferred("subzero")


# Who looks sees theta ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFER)
def test_flush_is_idempotent(name: str) -> None:
    model, optimizer = run(name, 4)
    assert waits(optimizer) and optimizer.pending
    before = snapshot(model)
    optimizer.flush()
    assert waits(optimizer) == [] and {"up.weight", "embed.weight"} <= set(changed(model, before))
    assert not optimizer.pending
    flushed = snapshot(model)
    optimizer.flush()
    assert changed(model, flushed) == []
    assert all(m.shrink == 1.0 for m in optimizer.matrices.values())


@pytest.mark.parametrize("name", DEFER)
def test_evaluating_writes_nothing(name: str) -> None:
    """Inside, the model is the flushed one to rounding;
    outside nothing has happened: the run ends at the same bits."""
    model, optimizer = run(name, 4, weight_decay=1.0)
    before, pending = snapshot(model), [m.pending.clone() for m in optimizer.matrices.values()]
    with optimizer.evaluating(), torch.no_grad():
        inside = model(IDS)
        weights = {n: (p + 0).clone() for n, p in model.named_parameters()}
    assert changed(model, before) == []
    assert all(same_bits(a, m.pending) for a, m in zip(pending, optimizer.matrices.values()))
    numbers = iter(losses(seed=2))
    for _ in range(4):
        zokern.step(optimizer, given(model, numbers))
        with optimizer.evaluating(), torch.no_grad():
            model(IDS)
    optimizer.flush()
    quiet, other = run(name, 4, weight_decay=1.0)
    numbers = iter(losses(seed=2))
    for _ in range(4):
        zokern.step(other, given(quiet, numbers))
    other.flush()
    assert changed(quiet, snapshot(model)) == []
    flushed, third = run(name, 4, weight_decay=1.0)
    third.flush()
    with torch.no_grad():
        outside = flushed(IDS)
    assert (inside - outside).abs().max() <= 1e-5 * outside.abs().max()
    assert all((weights[n] - p).abs().max() <= 1e-6 * p.abs().max() for n, p in flushed.named_parameters())
    with torch.no_grad():
        flushed.load_state_dict(before)
        assert (inside - flushed(IDS)).abs().max() > 1e-3, "the waiting updates do not show"


def test_evaluating_ends_with_an_exception() -> None:
    model, optimizer = run("subzero", 4)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), optimizer.evaluating():
        raise KeyboardInterrupt
    assert changed(model, before) == [] and waits(optimizer)
    assert torch.overrides._get_current_function_mode_stack() == []
    with torch.no_grad():
        model(IDS)
    assert waits(optimizer) == []  # outside again: the forward wrote


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("look", ["forward", "state_dict", "optimizer_state_dict", "compiled"])
def test_whoever_looks_sees_every_update(name: str, look: str) -> None:
    """The module's forward and state_dict, and the optimizer's state_dict, write first."""
    model, optimizer = run(name, 4)
    expected, other = run(name, 4)
    other.flush()
    assert waits(optimizer)
    if look == "forward":
        with torch.no_grad():
            assert torch.equal(model(IDS), expected(IDS))
    elif look == "compiled":
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(IDS), expected(IDS))
    elif look == "state_dict":
        assert all(same_bits(t, dict(expected.named_parameters())[n]) for n, t in model.state_dict().items())
    else:
        optimizer.state_dict()
    assert waits(optimizer) == [] and changed(model, snapshot(expected)) == []


@pytest.mark.parametrize("traced", [False, True])
def test_module_that_was_compiled_first_shows_every_update(traced: bool) -> None:
    """Also where its graph is older than the hook of its inner module; so does the inner module itself."""
    for outer in (False, True):
        model = tiny(width=16)
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            if traced:
                compiled(IDS)
            optimizer = zokern.SubZero(compiled, rank=3, evaluation="scratch")
            zokern.step(optimizer, closure_of(compiled))
            assert waits(optimizer)
            seen = (compiled if outer else model)(IDS)
            assert waits(optimizer) == [] and torch.equal(seen, model(IDS))


def test_check_rejects_a_module_without_hooks() -> None:
    with (
        patch.object(deferred._Flush, "__call__", lambda *_: None),
        pytest.raises(AssertionError),
    ):
        test_whoever_looks_sees_every_update("subzero", "forward")


def test_parameters_without_a_module_do_not_wait_by_themselves() -> None:
    model = tiny(width=16)
    _, optimizer = run("subzero", 1, model=model)
    assert waits(optimizer)
    optimizer = zokern.SubZero(model.named_parameters(), rank=3, evaluation="scratch")
    zokern.step(optimizer, closure_of(model))
    assert waits(optimizer) == []
    optimizer = zokern.SubZero(model.named_parameters(), rank=3, evaluation="scratch", defer=True)
    zokern.step(optimizer, closure_of(model))
    assert waits(optimizer)


WHEN = {
    "scratch": [True, True],
    "paired": [True, True],
    "auto": [False, True],
    "master": [False, False],
    "inplace": [False, False],
}


def check_when_updates_wait(name: str, evaluation, expected: list[bool]) -> None:
    """In the first two steps of a basis."""
    model = tiny(width=16)
    optimizer = METHODS[name](model, seed=3, evaluation=evaluation)
    found = []
    for _ in expected:
        zokern.step(optimizer, closure_of(model))
        assert optimizer.pending == bool(waits(optimizer))
        found.append(optimizer.pending)
    assert found == expected


@pytest.mark.parametrize("evaluation", WHEN)
@pytest.mark.parametrize("name", SOME)
def test_updates_wait_where_weights_are_copied_and_nowhere_else(name: str, evaluation: str) -> None:
    """Where the parameters themselves are written, updates are too.
    The first step of 'auto' is read by 'master'."""
    check_when_updates_wait(name, evaluation, WHEN[evaluation])


def test_check_rejects_a_master_that_defers() -> None:
    class Defers(zokern.Master):
        defers = True

    with pytest.raises(AssertionError):
        check_when_updates_wait("subzero", Defers(), WHEN["master"])


def test_a_copy_of_the_module_has_no_hook_left() -> None:
    model, optimizer = run("subzero", 4)
    optimizer.flush()
    other = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(other(IDS), model(IDS)) and torch.equal(loaded(IDS), model(IDS))
    zokern.step(optimizer, closure_of(model))
    assert waits(optimizer)
    with torch.no_grad():
        other(IDS), loaded(IDS), other.state_dict()
    assert waits(optimizer)


@pytest.mark.parametrize("edit", [
    lambda w: w.mul_(1.5), lambda w: w.copy_(torch.zeros_like(w)), lambda w: w[0].fill_(1.0),
    lambda w: w.view(-1)[3:5].add_(1.0),
], ids=["mul", "copy", "row", "view"])  # fmt: skip
@pytest.mark.parametrize("name", SOME)
def test_an_edit_while_updates_wait_is_refused(name: str, edit: Callable) -> None:
    """By name, whoever comes next: flush, forward, state_dict, the write at the end of an interval."""
    model, optimizer = run(name, 1)
    with torch.no_grad():
        edit(model.up.weight)
    for look in (optimizer.flush, lambda: model(IDS), model.state_dict, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"'up.weight'.*flush\(\)"):
            look()
    if name != "tezo_m":  # whose basis never changes
        with pytest.raises(RuntimeError, match="up.weight"):
            for _ in range(3):
                zokern.step(optimizer, given(model, iter(losses())))


def check_comparison_at_the_end_of_a_basis(optimizer_of: Callable[[nn.Module, bool], object]) -> None:
    """Inputs that are longer than before are compared with 'master', which writes the weights and puts them
    back: also in the step that writes deferred updates, the last one of a basis."""
    found, right = [], trust.compare
    for check in (True, False):
        model = tiny(width=16)
        optimizer, compared = optimizer_of(model, check), []

        def compare(*given, steps=compared, of=optimizer):
            steps.append(of.steps)
            return right(*given)

        with patch.object(trust, "compare", compare):
            for step in range(6):
                ids = IDS if step in (2, 4) else IDS[:1]
                zokern.step(optimizer, lambda ids=ids, model=model: next_token_loss(model(ids), ids))
                assert bool(waits(optimizer)) == (step % 3 != 2)
        assert (2 in compared) == check
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("evaluation", [zokern.Scratch, zokern.Paired])
@pytest.mark.parametrize("name", ["lozo", "subzero"])
def test_a_comparison_at_the_end_of_a_basis(name: str, evaluation: type) -> None:
    check_comparison_at_the_end_of_a_basis(
        lambda model, check: METHODS[name](
            model, interval=3, lr=1e-3, evaluation=evaluation(check=check), paired_check=None
        )
    )


def test_a_write_that_trusts_version_counters_within_a_step_is_rejected() -> None:
    right = Group.write

    def write(self, noise, rounding):
        self.check_waiting()
        return right(self, noise, rounding)

    with patch.object(Group, "write", write), pytest.raises(RuntimeError, match="were written while"):
        test_a_comparison_at_the_end_of_a_basis("lozo", zokern.Paired)


@pytest.mark.parametrize("name", SOME)
def test_discard_goes_on_from_edited_weights(name: str) -> None:
    model, optimizer = run(name, 1)
    with torch.no_grad():
        model.up.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"'up.weight'.*discard\(\)"):
        zokern.step(optimizer, closure_of(model))  # at once, not at the end of the interval
    before = snapshot(model)
    optimizer.discard()
    assert waits(optimizer) == []
    optimizer.flush()
    assert changed(model, before) == []
    assert not zokern.step(optimizer, closure_of(model)).skipped


# A skipped step ---------------------------------------------------------------------------------------------


def check_skipped_end(name: str, skipped: int, **more: object) -> None:
    """A loss that is NaN in the last step of an interval:
    what waits is still written with the basis that it belongs to."""
    ends = []
    for defer in (True, False):
        model = tiny(width=16)
        optimizer = METHODS[name](model, seed=3, defer=defer, **given_alone(), **more)
        for step, number in enumerate(losses()[:14]):
            zokern.step(
                optimizer,
                given(model, iter([float("nan")] * 2 if step == skipped else [number, number + 1e-3] * 20)),
            )
        optimizer.flush()
        ends.append(snapshot(model))
    for key, weight in ends[0].items():
        assert (weight - ends[1][key]).abs().max() <= 14 * 2.0**-24 * weight.abs().max(), (
            f"{key} is not that of immediate updates"
        )


@pytest.mark.parametrize("skipped", [2, 5, 6])
@pytest.mark.parametrize("name", ["subzero", "lozo", "lozo_m"])
def test_a_skipped_last_step_loses_nothing(name: str, skipped: int) -> None:
    check_skipped_end(name, skipped)


class Numbers(zokern.Sgd):
    """A rule that is not gated: it does nothing in a skipped step, the last of an interval too."""


def test_a_rule_that_skips_the_last_step_loses_nothing() -> None:
    check_skipped_end("subzero", 2, rule=Numbers())


def test_check_rejects_a_basis_that_changes_under_what_waits() -> None:
    with (
        patch.object(deferred.Deferred, "settle", lambda self, p: None),
        pytest.raises(AssertionError, match="is not that of"),
    ):
        check_skipped_end("subzero", 2, rule=Numbers())


# Parts of a module, copies, and other optimizers ------------------------------------------------------------


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = tiny(width=16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(ids)


def as_pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


LOOKS: dict[str, Callable[[nn.Module], Tensor]] = {
    "a part": lambda m: m.body.up(torch.ones(2, 16)), "the parts of a part": lambda m: m.body(IDS),
    "its state": lambda m: m.body.up.state_dict()["weight"],
    "a copy": lambda m: copy.deepcopy(m).body.up.weight,
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_at_a_part_sees_every_update(look: str) -> None:
    found = []
    for flushed in (True, False):
        torch.manual_seed(0)
        model = Body()
        _, optimizer = run("subzero", 1, model=model)
        assert waits(optimizer)
        if flushed:
            optimizer.flush()
        with torch.no_grad():
            found.append(LOOKS[look](model).clone())
        assert waits(optimizer) == []
        # nothing stands in the way of later calls
        assert all(not m._forward_pre_hooks for m in model.modules())
    assert same_bits(*found)


@pytest.mark.parametrize("look", ["a part", "its state"])
def test_check_rejects_hooks_of_the_root_alone(look: str) -> None:
    def root_alone(self, model: nn.Module, given: nn.Module) -> None:
        self._parts = (model,)

    with patch.object(deferred.Deferred, "watch", root_alone), pytest.raises(AssertionError):
        test_whoever_looks_at_a_part_sees_every_update(look)


def test_check_rejects_a_copy_without_a_write() -> None:
    def without(self, memo: dict) -> Callable[..., None]:
        return lambda *_: None

    with (
        patch.object(deferred._Flush, "__deepcopy__", without),
        pytest.raises(AssertionError),
    ):
        test_whoever_looks_at_a_part_sees_every_update("a copy")


def test_a_pickle_is_refused_and_writes_nothing() -> None:
    """It would lack what waits; after a flush it holds the weights as they are."""
    for model in (Body(), tiny(width=16)):
        _, optimizer = run("subzero", 1, model=model)
        before = everything(model, optimizer)
        with pytest.raises(RuntimeError, match=r"flush\(\) first"):
            as_pickled(model)
        assert everything(model, optimizer) == before
        optimizer.flush()
        assert changed(as_pickled(model), snapshot(model)) == []


def test_a_copy_that_would_be_stale_is_refused() -> None:
    """The weights of the module itself are read before its hooks."""
    model = nn.Linear(16, 16)
    optimizer = zokern.SubZero(model, rank=2, lr=1e-2, evaluation="scratch")
    zokern.step(optimizer, lambda: model(torch.ones(2, 16)).square().mean())
    assert optimizer.pending
    with pytest.raises(RuntimeError, match=r"flush\(\) first"):
        copy.deepcopy(model)
    optimizer.flush()
    assert torch.equal(copy.deepcopy(model).weight, model.weight)


@pytest.mark.parametrize("part", [False, True])
def test_loading_weights_while_updates_wait(part: bool) -> None:
    """What waited belonged to the weights before:
    the loaded ones are exactly those of the file, and the run goes on."""
    model, other = Body(), Body()
    _, optimizer = run("subzero", 1, model=model)
    (model.body if part else model).load_state_dict((other.body if part else other).state_dict())
    assert waits(optimizer) == [] and changed(model, snapshot(other)) == []
    assert not zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS)).skipped


def test_two_optimizers_on_one_model() -> None:
    """What the one keeps waiting is written before the other's step reads the model."""
    model = Body()
    first = zokern.SubZero(
        [(n, p) for n, p in model.named_parameters()], rank=2, lr=1e-2, defer=True, evaluation="scratch"
    )
    for build in (
        lambda: zokern.SubZero(model, rank=2, lr=1e-2),
        lambda: zokern.MeZO(model.named_parameters(), lr=1e-4),
    ):
        second = build()
        for _ in range(2):
            zokern.step(first, lambda: next_token_loss(model(IDS), IDS))
            assert waits(first)
            zokern.step(second, lambda: next_token_loss(model(IDS), IDS))
            assert waits(first) == []
        second.flush()


def test_a_step_or_a_save_inside_evaluating_is_refused() -> None:
    model, optimizer = run("subzero", 1)
    before = snapshot(model)
    step = lambda: zokern.step(optimizer, closure_of(model))  # noqa: E731
    for call in (step, optimizer.state_dict, optimizer.flush, model.state_dict, model.up.state_dict):
        with optimizer.evaluating(), pytest.raises(RuntimeError, match=r"inside evaluating\(\)"):
            call()
        assert changed(model, before) == [] and waits(optimizer)


def test_adapters_of_peft_do_not_wait() -> None:
    """merge_and_unload reads them where no hook sees it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), peft.LoraConfig(r=4, target_modules=["0"])
    )
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_()
    optimizer = zokern.SubZero(model, rank=2, lr=0.1, eps=1e-2)
    x = torch.ones(2, 16)
    for _ in range(3):
        zokern.step(optimizer, lambda: model(x).square().mean())
        assert waits(optimizer) == []
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-6)


# Exceptions -------------------------------------------------------------------------------------------------


def everything(model: nn.Module, optimizer) -> dict:
    return {
        "weights": {n: t.numpy().tobytes() for n, t in snapshot(model).items()},
        "waiting": {
            m.name: None if m.pending is None else (m.pending.numpy().tobytes(), m.shrink)
            for m in optimizer.matrices.values()
        },
        "rng": torch.get_rng_state().numpy().tobytes(),
        "tree": [(n, id(m), m.training) for n, m in model.named_modules()],
        "steps": (optimizer.steps, optimizer.guards.skips, optimizer.guards.dead),
    }


@pytest.mark.parametrize("evaluation", ["scratch", "paired"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", SOME)
def test_exceptions_leave_what_waits(name: str, error: type, evaluation) -> None:
    """In the first step, between, at the last step of a basis and at the first of a new one; the run that
    goes on is the run without them."""
    ends = []
    for failing in (False, True):
        model = tiny(width=16, dropout=0.1)
        optimizer = METHODS[name](model, seed=3, weight_decay=0.5, evaluation=evaluation)
        for step in range(6):
            # the first step also reads the points by 'master'
            calls_of_a_step = 1 if evaluation == "paired" and step else 2
            for at in range(2 * calls_of_a_step if failing and step in (0, 1, 2, 3) else 0):
                calls: list[bool] = []

                def closure(calls: list = calls, at: int = at, model: nn.Module = model) -> Tensor:
                    calls.append(True)
                    loss = next_token_loss(model(IDS), IDS)
                    if len(calls) > at // 2 and at % 2:
                        raise error("after")
                    if len(calls) > at // 2:
                        torch.rand(3)
                        raise error("before")
                    return loss

                before = everything(model, optimizer)
                with pytest.raises(error):
                    zokern.step(optimizer, closure)
                after = everything(model, optimizer)
                if step:
                    for what, value in before.items():
                        assert after[what] == value, f"step {step}, call {at // 2}: {what} changed"
                else:
                    assert after["weights"] == before["weights"] and not waits(optimizer)
            zokern.step(optimizer, closure_of(model))
        optimizer.flush()
        ends.append(snapshot(model))
    assert all(same_bits(ends[1][n], t) for n, t in ends[0].items())


def test_check_rejects_a_reading_that_changes_what_waits() -> None:
    class Changes(zokern.Scratch):
        def losses(self, plan, points, closure):
            for matrix in (m for group in plan.groups for m in group.matrices or () if m.pending is not None):
                matrix.pending = matrix.pending + 1e-3
            return super().losses(plan, points, closure)

    with pytest.raises(AssertionError, match="waiting changed"):
        test_exceptions_leave_what_waits("subzero", RuntimeError, Changes())


# Resuming ---------------------------------------------------------------------------------------------------


def saved(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RESUMES = {
    **{name: {"name": name} for name in METHODS},
    "lozo_queries": {"name": "lozo", "queries": 2, "weight_decay": 0.5},
    "lozo_m_immediate": {"name": "lozo_m", "defer": False},
    "subzero_paired": {"name": "subzero", "evaluation": "paired"},
    "pgap_paired": {"name": "pgap", "evaluation": "paired"}, "FGD": {"name": "FGD", "evaluation": "jvp"},
}  # fmt: skip


@pytest.mark.parametrize("after", [2, 3, 4])
@pytest.mark.parametrize("case", RESUMES)
def test_resume_is_exact(case: str, after: int) -> None:
    """Saved within an interval, at its end, and after its first step;
    bit for bit the run that flushed there too and went on."""
    check_resume(after=after, **RESUMES[case])


def test_resume_is_exact_under_auto() -> None:
    check_resume("subzero", 4, evaluation="auto")


def takes_slopes(name: str) -> bool:
    """Whether a method goes with an estimator of the caller's, and reads losses around theta."""
    try:
        return METHODS[name](tiny(), estimator=zokern.ForwardGradient()).rule.base is None
    except (TypeError, ValueError):
        return False


SLOPES = [name for name in METHODS if takes_slopes(name)]


@pytest.mark.parametrize("name", SLOPES)
def test_resume_with_slopes_is_exact_under_auto(name: str) -> None:
    """The check of the first step, which a resumed run has anew, reads losses by a way that defers."""
    assert {*SOME} <= {*SLOPES}
    check_resume(name, 1, evaluation="auto", estimator=zokern.ForwardGradient())


def test_check_rejects_an_auto_that_defers_by_what_its_checks_read() -> None:
    class Checked(zokern.Auto):
        @property
        def defers(self) -> bool:
            return bool(self.order) and self.ways[self.order[0]].defers

    for name in SOME:
        with pytest.raises(AssertionError):
            check_resume(name, 1, evaluation=Checked(), estimator=zokern.ForwardGradient())


def check_resume(name: str, after: int, forget: Callable[[dict], None] | None = None, **options) -> None:
    options = {"seed": 2**64 - 5, "evaluation": "scratch", **options}
    whole = tiny(width=16)
    optimizer = METHODS[name](whole, **options)
    for step in range(7):
        if step == after:
            optimizer.flush()
        zokern.step(optimizer, closure_of(whole))
    optimizer.flush()

    first = tiny(width=16)
    optimizer = METHODS[name](first, **options)
    for _ in range(after):
        zokern.step(optimizer, closure_of(first))
    state, weights = saved(optimizer.state_dict()), saved(first.state_dict())
    if forget is not None:
        forget(state)
    second = tiny(width=16)
    second.load_state_dict(weights)
    resumed = METHODS[name](second, **{**options, "seed": 1})
    resumed.load_state_dict(state)
    for _ in range(after, 7):
        zokern.step(resumed, closure_of(second))
    resumed.flush()
    assert changed(second, snapshot(whole)) == []


def check_saving(
    name: str, after: int, options: dict, same: bool, save: Callable = lambda o: o.state_dict()
) -> None:
    """For losses that were given, so that no last bit of a weight comes back as a coefficient: how far is
    known, whether at all is not."""
    ends, began, saves_wrote = [], {}, False
    for saves in (False, True):
        model = tiny(width=16)
        began = snapshot(model)
        optimizer = METHODS[name](model, seed=3, **given_alone(), **options)
        numbers = iter(losses())
        for step in range(5):
            if saves and step == after:
                waited = waits(optimizer)
                save(optimizer)
                saves_wrote = bool(waited) and not waits(optimizer)
            zokern.step(optimizer, given(model, numbers))
        optimizer.flush()
        ends.append(snapshot(model))
    assert saves_wrote is not same
    for n, a in ends[0].items():
        b, moved = ends[1][n], (a - began[n]).abs().max().item()
        if same:
            assert same_bits(a, b), f"{n}: saving changed bits"
            continue
        # one rounding more of what waits, and one of the weight: 2^-24 of the largest each, with as much
        # again for sums in another order
        bound = 4 * 2.0**-24 * (b.abs().max().item() + moved)
        worst = (a.double() - b.double()).abs().max().item()
        assert worst <= bound, f"{n}: {worst:.2g} from the run that was not saved, bound {bound:.2g}"
        assert moved > 16 * bound, f"{n} moved by {moved:.2g} only"


@pytest.mark.parametrize(
    ("after", "options", "same"), [(2, {}, False), (3, {}, True), (2, {"defer": False}, True)]
)
@pytest.mark.parametrize("name", ["subzero", "lozo", "pgap"])
def test_saving_is_one_more_rounding_within_an_interval(
    name: str, after: int, options: dict, same: bool
) -> None:
    """As docs/factored.md says: at an interval's end, and where nothing waits, it changes no bit."""
    check_saving(name, after, options, same)


def lose(optimizer) -> None:
    optimizer.discard()


def write_twice(optimizer) -> None:
    for matrix in optimizer.matrices.values():
        if matrix.pending is not None:
            matrix.pending = 2 * matrix.pending
    optimizer.flush()


@pytest.mark.parametrize("wrong", [lose, write_twice])
@pytest.mark.parametrize("name", ["subzero", "lozo", "pgap"])
def test_check_rejects_a_save_that_loses_or_repeats_what_waits(name: str, wrong: Callable) -> None:
    with pytest.raises(AssertionError, match="from the run that was not saved"):
        check_saving(name, 2, {}, False, wrong)


FORGOTTEN = {
    "momentum": ("lozo_m", lambda state: state["state"].clear()),
    "moments": ("tezo_adam", lambda state: state["state"].clear()),
    "updates": ("tezo_adam_corrected", lambda state: [v.update(updates=0) for v in state["state"].values()]),
    "probes": ("pgap", lambda state: state["zokern"]["state"]["direction"].update({3: [1.0, 0.5, 0.25]})),
    "step": ("subzero", lambda state: state["zokern"].update(step=0)),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_check_rejects_a_state_that_forgets(what: str) -> None:
    name, forget = FORGOTTEN[what]
    with pytest.raises(AssertionError):
        check_resume(name, 4, forget)


def test_probes_that_are_not_known_are_refused() -> None:
    def forget(state: dict) -> None:
        state["zokern"]["state"]["direction"] = {}

    with pytest.raises(RuntimeError, match="step 4 needs the basis of step 3"):
        check_resume("pgap", 4, forget)


def test_loading_drops_what_waits_in_the_loading_optimizer() -> None:
    """Its weights are loaded too, so its own updates are gone; none of them may be written later."""
    model, optimizer = run("subzero", 4)
    state, weights = optimizer.state_dict(), saved(model.state_dict())
    numbers = iter(losses())
    for _ in range(1):
        zokern.step(optimizer, given(model, numbers))
    assert waits(optimizer)
    optimizer.load_state_dict(state)
    model.load_state_dict(weights)
    optimizer.flush()
    assert changed(model, weights) == [] and optimizer.steps == 4


def frozen_midway(settles: bool) -> tuple[Tensor, Tensor]:
    """A matrix that is frozen while its update waits:
    what it is worth before and after, read through the module."""
    model = tiny(width=16)
    optimizer = METHODS["subzero"](model, seed=1, evaluation="scratch")
    name, matrix = next((n, p) for n, p in model.named_parameters() if p.dim() == 2)
    zokern.step(optimizer, closure_of(model))
    (waiting,) = [m for m in optimizer.matrices.values() if m.name == name]
    assert waiting.pending is not None
    expected = matrix.detach() + waiting.left @ waiting.pending @ waiting.right.T
    matrix.requires_grad_(False)
    with patch.object(
        deferred.Deferred,
        "settle",
        deferred.Deferred.settle if settles else lambda self, plan: None,
    ):
        zokern.step(optimizer, closure_of(model))
    return matrix.detach().clone(), expected  # as the optimizer leaves it: its end writes the rest


def test_freezing_writes_what_waits() -> None:
    got, expected = frozen_midway(True)
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-7)
    got, expected = frozen_midway(False)
    assert not torch.allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_hooks_are_off_during_a_step_and_before_others_after_it() -> None:
    """A hook that a user adds while updates wait still reads the weights with all of them after a step."""
    model, seen, during = tiny(width=16), list[Tensor](), list[int]()
    part = next(module for module in model.modules() if isinstance(module, nn.Linear))

    def closure() -> Tensor:
        during.append(sum(len(module._forward_pre_hooks) for module in part.modules()))
        return next_token_loss(model(IDS), IDS)

    optimizer = METHODS["subzero"](model, seed=3, force=True, **given_alone())
    zokern.step(optimizer, closure)
    part.register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))
    zokern.step(optimizer, closure)
    assert waits(optimizer) and during[0] == 0 and set(during[-2:]) == {1}, during
    seen.clear()
    part(torch.zeros(1, part.in_features))
    assert same_bits(seen[0], part.weight) and waits(optimizer) == []


def test_check_rejects_hooks_that_come_after_others() -> None:
    right = deferred.Deferred.close

    def last(self, tree) -> None:
        right(self, tree)
        for register, number in zip(self._registers, self._numbers):
            register.move_to_end(number)

    with patch.object(deferred.Deferred, "close", last), pytest.raises(AssertionError):
        test_hooks_are_off_during_a_step_and_before_others_after_it()
