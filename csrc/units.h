// units.h: units of eight elements in memory, on a GPU:
// where they lie, how they are loaded, rounded and stored
//
// unit     elements 8 u .. 8 u + 7 of the stream (blocks.h): 16 bytes of a 16-bit type, 32 bytes of float32
// piece    a unit, or a part of one, that is found by itself: in a row of a slice of columns, in a gathered
// row,
//          at an end. It moves 16 bytes at a time too if it is whole and its elements lie side by side
// include  after <cuda_runtime.h>, by .cu files
#pragma once

#include <type_traits>

#include "blocks.h"

namespace zo {
namespace kernels {

// 16 bytes at a 16-byte boundary: eight values of a 16-bit type, or four float32.
struct Pack {
  uint32_t w[4];
};

__device__ __forceinline__ Pack load_pack(const void* from) {
  const uint4 four = *global(static_cast<const uint4*>(from));
  return Pack{{four.x, four.y, four.z, four.w}};
}

__device__ __forceinline__ void store_pack(void* to, const Pack& pack) {
  *global(static_cast<uint4*>(to)) = make_uint4(pack.w[0], pack.w[1], pack.w[2], pack.w[3]);
}

template <Type kType>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float& even, float& odd) {
  if constexpr (kType == Type::kBfloat16) {
    even = as_float(pair << 16);
    odd = as_float(pair & 0xffff0000u);
  } else {
#if defined(__CUDA_ARCH__)
    asm("{.reg .b16 e, o; mov.b32 {e, o}, %2; cvt.f32.f16 %0, e; cvt.f32.f16 %1, o;}"
        : "=f"(even), "=f"(odd)
        : "r"(pair));
#else
    even = fp16_to_float(static_cast<uint16_t>(pair));
    odd = fp16_to_float(static_cast<uint16_t>(pair >> 16));
#endif
  }
}

// The address of unit i in a run of units that begins at `base`. `bytes` is the size of a unit: 16, or 32 for
// float32. With a 32-bit i the address takes one instruction.
template <class T>
__device__ __forceinline__ T* unit_at(T* base, uint32_t i, uint64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + i * bytes);
}

template <Type kType>
__device__ __forceinline__ void load_unit(const void* base, uint32_t i, float (&v)[kUnit]) {
  if constexpr (kType == Type::kFloat32) {
    const float* from = unit_at(static_cast<const float*>(base), i, 32);
    const Pack low = load_pack(from), high = load_pack(from + 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = as_float(low.w[j]), v[4 + j] = as_float(high.w[j]);
  } else {
    const Pack pack = load_pack(unit_at(static_cast<const uint16_t*>(base), i, 16));
#pragma unroll
    for (int j = 0; j < 4; ++j) unpack_pair<kType>(pack.w[j], v[2 * j], v[2 * j + 1]);
  }
}

// A unit in its stored form: 4 words of two halves each, or 8 words of one float32 each.
template <Type kType>
struct Stored {
  static constexpr int kWords = kType == Type::kFloat32 ? 8 : 4;
  uint32_t w[kWords];
};

template <Type kType>
__device__ __forceinline__ Stored<kType> nearest(const float (&v)[kUnit]) {
  Stored<kType> unit;
#pragma unroll
  for (int j = 0; j < unit.kWords; ++j) {
    if constexpr (kType == Type::kFloat32) {
      unit.w[j] = as_bits(v[j]);
    } else {
      unit.w[j] = nearest_pair<kType>(v[2 * j], v[2 * j + 1]);
    }
  }
  return unit;
}

template <Type kType>
__device__ __forceinline__ Stored<kType> stochastic(const float (&v)[kUnit], const Words& random) {
  static_assert(kType != Type::kFloat32);
  Stored<kType> unit;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t first = random.w[j] & 0xffffu, second = random.w[j] >> 16;
    if constexpr (kType == Type::kBfloat16) {
      unit.w[j] = bf16_stochastic(v[2 * j], first) | bf16_stochastic(v[2 * j + 1], second) << 16;
    } else {
      unit.w[j] = fp16_stochastic(v[2 * j], first) | fp16_stochastic(v[2 * j + 1], second) << 16;
    }
  }
  return unit;
}

template <Type kType>
__device__ __forceinline__ void store_unit(void* base, uint32_t i, const Stored<kType>& unit) {
  if constexpr (kType == Type::kFloat32) {
    float* to = unit_at(static_cast<float*>(base), i, 32);
    store_pack(to, Pack{{unit.w[0], unit.w[1], unit.w[2], unit.w[3]}});
    store_pack(to + 4, Pack{{unit.w[4], unit.w[5], unit.w[6], unit.w[7]}});
  } else {
    store_pack(unit_at(static_cast<uint16_t*>(base), i, 16),
               Pack{{unit.w[0], unit.w[1], unit.w[2], unit.w[3]}});
  }
}

__device__ __forceinline__ void load_joined(const void* base, const int16_t* residual, uint32_t i,
                                            float (&v)[kUnit]) {
  const Pack high = load_pack(unit_at(static_cast<const uint16_t*>(base), i, 16)),
             low = load_pack(unit_at(residual, i, 16));
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const uint32_t shift = static_cast<uint32_t>(j & 1) * 16u;
    v[j] = residual_join(static_cast<uint16_t>(high.w[j >> 1] >> shift),
                         static_cast<int16_t>(low.w[j >> 1] >> shift));
  }
}

// The whole units [begin, end) of a chunk. Their elements follow one another in the stream and in memory, at
// 16-byte boundaries. The range is empty if there are no such units. Element i of unit u is element 8 u + i -
// first of the entry.
struct Units {
  uint64_t begin, end;
};

__device__ __forceinline__ int64_t width(int32_t type) {
  return static_cast<Type>(type) == Type::kFloat32 ? 4 : 2;
}

// Whether element `at` of theta, `to` of the outputs and `low_at` of the residual lie on 16-byte boundaries.
__device__ __forceinline__ bool aligned(const Entry& e, int64_t at, int64_t to, int64_t low_at) {
  uintptr_t addresses = 0;
  if (e.theta != nullptr) addresses |= reinterpret_cast<uintptr_t>(e.theta) + at * width(e.type);
  if (e.out[0] != nullptr) addresses |= reinterpret_cast<uintptr_t>(e.out[0]) + to * width(e.out_type);
  if (e.out[1] != nullptr) addresses |= reinterpret_cast<uintptr_t>(e.out[1]) + to * width(e.out_type);
  if (e.residual != nullptr) addresses |= reinterpret_cast<uintptr_t>(e.residual + low_at);
  return addresses % 16 == 0;
}

__device__ __forceinline__ Units whole_units(const Entry& e, const Chunk& chunk) {
  Units units = {(e.first + static_cast<uint64_t>(chunk.begin) + kUnit - 1) / kUnit,
                 (e.first + static_cast<uint64_t>(chunk.end)) / kUnit};
  const bool one_row = e.row_count == 1;
  const bool numbered = e.rows == nullptr && (one_row || e.pitch == static_cast<uint64_t>(e.columns));
  const bool dense = e.theta == nullptr || (e.column_stride == 1 && (one_row || e.row_stride == e.columns));
  if (!numbered || !dense || units.begin >= units.end) return Units{0, 0};
  const int64_t at = static_cast<int64_t>(units.begin * kUnit - e.first);
  return aligned(e, at, at, at) ? units : Units{0, 0};
}

// Elements [low, high) of a unit, of any strides. Element i lies at theta + at + i stride, at residual +
// residual_at + i and at out + to + i. `together`: all eight, side by side on 16-byte boundaries.
struct Piece {
  uint32_t unit;
  int low, high;
  int64_t at, stride, residual_at, to;
  bool together;

  __device__ __forceinline__ bool has(int i) const { return i >= low && i < high; }
};

// The whole units of a chunk, numbered from 0. Unit i is unit `begin` + i of the stream and lies at byte 16 i
// or 32 i of each buffer. A kernel reads the table into a Place once, before its loop: the compiler cannot
// rule out that a store changes the table.
struct Place {
  void* theta;
  void* out[2];
  int16_t* residual;
  uint32_t begin, count, who;

  __device__ __forceinline__ Place(const Entry& e, const Units& whole)
      : begin(static_cast<uint32_t>(whole.begin)),
        count(static_cast<uint32_t>(whole.end - whole.begin)),
        who(e.who) {
    const int64_t at = static_cast<int64_t>(whole.begin * kUnit - e.first);
    theta = unit_base(e.theta, at, e.type);
    out[0] = unit_base(e.out[0], at, e.out_type);
    out[1] = unit_base(e.out[1], at, e.out_type);
    residual = e.residual == nullptr ? nullptr : e.residual + at;
  }

  __device__ __forceinline__ static void* unit_base(void* base, int64_t at, int32_t type) {
    return base == nullptr ? nullptr : static_cast<char*>(base) + at * width(type);
  }
};

// The factors of z of an entry: those of its whole units, and single ones. kScaled kernels have them.
template <bool kScaled>
struct Factors {
  __device__ __forceinline__ Factors(const Entry&, const Units&) {}
  __device__ __forceinline__ bool aligned() const { return true; }
  __device__ __forceinline__ void load(uint32_t, float (&)[kUnit]) const {}
  __device__ __forceinline__ static void load_piece(const Entry&, const Piece&, float (&)[kUnit]) {}
  __device__ __forceinline__ static void apply(const float (&)[kUnit], float (&)[kUnit]) {}
};

template <>
struct Factors<true> {
  const char* base;
  Scale type;

  __device__ __forceinline__ int64_t bytes() const {
    return type == Scale::kMask ? 1 : type == Scale::kBfloat16 ? 2 : 4;
  }

  __device__ __forceinline__ Factors(const Entry& e, int64_t at)
      : base(static_cast<const char*>(e.scale)), type(static_cast<Scale>(e.scale_type)) {
    if (base != nullptr) base += at * bytes();
  }
  __device__ __forceinline__ Factors(const Entry& e, const Units& whole)
      : Factors(e, static_cast<int64_t>(whole.begin * kUnit - e.first)) {}

  // Whether the factors of a unit can be loaded together: a mask in 8 bytes, others in 16.
  __device__ __forceinline__ bool aligned() const {
    return reinterpret_cast<uintptr_t>(base) % (type == Scale::kMask ? 8 : 16) == 0;
  }

  __device__ __forceinline__ void load(uint32_t i, float (&f)[kUnit]) const {
    if (base == nullptr) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) f[j] = 1.0f;
    } else if (type == Scale::kMask) {
      const uint64_t eight = *global(reinterpret_cast<const uint64_t*>(unit_at(base, i, kUnit)));
#pragma unroll
      for (int j = 0; j < kUnit; ++j) f[j] = from_int(static_cast<int32_t>(eight >> (8 * j) & 0xffu));
    } else if (type == Scale::kBfloat16) {
      load_unit<Type::kBfloat16>(base, i, f);
    } else {
      load_unit<Type::kFloat32>(base, i, f);
    }
  }

  __device__ __forceinline__ static void load_piece(const Entry& e, const Piece& p, float (&f)[kUnit]) {
    const Factors whole(e, p.residual_at);
    if (p.together && whole.aligned()) return whole.load(0, f);
#pragma unroll
    for (int j = 0; j < kUnit; ++j)
      f[j] = p.has(j) ? factor_at(e.scale, e.scale_type, p.residual_at + j) : 0.0f;
  }

  __device__ __forceinline__ static void apply(const float (&f)[kUnit], float (&z)[kUnit]) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) z[j] = mul_rn(z[j], f[j]);
  }
};

template <Type kType>
__device__ __forceinline__ void load_stored(const void* base, uint32_t i, Stored<kType>& unit) {
  const char* from = unit_at(static_cast<const char*>(base), i, kType == Type::kFloat32 ? 32 : 16);
#pragma unroll
  for (int j = 0; j < unit.kWords; j += 4) {
    const Pack pack = load_pack(from + 4 * j);
#pragma unroll
    for (int k = 0; k < 4; ++k) unit.w[j + k] = pack.w[k];
  }
}

// Notes inf and NaN at half an instruction per 16-bit element. 0 x + state stays 0 while x is finite. After
// the first x that is not finite it is a NaN.
template <Type kType>
struct Watch {
  uint32_t state = 0;

  __device__ __forceinline__ void see(uint32_t bits) {  // of one float32, or of two halves
#if defined(__CUDA_ARCH__)
    if constexpr (kType == Type::kFloat32) {
      state = as_bits(fma_rn(as_float(bits), 0.0f, as_float(state)));
    } else if constexpr (kType == Type::kBfloat16) {
      asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(state) : "r"(bits), "r"(0));
    } else {
      asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(state) : "r"(bits), "r"(0));
    }
#else
    constexpr uint32_t kInfinity = kType == Type::kFloat32    ? 0x7f800000u
                                   : kType == Type::kBfloat16 ? 0x7f80u
                                                              : 0x7c00u;
    const bool high = kType != Type::kFloat32 && ((bits >> 16) & kInfinity) == kInfinity;
    if ((bits & kInfinity) == kInfinity || high) state = 1;
#endif
  }

  __device__ __forceinline__ bool seen() const {
    return (state & (kType == Type::kFloat32 ? 0x7fffffffu : 0x7fff7fffu)) != 0;
  }
};

// A unit rounded to nearest, or stochastically with the words of its rounding draw.
template <Type kType, bool kStochastic>
__device__ __forceinline__ Stored<kType> rounded(const float (&v)[kUnit], const Words& random) {
  if constexpr (!kStochastic || kType == Type::kFloat32) {
    return nearest<kType>(v);
  } else {
    return stochastic<kType>(v, random);
  }
}

// Splits a unit of float32 into bfloat16 halves and the low bits that they lack.
__device__ __forceinline__ Stored<Type::kBfloat16> split(const float (&v)[kUnit],
                                                         Stored<Type::kBfloat16>& low) {
  Stored<Type::kBfloat16> unit;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int16_t low_even, low_odd;
    const uint32_t even = residual_split(v[2 * j], low_even), odd = residual_split(v[2 * j + 1], low_odd);
    unit.w[j] = even | odd << 16;
    low.w[j] = static_cast<uint16_t>(low_even) | static_cast<uint32_t>(static_cast<uint16_t>(low_odd)) << 16;
  }
  return unit;
}

// Reads the results of a thread's units i, i + stride, ... again and counts the values that are inf or NaN.
template <Type kType>
__device__ __forceinline__ uint64_t count_nonfinite(const void* base, uint32_t i, uint32_t end,
                                                    uint32_t stride) {
  uint64_t count = 0;
#pragma unroll 1
  for (; i < end; i += stride) {
    Stored<kType> result;
    load_stored<kType>(base, i, result);
#pragma unroll
    for (int j = 0; j < result.kWords; ++j) {
      count += is_nonfinite(kType, result.w[j]);
      if (kType != Type::kFloat32) count += is_nonfinite(kType, result.w[j] >> 16);
    }
  }
  return count;
}

// Element i of a unit, rounded to a 16-bit type.
template <bool kStochastic>
__device__ __forceinline__ uint32_t rounded_one(Type type, float value, const Words& random, int i) {
  const uint32_t some = (random.w[i >> 1] >> ((i & 1) * 16)) & 0xffffu;
  if (type == Type::kBfloat16) return kStochastic ? bf16_stochastic(value, some) : bf16_nearest(value);
  return kStochastic ? fp16_stochastic(value, some) : fp16_nearest(value);
}

// The elements of a piece that begins at `at` of a tensor, and 0 for those that it does not have.
__device__ __forceinline__ void load_piece(const Piece& p, const void* base, Type type, int64_t at,
                                           int64_t stride, float (&v)[kUnit]) {
  if (p.together) {
    const char* from = static_cast<const char*>(base) + at * width(static_cast<int32_t>(type));
    if (type == Type::kFloat32) return load_unit<Type::kFloat32>(from, 0, v);
    if (type == Type::kBfloat16) return load_unit<Type::kBfloat16>(from, 0, v);
    return load_unit<Type::kFloat16>(from, 0, v);
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) v[i] = p.has(i) ? load(base, type, at + i * stride) : 0.0f;
}

// The same of theta, with its low bits if `join`.
__device__ __forceinline__ void load_theta(const Entry& e, const Piece& p, bool join, float (&v)[kUnit]) {
  const uint16_t* theta = static_cast<const uint16_t*>(e.theta);
  if (!join) return load_piece(p, theta, static_cast<Type>(e.type), p.at, p.stride, v);
  if (p.together) return load_joined(theta + p.at, e.residual + p.residual_at, 0, v);
#pragma unroll
  for (int i = 0; i < kUnit; ++i)
    v[i] = p.has(i) ? residual_join(theta[p.at + i * p.stride], e.residual[p.residual_at + i]) : 0.0f;
}

// Rounds a piece to nearest, into an output.
__device__ __forceinline__ void store_piece(const Piece& p, void* base, Type type, const float (&v)[kUnit]) {
  if (p.together) {
    char* to = static_cast<char*>(base) + p.to * width(static_cast<int32_t>(type));
    if (type == Type::kFloat32) return store_unit<Type::kFloat32>(to, 0, nearest<Type::kFloat32>(v));
    if (type == Type::kBfloat16) return store_unit<Type::kBfloat16>(to, 0, nearest<Type::kBfloat16>(v));
    return store_unit<Type::kFloat16>(to, 0, nearest<Type::kFloat16>(v));
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if (p.has(i)) store_nearest(base, type, p.to + i, v[i]);
  }
}

// Stores a unit and returns how many of its values are inf or NaN.
template <Type kType>
__device__ __forceinline__ uint32_t store_counted(void* to, const Stored<kType>& unit) {
  store_unit<kType>(to, 0, unit);
  Watch<kType> watch;
#pragma unroll
  for (int j = 0; j < unit.kWords; ++j) watch.see(unit.w[j]);
  return watch.seen() ? static_cast<uint32_t>(count_nonfinite<kType>(to, 0, 1, 1)) : 0;
}

// Rounds a piece into theta, or into theta and its low bits. Returns how many results are inf or NaN.
template <bool kStochastic>
__device__ __forceinline__ uint32_t store_theta(const Entry& e, const Piece& p, bool join,
                                                const float (&v)[kUnit], const Words& random) {
  const Type type = static_cast<Type>(e.type);
  if (p.together) {
    void* to = static_cast<char*>(e.theta) + p.at * width(e.type);
    if (type == Type::kFloat32) return store_counted<Type::kFloat32>(to, nearest<Type::kFloat32>(v));
    if (type == Type::kFloat16)
      return store_counted<Type::kFloat16>(to, rounded<Type::kFloat16, kStochastic>(v, random));
    if (!join) return store_counted<Type::kBfloat16>(to, rounded<Type::kBfloat16, kStochastic>(v, random));
    Stored<Type::kBfloat16> low;
    const Stored<Type::kBfloat16> unit = split(v, low);
    store_unit<Type::kBfloat16>(e.residual + p.residual_at, 0, low);
    return store_counted<Type::kBfloat16>(to, unit);
  }
  uint32_t count = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if (!p.has(i)) continue;
    const int64_t at = p.at + i * p.stride;
    uint32_t bits;
    if (type == Type::kFloat32) {
      bits = as_bits(v[i]);
      static_cast<float*>(e.theta)[at] = v[i];
    } else {
      bits = join ? residual_split(v[i], e.residual[p.residual_at + i])
                  : rounded_one<kStochastic>(type, v[i], random, i);
      static_cast<uint16_t*>(e.theta)[at] = static_cast<uint16_t>(bits);
    }
    count += is_nonfinite(type, bits);
  }
  return count;
}

}  // namespace kernels
}  // namespace zo
