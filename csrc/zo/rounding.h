// rounding.h: float32 to the weights' type and back: nearest, stochastic, and the residual split
//
// math     nearest     round to nearest, ties to even
//          stochastic  (|x| + r) cut towards zero. r is uniform over the discarded bits, from 16 bits of the
//                      stream. E[result] = x to 2^-16 of a unit in the last place, also for subnormal results
//          residual    x <-> (nearest bfloat16 with ties away from zero, int16 low bits). This is a
//                      bijection, so both together are an exact float32
// special  inf stays inf, and overflow becomes inf. A NaN stays a NaN, and its payload may change
// equal    integers only, so the same bits everywhere, with and without flush-to-zero. The AVX512-BF16
//          conversion instruction is not used here, because it flushes subnormals
#pragma once

#include "portable.h"

namespace zo {

enum class Rounding : int32_t { kNearest = 0, kStochastic = 1, kResidual = 2 };

ZO_FN float bf16_to_float(uint16_t half) { return as_float(static_cast<uint32_t>(half) << 16); }

ZO_FN uint16_t bf16_nearest(float value) {
  const uint32_t x = as_bits(value);
  if ((x & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((x >> 16) | 0x40u);
  return static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
}

// `value` is a result of arithmetic, and `random` is 16 uniform bits.
ZO_FN uint16_t bf16_stochastic(float value, uint32_t random) {
  // The low half of an infinity is 0, so `random` never carries out of it. Only a NaN is a special case.
#if defined(__CUDA_ARCH__)
  // Arithmetic of a GPU makes one NaN only, the largest integer.
  // So one minimum replaces a comparison and a selection.
  return static_cast<uint16_t>((static_cast<uint32_t>(min(__float_as_int(value), 0x7fc00000)) + random) >>
                               16);
#else
  return static_cast<uint16_t>((value != value ? 0x7fc00000u : as_bits(value) + random) >> 16);
#endif
}

ZO_FN float residual_join(uint16_t high, int16_t low) {
  return as_float((static_cast<uint32_t>(high) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low)));
}

ZO_FN uint16_t residual_split(float value, int16_t& low) {
  const uint32_t x = as_bits(value);
  if ((x & 0x7fffffffu) >= 0x7f800000u) {  // inf and NaN stay inf and NaN
    low = 0;
    return static_cast<uint16_t>((x >> 16) | ((x & 0x7fffffffu) > 0x7f800000u ? 0x40u : 0u));
  }
  low = static_cast<int16_t>(x & 0xffffu);
  return static_cast<uint16_t>((x + 0x8000u) >> 16);
}

ZO_FN float fp16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 31u) return as_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0u) return as_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
  // A subnormal is fraction 2^-24, which is exact in float32.
  const float magnitude = mul_rn(from_int(static_cast<int32_t>(fraction)), 0x1p-24f);
  return as_float(sign | as_bits(magnitude));
}

// |x| rounded to float16: |x| + offset(shift), cut.
// offset(shift) is added to the `shift` bits that are discarded.
struct Fp16Cut {
  uint32_t sign, magnitude, shift, rebias;
};

ZO_FN Fp16Cut fp16_cut(uint32_t x) {
  Fp16Cut cut;
  cut.sign = (x >> 16) & 0x8000u;
  const uint32_t a = x & 0x7fffffffu;
  const uint32_t exponent = a >> 23;
  if (exponent >= 113u) {  // a normal float16 or an overflow loses 13 bits
    cut.magnitude = a;
    cut.shift = 13u;
    cut.rebias = 112u << 10;
  } else {  // a subnormal float16, in units of 2^-24, loses 126 - exponent bits; the leading one is explicit
    cut.magnitude = (a & 0x7fffffu) | (exponent != 0u ? 0x800000u : 0u);
    cut.shift = exponent > 95u ? 126u - exponent : 31u;
    cut.rebias = 0u;
  }
  return cut;
}

ZO_FN uint16_t fp16_finish(const Fp16Cut& cut, uint32_t offset) {
  const uint32_t half = ((cut.magnitude + offset) >> cut.shift) - cut.rebias;
  return static_cast<uint16_t>(cut.sign | (half < 0x7c00u ? half : 0x7c00u));
}

ZO_FN uint16_t fp16_nearest(float value) {
  const uint32_t x = as_bits(value);
  if ((x & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(((x >> 16) & 0x8000u) | 0x7e00u);
  if ((x & 0x7fffffffu) == 0x7f800000u) return static_cast<uint16_t>(((x >> 16) & 0x8000u) | 0x7c00u);
  const Fp16Cut cut = fp16_cut(x);
  const uint32_t even = (cut.magnitude >> cut.shift) & 1u;
  return fp16_finish(cut, (1u << (cut.shift - 1u)) - 1u + even);
}

ZO_FN uint16_t fp16_stochastic(float value, uint32_t random) {
  const uint32_t x = as_bits(value);
  if ((x & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(((x >> 16) & 0x8000u) | 0x7e00u);
  if ((x & 0x7fffffffu) == 0x7f800000u) return static_cast<uint16_t>(((x >> 16) & 0x8000u) | 0x7c00u);
  const Fp16Cut cut = fp16_cut(x);
  return fp16_finish(cut, (random << 16) >> (32u - cut.shift));
}

}  // namespace zo
