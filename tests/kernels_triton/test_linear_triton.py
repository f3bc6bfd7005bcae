"""triton_kernels/linear.py without a GPU: interpreted in a child process, compiled for six architectures and
read, and its tile of W + scale z run as PTX.

Sums are held to a bound, of the weights that the reference's perturb writes, in float64. Rows of the identity
read those weights themselves, bit for bit: a sum of one product is exact. Wrong kernels are the file with one
line changed, and its results lie in memory that is NaN before.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import sass
import torch
from interpreted import Interpreted
from torch import Tensor

from zokern import gemm
from zokern.backends import Batch, Noise, Sides, Span, Thin, Weight
from zokern.backends.reference import Reference
from zokern.directions import Normal, Rademacher

triton = pytest.importorskip("triton")

from compiled import forbidden, needs_fma, unspecified  # noqa: E402
from compiled import directory as directory  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from zokern.backends import triton as backend  # noqa: E402
from zokern.backends import triton_linear  # noqa: E402

if not hasattr(triton_linear, "kernels"):
    pytest.skip(f"backend 'triton' is off: {backend.why_off()}", allow_module_level=True)

SOURCE = Path(triton_linear.kernels.__file__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED, STEP = 11, 5


class Case(NamedTuple):
    """A product of sides: both signs of a draw, W itself, one sign of another draw."""

    m: int
    n: int
    rows: int
    dtype: torch.dtype
    direction: object = Normal()  # noqa: B008
    transposed: bool = False
    first: int = 2**33 + 1024  # of W in the stream; a multiple of 8 for whole units
    thins: bool = True
    shrink: float = 1.0

    def operands(self) -> tuple[Weight, Sides, Noise]:
        generator = torch.Generator().manual_seed(3)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        shape = (self.n, self.m) if self.transposed else (self.m, self.n)
        weight = Weight(
            (numbers(*shape) * 0.1).to(self.dtype), Span(77, self.first), self.transposed, self.shrink
        )
        xs = [numbers(rows, self.n).to(self.dtype) for rows in (self.rows, self.rows + 2, 1, self.rows)]
        biases = [numbers(self.m).to(self.dtype), None, numbers(self.m), None]
        last = numbers(self.m, 9)
        thins = [
            Thin([0, 1], numbers(5, self.n) * 0.1, numbers(2, 7, 5).mT * 0.3, last[:, 1:8]),
            Thin([2], numbers(20, self.n) * 0.1, numbers(1, 20, 3) * 0.3, numbers(self.m, 3)),
            Thin([1, 0], numbers(2, self.n) * 0.1, numbers(2, 2, 2), last[:, :2]),
        ]
        noise = Noise(self.direction, SEED, [(STEP, draw) for draw in (3, 3, 0, 8)])
        scales = [0.05, -0.05, 0.0, 0.03]
        return weight, Sides(xs, biases, scales, thins if self.thins else ()), noise


def moved(weight: Weight, noise: Noise, scale: float, draw: tuple[int, int]) -> Tensor:
    """W + scale z, as the reference's perturb writes it."""
    out = torch.empty_like(weight.tensor)
    batch = Batch([weight.tensor], [weight.span])
    Reference().perturb(batch, noise._replace(draws=[draw]), [scale], [[out]])
    return out


def problem(mine, case: Case) -> str | None:
    """What is wrong with the results of a case: every element is held to the rounding of its own sum."""
    weight, sides, noise = case.operands()
    kept = weight.tensor.clone()
    outs = [torch.full((x.shape[0], case.m), float("nan"), dtype=case.dtype) for x in sides.xs]
    mine.linear(weight, sides, noise, None, outs)
    if not torch.equal(kept, weight.tensor):
        return "W was written"
    unit = 0.0 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps / 2
    for j, (x, y) in enumerate(zip(sides.xs, outs)):
        matrix = moved(weight, noise, sides.scales[j], noise.draws[j]) if sides.scales[j] else weight.tensor
        matrix = (matrix.t() if case.transposed else matrix).double() * case.shrink
        exact, size = x.double() @ matrix.t(), x.double().abs() @ matrix.abs().t()
        thin_size = torch.zeros_like(size)
        for thin in sides.thins:
            if j in thin.sides:
                first = thin.first.to(case.dtype).double()
                middle, last = thin.middles[list(thin.sides).index(j)].double(), thin.last.double()
                exact = exact + x.double() @ first.t() @ middle @ last.t()
                thin_size += x.double().abs() @ first.abs().t() @ middle.abs() @ last.abs().t()
        if (bias := sides.biases[j]) is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        terms = 2.0**-21 if case.dtype == torch.float32 else 2.0**-15  # of the thin products' operands
        bound = (
            size * 2.0**-21
            + thin_size * terms
            + exact.abs() * unit
            + 2.0**-25 * (case.dtype == torch.float16)
        )
        share = ((y.double() - exact).abs() / bound).nan_to_num(torch.inf).max().item()
        if not share < 1.1:
            return f"side {j} of {case}: {share:.3g} times the bound"
    return None


def other_bits(mine, case: Case) -> str | None:
    """Rows of the identity read W + scale z: nothing but its bits will do."""
    weight, sides, noise = case.operands()
    x = torch.eye(case.n).to(case.dtype)
    ys = mine.linear(weight, Sides([x] * 4, [None] * 4, sides.scales), noise)
    for j, y in enumerate(ys):
        expected = moved(weight, noise, sides.scales[j], noise.draws[j])
        expected = expected if case.transposed else expected.t()
        if not torch.equal(y, expected):
            return f"side {j} of {case}: {int((y != expected).sum())} of {y.numel()} weights differ"
    return None


BOTH = (Normal(), Rademacher())
FEW = [
    Case(24, 264, 3, torch.bfloat16, first=2**33 + 40, shrink=0.75),
    Case(67, 1032, 3, torch.bfloat16, Rademacher(), first=8, thins=False),
    Case(9, 70, 2, torch.bfloat16, first=3),
    Case(24, 70, 2, torch.float16, transposed=True, thins=False),
    Case(72, 24, 2, torch.float16, transposed=True, shrink=0.75),
]
CASES = FEW + [
    Case(*size, dtype, direction, transposed)
    for dtype in DTYPES
    for direction in BOTH
    for transposed in (False, True)
    for size in ((1, 1, 1), (67, 72, 5), (72, 65, 17))
]
BITS = [
    Case(*size, dtype, direction, transposed, first)
    for dtype in DTYPES
    for direction in BOTH
    for transposed in (False, True)
    for *size, first in ((40, 72, 1, 2**33 + 72), (13, 21, 1, 5))
]
NARROW = [Case(40, 72, 1, torch.bfloat16, first=2**33 + 72), Case(13, 21, 1, torch.bfloat16, first=5)]

# name: (text, replacement); none leaves the memory of its tensors, which no one guards in the interpreter
WRONG = {
    "the sign of side 1 for side 2": ("moved(raw, z, scale1,", "moved(raw, z, scale0,"),
    "another z for side 2": ("moved(raw, z, scale1,", "moved(raw, -z * 0.5, scale1,"),
    "units of the transposed matrix": ("* (columns // 8).to(tl.uint32)", "* (columns // 16).to(tl.uint32)"),
    "numbers of the transposed matrix": ("z_of(begin + place", "z_of(begin + tl.trans(place)"),
    "z of the first tile": ("z_of_tile(number.to(tl.int64) + shift", "z_of_tile(number.to(tl.int64)"),
    "the same z for all draws": ("tl.load(side + DRAW)", "tl.load(table + DRAW)"),
    "W + z not rounded": (
        "z_of_units(unit, who, step, draw, keys, DIRECTION: tl.constexpr):",
        "z_of_units(unit, who, step, draw, keys, DIRECTION: tl.constexpr):\n    who += 0",
    ),
    "W + z cut": (
        "bf16_nearest(value).to(tl.bfloat16",
        "(to_bits(value) >> 16).to(tl.uint16).to(tl.bfloat16",
    ),
    "bits of another unit": ("(unit & 3) * 8", "(unit & 1) * 8"),
    "signs from another word": ("(unit >> 2) & 3", "(unit >> 1) & 3"),
    "words swapped": (
        "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
        "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
    ),
    "no thin product": ("        total0 = add_thin(", "        unused = add_thin("),
    "the thin rows of side 1": ("add_thin(total1, t1,", "add_thin(total1, t0,"),
    "the middle of side 1": ("tl.load(side + SIDE + MIDDLE)", "tl.load(side + MIDDLE)"),
    "decay of everything": ("    write(y, parts, total0,", "    write(y, parts, total0 * shrink,"),
    "a bias from every part": ("if (part == 0) & (", "if (part >= 0) & ("),
    "the first bias for all": ("tl.load(side + BIAS_ROW) * m", "tl.load(side + BIAS_ROW) * 0"),
    "a bias for those that have none": ("tl.load(side + HAS_BIAS) != 0", "tl.load(side + HAS_BIAS) >= 0"),
    "a part forgotten": ("range(1, count)", "range(1, count - 1)"),
    "a tile forgotten": ("range(begin, ", "range(begin + BK, "),
    "last unit of a row": ("(k // 8 < left // 8)[None, :]", "(k // 8 < left // 8 - 1)[None, :]"),
    "last column": ("else (k < left)[None, :]", "else (k < left - 1)[None, :]"),
    "last row of W": ("& (row < m)[None, :]", "& (row < m - 1)[None, :]"),
    "last row of x": ("(r < tl.load(side + ROWS))[:, None]", "(r < tl.load(side + ROWS) - 1)[:, None]"),
}
WRONG["W + z not rounded"] = (
    "return rounded(tl.fma(z, scale, wide(raw, TYPE, EXACT)), TYPE, EXACT)",
    "return tl.fma(z, scale, wide(raw, TYPE, EXACT))",
)


def changed(directory: Path, name: str, old: str, new: str) -> ModuleType:
    """triton_kernels/linear.py with a text replaced, as a module beside the right one."""
    text = SOURCE.read_text()
    assert old in text, f"linear.py has no {old!r}"
    text = text.replace(old, new).replace("to_float\n", "to_bits, to_float\n")
    if name == "W + z not rounded":  # products of float32 take it as it is
        text = text.replace("    if not EXACT:\n        return raw.to", "    if raw.dtype == tl.float32:\n        return raw\n    elif not EXACT:\n        return raw.to")  # fmt: skip
    path = directory / f"{re.sub(r'[^a-z0-9]', '_', name.lower())}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"{backend.triton_kernels.__name__}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def first_problem(mine, checks: Sequence[tuple[Callable, Sequence[Case]]]) -> str | None:
    return next((found for check, cases in checks for case in cases if (found := check(mine, case))), None)


def layouts(mine) -> str | None:
    """Sides that lie beside one another, that are one tensor, and that lie anywhere, have the same results."""
    weight, sides, noise = Case(24, 40, 3, torch.float32).operands()
    x, noise = sides.xs[0], noise._replace(draws=noise.draws[:2])
    stack = torch.stack([x, x])
    both: list[Sequence[Tensor]] = [
        [x, x],
        list(stack),
        [stack[1], x],
        [stack[1], stack[0]],
        list(stack.flip(0)),
    ]
    bias = sides.biases[0]
    found = [
        torch.cat(mine.linear(weight, Sides(xs, [bias, biased], (0.1, -0.1)), noise))
        for xs in both
        for biased in (bias, None if bias is None else bias.clone())
    ]
    same = all(torch.equal(found[0], other) for other in found)
    return None if same else "results depend on where sides lie"


def verdicts(directory: Path) -> dict[str, str | None]:
    """In the child: every check's verdict on the right kernels, and those of a few on the wrong ones."""
    torch.set_num_threads(1)
    mine = backend.Triton()
    found: dict[str, str | None] = {"off": backend.why_off(), "layouts": layouts(mine)}
    found["bound"] = first_problem(mine, [(problem, CASES)])
    found["bits"] = first_problem(mine, [(other_bits, BITS)])
    right = triton_linear.kernels
    for name, change in WRONG.items():
        triton_linear.kernels = changed(directory, name, *change)
        found[name] = first_problem(mine, [(other_bits, NARROW), (problem, FEW)])
    triton_linear.kernels = right
    return found


CHILD = Interpreted(__file__)


@pytest.fixture
def interpreted() -> dict[str, str | None]:
    return CHILD.verdicts()


@needs_fma
@pytest.mark.parametrize("check", ["off", "layouts", "bound", "bits"])
def test_interpreted(interpreted, check: str) -> None:
    assert interpreted[check] is None, interpreted[check]


@needs_fma
@pytest.mark.parametrize("name", WRONG)
def test_interpreted_rejects(interpreted, name: str) -> None:
    print(interpreted[name])
    assert interpreted[name] is not None


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    (directory / "verdicts.json").write_text(json.dumps(verdicts(directory)))
