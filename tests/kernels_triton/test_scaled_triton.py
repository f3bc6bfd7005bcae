"""Factors of z in triton_kernels without a GPU: interpreted and compared bit for bit, compiled and read.

As test_triton.py, with the compiler and the readers of tests/support/compiled.py. Wrong kernels are copies
with one line changed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import conformance
import conformance_scaled
import pytest
import sass
import torch
from conformance_update import states_of
from interpreted import Interpreted

from zokern.backends import Span

pytest.importorskip("triton")
from compiled import changed, forbidden, made, needs_fma, unspecified  # noqa: E402
from compiled import directory as directory  # noqa: E402, PLC0414

from zokern.backends import triton as backend  # noqa: E402

WRONG = {  # name: (file, text, replacement)
    "no factor in a unit": ("terms", "z_even, z_odd = z_even * f_even, z_odd * f_odd",
        "z_even = z_even * f_even"),
    "no factor in an element": ("terms", "z = z * scale", "z = z"),
    "both bytes of a mask": ("units", "odd = (half >> 8)", "odd = (half & 0xFF)"),
    "both halves of bfloat16": ("units", "odd = to_float(word & 0xFFFF0000)",
        "odd = to_float(word << 16)"),
    "both words of float32": ("units", "odd = to_float((wide >> 32).to(tl.uint32))",
        "odd = to_float(wide.to(tl.uint32))"),
    "factors of the first chunk": ("units", "here = (begin >> 1) + place", "here = place"),
    "the second half of a unit": ("terms", "from_word + (place + 2), mask, N, W)",
        "from_word + place, mask, N, W)"),
    "no factor is 0": ("units", "even = tl.full([N, W], 1.0", "even = tl.full([N, W], 0.0"),
    "an element's bfloat16": ("elements", "factor = bf16_to_float(", "factor = 2 * bf16_to_float("),
    "an element's place": ("elements", "tl.pointer_type(tl.uint8)) + place",
        "tl.pointer_type(tl.uint8)) + place * 0"),
    "the update's units": ("update", "f_even2, f_odd2, words, coefficient, 1",
        "f_even, f_odd, words, coefficient, 1"),
    "the update's elements": ("update", "z = z * scale", "z = z"),
    "no sign": ("update", "move = to_float(tl.where(ordinary, (bits & 0x80000000) | 0x3F800000, bits))",
        "move = g"),
}  # fmt: skip


def few(mine) -> None:
    """A small launch for each verb, chosen so that each of WRONG shows; raises AssertionError."""
    generator, versus = torch.Generator().manual_seed(1), conformance_scaled.Scaled(few, mine, "cpu", "quick")
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    thetas = [
        conformance.theta_of(generator, (43,), dtype)
        for dtype in (fp32, fp32, fp32, bf16, bf16, bf16, fp16, bf16)
    ]
    spans = [Span(70 + i, 8 * i) for i in range(len(thetas))]
    factors = conformance_scaled.factors_for(generator, thetas)
    versus.axpy(thetas, spans, "normal", factors, [(3, 1), (2, 0)], [1e-2, 0.3], 0.99)
    versus.update(thetas, spans, "sign", [], factors)
    long = conformance.theta_of(generator, (33_000,), bf16)
    versus.axpy(
        [long], [Span(5)], "normal", [conformance_scaled.factors_of(generator, (33_000,), torch.bool)]
    )
    versus.update(
        thetas[:3], spans[:3], "momentum", states_of(generator, "momentum", thetas[:3]), factors[:3]
    )


def verdicts(directory: Path) -> dict[str, str | None]:
    """In the child: every check's verdict on the kernels, and few()'s on the right and on the wrong ones."""
    torch.set_num_threads(1)
    found = conformance_scaled.run(backend.Triton(), "cpu", "quick")
    right = backend.elementwise, backend.update
    for name, change in {"right": None, **WRONG}.items():
        if change:
            module = changed(directory / re.sub(r"\W", "_", name), *change)
            backend.elementwise, backend.update = (
                module,
                sys.modules[module.__name__.replace("elementwise", "update")],
            )
        try:
            few(backend.Triton())
            found[name] = None
        except AssertionError as problem:
            found[name] = str(problem)
        backend.elementwise, backend.update = right
    return found


CHILD = Interpreted(__file__)


@needs_fma
@pytest.mark.parametrize("check", [*conformance_scaled.CHECKS, "right"])
def test_interpreted(interpreted, check: str) -> None:
    assert interpreted[check] is None, interpreted[check]


@needs_fma
@pytest.mark.parametrize("name", WRONG)
def test_interpreted_rejects(interpreted, name: str) -> None:
    print(interpreted[name])
    assert interpreted[name] is not None


# --- compiled -----------------------------------------------------------------------------------------------

ONE = dict(DIRECTION=0, draw_count=1, draws=None, clock=None, control=None, SCALED=True)
KERNELS = {
    "axpy bf16": ("axpy", dict(ROUNDING=0, KINDS=2, each=1, DECAY=False, EACH=False, **ONE)),
    "axpy fp32 stochastic": ("axpy", dict(ROUNDING=1, KINDS=1, each=1, DECAY=False, EACH=False, **ONE)),
    "perturb bf16": ("perturb",
        dict(DIRECTION=0, SIDES=2, JOIN=False, SCALED=True, KINDS=1 << 4, clock=None)),
    "sign bf16": ("update", dict(RULE=2, ROUNDING=0, KINDS=2, **ONE)),
}  # fmt: skip


@pytest.mark.skipif(
    sass.tool("nvdisasm") is None, reason="nvdisasm not found: install triton or the CUDA binary utilities"
)
@pytest.mark.parametrize("name", KERNELS)
def test_compiled(directory, name: str) -> None:
    """No spill and nothing inexact; nothing is fused that the definition rounds."""
    verb, constants = KERNELS[name]
    module = backend.update if verb == "update" else backend.elementwise
    sizes = dict(BLOCK=backend.BLOCK["normal"], TAIL=backend.TAIL, SPLIT=backend.SPLIT)
    asm = made(getattr(module, verb), "90", constants | sizes).asm
    cubin = directory / f"scaled{len(list(directory.iterdir()))}.cubin"
    cubin.write_bytes(asm["cubin"])
    function = next(iter(sass.disassemble(cubin).values()))
    print(f"{name}: {function.registers} registers, {len(function.code)} instructions")
    assert not unspecified(asm["ptx"]) and not function.spilled() and not forbidden(function)


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "verdicts.json").write_text(json.dumps(verdicts(directory)))


if __name__ == "__main__":
    main()
