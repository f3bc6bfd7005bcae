"""The record of a step. Its numbers stay on the device until someone asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .warning import warn


class Values(NamedTuple):
    """The numbers of a step, on the host; see StepResult."""

    loss: float
    losses: tuple[tuple[float, ...], ...]
    coefficients: tuple[float, ...]
    skipped: bool
    predicted_fall: float | None
    dead_updates: float | None
    swallowed: float | None
    nonfinite: int
    first_order_loss: float | None = None


class Part(NamedTuple):
    """The numbers of one estimate, where they were made.

    losses        float64 [queries, losses of a query]
    coefficients  float64 [draws], of the first group
    weights       float64 [draws] of each group, and flags: whether each group's numbers are finite
    fall          tells predicted_fall of (slopes, weights of each group); None: it is not known
    slopes        float64 [draws], or None"""

    losses: Tensor
    coefficients: Tensor
    weights: Sequence[Tensor]
    flags: Sequence[Tensor]
    fall: Callable[[Sequence[float], Sequence[Sequence[float]]], float | None] | None
    slopes: Tensor | None

    def tensors(self) -> list[Tensor]:
        known = [] if self.fall is None or self.slopes is None else [self.slopes, *self.weights]
        return [self.losses, self.coefficients, *self.flags, *known]


class Numbers:
    """Holds the numbers of a step on their device, and what they mean.

    parts       of its estimates, in order
    shares      by name: (share, its warning) of 16-bit weights that stood still, 0-d tensors
    nonfinite   how many weights an update made inf or NaN, a tensor or a number of each launch
    first_order  the loss that was back-propagated: a number of the host, or 0-d; None: there is none
    flat        of a replay of a captured step: all that is read, in the place of the tensors above"""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.shares: dict[str, tuple[Tensor, Callable[[float], str | None]]] = {}
        self.nonfinite: list[Tensor | int] = []
        self.first_order: Tensor | float | None = None
        self.flat: Tensor | None = None
        self._values: Values | None = None

    def packed(self) -> Tensor:
        """Returns all that is read in one tensor, float64."""
        return torch.cat([t.detach().reshape(-1).double() for t in self.tensors()])

    def of(self, flat: Tensor) -> Numbers:
        """Returns the same step with other numbers, packed."""
        other = Numbers()
        other.parts, other.shares, other.nonfinite = self.parts, self.shares, self.nonfinite
        other.first_order, other.flat = self.first_order, flat
        return other

    def tensors(self) -> list[Tensor]:
        """Returns all that is read, one after the other."""
        if self.flat is not None:
            sizes = [t.numel() for t in self.of(None).tensors()]  # type: ignore[arg-type]
            return list(self.flat.split(sizes))
        counts = [count for count in [*self.nonfinite, self.first_order] if isinstance(count, Tensor)]
        return (
            [t for part in self.parts for t in part.tensors()] + [s for s, _ in self.shares.values()] + counts
        )

    @property
    def values(self) -> Values:
        """The numbers. The first question waits for the device."""
        if self._values is None:
            read([self])
        assert self._values is not None
        return self._values

    def take(self, numbers: Sequence[Any]) -> None:
        """Keeps the numbers of tensors(), in its order."""
        left = iter(numbers)
        losses: tuple[tuple[float, ...], ...] = ()
        coefficients: tuple[float, ...] = ()
        falls: list[float | None] = []
        finite = True
        for part in self.parts:
            width = max(1, part.losses.shape[-1])
            flat = next(left)
            losses += tuple(tuple(flat[i : i + width]) for i in range(0, len(flat), width))
            coefficients += tuple(next(left))
            flags = [next(left)[0] == 1.0 for _ in part.flags]
            finite = finite and all(flags)
            known = part.fall is not None and part.slopes is not None
            given = [next(left) for _ in range(1 + len(part.weights))] if known else []
            falls.append(part.fall(given[0], given[1:]) if known and part.fall is not None else None)
        fall = None if None in falls or not finite else math.fsum(f for f in falls if f is not None)
        shares = {}
        for name, (_, warning) in self.shares.items():
            shares[name] = next(left)[0]
            if (words := warning(shares[name])) is not None:
                warn(words)
        nonfinite = sum(
            int(next(left)[0]) if isinstance(count, Tensor) else count for count in self.nonfinite
        )
        first = next(left)[0] if isinstance(self.first_order, Tensor) else self.first_order
        finite = finite and (first is None or math.isfinite(first))
        loss = mean([one for sides in losses for one in sides])
        self.parts, self.shares, self.nonfinite, self.flat = [], {}, [], None  # their memory goes
        self.first_order = None
        self._values = Values(
            loss,
            losses,
            coefficients,
            not finite,
            fall,
            shares.get("dead"),
            shares.get("swallowed"),
            nonfinite,
            first,
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, has the numbers alone."""
        return {**vars(Numbers()), "_values": self.values}


@dataclass(frozen=True)
class StepResult:
    """Holds what one step measured and did: the result of zokern.step.

    Names are known at once. Numbers lie on the device of the losses until one of them is asked for. The first
    question waits for the step, and the numbers then stay on the host. On a CPU nothing waits.

    loss          mean of the losses that were read, a float: of theta + eps z and theta - eps z. It is above
                  the loss of theta where the loss is convex
    losses        per query, what the estimator read: (L(theta + eps z), L(theta - eps z)) for the central
                  difference
    coefficients  per query, the coefficient c_k of z_k in units of loss per weight, float32 (with the first
                  group's eps)
    seed, step    the run's seed and this step's number
    draws         (step, draw word) of each coefficient's z_k: the seed and these name it
    skipped       True when a loss was NaN or infinite, or a coefficient, or lr times one, was so in float32:
                  the weights are as they were. zokern.Private bounds the loss of an example instead
    evaluation    the way in which the losses were read
    why           evaluation 'auto': the reason for the choice; and why torch.compile's graphs did not run
    backend       what ran the kernels: 'cpu', 'cuda', 'triton' or 'reference'
    scratch_bytes  most extra memory that the evaluation held at once, in bytes
    unseen        first step: trained parameters that the loss did not read (they are updated all the same)
    whole         parameters that were copied in one piece because their use cannot be tiled
    swallowed     evaluation 'master': share of sampled 16-bit weights that the perturbation left as they
                  were; None: not measured
    predicted_fall  first-order fall of the loss of this batch by this step, in the loss's unit; see below
    first_order_loss  estimators with a back-propagated term: the loss of theta that was back-propagated
    dead_updates  share of 16-bit weights in a sample that rounding to nearest left where they were; None: not
                  measured
    numbers       the numbers on their device, which zokern.graph and the guards read together

    predicted_fall is (lr / n) sum_k c_k s_k, where s_k is the slope that was read along z_k: c_k itself for
    zokern.Spsa. It is summed over the parts of a step, and negative with maximize. It assumes rule SGD, and
    leaves weight decay, curvature and rounding out. One number was read for all groups, so it needs lr c_k /
    eps to be equal in them. Where c_k is the slope, its mean over draws with E[z z^T] = I is lr |gradient|^2.
    The slope is the batch's: on other data the fall is less, as E[c^2] is |gradient|^2 plus the variance over
    batches and the noise of the losses. It is None for another rule, for groups that differ, for a skipped
    step and for an estimator that tells no slopes."""

    seed: int
    step: int
    evaluation: str
    backend: str
    numbers: Numbers = field(repr=False, compare=False)
    scratch_bytes: int = 0
    unseen: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    why: str = ""
    draws: tuple[tuple[int, int], ...] = ()

    @property
    def loss(self) -> float:
        return self.numbers.values.loss

    @property
    def losses(self) -> tuple[tuple[float, ...], ...]:
        return self.numbers.values.losses

    @property
    def coefficients(self) -> tuple[float, ...]:
        return self.numbers.values.coefficients

    @property
    def skipped(self) -> bool:
        return self.numbers.values.skipped

    @property
    def predicted_fall(self) -> float | None:
        return self.numbers.values.predicted_fall

    @property
    def dead_updates(self) -> float | None:
        return self.numbers.values.dead_updates

    @property
    def swallowed(self) -> float | None:
        return self.numbers.values.swallowed

    @property
    def first_order_loss(self) -> float | None:
        return self.numbers.values.first_order_loss

    def at(self, step: int, numbers: Numbers) -> StepResult:
        """Returns the record of a replay of this step."""
        draws = tuple((number - self.step + step, word) for number, word in self.draws)
        return replace(self, step=step, numbers=numbers, draws=draws)

    def __str__(self) -> str:
        """Names and numbers."""
        return f"{self!r} with {self.numbers.values}"


def read(several: Sequence[Numbers]) -> None:
    """Reads the numbers of some steps, by one copy from each device that is not the host."""
    several = [each for each in several if each._values is None]
    tensors = [[t.reshape(-1) for t in each.tensors()] for each in several]
    flat = [t for own in tensors for t in own]
    known: dict[int, list] = {i: t.tolist() for i, t in enumerate(flat) if t.is_cpu}
    for device in dict.fromkeys(t.device for t in flat if not t.is_cpu):
        here = [i for i, t in enumerate(flat) if t.device == device]
        found = torch.cat([flat[i].detach().double() for i in here]).tolist()
        for i in here:
            known[i], found = found[: flat[i].numel()], found[flat[i].numel() :]
    place = 0
    for each, own in zip(several, tensors):
        each.take([known[place + i] for i in range(len(own))])
        place += len(own)


def mean(values: Sequence[float]) -> float:
    """Returns the mean, its sum rounded once; NaN where a value is not finite. The mean of finite values is
    finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # in units of 2**64
        return math.fsum([value * 2.0**-64 for value in values]) / len(values) * 2.0**64


__all__ = ["Numbers", "Part", "StepResult", "Values", "mean", "read"]
