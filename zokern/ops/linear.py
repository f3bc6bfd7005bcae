"""The verbs that hold a matrix product, `linear` and `sketch`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, directions
from ..backends import Span
from ..backends.validation import described
from ..checks import flag, whole_number
from ..gemm import Part, counts_of, factored_linear, fused_linear, fuses, sketch_of, tiled_linear
from ..stream import INDEX_LIMIT, check_seed, check_word, parameter_id
from . import arguments
from .operands import check_tensor
from .registered import terms_of, unwrap_seed, wrap_seed


def linear(
    xs: Tensor | Sequence[Tensor],
    weight: Tensor,
    direction: Any = "normal",
    *,
    scales: Sequence[float],
    seed: int = 0,
    who: str | int = 0,
    step: int = 0,
    draw: int = 0,
    bias: Tensor | None = None,
    first: int = 0,
    residual: Tensor | None = None,
    tile: int = 1 << 21,
    backend: str | None = None,
) -> list[Tensor]:
    """y_j = x_j (W + scales[j] z)^T + b for one or more sides, without writing W.

    xs         a tensor (..., n) for every side, or a list with one per scale; each in W's dtype
    weight     W (m, n), contiguous float32, bfloat16 or float16, only read
    direction  a name or a Direction: z = z(seed, who, step, draw), dense, as every verb draws it; a tile of W + a z exists at a
               time, made for two signs from one evaluation of z. Or (U, V) or (U, V, C), float32 (m, r), (n, r) and (r, r):
               z = U C V^T, as two thin float32 products beside one x W^T of all sides
    scales     one float per side, in units of W
    bias       (m,), added as it is;  first  number of W's first element in the unsharded parameter
    residual   int16 low bits of a bfloat16 W: W plus its low bits is then what is perturbed (dense z)
    tile       elements of a tile of W (two tiles for two signs); on a CUDA device half as many, twice: one is made
               while the other is multiplied
    Returns a list of (..., m), in W's dtype. The products are torch's, so their sums are not equal bit for bit between backends; the
    perturbed tiles are. Raises ValueError for shapes, dtypes or devices that do not fit.
    Malladi et al. 2023; Chen et al. 2025 for factored z."""
    scales = arguments.finite("linear", "scales", scales, "finite scales, one for each x")
    sides = [xs] * len(scales) if isinstance(xs, Tensor) else arguments.tensor_list("linear: xs", xs)
    first = whole_number("linear: first", first, 0, expected="the number of W's first element, an integer from 0")
    _check_operands(sides, weight, bias, residual, scales, first, tile)
    name = backends.resolve(backend, weight.device).name
    with torch.no_grad():
        if isinstance(direction, (tuple, list)):
            left, right, core = _check_thin(weight, direction)
            return torch.ops.zokern.linear_factored(sides, weight, bias, left, core, right, scales, name)
        resolved = directions.resolve(direction)
        word = parameter_id(who) if isinstance(who, str) else check_word("who", who)
        step, draw = check_word("step", step), check_word("draw", draw)
        if resolved.name not in directions.DIRECTIONS:
            return _linear(
                sides, weight, bias, residual, resolved, check_seed(seed), Span(word, first), step, draw, scales, tile, name
            )
        return torch.ops.zokern.linear(
            sides, weight, bias, residual, word, first, step, draw, resolved.name, wrap_seed(seed), scales, tile, name
        )  # fmt: skip


def _check_operands(
    sides: Sequence[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor | None, scales: Sequence[float], first: int, tile: int
) -> None:  # fmt: skip
    if not scales or len(sides) != len(scales):
        raise ValueError(f"linear: {len(sides)} xs and scales {scales}; expected a finite scale for each, at least one")
    check_tensor("linear", "weight", arguments.tensor("linear", "weight", weight, ", a matrix"), first)
    if weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(
            f"linear: weight has shape {tuple(weight.shape)}, strides {weight.stride()}; expected a contiguous matrix"
        )
    rows, columns = weight.shape
    for j, x in enumerate(sides):
        fits = x.dim() and x.shape[-1] == columns and x.dtype == weight.dtype and x.layout == torch.strided
        if not fits or x.device != weight.device:
            raise ValueError(f"linear: xs[{j}] is {described(x)}; expected {weight.dtype}[..., {columns}] on {weight.device}")
    if bias is not None:
        arguments.tensor("linear", "bias", bias, f", {weight.dtype}[{rows}], or None")
        if bias.shape != (rows,) or bias.device != weight.device or bias.dtype != weight.dtype:
            raise ValueError(f"linear: bias is {described(bias)}; expected {weight.dtype}[{rows}] on {weight.device}")
    if residual is not None:
        arguments.tensor("linear", "residual", residual, ", the int16 low bits of a bfloat16 weight, or None")
        if weight.dtype != torch.bfloat16:
            raise ValueError(f"linear: residual goes with a bfloat16 weight; weight is {described(weight)}: leave it out")
        sound = residual.dtype == torch.int16 and residual.shape == weight.shape and residual.layout == torch.strided
        if not sound or not residual.is_contiguous() or residual.device != weight.device:
            raise ValueError(
                f"linear: residual is {described(residual)}; expected a contiguous int16{list(weight.shape)} on {weight.device}, one low "
                "half for each weight: .contiguous() it"
            )
    whole_number("linear: tile", tile, expected="a number of elements, at least 1")


def _check_thin(weight: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if len(factors) not in (2, 3):
        raise ValueError(f"linear: direction has {len(factors)} factors; expected (U, V) or (U, V, C)")
    for i, factor in enumerate(factors):
        arguments.tensor("linear", f"direction[{i}]", factor, ", a factor of (U, V) or (U, V, C)")
    left, right = factors[:2]
    if left.dim() != 2:
        raise ValueError(f"linear: U is {described(left)}; expected float32[{weight.shape[0]}, r] on {weight.device}")
    rank = left.shape[-1]
    core = factors[2] if len(factors) == 3 else torch.eye(rank, dtype=torch.float32, device=left.device)
    shapes = {"U": (left, (weight.shape[0], rank)), "V": (right, (weight.shape[1], rank)), "C": (core, (rank, rank))}
    for what, (factor, shape) in shapes.items():
        if factor.dtype != torch.float32 or tuple(factor.shape) != shape or factor.device != weight.device:
            raise ValueError(f"linear: {what} is {described(factor)}; expected float32{list(shape)} on {weight.device}")
    return left.contiguous(), right.contiguous(), core.contiguous()


def _linear(
    xs, weight, bias, residual, direction, seed: int, span: Span, step: int, draw: int, scales, tile: int, backend: str
):
    run = backends.get(backend)
    moved = [j for j, scale in enumerate(scales) if scale]
    biases = [bias] * len(xs)
    if residual is None and direction.name in directions.DIRECTIONS and fuses(run, xs, weight):
        draws = [draw if scale else -1 for scale in scales]
        y = fused_linear(run, xs, weight, span, direction, seed, step, draws, scales, biases)
    else:
        rows = max(1, tile // max(1, weight.shape[1]))

        def tiles() -> Iterator[tuple[int, int, dict[int, Tensor]]]:
            for start in range(0, weight.shape[0], rows):
                view = weight[start : start + rows]
                here = Span(span.who, span.first + start * weight.shape[1])
                low = None if residual is None else [residual[start : start + rows]]
                made = {j: torch.empty_like(view) for j in moved}
                for part in range(0, len(moved), 2):
                    pair = moved[part : part + 2]
                    amounts, outs = [scales[j] for j in pair], [[made[j]] for j in pair]
                    run.perturb([view], [here], direction, seed, step, draw, amounts, outs, low)
                yield start, start + len(view), made

        y = tiled_linear(xs, weight, biases, tiles())
    return _apart(y, xs)


def _apart(y: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the rows of each side in the shape of its x."""
    return [part.view(*x.shape[:-1], y.shape[1]) for part, x in zip(y.split(counts_of(xs)), xs)]


def sketch(
    direction: Any,
    shape: tuple[int, int],
    omega: Tensor,
    *,
    seed: int,
    who: str | int,
    draws: Sequence[tuple[int, int]],
    coeffs: Sequence[float],
    transposed: bool = False,
    first: int = 0,
    tile: int = 1 << 20,
    backend: str | None = None,
) -> Tensor:
    """Y = G Omega of G = sum_k coeffs[k] z(seed, who, *draws[k]), an m x n matrix that is never held; transposed: Y = G^T Omega.

    direction  a name or a Direction;  shape (m, n) of G, numbered row-major from `first`
    omega      float32 (n, p), or (m, p) when transposed, contiguous
    draws      K pairs (step, draw);  coeffs  K finite floats
    tile       elements of G that exist at a time
    Returns float32 (m, p), or (n, p). G is exact, as axpy_ draws it; the product is torch's.
    Raises ValueError for shapes and dtypes that do not fit. Halko et al. 2011, "Finding structure with randomness" (range finder)."""
    resolved = directions.resolve(direction)
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"sketch: shape is {shape!r}; expected (m, n), the rows and columns of G")
    rows, columns = (whole_number(f"sketch: shape[{i}]", size, expected="a positive integer") for i, size in enumerate(shape))
    flag("sketch: transposed", transposed)
    first = whole_number("sketch: first", first, 0, expected="the number of G's first element, an integer from 0")
    inner = rows if transposed else columns
    arguments.tensor("sketch", "omega", omega, f", float32[{inner}, p]")
    if omega.device.type == "meta":
        raise ValueError(
            f"sketch: omega is {described(omega)} and has no elements; expected a tensor with memory: materialise it"
        )
    if omega.dtype != torch.float32 or omega.dim() != 2 or omega.shape[0] != inner or not omega.is_contiguous():
        raise ValueError(f"sketch: omega is {described(omega)}; expected contiguous float32[{inner}, p]")
    if first + rows * columns > INDEX_LIMIT:
        raise ValueError(f"sketch: shape is {shape} from {first}; expected positive sizes and first + m n <= 2**35")
    pairs, coeffs = arguments.draws("sketch", draws), arguments.finite("sketch", "coeffs", coeffs)
    if not pairs or len(pairs) != len(coeffs):
        raise ValueError(f"sketch: {len(pairs)} draws and coeffs {coeffs}; expected as many finite numbers, at least one")
    tile = whole_number("sketch: tile", tile, expected="a number of elements, at least 1")
    word = parameter_id(who) if isinstance(who, str) else check_word("who", who)
    name = backends.resolve(backend, omega.device).name
    with torch.no_grad():
        if resolved.name not in directions.DIRECTIONS:
            run, seed = backends.get(name), check_seed(seed)
            return sketch_of(run, resolved, seed, Span(word, first), (rows, columns), pairs, coeffs, omega, transposed, tile)
        return torch.ops.zokern.sketch(
            omega, rows, columns, word, first, [s for s, _ in pairs], [d for _, d in pairs], coeffs, resolved.name,
            wrap_seed(seed), transposed, tile, name,
        )  # fmt: skip


@torch.library.custom_op("zokern::linear", mutates_args=())
def _linear_op(
    xs: list[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor | None, who: int, first: int, step: int, draw: int,
    direction: str, seed: int, scales: list[float], tile: int, backend: str,
) -> list[Tensor]:  # fmt: skip
    resolved = directions.resolve(direction)
    scales = arguments.finite("linear", "scales", scales, "finite scales, one for each x")
    _check_operands(xs, weight, bias, residual, scales, first, tile)
    who, step, draw = (check_word(what, word) for what, word in (("who", who), ("step", step), ("draw", draw)))
    outs = _linear(xs, weight, bias, residual, resolved, unwrap_seed(seed), Span(who, first), step, draw, scales, tile, backend)
    return [out.clone() for out in outs]  # views of one product may not be results of an operation


@_linear_op.register_fake
def _(xs, weight, bias, residual, who, first, step, draw, direction, seed, scales, tile, backend):
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for x in xs]


@torch.library.custom_op("zokern::linear_factored", mutates_args=())
def _linear_factored_op(
    xs: list[Tensor], weight: Tensor, bias: Tensor | None, left: Tensor, core: Tensor, right: Tensor, scales: list[float], backend: str
) -> list[Tensor]:  # fmt: skip
    scales = arguments.finite("linear", "scales", scales, "finite scales, one for each x")
    _check_operands(xs, weight, bias, None, scales, 0, 1)
    left, right, core = _check_thin(weight, (left, right, core))
    moved = [j for j, scale in enumerate(scales) if scale]
    parts = []
    if moved == list(range(len(scales))):
        parts = [Part(moved, right.t().contiguous(), torch.stack([(core * scale).t() for scale in scales]), left)]
    else:
        parts = [Part([j], right.t().contiguous(), (core * scales[j]).t().unsqueeze(0), left) for j in moved]
    outs = _apart(factored_linear(backends.get(backend), xs, weight, parts, 1.0, [bias] * len(xs)), xs)
    return [out.clone() for out in outs]  # views of one product may not be results of an operation


@_linear_factored_op.register_fake
def _(xs, weight, bias, left, core, right, scales, backend):
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for x in xs]


@torch.library.custom_op("zokern::sketch", mutates_args=())
def _sketch_op(
    omega: Tensor, rows: int, columns: int, who: int, first: int, steps: list[int], draws: list[int], coeffs: list[float], direction: str,
    seed: int, transposed: bool, tile: int, backend: str,
) -> Tensor:  # fmt: skip
    run, resolved, pairs = backends.get(backend), directions.resolve(direction), terms_of("sketch", steps, draws)
    inner = rows if transposed else columns
    if omega.dtype != torch.float32 or omega.dim() != 2 or omega.shape[0] != inner or min(rows, columns, tile) < 1:
        raise ValueError(
            f"sketch: omega is {described(omega)}, shape ({rows}, {columns}); expected float32[{inner}, p], tile >= 1"
        )
    if len(pairs) != len(coeffs) or not pairs or not 0 <= first <= INDEX_LIMIT - rows * columns:
        raise ValueError(
            f"sketch: {len(pairs)} draws, {len(coeffs)} coeffs, first {first}; expected as many, at least one, first >= 0"
        )
    omega, who = omega.contiguous(), check_word("who", who)
    return sketch_of(
        run, resolved, unwrap_seed(seed), Span(who, first), (rows, columns), pairs, coeffs, omega, transposed, tile
    )


@_sketch_op.register_fake
def _(omega, rows, columns, who, first, steps, draws, coeffs, direction, seed, transposed, tile, backend):
    return omega.new_empty((columns if transposed else rows, omega.shape[1]))
