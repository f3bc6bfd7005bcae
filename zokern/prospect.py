"""Whether lr is so small that the loss will not be seen to fall, told from the first steps of a run."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from .warning import warn

STEPS, LEAST = 20, 1e-4  # steps that are looked at; the share of the loss that a step is expected to take off


class Prospect:
    """Collects loss and predicted fall of STEPS steps. Steps whose fall is 0 or not known do not count."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def see(self, result: Any, lr: float) -> None:
        """Warns in step number STEPS, once, where the mean fall is below LEAST of the loss. It names an lr
        whose steps take off 1 %.

        c^2 overestimates where the losses are noisy:
        the warning is then late or missing, and the lr that it names too small."""
        if not result.predicted_fall or len(self.seen) == STEPS:
            return
        self.seen.append((abs(result.loss), result.predicted_fall))
        if len(self.seen) < STEPS:
            return
        loss, fall = map(fmean, zip(*self.seen))
        if 0.0 < abs(fall) < LEAST * loss:
            steps = 0.01 * loss / abs(fall)
            warn(
                f"at this lr a fall of 1 % takes about {steps:.0f} steps: lr = {lr:g}, the loss is "
                f"{loss:.4g}, and {STEPS} steps were expected to change it by {abs(fall):.1e} each; try "
                f"about lr = {lr * steps:.0e}"
            )


__all__ = ["Prospect"]
