"""The elementwise verbs: `draw`, `axpy_` and `perturb`."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Batch, Terms
from ..backends.operands import FLOATS
from . import arguments
from .aliasing import shared_memory
from .operands import batch_of, check_control, check_out, check_tensor, noise_of, spans_of, wrote
from .registered import count_of_nonfinite, lists_of, operation, register, traced


def draw(
    direction, shape: int | Sequence[int], *, seed: int, who: str | int, step: int, draw: int = 0,
    first: int = 0, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    clock: Tensor | None = None, out: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Returns z(seed, who, step, draw), elements [first, first + n), as a tensor.

    direction   a name ('normal', 'rademacher') or a Direction
    shape       of the result; n elements in row-major order
    seed        of the run: an integer in [0, 2**64)
    who         the parameter's name, or its 32-bit id
    step, draw  numbers in [0, 2**32): the step, and the draw word, which is the query for a direction
    first       number of the result's first element in the unsharded parameter
    dtype       float32 (exactly the z that every verb uses), or bfloat16 or float16 (that z, rounded to
                nearest)
    device      of the result
    clock       int64[1] on the device, or None: added to step when the kernel runs (see zokern.axpy_)
    out         contiguous, of that shape and dtype on that device: written and returned. None: a new
                tensor
    backend     'cpu', 'cuda', 'triton' or 'reference'; None: the first that can run on the device

    Equal bit for bit on every backend. docs/stream.md defines the numbers.
    Raises ValueError for names out of range, other dtypes, first + n > 2**35 or another `out`;
    RuntimeError for a backend that is off.
    Salmon et al. 2011 (Philox); Box and Muller 1958."""
    device = torch.device(device)
    if dtype not in FLOATS:
        raise ValueError(f"draw: dtype is {dtype!r}; expected torch.float32, torch.bfloat16 or torch.float16")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        check_out(
            "draw", "out", out, torch.Size((shape,) if isinstance(shape, int) else shape), dtype, device
        )
    spans = spans_of("draw", [out], who, first)
    check_tensor("draw", "the result", out, first)
    noise = noise_of("draw", direction, seed, [(step, draw)], clock, device)
    chosen = backends.resolve(backend, device)
    with torch.no_grad():
        if traced(backend, noise.direction):
            names: dict[str, Any] = {"who": spans[0].who, "first": spans[0].first, "step": step, "draw": draw}
            operation("draw_", chosen, noise, out=out, clock=clock, **names)
        else:
            batch = Batch([out], spans)
            chosen.draw(batch, noise)
            wrote(batch)
    return out


def _drawn_into(out: Tensor, direction, **names: Any) -> None:
    """Writes z to a tensor, whose shape and dtype it takes."""
    draw(direction, out.shape, dtype=out.dtype, device=out.device, out=out, **names)


register(
    "draw_",
    _drawn_into,
    "(Tensor(a!) out, str direction, int seed, int who, int step, int draw, int first, Tensor? clock, str "
    "backend) -> ()",
)


def axpy_(
    tensors: Tensor | Sequence[Tensor], direction, *, seed: int, who: str | int | Sequence[str | int],
    draws: Sequence[tuple[int, int]], coeffs: Sequence[float] | Tensor, decay: float | Sequence[float] = 1.0,
    first: int | Sequence[int] = 0, rounding: str = "nearest",
    residuals: Sequence[Tensor] | Tensor | None = None, each: bool | int = False,
    clock: Tensor | None = None, control: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Computes theta <- decay * theta + sum_k coeffs[k] * z(seed, who, *draws[k]) in place, in one
    launch.

    tensors          theta, one tensor or a list on one device: float32, bfloat16 or float16, any shape,
                     strides and alignment
    direction, seed, backend  as for zokern.draw
    who              the parameter's name, or a list with one name per tensor
    draws            K pairs (step, draw) that name the directions
    coeffs           K floats, or float32[K] on the tensors' device, in units of theta
    decay            factor of the old weights, rounded to float32; with `each`, one for all sums or one
                     for each
    first            number of each tensor's first element in its unsharded parameter: one int, or one per
                     tensor
    rounding         'nearest'; 'stochastic' (16 random bits of the stream, named by who and the step of
                     the last draw); 'residual' (bfloat16 only: residuals hold the 16 low bits of an exact
                     float32 master)
    residuals        int16 tensors, contiguous, shaped like the tensors, read and written; required by
                     'residual'
    each             False: one sum of K terms. q, a divisor of K (True: 1): K / q sums of q terms in one
                     pass over theta, one after the other, each with its decay and its rounding: the bits
                     of K / q calls. This replays a run of steps with q queries from its (draws,
                     coefficients, decays); K may be thousands
    clock            int64[1] on the tensors' device, or None. Its value when the kernel runs is added
                     (mod 2^32) to every step. With a clock and coefficients in device memory, a call that
                     was made once before can be captured in a CUDA graph, and each replay after
                     clock.add_(1) finds another z
    control          float32[3] of zokern.project, or None. The kernel reads it when it runs. Its decay
                     stands in the place of `decay`; where its go is 0 no bit of the tensors and residuals
                     changes, and the count is 0. A sum alone has it, without `each`

    Arithmetic: t = round(decay * theta); t = fma(coeffs[k], z_k, t) in order, float32; one rounding at
    the end. Reads and writes theta once; z is made again. Equal bit for bit on every backend.
    Returns int64[1]: how many results are inf or NaN.
    Raises ValueError, before anything is written, for other dtypes, overlapping elements, mixed devices,
    K = 0, and an `each` that does not divide K or stands beside a control. So it does for coefficients or
    decays that are not finite, first + n > 2**35, and residuals that are missing or misshapen.
    Malladi et al. 2023, Algorithm 1 (perturb, restore and update are this call)."""
    batch = batch_of("axpy_", tensors, who, first, rounding, residuals)
    device = batch.tensors[0].device
    noise = noise_of("axpy_", direction, seed, draws, clock, device)
    terms = _terms(coeffs, decay, each, control, len(noise.draws), device)
    chosen = backends.resolve(backend, device)
    with torch.no_grad():  # weights are leaves that require a gradient
        if traced(backend, noise.direction):
            sums = {"coeffs": terms.coefficients, "decay": terms.decay, "each": terms.each, "clock": clock,
                    "control": control}  # fmt: skip
            return operation("axpy_", chosen, noise, batch, rounding=rounding, **lists_of(noise), **sums)
        nonfinite = chosen.axpy_(batch, noise, terms)
        wrote(batch)
        return nonfinite


register(
    "axpy_",
    axpy_,
    "(Tensor(a!)[] tensors, str direction, int seed, int[] who, int[] steps, int[] draws, Tensor coeffs, "
    "float[] decay, int[] first, str rounding, Tensor(b!)[] residuals, int each, Tensor? clock, str backend, "
    "Tensor? control=None) -> Tensor",
    count_of_nonfinite,
)


def coefficients_of(verb: str, coeffs: Sequence[float] | Tensor, count: int, device: torch.device) -> Tensor:
    """Returns the coefficients of a sum of `count` draws as float32[count] on the device."""
    if not isinstance(coeffs, Tensor):
        coeffs = torch.tensor(arguments.finite(verb, "coeffs", coeffs), dtype=torch.float32, device=device)
    elif coeffs.dtype != torch.float32 or coeffs.device != device or coeffs.dim() != 1:
        where = f"{coeffs.dtype}{list(coeffs.shape)} on {coeffs.device}"
        raise ValueError(f"{verb}: coeffs is {where}; expected float32[K] on {device}")
    elif coeffs.is_cpu and not traced(None):  # looking at numbers of a GPU would wait for it
        arguments.finite(verb, "coeffs", coeffs)
    if not count or count != coeffs.shape[0]:
        raise ValueError(
            f"{verb}: {count} draws and {coeffs.shape[0]} coefficients; expected as many of each, at least "
            "one"
        )
    return coeffs


def _terms(
    coeffs: Sequence[float] | Tensor, decay: float | Sequence[float], each: bool | int,
    control: Tensor | None, count: int, device: torch.device,
) -> Terms:  # fmt: skip
    """Returns the sums of `count` draws, with a decay for every sum."""
    check_control("axpy_", control, device)
    if control is not None and each:
        raise ValueError(f"axpy_: each is {each!r} with a control; expected False: a control is for one sum")
    coeffs = coefficients_of("axpy_", coeffs, count, device)
    if not isinstance(each, (bool, numbers.Integral)) or each < 0:
        raise ValueError(
            f"axpy_: each is {each!r}; expected False, True or the number of terms that a sum has"
        )
    each = int(each)
    if each and count % each:
        raise ValueError(
            f"axpy_: each is {each} for {count} draws; expected a divisor of {count}: every sum has as many "
            "terms"
        )
    sums = count // each if each else 1
    decays = arguments.one_or_each("axpy_", "decay", decay, sums)
    if len(decays) != sums:
        how = f"each is {each}" if each else "without each they are one sum"
        raise ValueError(
            f"axpy_: decay has {len(decays)} numbers for {count} draws ({how}); expected one number, or "
            f"{sums}"
        )
    return Terms(coeffs, decays, each, control)


def perturb(
    tensors: Tensor | Sequence[Tensor], direction, *, seed: int, who: str | int | Sequence[str | int],
    step: int, draw: int = 0, scales: Sequence[float] = (1e-3, -1e-3), first: int | Sequence[int] = 0,
    residuals: Sequence[Tensor] | Tensor | None = None, dtype: torch.dtype | None = None,
    clock: Tensor | None = None, out: Sequence[Tensor] | Sequence[Sequence[Tensor]] | None = None,
    backend: str | None = None,
) -> list[list[Tensor]]:  # fmt: skip
    """Returns theta + scales[j] * z(seed, who, step, draw) for one or two scales, from one evaluation of
    z.

    tensors          theta, one tensor or a list on one device, only read: float32, bfloat16 or float16,
                     any shape, strides and alignment
    direction, seed, step, draw, clock, backend  as for zokern.draw
    who, first       as for zokern.axpy_
    scales           one or two floats in units of theta
    dtype            of the results: theta's (default) or float32
    residuals        int16 low bits of bfloat16 tensors: theta plus its low bits is perturbed
    out              for each scale a list of contiguous tensors (one tensor, if `tensors` is one), shaped
                     like theta and of the results' dtype. They are apart in memory from each other and
                     from the inputs, and are written and returned. A loop that keeps them saves the
                     allocation, which takes longer than the kernel. None: new tensors. Under
                     torch.compile the results are made and copied

    Returns, for each scale, the list of results: round(fma(scale, z, theta)).
    Equal bit for bit on every backend.
    Raises ValueError as zokern.axpy_ does, and for another `out`, before anything is written.
    Malladi et al. 2023, Algorithm 1 (both perturbations are this call)."""
    low = [] if residuals is None else arguments.tensor_list("residuals", residuals)
    batch = batch_of("perturb", tensors, who, first, "residual" if low else "nearest", low, alone=False)
    device = batch.tensors[0].device
    scales = arguments.finite("perturb", "scales", scales, "one or two finite numbers")
    if len(scales) not in (1, 2):
        raise ValueError(f"perturb: scales is {scales}; expected one or two finite numbers")
    if dtype is not None and any(dtype not in (t.dtype, torch.float32) for t in batch.tensors):
        raise ValueError(f"perturb: dtype is {dtype!r}; expected the tensors' dtype or torch.float32")
    noise = noise_of("perturb", direction, seed, [(step, draw)], clock, device)
    chosen = backends.resolve(backend, device)
    outs = None if out is None else _outs(out, isinstance(tensors, Tensor), batch, len(scales), dtype)
    with torch.no_grad():
        if not traced(backend, noise.direction):
            made = outs or [_results(batch.tensors, dtype) for _ in scales]
            chosen.perturb(batch._replace(tensors=[t.detach() for t in batch.tensors]), noise, scales, made)
            if outs is not None:
                # written through raw pointers
                torch.autograd.graph.increment_version([t for side in outs for t in side])
            return made
        names = {"step": step, "draw": draw, "scales": scales, "dtype": dtype, "clock": clock}
        flat, count = operation("perturb", chosen, noise, batch, **names), len(batch.tensors)
        found = [flat[:count], flat[count:]][: len(scales)]
        for mine, side in zip(outs or [], found):
            for to, made in zip(mine, side):
                to.copy_(made)
    return outs or found


def _results(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device) for t in tensors]


def _perturbed(**names: Any) -> list[Tensor]:
    """Returns the results of perturb() in one list."""
    return [out for side in perturb(**names) for out in side]


register(
    "perturb",
    _perturbed,
    "(Tensor[] tensors, str direction, int seed, int[] who, int step, int draw, float[] scales, int[] first, "
    "Tensor[] residuals, ScalarType? dtype, Tensor? clock, str backend) -> Tensor[]",
    lambda given: [out for _ in given.scales for out in _results(given.tensors, given.dtype)],
)


def _outs(out, single: bool, batch: Batch, sides: int, dtype: torch.dtype | None) -> list[list[Tensor]]:
    """Returns the lists that perturb writes, for each scale, checked."""
    tensors, low = batch.tensors, batch.residuals or ()
    what = "for each scale " + (
        "a tensor, or a list of one" if single else f"a list of {len(tensors)} tensors"
    )
    if not isinstance(out, (list, tuple)) or len(out) != sides:
        raise ValueError(f"perturb: out is {type(out).__name__} for {sides} scales; expected {what}")
    outs = [[side] if single and isinstance(side, Tensor) else side for side in out]
    for j, side in enumerate(outs):
        if not isinstance(side, (list, tuple)) or len(side) != len(tensors):
            raise ValueError(
                f"perturb: out[{j}] is {type(side).__name__} for {len(tensors)} tensors; expected {what}"
            )
        for i, (result, tensor) in enumerate(zip(side, tensors)):
            check_out("perturb", f"out[{j}][{i}]", result, tensor.shape, dtype or tensor.dtype, tensor.device)
    flat, read = [result for side in outs for result in side], [*tensors, *low]
    names = [f"out[{j}][{i}]" for j in range(sides) for i in range(len(tensors))]
    # tensors that are only read may share memory, and then each is compared on its own
    for inputs in [read] if shared_memory(read) is None else [[t] for t in read]:
        if (pair := shared_memory([*flat, *inputs])) is not None:
            a, b = (names[i] if i < len(flat) else "a tensor that is read" for i in sorted(pair))
            raise ValueError(
                f"perturb: {a} and {b} share memory; expected results apart from each other and from what is "
                "read"
            )
    return [list(side) for side in outs]
