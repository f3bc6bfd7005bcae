"""benchmarks/trainer.py parts the time of a Trainer's step as it says.

A clock that only the test moves stands in for the processor's."""

from __future__ import annotations

import pytest

import zokern

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'zokern[hf]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'zokern[hf]'")

from benchmarks import trainer as bench  # noqa: E402
from zokern import hf  # noqa: E402

INSIDE, OUTSIDE = 100.0, 5.0


class Still:
    """A clock that stands still."""

    now = 0.0

    def process_time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch, one_thread):
    """A step takes INSIDE seconds, and what Trainer does between two steps OUTSIDE."""
    clock, step = Still(), zokern.step

    def slow(*given):
        clock.now += INSIDE
        return step(*given)

    def count(trainer, inputs) -> int:
        clock.now += OUTSIDE
        return 0

    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(zokern, "step", slow)
    monkeypatch.setattr(hf.ZerothOrderTrainer, "floating_point_ops", count)
    return clock


def check() -> None:
    found = bench.measure("OPT-tiny", 5, "master")
    assert found == pytest.approx([1e3 * OUTSIDE, 1e3 * INSIDE, 0.0, 1e3 * INSIDE])


@pytest.mark.filterwarnings("ignore:at this lr:RuntimeWarning")
def test_times_are_parted(clock):
    check()


class Whole(bench.Clock):
    """Counts no call: all time is outside."""

    def take(self) -> float:
        return 0.0


def test_a_wrong_clock_is_rejected(clock, monkeypatch):
    monkeypatch.setattr(bench, "Clock", Whole)
    with pytest.raises(AssertionError):
        check()
