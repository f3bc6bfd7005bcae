"""The verb of losses, `project`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Backend, Projected, Projection
from ..checks import finite_number, flag
from .arguments import finite, is_text
from .registered import operation, register, traced

Number = float | Tensor


def project(
    losses: Tensor | Sequence[Number] | Sequence[Sequence[Number]],
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None, *, eps: Number, lr: Number,
    weight_decay: Number = 0.0, clip: Number | None = None, maximize: bool = False,
    count: float | None = None, backend: str | None = None,
) -> Projected:  # fmt: skip
    """Turns losses into the numbers of an update, where the losses lie: no value reaches the host.

        L_j = mean over micro-batches of losses[i, j]
        c_k = (sum_j weights[k, j] L_j) / eps, cut to [-clip, clip]
        w_k = -c_k / count, or c_k / count with maximize
        a_k = lr w_k,   decay = 1 - lr weight_decay

    losses        n losses at the points of a step, or m rows of n, one for each micro-batch: floating
                  point, or floats and tensors of one element, which are stacked. They are only read
    weights       K rows of n: the stencil's weight of each loss in each projected gradient. One row is K
                  = 1. A weight of 0 reads no loss, whatever the loss is. None: the losses are c_k, and
                  neither eps nor clip plays a part
    eps           > 0, in units of theta: what the points are away from it
    lr            >= 0, in units of theta per unit of c
    weight_decay  >= 0, per unit of lr
    clip          >= 0, the bound on |c_k| in units of loss / eps; None: none
    maximize      True: the update ascends, and w_k has the other sign
    count         what the sum over draws is divided by; None: K
    backend       as for zokern.draw

    eps, lr, weight_decay and clip are floats, or tensors of one element on the losses' device, which are
    not looked at: a captured CUDA graph reads new ones.
    Arithmetic: float64, each operation rounded once, sums in order; c_k of weights and all a_k are
    rounded to float32, and clip is for the rounded c_k. Equal bit for bit on every backend. Linear in m n
    + K n; one launch.
    Returns (coefficients, weights, amounts, control). coefficients and weights are c and w, float64 [K].
    amounts are a, float32 [K], which zokern.axpy_ adds as coeffs. control is float32 [3], (decay, go,
    finite), which axpy_, update_ and lowrank_ take. finite is 0 where some c_k, w_k, lr w_k, lr or the
    decay is inf or NaN in float32: then w and a are 0 and decay is 1. go is 0 where no weight would
    change.
    Raises ValueError for shapes that do not fit, integers, numbers out of range, and tensors of another
    device.
    Malladi et al. 2023, Algorithm 1: the projected gradient, with weights (1/2, -1/2) of L(+eps),
    L(-eps)."""
    found = _matrix("losses", losses, None)
    rows = None if weights is None else _matrix("weights", weights, found.device)
    if rows is not None and rows.shape[1] != found.shape[1]:
        raise ValueError(
            f"project: weights has {rows.shape[1]} columns for {found.shape[1]} losses; expected one each"
        )
    count = (found.shape[1] if rows is None else rows.shape[0]) if count is None else count
    scalars = _scalars(found.device, eps, lr, weight_decay, clip, maximize, count)
    chosen = backends.resolve(backend, found.device)
    with torch.no_grad():
        if traced(backend):
            return Projected(*operation("project", chosen, None, losses=found, weights=rows, scalars=scalars))
        return chosen.project(Projection(found, rows, scalars))


def _projected(
    losses: Tensor, weights: Tensor | None, scalars: Tensor, backend: Backend
) -> tuple[Tensor, ...]:
    """Returns the results of project() apart in memory, as an operation has to."""
    return tuple([part.clone() for part in backend.project(Projection(losses, weights, scalars))])


def _fake(given: SimpleNamespace) -> tuple[Tensor, ...]:
    losses, weights = given.losses, given.weights
    draws = losses.shape[1] if weights is None else weights.shape[0]
    single = losses.new_empty(draws, dtype=torch.float32)
    return losses.new_empty(draws), losses.new_empty(draws), single, single.new_empty(3)


register(
    "project",
    _projected,
    "(Tensor losses, Tensor? weights, Tensor scalars, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def _scalars(
    device: torch.device, eps: Number, lr: Number, weight_decay: Number, clip: Number | None, maximize: bool,
    count: float,
) -> Tensor:  # fmt: skip
    """Returns the numbers of a projection in the order of PROJECTED, float64 on the device."""
    numbers: list[Number] = [
        _number("eps", eps, device, above=0.0),
        _number("lr", lr, device, minimum=0.0),
        _number("weight_decay", weight_decay, device, minimum=0.0),
        math.inf if clip is None else _number("clip", clip, device, minimum=0.0),
        1.0 if flag("project: maximize", maximize) else -1.0,
        finite_number("project: count", count, above=0.0),
    ]
    return _stacked(numbers, device)


def _number(
    name: str, value: Any, device: torch.device, minimum: float | None = None, above: float | None = None
) -> Number:
    """Returns a float in range, or a tensor of one element as it is."""
    if not isinstance(value, Tensor):
        return finite_number(f"project: {name}", value, minimum=minimum, above=above)
    if value.numel() != 1 or not value.is_floating_point() or value.device != device:
        where = f"{value.dtype}{list(value.shape)} on {value.device}"
        raise ValueError(f"project: {name} is {where}; expected a number, or one on {device}")
    return value.detach().reshape(())


def _stacked(numbers: Sequence[Number], device: torch.device) -> Tensor:
    """Returns numbers as float64 on the device."""
    if not any([isinstance(number, Tensor) for number in numbers]):
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    one = [torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers]
    return torch.stack([number.detach().reshape(()) for number in one])


def _matrix(name: str, given: Any, device: torch.device | None) -> Tensor:
    """Returns losses or weights as a contiguous float64 matrix; one row of them is a matrix too."""
    if not isinstance(given, Tensor):
        if is_text(given) or not isinstance(given, Sequence) or not given:
            raise ValueError(f"project: {name} is {given!r:.80}; expected a tensor, or rows of numbers")
        rows = list(given) if isinstance(given[0], (list, tuple)) else [given]
        flat = [number for row in rows for number in row]
        tensors = [number for number in flat if isinstance(number, Tensor)]
        if len({len(row) for row in rows}) != 1 or any([t.numel() != 1 for t in tensors]):
            raise ValueError(f"project: {name} is {given!r:.80}; expected rows of as many numbers each")
        if name == "weights":
            flat = list(finite("project", name, flat))
        where = tensors[0].device if tensors and device is None else device or torch.device("cpu")
        given = _stacked(flat, where).view(len(rows), -1)
    if not given.is_floating_point() or given.dim() not in (1, 2) or not given.numel():
        raise ValueError(
            f"project: {name} is {given.dtype}{list(given.shape)}; "
            "expected floating point, one row or a matrix"
        )
    if device is not None and given.device != device:
        raise ValueError(f"project: {name} is on {given.device}; expected {device}, as the losses")
    return given.detach().double().reshape(-1, given.shape[-1]).contiguous()


__all__ = ["project"]
