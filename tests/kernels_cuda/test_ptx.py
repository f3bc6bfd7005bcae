"""The PTX that nvcc makes of csrc/elementwise.cu and axpy.cu, run by ptx.py: bit for bit the reference, and
no access out of place.

This is the device side of the source (cvt.rn, the packed watch for inf and NaN, 16-byte accesses), which the
host build replaces. What remains unseen is ptxas and the chip; test_sass.py reads what ptxas made.
"""

from __future__ import annotations

import re
from fractions import Fraction

import conformance
import conformance_scaled
import numpy as np
import ptx
import pytest
import sass
import torch
from cuda_backends import OnPtx

from zokern.backends import Span


@pytest.fixture(scope="session")
def text() -> str:
    """PTX of csrc/elementwise.cu and axpy.cu, as it ships."""
    if reason := sass.missing():
        pytest.skip(reason)
    return sass.device_text()


CHECKS = ("philox_known_answers", "draw_sizes", "axpy_sizes", "axpy_firsts", "perturb_sizes", "axpy_strides",
    "perturb_rows",
          "axpy_many_draws", "axpy_stochastic", "axpy_residual", "axpy_special", "tiles",
          "clock")  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_ptx_is_the_reference(text, check) -> None:
    conformance.CHECKS[check](OnPtx(text), "cpu", "quick")


def test_blocks_share_a_chunk(text) -> None:
    conformance.CHECKS["axpy_sizes"](OnPtx(text, parts_log2=1), "cpu", "quick")


def test_replay(text) -> None:
    """Steps of two terms, across the 32 that a warp makes ready at a time, in whole units and in pieces."""
    generator = torch.Generator().manual_seed(5)
    versus = conformance.Versus(test_replay, OnPtx(text), "cpu", "quick")
    draws, coeffs, decays = conformance.replay(generator, 34, 2)
    thetas = [conformance.theta_of(generator, (19,), dtype) for dtype in (torch.bfloat16, torch.float16)]
    versus.axpy(thetas, [Span(5, 8), Span(6, 16)], "normal", draws, coeffs, decays, "stochastic", each=2)
    versus.axpy(thetas, [Span(5, 8), Span(6, 16)], "rademacher", draws[:2], coeffs[:2], [1.0, 0.9], each=1)
    versus.axpy(thetas, [Span(5, 8), Span(6, 16)], "normal", draws, coeffs, 2 * decays, "stochastic", each=1)
    versus.axpy(thetas, [Span(5, 8), Span(6, 16)], "normal", draws, coeffs, [0.9], "stochastic", each=34)


def test_factors(text) -> None:
    """Factors of z: 8 bytes of a mask at a time, 16 of other factors, in units and in pieces."""
    generator = torch.Generator().manual_seed(5)
    versus = conformance_scaled.Scaled(test_factors, OnPtx(text), "cpu", "quick")
    for offset, direction in ((0, "normal"), (3, "rademacher")):
        dtypes = [dtype for dtype in conformance.DTYPES for _ in range(2)]
        thetas = [conformance.theta_of(generator, (21,), dtype, offset) for dtype in dtypes]
        spans = [Span(40 + i, 8 * i + offset) for i in range(len(thetas))]
        factors = conformance_scaled.factors_for(generator, thetas, offset, offset)
        versus.axpy(thetas, spans, direction, factors)
        versus.axpy(thetas, spans, direction, factors, [(3, 1), (2, 0)], [1e-2, 0.3], 0.99, "stochastic")
        versus.draw([conformance.out_like(t, offset=offset) for t in thetas], spans, direction, factors)
        versus.perturb(
            thetas,
            spans,
            direction,
            [[conformance.out_like(t, offset=offset) for t in thetas]],
            factors,
            (0.1,),
        )


def rejected(text: str, check: str) -> str:
    return conformance.run(OnPtx(text), "cpu", "quick", [check])[check] or ""


def test_wrong_ptx_is_rejected(text) -> None:
    """By values, by an address outside of every tensor or off its alignment, by an operation that ptxas may
    fuse or flush."""
    swapped = re.sub(r"cvt\.rn\.bf16x2\.f32 (\s*%\w+), (%\w+), (%\w+)", r"cvt.rn.bf16x2.f32 \1, \3, \2", text)
    assert "AssertionError" in rejected(swapped, "axpy_sizes")
    polynomial = text.replace("0f3DE7B7CD", "0f3DE7B7CE")
    assert polynomial != text and "AssertionError" in rejected(polynomial, "draw_sizes")
    shifted = re.sub(r"(st\.global\.v4\.[uf]32 \s*\[%rd\d+)(\+16)?\]", r"\1+1073741824]", text)
    assert "MemoryError" in rejected(shifted, "axpy_sizes")
    misaligned = re.sub(r"(ld\.global\.v4\.[uf]32 [^;]*\[%rd\d+)\]", r"\1+4]", text)
    assert "not aligned" in rejected(misaligned, "axpy_sizes")
    # without the minimum of rounding.h the random bits carry a NaN over the sign
    overflowing = re.sub(r"min\.s32 (\s*%r\d+), (%r\d+), 2143289344;", r"mov.b32 \1, \2;", text)
    assert overflowing != text and "AssertionError" in rejected(overflowing, "axpy_special")
    assert "contract or flush" in rejected(text.replace("fma.rn.f32", "fma.rn.ftz.f32"), "draw_sizes")
    assert "contract or flush" in rejected(text.replace("mul.rn.f32", "mul.f32"), "draw_sizes")


def small(body: str, registers: str = ".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<9>;") -> str:
    body = f"{registers} ld.param.u64 %rd1, [k_param_0]; {body} ret;"
    return f".visible .entry k(.param .u64 k_param_0)\n{{ {body} }}"


def test_interpreter_fma_rounds_once() -> None:
    """Where a product in float64 rounded twice would be wrong: 1 + 2^-24 + a tail too small for float64."""
    data = np.array([1 + 2.0**-12, 1 - 2.0**-12, 2.0**-24, 2.0**-60, 1.0, 1 + 2.0**-23], np.float32)
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(20000).astype(np.float32) for _ in range(3))
    a, b, c = (np.concatenate([x, np.roll(data, i)]) for i, x in enumerate((a, b, c)))
    c[::3] *= np.float32(2.0**-20)
    got = ptx.f32(ptx.fma(ptx.bits(a), ptx.bits(b), ptx.bits(c)))
    for x, y, z, result in list(zip(a, b, c, got))[-3000:]:
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = [result, np.nextafter(result, np.float32(np.inf)), np.nextafter(result, np.float32(-np.inf))]
        assert all(abs(Fraction(float(result)) - exact) <= abs(Fraction(float(n)) - exact) for n in near)


def test_interpreter_refuses() -> None:
    array = np.zeros(4, np.uint32)
    with pytest.raises(NotImplementedError, match="contract"):
        ptx.run(small("add.f32 %r1, %r1, %r1;"), "k", 1, 1, [array])
    with pytest.raises(NotImplementedError, match="sin.approx"):
        ptx.run(small("sin.approx.f32 %r1, %r1;"), "k", 1, 1, [array])
    with pytest.raises(MemoryError, match="none of the arrays"):
        ptx.run(small("st.global.u32 [%rd1+16], %r1;"), "k", 1, 1, [array])
    with pytest.raises(MemoryError, match="not aligned"):
        ptx.run(small("st.global.u32 [%rd1+2], %r1;"), "k", 1, 1, [array])


def test_interpreter_knows_a_nan() -> None:
    """setp.nan and setp.num of every thread's own value: inf, a NaN, 0 and a finite number."""
    array = np.array([0x7F800000, 0x7FC00001, 0, 0x3F800000] * 2, np.uint32)
    for compare, expected in (("nan", [0, 1, 0, 0]), ("num", [1, 0, 1, 1])):
        given = array.copy()
        body = f"""
        mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; ld.global.u32 %r2, [%rd3];
        setp.{compare}.f32 %p1, %r2, %r2; selp.b32 %r3, 1, 0, %p1; st.global.u32 [%rd3], %r3;
        """
        ptx.run(small(body), "k", 1, 4, [given])
        assert given[:4].tolist() == expected and given[4:].tolist() == array[4:].tolist()


def test_interpreter_meets_again_after_divergence() -> None:
    """Odd threads take a detour; all add their number; a loop runs tid times."""
    array = np.zeros(64, np.uint32)
    body = """
    mov.u32 %r1, %tid.x; mov.u32 %r2, 0; mov.u32 %r3, 0;
    $L: setp.ge.u32 %p1, %r3, %r1; @%p1 bra $E; add.s32 %r2, %r2, %r3; add.s32 %r3, %r3, 1; bra.uni $L;
    $E: mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; atom.global.add.u32 %r4, [%rd3], %r2;
    """
    ptx.run(small(body), "k", 1, 64, [array])
    assert array.tolist() == [i * (i - 1) // 2 for i in range(64)]
