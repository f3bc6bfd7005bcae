"""The verbs that hold a matrix product, `linear` and `sketch`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import backends, devices, directions
from ..backends import Backend, Batch, Noise, Sides, Span, Thin, Weight
from ..backends.operands import described
from ..checks import flag, whole_number
from ..gemm import counts_of, factored_linear, fused_linear, fuses, sketch_of, tiled_linear
from ..stream import INDEX_LIMIT
from . import arguments
from .operands import check_tensor, noise_of, word_of
from .registered import lists_of, operation, register, traced


def linear(
    xs: Tensor | Sequence[Tensor], weight: Tensor, direction: Any = "normal", *, scales: Sequence[float],
    seed: int = 0, who: str | int = 0, step: int = 0, draw: int = 0, bias: Tensor | None = None,
    first: int = 0, residual: Tensor | None = None, tile: int | None = None, backend: str | None = None,
) -> list[Tensor]:  # fmt: skip
    """Returns y_j = x_j (W + scales[j] z)^T + b for one or more sides, without writing W.

    xs               a tensor (..., n) for every side, or a list with one per scale; each in W's dtype
    weight           W (m, n), contiguous float32, bfloat16 or float16, only read
    direction        a name or a Direction: a dense z(seed, who, step, draw), as every verb draws it. A
                     tile of W + a z exists at a time, made for two signs from one evaluation of z. Or (U,
                     V) or (U, V, C), float32 (m, r), (n, r) and (r, r): z = U C V^T, as thin float32
                     products beside one x W^T of all sides
    scales           one float per side, in units of W
    seed, who, step, draw  of a dense z, as for zokern.draw
    bias             (m,), added as it is
    first            number of W's first element in the unsharded parameter
    residual         int16 low bits of a bfloat16 W: W plus its low bits is perturbed (dense z)
    tile             elements of a tile of W (two tiles for two signs); None: as suits the device, 2^21 on
                     a CPU and all of W elsewhere
    backend          as for zokern.draw

    Returns a list of (..., m), in W's dtype. The products are torch's, so their sums are not equal bit
    for bit between backends; the perturbed tiles are.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    Malladi et al. 2023; Chen et al. 2025 for factored z."""
    scales = arguments.finite("linear", "scales", scales, "finite scales, one for each x")
    sides = [xs] * len(scales) if isinstance(xs, Tensor) else arguments.tensor_list("linear: xs", xs)
    first = whole_number(
        "linear: first", first, 0, expected="the number of W's first element, an integer from 0"
    )
    _check_operands(sides, weight, bias, residual, scales, first)
    tile = _tile("linear", tile, devices.of(weight.device).tile)
    factors = _check_thin(weight, direction) if isinstance(direction, (tuple, list)) else None
    noise = noise_of("linear", "normal" if factors else direction, seed, [(step, draw)], None, weight.device)
    chosen = backends.resolve(backend, weight.device)
    with torch.no_grad():
        if traced(backend, noise.direction):
            return operation(
                "linear", chosen, noise, xs=sides, weight=weight, factors=factors or (), scales=scales,
                who=word_of(who), step=step, draw=draw, bias=bias, first=first, residual=residual, tile=tile,
            )  # fmt: skip
        operands = Sides(sides, [bias] * len(sides), scales)
        if factors is not None:
            y = _with_factors(chosen, weight, factors, operands)
        else:
            y = _with_noise(chosen, weight, Span(word_of(who), first), residual, noise, operands, tile)
        parts = zip(y.split(counts_of(sides)), sides)
        # an operation returns no views
        return [part.view(*x.shape[:-1], y.shape[1]).clone() for part, x in parts]


def _of_either(direction: str, factors: Sequence[Tensor], **names: Any) -> list[Tensor]:
    """Calls linear() with factors, where there are any, or a direction."""
    return linear(direction=tuple(factors) or direction, **names)


register(
    "linear",
    _of_either,
    "(Tensor[] xs, Tensor weight, str direction, Tensor[] factors, float[] scales, int seed, int who, int "
    "step, int draw, Tensor? bias, int first, Tensor? residual, int tile, str backend) -> Tensor[]",
    lambda given: [x.new_empty((*x.shape[:-1], given.weight.shape[0])) for x in given.xs],
)


def _check_operands(
    sides: Sequence[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    scales: Sequence[float], first: int
) -> None:  # fmt: skip
    """Refuses operands of linear() whose dtypes, devices and shapes do not fit."""
    if not scales or len(sides) != len(scales):
        raise ValueError(
            f"linear: {len(sides)} xs and scales {scales}; expected a finite scale for each, at least one"
        )
    check_tensor("linear", "weight", arguments.tensor("linear", "weight", weight, ", a matrix"), first)
    if weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(
            f"linear: weight has shape {tuple(weight.shape)}, strides {weight.stride()}; expected a "
            "contiguous matrix"
        )
    rows, columns = weight.shape
    for j, x in enumerate(sides):
        fits = x.dim() and x.shape[-1] == columns and x.dtype == weight.dtype and x.layout == torch.strided
        if not fits or x.device != weight.device:
            raise ValueError(
                f"linear: xs[{j}] is {described(x)}; expected {weight.dtype}[..., {columns}] on "
                f"{weight.device}"
            )
    if bias is not None:
        arguments.tensor("linear", "bias", bias, f", {weight.dtype}[{rows}], or None")
        if bias.shape != (rows,) or bias.device != weight.device or bias.dtype != weight.dtype:
            raise ValueError(
                f"linear: bias is {described(bias)}; expected {weight.dtype}[{rows}] on {weight.device}"
            )
    if residual is not None:
        arguments.tensor("linear", "residual", residual, ", the int16 low bits of a bfloat16 weight, or None")
        if weight.dtype != torch.bfloat16:
            raise ValueError(
                f"linear: residual goes with a bfloat16 weight; weight is {described(weight)}: leave it out"
            )
        sound = (
            residual.dtype == torch.int16
            and residual.shape == weight.shape
            and residual.layout == torch.strided
        )
        if not sound or not residual.is_contiguous() or residual.device != weight.device:
            raise ValueError(
                f"linear: residual is {described(residual)}; expected a contiguous int16{list(weight.shape)} "
                f"on {weight.device}, one low half for each weight: .contiguous() it"
            )


def _tile(verb: str, tile: int | None, own: int) -> int:
    """Returns the elements of a tile: those that were asked for, or the device's own."""
    return (
        own
        if tile is None
        else whole_number(f"{verb}: tile", tile, expected="a number of elements, at least 1")
    )


def _check_thin(weight: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U, V and C, contiguous; an identity for a core that is not given."""
    if len(factors) not in (2, 3):
        raise ValueError(f"linear: direction has {len(factors)} factors; expected (U, V) or (U, V, C)")
    for i, factor in enumerate(factors):
        arguments.tensor("linear", f"direction[{i}]", factor, ", a factor of (U, V) or (U, V, C)")
    left, right = factors[:2]
    if left.dim() != 2:
        raise ValueError(
            f"linear: U is {described(left)}; expected float32[{weight.shape[0]}, r] on {weight.device}"
        )
    rank = left.shape[-1]
    core = factors[2] if len(factors) == 3 else torch.eye(rank, dtype=torch.float32, device=left.device)
    shapes = {
        "U": (left, (weight.shape[0], rank)),
        "V": (right, (weight.shape[1], rank)),
        "C": (core, (rank, rank)),
    }
    for what, (factor, shape) in shapes.items():
        if factor.dtype != torch.float32 or tuple(factor.shape) != shape or factor.device != weight.device:
            raise ValueError(
                f"linear: {what} is {described(factor)}; expected float32{list(shape)} on {weight.device}"
            )
    return left.contiguous(), right.contiguous(), core.contiguous()


def _with_factors(backend: Backend, weight: Tensor, factors: Sequence[Tensor], operands: Sides) -> Tensor:
    """Returns the results for z = U C V^T, one below the other."""
    left, right, core = factors
    moved, first = [j for j, scale in enumerate(operands.scales) if scale], right.t().contiguous()
    middles = [(core * operands.scales[j]).t() for j in moved]
    if len(moved) == len(operands.scales):
        thins = [Thin(moved, first, torch.stack(middles), left)]
    else:
        thins = [Thin([j], first, middle.unsqueeze(0), left) for j, middle in zip(moved, middles)]
    return factored_linear(backend, Weight(weight, Span(0)), operands._replace(scales=(), thins=thins))


def _with_noise(
    backend: Backend,
    weight: Tensor,
    span: Span,
    residual: Tensor | None,
    noise: Noise,
    operands: Sides,
    tile: int,
) -> Tensor:
    """Returns the results for a dense z, one below the other."""
    xs, biases, scales, _ = operands
    if residual is None and noise.direction.name in directions.DIRECTIONS and fuses(backend, xs, weight):
        same = noise._replace(draws=list(noise.draws) * len(xs))
        return fused_linear(backend, Weight(weight, span), operands, same)
    moved = [j for j, scale in enumerate(scales) if scale]
    rows = max(1, tile // max(1, weight.shape[1]))

    def tiles() -> Iterator[tuple[int, int, dict[int, Tensor]]]:
        for start in range(0, weight.shape[0], rows):
            view = weight[start : start + rows]
            here = span._replace(first=span.first + start * weight.shape[1])
            low = None if residual is None else [residual[start : start + rows]]
            made = {j: torch.empty_like(view) for j in moved}
            for part in range(0, len(moved), 2):
                pair = moved[part : part + 2]
                outs = [[made[j]] for j in pair]
                backend.perturb(Batch([view], [here], residuals=low), noise, [scales[j] for j in pair], outs)
            yield start, start + len(view), made

    return tiled_linear(xs, weight, biases, tiles())


def _check_omega(omega: Tensor, inner: int) -> None:
    """Raises an error for an Omega whose type or shape does not fit."""
    arguments.tensor("sketch", "omega", omega, f", float32[{inner}, p]")
    if omega.device.type == "meta":
        raise ValueError(
            f"sketch: omega is {described(omega)} and has no elements; expected a tensor with memory: "
            "materialise it"
        )
    if (
        omega.dtype != torch.float32
        or omega.dim() != 2
        or omega.shape[0] != inner
        or not omega.is_contiguous()
    ):
        raise ValueError(f"sketch: omega is {described(omega)}; expected contiguous float32[{inner}, p]")


def sketch(
    direction: Any, shape: tuple[int, int], omega: Tensor, *, seed: int, who: str | int,
    draws: Sequence[tuple[int, int]], coeffs: Sequence[float], transposed: bool = False, first: int = 0,
    tile: int | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Returns G Omega of G = sum_k coeffs[k] z(seed, who, *draws[k]), an m x n matrix that is never held.

    direction        a name or a Direction
    shape            (m, n) of G, whose elements are numbered in row-major order from `first`
    omega            float32 (n, p), or (m, p) when transposed, contiguous, only read
    seed, who, first, backend  as for zokern.draw
    draws            K pairs (step, draw) that name the directions
    coeffs           K finite floats, in the unit of G per z
    transposed       True: G^T Omega
    tile             elements of G that exist at a time; None: as suits the device, 2^20 on a CPU, 2^26
                     elsewhere

    Returns float32 (m, p), or (n, p). G is exact, as zokern.axpy_ draws it; the product is torch's.
    Raises ValueError for shapes and dtypes that do not fit. Halko et al. 2011, "Finding structure with
    randomness" (range finder)."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"sketch: shape is {shape!r}; expected (m, n), the rows and columns of G")
    rows, columns = (
        whole_number(f"sketch: shape[{i}]", size, expected="a positive integer")
        for i, size in enumerate(shape)
    )
    flag("sketch: transposed", transposed)
    first = whole_number(
        "sketch: first", first, 0, expected="the number of G's first element, an integer from 0"
    )
    _check_omega(omega, rows if transposed else columns)
    if first + rows * columns > INDEX_LIMIT:
        raise ValueError(
            f"sketch: shape is {shape} from {first}; expected positive sizes and first + m n <= 2**35"
        )
    noise = noise_of("sketch", direction, seed, draws, None, omega.device)
    coeffs = arguments.finite("sketch", "coeffs", coeffs)
    if not noise.draws or len(noise.draws) != len(coeffs):
        raise ValueError(
            f"sketch: {len(noise.draws)} draws and coeffs {coeffs}; expected as many finite numbers, at "
            "least one"
        )
    tile = _tile("sketch", tile, devices.of(omega.device).sketched)
    word, chosen = word_of(who), backends.resolve(backend, omega.device)
    with torch.no_grad():
        if not traced(backend, noise.direction):
            return sketch_of(
                chosen, noise, coeffs, Span(word, first), (rows, columns), omega, transposed, tile
            )
        return operation(
            "sketch", chosen, noise, shape=[rows, columns], omega=omega, who=word, coeffs=coeffs,
            transposed=transposed, first=first, tile=tile, **lists_of(noise),
        )  # fmt: skip


def _of_any_strides(omega: Tensor, **names: Any) -> Tensor:
    """Calls sketch() with an omega of any strides: a compiled graph may choose them."""
    return sketch(omega=omega.contiguous(), **names)


def _sketched(given: SimpleNamespace) -> Tensor:
    return given.omega.new_empty((given.shape[1 if given.transposed else 0], given.omega.shape[1]))


register(
    "sketch",
    _of_any_strides,
    "(str direction, int[] shape, Tensor omega, int seed, int who, int[] steps, int[] draws, float[] coeffs, "
    "bool transposed, int first, int tile, str backend) -> Tensor",
    _sketched,
)
