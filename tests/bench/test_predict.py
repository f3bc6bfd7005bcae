"""The throughput model of benchmarks/predict.py: which pipe an instruction takes, what limits a loop, and a
kernel counted by hand."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import sass

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import predict  # noqa: E402

H200, A100 = predict.DEVICES[0], predict.DEVICES[2]


@pytest.fixture(scope="session")
def machine() -> dict[str, dict[str, sass.Function]]:
    return sass.machine_code()


@pytest.mark.parametrize(
    "name, pipe",
    [
        ("IMAD.WIDE.U32", "wide"), ("IMAD.HI.U32", "wide"), ("IMAD.MOV.U32", "heavy"),
        ("IMAD.SHL.U32", "heavy"), ("FFMA", "fma"),
        ("HFMA2.MMA", "fma"), ("FFMA2", "fma"), ("LOP3.LUT", "alu"), ("I2FP.F32.S32", "alu"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("I2F.U16", "xu"), ("MUFU.EX2", "xu"), ("POPC", "xu"), ("HMMA.16816.F32.BF16", "mma"),
        ("LDG.E.128", "other"), ("UIADD3", "other"), ("BRA", "other"),
    ],
)  # fmt: skip
def test_pipes(name, pipe) -> None:
    assert predict.pipe_of(name) == pipe


def test_an_unknown_instruction_is_an_error() -> None:
    with pytest.raises(LookupError, match="ZFROB.*PIPES"):
        predict.pipe_of("ZFROB.X")


@pytest.mark.skipif(sass.missing() is not None, reason=sass.missing() or "")
def test_every_instruction_of_the_tree_is_in_a_pipe(machine) -> None:
    for functions in machine.values():
        for function in functions.values():
            predict.Work.of((function.code, 1))


def clocks(device: predict.Device, **pipes: float) -> dict[str, float]:
    return predict.Work(Counter(pipes)).clocks(device)


def test_limits() -> None:
    """One kind of instruction after the other as the limit; a multiplier on the wrong pipe would move each of
    them."""
    assert clocks(H200, fma=10) == {"issue": 10, "alu": 0, "heavy": 0, "fma": 10, "xu": 0, "mma": 0}
    assert clocks(A100, fma=10)["fma"] == 20  # one pipe
    assert clocks(H200, wide=10)["heavy"] == 40 and clocks(H200, heavy=10)["heavy"] == 20
    assert clocks(H200, alu=10)["alu"] == 20 and clocks(H200, xu=10)["xu"] == 80
    assert clocks(H200, mma=10)["mma"] == 80 and clocks(predict.DEVICES[5], mma=10)["mma"] == 320
    assert clocks(H200, wide=2, heavy=1, fma=15)["fma"] == (8 + 2 + 30) / 2
    work = predict.Work(Counter(wide=10, other=5))
    time, limit = work.milliseconds(H200)
    assert limit == "heavy" and time == pytest.approx(40 * 1e9 / (128 * 132 * 1.755e9) * 1e3)


@pytest.mark.parametrize(
    "device, budget",
    list(zip(predict.DEVICES, (27.6, 39.5, 44.6, 19.5, 223, 178, 131))),
    ids=lambda value: str(value)[:30],
)
def test_budgets(device, budget) -> None:
    """Instructions per element under the floor of a bf16 pass, worked out by hand from the multiprocessors,
    clock and bandwidth."""
    assert device.budget(4) == pytest.approx(budget, rel=0.005)


KNOWN = """
extern "C" __global__ void known(float4* data, int turns) {
  float4* mine = data + blockIdx.x * 256 + threadIdx.x;
  #pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    float4 v = mine[turn * 4096];
    #pragma unroll
    for (int i = 0; i < 16; ++i)
      v.x = __fmaf_rn(v.x, v.y, v.z), v.y = __fmul_rn(v.y, v.x), v.z = __fadd_rn(v.z, v.y);
    mine[turn * 4096] = v;
  }
}
"""


@pytest.mark.skipif(sass.missing() is not None, reason=sass.missing() or "")
def test_a_kernel_counted_by_hand(tmp_path) -> None:
    """16 turns of an fma, a product and a sum: 48 on the fma pipes, one load, one store, one branch; few
    others."""
    (tmp_path / "known.cu").write_text(KNOWN)
    functions = sass.disassemble(
        sass.compile_to(tmp_path / "known.cubin", "90", source=tmp_path / "known.cu")
    )
    work = predict.loop_work(functions["known"], 1, 1)
    assert work.pipes["fma"] * predict.UNIT == 48 and work.pipes["xu"] == 0
    assert work.pipes["other"] * predict.UNIT >= 3 and 53 <= work.instructions * predict.UNIT <= 60
    time, limit = work.milliseconds(H200)
    assert limit == "issue" and time == pytest.approx(work.instructions * 1e9 / (128 * 132 * 1.755e9) * 1e3)
    assert work.milliseconds(A100)[1] == "fma"
    assert work.milliseconds(replace(H200, clock=2 * H200.clock))[0] == pytest.approx(time / 2)


@pytest.mark.skipif(sass.missing() is not None, reason=sass.missing() or "")
def test_the_table(machine) -> None:
    """A line for each case and device; K terms cost K times a term; the pass that the project is about is
    under its floor."""
    lines = predict.table(machine)
    assert sum("predicted, not measured" in line for line in lines) == len(predict.DEVICES)
    for case in predict.CASES:
        assert sum(line.startswith(f"{case.name} ") for line in lines) == len(predict.DEVICES)
    works = {case.name: case.work(machine["90"]) for case in predict.CASES}
    one, eight = works["axpy_ normal, 16 bits"], works[f"axpy_ normal K={predict.DRAWS}, 16 bits"]
    assert 0.8 < (eight.instructions - one.instructions) / (predict.DRAWS - 1) / one.instructions < 1.0
    assert works["axpy_ rademacher, 16 bits"].instructions < 8 < 23 < one.instructions < 25
    assert one.milliseconds(H200)[0] < 4e9 / 4.3e12 * 1e3
    assert works["axpy_ normal residual, bf16"].instructions > one.instructions + 8


# Figures in the headers of csrc/*.cu: instructions per element on sm_90, and the cases that count them.
HEADERS = {
    "elementwise.cu": {
        r"on sm_90: normal ([\d.]+) \(16-bit\), rademacher ([\d.]+)\.": (
            "perturb both signs normal, 16 bits", "perturb both signs rademacher, 16 bits",
        ),
    },
    "axpy.cu": {
        r"one term normal ([\d.]+) \(16-bit\) and ([\d.]+) \(float32\), rademacher ([\d.]+) and ([\d.]+)\.": (
            "axpy_ normal, 16 bits", "axpy_ normal, float32",
            "axpy_ rademacher, 16 bits", "axpy_ rademacher, float32",
        ),
    },
    "update.cu": {
        r"momentum normal ([\d.]+) \(16-bit\) and ([\d.]+) \(float32\)": (
            "update_ momentum normal, 16 bits", "update_ momentum normal, float32",
        ),
        r"adam normal ([\d.]+) and ([\d.]+), rademacher ([\d.]+) and": (
            "update_ adam normal, 16 bits", "update_ adam normal, float32",
            "update_ adam rademacher, 16 bits",
        ),
    },
}  # fmt: skip


def check_header(text: str, patterns: dict[str, tuple[str, ...]], counts: dict[str, float]) -> None:
    words = " ".join(line.removeprefix("//").strip() for line in text.splitlines() if line.startswith("//"))
    for pattern, cases in patterns.items():
        found = re.search(pattern, re.sub(r"\s+", " ", words))
        assert found, f"no figure like {pattern}"
        for said, case in zip(found.groups(), cases):
            assert abs(float(said) - counts[case]) < 0.051, (
                f"{case}: {said} in the header, {counts[case]} counted"
            )


@pytest.mark.skipif(sass.missing() is not None, reason=sass.missing() or "")
def test_headers_say_what_is_counted(machine) -> None:
    code = {name: one for functions in (machine, updates_of_h200()) for name, one in functions["90"].items()}
    counts = {case.name: case.work(code).instructions for case in (*predict.CASES, *predict.UPDATES)}
    for name, patterns in HEADERS.items():
        text = (sass.CSRC / name).read_text()
        check_header(text, patterns, counts)
        for figure in re.search(next(iter(patterns)), " ".join(text.replace("//", "").split())).groups():
            with pytest.raises(AssertionError, match="in the header"):
                check_header(text.replace(figure, f"{float(figure) + 0.3:.1f}"), patterns, counts)


def updates_of_h200() -> dict[str, dict[str, sass.Function]]:
    return sass.machine_code((sass.CSRC / "update.cu",), "updates", ("90",))
