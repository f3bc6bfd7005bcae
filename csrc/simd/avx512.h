// simd/avx512.h: sixteen lanes (AVX-512 F, BW, DQ, VL). simd/scalar.h explains the trait
#pragma once

#include <immintrin.h>

#include "transpose.h"

namespace zo {

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kGroup = 8;
  using F = __m512;
  typedef uint32_t U __attribute__((vector_size(64), may_alias));
  using W = __m512i;

  static F all(float x) { return _mm512_set1_ps(x); }
  static U bits(F x) { return (U)x; }
  static F floats(U x) { return (F)x; }
  static F from_int(U x) { return _mm512_cvtepi32_ps((__m512i)x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
#if defined(__AVX512BF16__)
  static constexpr bool kPairs = true;
  static F dot(F x, F w, F sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }
  // Rounds to nearest, and numbers under 2^-126 to zero. dot() takes these for zero too.
  static F pair(F even, F odd) {
    const U order = lane() | (lane() + 16u) << 16;
    return (F)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
  }
#else
  static constexpr bool kPairs = false;
#endif
  static F root(F x) { return _mm512_sqrt_ps(x); }
  static U lane() { return U{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static U load(const uint32_t* p) { return (U)_mm512_load_si512(p); }
  static U load_pairs(const uint16_t* p) { return (U)_mm512_loadu_si512(p); }
  static void store_pairs(uint16_t* p, U x) { _mm512_storeu_si512(p, (__m512i)x); }
  static U load_half(const uint16_t* p) {
    return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  }
  static void store_half(uint16_t* p, U x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x));
  }
  static F load_byte(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static F load_fp16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static void store_fp16(uint16_t* p, F x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static F round_fp16(F x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static bool any_nan(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }

  static void interleave(F even, F odd, F& low, F& high) {
    low = _mm512_unpacklo_ps(even, odd), high = _mm512_unpackhi_ps(even, odd);
  }

  static void deinterleave(F low, F high, F& even, F& odd) {
    const U order = lane() * 2u;
    even = _mm512_permutex2var_ps(low, (__m512i)order, high),
    odd = _mm512_permutex2var_ps(low, (__m512i)(order + 1u), high);
  }

  static constexpr int kTranspose = 8;
  static void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    transpose8(from, from_stride, to, to_stride);
  }

  // A block may sit in any lane. This order of lanes makes store_words() two instructions.
  template <bool kUnpack>
  static W counters(uint32_t block) {
    const W order =
        kUnpack ? _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7) : _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm512_add_epi64(_mm512_set1_epi64(block), order);
  }
  // The blocks of sixteen rows, `pitch` blocks apart, eight rows in each half. split() puts them in order.
  static W rows(uint32_t block, uint32_t pitch, int half) {
    const W row = _mm512_add_epi64(_mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), _mm512_set1_epi64(2 * half));
    return add(_mm512_mul_epu32(row, _mm512_set1_epi64(pitch)), block);
  }
  static W add(W x, uint32_t y) { return _mm512_add_epi64(x, _mm512_set1_epi64(y)); }
  static void split(W first, W second, U& low, U& high) {
    low = (U)_mm512_shuffle_ps((F)first, (F)second, 0x88),
    high = (U)_mm512_shuffle_ps((F)first, (F)second, 0xdd);
  }
  static W wide(uint32_t x) { return _mm512_set1_epi64(x); }
  static W multiply(W x, uint32_t constant) { return _mm512_mul_epu32(x, _mm512_set1_epi64(constant)); }
  static W mix(W product, W x, const uint32_t* key) {
    return _mm512_ternarylogic_epi32(_mm512_srli_epi64(product, 32), x, _mm512_load_si512(key), 0x96);
  }
  static W last(W product, W x, const uint32_t* key) {
    return _mm512_mask_ternarylogic_epi32(_mm512_shuffle_epi32(product, _MM_PERM_CDAB), 0x5555, x,
                                          _mm512_load_si512(key), 0x96);
  }
  // With kUnpack the 64-bit lanes are (b0 b2 of w01, b0 b2 of w23, b1 b3 of w01, b1 b3 of w23), and
  // interleave() puts them in order.
  template <bool kUnpack>
  static void store_words(W w01, W w23, uint32_t* words) {
    if (kUnpack) {
      _mm512_store_si512(words,
                         _mm512_permutex2var_epi64(w01, _mm512_setr_epi64(0, 2, 8, 10, 1, 3, 9, 11), w23));
      _mm512_store_si512(words + 16,
                         _mm512_permutex2var_epi64(w01, _mm512_setr_epi64(4, 6, 12, 14, 5, 7, 13, 15), w23));
    } else {
      _mm512_store_si512(words, _mm512_unpacklo_epi64(w01, w23));
      _mm512_store_si512(words + 16, _mm512_unpackhi_epi64(w01, w23));
    }
  }
};

}  // namespace zo
