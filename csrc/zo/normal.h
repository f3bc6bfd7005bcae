// normal.h: direction `normal`, one Philox word to one Box-Muller pair, eight normals a block
//
// math     word x: u = ((x mod 2^20) + 1/2) 2^-20, phi = pi int32(x) 2^-31, r = sqrt(-2 ln u); z = (r sin phi, r cos phi).
//          All 32 bits choose the angle, the low 20 the radius: the top 12 bits pick one of 4096 sectors and the low 20 sweep
//          inside it, so no bit is masked off twice and both values stay equidistributed.
// order    element 8 b + 2 j is r sin phi and 8 b + 2 j + 1 is r cos phi of word j of block b (consecutive mapping)
// quality  over all 2^32 words (`make quality`; the figures stand in docs/stream.md)
// work     16 fma, 7 mul, 1 add, 2 int-to-float, 4 integer operations a word; no division, no square root, no table, no libm
// equal    the same bits from every compiler and device: only the operations of portable.h, in this order
// source   Box and Muller 1958; polynomials: minimax fits of this project over the whole range, so there is no range reduction
#pragma once

#include "portable.h"

namespace zo {

constexpr int kNormalPerBlock = 8;

// r = sqrt(-2 ln u) for the low 20 bits of a word; absolute error of r^2 below 1.4e-4, relative error of the root below 3e-5.
ZO_FN float normal_radius(uint32_t word) {
  // 2^23 + n read as a float, less 2^23 - 1/2: n + 1/2, exactly, without a conversion
  const float f = add_rn(as_float(insert_bits(word, 0xfffffu, 0x4b000000u)), -8388607.5f);
  const uint32_t bits = as_bits(f);
  // log2 f = bits 2^-23 - 127 + g(m), g(m) = log2 m - (m - 1): the exponent comes from the integer, g from a polynomial
  const float m = as_float(insert_bits(bits, 0x7fffffu, 0x3f800000u));
  float p = 0x1.cf6f9ap-4f;
  p = fma_rn(p, m, -0x1.c9e934p-1f);
  p = fma_rn(p, m, 0x1.784dfep+1f);
  p = fma_rn(p, m, -0x1.10631ep+2f);
  p = fma_rn(p, m, 0x1.9bc3dcp+7f);
  const float square = fma_rn(from_int(static_cast<int32_t>(bits)), -0x1.62e430p-23f, p);  // -2 ln u > 0 for all 2^20 n
  // reciprocal square root from the bit pattern, then one third-order step fused with the product: r = s (1 - e)^(-1/2)
  const float y = as_float(0x5f375800u - (as_bits(square) >> 1));
  const float s = mul_rn(square, y);
  const float e = fma_rn(-s, y, 1.0f);
  const float h = mul_rn(fma_rn(e, 0x1.80a102p-2f, 0x1.008f72p-1f), e);
  return fma_rn(s, h, s);
}

// sin and cos of pi int32(word) 2^-31 on the full circle; absolute error below 6e-6 and 4.1e-5.
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
