"""triton_kernels/lowrank.py without a GPU: interpreted in a child process, and compiled for four
architectures and read.

With factors that are small integers every sum is exact and the conformance suite holds bit for bit; with
random ones the bound of lowrank_bound.py. Wrong kernels are the file with one line changed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import conformance
import lowrank_bound
import pytest
import sass
import torch
from interpreted import Interpreted

from zokern.backends import Batch, Noise, Outer, Span

triton = pytest.importorskip("triton")

from compiled import needs_fma  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from zokern.backends import triton as backend  # noqa: E402

if not hasattr(backend, "lowrank"):
    pytest.skip(f"backend 'triton' is off: {backend.why_off()}", allow_module_level=True)

SOURCE = Path(backend.lowrank.__file__)  # of the right kernels: wrong ones take their place in the backend

# name: (text, replacement); none leaves the memory of its tensors, which no one guards in the interpreter
WRONG = {
    "a term forgotten": ("total = dot(a1, b0, total, EXACT)", "total = total"),
    "first row of a tile": ("at = row * stride + column", "at = begin * stride + column"),
    "padding not zero": ("mask=mask, other=0.0)", "mask=mask, other=1.0)"),
    "last row": ("mask = (i < rows - start)[:, None]", "mask = (i < rows - start - 1)[:, None]"),
    "edge of the columns": ("ends // 8", "(ends - 8) // 8"),
    "decay after": ("scale, old * decay)", "scale * decay, old * decay)"),
    "column of an element": ("j = number - i * n", "j = number * 0"),
    "nobody counts": ("count += tl.sum(broken, axis=1)", "count += tl.sum(broken, axis=1) * 0"),
}


def whole(mine) -> None:
    """Aligned matrices of several tiles, ragged in both directions, in every padded rank."""
    generator = torch.Generator().manual_seed(3)
    for m, n, rank in ((9, 24, 16), (130, 136, 5), (15, 40, 128)):
        thetas, expected, factors = [], [], []
        for dtype in conformance.DTYPES:
            start = conformance.weights((m, n), dtype, generator)
            thetas.append(start)
            expected.append(start.clone())
            factors.append(conformance.factors_of(generator, m, n, rank))
        lefts, rights = ([pair[side] for pair in factors] for side in (0, 1))
        spans = [Span(1)] * 3
        for decay in (1.0, 0.5):
            counts = [
                one.lowrank_(
                    Batch(tensors, spans, "stochastic"),
                    Outer(lefts, rights, [0.25] * 3, decay),
                    Noise(None, 1, [(2, 0)]),
                )
                for one, tensors in ((mine, thetas), (conformance.Reference(), expected))
            ]
            conformance.equal(counts[0], counts[1], f"{m} x {n}, rank {rank}, count")
            for got, right in zip(thetas, expected):
                conformance.equal(got, right, f"{m} x {n}, rank {rank}, {got.dtype}")


CHECKS = tuple(
    check for check in conformance.LOWRANK if check != "lowrank_arithmetic"
)  # 90 launches, which are interpreted slowly


def problem(mine, checks=("lowrank_firsts", "lowrank_special")) -> str | None:
    with conformance.small_integers():
        for check in checks:
            if found := conformance.run(mine, "cpu", "quick", [check])[check]:
                return found
        try:
            whole(mine)
        except AssertionError as error:
            return str(error)
    for dtype in conformance.DTYPES:
        share = lowrank_bound.share(mine, "cpu", (70, 104), 16, dtype)
        if not 0 < share <= 1:
            return f"{share:.1f} times the bound, {dtype}"
    return None


def changed(directory: Path, name: str, old: str, new: str) -> ModuleType:
    """triton_kernels/lowrank.py with a text replaced, as a module beside the right one."""
    text = SOURCE.read_text()
    assert old in text, f"lowrank.py has no {old!r}"
    path = directory / f"{re.sub(r'[^a-z]', '_', name)}.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{backend.triton_kernels.__name__}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def verdicts(directory: Path) -> dict[str, str | None]:
    """In the child: every check's verdict, and problem() of the right and of the wrong kernels."""
    torch.set_num_threads(1)
    mine = backend.Triton()
    found: dict[str, str | None] = {"off": backend.why_off()}
    with conformance.small_integers():
        found |= conformance.run(mine, "cpu", "quick", CHECKS)
    for rank in (1, 32, 64, 128):
        for dtype in conformance.DTYPES:
            share = lowrank_bound.share(mine, "cpu", (70, 104), rank, dtype)
            found[f"bound {rank} {dtype}"] = None if 0 < share <= 1 else f"{share:.2f} times the bound"
    found["right"] = problem(mine, ())
    right = backend.lowrank
    for name, change in WRONG.items():
        backend.lowrank = changed(directory, name, *change)
        found[name] = problem(mine)
    backend.lowrank = right
    return found


CHILD = Interpreted(__file__)


BOUNDS = [f"bound {rank} {dtype}" for rank in (1, 32, 64, 128) for dtype in conformance.DTYPES]


@needs_fma
@pytest.mark.parametrize("check", ["off", *CHECKS, *BOUNDS, "right"])
def test_interpreted(interpreted, check: str) -> None:
    assert interpreted[check] is None, interpreted[check]


@needs_fma
@pytest.mark.parametrize("name", WRONG)
def test_interpreted_rejects(interpreted, name: str) -> None:
    print(interpreted[name])
    assert interpreted[name] is not None


# --- compiled -----------------------------------------------------------------------------------------------

TYPES = {
    "entries": "*i64", "tiles": "*i64", "frames": "*i64", "factors": "*i64", "nonfinite": "*i64",
    "decay": "fp32", "step": "i32",
    "keys": ("i32",) * 20,
}  # fmt: skip
UNITS = {"80": "HMMA", "90": "HGMMA", "100": "UTCHMMA", "120": "HMMA"}
# instructions per element of the loop over row blocks, measured with triton 3.9, and what they may not exceed
LIMITS = {"80": (24, 140), "90": (17, 60), "100": (23, 30), "120": (24, 140)}  # bfloat16, float32


def compiled(
    kernel, arch: str, constants: dict[str, int | None], warps: int, cubin: Path
) -> tuple[sass.Function, object]:
    constants = constants | {"clock": None, "control": None}
    signature = {
        argument: "constexpr" if argument in constants else TYPES[argument] for argument in kernel.arg_names
    }
    source = triton.compiler.ASTSource(kernel, signature, constants)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)
    cubin.write_bytes(made.asm["cubin"])
    return next(iter(sass.disassemble(cubin).values())), made.metadata


def forbidden(function: sass.Function) -> dict[str, list[str]]:
    """What sass.py forbids; sm_100's matrix memory comes with calls to traps that its own check of
    allocations may take."""
    found = {
        why: [t for t in texts if "tcgen05_guardrail_trap" not in t]
        for why, texts in function.forbidden().items()
    }
    return {why: texts for why, texts in found.items() if texts}


def product(arch: str, kind: int, rank: int, cubin: Path) -> tuple[sass.Function, object]:
    bm, bn = backend.TILES[rank][kind == 0]
    constants = dict(
        ROUNDING=0,
        KINDS=1 << kind,
        OUTSIDE=False,
        JOIN=False,
        RANK=rank,
        WHOLE=True,
        EXACT=False,
        BM=bm,
        BN=bn,
    )
    return compiled(backend.lowrank.product, arch, constants, backend.PRODUCT_WARPS, cubin)


needs_sass = pytest.mark.skipif(
    sass.tool("nvdisasm") is None or backend.interpreted(),
    reason="nvdisasm not found, or TRITON_INTERPRET=1 is set",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@needs_sass
@pytest.mark.parametrize("rank", [16, 32, 64, 128])
@pytest.mark.parametrize("arch", LIMITS)
def test_compiled(arch: str, rank: int, tmp_path) -> None:
    """No spill, matrix units, 16-byte accesses of theta, shared memory for the smallest device, a bounded
    instruction count."""
    for kind, width in ((4, 2), (0, 4)):
        function, metadata = product(arch, kind, rank, tmp_path / "x.cubin")
        names = [i.name for i in function.code]
        bm, bn = backend.TILES[rank][kind == 0]
        elements = bm * bn // (32 * backend.PRODUCT_WARPS)  # of a thread
        assert not function.spilled() and not forbidden(function), forbidden(function)
        assert metadata.shared <= 99 << 10
        assert any(n.startswith(UNITS[arch]) for n in names)
        assert (
            sum(n.startswith("STG") for n in names)
            == sum("STG.E.128" in n for n in names)
            == elements * width // 16
        )
        loop = next(
            body
            for body in function.loops()
            if sum(i.name.startswith("STG") for i in body) == elements * width // 16
        )
        print(
            f"sm_{arch} kind {kind} rank {rank}: {len(loop) / elements:.1f} instructions per element, "
            f"{function.registers} registers"
        )
        assert len(loop) / elements <= LIMITS[arch][kind == 0]


@needs_sass
def test_compiled_elements(tmp_path) -> None:
    constants = dict(ROUNDING=1, KINDS=0b10001, OUTSIDE=False, JOIN=False, EXACT=False, BLOCK=backend.TAIL)
    function, _ = compiled(backend.lowrank.element, "90", constants, backend.WARPS, tmp_path / "x.cubin")
    assert not function.spilled() and not function.forbidden()


@needs_sass
def test_compiled_rejects_narrow_accesses(tmp_path, monkeypatch) -> None:
    """Without the promise of alignment there is no 16-byte store."""
    promise = "theta = tl.multiple_of(typed(tl.load(entry), TYPE) + at, 16)"
    narrow = changed(tmp_path, "narrow", promise, "theta = typed(tl.load(entry), TYPE) + at")
    monkeypatch.setattr(backend, "lowrank", narrow)
    function, _ = product("90", 4, 16, tmp_path / "x.cubin")
    assert not any("STG.E.128" in i.name for i in function.code)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    (directory / "verdicts.json").write_text(json.dumps(verdicts(directory)))
