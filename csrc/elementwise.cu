// elementwise.cu: draw, axpy_ and perturb for a list of tensors, on a GPU
//
// math     as elementwise.h: float32 inside, fma in draw order, one rounding; unit u is elements 8 u .. 8 u + 7 of the stream
// traffic  bf16 axpy_: 2 B read + 2 B written per element for any K; perturb: 2 B read + one write per side; z moves no bytes
// work     whole loop per element, sm_90, one draw, no decay: normal 24.4 instructions (16-bit), 23.9 (float32), of which
//          143 of 195 for eight elements are products and float arithmetic of the stream; rademacher 7.0, 6.0; both signs of
//          perturb: normal 26.1 (16-bit), rademacher 7.9; stochastic rounding to bf16 8.6 more, residual 12.6 more; each
//          further term 23.7. At most 64 registers (perturb, stochastic, residual: 80), no spill on sm_80 to sm_120:
//          `python tests/test_sass.py build/cubins`, `python -m benchmarks.predict`, nvcc 13.0
// launch   one persistent grid per list, blocks of 256 threads. A block takes a chunk or, when chunks are few, part of one; a
//          thread takes whole units, with one 16-byte load and store for 16-bit types and two for float32. A warp that has
//          4096 signs to make shares their Philox blocks through 512 bytes of shared memory (sign_tiles). Elements outside
//          whole units, and entries that are strided, gathered, sliced or off a 16-byte boundary, go one at a time, still
//          with one Philox block for the unit.
// equal    bit for bit to zokern/backends/reference.py for every grid: a value depends on its stream number alone, and the
//          count of non-finite results is an integer sum. Conversions in registers (cvt.rn) round as rounding.h does.
// source   Malladi et al. 2023, Algorithm 1; stream: zokern/stream.py, version 1
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "elementwise.h"
#include "units.h"

namespace zo {
namespace kernels {  // named, so that a kernel has the same symbol in every build

template <Direction kDirection>
struct DrawVerb {
  const Keys& keys;
  uint32_t step, draw;

  template <Type kType>
  struct Body {
    void* out;

    template <class Z>
    __device__ __forceinline__ void unit(uint32_t i, const Z& z_of) {
      float z[kUnit];
      z_of(z);
      store_unit<kType>(out, i, nearest<kType>(z));
    }
    __device__ __forceinline__ void settle(uint32_t, uint32_t, uint32_t) {}
  };

  template <Type kType>
  __device__ __forceinline__ bool loop(const Place& place, const Turn& turn) {
    Body<kType> body{place.out[0]};
    each_unit<kDirection>(place, turn, Name(place.who, step, draw, keys), keys, body);
    return true;
  }

  __device__ __forceinline__ bool units(const Entry& e, const Units& whole, const Turn& turn) {
    const Place place(e, whole);
    switch (static_cast<Type>(e.out_type)) {
      case Type::kFloat32:
        return loop<Type::kFloat32>(place, turn);
      case Type::kBfloat16:
        return loop<Type::kBfloat16>(place, turn);
      case Type::kFloat16:
        return loop<Type::kFloat16>(place, turn);
    }
    return false;
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    float z[kUnit];
    values<kDirection>(p.unit, Name(e.who, step, draw, keys), keys, z);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i >= p.low && i < p.high) store_nearest(e.out[0], static_cast<Type>(e.out_type), p.to + i, z[i]);
    }
  }
};

// The terms a_k z_k of a sum: coefficients and names in device memory, and the last name by value, so that a sum of one term
// reads no list of names. `clock` is what the launch adds to every step number.
struct Terms {
  const Draw* draws;
  const float* coefficients;
  int32_t count;
  uint32_t clock;
  Draw last;
};

template <Direction kDirection, Rounding kRounding, bool kPlain>
struct AxpyVerb {
  const Keys& keys;
  const Terms terms;
  float coefficient;  // of a plain sum
  float decay;
  uint64_t nonfinite;

  __device__ __forceinline__ uint32_t last_step() const { return terms.last.step + terms.clock; }

  // v <- sum, for a unit whose z for the last name z_of makes
  template <class Z>
  __device__ __forceinline__ void sum(uint32_t unit, uint32_t who, const Z& z_of, float (&v)[kUnit]) {
    float z[kUnit];
    if constexpr (kPlain) {
      z_of(z);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = fma_rn(coefficient, z[i], v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = mul_rn(decay, v[i]);
#pragma unroll 1
      for (int32_t k = 0; k < terms.count; ++k) {
        Draw term = terms.last;
        if (k + 1 < terms.count) term = terms.draws[k];
        values<kDirection>(unit, Name(who, term.step + terms.clock, term.draw, keys), keys, z);
        const float factor = terms.coefficients[k];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) v[i] = fma_rn(factor, z[i], v[i]);
      }
    }
  }

  template <Type kType>
  struct Body {
    static constexpr bool kJoin = kRounding == Rounding::kResidual && kType == Type::kBfloat16;
    AxpyVerb& verb;
    const Place& place;
    const Name& random_name;
    Watch<kType> watch;

    template <class Z>
    __device__ __forceinline__ void unit(uint32_t i, const Z& z_of) {
      float v[kUnit];
      if constexpr (kJoin) {
        load_joined(place.theta, place.residual, i, v);
      } else {
        load_unit<kType>(place.theta, i, v);
      }
      verb.sum(place.begin + i, place.who, z_of, v);
      Stored<kType> result;
      if constexpr (kJoin) {
        Stored<Type::kBfloat16> low;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int16_t low_even, low_odd;
          const uint32_t even = residual_split(v[2 * j], low_even), odd = residual_split(v[2 * j + 1], low_odd);
          result.w[j] = even | odd << 16;
          low.w[j] = static_cast<uint16_t>(low_even) | static_cast<uint32_t>(static_cast<uint16_t>(low_odd)) << 16;
        }
        store_unit<Type::kBfloat16>(place.residual, i, low);
      } else if constexpr (kRounding == Rounding::kStochastic && kType != Type::kFloat32) {
        const Words random = philox_named(place.begin + i, random_name, verb.keys);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t first = random.w[j] & 0xffffu, second = random.w[j] >> 16;
          if constexpr (kType == Type::kBfloat16) {
            result.w[j] = bf16_stochastic(v[2 * j], first) | bf16_stochastic(v[2 * j + 1], second) << 16;
          } else {
            result.w[j] = fp16_stochastic(v[2 * j], first) | fp16_stochastic(v[2 * j + 1], second) << 16;
          }
        }
      } else {
        result = nearest<kType>(v);
      }
      store_unit<kType>(place.theta, i, result);
#pragma unroll
      for (int j = 0; j < result.kWords; ++j) watch.see(result.w[j]);
    }

    // The loop only watches whether a result was not finite; if one was, the thread reads its results again and counts.
    __device__ __forceinline__ void settle(uint32_t i, uint32_t end, uint32_t stride) {
      if (!watch.seen()) return;
      watch.state = 0;
#pragma unroll 1
      for (; i < end; i += stride) {
        Stored<kType> result;
        load_stored<kType>(place.theta, i, result);
#pragma unroll
        for (int j = 0; j < result.kWords; ++j) {
          verb.nonfinite += is_nonfinite(kType, result.w[j]);
          if (kType != Type::kFloat32) verb.nonfinite += is_nonfinite(kType, result.w[j] >> 16);
        }
      }
    }
  };

  template <Type kType>
  __device__ __forceinline__ bool loop(const Place& place, const Turn& turn) {
    const Name name(place.who, last_step(), terms.last.draw, keys), random(place.who, last_step(), kRoundingDraw, keys);
    Body<kType> body{*this, place, random, {}};
    // several terms: each evaluates its own z, unit by unit
    each_unit<kPlain ? kDirection : Direction::kNormal>(place, turn, name, keys, body);
    return true;
  }

  __device__ __forceinline__ bool units(const Entry& e, const Units& whole, const Turn& turn) {
    const Place place(e, whole);
    switch (static_cast<Type>(e.type)) {
      case Type::kFloat32:
        return loop<Type::kFloat32>(place, turn);
      case Type::kBfloat16:
        if (kRounding == Rounding::kResidual && e.residual == nullptr) return false;
        return loop<Type::kBfloat16>(place, turn);
      case Type::kFloat16:
        return loop<Type::kFloat16>(place, turn);
    }
    return false;
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    const Type type = static_cast<Type>(e.type);
    const bool join = kRounding == Rounding::kResidual && type == Type::kBfloat16 && e.residual != nullptr;
    float v[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      v[i] = 0.0f;
      if (i < p.low || i >= p.high) continue;
      const int64_t at = p.at + i * p.stride;
      v[i] = join ? residual_join(static_cast<const uint16_t*>(e.theta)[at], e.residual[p.residual_at + i])
                  : load(e.theta, type, at);
    }
    const Name name(e.who, last_step(), terms.last.draw, keys);
    sum(p.unit, e.who, [&](float (&z)[kUnit]) { values<kDirection>(p.unit, name, keys, z); }, v);
    Words random = {};
    if constexpr (kRounding == Rounding::kStochastic) {
      random = philox_named(p.unit, Name(e.who, last_step(), kRoundingDraw, keys), keys);
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i < p.low || i >= p.high) continue;
      const int64_t at = p.at + i * p.stride;
      uint32_t bits;
      if (type == Type::kFloat32) {
        bits = as_bits(v[i]);
        static_cast<float*>(e.theta)[at] = v[i];
      } else {
        const uint32_t some = (random.w[i >> 1] >> ((i & 1) * 16)) & 0xffffu;
        if (join) {
          bits = residual_split(v[i], e.residual[p.residual_at + i]);
        } else if (type == Type::kBfloat16) {
          bits = kRounding == Rounding::kStochastic ? bf16_stochastic(v[i], some) : bf16_nearest(v[i]);
        } else {
          bits = kRounding == Rounding::kStochastic ? fp16_stochastic(v[i], some) : fp16_nearest(v[i]);
        }
        static_cast<uint16_t*>(e.theta)[at] = static_cast<uint16_t>(bits);
      }
      nonfinite += is_nonfinite(type, bits);
    }
  }
};

template <Direction kDirection>
struct PerturbVerb {
  const Keys& keys;
  uint32_t step, draw;
  float plus, minus;

  template <Type kType, Type kOut>
  struct Body {
    const PerturbVerb& verb;
    const Place& place;

    template <class Z>
    __device__ __forceinline__ void unit(uint32_t i, const Z& z_of) {
      float v[kUnit], z[kUnit], out[kUnit];
      if (kType == Type::kBfloat16 && place.residual != nullptr) {
        load_joined(place.theta, place.residual, i, v);
      } else {
        load_unit<kType>(place.theta, i, v);
      }
      z_of(z);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) out[j] = fma_rn(verb.plus, z[j], v[j]);
      store_unit<kOut>(place.out[0], i, nearest<kOut>(out));
      if (place.out[1] == nullptr) return;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) out[j] = fma_rn(verb.minus, z[j], v[j]);
      store_unit<kOut>(place.out[1], i, nearest<kOut>(out));
    }
    __device__ __forceinline__ void settle(uint32_t, uint32_t, uint32_t) {}
  };

  __device__ __forceinline__ bool units(const Entry& e, const Units& whole, const Turn& turn) {
    const Place place(e, whole);
#define ZO_INSTANCE(direction, theta, out)                                                  \
  if constexpr (kDirection == direction) {                                                  \
    if (e.type == static_cast<int32_t>(theta) && e.out_type == static_cast<int32_t>(out)) { \
      Body<theta, out> body{*this, place};                                                  \
      each_unit<kDirection>(place, turn, Name(place.who, step, draw, keys), keys, body);    \
      return true;                                                                          \
    }                                                                                       \
  }
#include "instances.def"
#undef ZO_INSTANCE
    return false;
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    const Type type = static_cast<Type>(e.type), out_type = static_cast<Type>(e.out_type);
    const bool join = type == Type::kBfloat16 && e.residual != nullptr;
    float z[kUnit];
    values<kDirection>(p.unit, Name(e.who, step, draw, keys), keys, z);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i < p.low || i >= p.high) continue;
      const int64_t at = p.at + i * p.stride;
      const float v = join ? residual_join(static_cast<const uint16_t*>(e.theta)[at], e.residual[p.residual_at + i])
                           : load(e.theta, type, at);
      store_nearest(e.out[0], out_type, p.to + i, fma_rn(plus, z[i], v));
      if (e.out[1] != nullptr) store_nearest(e.out[1], out_type, p.to + i, fma_rn(minus, z[i], v));
    }
  }
};

template <Direction kDirection>
__global__ void __launch_bounds__(kThreads, kResident) draw_kernel(const List list, uint32_t step, uint32_t draw) {
  DrawVerb<kDirection> verb{list.keys, step + clock_of(list), draw};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
}

template <Direction kDirection, Rounding kRounding, bool kPlain>
__global__ void __launch_bounds__(kThreads, kRounding == Rounding::kNearest ? kResident : kResidentMore)
    axpy_kernel(const List list, const Draw* draws, const float* coefficients, int32_t draw_count, Draw last, float decay,
                unsigned long long* nonfinite) {
  const Terms terms = {draws, coefficients, draw_count, clock_of(list), last};
  AxpyVerb<kDirection, kRounding, kPlain> verb{list.keys, terms, kPlain ? coefficients[0] : 0.0f, decay, 0};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
  if (verb.nonfinite != 0) atomicAdd(nonfinite, static_cast<unsigned long long>(verb.nonfinite));  // rare: no reduction first
}

template <Direction kDirection>
__global__ void __launch_bounds__(kThreads, kResidentMore)
    perturb_kernel(const List list, uint32_t step, uint32_t draw, float plus, float minus) {
  PerturbVerb<kDirection> verb{list.keys, step + clock_of(list), draw, plus, minus};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
}

__global__ void __launch_bounds__(kThreads, kResident)
    philox_kernel(const uint32_t* counters, int64_t count, uint32_t k0, uint32_t k1, int rounds, uint32_t* words) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const uint32_t* counter = counters + 4 * i;
    const Words four = philox4x32(counter[0], counter[1], counter[2], counter[3], k0, k1, rounds);
#pragma unroll
    for (int j = 0; j < 4; ++j) words[4 * i + j] = four.w[j];
  }
}

template <Direction kDirection, Rounding kRounding>
void start_axpy(const Launch& launch, const Draw* draws, int32_t draw_count, float decay, unsigned long long* nonfinite) {
  // the common call: one term, no decay, and no instruction for either
  const bool plain = draw_count == 1 && decay == 1.0f;
  auto* kernel = plain ? axpy_kernel<kDirection, kRounding, true> : axpy_kernel<kDirection, kRounding, false>;
  start("axpy_", kernel, launch, launch.draws, launch.coefficients, draw_count, draws[draw_count - 1], decay, nonfinite);
}

template <Direction kDirection>
void start_axpy(const Launch& launch, const Draw* draws, int32_t draw_count, float decay, Rounding rounding,
                unsigned long long* nonfinite) {
  switch (rounding) {
    case Rounding::kNearest:
      return start_axpy<kDirection, Rounding::kNearest>(launch, draws, draw_count, decay, nonfinite);
    case Rounding::kStochastic:
      return start_axpy<kDirection, Rounding::kStochastic>(launch, draws, draw_count, decay, nonfinite);
    case Rounding::kResidual:
      return start_axpy<kDirection, Rounding::kResidual>(launch, draws, draw_count, decay, nonfinite);
  }
  throw std::runtime_error("axpy_: unknown rounding " + std::to_string(static_cast<int>(rounding)));
}

}  // namespace kernels

using namespace kernels;

void philox(const uint32_t* counters, int64_t count, uint32_t k0, uint32_t k1, int rounds, uint32_t* words,
            const Launch& launch) {
  if (count <= 0) return;
  const int64_t needed = (count + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(std::min(resident_blocks(philox_kernel, launch.workers), needed));
  ZO_LAUNCH(philox_kernel, blocks, kThreads, reinterpret_cast<cudaStream_t>(launch.stream), counters, count, k0, k1, rounds,
            words);
  check(cudaGetLastError(), "philox");
}

void draw(const Launch& launch, uint32_t step, uint32_t draw) {
  switch (launch.direction) {
    case Direction::kNormal:
      return start("draw", draw_kernel<Direction::kNormal>, launch, step, draw);
    case Direction::kRademacher:
      return start("draw", draw_kernel<Direction::kRademacher>, launch, step, draw);
  }
  unknown("draw", launch.direction);
}

void axpy(const Launch& launch, const Draw* draws, int32_t draw_count, float decay, Rounding rounding, int64_t* nonfinite) {
  if (draw_count < 1) throw std::runtime_error("axpy_: draw_count is " + std::to_string(draw_count) + "; expected at least 1");
  if (launch.coefficients == nullptr || (draw_count > 1 && launch.draws == nullptr)) {
    throw std::runtime_error("axpy_: coefficients or the draws of several terms are not in device memory");
  }
  auto* count = reinterpret_cast<unsigned long long*>(nonfinite);
  switch (launch.direction) {
    case Direction::kNormal:
      return start_axpy<Direction::kNormal>(launch, draws, draw_count, decay, rounding, count);
    case Direction::kRademacher:
      return start_axpy<Direction::kRademacher>(launch, draws, draw_count, decay, rounding, count);
  }
  unknown("axpy_", launch.direction);
}

void perturb(const Launch& launch, uint32_t step, uint32_t draw, const float* scales) {
  switch (launch.direction) {
    case Direction::kNormal:
      return start("perturb", perturb_kernel<Direction::kNormal>, launch, step, draw, scales[0], scales[1]);
    case Direction::kRademacher:
      return start("perturb", perturb_kernel<Direction::kRademacher>, launch, step, draw, scales[0], scales[1]);
  }
  unknown("perturb", launch.direction);
}

std::string implementation() { return "cuda"; }

void select(const std::string& name) {
  if (name != "cuda") throw std::invalid_argument("unknown implementation '" + name + "'; the module has cuda");
}

std::vector<std::string> architectures() {
#if defined(__CUDA_ARCH_LIST__)
  std::vector<std::string> names;
  for (const int arch : {__CUDA_ARCH_LIST__}) names.push_back("sm_" + std::to_string(arch / 10));
  return names;
#else
  return {"host"};
#endif
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

}  // namespace zo
