"""The machine code and the PTX of csrc/update.cu: registers, 16-byte accesses, instructions, and what root
and quotient are made of.

`PYTHONPATH=tests/support python tests/kernels_cuda/test_update_sass.py`
prints registers and instructions per element for every kernel and architecture.
"""

from __future__ import annotations

import re
import sys

import conformance_update
import pytest
import sass
from cuda_backends import OnPtx

sys.path.insert(0, str(sass.ROOT))
from benchmarks import predict  # noqa: E402

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=sass.missing() or "")

SOURCE = sass.ROOT / "csrc" / "update.cu"
UNIT = 8
NORMAL, RADEMACHER = 0, 1
MOMENTUM, ADAM, SIGN = 0, 1, 2
STATES = {MOMENTUM: 1, ADAM: 2, SIGN: 0}
NEAREST, STOCHASTIC, RESIDUAL = 0, 1, 2
# Instructions of the whole loop per element, one term, the most of any architecture that ships, with nvcc
# 13.0: 16 bits, float32. What is only run for operands beyond the range of the fast root and quotient is in
# it. Memory leaves time for 83 (momentum, bf16, 12 B) and 138 (adam, 20 B) on an H200.
LIMITS = {
    (NORMAL, SIGN): (34.5, 34.5),
    (NORMAL, MOMENTUM): (34.5, 33.0), (NORMAL, ADAM): (67.5, 66.5), (RADEMACHER, MOMENTUM): (22.0, 20.5),
    (RADEMACHER, ADAM): (54.5, 53.5),
}  # fmt: skip
# three and two blocks of 256 threads a multiprocessor; two with factors of z
REGISTERS = {MOMENTUM: 80, ADAM: 128, SIGN: 80}

# A correctly rounded root starts from MUFU.RSQ, a quotient from MUFU.RCP; FCHK sends the operands that this
# cannot do to a subroutine
SLOW_PATHS = r"\$__internal_\d+_\$__cuda_sm\w+_(sqrt|div)_rn\w*_slowpath"


@pytest.fixture(scope="session")
def machine() -> dict[str, dict[str, sass.Function]]:
    return sass.machine_code((SOURCE,), "updates")


def loop(
    functions: dict[str, sass.Function], direction: int, rule: int, rounding: int, float32: bool
) -> list[sass.Instruction]:
    """The loop over whole units: theta, m and, for adam, v are read and written, in 16 bytes each."""
    accesses = (2 if float32 else 1) + 2 * STATES[rule]
    return sass.vector_loop(
        sass.kernel(functions, sass.update_symbol(direction, rule, rounding)), accesses, accesses
    )


def inexact(function: sass.Function, adam: bool) -> list[str]:
    """Forbidden instructions that are no part of a correctly rounded root or quotient."""
    found = [text for texts in function.forbidden().values() for text in texts]
    allowed = rf"MUFU\.(RSQ|RCP) |FCHK |CALL.REL.NOINC `\({SLOW_PATHS}\)|F(MUL|ADD|FMA|SETP)\S*\.FTZ"
    return [text for text in found if not (adam and re.match(allowed, re.sub(r"^@!?U?P\w+\s+", "", text)))]


TWO_A_ROOT = ["FMUL.FTZ"] * (2 * UNIT)  # products that the root's range check keeps exact


def flushing(functions: dict[str, sass.Function], direction: int) -> list[str]:
    """The instructions of Adam's loop that flush subnormal numbers to zero."""
    return [i.name for i in loop(functions, direction, ADAM, NEAREST, False) if ".FTZ" in i.name]


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_no_spills_and_nothing_inexact(machine, arch: str) -> None:
    """No local memory, double precision, approximation; in Adam's kernels, as many roots and quotients as
    elements are unrolled."""
    assert len(machine[arch]) == 36
    for name, function in machine[arch].items():
        rule = int(re.search(r"4RuleE(\d)", name)[1])  # type: ignore[index]
        assert not function.spilled(), f"{name}: stack {function.stack}, local {function.local}"
        assert not inexact(function, rule == ADAM), f"{name}: {inexact(function, rule == ADAM)}"
        assert 0 < function.registers <= (128 if "scaled_" in name else REGISTERS[rule]), (
            f"{name}: {function.registers} registers"
        )
        if rule == ADAM:
            quotients, calls = (
                sum(i.name.startswith(n) for i in function.code) for n in ("FCHK", "CALL.REL")
            )
            assert quotients == 4 * UNIT, (
                f"{name}: {quotients} quotients; three loops and one piece have {UNIT} each"
            )
            assert 2 * quotients <= calls
    for direction in (NORMAL, RADEMACHER):
        assert flushing(machine[arch], direction) == TWO_A_ROOT


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_instructions_per_element(machine, arch: str) -> None:
    for (direction, rule), limits in LIMITS.items():
        for float32, limit in zip((False, True), limits):
            per_element = len(loop(machine[arch], direction, rule, NEAREST, float32)) / UNIT
            print(
                f"sm_{arch}, direction {direction}, rule {rule}, {'float32' if float32 else '16 bits'}: "
                f"{per_element}"
            )
            assert per_element <= limit
            loop(machine[arch], direction, rule, STOCHASTIC, float32)
        # bfloat16 and its low bits move as a float32 does
        loop(machine[arch], direction, rule, RESIDUAL, True)


def test_arithmetic_of_momentum(machine) -> None:
    """The operations of normal.h and update.h and no other: one fma for g, one product and one fma for m, the
    same for theta."""
    counts = sass.arithmetic(loop(machine["90"], NORMAL, MOMENTUM, NEAREST, True))
    assert counts == {
        "FFMA": 4 * 16 + 3 * UNIT + UNIT,
        "FMUL": 4 * 7 + 2 * UNIT,
        "FADD": 4,
    }  # the last fma watches for inf and NaN


def test_limits_can_fail(machine) -> None:
    assert len(loop(machine["90"], NORMAL, MOMENTUM, STOCHASTIC, False)) / UNIT > LIMITS[NORMAL, MOMENTUM][0]
    assert inexact(sass.kernel(machine["90"], sass.update_symbol(NORMAL, ADAM, NEAREST)), adam=False)


def test_fast_math_is_rejected(tmp_path) -> None:
    """Of Adam's first kernel alone, which compiles in a fraction of the time."""
    text = SOURCE.read_text()
    body = text[: text.index("template <Direction kDirection>\nauto* update_of")]
    arguments = "const List, const Draw*, const float*, int32_t, Draw, const float*, unsigned long long*"
    chosen = "Direction::kNormal, Rule::kAdam, Rounding::kNearest"
    kernel = f"template __global__ void update_kernel<{chosen}>({arguments});"
    (tmp_path / "one.cu").write_text(f"{body}{kernel}\n}}\n}}\n")
    for flags, right in (((), True), (("-use_fast_math",), False)):
        functions = sass.disassemble(
            sass.compile_to(tmp_path / "one.cubin", "90", *flags, source=tmp_path / "one.cu")
        )
        assert (flushing(functions, NORMAL) == TWO_A_ROOT) is right


def test_predicted_to_be_bound_by_memory(machine) -> None:
    """On an H200, where the model leaves momentum and Adam less than their floor for instructions; not with a
    quarter of the bytes."""
    h200 = predict.DEVICES[0]
    lines = predict.table(machine, [h200], predict.UPDATES)
    assert sum(line.endswith(" memory") for line in lines) == len(predict.UPDATES)
    for case in predict.UPDATES:
        work = case.work(machine["90"])
        function = sass.kernel(machine["90"], sass.update_symbol(case.direction, case.rule, case.rounding))
        assert work.instructions == len(sass.vector_loop(function, case.accesses, case.accesses)) / UNIT
        assert work.milliseconds(h200)[0] > case.traffic / 4 * 1e9 / (h200.bandwidth * 1e12) * 1e3


# PTX --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def text() -> str:
    return sass.device_text((SOURCE,), "updates")


@pytest.mark.parametrize("check", ["update_sizes", "update_roundings", "update_roots", "update_clock"])
def test_ptx_is_the_reference(text: str, check: str) -> None:
    conformance_update.CHECKS[check](OnPtx(text), "cpu", "quick")


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("div.rn.f32", "mul.rn.f32", "AssertionError"),
        ("div.rn.f32", "div.full.f32", "contract or flush"),
        ("sqrt.rn.f32", "sqrt.approx.f32", "contract or flush"),
    ],
)
def test_wrong_ptx_is_rejected(text: str, right: str, wrong: str, complaint: str) -> None:
    assert right in text
    problem = conformance_update.run(OnPtx(text.replace(right, wrong)), "cpu", "quick", ["update_roots"])[
        "update_roots"
    ]
    assert problem is not None and complaint in problem


def main() -> None:
    for arch, functions in sass.machine_code((SOURCE,), "updates").items():
        for name, function in sorted(functions.items()):
            direction, rule, rounding = (int(n) for n in re.findall(r"E(\d)E", name)[:3])
            counts = [
                f"{len(loop(functions, direction, rule, rounding, wide)) / UNIT:.2f}"
                for wide in (False, True)
                if rounding < 2 or wide
            ]
            spilled = "SPILLED" if function.spilled() or inexact(function, rule == ADAM) else ""
            print(
                f"sm_{arch:4} {name[32:84]:52} {function.registers:3} registers  {' '.join(counts)} {spilled}"
            )


if __name__ == "__main__":
    main()
