// simd/avx2.h: eight lanes (AVX2, FMA, F16C). simd/scalar.h explains the trait
#pragma once

#include <immintrin.h>

#include "transpose.h"

namespace zo {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kGroup = 4;
  using F = __m256;
  typedef uint32_t U __attribute__((vector_size(32), may_alias));
  using W = __m256i;

  static F all(float x) { return _mm256_set1_ps(x); }
  static U bits(F x) { return (U)x; }
  static F floats(U x) { return (F)x; }
  static F from_int(U x) { return _mm256_cvtepi32_ps((__m256i)x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static constexpr bool kPairs = false;
  static F root(F x) { return _mm256_sqrt_ps(x); }
  static U lane() { return U{0, 1, 2, 3, 4, 5, 6, 7}; }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static U load(const uint32_t* p) { return (U)_mm256_load_si256((const __m256i*)p); }
  static U load_pairs(const uint16_t* p) { return (U)_mm256_loadu_si256((const __m256i*)p); }
  static void store_pairs(uint16_t* p, U x) { _mm256_storeu_si256((__m256i*)p, (__m256i)x); }
  static U load_half(const uint16_t* p) {
    return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  }
  static void store_half(uint16_t* p, U x) {
    const __m256i lanes = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // words below 2^16
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(lanes, 0x08)));
  }
  static F load_byte(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static F load_fp16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static void store_fp16(uint16_t* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static F round_fp16(F x) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static bool any_nan(F x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }

  static void interleave(F even, F odd, F& low, F& high) {
    low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  }

  static void deinterleave(F low, F high, F& even, F& odd) {
    const __m256i evens = (__m256i)_mm256_shuffle_ps(low, high, 0x88),
                  odds = (__m256i)_mm256_shuffle_ps(low, high, 0xdd);
    even = (F)_mm256_permute4x64_epi64(evens, 0xd8), odd = (F)_mm256_permute4x64_epi64(odds, 0xd8);
  }

  static constexpr int kTranspose = 8;
  static void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    transpose8(from, from_stride, to, to_stride);
  }

  // A block may sit in any lane. This order of lanes makes store_words() two instructions.
  template <bool kUnpack>
  static W counters(uint32_t block) {
    const W order = kUnpack ? _mm256_setr_epi64x(0, 1, 2, 3) : _mm256_setr_epi64x(0, 2, 1, 3);
    return _mm256_add_epi64(_mm256_set1_epi64x(block), order);
  }
  // The blocks of eight rows, `pitch` blocks apart, four rows in each half. split() puts them in order.
  static W rows(uint32_t block, uint32_t pitch, int half) {
    const W row = _mm256_add_epi64(_mm256_setr_epi64x(0, 1, 4, 5), _mm256_set1_epi64x(2 * half));
    return add(_mm256_mul_epu32(row, _mm256_set1_epi64x(pitch)), block);
  }
  static W add(W x, uint32_t y) { return _mm256_add_epi64(x, _mm256_set1_epi64x(y)); }
  static void split(W first, W second, U& low, U& high) {
    low = (U)_mm256_shuffle_ps((F)first, (F)second, 0x88),
    high = (U)_mm256_shuffle_ps((F)first, (F)second, 0xdd);
  }
  static W wide(uint32_t x) { return _mm256_set1_epi64x(x); }
  static W multiply(W x, uint32_t constant) { return _mm256_mul_epu32(x, _mm256_set1_epi64x(constant)); }
  static W mix(W product, W x, const uint32_t* key) {
    return _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product, 32), x),
                            _mm256_load_si256((const __m256i*)key));
  }
  static W last(W product, W x, const uint32_t* key) {
    const W low = _mm256_xor_si256(x, _mm256_load_si256((const __m256i*)key));
    return _mm256_xor_si256(_mm256_shuffle_epi32(product, 0xb1),
                            _mm256_blend_epi32(low, _mm256_setzero_si256(), 0xaa));
  }
  // With kUnpack the 64-bit lanes are (b0 b1 of w01, b0 b1 of w23), and interleave() puts them in order.
  template <bool kUnpack>
  static void store_words(W w01, W w23, uint32_t* words) {
    __m256i* out = (__m256i*)words;
    if (kUnpack) {
      _mm256_store_si256(out, _mm256_permute2x128_si256(w01, w23, 0x20));
      _mm256_store_si256(out + 1, _mm256_permute2x128_si256(w01, w23, 0x31));
    } else {
      _mm256_store_si256(out, _mm256_unpacklo_epi64(w01, w23));
      _mm256_store_si256(out + 1, _mm256_unpackhi_epi64(w01, w23));
    }
  }
};

}  // namespace zo
