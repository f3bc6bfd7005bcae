"""The machine code of csrc/lowrank.cu for every architecture that ships: registers, matrix units, 16-byte
accesses, instructions.

`PYTHONPATH=tests/support python tests/kernels_cuda/test_lowrank_sass.py`
prints them for every kernel and architecture.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sass

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import predict  # noqa: E402

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=sass.missing() or "")

SOURCE = sass.ROOT / "csrc" / "lowrank.cu"
ELEMENTS = 16  # of a lane in one turn of a loop: eight columns of two rows
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
# Instructions per element of the whole loop on sm_90, measured with nvcc 13.0, and what they may not exceed;
# the paths that count non-finite results are in it and do not run. A bf16 pass on an H200 stays under its
# memory floor up to 27.6, a float32 pass up to 55.
LIMITS = {
    BFLOAT16: {16: 9.5, 32: 10.5, 64: 10.0, 128: 11.75},
    FLOAT32: {16: 11.0, 32: 12.75, 64: 16.5, 128: 15.5},
}


@pytest.fixture(scope="session")
def machine() -> dict[str, dict[str, sass.Function]]:
    return sass.machine_code((SOURCE,), "products")


def kernel(
    functions: dict[str, sass.Function], kind: int, rank: int, simple: bool = True, whole: bool = True
) -> sass.Function:
    return sass.kernel(functions, sass.lowrank_symbol(kind, rank, simple, whole))


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_no_spills_and_nothing_inexact(machine, arch) -> None:
    """No local memory, approximation, flush to zero, double precision or call in any kernel; two blocks a
    multiprocessor where said."""
    assert len(machine[arch]) == 3 * 4 * 3 + 1
    for name, function in machine[arch].items():
        assert not function.spilled(), f"{name}: stack {function.stack}, local {function.local}"
        assert not function.forbidden(), f"{name}: {function.forbidden()}"
    for kind in (BFLOAT16, FLOAT16):
        for rank in (16, 32, 64, 128):
            assert kernel(machine[arch], kind, rank).registers <= 128


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_loops(machine, arch) -> None:
    """Every matrix product of a strip and no other; its left factor in whole matrices from shared memory,
    already split; 16-byte accesses of theta only: one a row, or two in float32."""
    for kind, by_rank in sass.SPLITS.items():
        for rank, terms in by_rank.items():
            for whole in (True, False):
                loop = sass.strip_loop(kernel(machine[arch], kind, rank, whole=whole))
                names = [i.name for i in loop]
                assert (
                    sum(n.startswith("HMMA.16816.F32.BF16") for n in names)
                    == 4 * rank // 16 * terms * (terms + 1) // 2
                )
                each = 4 if kind == FLOAT32 else 2
                assert sum(n.startswith("LDG") and ".128" in n for n in names) == each
                assert sum(n.startswith("STG") for n in names) == sum("STG.E.128" in n for n in names) == each
                assert sum(n == "LDSM.16.M88.4" for n in names) == rank // 16 * terms
                assert not any(re.match(r"(LDS\b|STS|SHFL|BAR)", n) for n in names)
                assert sum(n.startswith("F2FP") for n in names) == (0 if kind == FLOAT32 else 8)


def test_instructions_per_element(machine) -> None:
    for kind, limits in LIMITS.items():
        for rank, limit in limits.items():
            function = kernel(machine["90"], kind, rank)
            per_element = len(sass.strip_loop(function)) / ELEMENTS
            print(
                f"type {kind} rank {rank}: {per_element:.2f} instructions per element, {function.registers} "
                "registers"
            )
            assert per_element <= limit


def test_predicted_times(machine) -> None:
    """Every rank is bound by memory on an H200, and not where a matrix product takes four times as long."""
    cases = predict.PRODUCTS
    lines = predict.table(machine, predict.DEVICES[:1], cases)
    assert [line.split()[-1] for line in lines[-len(cases) :]] == ["memory"] * len(cases)
    slow = replace(predict.DEVICES[0], mma=4 * predict.DEVICES[0].mma)
    assert predict.table(machine, [slow], cases)[-1].endswith(" mma")
    for case in cases:
        function = kernel(machine["90"], case.kind, case.rank)
        terms = sass.SPLITS[case.kind][case.rank]
        work = case.work(machine["90"])
        assert work.instructions == len(sass.strip_loop(function)) / ELEMENTS
        assert work.pipes["mma"] == 4 * case.rank // 16 * terms * (terms + 1) // 2 / ELEMENTS


def test_the_checks_can_fail(machine, tmp_path) -> None:
    """One term more is seen by the count of products, narrow stores and a spill by theirs."""
    loop = sass.strip_loop(kernel(machine["90"], BFLOAT16, 32))
    assert sum(i.name.startswith("HMMA") for i in loop) != 4 * 2 * 6
    assert len(sass.strip_loop(kernel(machine["90"], FLOAT32, 16))) / ELEMENTS > LIMITS[BFLOAT16][16]
    text = SOURCE.read_text()
    text = text[: text.index("void start(void (*kernel)(Work)")]
    right = "return fragments > (simple_whole ? 8 : 5) ? 1 : 2;"
    assert right in text
    source = tmp_path / "lowrank.cu"
    kernel_64 = "template __global__ void lowrank_kernel<4, 3, Type::kFloat32, true, true>(const Work);"
    text = text.replace(right, "return fragments > 0 && simple_whole ? 4 : 2;")
    source.write_text(f"{text}{kernel_64}\n}}\n}}\n")
    functions = sass.disassemble(sass.compile_to(tmp_path / "crowded.cubin", "90", source=source))
    assert kernel(functions, FLOAT32, 64).spilled() and kernel(functions, FLOAT32, 64).forbidden()


def main() -> None:
    for arch, functions in sass.machine_code((SOURCE,), "products").items():
        for kind, by_rank in sass.SPLITS.items():
            for rank in by_rank:
                function = kernel(functions, kind, rank)
                per_element = len(sass.strip_loop(function)) / ELEMENTS
                spilled = "SPILLED" if function.spilled() else ""
                print(
                    f"sm_{arch:4} type {kind} rank {rank:3} {function.registers:4} registers "
                    f"{per_element:6.2f} /element {spilled}"
                )


if __name__ == "__main__":
    main()
