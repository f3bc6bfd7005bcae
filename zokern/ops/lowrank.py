"""The verb of factored matrices, `lowrank_`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends import Backend, Batch, Noise, Outer, Span
from ..stream import check_seed, check_word
from . import arguments
from .arguments import is_text
from .operands import batch_of, check_clock, check_control, wrote
from .registered import count_of_nonfinite, operation, register, traced


def lowrank_(
    tensors: Tensor | Sequence[Tensor], left: Tensor | Sequence[Tensor], right: Tensor | Sequence[Tensor], *,
    core: Tensor | Sequence[Tensor | None] | None = None, scale: float | Sequence[float] = 1.0,
    decay: float = 1.0, who: str | int | Sequence[str | int] | None = None, seed: int = 0, step: int = 0,
    first: int | Sequence[int] = 0, rounding: str = "nearest",
    residuals: Sequence[Tensor] | Tensor | None = None, clock: Tensor | None = None,
    control: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Computes W <- decay * W + scale * U C V^T in place, in one launch. No product is stored.

    tensors          W, one tensor or a list on one device: float32, bfloat16 or float16, any shape,
                     strides and alignment. Element e of the unsharded m x n matrix is row e div n, column
                     e mod n, so a flattened or reshaped W is the same W. A shape that looks like a
                     mistake, (n, m) or m rows of another length than n, has to be flattened
    left             U, float32 (m, r), contiguous: one, or one per tensor
    right            V, float32 (n, r), or (n, s) beside a core (r, s), contiguous
    core             C: None (the identity), float32[r] (a diagonal) or float32[r, s]
    scale            factor of the product, in units of W: one float, or one per tensor
    decay            factor of the old weights
    who, seed, step  names of the random bits of rounding 'stochastic', which needs them, as for
                     zokern.draw
    first            number of each tensor's first element in its unsharded matrix: one int, or one per
                     tensor
    rounding, residuals  as for zokern.axpy_; 'stochastic' spends the bits of (seed, who, step)
    clock, control   as for zokern.axpy_; the clock is added to step
    backend          as for zokern.draw

    Arithmetic: L = U C, itself by this verb; s = fma(L[i, k], V[j, k], s) over k in order from 0; then
    round(fma(scale, s, round(decay * W))), float32 inside. Equal bit for bit on 'reference' and 'cpu';
    'cuda' and 'triton' use the matrix units and hold the error bounds that their kernels state.
    Returns int64[1]: how many results are inf or NaN.
    Raises ValueError, before anything is written, for factors of another dtype, layout, shape or device,
    factors that are swapped, elements beyond m n, and every argument that zokern.axpy_ refuses.
    Chen et al. 2025 (LOZO); Yu et al. 2025 (SubZero): their updates are this call."""
    if who is None and rounding == "stochastic":
        raise ValueError(
            "lowrank_: who is None with rounding='stochastic'; expected the parameters' names, whose bits "
            "are spent"
        )
    found = arguments.tensor_list("tensors", tensors)
    batch = batch_of("lowrank_", found, [0] * len(found) if who is None else who, first, rounding, residuals)
    lefts, cores, rights = _factors(batch, left, core, right)
    scales = _scales(scale, len(found))
    (decay,) = arguments.finite("lowrank_", "decay", [decay], "a finite number")
    check_clock("lowrank_", clock, found[0].device)
    check_control("lowrank_", control, found[0].device)
    noise = Noise(None, check_seed(seed), [(check_word("step", step), 0)], clock)
    chosen, named = backends.resolve(backend, found[0].device), traced(backend)
    with torch.no_grad():
        lefts = [u if c is None else _times_core(u, c, chosen, named) for u, c in zip(lefts, cores)]
        count = _launch(batch, Outer(lefts, rights, scales, decay, control), noise, chosen, named)
        if not named:
            wrote(batch)
        return count


def _launch(batch: Batch, factors: Outer, noise: Noise | None, backend: Backend, named: bool) -> Tensor:
    """Runs the kernel, or calls the operation if `named`."""
    if not named:
        return backend.lowrank_(batch, factors, noise)
    products = {
        "left": factors.lefts,
        "right": factors.rights,
        "scale": factors.scales,
        "decay": factors.decay,
        "control": factors.control,
    }
    noise = noise or Noise(None, 0, [(0, 0)])
    products["clock"] = noise.clock
    return operation(
        "lowrank_", backend, noise, batch, step=noise.draws[0][0], rounding=batch.rounding, **products
    )


register(
    "lowrank_",
    lowrank_,
    "(Tensor(a!)[] tensors, Tensor[] left, Tensor[] right, float[] scale, float decay, int[] who, int seed, "
    "int step, int[] first, str rounding, Tensor(b!)[] residuals, str backend, "
    "Tensor? clock=None, Tensor? control=None) -> Tensor",
    count_of_nonfinite,
)


def _scales(scale: float | Sequence[float], count: int) -> list[float]:
    """Returns a scale for each tensor."""
    wanted = f"a finite number, or one for each of {count} tensors"
    scales = arguments.one_or_each("lowrank_", "scale", scale, count, wanted)
    if len(scales) != count:
        raise ValueError(f"lowrank_: scale is {scale}; expected {wanted}")
    return scales


def _one_each(what: str, given, tensors: Sequence[Tensor]) -> list:
    """Returns a factor for each tensor."""
    if is_text(given) or not isinstance(given, Iterable):
        raise TypeError(
            f"lowrank_: {what} is {type(given).__name__} {given!r:.80}; expected a torch.Tensor, or a list "
            "of them"
        )
    found = [given] if isinstance(given, Tensor) else list(given)
    if len(found) != len(tensors):
        raise ValueError(f"lowrank_: {len(found)} {what} for {len(tensors)} tensors; expected one for each")
    return found


def _factors(batch: Batch, left, core, right) -> tuple[list, list, list]:
    """Returns left, core or None, and right of each tensor, checked."""
    tensors = batch.tensors
    lefts, rights = _one_each("left", left, tensors), _one_each("right", right, tensors)
    cores = [None] * len(tensors) if core is None else _one_each("core", core, tensors)
    for i, (tensor, span) in enumerate(zip(tensors, batch.spans)):
        _check_factors(i, tensor, span, lefts[i], cores[i], rights[i])
    return lefts, cores, rights


def _check_factors(
    i: int, tensor: Tensor, span: Span, left: Tensor, core: Tensor | None, right: Tensor
) -> None:
    """Refuses factors of tensor i whose dtype, device, layout or shape does not fit."""
    for what, factor in (("left", left), ("right", right), ("core", core)):
        if factor is None and what == "core":
            continue
        if not isinstance(factor, Tensor):
            raise TypeError(f"lowrank_: {what}[{i}] is {type(factor).__name__}; expected a torch.Tensor")
        kind = str(factor.dtype).removeprefix("torch.")
        where = f"lowrank_: {what}[{i}] is {kind}{list(factor.shape)} on {factor.device}"
        if factor.dtype != torch.float32:
            raise ValueError(f"{where}; expected float32: .float() it")
        if factor.device != tensor.device:
            raise ValueError(f"{where}; expected {tensor.device}, as its tensor")
        if factor.layout != torch.strided or not factor.is_contiguous():
            raise ValueError(
                f"{where} and not contiguous; expected rows that follow one another: .contiguous() it"
            )
        if factor.dim() != 2 and not (what == "core" and factor.dim() == 1):
            raise ValueError(f"{where}; expected a matrix" + (" or its diagonal" if what == "core" else ""))
    inner = left.shape[1] if core is None else core.shape[-1]
    if left.shape[1] < 1 or right.shape[1] != inner or (core is not None and core.shape[0] != left.shape[1]):
        middle = None if core is None else list(core.shape)
        shapes = f"left {list(left.shape)}, core {middle}, right {list(right.shape)}"
        raise ValueError(
            f"lowrank_: {shapes} of tensors[{i}] do not multiply; expected (m, r), core r or (r, s), (n, s), "
            "r and s > 0"
        )
    if span.first + tensor.numel() > left.shape[0] * right.shape[0]:
        raise ValueError(
            f"lowrank_: tensors[{i}] spans elements {span.first} to {span.first + tensor.numel()}; expected "
            f"at most {left.shape[0]} x {right.shape[0]}, the rows of left times the rows of right"
        )
    m, n = left.shape[0], right.shape[0]
    if (
        tensor.dim() == 2
        and span.first == 0
        and tensor.shape[1] != n
        and (tensor.shape[0] == m or tensor.shape == (n, m))
    ):
        how = (
            "left and right are swapped"
            if tensor.shape == (n, m)
            else f"expected right ({tensor.shape[1]}, {right.shape[1]})"
        )
        raise ValueError(
            f"lowrank_: tensors[{i}] is {list(tensor.shape)} and left times right {m} x {n}; {how}; a "
            "reshaped matrix, or a shard of one, is flattened first: .view(-1)"
        )


def _times_core(left: Tensor, core: Tensor, backend: Backend, named: bool) -> Tensor:
    """Returns U C in float32 with the verb's own sum, whose bits depend on the backend no more."""
    if core.dim() == 1:
        return left * core
    zero = torch.zeros(left.shape[0], core.shape[1], dtype=torch.float32, device=left.device)
    _launch(Batch([zero], [Span(0)]), Outer([left], [core.t().contiguous()], [1.0]), None, backend, named)
    return zero
