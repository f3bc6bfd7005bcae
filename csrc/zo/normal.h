// normal.h: direction `normal`, one Philox word to one Box-Muller pair, eight normals a block
//
// math     of a word x: u = ((x mod 2^20) + 1/2) 2^-20, phi = pi int32(x) 2^-31, r = sqrt(-2 ln u),
//          z = (r sin phi, r cos phi). All 32 bits choose the angle, and the low 20 bits choose the radius
//          too. The top 12 bits choose one of 4096 sectors, and the low 20 bits run through it. So both
//          values stay equidistributed
// order    element 8 b + 2 j is r sin phi and 8 b + 2 j + 1 is r cos phi of word j of block b (consecutive
//          mapping)
// quality  `make quality` measures it over all 2^32 words. docs/stream.md has the figures
// work     16 fma, 7 mul, 1 add, 2 int-to-float, 4 integer operations a word; no division, no square root, no
//          table, no libm
// equal    the same bits from every compiler and device, with nothing but the operations of portable.h, in
//          this order
// source   Box and Muller 1958. The polynomials are minimax fits of this project over the whole range,
//          without range reduction
#pragma once

#include "portable.h"

namespace zo {

constexpr int kNormalPerBlock = 8;

// r = sqrt(-2 ln u) for the low 20 bits of a word. The absolute error of r^2 is below 1.4e-4, the relative
// error of the root below 3e-5.
ZO_FN float normal_radius(uint32_t word) {
  // The bits of 2^23 + n as a float, minus 2^23 - 1/2, are n + 1/2 exactly, without a conversion.
  const float f = add_rn(as_float(insert_bits(word, 0xfffffu, 0x4b000000u)), -8388607.5f);
  const uint32_t bits = as_bits(f);
  // log2 f = bits 2^-23 - 127 + g(m) with g(m) = log2 m - (m - 1).
  // The exponent comes from the integer, and g from a polynomial.
  const float m = as_float(insert_bits(bits, 0x7fffffu, 0x3f800000u));
  float p = 0x1.cf6f9ap-4f;
  p = fma_rn(p, m, -0x1.c9e934p-1f);
  p = fma_rn(p, m, 0x1.784dfep+1f);
  p = fma_rn(p, m, -0x1.10631ep+2f);
  p = fma_rn(p, m, 0x1.9bc3dcp+7f);
  const float square = fma_rn(from_int(static_cast<int32_t>(bits)), -0x1.62e430p-23f, p);  // -2 ln u > 0
  // The reciprocal square root comes from the bit pattern. Then one third-order step, r = s (1 - e)^(-1/2),
  // is fused with the product.
  const float y = as_float(0x5f375800u - (as_bits(square) >> 1));
  const float s = mul_rn(square, y);
  const float e = fma_rn(-s, y, 1.0f);
  const float h = mul_rn(fma_rn(e, 0x1.80a102p-2f, 0x1.008f72p-1f), e);
  return fma_rn(s, h, s);
}

// sin and cos of pi int32(word) 2^-31 on the full circle. Their absolute errors are below 6e-6 and 4.1e-5.
ZO_FN void normal_angle(uint32_t word, float& sine, float& cosine) {
  const float t = mul_rn(from_int(static_cast<int32_t>(word)), 0x1p-31f);
  const float q = mul_rn(t, t);
  float p = 0x1.06404ep-4f;
  p = fma_rn(p, q, -0x1.29e97ap-1f);
  p = fma_rn(p, q, 0x1.45779ep+1f);
  p = fma_rn(p, q, -0x1.4aa654p+2f);
  p = fma_rn(p, q, 0x1.921d96p+1f);
  sine = mul_rn(p, t);
  float c = 0x1.6d2c2ep-3f;
  c = fma_rn(c, q, -0x1.499d3ep+0f);
  c = fma_rn(c, q, 0x1.02b198p+2f);
  c = fma_rn(c, q, -0x1.3bb258p+2f);
  cosine = fma_rn(c, q, 0x1.fffabcp-1f);
}

ZO_FN void normal_pair(uint32_t word, float& even, float& odd) {
  const float r = normal_radius(word);
  float sine, cosine;
  normal_angle(word, sine, cosine);
  even = mul_rn(r, sine);
  odd = mul_rn(r, cosine);
}

}  // namespace zo
