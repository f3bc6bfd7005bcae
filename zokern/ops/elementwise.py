"""The elementwise verbs: `draw`, `axpy_` and `perturb`."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, directions
from ..backends import TensorList
from ..backends.validation import FLOATS
from ..stream import check_seed, check_word
from . import arguments
from .aliasing import shared_memory
from .operands import check_clock, check_list, check_out, check_rounding, check_tensor, spans_of
from .registered import listed, terms_of, traced, unwrap_seed, wrap_seed


def draw(
    direction,
    shape: int | Sequence[int],
    *,
    seed: int,
    who: str | int,
    step: int,
    draw: int = 0,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    clock: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """z(seed, who, step, draw), elements [first, first + n), as a tensor.

    direction  a name ('normal', 'rademacher') or a Direction
    shape      of the result; n elements in row-major order
    seed, who, step, draw  the stream's names (zokern/stream.py): run seed, parameter name, step number, draw word
    first      number of the result's first element in the unsharded parameter
    dtype      float32 (exactly the z that every verb uses), or bfloat16 / float16 (that z, rounded to nearest)
    clock      int64[1] on the device, or None: added to step when the kernel runs (see axpy_)
    out        contiguous, of that shape and dtype on that device: written and returned. None: a new tensor
    Equal bit for bit on every backend.
    Raises ValueError for names out of range, other dtypes, first + n > 2**35, another `out`; RuntimeError for a backend that is off."""
    direction, device = directions.resolve(direction), torch.device(device)
    if dtype not in FLOATS:
        raise ValueError(f"draw: dtype is {dtype!r}; expected torch.float32, torch.bfloat16 or torch.float16")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        check_out("draw", "out", out, torch.Size((shape,) if isinstance(shape, int) else shape), dtype, device)
    (span,) = spans_of("draw", [out], who, first)
    check_tensor("draw", "the result", out, first)
    name, seed = backends.resolve(backend, device).name, check_seed(seed)
    step, draw = check_word("step", step), check_word("draw", draw)
    check_clock("draw", clock, device)
    with torch.no_grad():
        if direction.name not in directions.DIRECTIONS:
            backends.get(name).draw([out], [span], direction, seed, step, draw, clock)
            torch.autograd.graph.increment_version([out])  # the kernels write through raw pointers
        else:
            torch.ops.zokern.draw_(out, span.who, first, step, draw, direction.name, wrap_seed(seed), name, clock)
    return out


def axpy_(
    tensors: Tensor | Sequence[Tensor],
    direction,
    *,
    seed: int,
    who: str | int | Sequence[str | int],
    draws: Sequence[tuple[int, int]],
    coeffs: Sequence[float] | Tensor,
    decay: float | Sequence[float] = 1.0,
    first: int | Sequence[int] = 0,
    rounding: str = "nearest",
    residuals: Sequence[Tensor] | Tensor | None = None,
    each: bool | int = False,
    clock: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """theta <- decay * theta + sum_k coeffs[k] * z(seed, who, *draws[k]), in place, one launch for the whole list.

    tensors   one tensor or a list on one device: float32, bfloat16 or float16, any shape, strides and alignment
    who       the parameter's name, or a list with one name per tensor
    draws     K pairs (step, draw) naming the directions
    coeffs    K floats, or float32[K] on the tensors' device, in units of theta
    decay     factor of the old weights, rounded to float32; with `each`, one for all sums or a sequence of one for each
    first     number of each tensor's first element in its unsharded parameter: one int, or one per tensor
    rounding  'nearest'; 'stochastic' (16 random bits from the stream: who, step of the last draw, purpose rounding);
              'residual' (bfloat16 only; residuals hold the 16 low bits of an exact float32 master)
    residuals int16 tensors, contiguous, shaped like the tensors, read and written; required by 'residual'
    each      False: one sum of K terms. q, a divisor of K (True: 1): K / q sums of q terms, one after the other, each with its decay
              and its rounding, in one pass over theta: the bits of K / q calls. A run of steps with q queries is replayed by its
              triples (draws, coefficients, decays) so; K may be thousands
    clock     int64[1] on the tensors' device, or None: its value when the kernel runs is added (mod 2^32) to every step number.
              With a clock and coefficients in device memory, a call that was made once before can be captured in a CUDA graph,
              and each replay after clock.add_(1) finds another z.
    Arithmetic: t = round(decay * theta); t = fma(coeffs[k], z_k, t) in order, float32; one rounding to the dtype.
    Reads and writes theta once; z is regenerated. Equal bit for bit on every backend.
    Returns int64[1]: how many results are inf or NaN.
    Raises ValueError, before anything is written, for other dtypes, overlapping elements, mixed devices, K = 0, an `each` that does
    not divide K, coefficients or decays that are not finite, first + n > 2**35, residuals that are missing or misshapen.
    Malladi et al. 2023, Algorithm 1 (perturb, restore and update are this call)."""
    tensors, direction = arguments.tensor_list("tensors", tensors), directions.resolve(direction)
    spans = spans_of("axpy_", tensors, who, first)
    device = check_list("axpy_", tensors, spans)
    draws = arguments.draws("axpy_", draws)
    if not isinstance(coeffs, Tensor):
        coeffs = torch.tensor(arguments.finite("axpy_", "coeffs", coeffs), dtype=torch.float32, device=device)
    elif coeffs.dtype != torch.float32 or coeffs.device != device or coeffs.dim() != 1:
        raise ValueError(
            f"axpy_: coeffs is {coeffs.dtype}{list(coeffs.shape)} on {coeffs.device}; expected float32[K] on {device}"
        )
    elif coeffs.is_cpu and not traced():  # looking at numbers of a GPU would wait for it
        arguments.finite("axpy_", "coeffs", coeffs)
    if not draws or len(draws) != len(coeffs):
        raise ValueError(f"axpy_: {len(draws)} draws and {len(coeffs)} coefficients; expected as many of each, at least one")
    each, decays = _check_each(each, decay, len(draws))
    low = [] if residuals is None else arguments.tensor_list("residuals", residuals)
    check_rounding("axpy_", tensors, rounding, low)
    check_clock("axpy_", clock, device)
    if (pair := shared_memory(tensors)) is not None:
        raise ValueError(f"axpy_: tensors[{pair[0]}] and tensors[{pair[1]}] share memory; expected distinct tensors")
    name, seed = backends.resolve(backend, device).name, check_seed(seed)
    with torch.no_grad():  # weights are leaves that require a gradient, and this is not an operation to differentiate
        if direction.name not in directions.DIRECTIONS or not traced():
            count = backends.get(name).axpy_(
                tensors, spans, direction, seed, draws, coeffs, decays, rounding, low or None, clock, each
            )
            torch.autograd.graph.increment_version([*tensors, *low])  # the kernels write through raw pointers
            return count
        whos, firsts = [s.who for s in spans], [s.first for s in spans]
        return torch.ops.zokern.axpy_(
            tensors, low, coeffs, whos, firsts, [s for s, _ in draws], [d for _, d in draws],
            direction.name, wrap_seed(seed), decays, rounding, name, clock, each,
        )  # fmt: skip


def _check_each(each: bool | int, decay: float | Sequence[float], count: int) -> tuple[int, list[float]]:
    """Terms of a sum, 0 for all of them, and the decay of every sum."""
    if not isinstance(each, (bool, numbers.Integral)) or each < 0:
        raise ValueError(f"axpy_: each is {each!r}; expected False, True or the number of terms that a sum has")
    each = int(each)
    if each and count % each:
        raise ValueError(f"axpy_: each is {each} for {count} draws; expected a divisor of {count}: every sum has as many terms")
    sums = count // each if each else 1
    decays = arguments.one_or_each("axpy_", "decay", decay, sums)
    if len(decays) != sums:
        how = f"each is {each}" if each else "without each they are one sum"
        raise ValueError(f"axpy_: decay has {len(decays)} numbers for {count} draws ({how}); expected one number, or {sums}")
    return each, decays


def perturb(
    tensors: Tensor | Sequence[Tensor],
    direction,
    *,
    seed: int,
    who: str | int | Sequence[str | int],
    step: int,
    draw: int = 0,
    scales: Sequence[float] = (1e-3, -1e-3),
    first: int | Sequence[int] = 0,
    residuals: Sequence[Tensor] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    clock: Tensor | None = None,
    out: Sequence[Tensor] | Sequence[Sequence[Tensor]] | None = None,
    backend: str | None = None,
) -> list[list[Tensor]]:
    """theta + scales[j] * z(seed, who, step, draw) for one or two scales, from one evaluation of z; theta is only read.

    Arguments as for axpy_. scales: one or two floats in units of theta. dtype: of the results, theta's (default) or float32.
    residuals: int16 low bits of bfloat16 tensors; theta plus its low bits is then what is perturbed. clock as for axpy_.
    out: for each scale a list of contiguous tensors (one tensor, where `tensors` is one), shaped like theta, of the results' dtype, apart
    in memory from each other and from what is read: written and returned. A loop that keeps them saves the allocation, which takes
    longer than the kernel. None: new tensors. Under torch.compile the results are made and copied.
    Returns, for each scale, the list of results: round(fma(scale, z, theta)). Equal bit for bit on every backend.
    Raises ValueError as axpy_ does, and for another `out`, before anything is written."""
    single = isinstance(tensors, Tensor)
    tensors, direction = arguments.tensor_list("tensors", tensors), directions.resolve(direction)
    spans = spans_of("perturb", tensors, who, first)
    device = check_list("perturb", tensors, spans)
    scales = arguments.finite("perturb", "scales", scales, "one or two finite numbers")
    if len(scales) not in (1, 2):
        raise ValueError(f"perturb: scales is {scales}; expected one or two finite numbers")
    if dtype is not None and any(dtype not in (t.dtype, torch.float32) for t in tensors):
        raise ValueError(f"perturb: dtype is {dtype!r}; expected the tensors' dtype or torch.float32")
    low = [] if residuals is None else arguments.tensor_list("residuals", residuals)
    if low:
        check_rounding("perturb", tensors, "residual", low)
    check_clock("perturb", clock, device)
    name = backends.resolve(backend, device).name
    step, draw, wide = check_word("step", step), check_word("draw", draw), dtype == torch.float32
    seed = check_seed(seed)
    outs = None if out is None else _outs(out, single, tensors, low, len(scales), dtype, device)
    if direction.name not in directions.DIRECTIONS or not traced():
        made = outs or [[torch.empty(t.shape, dtype=dtype or t.dtype, device=device) for t in tensors] for _ in scales]
        with torch.no_grad():
            backends.get(name).perturb(
                [t.detach() for t in tensors], spans, direction, seed, step, draw, scales, made, low or None, clock
            )
        if outs is not None:
            torch.autograd.graph.increment_version([t for side in outs for t in side])  # written through raw pointers
        return made
    who_ids, firsts = [s.who for s in spans], [s.first for s in spans]
    with torch.no_grad():
        flat = torch.ops.zokern.perturb(
            tensors, low, who_ids, firsts, step, draw, direction.name, wrap_seed(seed), list(scales), wide, name, clock
        )
        found = [flat[: len(tensors)], flat[len(tensors) :]][: len(scales)]
        for mine, side in zip(outs or [], found):
            for to, made in zip(mine, side):
                to.copy_(made)
    return outs or found


def _outs(
    out, single: bool, tensors: TensorList, low: Sequence[Tensor], sides: int, dtype: torch.dtype | None, device: torch.device
) -> list[list[Tensor]]:
    """The lists that perturb writes, for each scale, checked."""
    what = "for each scale " + ("a tensor, or a list of one" if single else f"a list of {len(tensors)} tensors")
    if not isinstance(out, (list, tuple)) or len(out) != sides:
        raise ValueError(f"perturb: out is {type(out).__name__} for {sides} scales; expected {what}")
    outs = [[side] if single and isinstance(side, Tensor) else side for side in out]
    for j, side in enumerate(outs):
        if not isinstance(side, (list, tuple)) or len(side) != len(tensors):
            raise ValueError(f"perturb: out[{j}] is {type(side).__name__} for {len(tensors)} tensors; expected {what}")
        for i, (result, tensor) in enumerate(zip(side, tensors)):
            check_out("perturb", f"out[{j}][{i}]", result, tensor.shape, dtype or tensor.dtype, device)
    flat, read = [result for side in outs for result in side], [*tensors, *low]
    names = [f"out[{j}][{i}]" for j in range(sides) for i in range(len(tensors))]
    # tensors that are only read may share memory, and then each is compared on its own
    for inputs in [read] if shared_memory(read) is None else [[t] for t in read]:
        if (pair := shared_memory([*flat, *inputs])) is not None:
            a, b = (names[i] if i < len(flat) else "a tensor that is read" for i in sorted(pair))
            raise ValueError(f"perturb: {a} and {b} share memory; expected results apart from each other and from what is read")
    return [list(side) for side in outs]


@torch.library.custom_op("zokern::draw_", mutates_args=("out",))
def _draw_op(
    out: Tensor,
    who: int,
    first: int,
    step: int,
    draw: int,
    direction: str,
    seed: int,
    backend: str,
    clock: Tensor | None = None,
) -> None:
    if not out.is_contiguous():
        raise ValueError(f"draw_: out has strides {out.stride()}; expected a contiguous tensor")
    tensors, spans = listed("draw_", [out], [who], [first])
    step, draw = check_word("step", step), check_word("draw", draw)
    check_clock("draw_", clock, out.device)
    backends.get(backend).draw(tensors, spans, directions.resolve(direction), unwrap_seed(seed), step, draw, clock)


@torch.library.custom_op("zokern::axpy_", mutates_args=("thetas", "residuals"))
def _axpy_op(
    thetas: list[Tensor],
    residuals: list[Tensor],
    coeffs: Tensor,
    who: list[int],
    first: list[int],
    steps: list[int],
    draws: list[int],
    direction: str,
    seed: int,
    decay: list[float],
    rounding: str,
    backend: str,
    clock: Tensor | None = None,
    each: int = 0,
) -> Tensor:
    tensors, spans = listed("axpy_", thetas, who, first)
    terms = terms_of("axpy_", steps, draws)
    if not terms or coeffs.dim() != 1 or len(coeffs) != len(terms):
        raise ValueError(f"axpy_: {len(terms)} draws and coeffs {list(coeffs.shape)}; expected as many of each, at least one")
    each, decays = _check_each(each, decay, len(terms))
    check_rounding("axpy_", tensors, rounding, residuals)
    check_clock("axpy_", clock, tensors[0].device)
    return backends.get(backend).axpy_(
        tensors,
        spans,
        directions.resolve(direction),
        unwrap_seed(seed),
        terms,
        coeffs,
        decays,
        rounding,
        residuals or None,
        clock,
        each,
    )


@_axpy_op.register_fake
def _(thetas, residuals, coeffs, who, first, steps, draws, direction, seed, decay, rounding, backend, clock=None, each=0):
    return torch.empty(1, dtype=torch.int64, device=coeffs.device)


@torch.library.custom_op("zokern::perturb", mutates_args=())
def _perturb_op(
    thetas: list[Tensor],
    residuals: list[Tensor],
    who: list[int],
    first: list[int],
    step: int,
    draw: int,
    direction: str,
    seed: int,
    scales: list[float],
    wide: bool,
    backend: str,
    clock: Tensor | None = None,
) -> list[Tensor]:
    tensors = TensorList(thetas)  # which may share memory: they are only read
    spans = spans_of("perturb", tensors, who, first)
    check_list("perturb", tensors, spans)
    scales = arguments.finite("perturb", "scales", scales, "one or two finite numbers")
    if residuals:
        check_rounding("perturb", tensors, "residual", residuals)
    step, draw = check_word("step", step), check_word("draw", draw)
    check_clock("perturb", clock, tensors[0].device)
    outs = [[torch.empty(t.shape, dtype=torch.float32 if wide else t.dtype, device=t.device) for t in tensors] for _ in scales]
    backends.get(backend).perturb(
        tensors, spans, directions.resolve(direction), unwrap_seed(seed), step, draw, scales, outs, residuals or None, clock
    )
    return [out for side in outs for out in side]


@_perturb_op.register_fake
def _(thetas, residuals, who, first, step, draw, direction, seed, scales, wide, backend, clock=None):
    return [torch.empty(t.shape, dtype=torch.float32 if wide else t.dtype, device=t.device) for _ in scales for t in thetas]
