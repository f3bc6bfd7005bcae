// portable.h: the IEEE single-precision operations of the stream, on a host and on a GPU
//
// math     add, sub, mul, fma, div and sqrt, each rounded once to nearest-even; integer to float rounded
//          once; bits <-> float.
// equal    the same bits from g++ at any -O, AVX2, AVX-512 and nvcc, if this file is compiled without
//          contraction (g++ -ffp-contract=off) and without fast-math. The checks below stop a build with
//          either
// why      one compiler may fuse a multiply with the add after it, and another may not. So every fusion is
//          written fma_rn, and every product that must not be fused is written mul_rn
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__FAST_MATH__)
#error "zokern: -ffast-math changes the bits of the stream; build without it"
#endif

#if defined(__CUDACC__)
#define ZO_FN __host__ __device__ __forceinline__
#else
#define ZO_FN inline
#endif

namespace zo {

ZO_FN float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

ZO_FN uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

ZO_FN float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

ZO_FN float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

ZO_FN float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

ZO_FN float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

ZO_FN float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

ZO_FN float from_int(int32_t value) {
#if defined(__CUDA_ARCH__)
  return __int2float_rn(value);
#else
  return static_cast<float>(value);
#endif
}

// (value & mask) | fill. It is one LOP3 by hand,
// because ptxas makes two of it if both constants are literals.
ZO_FN uint32_t insert_bits(uint32_t value, uint32_t mask, uint32_t fill) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(value), "r"(mask), "r"(fill));
  return result;
#else
  return (value & mask) | fill;
#endif
}

}  // namespace zo
