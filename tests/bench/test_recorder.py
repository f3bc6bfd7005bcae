"""benchmarks/recorder.py: every verb of the contract is written down, with the bytes that it must move."""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

import zokern
from zokern import backends
from zokern.backends import Batch, Noise, Outer, Projection, Span, Terms, Update
from zokern.directions import resolve

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.recorder import META, Call, Recorder  # noqa: E402

BF16, FP32, INT16 = torch.bfloat16, torch.float32, torch.int16
NORMAL = resolve("normal")


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def every_verb(on: Recorder) -> list[Call]:
    """A call of each verb whose bytes are counted by hand below."""
    w, v, low = meta(6, 10, dtype=BF16), meta(7), meta(6, 10, dtype=INT16)
    spans, noise = [Span(1), Span(2)], Noise(NORMAL, 5, [(0, 0), (0, 1)])
    one = Noise(NORMAL, 5, [(0, 0)])
    rows = torch.empty(3, dtype=torch.int64, device=META)
    on.philox4x32(torch.empty(4, 4, dtype=torch.int64, device=META), (0, 0), 10)
    on.draw(Batch([w], spans[:1]), one)
    on.axpy_(Batch([w, v], spans, "residual", [low, meta(0, dtype=INT16)]), noise, Terms(meta(2)))
    on.update_(Batch([v], spans[:1]), one, Update(meta(1), "momentum", meta(4), [[meta(7)]]))
    on.perturb(Batch([w], spans[:1]), one, [1.0, -1.0], [[meta(6, 10, dtype=BF16)] for _ in "+-"])
    on.perturb(Batch([w], [Span(1, rows=rows)], residuals=[low]), one, [1.0], [[meta(3, 10)]])
    on.lowrank_(Batch([w], spans[:1]), Outer([meta(6, 2)], [meta(10, 2)], [1.0]))
    made = on.project(
        Projection(
            meta(1, 2, dtype=torch.float64), meta(3, 2, dtype=torch.float64), meta(6, dtype=torch.float64)
        )
    )
    assert [t.shape[0] for t in made] == [3, 3, 3, 3] and made.control.dtype == FP32 and made.amounts.is_meta
    return on.calls


EXPECTED = [
    Call("philox4x32", 1, 16, {torch.int64: 2 * 16 * 8}),
    Call("draw", 1, 60, {BF16: 120}, 1),
    Call("axpy_", 2, 67, {BF16: 240, INT16: 240, FP32: 2 * 28 + 8}, 2),
    Call("update_", 1, 7, {FP32: 4 * 28 + 4 + 16}, 1),
    Call("perturb", 1, 60, {BF16: 360}, 1, 2),
    Call("perturb", 1, 30, {BF16: 60, INT16: 60, FP32: 120}, 1, 1),
    Call("lowrank_", 1, 60, {BF16: 240, FP32: 48 + 80}),
    Call("project", 1, 2, {torch.float64: 16 + 48 + 48}),
]


def test_bytes_are_those_counted_by_hand() -> None:
    assert every_verb(Recorder()) == EXPECTED


def test_a_recorder_that_forgets_bytes_is_rejected() -> None:
    class Forgets(Recorder):
        def _add(self, verb, worked, moved, draws=0, sides=1) -> None:
            super()._add(verb, worked, moved[:-1], draws, sides)

    assert [a == b for a, b in zip(every_verb(Forgets()), EXPECTED)].count(True) == 0


def test_every_verb_of_the_contract_is_there() -> None:
    contract = {name for name, what in vars(backends.Backend).items() if callable(what) and name[0] != "_"}
    for name in contract:
        own = inspect.signature(getattr(Recorder, name)).parameters
        assert list(own) == list(inspect.signature(getattr(backends.Backend, name)).parameters)


def test_it_takes_meta_tensors_alone() -> None:
    with pytest.raises(ValueError, match="recorder.*expected a meta tensor"):
        Recorder().draw(Batch([torch.empty(3)], [Span(1)]), Noise(NORMAL, 0, [(0, 0)]))
    with pytest.raises(ValueError, match="int16"):
        Recorder().draw(Batch([meta(3, dtype=INT16)], [Span(1)]), Noise(NORMAL, 0, [(0, 0)]))


def steps(backend: object) -> tuple[list[Tensor], list[zokern.StepResult]]:
    model, ids = models.tiny(), models.batch()
    made = zokern.MeZO(model, eps=1e-2, evaluation="master", backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [zokern.step(made, lambda: models.next_token_loss(model(ids), ids)) for _ in range(2)]
    return [p.detach() for p in model.parameters()], found


def test_an_inner_backend_computes_what_it_computes() -> None:
    """A step around the CPU's backend has its bits, and a launch for each of its verbs."""
    recorder = Recorder(backends.get("reference"))
    (mine, found), (right, expected) = steps(recorder), steps("reference")
    assert all(map(torch.equal, mine, right)) and [r.losses for r in found] == [r.losses for r in expected]
    assert [call.verb for call in recorder.calls[-4:]] == ["perturb", "perturb", "project", "axpy_"]
    count = sum(p.numel() for p in right)
    assert {call.elements for call in recorder.calls[-4:] if call.verb != "project"} == {count}
    assert recorder.calls[-1].traffic == 8 * count + 4
