"""Products of backend ``triton``: y_j = x_j (W + scales[j] z_j)^T + ... in one launch of
triton_kernels/linear.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import device_tables, pack
from .launch import Noise, Sides, Thin, Weight
from .operands import described
from .triton_launch import keys_of, signed
from .validation import Validator

try:
    import triton

    from ..triton_kernels import linear as kernels
except Exception:  # whatever a Triton that does not fit raises; triton.py says it
    pass

# A tile of W: 64 rows fill the matrix units of sm_90 and later, 64 columns of 16 bits are a line of 128 bytes
ROWS, COLUMNS = 64, 64
# Sums that a program holds for each of two sides are R rows of x by W's 64 and by the ranks of thin products,
# padded to 16. With R times the ranks at most FEW_SUMS four warps are enough, so that a thread has 32 weights
# of a tile. Eight hold MOST_SUMS, THIN_SUMS beside thin products, and FEW_SUMS without matrix units
FEW_SUMS, THIN_SUMS, MOST_SUMS = 512, 1024, 2048
RANK = 32  # the most
# Stages of the loop without z; with z, its instructions stand between the load of W and its first use
STAGES = 3
PROGRAMS = 1024  # so many fill a device: eight of four warps on each of 128 multiprocessors
BLOCK = 1024  # elements of a program that adds the sums of parts
STILL = -1  # a number of no direction
NO_SIDE = (0,) * 8  # of a group of one: it has no rows


class _Rows(NamedTuple):
    """Matrices of the same columns as rows of one: matrix j begins begins[j] rows after `tensor`."""

    tensor: Tensor
    begins: list[int]


class Tile(NamedTuple):
    """What a program holds at a time; no kernel of these spills a register (test_linear_triton.py)."""

    rows: int  # of x, of a side
    columns: int  # of W
    warps: int


def tile_of(kind: int, rows: int, rank: int, moved: bool, in_units: bool) -> Tile:
    """Returns the tile for a type, the rows of a side, and padded ranks of thin products."""
    sums = max(16, rank)
    limit = FEW_SUMS if kind == 0 else THIN_SUMS if rank else MOST_SUMS
    most = min(max(16, triton.next_power_of_2(rows)), limit // sums)
    if kind and in_units and most * sums <= FEW_SUMS:
        return Tile(most, COLUMNS, 4)
    # with 64 rows the compiler holds more of x than with 128, and spills on sm_120
    return Tile(most, COLUMNS // 2 if moved and kind and most == 64 else COLUMNS, 8)


class _Kind(NamedTuple):
    """Sides that one launch computes: those with z or those without, with the same thin products."""

    moved: bool
    thins: tuple[int, ...]


class Products:
    """Runs linear() of the backend."""

    tables: device_tables.Tables
    valid: Validator
    thin_rank = RANK  # of the thin products of a side together

    def linear(
        self, weight: Weight, sides: Sides, noise: Noise | None = None, room: int | None = None,
        outs: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Computes y_j = shrink x_j (W + scales[j] z_j)^T + biases[j] + thin products.

        A tile of W is read once for the two sides of a draw, and its z is made once.

        xs      (rows, n) each, of W's dtype;  W (m, n), contiguous, or (n, m) transposed
        thins   up to thin_rank a side. `first` is rounded to W's dtype
        room    bytes that sums of parts may take (linear_bytes)
        outs    contiguous (rows, m) each, of W's dtype, which take the results
        W + scales[j] z_j is rounded to W's dtype, as perturb writes it. Sums are float32, rounded once."""
        self.valid.linear(weight, sides, noise)
        tensor, _, transposed, _ = weight
        m, n = tensor.shape[::-1] if transposed else tensor.shape
        counts = [x.shape[0] for x in sides.xs]
        ys = [tensor.new_empty(count, m) for count in counts] if outs is None else list(outs)
        _check(weight, sides, ys, counts, m, n)
        if not sum(counts) or not m:
            return ys
        y = _rows_of(ys, m)
        if y is None:
            y = _Rows(tensor.new_empty(sum(counts), m), _begins(counts))
        launch = _Launch(self, weight, sides, noise, y, _parts_of(counts, m, n, room), m, n)
        with device_tables.on(tensor.device):
            launch.run()
        if y.tensor.data_ptr() != ys[0].data_ptr():
            for out, begin, count in zip(ys, y.begins, counts):
                out.copy_(y.tensor[begin : begin + count])
        return ys

    def linear_bytes(self, counts: Sequence[int], room: int | None = None) -> int:
        """Returns the most memory that linear() takes for so many rows of each side: sums of parts."""
        most = 4 * PROGRAMS * ROWS * sum(counts)
        return most if room is None else min(most, room)


def _parts_of(counts: Sequence[int], m: int, n: int, room: int | None) -> int:
    """Returns into how many parts of its columns W is divided, so that small matrices fill a device.

    The sums of a part are written and read, 8 bytes for each row of x. A part has at least so many columns
    that this is no more than W's own bytes."""
    rows, tiles = sum(counts), -(-m // ROWS)
    parts = min(PROGRAMS // tiles, n // max(4 * COLUMNS, 4 * rows))
    return max(1, parts if room is None else min(parts, room // (4 * rows * m)))


def _begins(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts)[:-1].tolist()]


def _rows_of(matrices: Sequence[Tensor], width: int) -> _Rows | None:
    """Returns matrices that lie at whole rows of one another in one memory, or None."""
    base, size = matrices[0], max(1, width) * matrices[0].element_size()
    start, memory = base.data_ptr(), base.untyped_storage().data_ptr()
    apart = [matrix.data_ptr() - start for matrix in matrices]
    fits = all(
        [
            matrix.is_contiguous()
            and matrix.dtype == base.dtype
            and matrix.untyped_storage().data_ptr() == memory
            and offset % size == 0
            for matrix, offset in zip(matrices, apart)
        ]
    )
    return _Rows(base, [offset // size for offset in apart]) if fits else None


def _joined(matrices: Sequence[Tensor], width: int) -> _Rows:
    """Returns matrices as rows of one; a copy only where they do not lie so already."""
    found = _rows_of(matrices, width)
    return found or _Rows(
        torch.cat(list(matrices)), _begins([matrix.numel() // max(1, width) for matrix in matrices])
    )


def _check(weight: Weight, sides: Sides, ys: Sequence[Tensor], counts: Sequence[int], m: int, n: int) -> None:
    """Refuses operands whose shapes do not fit, and thin products of more ranks than a program holds."""
    wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("an x", x, (count, n)) for x, count in zip(sides.xs, counts)
    ]
    wanted += [("a bias", bias, (m,)) for bias in sides.biases if bias is not None]
    ranks = [0] * len(counts)
    for thin in sides.thins:
        r, q = thin.middles.shape[1:]
        wanted += [
            ("a first factor", thin.first, (r, n)),
            ("middles", thin.middles, (len(thin.sides), r, q)),
            ("a last factor", thin.last, (m, q)),
        ]
        for side in thin.sides:
            ranks[side] += r
    for what, tensor, shape in wanted:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"backend 'triton': linear: {what} is {described(tensor)}; expected {list(shape)}"
            )
    tensor = weight.tensor
    for y, count in zip(ys, counts):
        fits = y.shape == (count, m) and y.device == tensor.device and y.dtype == tensor.dtype
        if not fits or not y.is_contiguous():
            kind = f"contiguous {tensor.dtype}[{count}, {m}] on {tensor.device}"
            raise ValueError(f"backend 'triton': linear: an out is {described(y)}; expected {kind}")
    if max(ranks) > RANK:
        raise ValueError(
            f"backend 'triton': linear: thin products of rank {max(ranks)} for a side; expected {RANK}"
            " or less: multiply them by torch, as zokern.gemm.factored_linear does"
        )


def _one(thins: Sequence[Thin], sides: Sequence[int]) -> Thin | None:
    """Returns several thin products of the same sides as one."""
    if len(thins) < 2:
        return None if not thins else thins[0]
    middles = [
        torch.block_diag(*[thin.middles[list(thin.sides).index(side)] for thin in thins]) for side in sides
    ]
    first, last = torch.cat([thin.first for thin in thins]), torch.cat([thin.last for thin in thins], 1)
    return Thin(sides, first, torch.stack(middles), last)


class _Launch:
    """A call of linear(): its operands, and a launch for each kind of side."""

    def __init__(
        self, owner: Products, weight: Weight, sides: Sides, noise: Noise | None, y: _Rows, parts: int,
        m: int, n: int,
    ) -> None:  # fmt: skip
        self.owner, self.weight, self.sides, self.noise, self.y = owner, weight, sides, noise, y
        self.counts, self.m, self.n, self.parts = [x.shape[0] for x in sides.xs], m, n, parts
        self.x = _joined(sides.xs, n)
        added = [bias for bias in sides.biases if bias is not None]
        if len({bias.dtype for bias in added}) > 1:
            added = [bias.float() for bias in added]
        self.bias = _joined(added, m) if added else None
        self.exact = not isinstance(kernels.product, triton.JITFunction)
        self.type = pack.TYPES[weight.tensor.dtype]
        self.total = sum(self.counts)
        self.sums = None
        if parts > 1:
            self.sums = torch.empty(parts, self.total, m, dtype=torch.float32, device=weight.tensor.device)

    def run(self) -> None:
        kinds: dict[_Kind, list[int]] = {}
        for j, count in enumerate(self.counts):
            if count:
                moved = self.noise is not None and self.sides.scales[j] != 0
                thins = tuple(i for i, thin in enumerate(self.sides.thins) if j in thin.sides)
                kinds.setdefault(_Kind(moved, thins), []).append(j)
        for kind, members in kinds.items():
            self._product(kind, members)
        if self.sums is not None:
            size = self.total * self.m
            grid, meta = (triton.cdiv(size, BLOCK),), dict(TYPE=self.type, EXACT=self.exact, BLOCK=BLOCK)
            kernels.finish[grid](self.sums, self.y.tensor, size, self.parts, **meta, enable_fp_fusion=False)

    def _groups(self, kind: _Kind, members: Sequence[int]) -> list[list[int]]:
        """Returns the sides of each program, two of one draw."""
        by_draw: dict[int, list[int]] = {}
        for j in members:
            by_draw.setdefault(self._draw(j) if kind.moved else 0, []).append(j)
        return [some[i : i + 2] for some in by_draw.values() for i in range(0, len(some), 2)]

    def _draw(self, j: int) -> int:
        assert self.noise is not None
        return self.noise.draws[j][1]

    def _table(
        self, kind: _Kind, groups: Sequence[Sequence[int]], thin: Thin | None, most: int
    ) -> np.ndarray:
        """Returns the table of the kernel, `most` rows of a side at a time."""
        added = iter(self.bias.begins if self.bias is not None else ())
        bias_rows = [None if bias is None else next(added) for bias in self.sides.biases]
        places = {} if thin is None else {side: i for i, side in enumerate(thin.sides)}
        found = []
        for group in groups:
            for start in range(0, max([self.counts[j] for j in group]), most):
                rows = []
                for j in group:
                    draw, scale = (self._draw(j), self.sides.scales[j]) if kind.moved else (0, 0.0)
                    here, bias = max(0, min(most, self.counts[j] - start)), bias_rows[j]
                    x_row, y_row, bits = self.x.begins[j], self.y.begins[j], np.float32(scale).view(np.uint32)
                    names = here, draw, int(bits), bias is not None, bias or 0, places.get(j, 0)
                    rows.append((x_row + start, y_row + start, *names))
                found.append([*rows, NO_SIDE][:2])
        return np.array(found, dtype=np.int64)

    def _product(self, kind: _Kind, members: Sequence[int]) -> None:
        (tensor, span, transposed, shrink), m, n = self.weight, self.m, self.n
        groups = self._groups(kind, members)
        thin = _one([self.sides.thins[i] for i in kind.thins], members)
        rank = 0 if thin is None else max(16, triton.next_power_of_2(thin.middles.shape[1]))
        in_units, rows = self._in_units(), max([self.counts[j] for j in members])
        tile = tile_of(self.type, rows, rank, kind.moved, in_units)
        table = self._table(kind, groups, thin, tile.rows)
        tables = self.owner.tables
        launch = tables.get(tensor.device, lambda: ("linear", table.tobytes()), lambda: ((table,), None))
        buffer = tables.upload(launch).buffer
        direction, seed, step, clock = STILL, 0, 0, None
        if kind.moved and self.noise is not None:
            direction, seed = self.owner.valid.number(self.noise.direction), self.noise.seed
            step, clock = self.noise.draws[0][0], self.noise.clock
        meta: dict[str, Any] = dict(
            TYPE=self.type, DIRECTION=direction, SIDES=max(map(len, groups)), TRANSPOSED=transposed,
            UNIT=in_units, RANK=rank, BIAS=self.bias is not None, PARTS=self.sums is not None,
            EXACT=self.exact, R=tile.rows, BM=ROWS, BK=tile.columns,
        )  # fmt: skip
        factors: tuple[Any, ...] = (None, None, None)
        sizes: Sequence[int] = (0, 0)
        strides: Sequence[int] = (0, 0, 0, 0)
        if thin is not None:
            last = thin.last if thin.last.stride(1) == 1 else thin.last.contiguous()
            factors = thin.first.contiguous(), thin.middles, last
            sizes, strides = thin.middles.shape[1:], (*thin.middles.stride(), last.stride(0))
        kernels.product[len(table), -(-m // ROWS), self.parts](
            self.x.tensor, tensor, self.y.tensor, self.sums, None if self.bias is None else self.bias.tensor,
            *factors, buffer.view(torch.int64), m, n, self.total, -(-n // tile.columns // self.parts),
            span.first, signed(span.who), signed(step), float(shrink), *sizes,
            *strides, keys_of(seed), clock, **meta, num_warps=tile.warps,
            num_stages=STAGES if direction == STILL else 1, enable_fp_fusion=False,
        )  # fmt: skip

    def _in_units(self) -> bool:
        """Tells whether each row of W begins with a unit of eight, and rows of W and x lie on 16 bytes."""
        tensor, widths = self.weight.tensor, (self.n, *self.weight.tensor.shape[1:])
        addresses = tensor.data_ptr() | self.x.tensor.data_ptr() | self.weight.span.first % 8
        return not any([width % 8 for width in widths]) and addresses % 16 == 0


__all__ = ["Products"]
