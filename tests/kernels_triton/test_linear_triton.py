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
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import models
import ptx
import pytest
import sass
import torch
from interpreted import Interpreted
from torch import Tensor

import zokern
from zokern.backends import Batch, Noise, Sides, Span, Thin, Weight
from zokern.backends.reference import Reference
from zokern.directions import Normal, Rademacher
from zokern.gemm import library

triton = pytest.importorskip("triton")

import products  # noqa: E402
import triton.language as tl  # noqa: E402
from compiled import directory as directory  # noqa: E402
from compiled import forbidden, needs_fma, unspecified  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from zokern.backends import triton as backend  # noqa: E402
from zokern.backends import triton_linear  # noqa: E402
from zokern.backends.base import DIRECTIONS  # noqa: E402
from zokern.backends.triton_launch import keys_of  # noqa: E402

if not hasattr(triton_linear, "kernels"):
    pytest.skip(f"backend 'triton' is off: {backend.why_off()}", allow_module_level=True)

SOURCE = Path(triton_linear.kernels.__file__)
z_of_tile, moved_tile = triton_linear.kernels.z_of_tile, triton_linear.kernels.moved
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
        bound = size * 2.0**-21 + thin_size * 2.0**-15 + exact.abs() * unit  # two terms of bfloat16
        bound += 2.0**-25 * (case.dtype == torch.float16)
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
# Every pair of a type, a direction, an order and a size; BITS has all combinations that z depends on.
CASES = FEW + [
    Case(*size, dtype, BOTH[(i + transposed + k) % 2], transposed)
    for i, dtype in enumerate(DTYPES)
    for transposed in (False, True)
    for k, size in enumerate(((1, 1, 1), (67, 72, 5), (72, 65, 17)))
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
    "units of the transposed matrix": ("i[:, None] * (columns // 8)", "i[:, None] * (columns // 16)"),
    "numbers of the transposed matrix": ("z_of(begin + place", "z_of(begin + tl.trans(place)"),
    "z of the first tile": ("z_of_tile(number.to(tl.int64) + shift", "z_of_tile(number.to(tl.int64)"),
    "the same z for all draws": ("tl.load(side + DRAW)", "tl.load(table + DRAW)"),
    "W + z not rounded": (
        "return rounded(tl.fma(z, scale, wide(raw, TYPE, EXACT)), TYPE, EXACT)",
        "return tl.fma(z, scale, wide(raw, TYPE, EXACT))",
    ),
    "W + z cut": (
        "bf16_nearest(value).to(tl.bfloat16",
        "(value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16",
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


def changed(directory: Path, name: str, old: str, new: str) -> ModuleType:
    """triton_kernels/linear.py with a text replaced, as a module beside the right one."""
    text = SOURCE.read_text()
    assert old in text, f"linear.py has no {old!r}"
    text = text.replace(old, new)
    if name == "W + z not rounded":  # a product takes float32 as it is
        text = text.replace(
            "    if not EXACT:\n",
            "    if raw.dtype == tl.float32:\n        return raw\n    elif not EXACT:\n",
        )
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
    """Sides that lie side by side, that are one tensor, and that lie anywhere, have the same results."""
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


def clock(mine) -> str | None:
    """A step that the device counts gives the z of that step."""
    weight, sides, noise = Case(24, 40, 3, torch.float32).operands()
    early = noise._replace(
        draws=[(STEP - 2, draw) for _, draw in noise.draws], clock=torch.tensor([2], dtype=torch.int64)
    )
    same = all(map(torch.equal, mine.linear(weight, sides, noise), mine.linear(weight, sides, early)))
    return None if same else "z of another step"


def losses(backend_name: str, method: str) -> tuple[list[tuple[float, ...]], int]:
    """The losses of two steps of a small model under `paired`, and how many products were the kernel's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 72), torch.nn.Tanh(), torch.nn.Linear(72, 24))
    inputs, calls = torch.randn(5, 40), []
    options = dict(lr=1e-2, eps=1e-2, seed=3, queries=2, weight_decay=0.5, backend=backend_name)
    if method == "LOZO":
        options |= dict(rank=3, interval=9, force=True)
    evaluation = models.at_use(zokern.Paired(check=False), 1 << 10)  # matrices are read at their use
    right = triton_linear.Products.linear
    with (
        patch("zokern.evaluation.copies.RESIDENT", 64),
        patch.object(library, "yields", lambda dtype: True),
        patch.object(triton_linear.Products, "linear", lambda *a: (calls.append(1), right(*a))[1]),
    ):
        optimizer = getattr(zokern, method)(model, evaluation=evaluation, **options)
        found = [zokern.step(optimizer, lambda: model(inputs).square().mean()).losses for _ in range(2)]
    return [pair for step in found for pair in step], len(calls)


def steps() -> str | None:
    """Steps of both kinds of z read the losses that the reference reads."""
    for method in ("MeZO", "LOZO"):
        (mine, calls), (right, none) = losses("triton", method), losses("reference", method)
        if calls < 4 or none:
            return f"{method}: {calls} products by the kernel"
        for one, two in zip(mine, right):
            apart = max(abs(a - b) / abs(b) for a, b in zip(one, two))
            if not (
                apart < 1e-5 and abs((one[0] - one[1]) - (two[0] - two[1])) < 0.02 * abs(two[0] - two[1])
            ):
                return f"{method}: losses {one}, expected {two}"
    return None


def verdicts(directory: Path) -> dict[str, str | None]:
    """In the child: every check's verdict on the right kernels, and those of a few on the wrong ones."""
    torch.set_num_threads(1)
    mine = backend.Triton()
    found: dict[str, str | None] = {"off": backend.why_off(), "layouts": layouts(mine)}
    found |= {"clock": clock(mine), "steps": steps()}
    found["bound"] = first_problem(mine, [(problem, CASES)])
    found["bits"] = first_problem(mine, [(other_bits, BITS)])
    right = triton_linear.kernels
    for name, change in WRONG.items():
        triton_linear.kernels = changed(directory, name, *change)
        found[name] = first_problem(mine, [(other_bits, NARROW), (problem, FEW)])
        if name == "the sign of side 1 for side 2":
            found["steps of a wrong kernel"] = None if steps() else "they read the right losses"
    triton_linear.kernels = right
    return found


CHILD = Interpreted(__file__)


@needs_fma
@pytest.mark.parametrize(
    "check", ["off", "layouts", "clock", "steps", "steps of a wrong kernel", "bound", "bits"]
)
def test_interpreted(interpreted, check: str) -> None:
    assert interpreted[check] is None, interpreted[check]


@needs_fma
@pytest.mark.parametrize("name", WRONG)
def test_interpreted_rejects(interpreted, name: str) -> None:
    print(interpreted[name])
    assert interpreted[name] is not None


# --- compiled -----------------------------------------------------------------------------------------------

# constants beside those of both signs, and at most so many instructions for a weight, on sm_80 and on sm_90
KERNELS: dict[str, tuple[dict, tuple[float, float]]] = {
    "both signs": ({}, (32.5, 29.5)),
    "one side": (dict(SIDES=1), (27.5, 26.5)),
    "alone": (
        dict(BIAS=False, PARTS=False)
        | dict.fromkeys(("parts", "bias", "first", "middles", "last")),  # no operands but W, x and y
        (32.5, 29.5),
    ),
    "float16": (dict(TYPE=2), (32.5, 29.5)),
    "transposed": (dict(TRANSPOSED=True), (32, 29)),
    "rademacher": (dict(DIRECTION=1), (20, 18.5)),
    "64 rows": (dict(R=64), (50.5, 38)),
    "128 rows": (dict(R=128), (64, 36.5)),
    "thin, 64 rows": (dict(DIRECTION=-1, RANK=16, R=64), (12, 13)),
    "thin, rank 32": (dict(DIRECTION=-1, RANK=32, R=32), (12, 14.5)),
    "float32": (dict(TYPE=0, R=32), (110, 110)),
    "elements": (dict(UNIT=False), (120, 120)),
}
# the others for two, and those that have the most registers for sm_120: a compilation takes seconds
CASES_COMPILED = [(arch, "both signs") for arch in sass.ARCHITECTURES] + [
    (arch, name)
    for name in KERNELS
    for arch in ("80", "90", "120")
    if name != "both signs" and (arch != "120" or "rows" in name or "rank" in name)
]


def compiled(
    directory: Path, arch: str, name: str, module: ModuleType = triton_linear.kernels
) -> products.Compiled:
    return products.made(directory, arch, KERNELS[name][0], module)


def fault(found: products.Compiled, name: str, arch: str) -> str | None:
    """What a compiled kernel has that it must not have."""
    function, chosen = found.function, products.BOTH_SIGNS | KERNELS[name][0]
    calls = {why: [t for t in ts if "guardrail" not in t] for why, ts in forbidden(function).items()}
    if calls := {why: texts for why, texts in calls.items() if texts}:
        return f"{calls}"
    if rest := {
        n
        for n in unspecified(found.text)
        if not re.match("mma|wgmma|tcgen05|cvt.rn.b?f16.f32|cvt.f32.bf16", n)
    }:
        return f"PTX has {rest}"
    if found.shared > 99 << 10:
        return f"{found.shared} bytes of shared memory"
    if chosen["DIRECTION"] >= 0 and chosen["UNIT"] and not 0.85 < found.philox_blocks() < 1.4:
        return f"{found.philox_blocks():.2f} blocks a unit"
    wide = sum(bool(re.match(r"LDG\.E\.128|LDGSTS.*\.128", i.name)) for i in found.loop)
    if chosen["UNIT"] and wide < found.weights * (2 if chosen["TYPE"] else 4) / 16:
        return f"{wide} loads of 16 bytes"
    bound = KERNELS[name][1][arch in ("90", "100")] + 3 * (arch == "100")
    count = len(found.loop) / found.weights
    return f"{count:.1f} instructions a weight" if count > bound else None


needs_sass = pytest.mark.skipif(
    sass.tool("nvdisasm") is None or backend.interpreted(),
    reason="nvdisasm not found, or TRITON_INTERPRET=1 is set",
)


@needs_sass
@pytest.mark.parametrize("arch, name", CASES_COMPILED, ids=lambda value: value.replace(" ", "_"))
def test_compiled(directory, arch: str, name: str) -> None:
    """No spill, matrix units, 16-byte loads, z once for both sides, shared memory for the smallest device, a
    bounded instruction count."""
    found = compiled(directory, arch, name)
    print(
        f"sm_{arch} {name}: {len(found.loop) / found.weights:.1f} instructions a weight, "
        f"{found.philox_blocks():.2f} blocks a unit, {found.function.registers} registers, {found.shared} B"
    )
    assert fault(found, name, arch) is None


@needs_sass
def test_compiled_sums_of_parts(directory) -> None:
    kernel, constants = triton_linear.kernels.finish, dict(TYPE=1, EXACT=False, BLOCK=triton_linear.BLOCK)
    types = dict(parts="*fp32", y="*bf16", size="i64", count="i32")
    signature = {a: "constexpr" if a in constants else types[a] for a in kernel.arg_names}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = directory / "finish.cubin"
    cubin.write_bytes(made.asm["cubin"])
    (function,) = sass.disassemble(cubin).values()
    assert not forbidden(function) and sass.arithmetic(function.code)["FADD"] >= triton_linear.BLOCK // 128


@needs_sass
@pytest.mark.parametrize(
    "old, new, complaint",
    [
        # the compiler cannot know that both sides have one draw
        (
            "moved(raw, z, scale1,",
            "moved(raw, z_of_tile(number.to(tl.int64) + shift, place, units, who, step, "
            "tl.load(side + SIDE + DRAW).to(tl.uint32), keys, DIRECTION, UNIT), scale1,",
            "blocks a unit",
        ),
        ("begin = tl.program_id(2) * each * BK", "begin = tl.program_id(2) * each", "loads of 16 bytes"),
        (
            "even, odd = normal_pair(words)",
            "even, odd = tl.rsqrt(words.to(tl.float32)), words.to(tl.float32)",
            "approximate",
        ),
    ],
    ids=["z for each side", "no promise of alignment", "an approximation"],
)
def test_compiled_rejects(directory, tmp_path, old: str, new: str, complaint: str) -> None:
    wrong = changed(tmp_path, complaint, old, new)
    found = compiled(directory, "90", "both signs", wrong)
    assert complaint in str(fault(found, "both signs", "90"))


# --- executed -----------------------------------------------------------------------------------------------


@triton.jit
def store(weight, out, number, who, step, draw, scale, keys, DIRECTION: tl.constexpr, TYPE: tl.constexpr,
          A: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """out <- W + scale z of one tile of whole units, as `product` makes it for a dot."""
    i, j = tl.arange(0, A), tl.arange(0, B)
    place = i[:, None] * B + j[None, :]
    units = (i[:, None] * (B // 8) + tl.arange(0, B // 8)[None, :]).to(tl.uint32)
    raw = tl.load(weight + place)
    z = z_of_tile(number, place, units, who.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True),
                  draw.to(tl.uint32, bitcast=True), keys, DIRECTION, True)  # fmt: skip
    tl.store(out + place, moved_tile(raw, z, scale, TYPE, False))


def executed(dtype: torch.dtype, direction, draw: int = 3) -> tuple[Tensor, Tensor]:
    """W + scale z by the compiled functions, run thread by thread, and by the reference."""
    weight, first = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).to(dtype), 2**33 + 64
    number = backend.pack.TYPES[dtype]
    constants = dict(DIRECTION=DIRECTIONS[direction.name], TYPE=number, A=16, B=128)
    types = dict.fromkeys(("weight", "out"), products.POINTERS[number]) | products.TYPES | {"scale": "fp32"}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in store.arg_names}
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    source = triton.compiler.ASTSource(store, signature, constants)
    found = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    out = torch.zeros_like(weight)
    memory = [t.view(torch.int16 if t.element_size() == 2 else torch.int32).numpy() for t in (weight, out)]
    given = [*memory, first, 77, STEP, draw, 0.05, *keys_of(SEED)]
    ptx.run(found.asm["ptx"], None, 1, 128, given, memory, found.metadata.shared)
    noise = Noise(direction, SEED, [(STEP, 3)])
    return out, moved(Weight(weight, Span(77, first)), noise, 0.05, (STEP, 3))


@pytest.mark.parametrize("direction", BOTH, ids=lambda direction: direction.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_executed(directory, dtype: torch.dtype, direction) -> None:
    """The bits of perturb, from the code that a GPU would run."""
    out, expected = executed(dtype, direction)
    assert torch.equal(out, expected)


def test_executed_rejects(directory) -> None:
    out, expected = executed(torch.bfloat16, Normal(), draw=4)
    assert not torch.equal(out, expected)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    (directory / "verdicts.json").write_text(json.dumps(verdicts(directory)))
