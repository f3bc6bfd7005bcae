"""Closures that can be interleaved and closures that cannot: exceptions, shared state, ways that part, compiled models."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import build, changed, next_token_loss, one_thread, snapshot, tiny  # noqa: F401 (a fixture)
from recipes import METHODS
from test_exceptions import raise_everywhere
from test_paired import BOUNDS, DIRECTIONS, IDS, compare, large
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import zokern
from zokern.evaluation import Paired, auto, meeting

greenlet = pytest.importorskip("greenlet")


# Exceptions -----------------------------------------------------------------------------------------------------------------------


@contextmanager
def watched_greenlets() -> Iterator[list]:
    """Every greenlet that a meeting starts."""
    started = []

    class Watched(greenlet.greenlet):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            started.append(self)

    names = SimpleNamespace(greenlet=Watched, getcurrent=greenlet.getcurrent, GreenletExit=greenlet.GreenletExit)
    with patch.object(meeting, "greenlet", names):
        yield started


@pytest.mark.parametrize("direction", ["dense", "subzero", "lozo"])
def test_500_exceptions_leave_no_trace(direction: str) -> None:
    """Raised at every module of both sides, which are in the middle of the model when it happens."""
    with large(16), watched_greenlets() as started:
        count = raise_everywhere(
            Paired(check=False), 125 if direction == "dense" else 60, make=DIRECTIONS[direction], interleaved=True
        )
        assert count == (500 if direction == "dense" else 240)
        assert len(started) >= count and all(side.dead for side in started), "a side is still alive"


def test_sides_that_are_not_unwound_are_rejected() -> None:
    """A meeting that drops its sides after an exception leaves their modes on the thread, or the sides alive."""

    class Kept(greenlet.greenlet):
        def throw(self, *arguments):
            return None if arguments == (greenlet.GreenletExit,) else super().throw(*arguments)

    with large(16), watched_greenlets() as started:
        meeting.greenlet.greenlet = type("Both", (Kept, meeting.greenlet.greenlet), {})
        raise_everywhere(Paired(check=False), 1, make=zokern.MeZO, interleaved=True)
        raise_everywhere(Paired(check=False), 20, make=zokern.MeZO, interleaved=True)
        assert not all(side.dead for side in started)
        for side in started:
            if not side.dead:
                greenlet.greenlet.throw(side, greenlet.GreenletExit)


def read(optimizer: zokern.MeZO, closure: Callable) -> None:
    """A step's reading alone: the step around it restores modes of its own."""
    optimizer.evaluation.read(optimizer.plan(), closure)


def check_thread_after(outer: Callable, side: int, error: type[BaseException], call: Callable = read) -> None:
    """An exception in the middle of a model that has changed the thread's modes: all of them are as before."""
    model = tiny(width=16)
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(True)
        mine = len(calls) - 1
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.float16, cache_enabled=False), torch.inference_mode():
            h = model.up(model.norm(model.embed(IDS)))
            torch.manual_seed(mine)
            h = model.down(h)
            if mine == side:
                raise error("planned")
        return next_token_loss(model.head(h.clone()), IDS)

    def thread() -> tuple:
        return (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(), torch.get_rng_state().numpy().tobytes(),
        )  # fmt: skip

    calls.clear()
    optimizer = zokern.MeZO(model, evaluation=Paired(check=False), queries=2)
    with outer(), large():
        before = thread()
        with pytest.raises(error, match="planned"):
            call(optimizer, closure)
        after = thread()
    assert after == before, f"the thread is {after[:5]}, it was {before[:5]}"


OUTER = {
    "plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("side", [0, 1, 3])
@pytest.mark.parametrize("outer", OUTER)
def test_thread_after_an_exception(outer: str, side: int) -> None:
    for error, call in itertools.product((RuntimeError, KeyboardInterrupt), (read, zokern.step)):
        check_thread_after(OUTER[outer], side, error, call)


def test_thread_that_is_not_put_back_is_rejected() -> None:
    """A run without its last line, which gives the caller's state back to the thread."""
    right, start, made = meeting._Thread.enter, meeting._Thread.__init__, []

    @contextmanager
    def inference() -> Iterator[None]:
        with torch.inference_mode():
            try:
                yield
            finally:
                right(made[0])

    with (
        patch.object(meeting._Thread, "__init__", lambda self, devices: (start(self, devices), made.append(self))[0]),
        patch.object(meeting._Thread, "enter", lambda self: None if self is made[0] else right(self)),
        pytest.raises(AssertionError, match="the thread is"),
    ):
        check_thread_after(inference, 1, RuntimeError)


def test_the_error_shows_the_line_of_the_closure() -> None:
    """Also where the computation of several sides raises: a matrix that does not fit."""
    model = build(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 8)))
    with large(16), pytest.raises(RuntimeError, match="shape") as caught:
        zokern.step(zokern.MeZO(model, evaluation="paired"), lambda: model(torch.ones(2, 8)).mean())
    assert any("test_meeting" in str(entry.path) and "<lambda>" in entry.name for entry in caught.traceback)


# Closures that cannot be interleaved ----------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """Counts its calls in a buffer, and its output depends on the count."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny(width=16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.body(ids) * (1 + 0.1 * self.calls)


class Shelf(nn.Module):
    """What one module leaves in a Python attribute, a later one reads; in between lies a product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = (
            nn.Embedding(models.VOCABULARY, 16),
            nn.Linear(16, 16),
            nn.Linear(16, models.VOCABULARY),
        )
        self.gain = nn.Parameter(torch.ones(16))
        self.kept: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        self.kept = h * self.gain
        h = self.up(h)
        return self.head(h + self.kept)


def cannot(kind: str) -> tuple[nn.Module, Callable]:
    model = build({"buffer": Counter, "shelf": Shelf}.get(kind, lambda: tiny(width=16)))

    def closure() -> Tensor:
        factor = {"random": lambda: 1 + random.random(), "numpy": lambda: 1 + float(np.random.rand())}.get(kind, lambda: 1.0)
        scale = factor()
        return next_token_loss(model(IDS), IDS) * scale * factor()

    return model, closure


@pytest.mark.parametrize("direction", ["dense", "subzero", "lozo"])
@pytest.mark.parametrize("kind", ["random", "numpy", "buffer", "shelf"])
def test_what_cannot_be_interleaved_goes_on_as_scratch(kind: str, direction: str) -> None:
    """With a warning, the losses and weights of scratch, and a record that says so; for good."""
    reasons = {
        "random": "`random` or NumPy",
        "numpy": "`random` or NumPy",
        "buffer": "buffers .calls",
        "shelf": "one side after the other",
    }
    ends = []
    for evaluation in ("scratch", "paired"):
        model, closure = cannot(kind)
        around = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().sum()
        with large():
            optimizer = DIRECTIONS[direction](model, lr=1e-3, eps=1e-2, seed=3, queries=2, evaluation=evaluation)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                results = [zokern.step(optimizer, closure) for _ in range(4)]
        assert (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().sum()) == around
        optimizer.flush()
        ends.append((results, snapshot(model), [str(w.message) for w in said if "goes on as" in str(w.message)]))
    (apart, weights, silent), (paired, others, said) = ends
    assert [r.evaluation for r in paired] == ["scratch"] * 4 and silent == []
    assert [r.losses for r in paired] == [r.losses for r in apart] and [r.coefficients for r in paired] == [
        r.coefficients for r in apart
    ]
    assert all(torch.equal(weights[n], others[n]) for n in weights)
    assert len(said) == 1 and reasons[kind].split(" .")[0] in said[0], said


def test_the_first_comparison_is_needed() -> None:
    """Without it the shelf's losses are wrong, and nothing says so."""
    model, closure = cannot("shelf")
    with pytest.raises(AssertionError, match="against"):
        compare(model, closure, zokern.MeZO, BOUNDS[torch.float32])


def test_batch_norm_in_train_mode() -> None:
    """Its statistics move in both sides and are put back; the losses are those of scratch whichever way they are read."""
    model = build(lambda: nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))).train()
    x, buffers = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), None
    losses = []
    for evaluation in ("scratch", "paired"):
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        with large(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "evaluation 'paired' goes on as")
            losses.append(
                zokern.step(
                    zokern.MeZO(model, lr=0.0, eps=1e-2, evaluation=evaluation), lambda: model(x).square().mean()
                ).losses[0]
            )
        assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(abs(a - b) <= 2e-6 * abs(a) for a, b in zip(*losses))


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Function, Dispatch])
def test_modes_of_the_closure(mode: type) -> None:
    """A function mode can be interleaved; a dispatch mode stays on torch's stack while a side waits, and goes on as scratch."""
    model = tiny(width=16)

    def closure() -> Tensor:
        with mode():
            return next_token_loss(model(IDS), IDS)

    if mode is Function:
        compare(model, closure, zokern.MeZO, BOUNDS[torch.float32])
        return
    with large(), pytest.warns(RuntimeWarning, match="mode of its own"):
        result = zokern.step(zokern.MeZO(model, evaluation="paired", lr=0.0, seed=1), closure)
    with large():
        assert (
            result.losses == zokern.step(zokern.MeZO(model, lr=0.0, seed=1), closure).losses and result.evaluation == "scratch"
        )


def test_a_closure_that_is_not_repeatable_is_refused() -> None:
    model, numbers = tiny(width=16), iter(range(100))
    with large(), pytest.raises(RuntimeError, match="advances a data iterator"):
        zokern.step(
            zokern.MeZO(model, evaluation=Paired(check=False), paired_check=1),
            lambda: next_token_loss(model(IDS), IDS) + next(numbers) // 2,
        )


# Sides that take different ways ---------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """A mixture that looks at its data in Python: which expert, how many layers, and in which order."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).mean(0)
        best = int(scores.argmax())
        if self.kind == "expert":
            x = torch.tanh(self.experts[best](x))
        elif self.kind == "depth":
            for expert in self.experts[: best + 1]:
                x = torch.tanh(expert(x))
        elif self.kind == "order":
            for i in scores.argsort().tolist():
                x = torch.tanh(self.experts[i](x))
        else:  # the same expert again and again
            for _ in range(best + 1):
                x = torch.tanh(self.experts[0](x))
        CHOSEN.append(best)
        return self.head(x)


CHOSEN: list[int] = []


@pytest.mark.parametrize("direction", ["dense", "subzero", "lozo", "tezo"])
@pytest.mark.parametrize("kind", ["expert", "depth", "order", "again"])
def test_sides_that_part_and_meet_again(kind: str, direction: str) -> None:
    model = build(lambda: Branching(kind))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(3)) * 0.3
    CHOSEN.clear()
    result = compare(
        model,
        lambda: model(x).square().mean(),
        DIRECTIONS[direction],
        BOUNDS[torch.float32],
        eps=0.3,
        queries=4,
        stencil="forward",
    )
    half = len(CHOSEN) // 2
    assert sorted(CHOSEN[:half]) == sorted(CHOSEN[half:]) and len(set(CHOSEN)) > 1, "the sides took one way"
    assert "gate.weight" not in result.unpaired
    if kind == "expert":  # each side took one, and they met again
        assert result.unpaired and "head.weight" not in result.unpaired


def test_unpaired_names_what_a_side_read_alone() -> None:
    model = tiny(width=16)
    model.by_hand = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))

    def closure() -> Tensor:
        return next_token_loss(model(IDS), IDS) + (model.by_hand @ model.by_hand).mean()

    result = compare(model, closure, zokern.MeZO, BOUNDS[torch.float32])
    assert result.unpaired == ("by_hand", "embed.weight")
    assert compare(model, closure, METHODS["lozo"], BOUNDS[torch.float32]).unpaired == ("by_hand", "embed.weight")
    with large():
        assert zokern.step(zokern.MeZO(model, lr=0.0), closure).unpaired == ()


# The rest of what scratch can do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["dense", "subzero"])
def test_compiled_model(direction: str) -> None:
    """torch.compile'd, and a compiled part of an eager model."""
    model = tiny(width=16)
    whole = torch.compile(model, backend="aot_eager")
    whole(IDS)
    compare(model, lambda: next_token_loss(whole(IDS), IDS), DIRECTIONS[direction], BOUNDS[torch.float32])
    inner = torch.compile(lambda h: F.gelu(model.up(h)), backend="aot_eager")

    def closure() -> Tensor:
        h = model.embed(IDS)
        return next_token_loss(model.head(h + model.down(inner(model.norm(h)))), IDS)

    inner(model.embed(IDS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loss did not read")
        compare(model, closure, DIRECTIONS[direction], BOUNDS[torch.float32])


def test_without_greenlet() -> None:
    """A sentence that says what to do; the other evaluations do not need it."""
    with patch.object(meeting, "greenlet", None):
        for make in (
            Paired,
            lambda: zokern.MeZO(tiny(), evaluation="paired"),
            lambda: zokern.SubZero(tiny(), evaluation="paired"),
        ):
            with pytest.raises(ImportError, match="pip install greenlet.*scratch"):
                make()
        model = tiny()
        for evaluation in ("scratch", "auto"):
            optimizer = zokern.SubZero(model, evaluation=evaluation)
            for _ in range(2):
                assert zokern.step(optimizer, lambda: next_token_loss(model(IDS), IDS)).evaluation == "scratch"


@pytest.mark.parametrize("method, most", [(zokern.MeZO, auto.ROWS), (zokern.LOZO, auto.FACTORED)], ids=["dense", "factored"])
def test_auto_chooses_by_rows(method: Callable, most: int) -> None:
    """By the first batch, for good: the losses are those of what it chose."""
    for rows, expected in ((most // 16, "paired"), (most // 16 + 1, "scratch")):
        ids, losses = models.batch(rows, 16), {}
        for evaluation in ("auto", "paired", "scratch"):
            model = tiny(width=16)
            optimizer = method(model, lr=0.0, eps=1e-2, seed=4, evaluation=evaluation)
            with large():
                results = [zokern.step(optimizer, lambda m=model, ids=ids: next_token_loss(m(ids), ids)) for _ in range(3)]
            losses[evaluation] = [r.losses for r in results]
            if evaluation == "auto":
                assert [r.evaluation for r in results] == ["scratch", expected, expected]
        assert losses["auto"] == [losses["scratch"][0], *losses[expected][1:]]


@pytest.mark.parametrize("sides", [1, 0, 2.0, "2"])
def test_bad_sides_are_refused(sides) -> None:
    with pytest.raises(ValueError, match="sides is"):
        Paired(sides=sides)


def test_guards_hold_under_paired() -> None:
    """What scratch refuses of a closure, paired refuses too, and no weight has changed."""
    model = tiny(width=16)
    before = snapshot(model)

    def bad(kind: str) -> Callable:
        def closure() -> Tensor:
            loss = next_token_loss(model(IDS), IDS)
            with torch.no_grad():
                if kind == "writes":
                    model.up.weight.mul_(1.0)
                if kind == "replaces":
                    model.up = nn.Linear(16, 48)
            return loss.expand(2) if kind == "vector" else loss

        return closure

    for kind, error in (("writes", RuntimeError), ("vector", ValueError), ("replaces", RuntimeError)):
        up = model.up
        for direction in ("dense", "subzero"):
            with large(), pytest.raises(error):
                zokern.step(DIRECTIONS[direction](model, evaluation=Paired(check=False)), bad(kind))
            model.up = up
        assert changed(model, before) == []
    other = tiny(width=16)
    with large(), pytest.raises(RuntimeError, match="never used a trained parameter"):
        zokern.step(zokern.MeZO(model, evaluation="paired"), lambda: next_token_loss(other(IDS), IDS))
