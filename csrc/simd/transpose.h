// simd/transpose.h: eight rows of eight floats to eight columns, for AVX2 and up
#pragma once

#include <immintrin.h>

namespace zo {

// to[k to_stride + c] = from[c from_stride + k] for c, k in [0, 8)
ZO_INLINE void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 x[8], pair[8], quad[8];
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) x[c] = _mm256_loadu_ps(from + c * from_stride);
#pragma GCC unroll 4
  for (int c = 0; c < 8; c += 2) {
    pair[c] = _mm256_unpacklo_ps(x[c], x[c + 1]), pair[c + 1] = _mm256_unpackhi_ps(x[c], x[c + 1]);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
    quad[half] = _mm256_shuffle_ps(pair[half], pair[half + 2], 0x44);
    quad[half + 1] = _mm256_shuffle_ps(pair[half], pair[half + 2], 0xee);
    quad[half + 2] = _mm256_shuffle_ps(pair[half + 1], pair[half + 3], 0x44);
    quad[half + 3] = _mm256_shuffle_ps(pair[half + 1], pair[half + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    _mm256_storeu_ps(to + k * to_stride, _mm256_permute2f128_ps(quad[k], quad[k + 4], 0x20));
    _mm256_storeu_ps(to + (k + 4) * to_stride, _mm256_permute2f128_ps(quad[k], quad[k + 4], 0x31));
  }
}

}  // namespace zo
