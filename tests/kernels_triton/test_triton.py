"""Triton without a GPU: the kernels interpreted and compared bit for bit, and compiled for six architectures
and read.

Interpretation has to be chosen before triton is imported, so one child process (`python test_triton.py
folder`) runs the conformance checks and a list of wrong kernels under TRITON_INTERPRET=1, and the tests here
read its verdicts. Compilation needs no device; what it made is read as PTX and as machine code. Wrong kernels
are copies of triton_kernels/ with one line changed.
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import conformance
import conformance_kept
import conformance_project
import numpy as np
import ptx
import pytest
import sass
import torch
from guarded import filled
from interpreted import Interpreted

from zokern.backends import Batch, Noise, Span, Terms
from zokern.backends.validation import Validator

triton = pytest.importorskip("triton")

from compiled import changed, forbidden, made, needs_fma, unspecified  # noqa: E402
from compiled import directory as directory  # noqa: E402

from zokern.backends import triton as backend  # noqa: E402

# The conformance checks that are interpreted here: every verb, dtype, rounding, stride, slice, row and
# element number. The others (shards, order, many draws) vary what does not reach a kernel, or are covered by
# few().
CHECKS = (
    "philox_known_answers", "philox_random_counters", "draw_names", "draw_firsts", "axpy_sizes",
    "axpy_firsts", "axpy_pitch",
    "axpy_strides_residual", "axpy_special", "axpy_stochastic", "perturb_sizes", "perturb_strides",
    "perturb_rows",
    "perturb_arithmetic", "empty_launch", "axpy_one_rounding", "large", "tiles", "clock",
)  # fmt: skip

KEPT = ("kept_axpy_", "kept_perturb", "kept_lowrank_")

WRONG = {  # name: (file, text, replacement)
    "unfused": ("normal", "e = tl.fma(-s, y, 1.0)", "e = 1.0 - s * y"),
    "unfused sum": ("terms", "tl.fma(coefficient, z_even, even)", "coefficient * z_even + even"),
    "unfused element": (
        "terms",
        "tl.fma(tl.load(coefficients + k), z, value)",
        "tl.load(coefficients + k) * z + value",
    ),
    "sine and cosine swapped": ("normal", "return r * sine, r * cosine", "return r * cosine, r * sine"),
    "words swapped": (
        "units",
        "tl.join(tl.join(a0, a2), tl.join(a1, a3))",
        "tl.join(tl.join(a0, a1), tl.join(a2, a3))",
    ),
    "parts swapped": (
        "units",
        "tl.join(words[2 * PART], words[2 * PART + 1])",
        "tl.join(words[2 - 2 * PART], words[3 - 2 * PART])",
    ),
    "round keys swapped": ("philox", "keys[2 * r + 1]", "keys[2 * r]"),
    "32-bit number": (
        "elements",
        "(number >> 3).to(tl.uint32)",
        "(number.to(tl.int32) >> 3).to(tl.uint32)",
    ),
    "32-bit unit": (
        "units",
        "(unit + tl.arange(0, N)).to(tl.uint32)",
        "(unit.to(tl.int32) & 0xFFFFFFF) + tl.arange(0, N)",
    ),
    "short tail": ("elementwise", "i < size", "i < size - 1"),
    "write past the end": ("elementwise", "i < size", "i <= size"),
    "unit past the end": ("units", "(row < units)", "(row <= units)"),
    "signs past the end": ("units", "tl.uint32) < units", "tl.uint32) <= units"),
    "signs from the chunk's first unit": ("units", "part * N - (unit & 15).to(tl.int32)", "part * N"),
    "byte of a block": ("units", "(tl.arange(0, N) & 3) * 8", "(tl.arange(0, N) & 1) * 8"),
    "truncated bfloat16": ("rounding", "x + 0x7FFF + ((x >> 16) & 1)", "x"),
    "low bits of an element without sign": (
        "rounding",
        "low.to(tl.int32)",
        "low.to(tl.uint16, bitcast=True).to(tl.int32)",
    ),
    "low bits without sign": (
        "units",
        "((low_word << 16).to(tl.int32, bitcast=True) >> 16).to(tl.uint32, bitcast=True)",
        "(low_word & 0xFFFF)",
    ),
    "rounding bits of the first draw": (
        "terms",
        "who, step, purpose, keys)",
        "who, step_k - 2, purpose, keys)",
    ),
    "float16 saturates": ("rounding", "half < 0x7C00, half, 0x7C00", "half < 0x7C00, half, 0x7BFF"),
    "inf not counted": ("elements", "(rounded & 0x7F80) == 0x7F80", "(rounded & 0x7FFF) > 0x7F80"),
    "inf not seen": ("rounding", "+ 0x00800080", "+ 0x007F007F"),
    "first term twice": (
        "terms",
        "k < draw_count - 1, other, step",
        "k <= draw_count - 1, other, step",
    ),
    "one rounding for all steps": (
        "terms",
        "if TYPE != FLOAT32 and not (TYPE == BFLOAT16",
        "if TYPE < 0 and not (TYPE == BFLOAT16",
    ),
    "one rounding for all steps of an element": (
        "terms",
        "value = bf16_to_float(round_element(",
        "bf16_to_float(round_element(",
    ),
    "decay of the first step": (
        "terms",
        "tl.load(draws + draw_count + k)",
        "tl.load(draws + draw_count)",
    ),
    "rounding bits of the first step": (
        "terms",
        "even, odd = round_pair(even, odd, unit, who, step,",
        "even, odd = round_pair(even, odd, unit, who, step * 0 + 3,",
    ),
    "no decay": (
        "terms",
        "even, odd, even2, odd2 = even * decay, odd * decay, even2 * decay, odd2 * decay",
        "even = even * decay",
    ),
}


def few(mine) -> None:
    """One small launch per verb and rounding, chosen so that each of WRONG shows; raises AssertionError."""
    generator, versus = torch.Generator().manual_seed(1), conformance.Versus(few, mine, "cpu", "quick")

    def tensors(*dtypes):
        thetas = [conformance.theta_of(generator, (43,), dtype) for dtype in dtypes]
        return thetas, [Span(77 + i, (0, 2**33 + 5, 16)[i % 3]) for i in range(len(thetas))]

    draws, coeffs = [(3, 1), (2, 0), (5, 7)], [1e-3, 0.3, -0.02]
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    thetas, spans = tensors(fp32, fp32, bf16, fp16)
    versus.draw([conformance.out_like(t) for t in thetas], spans, "normal")
    versus.axpy(*tensors(fp32, bf16, fp16), "normal", draws, coeffs, 0.99)
    versus.axpy(*tensors(bf16, fp16), "rademacher", draws, coeffs, 0.99, "stochastic")
    replay = [(3, 1), (3, 2), (5, 7), (5, 0)], [1e-3, 0.3, -0.02, 0.1], [0.99, 1.5]
    versus.axpy(*tensors(fp32, bf16, fp16), "normal", *replay, "stochastic", each=2)
    versus.axpy(*tensors(bf16, fp16), "rademacher", *(part[:2] for part in replay), each=1)
    thetas, spans = tensors(bf16, bf16)
    versus.axpy(
        thetas,
        spans,
        "normal",
        rounding="residual",
        residuals=[conformance.low_of(generator, t) for t in thetas],
    )
    lows = [conformance.low_of(generator, t) for t in thetas]
    versus.perturb(
        thetas, spans, "normal", [[conformance.out_like(t) for t in thetas] for _ in range(2)], residuals=lows
    )
    broken = torch.tensor([float("inf"), float("nan"), 3e38, 1.0] * 6).to(bf16)
    huge = torch.full((16,), torch.finfo(fp16).max, dtype=fp16)
    versus.axpy([filled(broken), filled(huge)], [Span(5), Span(6)], "normal", coeffs=[3e4])
    versus.axpy([filled(broken[:7])], [Span(5)], "normal", coeffs=[3e4])
    thetas, _ = tensors(bf16, fp32)
    for direction in ("normal", "rademacher"):
        versus.axpy(thetas, [Span(8, 2**33 + 40), Span(9, 8)], direction)
    low = filled(torch.randint(-(2**15), 2**15, (43,), generator=generator).to(torch.int16))
    versus.axpy(thetas[:1], [Span(8)], "normal", rounding="residual", residuals=[low])


# --- interpreted --------------------------------------------------------------------------------------------


def one_table() -> str | None:
    """A list that is used again finds its table on the device; the same list elsewhere does not."""
    mine, clock, coeffs = backend.Triton(), torch.zeros(1, dtype=torch.int64), torch.ones(2)
    theta = torch.ones(40)
    for t in (theta, theta, theta.clone()):
        mine.axpy_(
            Batch([t], [Span(1)]),
            Noise(conformance.resolve("normal"), 5, [(0, 0), (0, 1)], clock),
            Terms(coeffs),
        )
        clock += 1
    return (
        None
        if mine.tables.built == 3
        else f"{mine.tables.built} tables; expected one for each list and one for the names"
    )


def verdicts(directory: Path) -> dict[str, str | None]:
    """In the child: every check's verdict on the kernels, and few()'s on the right and on the wrong ones."""
    torch.set_num_threads(1)
    found = {"off": backend.why_off(), **conformance.run(backend.Triton(), "cpu", "quick", CHECKS)}
    found["one table"] = one_table()
    found |= conformance.run(backend.Triton(), "cpu", "quick", KEPT, conformance_kept.CHECKS)
    right = backend.elementwise
    for name, change in {"right": None, **WRONG}.items():
        backend.elementwise = changed(directory / re.sub(r"\W", "_", name), *change) if change else right
        try:
            few(backend.Triton())
            found[name] = None
        except AssertionError as problem:
            found[name] = str(problem)
    return found


CHILD = Interpreted(__file__)


@needs_fma
@pytest.mark.parametrize("check", ["off", *CHECKS, *KEPT, "right", "one table"])
def test_interpreted(interpreted, check: str) -> None:
    assert interpreted[check] is None, interpreted[check]


@needs_fma
@pytest.mark.parametrize("name", WRONG)
def test_interpreted_rejects(interpreted, name: str) -> None:
    print(interpreted[name])
    assert interpreted[name] is not None


# --- compiled -----------------------------------------------------------------------------------------------

# the kernels, and what their loop over units holds: units a thread, and of each the 16-byte loads, stores and
# at most so many instructions an element (sm_80 to sm_120, Triton 3.6 to 3.9)
ONE = dict(draw_count=1, each=1, draws=None, clock=None, control=None, DECAY=False, EACH=False, SCALED=False)
KERNELS: dict[str, tuple[str, dict, tuple[int, int, int, float] | None]] = {
    "axpy bf16": ("axpy", dict(DIRECTION=0, ROUNDING=0, KINDS=2, **ONE), (2, 1, 1, 25.4)),
    "axpy fp32": ("axpy", dict(DIRECTION=0, ROUNDING=0, KINDS=1, **ONE), (2, 2, 2, 26.4)),
    "axpy fp16": ("axpy", dict(DIRECTION=0, ROUNDING=0, KINDS=4, **ONE), (2, 1, 1, 25.4)),
    "axpy mixed K": (
        "axpy",
        dict(DIRECTION=0, ROUNDING=1, KINDS=7, DECAY=True, EACH=False, SCALED=False),
        None,
    ),
    "axpy replay": (
        "axpy",
        dict(DIRECTION=0, ROUNDING=1, KINDS=7, DECAY=False, EACH=True, SCALED=False),
        None,
    ),
    "axpy residual": ("axpy", dict(DIRECTION=0, ROUNDING=2, KINDS=2, **ONE), (2, 2, 2, 47)),
    "axpy rademacher": ("axpy", dict(DIRECTION=1, ROUNDING=0, KINDS=2, **ONE), (4, 1, 1, 8.6)),
    "axpy rademacher fp32": ("axpy", dict(DIRECTION=1, ROUNDING=0, KINDS=1, **ONE), (4, 2, 2, 8.7)),
    "perturb bf16": (
        "perturb",
        dict(DIRECTION=0, SIDES=2, JOIN=False, SCALED=False, KINDS=1 << 4, clock=None),
        (2, 1, 2, 26.7),
    ),
    "draw fp32": ("draw", dict(DIRECTION=0, SCALED=False, KINDS=1, clock=None), (2, 0, 2, 22.5)),
    "philox": ("philox", dict(ROUNDS=10, BLOCK=1024), None),
}
# the other kernels are compiled for sm_90 alone: a compilation takes a second or more
EVERYWHERE = ("axpy bf16", "axpy fp32", "axpy rademacher")
CASES = [
    (arch, name) for name in KERNELS for arch in sass.ARCHITECTURES if name in EVERYWHERE or arch == "90"
]


@pytest.fixture(scope="module")
def compiler(directory):
    """compiler(kernel, arch) -> (PTX, machine code), once each."""

    @cache
    def compile(name: str, arch: str, elementwise: ModuleType = backend.elementwise, fusion: bool = False):
        verb, constants, _ = KERNELS[name]
        if verb != "philox":
            block = backend.BLOCK[["normal", "rademacher"][constants["DIRECTION"]]]
            constants = constants | dict(BLOCK=block, TAIL=backend.TAIL, SPLIT=backend.SPLIT)
        asm = made(getattr(elementwise, verb), arch, constants, fusion).asm
        cubin = directory / f"{len(list(directory.iterdir()))}.cubin"
        cubin.write_bytes(asm["cubin"])
        return asm["ptx"], next(iter(sass.disassemble(cubin).values()))

    return compile


def arithmetic(code: list[sass.Instruction]) -> tuple[int, int, int]:
    """Float multiply-adds, products and sums; the packed forms of sm_100 count twice."""
    names = [i.name.split(".")[0] for i in code]
    fma, mul, add = (names.count(op) + 2 * names.count(op + "2") for op in ("FFMA", "FMUL", "FADD"))
    return fma, mul, add


def negations_are_sums() -> bool:
    """Triton 3.6 writes -x as 0 - x; there is one such x in a word."""
    return triton.__version__.startswith("3.6")


# of eight elements: four words of normal.h (16 fma, 7 mul, 1 add each), then one fma an element; float32 is
# watched by another
EXPECTED = {"axpy bf16": (4 * 16 + 8, 4 * 7, 4), "axpy fp32": (4 * 16 + 16, 4 * 7, 4)}


@pytest.mark.skipif(
    sass.tool("nvdisasm") is None, reason="nvdisasm not found: install triton or the CUDA binary utilities"
)
@pytest.mark.parametrize("arch, name", CASES, ids=lambda value: value.replace(" ", "_"))
def test_compiled(compiler, arch: str, name: str) -> None:
    """No spill, no forbidden instruction, 16-byte accesses, no shared memory for 16-bit types, a bounded
    instruction count."""
    text, function = compiler(name, arch)
    assert not unspecified(text)
    assert not forbidden(function) and not function.spilled()
    loop = KERNELS[name][2]
    if loop is None:
        return
    units, loads, stores, bound = loop
    body = sass.vector_loop(function, units * loads, units * stores)
    per_element = len(body) / 8 / units
    print(
        f"sm_{arch} {name}: {per_element:.1f} instructions an element, {function.registers} registers, "
        f"{arithmetic(body)}"
    )
    assert per_element <= bound
    # signs go from the lane that computed a block to those that need it; normals stay where they are
    if "rademacher" not in name:
        assert not [i.text for i in body if re.match("LDS|STS|BAR|LDSM|STSM|SHFL", i.name)]
    if name in EXPECTED:
        fma, mul, add = arithmetic(body)
        assert (fma, mul, add) == tuple(units * n for n in EXPECTED[name]) or (
            negations_are_sums() and (fma, mul, add - 4 * units) == tuple(units * n for n in EXPECTED[name])
        )


if sass.tool("nvdisasm") is not None:

    def test_compiled_rejects_approximation(compiler, tmp_path) -> None:
        """A reciprocal root from the hardware is found in PTX and in the machine code."""
        line = "y = (0x5F375800 - (square.to(tl.uint32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)"
        text, function = compiler(
            "axpy bf16", "90", changed(tmp_path / "approximate", "normal", line, "y = tl.rsqrt(square)")
        )
        assert unspecified(text) and "approximate function unit" in forbidden(function)

    def test_compiled_rejects_unfused(compiler, tmp_path) -> None:
        """A sum that is not one fma changes the count of float operations."""
        _, function = compiler("axpy bf16", "90", changed(tmp_path / "unfused", *WRONG["unfused sum"]))
        assert arithmetic(sass.vector_loop(function, 2, 2)) != tuple(2 * n for n in EXPECTED["axpy bf16"])

    def test_compiled_rejects_contraction(compiler) -> None:
        """With fusion on, products lose their .rn and a compiler is free to contract them."""
        text, _ = compiler("axpy bf16", "90", fusion=True)
        assert unspecified(text)

    def test_compiled_rejects_narrow_accesses(compiler, tmp_path) -> None:
        """Without the promise of alignment there is no 16-byte access, and the reader says so."""
        _, function = compiler(
            "axpy bf16",
            "90",
            changed(tmp_path / "narrow", "units", "(begin >> 1), 16)", "(begin >> 1), 4)"),
        )
        with pytest.raises(LookupError):
            sass.vector_loop(function, 2, 2)

    def test_compiled_rejects_a_block_a_unit(compiler, tmp_path) -> None:
        """A block of signs for every unit is over the bound."""
        line = (
            "w0, w1, w2, w3 = philox4x32(\n            "
            "((unit >> 4) + tl.arange(0, N // 16)).to(tl.uint32), who, step, draw, keys\n        )"
        )
        whole = line.replace("(unit >> 4) + tl.arange(0, N // 16)", "(unit + tl.arange(0, N)) >> 4")
        alone = "return (w0 + w1 + w2 + w3,)\n        w0, w1, w2, w3 = w0, w1, w2, w3"
        wrong = changed(tmp_path / "alone", "units", line, f"{whole}\n        {alone}")
        _, function = compiler("axpy rademacher", "90", wrong)
        assert len(sass.vector_loop(function, 4, 4)) / 32 > KERNELS["axpy rademacher"][2][3]


# --- executed -----------------------------------------------------------------------------------------------


class Executed:
    """Stands for the module `elementwise`: compiles what the backend launches, and runs its PTX thread by
    thread (ptx.py)."""

    def __init__(self, elementwise: ModuleType, arch: str) -> None:
        self.elementwise, self.arch, self.memory = elementwise, arch, {}

    def __getattr__(self, verb: str):
        return _Verb(self, getattr(self.elementwise, verb))


def step(machine, instruction, who, known=ptx._Machine.step) -> None:
    """_Machine.step, and the sum and the maximum over a warp that Triton reduces with."""
    if instruction.op not in ("redux.sync.add.s32", "redux.sync.max.s32"):
        return known(machine, instruction, who)
    target, source, _ = instruction.operands
    threads, add = np.arange(machine.count)[who], ".add." in instruction.op
    found = np.full(machine.count // 32, 0 if add else -(2**31), np.int32)
    (np.add if add else np.maximum).at(
        found, threads // 32, machine.registers[source][threads].view(np.int32)
    )
    machine.put(target, found.view(np.uint32)[threads // 32], who)


class _Verb:
    def __init__(self, owner: Executed, kernel) -> None:
        self.owner, self.kernel = owner, kernel

    def __getitem__(self, grid):
        def launch(*positional, num_warps, enable_fp_fusion, **named):
            given = dict(zip(self.kernel.arg_names, positional)) | named
            constants = {
                name: value
                for name, value in given.items()
                if name.isupper() or value is None or (name == "draw_count" and value == 1)
            }
            compiled = made(self.kernel, self.owner.arch, constants, enable_fp_fusion)
            arguments = [given[name] for name in self.kernel.arg_names if name not in constants]
            arguments = [one for a in arguments for one in (a if isinstance(a, tuple) else (a,))]
            arguments = [a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
            memory, shared = list(self.owner.memory.values()), compiled.metadata.shared
            ptx.run(compiled.asm["ptx"], None, grid[0], 32 * num_warps, arguments, memory, shared)

        return launch


class OnPtx(backend.Triton):
    """The backend as it would run on a GPU, on tensors in host memory."""

    def __init__(self, executed: Executed) -> None:
        super().__init__()
        self.executed = executed

    def _see(self, *groups) -> None:
        """A kernel may touch these tensors' memory and no other."""
        storages = [t.untyped_storage() for group in groups for t in group]
        arrays = {
            s.data_ptr(): torch.tensor([], dtype=torch.uint8).set_(s).numpy() for s in storages if s.nbytes()
        }
        self.executed.memory = arrays

    def draw(self, batch, noise):
        self._see(batch.tensors)
        super().draw(batch, noise)

    def axpy_(self, batch, noise, terms):
        self._see(batch.tensors, batch.residuals or ())
        return super().axpy_(batch, noise, terms)

    def perturb(self, batch, noise, scales, outs):
        self._see(batch.tensors, batch.residuals or (), *outs)
        super().perturb(batch, noise, scales, outs)


@pytest.fixture
def on_ptx(directory, monkeypatch):
    """on_ptx(arch, elementwise) -> a backend."""

    def make(arch: str, elementwise: ModuleType = backend.elementwise) -> OnPtx:
        executed = Executed(elementwise, arch)
        monkeypatch.setattr(ptx._Machine, "step", step)
        monkeypatch.setattr(backend, "elementwise", executed)
        monkeypatch.setattr(backend, "interpreted", lambda: False)
        mine = OnPtx(executed)
        mine.valid = Validator("triton", "cpu")
        return mine

    return make


def tiles(mine) -> None:
    """More than a program's first tile, and a length that ends inside a tile and inside a group."""
    generator, versus = torch.Generator().manual_seed(2), conformance.Versus(tiles, mine, "cpu", "quick")
    thetas = [
        conformance.theta_of(generator, (8192 + 1000 + 5,), dtype)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    versus.axpy(thetas, [Span(99, 2**34)] * 2, "normal", [(3, 1)], [1e-3], 0.99)
    thetas = [
        conformance.theta_of(generator, (8192 + 13,), dtype) for dtype in (torch.bfloat16, torch.float32)
    ]
    versus.axpy(thetas, [Span(99, 2**34 + 40)] * 2, "rademacher")


@pytest.mark.parametrize("arch", ("80", "90", "100"))
def test_executed_tiles(on_ptx, arch: str) -> None:
    tiles(on_ptx(arch))


def test_executed(on_ptx) -> None:
    """Every verb and rounding: what is loaded on a GPU is compared, not what an interpreter makes of the
    source."""
    few(on_ptx("90"))


def test_executed_control(on_ptx) -> None:
    """With one rounding: a decay is read, and a step stops, before any. The interpreter has all of them."""
    conformance_project.check_control_axpy(on_ptx("90"), scale="quick", roundings=("stochastic",))


def test_executed_philox(on_ptx) -> None:
    conformance.check_philox_known_answers(on_ptx("90"))


@pytest.mark.parametrize(
    "name", ("unfused sum", "unit past the end", "signs past the end", "byte of a block")
)
def test_executed_rejects(on_ptx, tmp_path, name: str) -> None:
    wrong = changed(tmp_path / re.sub(r"\W", "_", name), *WRONG[name])
    with pytest.raises((AssertionError, MemoryError)):
        tiles(on_ptx("90", wrong))


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    (directory / "verdicts.json").write_text(json.dumps(verdicts(directory)))
