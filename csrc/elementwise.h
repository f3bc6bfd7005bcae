// elementwise.h: the table of a launch, and the elementwise verbs for one element. elementwise.cpp,
// elementwise.cu and axpy.cu implement the verbs
//
// verbs    draw      out <- T(z)
//          axpy_     theta <- round(decay theta + sum_k a_k z_k): float32 inside, fma in draw order, one
//                    rounding to T. A replay is several such sums of `each` terms, one after the other in
//                    registers. It gives the results of K / each calls
//          perturb   out_j <- round(theta + s_j z), j = 1 or 2, from one evaluation of z. theta is only read
// scale    z is round(z f), where an entry has factors f of its elements: float32, bfloat16, or a mask of one
//          byte, 0 or 1. They lie at R columns + c
// table    one Entry per tensor, one launch per table. An entry is a 2-D view of any stride. A tensor of
//          higher rank that does not collapse to 2-D becomes several entries (zokern/backends/pack.py).
//          Outputs are contiguous
// index    element (r, c) of an entry is number first + R pitch + c of its tensor, with R = rows ? rows[r] :
//          r. It lies at theta + R row_stride + c column_stride. All of this is 64 bits wide. The block
//          number must fit 32 bits: first + n <= 2^35
// equal    bit for bit to zokern/backends/reference.py
// source   Malladi et al. 2023, Algorithm 1; stream: zokern/stream.py, version 1
#pragma once

#include <string>
#include <vector>

#include "zo/normal.h"
#include "zo/philox.h"
#include "zo/rademacher.h"
#include "zo/rounding.h"

namespace zo {

enum class Type : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum class Direction : int32_t { kNormal = 0, kRademacher = 1 };
enum class Scale : int32_t { kFloat32 = 0, kBfloat16 = 1, kMask = 2 };

struct Entry {            // 120 bytes; backends/pack.py packs the same layout
  void* theta;            // null for draw
  void* out[2];           // draw: out[0]; perturb: out[0], out[1] (or null); update_: m and v
  int16_t* residual;      // low bits of a bfloat16 theta, at R columns + c, or null
  const int64_t* rows;    // row numbers, or null for 0, 1, 2, ...
  int64_t row_count;      // r runs over [0, row_count)
  int64_t columns;        // c runs over [0, columns)
  int64_t row_stride;     // in elements of theta
  int64_t column_stride;  // in elements of theta
  uint64_t first;         // number of element (0, 0) in the unsharded tensor
  uint64_t pitch;         // numbers between rows
  uint32_t who;           // parameter id
  int32_t type;           // Type of theta
  int32_t out_type;       // Type of out
  int32_t tensor;         // position of the tensor in the launch
  const void* scale;      // factors of z, at R columns + c, or null for 1
  int32_t scale_type;     // Scale of the factors
  int32_t reserved;
};
static_assert(sizeof(Entry) == 120, "zokern/backends/pack.py packs 120 bytes");

struct Chunk {  // logical elements [begin, end) of entry `entry`, element p being (p / columns, p % columns)
  int64_t begin;
  int64_t end;
  int64_t entry;
};

struct Draw {  // one term a z(step, draw) of a sum
  uint32_t step;
  uint32_t draw;
  float coefficient;
  float decay;  // factor of theta, or of the sum so far, before the first term of a sum; 1 for other terms
};

// elementwise.cpp and elementwise.cu both implement the functions below, and bind.cpp exposes them. Entries
// and chunks lie in host memory for the CPU and in device memory for CUDA. draws and scales lie in host
// memory if they are arguments of a function.
struct Launch {
  const Entry* entries;
  const Chunk* chunks;
  int64_t chunk_count;
  Direction direction;
  uint64_t seed;
  int64_t workers;   // CPU: threads; CUDA: blocks of the persistent grid, 0 for the default
  uintptr_t stream;  // CUDA: cudaStream_t; CPU: unused
  // For CUDA, in device memory. The host need not know these numbers,
  // and a captured graph reads them anew at each replay.
  const Draw* draws = nullptr;          // the names and decays of several terms
  const float* coefficients = nullptr;  // the factors of a sum; on the CPU they are in the draws
  const int64_t* clock = nullptr;       // added to every step number; null for 0
  const float* control = nullptr;       // {decay, go, finite} of project.h; null: the host knows the decay
  bool scaled = false;                  // CUDA: some entry has a scale
};

void philox(const uint32_t* counters, int64_t count, uint32_t k0, uint32_t k1, int rounds, uint32_t* words,
            const Launch& launch);
void draw(const Launch& launch, uint32_t step, uint32_t draw);
// `each` is the number of terms between two roundings, and draw_count is a multiple of it. Adds the number of
// final results that are inf or NaN to *nonfinite.
void axpy(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each, Rounding rounding,
          int64_t* nonfinite);
// An entry whose out[1] is null ignores scales[1].
void perturb(const Launch& launch, uint32_t step, uint32_t draw, const float* scales);

// The name of the code in use ("avx512", "cuda"), a choice of another, the names that can be chosen here or
// that were compiled (CUDA: machine code "sm_90" and PTX "compute_100"), and the number of devices.
std::string implementation();
void select(const std::string& name);
std::vector<std::string> architectures();
int device_count();

// The purpose `rounding` in a draw word (zokern/stream.py).
constexpr uint32_t kRoundingDraw = 4u << 24;

ZO_FN float value_at(const Words& words, Direction direction, uint32_t within) {
  if (direction == Direction::kNormal) {
    float even, odd;
    normal_pair(words.w[within >> 1], even, odd);
    return (within & 1u) ? odd : even;
  }
  return rademacher_sign(words.w[within >> 5], within & 31u);
}

ZO_FN float value(Direction direction, uint64_t index, uint32_t who, uint32_t step, uint32_t draw,
                  uint32_t k0, uint32_t k1) {
  const uint32_t per_block = direction == Direction::kNormal ? kNormalPerBlock : kRademacherPerBlock;
  const Words words = philox4x32(static_cast<uint32_t>(index / per_block), who, step, draw, k0, k1);
  return value_at(words, direction, static_cast<uint32_t>(index % per_block));
}

// The 16 random bits for the stochastic rounding of element `index`:
// half-word index mod 8 of block index / 8.
ZO_FN uint32_t rounding_bits(uint64_t index, uint32_t who, uint32_t step, uint32_t k0, uint32_t k1) {
  const Words words = philox4x32(static_cast<uint32_t>(index / 8u), who, step, kRoundingDraw, k0, k1);
  const uint32_t within = static_cast<uint32_t>(index % 8u);
  return (words.w[within >> 1] >> ((within & 1u) * 16u)) & 0xffffu;
}

ZO_FN float load(const void* base, Type type, int64_t offset) {
  if (type == Type::kFloat32) return static_cast<const float*>(base)[offset];
  const uint16_t half = static_cast<const uint16_t*>(base)[offset];
  return type == Type::kBfloat16 ? bf16_to_float(half) : fp16_to_float(half);
}

// Factor `offset` of an entry, 1 if it has none.
ZO_FN float factor_at(const void* base, int32_t type, int64_t offset) {
  if (base == nullptr) return 1.0f;
  if (type == static_cast<int32_t>(Scale::kMask))
    return static_cast<float>(static_cast<const uint8_t*>(base)[offset]);
  return load(base, type == static_cast<int32_t>(Scale::kFloat32) ? Type::kFloat32 : Type::kBfloat16, offset);
}

ZO_FN void store_nearest(void* base, Type type, int64_t offset, float value) {
  if (type == Type::kFloat32) {
    static_cast<float*>(base)[offset] = value;
  } else {
    static_cast<uint16_t*>(base)[offset] =
        type == Type::kBfloat16 ? bf16_nearest(value) : fp16_nearest(value);
  }
}

}  // namespace zo
