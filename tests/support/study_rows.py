"""Rows of a study, made by hand."""

from __future__ import annotations

from benchmarks.study.order import MODELS, SMALL
from benchmarks.study.reading import TIME

ROWS = 200
BUDGETS = dict.fromkeys(MODELS, 100)


def row(
    method: str,
    accuracies: list[float],
    losses: list[float],
    *,
    model=SMALL,
    data="news",
    seed=0,
    per=1.0,
    cost=2,
) -> dict:
    """A row with checks at 0, 25, ... forwards. per:
    processor seconds of a forward; cost: forwards of a step."""
    points = [
        {
            "forwards": 25 * k, "steps": 25 * k // cost, "right": round(a * ROWS), "rows": ROWS, "loss": loss,
            "seconds": 50.0 * k * per, TIME: 25.0 * k * per,
        }
        for k, (a, loss) in enumerate(zip(accuracies, losses))
    ]  # fmt: skip
    return {
        "model": model, "data": data, "method": method, "seed": seed, "threads": 1, "load": 0.5,
        "points": points, "lr": 1e-4, "eps": 1e-3, "tune_lr": 3e-4, "tune_forwards": 90,
        "trials": [{"lr": 3e-4, "loss": None}, {"lr": 1e-4, "loss": 0.6}, {"lr": 3e-5, "loss": 0.7}],
        "evaluation": "paired", "last_step_forwards": cost, "step_seconds": 2.0,
        "step_processor_seconds": 1.0, "wall_seconds": 300.0,
        "peak_extra_bytes": 2**20, "commit": "abc1234", "date": "2026-01-01",
        "command": "python -m benchmarks.study", "torch": "2.13",
        "machine": "a processor",
    }  # fmt: skip


LINE = [0.2, 0.3, 0.4, 0.5, 0.6]
FALL = [1.0, 0.9, 0.8, 0.7, 0.6]
