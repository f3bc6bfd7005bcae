"""Public operations: checks, then the backend. Tensors in, tensors out; registered with torch.library as zokern::*.

The step calls the backends directly with checked lists; these functions are the same verbs for tools, tests and other loops.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import arguments, backends, directions
from .arguments import is_text
from .backends import DTYPES, ROUNDINGS, Span, SpanList, TensorList
from .stream import INDEX_LIMIT, ROUNDS, check_seed, check_word, parameter_id

_FLOATS = tuple(getattr(torch, name) for name in DTYPES)
_FLOAT_SET = set(_FLOATS)
_SIGN = 1 << 63  # torch.library integers are signed: seeds travel as two's complement


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a strided tensor may share memory (expanded tensors do)."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def shared_memory(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The positions of two tensors that have an element in common, or None."""
    tensors = TensorList.of(tensors)
    starts = tensors.pointers.astype(np.int64)
    sizes = (
        np.array([_reach(t) for t in tensors])
        if not tensors.contiguous
        else tensors.sizes * [d.itemsize for d in tensors.dtypes]
    )
    order = np.argsort(starts)
    if np.all((starts + sizes)[order][:-1] <= starts[order][1:]):
        return None
    spans = [(int(starts[i]), int(sizes[i]), int(i)) for i in order if sizes[i]]
    for position, (start, size, i) in enumerate(spans):
        for after, _, j in spans[position + 1 :]:
            if after >= start + size:
                break
            if tensors[i].device == tensors[j].device and not _interleaved(tensors[i], tensors[j]):
                return i, j
    return None


def _reach(tensor: Tensor) -> int:
    """Bytes from a strided tensor's first element to behind its last."""
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors with crossing extents share no element (columns of one matrix, say): decided exactly."""
    if (a.is_contiguous() and b.is_contiguous()) or a.element_size() != b.element_size() or a.numel() + b.numel() > 1 << 24:
        return False

    def addresses(t: Tensor) -> Tensor:
        index = torch.zeros((), dtype=torch.int64, device="cpu")
        for size, stride in zip(t.shape, t.stride()):
            index = index.unsqueeze(-1) + torch.arange(size, dtype=torch.int64, device="cpu") * stride * t.element_size()
        return index.flatten() + t.data_ptr()

    return not bool(torch.isin(addresses(a), addresses(b)).any())


def check_tensor(verb: str, what: str, tensor: Tensor, first: int = 0, hint: str = "cast it first") -> None:
    """What every verb asks of a tensor that it reads or writes."""
    if tensor.device.type == "meta":
        raise ValueError(
            f"{verb}: {what} is on the meta device and has no elements; expected a tensor with memory: materialise it"
        )
    if tensor.dtype not in _FLOATS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{verb}: {what} is {dtype} on {tensor.device}; expected float32, bfloat16 or float16: {hint}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{verb}: {what} has layout {tensor.layout}; expected a strided tensor: {hint}")
    if overlaps_itself(tensor):
        raise ValueError(
            f"{verb}: {what} has overlapping elements (strides {tensor.stride()}); expected one element per address: .clone() it"
        )
    if not 0 <= first or first + tensor.numel() > INDEX_LIMIT:
        raise ValueError(
            f"{verb}: {what} spans elements {first} to {first + tensor.numel()}; expected 0 <= first and first + n <= 2**35"
        )


def _spans(verb: str, tensors: Sequence[Tensor], who, first) -> SpanList:
    one = isinstance(who, (str, numbers.Integral))
    if isinstance(who, bool) or (not one and (is_text(who) or not isinstance(who, Iterable))):
        raise ValueError(f"{verb}: who is {who!r}; expected the parameter's name, or a list with one name per tensor")
    several = isinstance(first, Iterable) and not is_text(first)
    if not several and (isinstance(first, bool) or not isinstance(first, numbers.Integral)):
        raise ValueError(f"{verb}: first is {first!r}; expected the number of the first element, or a list with one per tensor")
    whos = [who] * len(tensors) if one else list(who)
    if one and len(tensors) > 1:
        raise ValueError(
            f"{verb}: who is {who!r} for {len(tensors)} tensors; expected one name per tensor, or they would share one z"
        )
    firsts = list(first) if several else [int(first)] * len(tensors)
    for f in firsts if several else ():
        if isinstance(f, bool) or not isinstance(f, numbers.Integral):
            raise ValueError(
                f"{verb}: first is {first!r:.80}; expected the numbers of the first elements, one integer per tensor"
            )
    if several:
        firsts = list(map(int, firsts))
    if len(whos) != len(tensors) or len(firsts) != len(tensors):
        raise ValueError(
            f"{verb}: {len(tensors)} tensors, {len(whos)} names and {len(firsts)} offsets; expected as many of each"
        )
    return _span_list(tuple(whos), tuple(firsts))


@lru_cache(maxsize=256)
def _span_list(whos: tuple, firsts: tuple) -> SpanList:
    """A loop names the same list of parameters at every step."""
    return SpanList(Span(parameter_id(w) if isinstance(w, str) else check_word("who", w), f) for w, f in zip(whos, firsts))


def _check_list(verb: str, tensors: TensorList, spans: SpanList) -> torch.device:
    if not tensors:
        raise ValueError(f"{verb}: tensors is empty; expected at least one tensor")
    device = tensors[0].device
    plain = set(tensors.dtypes) <= _FLOAT_SET and tensors.contiguous and device.type != "meta"
    if not plain or not spans.at_zero or tensors.sizes.max() > INDEX_LIMIT:
        for i, (tensor, span) in enumerate(zip(tensors, spans)):
            check_tensor(verb, f"tensors[{i}]", tensor, span.first)
    if tensors.devices != {device}:
        i, other = next((i, t.device) for i, t in enumerate(tensors) if t.device != device)
        raise ValueError(f"{verb}: tensors[{i}] is on {other} and tensors[0] on {device}; expected one device a call")
    return device


def _integers(what: str, words) -> Tensor:
    """Counter words as int64; refuses what would have to be cut to an integer."""
    if not isinstance(words, Tensor):
        listed = np.asarray(words)
        if listed.size and listed.dtype.kind not in "iu":
            raise ValueError(f"philox4x32: {what} is {words!r:.80}; expected integers in [0, 2**32)")
        return torch.tensor(listed.astype(np.int64), dtype=torch.int64, device="cpu")
    if words.is_floating_point() or words.is_complex() or words.dtype == torch.bool:
        raise ValueError(f"philox4x32: {what} is {words.dtype}; expected integers in [0, 2**32)")
    return words.to(torch.int64)


def _backend(backend: str | None, device: torch.device) -> str:
    """The name of the backend that will run; raises when it is off."""
    return backends.resolve(backend, device).name


def wrap_seed(seed: int) -> int:
    """A checked seed as the signed integer that torch.library takes."""
    seed = check_seed(seed)
    return seed - 2 * _SIGN if seed >= _SIGN else seed


def philox4x32(counter, key, rounds: int = ROUNDS, backend: str | None = None) -> Tensor:
    """Philox4x32-R, the raw block function: counters (x0, x1, x2, x3) and key (k0, k1) to words.

    counter  int64[..., 4] tensor (or nested sequence of ints), each word in [0, 2**32)
    key      two words in [0, 2**32)
    rounds   1 to 16; the stream uses 10
    Returns int64[..., 4] on the counter's device. Equal on every backend.
    Raises ValueError for words out of range, another last dimension, or rounds out of range.
    Salmon et al. 2011; known answers of Random123 in tests/vectors/philox4x32.txt."""
    counter = _integers("counter", counter)
    if counter.dim() == 0 or counter.shape[-1] != 4:
        raise ValueError(f"philox4x32: counter has shape {tuple(counter.shape)}; expected [..., 4]")
    if counter.numel() and not (0 <= int(counter.min()) and int(counter.max()) < 2**32):
        raise ValueError("philox4x32: counter has words outside [0, 2**32)")
    words = _integers("key", key)
    if words.shape != (2,):
        raise ValueError(f"philox4x32: key is {key!r:.80}; expected two words in [0, 2**32)")
    low, high = (check_word(f"key[{i}]", word) for i, word in enumerate(words.tolist()))
    if not isinstance(rounds, int) or type(rounds) is bool or not 1 <= rounds <= 16:
        raise ValueError(f"philox4x32: rounds is {rounds!r:.80}; expected an integer, 1 to 16")
    flat = counter.reshape(-1, 4).contiguous()
    name = _backend(backend, counter.device)
    return torch.ops.zokern.philox4x32(flat, low, high, rounds, name).view(counter.shape)


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
    if dtype not in _FLOATS:
        raise ValueError(f"draw: dtype is {dtype!r}; expected torch.float32, torch.bfloat16 or torch.float16")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        _check_out("draw", "out", out, torch.Size((shape,) if isinstance(shape, int) else shape), dtype, device)
    (span,) = _spans("draw", [out], who, first)
    check_tensor("draw", "the result", out, first)
    name, seed = _backend(backend, device), check_seed(seed)
    step, draw = check_word("step", step), check_word("draw", draw)
    _check_clock("draw", clock, device)
    with torch.no_grad():
        if direction.name not in directions.DIRECTIONS:
            backends.get(name).draw([out], [span], direction, seed, step, draw, clock)
            torch.autograd.graph.increment_version([out])  # the kernels write through raw pointers
        else:
            torch.ops.zokern.draw_(out, span.who, first, step, draw, direction.name, wrap_seed(seed), name, clock)
    return out


def _check_out(verb: str, what: str, out: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """A tensor that is written as it lies."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{verb}: {what} is {type(out).__name__} {out!r:.80}; expected a torch.Tensor")
    there = out.device == device or (out.device.type == device.type and device.index is None)
    if out.shape != shape or out.dtype != dtype or not there or out.layout != torch.strided or not out.is_contiguous():
        where = f"{out.dtype}{list(out.shape)} on {out.device}" + ("" if out.is_contiguous() else " and not contiguous")
        raise ValueError(f"{verb}: {what} is {where}; expected contiguous {dtype}{list(shape)} on {device}")


def _check_clock(verb: str, clock: Tensor | None, device: torch.device) -> None:
    if clock is None:
        return
    arguments.tensor(verb, "clock", clock, ", int64[1], or None")
    if clock.dtype != torch.int64 or clock.numel() != 1 or clock.device.type != device.type:
        raise ValueError(f"{verb}: clock is {clock.dtype}{list(clock.shape)} on {clock.device}; expected int64[1] on {device}")


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
    spans = _spans("axpy_", tensors, who, first)
    device = _check_list("axpy_", tensors, spans)
    draws = _draws("axpy_", draws)
    if not isinstance(coeffs, Tensor):
        coeffs = torch.tensor(arguments.finite("axpy_", "coeffs", coeffs), dtype=torch.float32, device=device)
    elif coeffs.dtype != torch.float32 or coeffs.device != device or coeffs.dim() != 1:
        raise ValueError(
            f"axpy_: coeffs is {coeffs.dtype}{list(coeffs.shape)} on {coeffs.device}; expected float32[K] on {device}"
        )
    elif coeffs.is_cpu and not _traced():  # looking at numbers of a GPU would wait for it
        arguments.finite("axpy_", "coeffs", coeffs)
    if not draws or len(draws) != len(coeffs):
        raise ValueError(f"axpy_: {len(draws)} draws and {len(coeffs)} coefficients; expected as many of each, at least one")
    each, decays = _check_each(each, decay, len(draws))
    low = [] if residuals is None else arguments.tensor_list("residuals", residuals)
    _check_rounding("axpy_", tensors, rounding, low)
    _check_clock("axpy_", clock, device)
    if (pair := shared_memory(tensors)) is not None:
        raise ValueError(f"axpy_: tensors[{pair[0]}] and tensors[{pair[1]}] share memory; expected distinct tensors")
    name, seed = _backend(backend, device), check_seed(seed)
    with torch.no_grad():  # weights are leaves that require a gradient, and this is not an operation to differentiate
        if direction.name not in directions.DIRECTIONS or not _traced():
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


def _draws(verb: str, draws: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs (step, draw) as words of the counter."""
    return [(check_word("step", step), check_word("draw", number)) for step, number in arguments.pairs(verb, "draws", draws)]


def _traced() -> bool:
    """Whether someone looks at operations rather than values: then the registered operation has to be called, not its kernel."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _check_rounding(verb: str, tensors: Sequence[Tensor], rounding: str, residuals: Sequence[Tensor]) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"{verb}: rounding is {rounding!r}; expected one of {list(ROUNDINGS)}")
    if rounding != "residual":
        if residuals:
            raise ValueError(f"{verb}: residuals given with rounding={rounding!r}; expected rounding='residual'")
        return
    if any(t.dtype != torch.bfloat16 for t in tensors):
        raise ValueError(
            f"{verb}: rounding='residual' needs bfloat16 tensors (their 16 low bits make a float32); others: 'stochastic'"
        )
    if len(residuals) != len(tensors):
        raise ValueError(
            f"{verb}: {len(residuals)} residuals for {len(tensors)} tensors; expected int16 tensors, zeros to start with"
        )
    for i, (tensor, low) in enumerate(zip(tensors, residuals)):
        if low.dtype != torch.int16 or low.shape != tensor.shape or not low.is_contiguous() or low.device != tensor.device:
            raise ValueError(
                f"{verb}: residuals[{i}] is {low.dtype}{list(low.shape)}; expected contiguous int16{list(tensor.shape)} beside it"
            )


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
    spans = _spans("perturb", tensors, who, first)
    device = _check_list("perturb", tensors, spans)
    scales = arguments.finite("perturb", "scales", scales, "one or two finite numbers")
    if len(scales) not in (1, 2):
        raise ValueError(f"perturb: scales is {scales}; expected one or two finite numbers")
    if dtype is not None and any(dtype not in (t.dtype, torch.float32) for t in tensors):
        raise ValueError(f"perturb: dtype is {dtype!r}; expected the tensors' dtype or torch.float32")
    low = [] if residuals is None else arguments.tensor_list("residuals", residuals)
    if low:
        _check_rounding("perturb", tensors, "residual", low)
    _check_clock("perturb", clock, device)
    name = _backend(backend, device)
    step, draw, wide = check_word("step", step), check_word("draw", draw), dtype == torch.float32
    seed = check_seed(seed)
    outs = None if out is None else _outs(out, single, tensors, low, len(scales), dtype, device)
    if direction.name not in directions.DIRECTIONS or not _traced():
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
            _check_out("perturb", f"out[{j}][{i}]", result, tensor.shape, dtype or tensor.dtype, device)
    flat, read = [result for side in outs for result in side], [*tensors, *low]
    names = [f"out[{j}][{i}]" for j in range(sides) for i in range(len(tensors))]
    # tensors that are only read may share memory, and then each is compared on its own
    for inputs in [read] if shared_memory(read) is None else [[t] for t in read]:
        if (pair := shared_memory([*flat, *inputs])) is not None:
            a, b = (names[i] if i < len(flat) else "a tensor that is read" for i in sorted(pair))
            raise ValueError(f"perturb: {a} and {b} share memory; expected results apart from each other and from what is read")
    return [list(side) for side in outs]


def lowrank_(
    tensors: Tensor | Sequence[Tensor],
    left: Tensor | Sequence[Tensor],
    right: Tensor | Sequence[Tensor],
    *,
    core: Tensor | Sequence[Tensor | None] | None = None,
    scale: float | Sequence[float] = 1.0,
    decay: float = 1.0,
    who: str | int | Sequence[str | int] | None = None,
    seed: int = 0,
    step: int = 0,
    first: int | Sequence[int] = 0,
    rounding: str = "nearest",
    residuals: Sequence[Tensor] | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """W <- decay * W + scale * U C V^T, in place, one launch for the whole list; no product is ever stored.

    tensors   one tensor or a list on one device: float32, bfloat16 or float16, any shape, strides and alignment. Element e of
              the unsharded m x n matrix is row e div n, column e mod n: a flattened or reshaped W is the same W, but what looks
              like a mistake, a matrix (n, m) or one with m rows of another length than n, has to be flattened
    left      U, float32 (m, r), contiguous: one, or one per tensor
    right     V, float32 (n, r), or (n, s) beside a core (r, s), contiguous
    core      C: None (the identity), float32[r] (a diagonal) or float32[r, s]
    scale     factor of the product, in units of W: one float, or one per tensor;  decay  factor of the old weights
    first     number of each tensor's first element in its unsharded matrix: one int, or one per tensor
    rounding, residuals  as for axpy_; 'stochastic' spends the bits of (seed, who, step, purpose rounding) and needs `who`
    Arithmetic: L = U C, itself by this verb; s = fma(L[i, k], V[j, k], s) over k in order from 0; then
    round(fma(scale, s, round(decay * W))), float32 inside. Equal bit for bit on 'reference' and 'cpu'; 'cuda' and 'triton' use
    the matrix units and hold the error bounds that their kernels state.
    Returns int64[1]: how many results are inf or NaN.
    Raises ValueError, before anything is written, for factors of another dtype, layout, shape or device, factors that are
    swapped, elements beyond m n, and what axpy_ refuses."""
    tensors = arguments.tensor_list("tensors", tensors)
    if who is None:
        if rounding == "stochastic":
            raise ValueError(
                "lowrank_: who is None with rounding='stochastic'; expected the parameters' names, whose bits are spent"
            )
        spans = _spans("lowrank_", tensors, [0] * len(tensors), first)
    else:
        spans = _spans("lowrank_", tensors, who, first)
    device = _check_list("lowrank_", tensors, spans)
    lefts, rights = _one_each("left", left, tensors), _one_each("right", right, tensors)
    cores = [None] * len(tensors) if core is None else _one_each("core", core, tensors)
    each = f"a finite number, or one for each of {len(tensors)} tensors"
    scales = arguments.one_or_each("lowrank_", "scale", scale, len(tensors), each)
    if len(scales) != len(tensors):
        raise ValueError(f"lowrank_: scale is {scale}; expected {each}")
    (decay,) = arguments.finite("lowrank_", "decay", [decay], "a finite number")
    for i, (tensor, span) in enumerate(zip(tensors, spans)):
        _check_factors(i, tensor, span, lefts[i], cores[i], rights[i])
    low = [] if residuals is None else arguments.tensor_list("residuals", residuals)
    _check_rounding("lowrank_", tensors, rounding, low)
    if (pair := shared_memory(tensors)) is not None:
        raise ValueError(f"lowrank_: tensors[{pair[0]}] and tensors[{pair[1]}] share memory; expected distinct tensors")
    name, seed, step = _backend(backend, device), check_seed(seed), check_word("step", step)
    with torch.no_grad():
        lefts = [u if c is None else _times_core(u, c, name) for u, c in zip(lefts, cores)]
        if not _traced():
            count = backends.get(name).lowrank_(tensors, spans, lefts, rights, scales, decay, rounding, low or None, seed, step)
            torch.autograd.graph.increment_version([*tensors, *low])  # the kernels write through raw pointers
            return count
        whos, firsts = [s.who for s in spans], [s.first for s in spans]
        return torch.ops.zokern.lowrank_(
            tensors, low, lefts, rights, scales, whos, firsts, wrap_seed(seed), step, decay, rounding, name
        )  # fmt: skip


def _one_each(what: str, given, tensors: Sequence[Tensor]) -> list:
    """A factor for each tensor."""
    if is_text(given) or not isinstance(given, Iterable):
        raise TypeError(f"lowrank_: {what} is {type(given).__name__} {given!r:.80}; expected a torch.Tensor, or a list of them")
    found = [given] if isinstance(given, Tensor) else list(given)
    if len(found) != len(tensors):
        raise ValueError(f"lowrank_: {len(found)} {what} for {len(tensors)} tensors; expected one for each")
    return found


def _check_factors(i: int, tensor: Tensor, span: Span, left: Tensor, core: Tensor | None, right: Tensor) -> None:
    for what, factor in (("left", left), ("right", right), ("core", core)):
        if factor is None and what == "core":
            continue
        if not isinstance(factor, Tensor):
            raise TypeError(f"lowrank_: {what}[{i}] is {type(factor).__name__}; expected a torch.Tensor")
        where = f"lowrank_: {what}[{i}] is {str(factor.dtype).removeprefix('torch.')}{list(factor.shape)} on {factor.device}"
        if factor.dtype != torch.float32:
            raise ValueError(f"{where}; expected float32: .float() it")
        if factor.device != tensor.device:
            raise ValueError(f"{where}; expected {tensor.device}, as its tensor")
        if factor.layout != torch.strided or not factor.is_contiguous():
            raise ValueError(f"{where} and not contiguous; expected rows that follow one another: .contiguous() it")
        if factor.dim() != 2 and not (what == "core" and factor.dim() == 1):
            raise ValueError(f"{where}; expected a matrix" + (" or its diagonal" if what == "core" else ""))
    inner = left.shape[1] if core is None else core.shape[-1]
    if left.shape[1] < 1 or right.shape[1] != inner or (core is not None and core.shape[0] != left.shape[1]):
        shapes = f"left {list(left.shape)}, core {None if core is None else list(core.shape)}, right {list(right.shape)}"
        raise ValueError(
            f"lowrank_: {shapes} of tensors[{i}] do not multiply; expected (m, r), core r or (r, s), (n, s), r and s > 0"
        )
    if span.first + tensor.numel() > left.shape[0] * right.shape[0]:
        raise ValueError(
            f"lowrank_: tensors[{i}] spans elements {span.first} to {span.first + tensor.numel()}; expected at most "
            f"{left.shape[0]} x {right.shape[0]}, the rows of left times the rows of right"
        )
    m, n = left.shape[0], right.shape[0]
    if tensor.dim() == 2 and span.first == 0 and tensor.shape[1] != n and (tensor.shape[0] == m or tensor.shape == (n, m)):
        how = (
            "left and right are swapped" if tensor.shape == (n, m) else f"expected right ({tensor.shape[1]}, {right.shape[1]})"
        )
        raise ValueError(
            f"lowrank_: tensors[{i}] is {list(tensor.shape)} and left times right {m} x {n}; {how}; a reshaped matrix, or a shard of "
            "one, is flattened first: .view(-1)"
        )


def _times_core(left: Tensor, core: Tensor, name: str) -> Tensor:
    """U C in float32, with the verb's own sum, so that its bits are as independent of the backend as the verb's."""
    if core.dim() == 1:
        return left * core
    rows, columns = left.shape[0], core.shape[1]
    zero, right = torch.zeros(rows, columns, dtype=torch.float32, device=left.device), core.t().contiguous()
    if _traced():
        torch.ops.zokern.lowrank_([zero], [], [left], [right], [1.0], [0], [0], 0, 0, 1.0, "nearest", name)
    else:
        backends.get(name).lowrank_([zero], [Span(0)], [left], [right], [1.0], 1.0, "nearest", None)
    return zero


@torch.library.custom_op("zokern::philox4x32", mutates_args=())
def _philox_op(counter: Tensor, low: int, high: int, rounds: int, backend: str) -> Tensor:
    low, high = check_word("key[0]", low), check_word("key[1]", high)
    if not 1 <= rounds <= 16:
        raise ValueError(f"philox4x32: rounds is {rounds}; expected an integer, 1 to 16")
    return backends.get(backend).philox4x32(counter, (low, high), rounds)


@_philox_op.register_fake
def _(counter, low, high, rounds, backend):
    return torch.empty_like(counter)


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
    tensors, spans = _listed("draw_", [out], [who], [first])
    step, draw = check_word("step", step), check_word("draw", draw)
    _check_clock("draw_", clock, out.device)
    backends.get(backend).draw(tensors, spans, directions.resolve(direction), seed % (2 * _SIGN), step, draw, clock)


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
    tensors, spans = _listed("axpy_", thetas, who, first)
    terms = _terms("axpy_", steps, draws)
    if not terms or coeffs.dim() != 1 or len(coeffs) != len(terms):
        raise ValueError(f"axpy_: {len(terms)} draws and coeffs {list(coeffs.shape)}; expected as many of each, at least one")
    each, decays = _check_each(each, decay, len(terms))
    _check_rounding("axpy_", tensors, rounding, residuals)
    _check_clock("axpy_", clock, tensors[0].device)
    return backends.get(backend).axpy_(
        tensors,
        spans,
        directions.resolve(direction),
        seed % (2 * _SIGN),
        terms,
        coeffs,
        decays,
        rounding,
        residuals or None,
        clock,
        each,
    )


def _listed(verb: str, thetas: Sequence[Tensor], who: Sequence[int], first: Sequence[int]) -> tuple[TensorList, SpanList]:
    """Tensors and spans of a registered operation, which is called past its verb: by a compiled graph, or by hand."""
    tensors = TensorList(thetas)
    spans = _spans(verb, tensors, list(who), list(first))
    _check_list(verb, tensors, spans)
    if (pair := shared_memory(tensors)) is not None:
        raise ValueError(f"{verb}: tensors[{pair[0]}] and tensors[{pair[1]}] share memory; expected distinct tensors")
    return tensors, spans


def _terms(verb: str, steps: Sequence[int], draws: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (step, draw) of a registered operation."""
    if len(steps) != len(draws):
        raise ValueError(f"{verb}: {len(steps)} steps and {len(draws)} draws; expected as many of each")
    return _draws(verb, list(zip(steps, draws)))


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
    spans = _spans("perturb", tensors, who, first)
    _check_list("perturb", tensors, spans)
    scales = arguments.finite("perturb", "scales", scales, "one or two finite numbers")
    if residuals:
        _check_rounding("perturb", tensors, "residual", residuals)
    step, draw = check_word("step", step), check_word("draw", draw)
    _check_clock("perturb", clock, tensors[0].device)
    outs = [[torch.empty(t.shape, dtype=torch.float32 if wide else t.dtype, device=t.device) for t in tensors] for _ in scales]
    backends.get(backend).perturb(
        tensors, spans, directions.resolve(direction), seed % (2 * _SIGN), step, draw, scales, outs, residuals or None, clock
    )
    return [out for side in outs for out in side]


@_perturb_op.register_fake
def _(thetas, residuals, who, first, step, draw, direction, seed, scales, wide, backend, clock=None):
    return [torch.empty(t.shape, dtype=torch.float32 if wide else t.dtype, device=t.device) for _ in scales for t in thetas]


@torch.library.custom_op("zokern::lowrank_", mutates_args=("thetas", "residuals"))
def _lowrank_op(
    thetas: list[Tensor],
    residuals: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    scales: list[float],
    who: list[int],
    first: list[int],
    seed: int,
    step: int,
    decay: float,
    rounding: str,
    backend: str,
) -> Tensor:
    tensors, spans = _listed("lowrank_", thetas, who, first)
    if not len(tensors) == len(lefts) == len(rights) == len(scales):
        counts = f"{len(lefts)} left, {len(rights)} right and {len(scales)} scales"
        raise ValueError(f"lowrank_: {counts} for {len(tensors)} tensors; expected one for each")
    for i, (tensor, span) in enumerate(zip(tensors, spans)):
        _check_factors(i, tensor, span, lefts[i], None, rights[i])
    scales = arguments.finite("lowrank_", "scale", scales)
    (decay,) = arguments.finite("lowrank_", "decay", [decay], "a finite number")
    _check_rounding("lowrank_", tensors, rounding, residuals)
    step = check_word("step", step)
    return backends.get(backend).lowrank_(
        tensors, spans, lefts, rights, scales, decay, rounding, residuals or None, seed % (2 * _SIGN), step
    )


@_lowrank_op.register_fake
def _(thetas, residuals, lefts, rights, scales, who, first, seed, step, decay, rounding, backend):
    return torch.empty(1, dtype=torch.int64, device=thetas[0].device)
