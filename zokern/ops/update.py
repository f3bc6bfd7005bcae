"""The verb of rules with state, `update_`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, directions
from ..backends import SCALARS, STATES
from ..stream import check_seed
from . import arguments
from .aliasing import shared_memory
from .operands import check_clock, check_list, check_rounding, spans_of
from .registered import listed, terms_of, traced, unwrap_seed, wrap_seed


def update_(
    tensors: Tensor | Sequence[Tensor],
    direction,
    rule: str,
    *,
    seed: int,
    who: str | int | Sequence[str | int],
    draws: Sequence[tuple[int, int]],
    coeffs: Sequence[float] | Tensor,
    states: Sequence[Tensor | Sequence[Tensor]],
    scalars: Sequence[float] | Tensor,
    first: int | Sequence[int] = 0,
    rounding: str = "nearest",
    residuals: Sequence[Tensor] | Tensor | None = None,
    clock: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """theta <- decay theta + lr move, move by a rule with state on g = sum_k coeffs[k] z(seed, who, *draws[k]), in one launch.

        'momentum'  m <- beta m + alpha g                                          move = m
        'adam'      m <- beta1 m + alpha1 g,   v <- beta2 v + alpha2 g g           move = m / (sqrt(v + inside) correction + eps)

    tensors   one tensor or a list on one device: float32, bfloat16 or float16, any shape, strides and alignment
    rule      'momentum' or 'adam'
    states    ([m, ...],) or ([m, ...], [v, ...]), a list of each for a list of tensors: float32, contiguous, shaped like them;
              zeros to start with
    scalars   (decay, lr, beta, alpha) or (decay, lr, beta1, alpha1, beta2, alpha2, inside, correction, eps), as floats or as float32
              on the tensors' device, where a captured CUDA graph reads new ones. zokern.Momentum and zokern.Adam make them:
              `.scalars(lr, decay, updates)`. Bias corrections are in lr and correction; g descends, so lr is positive
    who, draws, coeffs, first, rounding, residuals, clock   as for axpy_
    Arithmetic, float32: g by fma in draw order from 0; m = fma(alpha, g, round(beta m)); v = fma(alpha2, round(g g), round(beta2 v));
    move = m / fma(sqrt(v + inside), correction, eps), root and quotient correctly rounded; fma(lr, move, round(decay theta)); one
    rounding to the dtype. Equal bit for bit on every backend.
    Reads and writes theta and the states once; z is regenerated. Returns int64[1]: how many new weights are inf or NaN.
    Raises ValueError, before anything is written, for another rule, states that are missing, misshapen or shared, scalars that
    are not finite, and what axpy_ refuses.
    Polyak 1964; Kingma and Ba 2015; Zhang et al. 2024 (ZO-Bench): ZO-SGD-MMT and ZO-Adam are this call."""
    tensors, direction = arguments.tensor_list("tensors", tensors), directions.resolve(direction)
    spans = spans_of("update_", tensors, who, first)
    device = check_list("update_", tensors, spans)
    if not isinstance(rule, str) or rule not in STATES:
        raise ValueError(f"update_: rule is {rule!r}; expected one of {list(STATES)}")
    draws = arguments.draws("update_", draws)
    coeffs = coeffs if isinstance(coeffs, Tensor) else arguments.finite("update_", "coeffs", coeffs)
    if not draws or (isinstance(coeffs, list) and len(draws) != len(coeffs)):
        raise ValueError(f"update_: {len(draws)} draws and {len(coeffs)} coefficients; expected as many of each, at least one")
    coeffs = _numbers("coeffs", coeffs, len(draws), device)
    scalars = _numbers("scalars", scalars, len(SCALARS[rule]), device, f": {', '.join(SCALARS[rule])}")
    if not isinstance(states, (list, tuple)):
        raise TypeError(f"update_: states is {type(states).__name__}; expected ([m, ...],) or ([m, ...], [v, ...])")
    kept = [arguments.tensor_list(f"states[{i}]", state) for i, state in enumerate(states)]
    _check_states(rule, tensors, kept)
    low = [] if residuals is None else arguments.tensor_list("residuals", residuals)
    check_rounding("update_", tensors, rounding, low)
    check_clock("update_", clock, device)
    flat = [tensor for state in kept for tensor in state]
    if (pair := shared_memory([*tensors, *flat])) is not None:
        names = [f"tensors[{i}]" if i < len(tensors) else f"state {i - len(tensors)}" for i in pair]
        raise ValueError(f"update_: {names[0]} and {names[1]} share memory; expected distinct tensors")
    name, seed = backends.resolve(backend, device).name, check_seed(seed)
    with torch.no_grad():
        if direction.name not in directions.DIRECTIONS or not traced():
            count = backends.get(name).update_(
                tensors, spans, direction, seed, draws, coeffs, rule, scalars, kept, rounding, low or None, clock
            )
            torch.autograd.graph.increment_version([*tensors, *flat, *low])  # the kernels write through raw pointers
            return count
        whos, firsts = [s.who for s in spans], [s.first for s in spans]
        return torch.ops.zokern.update_(
            tensors, flat, low, coeffs, scalars, whos, firsts, [s for s, _ in draws], [d for _, d in draws], direction.name, rule,
            wrap_seed(seed), rounding, name, clock,
        )  # fmt: skip


def _numbers(what: str, given: Sequence[float] | Tensor, count: int, device: torch.device, names: str = "") -> Tensor:
    """Floats that the kernels read where they lie."""
    if not isinstance(given, Tensor):
        found = arguments.finite("update_", what, given, f"{count} finite numbers{names}")
        if len(found) != count:
            raise ValueError(f"update_: {what} is {found}; expected {count} finite numbers{names}")
        return torch.tensor(found, dtype=torch.float32, device=device)
    if given.dtype != torch.float32 or given.device != device or given.shape != (count,):
        raise ValueError(
            f"update_: {what} is {given.dtype}{list(given.shape)} on {given.device}; expected float32[{count}] on {device}{names}"
        )
    return given


def _check_states(rule: str, tensors: Sequence[Tensor], kept: Sequence[Sequence[Tensor]]) -> None:
    if len(kept) != len(STATES[rule]) or any([len(state) != len(tensors) for state in kept]):
        raise ValueError(
            f"update_: states has {[len(state) for state in kept]} tensors; rule {rule!r} keeps {', '.join(STATES[rule])}: expected "
            f"{len(tensors)} of each, zeros to start with"
        )
    for name, state in zip(STATES[rule], kept):
        for i, (t, tensor) in enumerate(zip(state, tensors)):
            plain = t.dtype == torch.float32 and t.layout == torch.strided and t.is_contiguous()
            if not plain or t.shape != tensor.shape or t.device != tensor.device:
                raise ValueError(
                    f"update_: {name}[{i}] is {str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}; expected contiguous "
                    f"float32{list(tensor.shape)} on {tensor.device}"
                )


@torch.library.custom_op("zokern::update_", mutates_args=("thetas", "states", "residuals"))
def _update_op(
    thetas: list[Tensor],
    states: list[Tensor],
    residuals: list[Tensor],
    coeffs: Tensor,
    scalars: Tensor,
    who: list[int],
    first: list[int],
    steps: list[int],
    draws: list[int],
    direction: str,
    rule: str,
    seed: int,
    rounding: str,
    backend: str,
    clock: Tensor | None = None,
) -> Tensor:
    tensors, spans = listed("update_", thetas, who, first)
    if rule not in STATES or len(states) != len(thetas) * len(STATES[rule]):
        kinds = {name: list(kinds) for name, kinds in STATES.items()}
        raise ValueError(
            f"update_: rule is {rule!r} with {len(states)} states for {len(thetas)} tensors; expected one of {kinds}, of each as many"
        )
    kept = [states[i * len(thetas) : (i + 1) * len(thetas)] for i in range(len(STATES[rule]))]
    _check_states(rule, tensors, kept)
    check_rounding("update_", tensors, rounding, residuals)
    check_clock("update_", clock, tensors[0].device)
    return backends.get(backend).update_(
        tensors,
        spans,
        directions.resolve(direction),
        unwrap_seed(seed),
        terms_of("update_", steps, draws),
        coeffs,
        rule,
        scalars,
        kept,
        rounding,
        residuals or None,
        clock,
    )


@_update_op.register_fake
def _(
    thetas, states, residuals, coeffs, scalars, who, first, steps, draws, direction, rule, seed, rounding, backend, clock=None
):
    return torch.empty(1, dtype=torch.int64, device=coeffs.device)
