// lowrank.cu: theta <- decay theta + scale left right^T for a list of tensors, on the matrix units of a GPU
//
// math     lowrank.h, with s from mma.m16n8k16: bfloat16 inputs, float32 sums. A factor is split into bfloat16 terms,
//          x = x_0 + x_1 + ... + e with |e| <= 2^-8T |x| for T terms, and the products x_p y_q with p + q < T are summed, small
//          ones first: T = 3 for a float32 theta (2 above rank 64), 2 for a 16-bit theta (1 above rank 32: factors in bfloat16)
// bound    |s - exact| <= ((T + 2) 2^-8T + N 2^-20) sum_k |left[i, k] right[j, k]|, N = T (T + 1) / 2 ceil(r / 16) products of
//          the unit: tests/lowrank_bound.py derives it. A factor beyond the largest bfloat16, or inf, gives inf or NaN.
// layout   a warp's step is 16 rows by 32 columns: four n-tiles, whose fragment columns are dealt out so that a lane's sixteen
// sums
//          are eight columns of two rows. 16-bit theta: column 2 t + e of n-tile j is column 8 t + 2 j + e, sixteen bytes in a
//          row; float32: column 16 (j div 2) + 4 t + 2 (j mod 2) + e, twice sixteen bytes. No shared memory, no shuffle.
// launch   one persistent grid per list and element width; a block's tile is up to 128 rows by 256 columns. The fragments of
//          `right` stay in registers over the rows of a tile. Ranks are padded with zeros to 16, 32, 64 or 128.
// general  elements that are not in an aligned rectangle of the matrix, one at a time, with the sum of lowrank.cpp, bit for bit
// traffic  bf16: 2 B read and 2 B written an element; beside it the factors, which the caches hold
// work     the loop over strips, instructions per element on sm_90 at rank 16, 32, 64, 128: 11.9, 14.4, 12.4, 15.6 for bfloat16
// and
//          14.4, 18.9, 27.9, 29.9 for float32, no spill on sm_80 to sm_120: `python tests/test_lowrank_sass.py`,
//          nvcc 13.0. Not timed on a GPU.
// source   Chen et al. 2024, LOZO; Henry, Tang and Heinecke 2019 (arXiv 1904.06376) for sums of bfloat16 products
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "lowrank.h"

#ifndef ZO_LAUNCH  // tests run this file on the host, where a launch is a loop over warps
#define ZO_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace zo {
namespace products {  // named, so that a kernel has the same symbol in every build

constexpr int kThreads = 256;
constexpr int kStrip = 16;        // rows of a warp's step
constexpr int kWarpColumns = 32;  // columns of a warp's step

// A pointer read from a table, which the compiler must be told is global memory.
template <class T>
__device__ __forceinline__ T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// 64-bit numerator / divisor, by shift and subtract: nvcc divides integers through MUFU.RCP, and a file without any
// approximation is a file whose machine code can be checked for it.
__device__ __forceinline__ int64_t divide(int64_t numerator, int64_t divisor) {
  uint64_t left = static_cast<uint64_t>(numerator), quotient = 0;
  int shift = 0;
  while (static_cast<uint64_t>(divisor) << shift <= left >> 1) ++shift;
  for (; shift >= 0; --shift) {
    const uint64_t part = static_cast<uint64_t>(divisor) << shift;
    quotient <<= 1;
    if (part <= left) left -= part, quotient |= 1;
  }
  return static_cast<int64_t>(quotient);
}

// Two float32 to two halves in one instruction; rounding.h says what it computes.
template <Type kType>
__device__ __forceinline__ uint32_t nearest_pair(float even, float odd) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if constexpr (kType == Type::kBfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
  }
  return pair;
#else
  if constexpr (kType == Type::kBfloat16) return bf16_nearest(even) | static_cast<uint32_t>(bf16_nearest(odd)) << 16;
  return fp16_nearest(even) | static_cast<uint32_t>(fp16_nearest(odd)) << 16;
#endif
}

__device__ __forceinline__ float half_to_float(uint32_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(half));
  return value;
#else
  return fp16_to_float(static_cast<uint16_t>(half));
#endif
}

// c += a b, one warp: a 16 x 16 row-major, b 16 x 8 column-major, in the fragments of PTX ISA 9.7.14
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(ZO_HOST_MMA)
  ZO_HOST_MMA(c, a, b);
#else
  (void)c, (void)a, (void)b;  // nvcc's host pass, which only needs a body
#endif
}

// Two floats as terms of bfloat16 pairs, the largest first
template <int kTerms>
struct Split {
  uint32_t term[kTerms];
};

template <int kTerms>
__device__ __forceinline__ Split<kTerms> split(float even, float odd) {
  Split<kTerms> found;
#pragma unroll
  for (int p = 0; p < kTerms; ++p) {
    found.term[p] = nearest_pair<Type::kBfloat16>(even, odd);
    if (p + 1 < kTerms) {
      even = add_rn(even, -as_float(found.term[p] << 16));
      odd = add_rn(odd, -as_float(found.term[p] & 0xffff0000u));
    }
  }
  return found;
}

// Elements k and k + 1 of a row of a factor, zero beyond its rank. kWhole: the rank is the padded one
template <bool kWhole>
__device__ __forceinline__ void load_two(const float* row, int k, int rank, float& even, float& odd) {
  if constexpr (kWhole) {
    const float2 two = *reinterpret_cast<const float2*>(row + k);
    even = two.x, odd = two.y;
  } else {
    even = k < rank ? row[k] : 0.0f;
    odd = k + 1 < rank ? row[k + 1] : 0.0f;
  }
}

// Rows `low` and `low + 8` of a strip, columns 16 step .. 16 step + 15, as the fragments of a
template <int kTerms, bool kWhole>
__device__ __forceinline__ void load_left(const float* low, const float* high, int k, int rank, uint32_t (&a)[kTerms][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8)
    float even, odd;
    load_two<kWhole>(i & 1 ? high : low, k + (i >> 1) * 8, rank, even, odd);
    const Split<kTerms> pair = split<kTerms>(even, odd);
#pragma unroll
    for (int p = 0; p < kTerms; ++p) a[p][i] = pair.term[p];
  }
}

struct Work {
  const Entry* entries;
  const Tile* tiles;
  int64_t tile_count;
  const Frame* frames;
  const Factors* factors;
  float decay;
  Rounding rounding;
  uint32_t step, k0, k1;
  unsigned long long* nonfinite;
};

__device__ __forceinline__ bool is_nonfinite(Type type, uint32_t bits) {
  const uint32_t exponent = type == Type::kFloat32 ? 0x7f800000u : type == Type::kBfloat16 ? 0x7f80u : 0x7c00u;
  return (bits & exponent) == exponent;
}

// One value to its place, by every rule; whether it is inf or NaN. random: 16 bits, of stochastic rounding
__device__ __forceinline__ bool store_one(const Work& work, const Entry& e, bool outside, void* to, Type type, int64_t at,
                                          int64_t low_at, float value, uint32_t random) {
  if (type == Type::kFloat32) {
    static_cast<float*>(to)[at] = value;
    return is_nonfinite(type, as_bits(value));
  }
  uint16_t half;
  if (!outside && work.rounding == Rounding::kResidual && type == Type::kBfloat16 && e.residual != nullptr) {
    half = residual_split(value, e.residual[low_at]);
  } else if (work.rounding == Rounding::kStochastic) {
    half = type == Type::kBfloat16 ? bf16_stochastic(value, random) : fp16_stochastic(value, random);
  } else {
    half = type == Type::kBfloat16 ? bf16_nearest(value) : fp16_nearest(value);
  }
  static_cast<uint16_t*>(to)[at] = half;
  return is_nonfinite(type, half);
}

__device__ __forceinline__ float load_one(const Work& work, const Entry& e, int64_t at, int64_t low_at) {
  const Type type = static_cast<Type>(e.type);
  if (type == Type::kBfloat16 && work.rounding == Rounding::kResidual && e.residual != nullptr) {
    return residual_join(static_cast<const uint16_t*>(e.theta)[at], e.residual[low_at]);
  }
  return load(e.theta, type, at);
}

// ---- one element at a time, with the definition's sum
__device__ __forceinline__ uint32_t general(const Work& work, const Tile& tile, const Entry& e, const Factors& f) {
  const bool outside = e.out[0] != nullptr;
  const Type out_type = static_cast<Type>(e.out_type);
  uint32_t nonfinite = 0;
#pragma unroll 1
  for (int64_t p = tile.begin + threadIdx.x; p < tile.end; p += kThreads) {
    const int64_t r = e.row_count == 1 ? 0 : divide(p, e.columns), c = p - r * e.columns;
    const int64_t row = e.rows != nullptr ? e.rows[r] : r;
    const uint64_t number = e.first + static_cast<uint64_t>(row) * e.pitch + static_cast<uint64_t>(c);
    const int64_t i = divide(static_cast<int64_t>(number), f.columns), j = static_cast<int64_t>(number) - i * f.columns;
    const float *left = f.left + i * f.rank, *right = f.right + j * f.rank;
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t k = 0; k < f.rank; ++k) sum = fma_rn(left[k], right[k], sum);
    const int64_t at = row * e.row_stride + c * e.column_stride, low_at = row * e.columns + c;
    const float value = fma_rn(f.scale, sum, mul_rn(work.decay, load_one(work, e, at, low_at)));
    uint32_t random = 0;
    if (work.rounding == Rounding::kStochastic) {  // rounding_bits() of elementwise.h, without an indexed register
      const Words words = philox4x32(static_cast<uint32_t>(number / 8u), e.who, work.step, kRoundingDraw, work.k0, work.k1);
      const uint32_t within = static_cast<uint32_t>(number % 8u);
      const uint32_t low = within & 2u ? words.w[1] : words.w[0], high = within & 2u ? words.w[3] : words.w[2];
      random = ((within & 4u ? high : low) >> ((within & 1u) * 16u)) & 0xffffu;
    }
    nonfinite += store_one(work, e, outside, outside ? e.out[0] : e.theta, out_type, outside ? p : at, low_at, value, random);
  }
  return nonfinite;
}

// ---- eight columns of a row, in one or two pieces of sixteen bytes; `sums` in the order of the columns

struct Old {  // as it lies in memory
  uint4 piece[2];
};

// Column of value v of a lane, from the lane's first one
template <bool kFloat>
__device__ __forceinline__ constexpr int column_of(int v) {
  return kFloat && v >= 4 ? 12 + v : v;
}

template <bool kFloat>
__device__ __forceinline__ Old load_old(const void* theta, int values) {
  const uint4* from = global(static_cast<const uint4*>(theta));
  Old old = {};
  if (values > 0) old.piece[0] = from[0];
  if (kFloat && values > 4) old.piece[1] = from[4];
  return old;
}

__device__ __forceinline__ void widen(const uint4& from, Type type, float (&v)[8]) {
  const uint32_t w[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (type == Type::kBfloat16) {
      v[2 * i] = as_float(w[i] << 16), v[2 * i + 1] = as_float(w[i] & 0xffff0000u);
    } else {
      v[2 * i] = half_to_float(w[i] & 0xffffu), v[2 * i + 1] = half_to_float(w[i] >> 16);
    }
  }
}

// In place, nearest, no decay: the step of a loop over a model. Returns something that is not 0 where a result is inf or NaN.
template <Type kType>
__device__ __forceinline__ uint32_t plain(const Old& old, const float (&sums)[8], float scale, void* theta, int values) {
  uint4* to = global(static_cast<uint4*>(theta));
  if constexpr (kType == Type::kFloat32) {
    float v[8] = {as_float(old.piece[0].x), as_float(old.piece[0].y), as_float(old.piece[0].z), as_float(old.piece[0].w),
                  as_float(old.piece[1].x), as_float(old.piece[1].y), as_float(old.piece[1].z), as_float(old.piece[1].w)};
    float seen = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = fma_rn(scale, sums[i], v[i]), seen = fma_rn(v[i], 0.0f, seen);
    to[0] = make_uint4(as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3]));
    if (values > 4) to[4] = make_uint4(as_bits(v[4]), as_bits(v[5]), as_bits(v[6]), as_bits(v[7]));
    return as_bits(seen) & 0x7fffffffu;
  } else {
    float v[8];
    widen(old.piece[0], kType, v);
    uint32_t w[4], seen = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[i] = nearest_pair<kType>(fma_rn(scale, sums[2 * i], v[2 * i]), fma_rn(scale, sums[2 * i + 1], v[2 * i + 1]));
#if defined(__CUDA_ARCH__)
      if constexpr (kType == Type::kBfloat16) {
        asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(seen) : "r"(w[i]), "r"(0));
      } else {
        asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(seen) : "r"(w[i]), "r"(0));
      }
#else
      seen |= is_nonfinite(kType, w[i] & 0xffffu) || is_nonfinite(kType, w[i] >> 16);
#endif
    }
    to[0] = make_uint4(w[0], w[1], w[2], w[3]);
    return seen & 0x7fff7fffu;
  }
}

// How many of eight stored values are inf or NaN
template <Type kType>
__device__ __forceinline__ uint32_t count_stored(const void* theta, int values) {
  uint32_t count = 0;
#pragma unroll 1
  for (int v = 0; v < values; ++v) {
    const int place = column_of<kType == Type::kFloat32>(v);
    count += is_nonfinite(kType, kType == Type::kFloat32 ? as_bits(static_cast<const float*>(theta)[place])
                                                         : static_cast<const uint16_t*>(theta)[place]);
  }
  return count;
}

// Every other combination of decay, rounding, low bits and outputs
template <bool kFloat>
__device__ __forceinline__ uint32_t any(const Work& work, const Entry& e, const Frame& frame, float scale, int64_t i, int64_t j,
                                        int64_t n, int values, const float (&sums)[8]) {
  const bool outside = e.out[0] != nullptr;
  const int64_t at = i * frame.stride + j + frame.shift, to = i * frame.out_stride + j + frame.out_shift;
  const uint64_t number = static_cast<uint64_t>(i) * static_cast<uint64_t>(n) + static_cast<uint64_t>(j);
  uint32_t nonfinite = 0;
  Words words = {};
  if (!kFloat && work.rounding == Rounding::kStochastic) {  // n and j are multiples of 8: one block
    words = philox4x32(static_cast<uint32_t>(number / 8u), e.who, work.step, kRoundingDraw, work.k0, work.k1);
  }
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    if (v >= values) continue;
    const int c = column_of<kFloat>(v);
    const float old = load_one(work, e, at + c, to + c);
    const uint32_t random = (words.w[v >> 1] >> ((v & 1) * 16)) & 0xffffu;
    nonfinite += store_one(work, e, outside, outside ? e.out[0] : e.theta, static_cast<Type>(e.out_type),
                           (outside ? to : at) + c, to + c, fma_rn(scale, sums[v], mul_rn(work.decay, old)), random);
  }
  return nonfinite;
}

// ---- a tile of the matrix

template <int kSteps, int kTerms, Type kType, bool kSimple, bool kWhole>
__device__ __forceinline__ uint32_t matrix(const Work& work, const Tile& tile, const Entry& e, const Frame& frame,
                                           const Factors& f) {
  constexpr bool kFloat = kType == Type::kFloat32;
  const int lane = static_cast<int>(threadIdx.x & 31u), g = lane >> 2, t = lane & 3;
  const int64_t start = tile.column + static_cast<int64_t>(threadIdx.x >> 5) * kWarpColumns;
  if (start >= frame.last) return 0;  // the whole warp
  const int rank = static_cast<int>(f.rank);
  const int64_t n = f.columns;
  uint32_t right[kSteps][4][kTerms][2];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column = kFloat ? 16 * (j >> 1) + 4 * (g >> 1) + 2 * (j & 1) + (g & 1) : 8 * (g >> 1) + 2 * j + (g & 1);
    const bool inside = start + column < n;
    const float* row = global(f.right) + (inside ? start + column : 0) * f.rank;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float even, odd;
        load_two<kWhole>(row, 16 * s + 8 * h + 2 * t, rank, even, odd);
        const Split<kTerms> pair = split<kTerms>(even, odd);
#pragma unroll
        for (int p = 0; p < kTerms; ++p) right[s][j][p][h] = pair.term[p];
      }
    }
  }
  const int64_t column = start + (kFloat ? 4 : 8) * t;  // of the lane's first value
  // values of the lane that the rectangle has: in float32 the second four lie 16 columns on
  const int ahead =
      static_cast<int>(frame.last - start < kWarpColumns ? frame.last - start : kWarpColumns) - (kFloat ? 4 : 8) * t;
  const int values = ahead <= 0 ? 0 : kFloat && ahead <= 16 ? 4 : 8;
  using Element = typename std::conditional<kFloat, float, uint16_t>::type;
  Element* theta = static_cast<Element*>(e.theta) + (tile.begin + g) * frame.stride + column + frame.shift;
  const float* left = global(f.left) + tile.begin * f.rank;
  const int below = 8 * static_cast<int>(frame.stride);  // from the lane's first row to its second
  const int last = static_cast<int>(tile.end - tile.begin) - 1;
  uint32_t nonfinite = 0;
#pragma unroll 1
  for (int row = g; row - g <= last; row += kStrip, theta += 2 * static_cast<int64_t>(below)) {
    Old old[2];
    if constexpr (kSimple) {
      if (row <= last) old[0] = load_old<kFloat>(theta, values);
      if (row + 8 <= last) old[1] = load_old<kFloat>(theta + below, values);
    }
    // a row of the matrix that the tile does not have is a row of sums that nobody stores
    const float* low = left + static_cast<int64_t>(row <= last ? row : last) * rank;
    const float* high = left + static_cast<int64_t>(row + 8 <= last ? row + 8 : last) * rank;
    float sum[4][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[kTerms][4];
      load_left<kTerms, kWhole>(low, high, 16 * s + 2 * t, rank, a);
#pragma unroll
      for (int order = kTerms - 1; order >= 0; --order) {  // the small products first
#pragma unroll
        for (int p = order; p >= 0; --p) {
#pragma unroll
          for (int j = 0; j < 4; ++j) mma(sum[j], a[p], right[s][j][order - p]);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row + 8 * h > last || values == 0) continue;
      const float sums[8] = {sum[0][2 * h], sum[0][2 * h + 1], sum[1][2 * h], sum[1][2 * h + 1],
                             sum[2][2 * h], sum[2][2 * h + 1], sum[3][2 * h], sum[3][2 * h + 1]};
      if constexpr (!kSimple) {
        nonfinite += any<kFloat>(work, e, frame, f.scale, tile.begin + row + 8 * h, column, n, values, sums);
      } else {
        Element* to = theta + h * below;
        const uint32_t seen = plain<kType>(old[h], sums, f.scale, to, values);
        if (seen != 0) nonfinite += count_stored<kType>(to, values);
      }
    }
  }
  return nonfinite;
}

// Two blocks a multiprocessor where the fragments of `right`, 8 terms steps registers, leave room in 128
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
constexpr int kRoom = 8;
#else
constexpr int kRoom = 5;
#endif
constexpr int resident(int fragments, bool loop) { return fragments > (loop ? kRoom : 5) ? 1 : 2; }

template <int kSteps, int kTerms, Type kType, bool kSimple, bool kWhole>
__global__ void __launch_bounds__(kThreads, resident(kSteps* kTerms, kSimple&& kWhole)) lowrank_kernel(const Work work) {
  uint32_t nonfinite = 0;
#pragma unroll 1
  for (int64_t w = blockIdx.x; w < work.tile_count; w += gridDim.x) {
    const Tile tile = work.tiles[w];
    const Entry& e = work.entries[tile.entry];
    if (static_cast<Type>(e.type) != kType) continue;
    const Factors f = work.factors[e.tensor];
    if (tile.column < 0) continue;
    nonfinite += matrix<kSteps, kTerms, kType, kSimple, kWhole>(work, tile, e, work.frames[tile.entry], f);
  }
  if (nonfinite != 0) atomicAdd(work.nonfinite, static_cast<unsigned long long>(nonfinite));  // rare: no reduction first
}

__global__ void __launch_bounds__(kThreads, 1) general_kernel(const Work work) {
  uint32_t nonfinite = 0;
#pragma unroll 1
  for (int64_t w = blockIdx.x; w < work.tile_count; w += gridDim.x) {
    const Tile tile = work.tiles[w];
    const Entry& e = work.entries[tile.entry];
    if (tile.column < 0) nonfinite += general(work, tile, e, work.factors[e.tensor]);
  }
  if (nonfinite != 0) atomicAdd(work.nonfinite, static_cast<unsigned long long>(nonfinite));
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (CUDA error " +
                           std::to_string(static_cast<int>(error)) + ")");
}

void start(void (*kernel)(Work), const Launch& launch, const Work& work) {
  int64_t blocks = launch.workers;
  if (blocks <= 0) {
    int device = 0, processors = 0, each = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0), "lowrank_");
    blocks = std::max<int64_t>(1, static_cast<int64_t>(processors) * each);
  }
  const unsigned grid = static_cast<unsigned>(std::min({blocks, work.tile_count, int64_t{0x7fffffff}}));
  ZO_LAUNCH(kernel, grid, kThreads, reinterpret_cast<cudaStream_t>(launch.stream), work);
  check(cudaGetLastError(), "lowrank_");
}

template <Type kType, bool kSimple, bool kWhole>
void start(const Launch& launch, const Work& work, int64_t rank) {
  constexpr bool kFloat = kType == Type::kFloat32;
  if (rank <= 16) return start(lowrank_kernel < 1, kFloat ? 3 : 2, kType, kSimple, kWhole >, launch, work);
  if (rank <= 32) return start(lowrank_kernel < 2, kFloat ? 3 : 2, kType, kSimple, kWhole >, launch, work);
  if (rank <= 64) return start(lowrank_kernel < 4, kFloat ? 3 : 1, kType, kSimple, kWhole >, launch, work);
  start(lowrank_kernel < 8, kFloat ? 2 : 1, kType, kSimple, kWhole >, launch, work);
}

template <Type kType>
void start(const Launch& launch, const Work& work, const TileList& list) {
  if ((list.types >> static_cast<int>(kType) & 1) == 0) return;
  if (!list.simple) return start<kType, false, false>(launch, work, list.max_rank);
  if (!list.whole) return start<kType, true, false>(launch, work, list.max_rank);
  start<kType, true, true>(launch, work, list.max_rank);
}

}  // namespace products

void lowrank_tiles(const Launch& launch, const TileList& list, const Factors* factors, float decay, Rounding rounding,
                   uint32_t step, int64_t* nonfinite) {
  if (list.count <= 0) return;
  if (list.max_rank < 1 || list.max_rank > 128) {
    throw std::invalid_argument("lowrank_: rank is " + std::to_string(list.max_rank) + "; expected 1 to 128");
  }
  const products::Work work = {launch.entries,
                               list.tiles,
                               list.count,
                               list.frames,
                               factors,
                               decay,
                               rounding,
                               step,
                               static_cast<uint32_t>(launch.seed),
                               static_cast<uint32_t>(launch.seed >> 32),
                               reinterpret_cast<unsigned long long*>(nonfinite)};
  if (list.general) products::start(products::general_kernel, launch, work);
  products::start<Type::kFloat32>(launch, work, list);
  products::start<Type::kBfloat16>(launch, work, list);
  products::start<Type::kFloat16>(launch, work, list);
}

}  // namespace zo
