"""Guards: what a run is stopped or warned for. Counters of skipped and dead steps, and how the loss goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from .checks import flag, whole_number
from .prospect import Prospect
from .warning import warn

EVERY = 16  # steps on a GPU: a look costs about as much as a launch, and a run that fails wastes few steps


class Outcome(Protocol):
    """What guards read of a step's record."""

    @property
    def loss(self) -> float: ...
    @property
    def losses(self) -> tuple[tuple[float, ...], ...]: ...
    @property
    def coefficients(self) -> tuple[float, ...]: ...
    @property
    def predicted_fall(self) -> float | None: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def step(self) -> int: ...
    @property
    def numbers(self) -> Any: ...


@dataclass
class Guards:
    """What stops a run.

    paired_check  'first': the first loss of the first step is read twice; n: every n steps too; 0 or None:
                  never
    max_skips     steps in a row with a loss or coefficient that is inf or NaN, at which a step raises; 0 or
                  None: no limit
    dead_limit    steps in a row with equal losses, at which a step raises; None: no limit
    nonfinite     'raise' or 'ignore': weights that the update made inf or NaN
    force         accept an eps that rounding swallows for more than half of the 16-bit weights
    maximize      the loss is a reward, which may grow
    every         steps between two looks at the numbers of the steps before, which wait for the device. None:
                  1 on a CPU, where nothing waits, and 16 on a GPU. The errors above come then, and name
                  their step

    Raises ValueError for values out of range."""

    paired_check: int | str | None = "first"
    max_skips: int | None = 10
    dead_limit: int | None = 20
    nonfinite: str = "raise"
    force: bool = False
    maximize: bool = False
    every: int | None = None

    skips = dead = 0  # steps in a row
    _losses, _start, _mean, _best, _warned = 0, 0.0, 0.0, 0.0, False  # of this process: how the loss goes

    def __post_init__(self) -> None:
        if isinstance(self.paired_check, str) and self.paired_check != "first":
            raise ValueError(
                f"paired_check is {self.paired_check!r}; expected 'first', or an integer, at least 0, or "
                "None for no check"
            )
        if not isinstance(self.paired_check, str):
            self.paired_check = _count("paired_check", self.paired_check, 0, "no check")
        self.max_skips = _count("max_skips", self.max_skips, 0, "no limit")
        self.dead_limit = _count("dead_limit", self.dead_limit, 1, "no limit")
        self.every = _count("every", self.every, 1, "the choice by device")
        if self.nonfinite not in ("raise", "ignore"):
            raise ValueError(f"nonfinite is {self.nonfinite!r}; expected 'raise' or 'ignore'")
        self._prospect = Prospect()
        flag("force", self.force)
        flag("maximize", self.maximize)

    def is_due(self, step: int, is_first: bool) -> bool:
        """Returns whether a step reads a loss twice."""
        every = self.paired_check
        return bool(every) and (is_first or (isinstance(every, int) and step % every == 0))

    def name_unseen(self, unseen: tuple[str, ...]) -> None:
        """Warns of trained parameters that the first step's loss did not read."""
        names = ", ".join(unseen[:3]) + (", ..." if len(unseen) > 3 else "")
        warn(
            f"the loss did not read {len(unseen)} trained parameters ({names}); they move along z all the "
            "same. A branch that "
            "is not used: freeze it with requires_grad_(False). Experts without tokens in this batch: "
            "nothing is wrong"
        )

    def looks(self, on_host: bool) -> int:
        """Returns after how many steps their numbers are looked at."""
        return self.every or (1 if on_host else EVERY)

    def see(self, outcome: Outcome, lrs: list[float]) -> None:
        """Looks at the numbers of a step, in order. Raises RuntimeError where the run should stop."""
        if outcome.skipped:
            self.skipped(outcome)
            return
        self.measured(outcome, lrs)
        if self.nonfinite != "ignore" and (nonfinite := outcome.numbers.values.nonfinite):
            raise RuntimeError(
                f"step {outcome.step}: {nonfinite} weights are inf or NaN after the update (coefficients "
                f"{outcome.coefficients}); lower lr, or raise eps; nonfinite='ignore' keeps going"
            )

    def skipped(self, outcome: Outcome) -> None:
        """Counts a step without finite numbers; raises RuntimeError when there are too many in a row."""
        self.skips, self.dead = self.skips + 1, 0
        if self.max_skips and self.skips >= self.max_skips:
            raise RuntimeError(
                f"{self.skips} steps in a row had a loss or coefficient that is inf or NaN "
                f"(step {outcome.step} the last, its losses {outcome.losses}); no weight changed in them: "
                "lower lr, check the data, or compute the loss in float32"
            )

    def measured(self, outcome: Outcome, lrs: list[float]) -> None:
        """Counts a step with finite numbers; warns of equal losses and of a loss that grows, and raises
        RuntimeError at the limit."""
        self.skips = 0
        self.dead = self.dead + 1 if _is_dead(outcome) else 0
        grown = self._watch(outcome.loss, lrs)
        self._prospect.see(outcome, lrs[0])
        if self.dead == 3:
            cause = "lr too large: the loss has grown since the start" if grown else "eps too small?"
            warn(
                "the losses on both sides were equal 3 steps in a row: the perturbation may not reach the "
                f"loss ({cause})"
            )
        if self.dead_limit is not None and self.dead >= self.dead_limit:
            raise RuntimeError(
                f"the losses on both sides were equal {self.dead} steps in a row (last losses "
                f"{outcome.losses}): the perturbation does not "
                "reach the loss; raise eps, give the optimizer the model that the closure runs, or pass "
                "dead_limit=None for a "
                "coarse objective"
            )

    def _watch(self, loss: float, lrs: list[float]) -> bool:
        """Warns once when the loss has grown to three times its first, and its best running mean; returns
        whether it has."""
        if self._losses == 0:
            self._start = self._mean = self._best = loss
        self._losses += 1
        self._mean += 0.2 * (loss - self._mean)
        grown = not self.maximize and self._best > 0.0 and loss > 3.0 * max(self._best, self._start)
        self._best = min(self._best, self._mean)
        if grown and not self._warned:
            self._warned = True
            lr = ", ".join(map(str, lrs))
            warn(
                f"the loss has grown from {self._start:.4g} to {loss:.4g} within {self._losses} steps: lr = "
                f"{lr} may be too large"
            )
        return grown


def _is_dead(outcome: Outcome) -> bool:
    """Whether the losses of every query are equal; where a query has one, beside a slope, whether slopes are
    0."""
    alone = all(len(sides) == 1 for sides in outcome.losses)
    return not any(outcome.coefficients) if alone else all(len(set(sides)) == 1 for sides in outcome.losses)


def _count(name: str, value: Any, least: int, none: str) -> int | None:
    """Returns an integer from `least` on, or None, which means `none`."""
    return (
        None
        if value is None
        else whole_number(name, value, least, expected=f"an integer, at least {least}, or None for {none}")
    )


__all__ = ["Guards", "Outcome"]
