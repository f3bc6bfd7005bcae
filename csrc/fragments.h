// fragments.h: the factors of lowrank_ as operands of the matrix units, on a GPU
//
// product  mma() multiplies fragments. The unit's layouts are those of PTX ISA 9.7.14
// terms    split() makes bfloat16 terms of float32 pairs
// left     a block splits rows of a factor into shared memory (Panel), and its warps read fragments from
// there
//          (load_matrices)
// include  after <cuda_runtime.h>, by lowrank.cu
#pragma once

#include "device.h"

namespace zo {
namespace products {  // named, so that a kernel has the same symbol in every build

using namespace device;

constexpr int kTileRows = 128;  // at most, as zokern/backends/pack_lowrank.py makes tiles

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

}  // namespace products
}  // namespace zo
