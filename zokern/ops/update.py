"""The verb of rules with state, `update_`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import SCALARS, STATES, TensorList, Update
from . import arguments
from .aliasing import shared_memory
from .elementwise import coefficients_of
from .operands import batch_of, check_control, noise_of, wrote
from .registered import count_of_nonfinite, lists_of, operation, register, traced


def update_(
    tensors: Tensor | Sequence[Tensor], direction, rule: str, *, seed: int,
    who: str | int | Sequence[str | int], draws: Sequence[tuple[int, int]], coeffs: Sequence[float] | Tensor,
    states: Sequence[Tensor | Sequence[Tensor]], scalars: Sequence[float] | Tensor,
    first: int | Sequence[int] = 0, rounding: str = "nearest", clock: Tensor | None = None,
    residuals: Sequence[Tensor] | Tensor | None = None, control: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Computes theta <- decay theta + lr move in one launch, by a rule on g.

        g = sum_k coeffs[k] z(seed, who, *draws[k])
        'momentum'  m <- beta m + alpha g
                    move = m
        'adam'      m <- beta1 m + alpha1 g,   v <- beta2 v + alpha2 g g
                    move = m / (sqrt(v + inside) correction + eps)
        'sign'      move = 1 where g > 0, -1 where g < 0, and g itself where it is 0 or NaN

    tensors          theta, one or a list, on one device: float32, bfloat16 or float16 of any shape,
                     strides and alignment
    direction, seed, backend  as for zokern.draw
    rule             'momentum', 'adam' or 'sign'
    states           ([m, ...],) or ([m, ...], [v, ...]), a list of each for a list of tensors: float32,
                     contiguous, shaped like them; zeros to start with. () for 'sign'
    scalars          (decay, lr, beta, alpha), (decay, lr, beta1, alpha1, beta2, alpha2, inside,
                     correction, eps) or, for 'sign', (decay, lr): floats, or float32 on the tensors'
                     device, where a captured CUDA graph reads new ones. The `.scalars(lr, decay,
                     updates)` of zokern.Momentum, zokern.Adam and zokern.SignSgd makes them. lr and
                     correction hold the bias corrections; g descends, so lr is positive
    who, draws, first, rounding, residuals, clock  as for zokern.axpy_
    coeffs           K floats, or float32[K] on the tensors' device, in the unit of g: loss per weight
    control          float32[3] of zokern.project, or None. The kernel reads it when it runs: where its
                     finite is 0 no bit of the tensors, residuals and states changes, and the count is 0.
                     The decay is that of the scalars

    Arithmetic, float32: g by fma in draw order from 0; m = fma(alpha, g, round(beta m)); v = fma(alpha2,
    round(g g), round(beta2 v)). Then move = m / fma(sqrt(v + inside), correction, eps), root and quotient
    correctly rounded. Last fma(lr, move, round(decay theta)), and one rounding to the dtype.
    Reads and writes theta and the states once; z is made again. Equal bit for bit on every backend.
    Returns int64[1]: how many new weights are inf or NaN.
    Raises ValueError, before anything is written, for another rule, for states that are missing,
    misshapen or shared, for scalars that are not finite, and for every argument that zokern.axpy_
    refuses.
    Polyak 1964; Kingma and Ba 2015; Zhang et al. 2024 (ZO-Bench): ZO-SGD-MMT and ZO-Adam are this call.
    Bernstein et al. 2018 (signSGD); Liu et al. 2019 (ZO-signSGD)."""
    batch = batch_of("update_", tensors, who, first, rounding, residuals, alone=False)
    noise = noise_of("update_", direction, seed, draws, clock, batch.tensors[0].device)
    update = _update(rule, coeffs, scalars, states, control, batch.tensors, len(noise.draws))
    flat, chosen = [*chain(*update.states)], backends.resolve(backend, batch.tensors[0].device)
    with torch.no_grad():
        if traced(backend, noise.direction):
            given = {"rule": rule, "coeffs": update.coefficients, "scalars": update.scalars, "states": flat,
                     "clock": clock, "control": control}  # fmt: skip
            return operation("update_", chosen, noise, batch, rounding=rounding, **lists_of(noise), **given)
        count = chosen.update_(batch, noise, update)
        wrote(batch, *flat)
        return count


def _update(
    rule: str, coeffs: Sequence[float] | Tensor, scalars: Sequence[float] | Tensor,
    states: Sequence[Tensor | Sequence[Tensor]], control: Tensor | None, tensors: Sequence[Tensor], draws: int
) -> Update:  # fmt: skip
    """Returns a rule on a sum of `draws` draws, checked for tensors of one device."""
    if not isinstance(rule, str) or rule not in STATES:
        raise ValueError(f"update_: rule is {rule!r}; expected one of {list(STATES)}")
    device = tensors[0].device
    coeffs, scalars = coefficients_of("update_", coeffs, draws, device), _scalars(rule, scalars, device)
    kept = _states_of(rule, tensors, states)
    check_control("update_", control, device)
    return Update(coeffs, rule, scalars, kept, control)


def _of_flat_states(tensors: Sequence[Tensor], states: Sequence[Tensor], **names: Any) -> Tensor:
    """Calls update_() with states in one list, rule state after rule state."""
    count = max(1, len(tensors))
    return update_(tensors, states=[states[i : i + count] for i in range(0, len(states), count)], **names)


register(
    "update_",
    _of_flat_states,
    "(Tensor(a!)[] tensors, str direction, str rule, int seed, int[] who, int[] steps, int[] draws, Tensor "
    "coeffs, "
    "Tensor(b!)[] states, Tensor scalars, int[] first, str rounding, Tensor(c!)[] residuals, Tensor? clock, "
    "str backend, Tensor? control=None) -> Tensor",
    count_of_nonfinite,
)


def _scalars(rule: str, given: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Returns the numbers of a rule, which the kernels read where they lie."""
    count, names = len(SCALARS[rule]), ", ".join(SCALARS[rule])
    if not isinstance(given, Tensor):
        found = arguments.finite("update_", "scalars", given, f"{count} finite numbers: {names}")
        if len(found) != count:
            raise ValueError(f"update_: scalars is {found}; expected {count} finite numbers: {names}")
        return torch.tensor(found, dtype=torch.float32, device=device)
    if given.dtype != torch.float32 or given.device != device or given.shape != (count,):
        where = f"{given.dtype}{list(given.shape)} on {given.device}"
        raise ValueError(f"update_: scalars is {where}; expected float32[{count}] on {device}: {names}")
    return given


def _states_of(rule: str, tensors: Sequence[Tensor], states: Any) -> list[TensorList]:
    """Returns the states of a rule: float32, contiguous, shaped like the tensors, apart in memory."""
    if not isinstance(states, (list, tuple)):
        raise TypeError(
            f"update_: states is {type(states).__name__}; expected ([m, ...],) or ([m, ...], [v, ...])"
        )
    kept = [arguments.tensor_list(f"states[{i}]", state) for i, state in enumerate(states)]
    if len(kept) != len(STATES[rule]) or any([len(state) != len(tensors) for state in kept]):
        counts = [len(state) for state in kept]
        names = ", ".join(STATES[rule])
        wanted = (
            f"{names}: expected {len(tensors)} of each, zeros to start with"
            if names
            else "nothing: expected ()"
        )
        raise ValueError(f"update_: states has {counts} tensors; rule {rule!r} keeps {wanted}")
    for name, state in zip(STATES[rule], kept):
        for i, (t, tensor) in enumerate(zip(state, tensors)):
            plain = t.dtype == torch.float32 and t.layout == torch.strided and t.is_contiguous()
            if not plain or t.shape != tensor.shape or t.device != tensor.device:
                where = f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}"
                wanted = f"contiguous float32{list(tensor.shape)} on {tensor.device}"
                raise ValueError(f"update_: {name}[{i}] is {where}; expected {wanted}")
    if (pair := shared_memory([*tensors, *[t for state in kept for t in state]])) is not None:
        first, second = (f"tensors[{i}]" if i < len(tensors) else f"state {i - len(tensors)}" for i in pair)
        raise ValueError(f"update_: {first} and {second} share memory; expected distinct tensors")
    return kept


__all__ = ["update_"]
