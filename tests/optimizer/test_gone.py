"""Deferred updates of an optimizer that is gone: they are in the weights, with the bits of a flush."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from models import batch, changed, next_token_loss, snapshot, tiny
from recipes import METHODS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import zokern
from zokern.optimizer import deferred, zeroth_order

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = batch()


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: next_token_loss(model(IDS), IDS)


def trained(name: str, model: nn.Module, **options):
    optimizer = METHODS[name](model, seed=3, evaluation="scratch", **options)
    for _ in range(4):
        zokern.step(optimizer, closure_of(model))
    assert optimizer.pending
    return optimizer


def end_of_scope(name: str, model: nn.Module) -> None:
    trained(name, model)


def deleted(name: str, model: nn.Module) -> None:
    optimizer = trained(name, model)
    del optimizer


def cycle(name: str, model: nn.Module) -> None:
    held: list = [trained(name, model)]
    held.append(held)
    del held
    gc.collect()


def schedule(name: str, model: nn.Module) -> None:
    """A schedule of torch makes a cycle with its optimizer."""
    optimizer = trained(name, model)
    torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    del optimizer
    gc.collect()


def bound_anew(name: str, model: nn.Module) -> None:
    """A cell of a notebook that is run twice."""
    optimizer = trained(name, model)
    optimizer = zokern.MeZO(model, lr=0.0, seed=1)
    zokern.step(optimizer, closure_of(model))


def in_a_cycle_still(name: str, model: nn.Module) -> None:
    """The next optimizer reads the weights before the first one is collected."""
    held: list = [trained(name, model)]
    held.append(held)
    del held
    zokern.step(zokern.MeZO(model, lr=0.0, seed=1), closure_of(model))
    assert not deferred.Deferred.waiting
    gc.collect()


def while_another_reads(name: str, model: nn.Module) -> None:
    """Collected between two readings of an optimizer of another model."""
    held: list = [trained(name, model)]
    held.append(held)
    del held
    other = tiny(width=16)

    def closure() -> Tensor:
        gc.collect()
        return next_token_loss(other(IDS), IDS)

    zokern.step(zokern.MeZO(other, evaluation="paired"), closure)


def while_others_compile(name: str, model: nn.Module) -> None:
    optimizer = trained(name, model)
    with FakeTensorMode():
        del optimizer


def within_inference(name: str, model: nn.Module) -> None:
    optimizer = trained(name, model)
    with torch.inference_mode():
        del optimizer


def of_parameters(name: str, model: nn.Module) -> None:
    """Without a module that has hooks."""
    optimizer = METHODS[name](model.named_parameters(), seed=3, evaluation="scratch", defer=True)
    for _ in range(4):
        zokern.step(optimizer, closure_of(model))
    assert optimizer.pending


ENDS = {
    end.__name__: end
    for end in (
        end_of_scope, deleted, cycle, schedule, bound_anew, in_a_cycle_still, while_another_reads,
        while_others_compile, within_inference, of_parameters,
    )
}  # fmt: skip


def check_gone(name: str, end: str) -> None:
    """Weights that are read directly, after the optimizer has gone."""
    kept, model = tiny(width=16), tiny(width=16)
    optimizer = trained(name, kept)
    optimizer.flush()
    gc.collect()
    gc.disable()  # a collection comes when a case asks for it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ENDS[end](name, model)
    finally:
        gc.enable()
    assert changed(model, snapshot(kept)) == []
    with torch.no_grad():
        assert torch.equal(model(IDS), kept(IDS))


@pytest.mark.parametrize("end", ENDS)
def test_updates_of_an_optimizer_that_is_gone(end: str) -> None:
    check_gone("subzero", end)


@pytest.mark.parametrize("name", ["lozo", "lozo_m", "tezo_m", "pgap"])
def test_every_method_that_defers(name: str) -> None:
    check_gone(name, "end_of_scope")


class WeakAlone(deferred.Deferred):
    """Hooks with weak references, and nothing at the end."""

    def __del__(self) -> None:
        pass


class Modes(deferred.Deferred):
    """Flushes as it is, whatever mode is active."""

    def __del__(self) -> None:
        if self.pending:
            self.flush()


@pytest.mark.parametrize(
    ("wrong", "end"),
    [(WeakAlone, end) for end in ENDS if end != "in_a_cycle_still"] + [(Modes, "while_others_compile")],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_check_rejects_a_wrong_end(wrong: type, end: str) -> None:
    with patch.object(zeroth_order, "Deferred", wrong), pytest.raises(AssertionError):
        check_gone("subzero", end)


def double(model: nn.Module) -> None:
    model.double()


@torch.no_grad()
def edit(model: nn.Module) -> None:
    model.up.weight.mul_(1.5)


@pytest.mark.parametrize("change", [edit, double])
def test_updates_that_cannot_be_written_are_named(change: Callable[[nn.Module], None]) -> None:
    """The edited weights stay as they are, and later forwards raise nothing."""
    model = tiny(width=16)
    optimizer = trained("subzero", model)
    change(model)
    before = snapshot(model)
    with pytest.warns(RuntimeWarning, match=r"deferred are lost.*weight'.*call optimizer.flush\(\) before"):
        del optimizer
    model(IDS)
    assert changed(model, before) == []


def test_a_capture_has_no_updates_of_an_optimizer_that_is_gone(monkeypatch) -> None:
    """A graph that is captured meanwhile would write them at every replay."""
    model = tiny(width=16)
    optimizer = trained("subzero", model)
    before = snapshot(model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(RuntimeWarning, match=r"deferred are lost: a CUDA graph is captured"):
        del optimizer
    assert changed(model, before) == []


@pytest.mark.parametrize("wanted", ["no", None])
def test_an_optimizer_without_updates_ends_silently(wanted) -> None:
    """Also one that was refused when it was built."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            zokern.SubZero(tiny(width=16), defer=wanted)
        except ValueError as problem:
            assert "defer is 'no'" in str(problem)
        gc.collect()


def test_the_end_of_the_interpreter_writes_nothing() -> None:
    """Whatever is left of torch then: nothing is printed."""
    program = (
        "import torch, zokern\n"
        "net, x = torch.nn.Linear(16, 16), torch.ones(2, 16)\n"
        "opt = zokern.SubZero(net, rank=2, evaluation=zokern.Scratch(check=False))\n"
        "zokern.step(opt, lambda: net(x).square().mean())\n"
        "print(opt.pending)\n"
        "zokern.optimizer.deferred.Deferred.flush = lambda self: print('flushed')\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("True\n", "")
