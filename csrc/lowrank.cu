// lowrank.cu: theta <- decay theta + scale left right^T for a list of tensors, on the matrix units of a GPU
//
// math     lowrank.h. The sum comes from mma.m16n8k16: bfloat16 inputs, float32 sums. A factor x is split
//          into T bfloat16 terms, x = x_0 + x_1 + ... + e with |e| <= 2^-8T |x|. The products x_p y_q with
//          p + q < T are summed, small ones first. A float32 theta has T = 3, and 2 above rank 64. A 16-bit
//          theta has T = 2, and 1 above rank 32
// bound    |s - exact| <= ((T + 2) 2^-8T + N 2^-20) sum_k |left[i, k] right[j, k]|, where N = T (T + 1) / 2
//          ceil(rank / 16) is the number of the unit's products: tests/support/lowrank_bound.py derives it. A
//          factor that is inf, or beyond the largest bfloat16, gives inf or NaN
// layout   a warp's step is 16 rows by 32 columns: four n-tiles. Their fragment columns are dealt out so that
//          the sixteen sums of a lane are eight columns of two rows. Column 2 t + e of n-tile j is
//          16-bit    column 8 t + 2 j + e of the step: sixteen bytes in a row
//          float32   column 16 (j div 2) + 4 t + 2 (j mod 2) + e: twice sixteen bytes
//          There is no shuffle
// left     a block loads and splits the rows of `left` once for a tile, into shared memory (Panel). Its eight
//          warps read their fragments from there. A float32 theta of rank 128 has half a tile at a time
// counted  the split once for a tile pays at every rank (counted, not measured). If each warp split the rows
//          that it is at, all of the kernel on sm_90 would take 13.8, 16.8, 14.4, 18.0 instructions an
//          element in bfloat16 and 16.6, 21.8, 32.3, 34.8 in float32. It takes 11.5, 13.2, 12.6, 15.7
//          and 13.3, 16.4, 22.6, 23.2. A tile would ask the caches for 128 rank lines. It asks for 8 rank,
//          and shared memory for 18 rank in each term
// control  under a control, a list in place that rounds to nearest has two launches. If the decay is 1,
//          the plain kernel works and the other one ends at once, else the other way round
// launch   one persistent grid per list and element width. A block's tile has up to 128 rows by 256 columns.
//          The fragments of `right` stay in registers for all rows of a tile. Ranks are padded with zeros to
//          16, 32, 64 or 128
// general  elements outside the aligned rectangles of a matrix go one at a time. Their sum is that of
//          lowrank.cpp, bit for bit
// traffic  bf16: 2 B read and 2 B written an element. The factors come from the caches
// work     instructions per element of the loop over strips, on sm_90, at rank 16, 32, 64, 128:
//          bfloat16  8.9, 9.9, 9.5, 11.1
//          float32   10.3, 12.1, 15.6, 14.7
//          No spill on sm_80 to sm_120: tests/kernels_cuda/test_lowrank_sass.py, nvcc 13.0. Not timed on a
//          GPU
// source   Chen et al. 2024, LOZO; Henry, Tang and Heinecke 2019 (arXiv 1904.06376) for sums of bfloat16
//          products
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.h"
#include "lowrank.h"

namespace zo {
namespace products {  // named, so that a kernel has the same symbol in every build

using namespace device;

constexpr int kStrip = 16;        // rows of a warp's step
constexpr int kWarpColumns = 32;  // columns of a warp's step
constexpr int kTileRows = 128;    // at most, as zokern/backends/pack_lowrank.py makes tiles

__device__ __forceinline__ float half_to_float(uint32_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(half));
  return value;
#else
  return fp16_to_float(static_cast<uint16_t>(half));
#endif
}

// c += a b by one warp: a is 16 x 16 row-major, b is 16 x 8 column-major, in the fragments of PTX ISA 9.7.14.
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(ZO_HOST_MMA)
  ZO_HOST_MMA(c, a, b);
#else
  (void)c, (void)a, (void)b;  // nvcc compiles this body for the host, and nothing runs it
#endif
}

// An address in shared memory. On a GPU it has 32 bits.
#if defined(__CUDA_ARCH__)
using Address = uint32_t;
__device__ __forceinline__ Address address_of(const char* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#else
using Address = uintptr_t;
inline Address address_of(const char* shared) { return reinterpret_cast<uintptr_t>(shared); }
#endif

// Four matrices of 8 x 8 halves by one warp: as the fragments of a, if they are its quarters upper left,
// lower left, upper right, lower right. Lane 8 i + r says where row r of matrix i lies.
__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], Address row) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row)
               : "memory");
#elif defined(ZO_HOST_LOAD_MATRICES)
  ZO_HOST_LOAD_MATRICES(a, row);
#else
  (void)a, (void)row;
#endif
}

// Two float32, split into terms of bfloat16 pairs, the largest first.
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

// Elements k and k + 1 of a row of a factor, zero beyond its rank. With kWhole the rank needs no padding.
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

// The rows of `left` that a block splits at a time: those of a tile, or half of them. 48 KB hold them.
constexpr int panel_rows(int row_bytes) { return kTileRows * row_bytes <= 49152 ? kTileRows : kTileRows / 2; }

// A panel of `left` in shared memory. Each term is row-major, kRank values of 16 bits to a row, in units of
// 16 bytes. The units of a row are permuted, so that eight rows have the same unit in different banks.
template <int kSteps, int kTerms>
struct Panel {
  static constexpr int kRank = 16 * kSteps, kRowBytes = 2 * kRank, kRows = panel_rows(kTerms * kRowBytes);
  static constexpr int kTermBytes = kRows * kRowBytes;
  static constexpr int kUnits = 2 * kSteps, kOrders = kUnits < 8 ? kUnits : 8;
  char* bytes;  // on a boundary of 256 bytes

  // The byte of a unit. An exclusive or with 32 s is the same as one of the unit with 2 s.
  __device__ __forceinline__ static uint32_t place(uint32_t row, uint32_t unit) {
    return row * kRowBytes + (unit ^ row / (8 / kOrders) % kOrders) * 16;
  }

  // Splits rows 0 .. kRows - 1 of `left`, by all threads of a block. Rows after the last one repeat it.
  template <bool kWhole>
  __device__ __forceinline__ void fill(const float* left, int rank, int last) const {
    constexpr int kFours = kRank / 4, kTurn = kThreads / kFours;  // rows of a turn: a multiple of 8
    const int k = static_cast<int>(threadIdx.x) % kFours * 4, first = static_cast<int>(threadIdx.x) / kFours;
    const uint32_t at = place(first, k / 8) + k % 8 * 2;
#pragma unroll 8
    for (int i = 0; i < kRows / kTurn; ++i) {  // 16 at once would spill
      const int row = first + i * kTurn;
      const float* from = left + static_cast<int64_t>(row <= last ? row : last) * rank;
      float v[4];
      load_two<kWhole>(from, k, rank, v[0], v[1]);
      load_two<kWhole>(from, k + 2, rank, v[2], v[3]);
      const Split<kTerms> low = split<kTerms>(v[0], v[1]), high = split<kTerms>(v[2], v[3]);
#pragma unroll
      for (int p = 0; p < kTerms; ++p) {
        *reinterpret_cast<uint2*>(bytes + p * kTermBytes + at + i * kTurn * kRowBytes) =
            make_uint2(low.term[p], high.term[p]);
      }
    }
  }
};

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
  const int64_t* clock;
  const float* control;  // {decay, go, finite} of project.h, or null
  bool divided;          // the decay of the control says whether the simple kernel or the other one works

  // Reads what only the device knows. Returns whether nothing is left to do for a kernel, simple or not.
  __device__ __forceinline__ bool stopped(bool is_simple) {
    if (clock != nullptr) step += static_cast<uint32_t>(*clock);
    if (control == nullptr) return false;
    decay = control[0];
    return control[1] == 0.0f || (divided && is_simple != (decay == 1.0f));
  }
};

// Rounds one value, by any of the roundings, and stores it. `random` is 16 bits for stochastic rounding.
// Returns whether the result is inf or NaN.
__device__ __forceinline__ bool store_one(const Work& work, const Entry& e, bool outside, void* to, Type type,
                                          int64_t at, int64_t low_at, float value, uint32_t random) {
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

// Elements one at a time, with the sum in the order of the definition.
__device__ __forceinline__ uint32_t general(const Work& work, const Tile& tile, const Entry& e,
                                            const Factors& f) {
  const bool outside = e.out[0] != nullptr;
  const Type out_type = static_cast<Type>(e.out_type);
  uint32_t nonfinite = 0;
#pragma unroll 1
  for (int64_t p = tile.begin + threadIdx.x; p < tile.end; p += kThreads) {
    const int64_t r = e.row_count == 1 ? 0 : divide(p, e.columns), c = p - r * e.columns;
    const int64_t row = e.rows != nullptr ? e.rows[r] : r;
    const uint64_t number = e.first + static_cast<uint64_t>(row) * e.pitch + static_cast<uint64_t>(c);
    const int64_t i = divide(static_cast<int64_t>(number), f.columns),
                  j = static_cast<int64_t>(number) - i * f.columns;
    const float *left = f.left + i * f.rank, *right = f.right + j * f.rank;
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t k = 0; k < f.rank; ++k) sum = fma_rn(left[k], right[k], sum);
    const int64_t at = row * e.row_stride + c * e.column_stride, low_at = row * e.columns + c;
    const float value = fma_rn(f.scale, sum, mul_rn(work.decay, load_one(work, e, at, low_at)));
    uint32_t random = 0;
    if (work.rounding == Rounding::kStochastic) {  // as rounding_bits(), without an indexed register
      const Words words =
          philox4x32(static_cast<uint32_t>(number / 8u), e.who, work.step, kRoundingDraw, work.k0, work.k1);
      const uint32_t within = static_cast<uint32_t>(number % 8u);
      const uint32_t low = within & 2u ? words.w[1] : words.w[0],
                     high = within & 2u ? words.w[3] : words.w[2];
      random = ((within & 4u ? high : low) >> ((within & 1u) * 16u)) & 0xffffu;
    }
    nonfinite += store_one(work, e, outside, outside ? e.out[0] : e.theta, out_type, outside ? p : at, low_at,
                           value, random);
  }
  return nonfinite;
}

// Below, a lane has eight columns of a row, in one or two pieces of 16 bytes. `sums` is in the order of the
// columns.

struct Old {  // values of theta, as they lie in memory
  uint4 piece[2];
};

// The column of value v of a lane, relative to its first column.
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

// The common case: in place, to nearest, no decay. Returns 0 if all results are finite, and another number if
// not.
template <Type kType>
__device__ __forceinline__ uint32_t plain(const Old& old, const float (&sums)[8], float scale, void* theta,
                                          int values) {
  uint4* to = global(static_cast<uint4*>(theta));
  if constexpr (kType == Type::kFloat32) {
    float v[8] = {as_float(old.piece[0].x), as_float(old.piece[0].y), as_float(old.piece[0].z),
                  as_float(old.piece[0].w), as_float(old.piece[1].x), as_float(old.piece[1].y),
                  as_float(old.piece[1].z), as_float(old.piece[1].w)};
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
      w[i] = nearest_pair<kType>(fma_rn(scale, sums[2 * i], v[2 * i]),
                                 fma_rn(scale, sums[2 * i + 1], v[2 * i + 1]));
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

// The number of stored values that are inf or NaN, of eight.
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

// All other combinations of decay, rounding, low bits and outputs.
template <bool kFloat>
__device__ __forceinline__ uint32_t any(const Work& work, const Entry& e, const Frame& frame, float scale,
                                        int64_t i, int64_t j, int64_t n, int values, const float (&sums)[8]) {
  const bool outside = e.out[0] != nullptr;
  const int64_t at = i * frame.stride + j + frame.shift, to = i * frame.out_stride + j + frame.out_shift;
  const uint64_t number = static_cast<uint64_t>(i) * static_cast<uint64_t>(n) + static_cast<uint64_t>(j);
  uint32_t nonfinite = 0;
  Words words = {};
  if (!kFloat && work.rounding == Rounding::kStochastic) {  // one block: n and j are multiples of 8
    words = philox4x32(static_cast<uint32_t>(number / 8u), e.who, work.step, kRoundingDraw, work.k0, work.k1);
  }
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    if (v >= values) continue;
    const int c = column_of<kFloat>(v);
    const float old = load_one(work, e, at + c, to + c);
    const uint32_t random = (words.w[v >> 1] >> ((v & 1) * 16)) & 0xffffu;
    nonfinite +=
        store_one(work, e, outside, outside ? e.out[0] : e.theta, static_cast<Type>(e.out_type),
                  (outside ? to : at) + c, to + c, fma_rn(scale, sums[v], mul_rn(work.decay, old)), random);
  }
  return nonfinite;
}

// A tile of the matrix.

template <int kSteps, int kTerms, Type kType, bool kSimple, bool kWhole>
__device__ __forceinline__ uint32_t matrix(const Work& work, const Tile& tile, const Entry& e,
                                           const Frame& frame, const Factors& f, char* shared) {
  constexpr bool kFloat = kType == Type::kFloat32;
  const int lane = static_cast<int>(threadIdx.x & 31u), g = lane >> 2, t = lane & 3;
  const int64_t start = tile.column + static_cast<int64_t>(threadIdx.x >> 5) * kWarpColumns;
  const int rank = static_cast<int>(f.rank);
  const int64_t n = f.columns;
  const Panel<kSteps, kTerms> panel = {shared};
  const float* left = global(f.left) + tile.begin * f.rank;
  // Rows from the strip at hand on.
  int rest = static_cast<int>(tile.end - tile.begin);
  __syncthreads();  // every warp has read the tile before
  panel.template fill<kWhole>(left, rank, rest - 1);
  uint32_t right[kSteps][4][kTerms][2];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column =
        kFloat ? 16 * (j >> 1) + 4 * (g >> 1) + 2 * (j & 1) + (g & 1) : 8 * (g >> 1) + 2 * j + (g & 1);
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
  const int64_t column = start + (kFloat ? 4 : 8) * t;  // of the first value of the lane
  // The rectangle has this many of the lane's values. In float32 the second four lie 16 columns after the
  // first.
  const int ahead = static_cast<int>(frame.last - start < kWarpColumns ? frame.last - start : kWarpColumns) -
                    (kFloat ? 4 : 8) * t;
  const int values = ahead <= 0 ? 0 : kFloat && ahead <= 16 ? 4 : 8;
  using Element = typename std::conditional<kFloat, float, uint16_t>::type;
  Element* theta = static_cast<Element*>(e.theta) + (tile.begin + g) * frame.stride + column + frame.shift;
  const Address quarter = address_of(shared) + panel.place(lane & 15, lane >> 4);  // for load_matrices()
  const int below = 8 * static_cast<int>(frame.stride);  // from the lane's first row to its second
  uint32_t nonfinite = 0;
#pragma unroll 1
  while (true) {
    __syncthreads();
    const int end = panel.kRows == kTileRows || rest < panel.kRows ? 0 : rest - panel.kRows;
    if (start >= frame.last) rest = end;  // all lanes of the warp
    Address at = quarter;
#pragma unroll 1
    for (; rest > end;
         rest -= kStrip, at += kStrip * panel.kRowBytes, theta += 2 * static_cast<int64_t>(below)) {
      Old old[2];
      if constexpr (kSimple) {
        if (g < rest) old[0] = load_old<kFloat>(theta, values);
        if (g + 8 < rest) old[1] = load_old<kFloat>(theta + below, values);
      }
      float sum[4][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t a[kTerms][4];
#pragma unroll
        for (int p = 0; p < kTerms; ++p) load_matrices(a[p], (at ^ 32 * s) + p * panel.kTermBytes);
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
        if (g + 8 * h >= rest || values == 0) continue;
        const float sums[8] = {sum[0][2 * h], sum[0][2 * h + 1], sum[1][2 * h], sum[1][2 * h + 1],
                               sum[2][2 * h], sum[2][2 * h + 1], sum[3][2 * h], sum[3][2 * h + 1]};
        if constexpr (!kSimple) {
          nonfinite +=
              any<kFloat>(work, e, frame, f.scale, tile.end - rest + g + 8 * h, column, n, values, sums);
        } else {
          Element* to = theta + h * below;
          const uint32_t seen = plain<kType>(old[h], sums, f.scale, to, values);
          if (seen != 0) nonfinite += count_stored<kType>(to, values);
        }
      }
    }
    if (panel.kRows == kTileRows || rest <= 0) return nonfinite;
    __syncthreads();
    left += panel.kRows * f.rank;
    panel.template fill<kWhole>(left, rank, rest - 1);
  }
}

// The fragments of `right` take 8 terms steps registers. If they leave enough of 128, two blocks fit a
// multiprocessor. Loads of a rank that needs padding take more.
constexpr int resident(int fragments, bool simple_whole) {
  return fragments > (simple_whole ? 8 : 5) ? 1 : 2;
}

template <int kSteps, int kTerms, Type kType, bool kSimple, bool kWhole>
__global__ void __launch_bounds__(kThreads, resident(kSteps* kTerms, kSimple&& kWhole))
    lowrank_kernel(const Work given) {
  __shared__ __align__(256) char panel[kTerms * Panel<kSteps, kTerms>::kTermBytes];
  Work work = given;
  if (work.stopped(kSimple)) return;
  uint32_t nonfinite = 0;
#pragma unroll 1
  for (int64_t w = blockIdx.x; w < work.tile_count; w += gridDim.x) {
    const Tile tile = work.tiles[w];
    const Entry& e = work.entries[tile.entry];
    if (static_cast<Type>(e.type) != kType) continue;
    const Factors f = work.factors[e.tensor];
    if (tile.column < 0) continue;
    nonfinite +=
        matrix<kSteps, kTerms, kType, kSimple, kWhole>(work, tile, e, work.frames[tile.entry], f, panel);
  }
  // This is rare, so every thread adds for itself.
  if (nonfinite != 0) atomicAdd(work.nonfinite, static_cast<unsigned long long>(nonfinite));
}

__global__ void __launch_bounds__(kThreads, 1) general_kernel(const Work given) {
  Work work = given;
  work.divided = false;  // it alone has these elements
  if (work.stopped(false)) return;
  uint32_t nonfinite = 0;
#pragma unroll 1
  for (int64_t w = blockIdx.x; w < work.tile_count; w += gridDim.x) {
    const Tile tile = work.tiles[w];
    const Entry& e = work.entries[tile.entry];
    if (tile.column < 0) nonfinite += general(work, tile, e, work.factors[e.tensor]);
  }
  if (nonfinite != 0) atomicAdd(work.nonfinite, static_cast<unsigned long long>(nonfinite));
}

void start(void (*kernel)(Work), const Launch& launch, const Work& work) {
  const int64_t blocks = std::min(resident_blocks("lowrank_", kernel, launch.workers), work.tile_count);
  ZO_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, reinterpret_cast<cudaStream_t>(launch.stream),
            work);
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
  if (!list.simple || work.divided) start<kType, false, false>(launch, work, list.max_rank);
  if (!list.simple) return;
  if (!list.whole) return start<kType, true, false>(launch, work, list.max_rank);
  start<kType, true, true>(launch, work, list.max_rank);
}

}  // namespace products

void lowrank_tiles(const Launch& launch, const TileList& list, const Factors* factors, float decay,
                   Rounding rounding, uint32_t step, int64_t* nonfinite) {
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
                               reinterpret_cast<unsigned long long*>(nonfinite),
                               launch.clock,
                               launch.control,
                               launch.control != nullptr && list.simple};
  if (list.general) products::start(products::general_kernel, launch, work);
  products::start<Type::kFloat32>(launch, work, list);
  products::start<Type::kBfloat16>(launch, work, list);
  products::start<Type::kFloat16>(launch, work, list);
}

}  // namespace zo
