"""Estimator: losses to coefficients. A finite-difference formula is data: offsets in units of eps, and weights.

    c_k = (1 / eps) sum_j weights[j] L(theta + offsets[j] eps z_k)          g = (1 / q) sum_k c_k z_k

Spall 1992 (central); Malladi et al. 2023, Definition 1 and Algorithm 1.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import is_number


@dataclass(frozen=True)
class Stencil:
    """Where the loss is read along a draw, and how the readings are weighted. Weights sum to 0, sum w_j o_j = 1."""

    name: str
    offsets: tuple[float, ...]
    weights: tuple[float, ...]


CENTRAL = Stencil("central", (1.0, -1.0), (0.5, -0.5))
FORWARD = Stencil("forward", (1.0, 0.0), (1.0, -1.0))
STENCILS = {stencil.name: stencil for stencil in (CENTRAL, FORWARD)}


def resolve(stencil: str | Stencil) -> Stencil:
    if isinstance(stencil, Stencil):
        figures = [*stencil.offsets, *stencil.weights]
        sound = (
            len(stencil.offsets) == len(stencil.weights) and all(map(is_number, figures)) and all(map(math.isfinite, figures))
        )
        first = sum(w * o for w, o in zip(stencil.weights, stencil.offsets)) if sound else 0.0
        if not sound or abs(sum(stencil.weights)) > 1e-9 or abs(first - 1) > 1e-9:
            raise ValueError(
                f"stencil is {stencil}; expected finite numbers, as many weights as offsets, weights that sum to 0 and sum "
                "weights*offsets = 1"
            )
        return stencil
    if not isinstance(stencil, str) or stencil not in STENCILS:
        raise ValueError(f"unknown stencil {stencil!r}; expected one of {sorted(STENCILS)} or a Stencil")
    return STENCILS[stencil]


def check_spread(normalize: str, stencil: Stencil, queries: int) -> None:
    """Refuses normalize='std' where a step reads one perturbed loss only: its spread is 0 in every step, and nothing would ever move."""
    if normalize == "std" and (perturbed := queries * sum(offset != 0.0 for offset in stencil.offsets)) < 2:
        raise ValueError(
            f"queries is {queries} with normalize='std' and stencil {stencil.name!r}, which read {perturbed} perturbed loss a step, and one "
            "loss has no spread; expected queries of at least 2, stencil='central', or normalize='none'"
        )


def loss_tensor(loss: Any) -> Tensor:
    """Returns the closure's loss as a 0-d float64 tensor, on its device; refused unless it is one real number.

    A 0-d or one-element tensor (of integers or booleans too: a count of right answers is one), a Python number or a NumPy scalar.
    Vectors, complex numbers, None and losses that carry an autograd graph are refused: each has meant a bug in a closure.
    """
    expected = "expected a scalar: a 0-d or [1] tensor of real numbers, or a Python number"
    if isinstance(loss, Tensor):
        if loss.shape not in ((), (1,)):
            raise ValueError(f"the closure returned a tensor of shape {tuple(loss.shape)}; {expected} (reduce it with .mean())")
        if loss.is_complex():
            raise TypeError(f"the closure returned a {loss.dtype} tensor; {expected} (is this the loss?)")
        if loss.requires_grad:
            raise ValueError(
                f"the closure returned a loss with an autograd graph; {expected}: the loss was computed before the step, or under "
                "enable_grad(): call the model inside the closure, without backward()"
            )
        return loss.reshape(()).to(torch.float64)
    if hasattr(loss, "dtype") and getattr(loss, "shape", None) == ():
        loss = loss.item()  # NumPy
    if isinstance(loss, bool) or not isinstance(loss, numbers.Real):
        raise TypeError(f"the closure returned {type(loss).__name__} {loss!r:.80}; {expected}")
    try:
        value = float(loss)
    except OverflowError:  # an integer or a fraction beyond the floats
        value = math.inf if loss > 0 else -math.inf  # type: ignore[operator]
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def mean(values: Sequence[float], count: int | None = None) -> float:
    """The sum of the values, rounded once, over `count` (None: how many there are); NaN where a value is not finite.

    A sum that is too large on its way is taken in units of 2**64, so the mean of finite values is finite."""
    count = len(values) if count is None else count
    if not all(map(math.isfinite, values)):
        return math.nan
    try:
        return math.fsum(values) / count
    except OverflowError:
        return math.fsum([value * 2.0**-64 for value in values]) / count * 2.0**64


def coefficient(losses: Sequence[float], stencil: Stencil, eps: float, clip: float | None = None) -> float:
    """The projected gradient of one query, rounded to float32; inf or NaN when the losses or the division are."""
    difference = mean([w * loss for w, loss in zip(stencil.weights, losses)], 1)
    value = torch.tensor(difference / eps, dtype=torch.float32, device="cpu").item()
    if clip is not None and abs(value) > clip:
        value = math.copysign(clip, value)
    return value


def coefficients(
    losses: Sequence[Sequence[float]], stencil: Stencil, eps: float, clip: float | None = None, normalize: str = "none"
) -> list[float]:
    """The coefficients of all queries. normalize='std' measures differences in standard deviations of the losses instead of eps:

    c_k = (sum_j weights[j] L_kj) / sigma, sigma the population standard deviation of the perturbed losses (Dang et al. 2026, FZOO); all
    are 0 where sigma is 0."""
    if normalize == "none":
        return [coefficient(sides, stencil, eps, clip) for sides in losses]
    check_spread(normalize, stencil, len(losses))
    sigma = deviation([loss for sides in losses for loss, offset in zip(sides, stencil.offsets) if offset])
    if not math.isfinite(sigma):
        return [math.nan] * len(losses)
    return [0.0 if sigma == 0.0 else coefficient(sides, stencil, sigma, clip) for sides in losses]


def deviation(values: Sequence[float]) -> float:
    """The population standard deviation; inf or NaN where a square is too large for a float or a value is not finite."""
    middle = mean(values)
    squares = [(value - middle) * (value - middle) for value in values]
    return math.sqrt(mean(squares)) if all(map(math.isfinite, squares)) else math.inf
