"""The machine code of csrc/elementwise.cu and axpy.cu for every architecture that ships: what it must have,
must not have, and how much.

`PYTHONPATH=tests/support python tests/kernels_cuda/test_sass.py`
prints registers and instructions per element for every kernel and architecture.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import sass

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=sass.missing() or "")

NORMAL, RADEMACHER = 0, 1
NEAREST, STOCHASTIC, RESIDUAL = 0, 1, 2
UNIT = 8  # elements of one turn of a loop

# Instructions of the whole loop per element, the most of any architecture that ships, with nvcc 13.0. A bf16
# pass on an H200 stays under its memory floor up to 27.6 (4 bytes per element at 4.3 TB/s).
PLAIN_16_BIT, PLAIN_FLOAT32 = 24.75, 24.125
TERM, EIGHT_TERMS = 21.25, {NEAREST: 176.4, STOCHASTIC: 185}  # 176.4 is 5.95 ms for 1e9 weights on an H200
STEP = {NEAREST: 23.75, STOCHASTIC: 31.25}
SIGNS = {
    ("axpy", 1, 1): 7.2,
    ("axpy", 2, 2): 6.1,
    ("draw", 0, 1): 3.9,
    ("draw", 0, 2): 3.5,
    ("perturb", 1, 2): 8.0,
    ("perturb", 2, 4): 6.6,
}


@pytest.fixture(scope="session")
def machine() -> dict[str, dict[str, sass.Function]]:
    return sass.machine_code()


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_no_spills_and_nothing_inexact(machine, arch) -> None:
    """No local memory, approximation, flush to zero, double precision or call in any kernel; float sums are
    FADD, FMUL, FFMA."""
    for name, function in machine[arch].items():
        assert not function.spilled(), f"{name}: stack {function.stack}, local {function.local}"
        assert not function.forbidden(), f"{name}: {function.forbidden()}"
        limit = 80 if re.search(r"perturb_kernel|RoundingE[12]E|RoundingE0ELNS0_3SumE[23]E", name) else 64
        limit = 128 if re.search(r"RoundingE[12]ELNS0_3SumE[23]E", name) else limit  # many terms, many steps
        if "scaled_" in name:  # with factors of z
            limit = 128 if re.search(r"SumE2E|RoundingE1E", name) else 80
        assert 0 < function.registers <= limit, (
            f"{name}: {function.registers} registers; {65536 // 256 // limit} blocks must fit"
        )


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_vector_loops(machine, arch) -> None:
    """The loops over whole units exist for 16-bit types and float32, with 16-byte accesses only."""
    for direction in (NORMAL, RADEMACHER):
        plain = sass.kernel(machine[arch], sass.symbol("axpy", direction, NEAREST))
        sass.vector_loop(plain, loads=1, stores=1)
        sass.vector_loop(plain, loads=2, stores=2)
        sass.vector_loop(
            sass.kernel(machine[arch], sass.symbol("axpy", direction, STOCHASTIC)), loads=1, stores=1
        )
        sass.vector_loop(
            sass.kernel(machine[arch], sass.symbol("axpy", direction, STOCHASTIC, sass.TERMS)),
            loads=2,
            stores=2,
        )
        sass.vector_loop(
            sass.kernel(machine[arch], sass.symbol("axpy", direction, RESIDUAL)), loads=2, stores=2
        )


def test_arithmetic_of_the_normal_loop(machine) -> None:
    """Exactly the operations that normal.h writes, so nothing was fused: 4 words, and one fma per element for
    the sum."""
    loop = sass.vector_loop(sass.kernel(machine["90"], sass.symbol("axpy", NORMAL, NEAREST)), 1, 1)
    assert sass.arithmetic(loop) == {"FFMA": 4 * 16 + UNIT, "FMUL": 4 * 7, "FADD": 4}


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_instructions_per_element(machine, arch) -> None:
    plain = sass.kernel(machine[arch], sass.symbol("axpy", NORMAL, NEAREST))
    for accesses, limit in ((1, PLAIN_16_BIT), (2, PLAIN_FLOAT32)):
        per_element = len(sass.vector_loop(plain, accesses, accesses)) / UNIT
        print(f"{plain.name[:60]}: {per_element} instructions per element, {plain.registers} registers")
        assert per_element <= limit
    for (verb, loads, stores), limit in SIGNS.items():
        signs = sass.kernel(machine[arch], sass.symbol(verb, RADEMACHER, NEAREST if verb == "axpy" else None))
        per_element = sass.per_lane(signs, loads, stores) / UNIT
        print(f"{signs.name[:60]}: {per_element:.2f} instructions per element of a tile")
        assert per_element <= limit


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_instructions_of_many_terms(machine, arch) -> None:
    """A further term of a sum, eight terms with all that is around them, and the decay of a single term."""
    for rounding in (NEAREST, STOCHASTIC):
        kernel = sass.kernel(machine[arch], sass.symbol("axpy", NORMAL, rounding, sass.TERMS))
        terms = sass.many(kernel)
        each = {"FFMA": 4 * (4 * 16 + UNIT), "FMUL": 4 * 4 * 7, "FADD": 4 * 4}
        assert sass.arithmetic(terms.four) == {name: terms.units * count for name, count in each.items()}
        assert not [i.text for i in terms.four if i.name.startswith(("LDG", "STG", "BAR"))]
        eight = per_element(terms.instructions(8))
        print(f"sm_{arch}: {terms.term():.2f} a term, K = 8: {eight:.1f}, {kernel.registers} registers")
        assert terms.term() <= TERM and eight <= EIGHT_TERMS[rounding]
    decayed = sass.kernel(machine[arch], sass.symbol("axpy", NORMAL, NEAREST, sass.DECAYED_TERM))
    assert len(sass.vector_loop(decayed, 1, 1)) / UNIT <= PLAIN_16_BIT + 1


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_instructions_of_steps(machine, arch) -> None:
    """A step of a replay in 16 bits (a decay, one term, a rounding), and eight steps with all that is around
    them."""
    for rounding in (NEAREST, STOCHASTIC):
        kernel = sass.kernel(machine[arch], sass.symbol("axpy", NORMAL, rounding, sass.STEPS))
        steps = sass.many(kernel)
        assert sass.arithmetic(steps.four) == {
            "FFMA": 4 * (4 * 16 + UNIT),
            "FMUL": 4 * (4 * 7 + UNIT),
            "FADD": 4 * 4,
        }
        assert not [i.text for i in steps.four if i.name.startswith(("LDG", "STG", "BAR"))]
        eight = per_element(steps.instructions(8))
        print(f"sm_{arch}: {steps.term():.2f} a step, 8 steps: {eight:.1f}, {kernel.registers} registers")
        assert steps.term() <= STEP[rounding] and eight <= 8 * steps.term() + 5


def per_element(instructions: list[tuple[list[sass.Instruction], float]]) -> float:
    return sum(len(code) * often for code, often in instructions)


# The checks above reject what they are for.


REDUNDANT = (
    "[&](float (&z)[kUnit]) { signs(byte, z); }",
    "[&](float (&z)[kUnit]) { values<Direction::kRademacher>(byte, name, keys, z); }",
)


ANEW = (
    ("const Name name(term->name);", "const Name name(place.who, term->step, term->name.x, keys);"),
    ("const Name name(term->name), ", "const Name name(place.who, term->step, term->name.x, keys), "),
)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory) -> dict[str, sass.Function]:
    """Fast math, tiles whose lanes compute a block for every unit, and names of terms made anew for every
    unit: one compilation, of the six kernels that are read here."""
    folder = tmp_path_factory.mktemp("mistaken")
    walk = (sass.CSRC / "walk.h").read_text()
    assert REDUNDANT[0] in walk
    (folder / "walk.h").write_text(walk.replace(*REDUNDANT))
    (folder / "terms.h").write_text((sass.CSRC / "terms.h").read_text())  # it includes walk.h
    axpy = (sass.CSRC / "axpy.cu").read_text()
    for right, wrong in ANEW:
        assert right in axpy
        axpy = axpy.replace(right, wrong)
    body = axpy[: axpy.index("template <Direction kDirection, Rounding kRounding>\nvoid axpy_along")]
    arguments = "const List, const Draw*, const float*, int32_t, int32_t, Draw, unsigned long long*"
    kernels = "".join(
        f"template __global__ void axpy_kernel<Direction::k{chosen}>({arguments});\n"
        for chosen in (
            "Rademacher, Rounding::kNearest, Sum::kTerm",
            "Normal, Rounding::kNearest, Sum::kTerm",
            *(
                f"Normal, Rounding::k{r}, Sum::k{s}"
                for r in ("Nearest", "Stochastic")
                for s in ("Terms", "Steps")
            ),
        )
    )
    (folder / "axpy.cu").write_text(f"{body}{kernels}}}\n}}\n")
    cubin = sass.compile_to(folder / "mistaken.cubin", "90", "-use_fast_math", source=folder / "axpy.cu")
    return sass.disassemble(cubin)


def test_terms_limit_can_fail(machine, mistaken) -> None:
    """Names made anew for every unit are over the limits of a term and of eight, and a kernel of one term has
    no such loops."""
    with pytest.raises(LookupError):
        sass.many(sass.kernel(machine["90"], sass.symbol("axpy", NORMAL, NEAREST)))
    for rounding in (NEAREST, STOCHASTIC):
        terms = sass.many(sass.kernel(mistaken, sass.symbol("axpy", NORMAL, rounding, sass.TERMS)))
        assert terms.term() > TERM and per_element(terms.instructions(8)) > EIGHT_TERMS[rounding]


def test_steps_limit_can_fail(mistaken) -> None:
    """The same of a step."""
    for rounding in (NEAREST, STOCHASTIC):
        steps = sass.many(sass.kernel(mistaken, sass.symbol("axpy", NORMAL, rounding, sass.STEPS)))
        assert steps.term() > STEP[rounding]


def test_fast_math_is_rejected(mistaken) -> None:
    normal = sass.kernel(mistaken, sass.symbol("axpy", NORMAL, NEAREST))
    assert "flush to zero" in normal.forbidden()


WRONG = {
    "approximate function unit": "out[i] = __sinf(out[i]);",
    "flush to zero": 'asm("add.rn.ftz.f32 %0, %0, %0;" : "+f"(out[i]));',
    "double precision": "out[i] = (float)((double)out[i] * 0.1 + 0.3);",
    "local memory (a spill or an indexed register)": (
        "volatile float x[9]; x[i % 9] = out[i]; out[i] = x[(i + 1) % 9];"
    ),
    "call": "out[i] = out[i] / out[i + 1];",
}


def test_forbidden_instructions_are_found(tmp_path) -> None:
    source = tmp_path / "wrong.cu"
    names = {why: f"wrong{i}" for i, why in enumerate(WRONG)}
    bodies = "".join(
        f'extern "C" __global__ void {names[why]}(float* out) {{ const int i = threadIdx.x; {body} }}\n'
        for why, body in WRONG.items()
    )
    for head, body in {
        "right(float* out)": "out[threadIdx.x] = __fmaf_rn(out[0], out[1], out[2]);",
        "narrow(float* out, int n)": "for (int i = 0; i < n; ++i) out[i] += 1.0f;",
        "fused(float* out)": "out[0] = out[1] * out[2] + out[3];",
    }.items():
        bodies += f'extern "C" __global__ void {head} {{ {body} }}\n'
    source.write_text(bodies)
    functions = sass.disassemble(sass.compile_to(tmp_path / "wrong.cubin", "90", "-fmad=true", source=source))
    for why, name in names.items():
        assert why in functions[name].forbidden(), f"{why}: {[i.text for i in functions[name].code]}"
    assert functions["wrong3"].spilled()
    assert not functions["right"].forbidden() and not functions["right"].spilled()
    with pytest.raises(LookupError):
        sass.vector_loop(functions["narrow"], 1, 1)
    assert sass.arithmetic(functions["fused"].code) == {"FFMA": 1, "FMUL": 0, "FADD": 0}


def test_instruction_limit_can_fail(machine) -> None:
    """The residual loop does more work than the plain limit allows; the counter sees it."""
    loop = sass.vector_loop(
        sass.kernel(machine["90"], sass.symbol("axpy", NORMAL, STOCHASTIC, sass.DECAYED_TERM)), 1, 1
    )
    assert len(loop) / UNIT > PLAIN_16_BIT and sass.arithmetic(loop)["FMUL"] > 0


def test_tile_limit_can_fail(machine, mistaken) -> None:
    """A tile whose lanes compute a block for every unit is over the limit, and a kernel without tiles has
    none to count."""
    with pytest.raises(LookupError):
        sass.per_lane(sass.kernel(machine["90"], sass.symbol("axpy", NORMAL, NEAREST)), 1, 1)
    signs = sass.kernel(mistaken, sass.symbol("axpy", RADEMACHER, NEAREST))
    assert sass.per_lane(signs, 1, 1) / UNIT > 1.5 * SIGNS["axpy", 1, 1]  # more than fast math could change


def test_an_older_module_is_not_read(tmp_path) -> None:
    """A module from before the last change of any header would hide that change."""
    module, sources = tmp_path / "module.so", set().union(*map(sass.included, sass.SOURCES))
    expected = {
        "elementwise.cu",
        "axpy.cu",
        "terms.h",
        "walk.h",
        "elementwise.h",
        "philox.h",
        "instances.def",
    }
    assert expected <= {path.name for path in sources}
    changed = max(path.stat().st_mtime for path in sources)
    module.write_bytes(b"not a module")
    os.utime(module, (changed - 1, changed - 1))
    assert sass.shipped(sass.SOURCES, "kernels", tmp_path / "old", module) == {}
    os.utime(module, (changed + 1, changed + 1))
    with pytest.raises(subprocess.CalledProcessError):  # it is read now
        sass.shipped(sass.SOURCES, "kernels", tmp_path / "new", module)


def main() -> None:
    for arch, functions in sass.machine_code().items():
        for name, function in sorted(functions.items()):
            counts = []
            for loads in (0, 1, 2):
                for stores in (1, 2, 4):
                    for count, mark in (
                        (lambda *a: len(sass.vector_loop(*a)), ""),
                        (sass.per_lane, " tiled"),
                    ):
                        try:
                            counts.append(
                                f"{loads}+{stores}: {count(function, loads, stores) / UNIT:.2f}{mark}"
                            )
                        except LookupError:
                            pass
            spilled = "SPILLED" if function.spilled() else ""
            print(
                f"sm_{arch:4} {name[14:60]:46} {function.registers:3} registers  {', '.join(counts)} "
                f"{spilled}"
            )


if __name__ == "__main__":
    main()
