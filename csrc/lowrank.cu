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

#include "fragments.h"
#include "lowrank.h"

namespace zo {
namespace products {  // named, so that a kernel has the same symbol in every build

constexpr int kStrip = 16;        // rows of a warp's step
constexpr int kWarpColumns = 32;  // columns of a warp's step

__device__ __forceinline__ float half_to_float(uint32_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(half));
  return value;
#else
  return fp16_to_float(static_cast<uint16_t>(half));
#endif
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

// The fragments of `right` for a warp's columns from `start` on.
template <int kSteps, int kTerms, bool kFloat, bool kWhole>
__device__ __forceinline__ void load_right(const Factors& f, int64_t start, int lane,
                                           uint32_t (&right)[kSteps][4][kTerms][2]) {
  const int g = lane >> 2, t = lane & 3, rank = static_cast<int>(f.rank);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column =
        kFloat ? 16 * (j >> 1) + 4 * (g >> 1) + 2 * (j & 1) + (g & 1) : 8 * (g >> 1) + 2 * j + (g & 1);
    const bool inside = start + column < f.columns;
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
  load_right<kSteps, kTerms, kFloat, kWhole>(f, start, lane, right);
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
