"""triton_kernels/update.py without a GPU: interpreted and compared bit for bit, compiled and read, executed
as PTX.

As test_triton.py. Wrong kernels are copies with one line changed.
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path

import conformance
import conformance_update
import pytest
import sass
import torch
from interpreted import Interpreted

from zokern.backends import Span

pytest.importorskip("triton")
from compiled import changed, forbidden, made, needs_fma, unspecified  # noqa: E402
from compiled import directory as directory  # noqa: E402

from zokern.backends import triton as backend  # noqa: E402

# The conformance checks that are interpreted here; the others vary what elementwise.py does for this verb, or
# what reaches no kernel
CHECKS = ("update_sizes", "update_strides", "update_roots", "update_large", "update_clock", "update_empty")
NORMAL, RADEMACHER = 0, 1
MOMENTUM, ADAM, SIGN = 0, 1, 2

WRONG = {  # name: (file, text, replacement)
    "the old momentum": ("update", "    move = m\n", "    move = theta\n"),
    "unfused momentum": ("update", "m = tl.fma(tl.load(scalars + 3), g, ",
        "m = tl.load(scalars + 3) * g + (" ),
    "fused square": ("update", "tl.fma(tl.load(scalars + 5), g * g,", "tl.fma(tl.load(scalars + 5) * g, g,"),
    "a reciprocal": ("update", "tl.div_rn(m, ", "m * tl.div_rn(1.0, "),
    "no eps": ("update", "tl.load(scalars + 8)", "tl.load(scalars + 8) * 0.0"),
    "v not stored": ("update", "store_state(v, place, mask, v_even, v_odd)",
        "store_state(v, place, mask, v_even, m_odd)"),
    "v of an element not stored": ("update", "tl.store(v + i, second, mask=mask)",
        "tl.store(v + i, first, mask=mask)"),
    "states in theta's layout": ("update", "m = pointer(tl.load(entry + OUT), begin, FLOAT32)",
        "m = pointer(tl.load(entry + OUT), 0, FLOAT32)"),
    "the second half of a float32 unit": ("update", "g_even2, g_odd2, random", "g_even, g_odd, random"),
    "one coefficient": ("update", "coefficient = tl.load(coefficients + k)",
        "coefficient = tl.load(coefficients)"),
}  # fmt: skip


def few(mine) -> None:
    """A small launch for each rule, chosen so that each of WRONG shows; raises AssertionError."""
    generator, versus = (
        torch.Generator().manual_seed(1),
        conformance_update.Updates(few, mine, "cpu", "quick"),
    )
    for rule in conformance_update.RULES:
        thetas = [conformance.theta_of(generator, (43,), dtype) for dtype in (torch.float32, torch.bfloat16)]
        states = conformance_update.states_of(generator, rule, thetas)
        versus.update(thetas, [Span(77), Span(78, 16)], rule, states, draws=conformance_update.DRAWS)
    # the states of a second chunk, element by element
    long = conformance.theta_of(generator, (40_000,), torch.float32, offset=1)
    versus.update(
        [long], [Span(5, 3)], "momentum", conformance_update.states_of(generator, "momentum", [long])
    )


def verdicts(directory: Path) -> dict[str, str | None]:
    """In the child: every check's verdict on the kernels, and few()'s on the right and on the wrong ones."""
    torch.set_num_threads(1)
    found = conformance_update.run(backend.Triton(), "cpu", "quick", CHECKS)
    right = backend.update
    for name, change in {"right": None, **WRONG}.items():
        folder = directory / re.sub(r"\W", "_", name)
        backend.update = (
            sys.modules[changed(folder, *change).__name__.replace("elementwise", "update")]
            if change
            else right
        )
        try:
            few(backend.Triton())
            found[name] = None
        except AssertionError as problem:
            found[name] = str(problem)
    return found


CHILD = Interpreted(__file__)


@needs_fma
@pytest.mark.parametrize("check", [*CHECKS, "right"])
def test_interpreted(interpreted, check: str) -> None:
    assert interpreted[check] is None, interpreted[check]


@needs_fma
@pytest.mark.parametrize("name", WRONG)
def test_interpreted_rejects(interpreted, name: str) -> None:
    print(interpreted[name])
    assert interpreted[name] is not None


# --- compiled -----------------------------------------------------------------------------------------------

ONE = dict(draw_count=1, draws=None, clock=None, control=None, SCALED=False)
# the kernels, and what their loop over units holds: units a thread, of each the 16-byte accesses, and
# instructions an element
KERNELS: dict[str, tuple[dict, tuple[int, int, float]]] = {
    "momentum bf16": (dict(DIRECTION=NORMAL, RULE=MOMENTUM, ROUNDING=0, KINDS=2, **ONE), (2, 3, 35.5)),
    "adam bf16": (dict(DIRECTION=NORMAL, RULE=ADAM, ROUNDING=0, KINDS=2, **ONE), (2, 5, 74.0)),
    "adam fp32": (dict(DIRECTION=NORMAL, RULE=ADAM, ROUNDING=0, KINDS=1, **ONE), (2, 6, 71.0)),
    "sign bf16": (dict(DIRECTION=NORMAL, RULE=SIGN, ROUNDING=0, KINDS=2, **ONE), (2, 1, 34.0)),
    "momentum rademacher": (
        dict(DIRECTION=RADEMACHER, RULE=MOMENTUM, ROUNDING=0, KINDS=2, **ONE),
        (4, 3, 17.5),
    ),
}
CASES = [(arch, name) for name in KERNELS for arch in ("80", "90") if name == "adam bf16" or arch == "90"]


@pytest.fixture(scope="module")
def compiler(directory):
    """compiler(kernel, arch) -> (PTX, machine code), once each."""

    @cache
    def compile(name: str, arch: str, module=backend.update, fusion: bool = False):
        constants = KERNELS[name][0]
        block = backend.BLOCK[["normal", "rademacher"][constants["DIRECTION"]]]
        asm = made(
            module.update, arch, constants | dict(BLOCK=block, TAIL=backend.TAIL, SPLIT=backend.SPLIT), fusion
        ).asm
        cubin = directory / f"update{len(list(directory.iterdir()))}.cubin"
        cubin.write_bytes(asm["cubin"])
        return asm["ptx"], next(iter(sass.disassemble(cubin).values()))

    return compile


def unnamed(text: str, adam: bool) -> set[str]:
    """As unspecified(), and Adam's two operations."""
    return {name for name in unspecified(text) if not (adam and name in ("div.rn.f32", "sqrt.rn.f32"))}


@pytest.mark.skipif(
    sass.tool("nvdisasm") is None, reason="nvdisasm not found: install triton or the CUDA binary utilities"
)
@pytest.mark.parametrize("arch, name", CASES, ids=lambda value: value.replace(" ", "_"))
def test_compiled(compiler, arch: str, name: str) -> None:
    """No spill, nothing inexact, 16-byte accesses, a bounded instruction count; Adam's approximations are
    those of root and quotient."""
    text, function = compiler(name, arch)
    adam = name.startswith("adam")
    assert not unnamed(text, adam) and not function.spilled()
    found = [t for texts in forbidden(function).values() for t in texts]
    slow = r"CALL\.REL\.NOINC `\(\$\S*(sqrt|div)_rn\w*slowpath\)"
    allowed = rf"(@!?U?P\w+ +)?(MUFU\.(RSQ|RCP) |FCHK |{slow}|F(MUL|ADD|FMA|SETP)\S*\.FTZ)"
    assert not [t for t in found if not (adam and re.match(allowed, t))]
    units, accesses, bound = KERNELS[name][1]
    body = sass.vector_loop(function, units * accesses, units * accesses)
    per_element = len(body) / 8 / units
    print(f"sm_{arch} {name}: {per_element:.1f} instructions an element, {function.registers} registers")
    assert per_element <= bound
    quotients = sum(i.name.startswith("FCHK") for i in body)
    assert quotients == (8 * units if adam else 0)


if sass.tool("nvdisasm") is not None:

    def test_compiled_rejects_approximation(compiler, tmp_path) -> None:
        line = ("update", "tl.div_rn(m, ", "tl.fdiv(m, ")
        wrong = sys.modules[
            changed(tmp_path / "approximate_update", *line).__name__.replace("elementwise", "update")
        ]
        text, function = compiler("adam bf16", "90", wrong)
        assert unnamed(text, True) and sum(i.name.startswith("FCHK") for i in function.code) == 0


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "verdicts.json").write_text(json.dumps(verdicts(directory)))


if __name__ == "__main__":
    main()
