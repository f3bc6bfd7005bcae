// simd/rows.h: divides a chunk into runs of consecutive elements, and converts elements to float32 and back.
// It is included after simd/values.h
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

namespace zo {
namespace {

template <Type T>
using Element = std::conditional_t<T == Type::kFloat32, float, uint16_t>;

// The upper half of the result is the nearest bfloat16. A NaN must have a lower half of zero to stay a NaN.
ZO_INLINE U bf16_round(F x) {
  const U bits = Simd::bits(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

inline bool finite(float x) { return (as_bits(x) & 0x7f800000u) != 0x7f800000u; }

template <Type T>
int64_t count_nonfinite(const Element<T>* p, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (T == Type::kFloat32) {
      count += !finite(p[i]);
    } else {
      const uint16_t exponent = T == Type::kBfloat16 ? 0x7f80u : 0x7c00u;
      count += (p[i] & exponent) == exponent;
    }
  }
  return count;
}

template <class X>
void gather(const void* from, int64_t stride, int n, X* to) {
  const X* p = static_cast<const X*>(from);
  if (stride == 1) {
    std::memcpy(to, p, static_cast<size_t>(n) * sizeof(X));
  } else {
    for (int i = 0; i < n; ++i) to[i] = p[i * stride];
  }
}

template <class X>
void scatter(const X* from, int n, void* to, int64_t stride) {
  X* p = static_cast<X*>(to);
  if (stride == 1) {
    std::memcpy(p, from, static_cast<size_t>(n) * sizeof(X));
  } else {
    for (int i = 0; i < n; ++i) p[i * stride] = from[i];
  }
}

// Rounds values to 16-bit halves, to nearest. Any NaN stays a NaN.
inline void narrow(Type type, const float* value, int units, uint16_t* half) {
  for (int i = 0; i < units * kUnit; i += kLanes) {
    const F x = Simd::load(value + i);
    if (type == Type::kFloat16) {
      Simd::store_fp16(half + i, x);
    } else {
      const U bits = Simd::bits(x);
      Simd::store_half(half + i,
                       ((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : bf16_round(x)) >> 16);
    }
  }
}

inline void widen(Type type, const uint16_t* half, int units, float* value) {
  for (int i = 0; i < units * kUnit; i += kLanes) {
    Simd::store(value + i, type == Type::kFloat16 ? Simd::load_fp16(half + i)
                                                  : Simd::floats(Simd::load_half(half + i) << 16));
  }
}

// value[i] is element `number` + i of a parameter. `name` has that parameter and the draw kRoundingDraw.
inline void round_stochastic(const Name& name, uint64_t number, int n, Type type, const float* value,
                             uint16_t* half, uint32_t* words) {
  const int skip = static_cast<int>(number % 8);
  make_words<false, 0>(static_cast<uint32_t>(number / 8), (skip + n + 7) / 8, name, words, nullptr);
  uint16_t random[kPiece];  // little-endian: half-words in order
  std::memcpy(random, reinterpret_cast<const char*>(words) + 2 * skip, static_cast<size_t>(n) * 2);
  if (type == Type::kBfloat16) {
    for (int i = 0; i < n; ++i) half[i] = bf16_stochastic(value[i], random[i]);
  } else {
    for (int i = 0; i < n; ++i) half[i] = fp16_stochastic(value[i], random[i]);
  }
}

// Factors i .. i + kUnit - 1 of z, in the order of unit_values<D, kPaired>(). A NaN becomes the canonical
// one, whose lower half is zero.
template <bool kPaired>
ZO_INLINE void load_factors(const void* base, Scale type, int64_t i, F& a, F& b) {
  if (type == Scale::kMask) {
    const uint8_t* p = static_cast<const uint8_t*>(base) + i;
    a = Simd::load_byte(p), b = Simd::load_byte(p + kLanes);
  } else if (type == Scale::kBfloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(base) + i;
    a = Simd::floats(Simd::load_half(p) << 16), b = Simd::floats(Simd::load_half(p + kLanes) << 16);
  } else {
    const float* p = static_cast<const float*>(base) + i;
    const U x = Simd::bits(Simd::load(p)), y = Simd::bits(Simd::load(p + kLanes));
    a = Simd::floats((x & 0x7fffffffu) > 0x7f800000u ? U{} + 0x7fc00000u : x);
    b = Simd::floats((y & 0x7fffffffu) > 0x7f800000u ? U{} + 0x7fc00000u : y);
  }
  if constexpr (kPaired) {
    F even, odd;
    Simd::deinterleave(a, b, even, odd);
    a = even, b = odd;
  }
}

// The factors of n elements from element `first` of an entry on, one by one.
inline void gather_factors(const Entry& entry, int64_t first, int n, float* to) {
  for (int i = 0; i < n; ++i) {
    const float factor = factor_at(entry.scale, entry.scale_type, first + i);
    to[i] = factor == factor ? factor : as_float(0x7fc00000u);
  }
}

struct Run {  // consecutive elements of one row
  const Entry* entry;
  const void* theta;  // the first element
  int64_t column_stride;
  int64_t position;  // of the first element in the outputs
  int64_t low;       // of the first element in the residual
  uint64_t number;   // of the first element in the stream
  int64_t n;
};

inline Run part(const Run& run, int64_t begin, int64_t end) {
  Run sub = run;
  const int width = static_cast<Type>(run.entry->type) == Type::kFloat32 ? 4 : 2;
  if (run.theta != nullptr)
    sub.theta = static_cast<const char*>(run.theta) + begin * run.column_stride * width;
  sub.position += begin, sub.low += begin, sub.number += static_cast<uint64_t>(begin), sub.n = end - begin;
  return sub;
}

// Calls body(Run) for each row of a chunk. Rows are one row if they follow one another in memory, in the
// stream and in the outputs.
template <class Body>
void each_run(const Entry& entry, const Chunk& chunk, Body&& body) {
  const int64_t width = static_cast<Type>(entry.type) == Type::kFloat32 ? 4 : 2;
  const bool flat = entry.rows == nullptr && entry.pitch == static_cast<uint64_t>(entry.columns) &&
                    (entry.theta == nullptr || entry.row_stride == entry.columns * entry.column_stride);
  const int64_t columns = flat || entry.row_count == 1 ? entry.columns * entry.row_count : entry.columns;
  for (int64_t p = chunk.begin; p < chunk.end;) {
    const int64_t r = p / columns, c = p % columns;
    const int64_t n = chunk.end - p < columns - c ? chunk.end - p : columns - c;
    const int64_t row = entry.rows != nullptr ? entry.rows[r] : r;
    const char* theta = static_cast<const char*>(entry.theta);
    if (theta != nullptr) theta += (row * entry.row_stride + c * entry.column_stride) * width;
    const uint64_t number = entry.first + static_cast<uint64_t>(row) * entry.pitch + static_cast<uint64_t>(c);
    body(Run{&entry, theta, entry.column_stride, p, row * entry.columns + c, number, n});
    p += n;
  }
}

}  // namespace
}  // namespace zo
