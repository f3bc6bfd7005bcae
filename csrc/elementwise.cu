// elementwise.cu: draw, axpy_ and perturb for a list of tensors, on a GPU
//
// math     as elementwise.h: float32 inside, fma in draw order, one rounding; unit u is elements 8 u .. 8 u + 7 of the stream
// traffic  bf16 axpy_: 2 B read + 2 B written per element for any K (a replay: for every 17 to 32 terms of whole sums);
//          perturb: 2 B read + one write per side; z moves no bytes
// work     whole loop per element, sm_90, one draw, no decay: normal 24.4 instructions (16-bit), 23.9 (float32), of which
//          143 of 195 for eight elements are products and float arithmetic of the stream; rademacher 7.0, 6.0; both signs of
//          perturb: normal 26.1 (16-bit), rademacher 7.9; stochastic rounding to bf16 7.1 more, residual 12.6 more; decay
//          1.1 more. Many terms, where they come in fours: 21.0 each (one that is left 21.9) and 7.1 around a sum, stochastic
//          13.8; a replay of steps of one term 23.7 a step, stochastic 31.1, where steps come in fours (a step that is left
//          24.5, 32.9), and 3.4, 4.5 around every 32.
//          At most 64 registers (perturb, stochastic, residual, many terms or steps: 80; both of these: 128), no spill, sm_80
//          to sm_120: `python tests/test_sass.py`, `python -m benchmarks.predict`, nvcc 13.0
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

// The terms a_k z_k: coefficients, names and decays in device memory, and the last name and decay by value, so that a sum of
// one term reads no list of names. Every `each` terms are a sum: they begin with a decay and end with a rounding. `clock` is
// what the launch adds to every step number.
struct Terms {
  const Draw* draws;
  const float* coefficients;
  int32_t count, each;
  uint32_t clock;
  Draw last;

  __device__ __forceinline__ Draw at(int32_t k) const { return k + 1 < count ? draws[k] : last; }
};

// A term as `many` wants it: 32 bytes of shared memory, read by all lanes at once.
struct Ready {
  uint4 name;
  float coefficient, decay;
  uint32_t step, reserved;

  Ready() = default;
  __device__ __forceinline__ Ready(const Draw& term, float a, uint32_t who, uint32_t clock, const Keys& keys)
      : name(Name(who, term.step + clock, term.draw, keys).words()),
        coefficient(a),
        decay(term.decay),
        step(term.step + clock),
        reserved(0) {}
};

// Of a turn: units that share the terms, and terms that share a unit. Constants, keys and the branch are shared by all of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kTogether = 1, kUnrolled = 4;  // two units spill
#else
constexpr int kTogether = 2, kUnrolled = 4;
#endif

// What a call adds: one term, one with a decay, any number of terms in sums of any length, or several sums of one term each
enum class Sum : int32_t { kTerm = 0, kDecayedTerm = 1, kTerms = 2, kSteps = 3 };

constexpr bool is_plain(Sum sum) { return sum == Sum::kTerm || sum == Sum::kDecayedTerm; }

template <Direction kDirection, Rounding kRounding, Sum kSum>
struct AxpyVerb {
  static constexpr bool kPlain = is_plain(kSum);
  const Keys& keys;
  const Terms terms;
  float coefficient;   // of a plain sum
  uint32_t nonfinite;  // of this thread

  __device__ __forceinline__ uint32_t last_step() const { return terms.last.step + terms.clock; }
  __device__ __forceinline__ float decayed(float x) const {
    return kSum == Sum::kDecayedTerm ? mul_rn(terms.last.decay, x) : x;
  }

  template <Type kType>
  struct Body {
    static constexpr bool kJoin = kRounding == Rounding::kResidual && kType == Type::kBfloat16;
    static constexpr bool kRandom = kRounding == Rounding::kStochastic && kType != Type::kFloat32;
    AxpyVerb& verb;
    const Place& place;
    const Name& random_name;  // of a plain sum
    Watch<kType> watch;

    __device__ __forceinline__ void load(uint32_t i, float (&v)[kUnit]) const {
      if constexpr (kJoin) {
        load_joined(place.theta, place.residual, i, v);
      } else {
        load_unit<kType>(place.theta, i, v);
      }
    }

    __device__ __forceinline__ void store(uint32_t i, const Stored<kType>& result) {
      store_unit<kType>(place.theta, i, result);
#pragma unroll
      for (int j = 0; j < result.kWords; ++j) watch.see(result.w[j]);
    }

    // to nearest, or with its low bits
    __device__ __forceinline__ void store(uint32_t i, const float (&v)[kUnit]) {
      if constexpr (kJoin) {
        Stored<kType> result;
        Stored<Type::kBfloat16> low;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int16_t low_even, low_odd;
          const uint32_t even = residual_split(v[2 * j], low_even), odd = residual_split(v[2 * j + 1], low_odd);
          result.w[j] = even | odd << 16;
          low.w[j] = static_cast<uint16_t>(low_even) | static_cast<uint32_t>(static_cast<uint16_t>(low_odd)) << 16;
        }
        store_unit<Type::kBfloat16>(place.residual, i, low);
        store(i, result);
      } else {
        store(i, nearest<kType>(v));
      }
    }

    // of a plain sum
    template <class Z>
    __device__ __forceinline__ void unit(uint32_t i, const Z& z_of) {
      float v[kUnit], z[kUnit];
      load(i, v);
      z_of(z);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) v[j] = fma_rn(verb.coefficient, z[j], verb.decayed(v[j]));
      if constexpr (kRandom) {
        store(i, stochastic<kType>(v, philox_named(place.begin + i, random_name, verb.keys)));
      } else {
        store(i, v);
      }
    }

    // What v is between two sums: the words that are stored, or a float32 where it has its low bits
    using Kept = Stored<kJoin ? Type::kFloat32 : kType>;

    __device__ __forceinline__ void load(uint32_t i, Kept& kept) const {
      if constexpr (kJoin) {
        float v[kUnit];
        load(i, v);
        kept = nearest<Type::kFloat32>(v);
      } else {
        load_stored<kType>(place.theta, i, kept);
      }
    }

    __device__ __forceinline__ void finish(uint32_t i, const Kept& kept) {
      if constexpr (kJoin) {
        float v[kUnit];
        unpack(kept, v);
        store(i, v);
      } else {
        store(i, kept);
      }
    }

    __device__ __forceinline__ static void begin(const Kept& kept, float decay, float (&v)[kUnit]) {
      unpack(kept, v);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) v[j] = mul_rn(decay, v[j]);
    }

    __device__ __forceinline__ void end(uint32_t i, const Name& random, const float (&v)[kUnit], Kept& kept) const {
      if constexpr (kRandom) {
        kept = stochastic<kType>(v, philox_named(place.begin + i, random, verb.keys));
      } else {
        kept = nearest<kJoin ? Type::kFloat32 : kType>(v);
      }
    }

    template <Type kOf>
    __device__ __forceinline__ static void unpack(const Stored<kOf>& unit, float (&v)[kUnit]) {
#pragma unroll
      for (int j = 0; j < unit.kWords; ++j) {
        if constexpr (kOf == Type::kFloat32) {
          v[j] = as_float(unit.w[j]);
        } else {
          unpack_pair<kOf>(unit.w[j], v[2 * j], v[2 * j + 1]);
        }
      }
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
    const Name random(place.who, last_step(), kRoundingDraw, keys);
    Body<kType> body{*this, place, random, {}};
    if constexpr (kPlain) {
      each_unit<kDirection>(place, turn, Name(place.who, last_step(), terms.last.draw, keys), keys, body);
    } else if constexpr (kSum == Sum::kTerms) {
      many(place, turn, body);
    } else {
      steps(place, turn, body);
    }
    return true;
  }

  // Sums of any length. A warp makes 32 terms ready at a time, one a lane, in its own part of shared memory: what a name needs
  // before it meets a block is then computed once in 32 lanes and not by each thread for each unit. One, two, four or more
  // sums, as fit into 32 terms, are a pass over the chunk, so that their terms stay for all units. A longer sum makes its terms
  // ready anew for each turn of a warp.
  template <class Body>
  __device__ __forceinline__ void many(const Place& place, const Turn& turn, Body& body) {
    __shared__ Ready all[kThreads];
    __shared__ uint4 all_random[Body::kRandom ? kThreads : 1];
    if (terms.each <= kWarp) {
      int32_t pass = terms.each;
#pragma unroll 1
      while (pass <= kWarp / 2) pass *= 2;  // one sum more at a time is a division to nvcc, by MUFU.RCP
#pragma unroll 1
      for (int32_t k = 0; k < terms.count; k += pass) {
        sums<false>(k, terms.count - k < pass ? terms.count - k : pass, all, all_random, place, turn, body);
      }
    } else {
#pragma unroll 1
      for (int32_t k = 0; k < terms.count; k += terms.each) sums<true>(k, terms.each, all, all_random, place, turn, body);
    }
    body.settle(turn.lane, place.count, turn.lanes);
  }

  // Terms k .. k + here - 1: whole sums, or one that is longer than 32 terms
  template <bool kLong, class Body>
  __device__ __forceinline__ void sums(int32_t k, int32_t here, Ready* all, uint4* all_random, const Place& place,
                                       const Turn& turn, Body& body) {
    constexpr int kUnits = kLong ? 1 : kTogether;
    const uint32_t lane = threadIdx.x % kWarp;
    const Ready* const begin = all + (threadIdx.x - lane);
    const auto ready = [&](int32_t done) {
      done += static_cast<int32_t>(lane);
      __syncwarp();  // the 32 before have been used
      if (done < here) {
        const Draw term = terms.at(k + done);
        all[threadIdx.x] = Ready(term, terms.coefficients[k + done], place.who, terms.clock, keys);
        if constexpr (Body::kRandom) {
          all_random[threadIdx.x] = Name(place.who, term.step + terms.clock, kRoundingDraw, keys).words();
        }
      }
      __syncwarp();
    };
    if constexpr (!kLong) ready(0);
    // of a long sum, the same number of turns for all lanes of a warp
#pragma unroll 1
    for (uint32_t i = turn.lane; i - (kLong ? lane : 0) < place.count; i += kUnits * turn.lanes) {
      const auto inside = [&](int u) { return (!kLong && u == 0) || i + u * turn.lanes < place.count; };
      typename Body::Kept kept[kUnits] = {};
      uint64_t first[kUnits];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (inside(u)) body.load(i + u * turn.lanes, kept[u]);
        first[u] = first_product<kDirection>(place.begin + i + u * turn.lanes);
      }
      const Ready* term = begin;
#pragma unroll 1
      do {
        if constexpr (kLong) ready(0);
        float v[kUnits][kUnit];
#pragma unroll
        for (int u = 0; u < kUnits; ++u) body.begin(kept[u], term->decay, v[u]);
        const auto add = [&](const Ready* term) {
          const Name name(term->name);
          const float factor = term->coefficient;
#pragma unroll
          for (int u = 0; u < kUnits; ++u) {
            float z[kUnit];
            values<kDirection>(first[u], place.begin + i + u * turn.lanes, name, keys, z);
#pragma unroll
            for (int j = 0; j < kUnit; ++j) v[u][j] = fma_rn(factor, z[j], v[u][j]);
          }
        };
        const auto add_until = [&](const Ready* stop) {
#pragma unroll 1
          for (; term + kUnrolled <= stop; term += kUnrolled) {
#pragma unroll
            for (int n = 0; n < kUnrolled; ++n) add(term + n);
          }
#pragma unroll 1
          for (; term != stop; ++term) add(term);
        };
        if constexpr (kLong) {
          add_until(begin + kWarp);
#pragma unroll 1
          for (int32_t done = kWarp; done < here; done += kWarp) {
            ready(done);
            term = begin;
            add_until(begin + (here - done < kWarp ? here - done : kWarp));
          }
        } else {
          add_until(term + terms.each);
        }
        const Name random(all_random[Body::kRandom ? term - 1 - all : 0]);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) body.end(i + u * turn.lanes, random, v[u], kept[u]);
      } while (!kLong && term != begin + here);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (inside(u)) body.finish(i + u * turn.lanes, kept[u]);
      }
    }
  }

  // Sums of one term each, from terms made ready as many() makes them. What is stored after a term is all that the next needs,
  // so every 32 terms are a pass of their own over the chunk, 4 bytes for some 760 instructions, and the loops have nothing to
  // decide. Constants, keys and the branch are shared by four terms of one unit: two units that share two terms cost as much
  // and spill.
  template <class Body>
  __device__ __forceinline__ void steps(const Place& place, const Turn& turn, Body& body) {
    __shared__ Ready all[kThreads];
    __shared__ uint4 all_random[Body::kRandom ? kThreads : 1];
    const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int32_t k = 0; k < terms.count; k += kWarp) {
      const int32_t mine = k + static_cast<int32_t>(lane);
      __syncwarp();  // the 32 before have been used
      if (mine < terms.count) {
        const Draw term = terms.at(mine);
        all[threadIdx.x] = Ready(term, terms.coefficients[mine], place.who, terms.clock, keys);
        if constexpr (Body::kRandom) {
          all_random[threadIdx.x] = Name(place.who, term.step + terms.clock, kRoundingDraw, keys).words();
        }
      }
      __syncwarp();
      const Ready* const begin = all + (threadIdx.x - lane);
      const Ready* const end = begin + (terms.count - k < kWarp ? terms.count - k : kWarp);
#pragma unroll 1
      for (uint32_t i = turn.lane; i < place.count; i += turn.lanes) {
        typename Body::Kept kept;
        body.load(i, kept);
        const uint64_t first = first_product<kDirection>(place.begin + i);
        const auto add = [&](const Ready* term) {
          const Name name(term->name), random(all_random[Body::kRandom ? term - all : 0]);
          float v[kUnit], z[kUnit];
          body.begin(kept, term->decay, v);
          values<kDirection>(first, place.begin + i, name, keys, z);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) v[j] = fma_rn(term->coefficient, z[j], v[j]);
          body.end(i, random, v, kept);
        };
        const Ready* term = begin;
#pragma unroll 1
        for (; term + 4 <= end; term += 4) {
#pragma unroll
          for (int n = 0; n < 4; ++n) add(term + n);
        }
#pragma unroll 1
        for (; term != end; ++term) add(term);
        body.finish(i, kept);
      }
    }
    body.settle(turn.lane, place.count, turn.lanes);
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

  // element i of a unit in a 16-bit type
  template <bool kStochastic>
  __device__ __forceinline__ static uint32_t rounded(Type type, float value, const Words& random, int i) {
    const uint32_t some = (random.w[i >> 1] >> ((i & 1) * 16)) & 0xffffu;
    if (type == Type::kBfloat16) return kStochastic ? bf16_stochastic(value, some) : bf16_nearest(value);
    return kStochastic ? fp16_stochastic(value, some) : fp16_nearest(value);
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    const Type type = static_cast<Type>(e.type);
    const bool join = kRounding == Rounding::kResidual && type == Type::kBfloat16 && e.residual != nullptr;
    constexpr bool kStochastic = kRounding == Rounding::kStochastic;
    float v[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      v[i] = 0.0f;
      if (i < p.low || i >= p.high) continue;
      const int64_t at = p.at + i * p.stride;
      v[i] = join ? residual_join(static_cast<const uint16_t*>(e.theta)[at], e.residual[p.residual_at + i])
                  : load(e.theta, type, at);
    }
    Words random = {};
    float z[kUnit];
    if constexpr (kPlain) {
      if constexpr (kStochastic) random = philox_named(p.unit, Name(e.who, last_step(), kRoundingDraw, keys), keys);
      values<kDirection>(p.unit, Name(e.who, last_step(), terms.last.draw, keys), keys, z);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = fma_rn(coefficient, z[i], decayed(v[i]));
    } else {
#pragma unroll 1
      for (int32_t k = 0, left = 0; k < terms.count; ++k) {
        const Draw term = terms.at(k);
        if (left == 0) {
          left = terms.each;
#pragma unroll
          for (int i = 0; i < kUnit; ++i) v[i] = mul_rn(term.decay, v[i]);
        }
        values<kDirection>(p.unit, Name(e.who, term.step + terms.clock, term.draw, keys), keys, z);
        const float factor = terms.coefficients[k];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) v[i] = fma_rn(factor, z[i], v[i]);
        if (--left != 0 || type == Type::kFloat32 || join || (!kStochastic && k + 1 == terms.count)) continue;
        Words random = {};
        if constexpr (kStochastic) {
          random = philox_named(p.unit, Name(e.who, term.step + terms.clock, kRoundingDraw, keys), keys);
        }
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          const uint16_t half = static_cast<uint16_t>(rounded<kStochastic>(type, v[i], random, i));
          v[i] = type == Type::kBfloat16 ? bf16_to_float(half) : fp16_to_float(half);
        }
      }
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
        bits = join ? residual_split(v[i], e.residual[p.residual_at + i])
                    : rounded < kPlain && kStochastic > (type, v[i], random, i);
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

constexpr int resident(Rounding rounding, Sum sum) {
  if (is_plain(sum)) return rounding == Rounding::kNearest ? kResident : kResidentMore;
  return rounding == Rounding::kNearest ? kResidentMore : kResidentMost;
}

template <Direction kDirection, Rounding kRounding, Sum kSum>
__global__ void __launch_bounds__(kThreads, resident(kRounding, kSum))
    axpy_kernel(const List list, const Draw* draws, const float* coefficients, int32_t draw_count, int32_t each, Draw last,
                unsigned long long* nonfinite) {
  const Terms terms = {draws, coefficients, draw_count, each, clock_of(list), last};
  using Verb = AxpyVerb<kDirection, kRounding, kSum>;
  Verb verb{list.keys, terms, Verb::kPlain ? coefficients[0] : 0.0f, 0};
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
void start_axpy(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each, unsigned long long* nonfinite) {
  // the common calls have no instruction for what they do without
  auto* kernel = each == 1 ? axpy_kernel<kDirection, kRounding, Sum::kSteps> : axpy_kernel<kDirection, kRounding, Sum::kTerms>;
  if (draw_count == 1) {
    kernel = draws[0].decay == 1.0f ? axpy_kernel<kDirection, kRounding, Sum::kTerm>
                                    : axpy_kernel<kDirection, kRounding, Sum::kDecayedTerm>;
  }
  start("axpy_", kernel, launch, launch.draws, launch.coefficients, draw_count, each, draws[draw_count - 1], nonfinite);
}

template <Direction kDirection>
void start_axpy(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each, Rounding rounding,
                unsigned long long* nonfinite) {
  switch (rounding) {
    case Rounding::kNearest:
      return start_axpy<kDirection, Rounding::kNearest>(launch, draws, draw_count, each, nonfinite);
    case Rounding::kStochastic:
      return start_axpy<kDirection, Rounding::kStochastic>(launch, draws, draw_count, each, nonfinite);
    case Rounding::kResidual:
      return start_axpy<kDirection, Rounding::kResidual>(launch, draws, draw_count, each, nonfinite);
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

void axpy(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each, Rounding rounding, int64_t* nonfinite) {
  if (draw_count < 1) throw std::runtime_error("axpy_: draw_count is " + std::to_string(draw_count) + "; expected at least 1");
  if (launch.coefficients == nullptr || (draw_count > 1 && launch.draws == nullptr)) {
    throw std::runtime_error("axpy_: coefficients or the draws of several terms are not in device memory");
  }
  auto* count = reinterpret_cast<unsigned long long*>(nonfinite);
  switch (launch.direction) {
    case Direction::kNormal:
      return start_axpy<Direction::kNormal>(launch, draws, draw_count, each, rounding, count);
    case Direction::kRademacher:
      return start_axpy<Direction::kRademacher>(launch, draws, draw_count, each, rounding, count);
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
#if defined(ZOKERN_ARCHITECTURES)
  std::vector<std::string> names;
  for (const int arch : {ZOKERN_ARCHITECTURES}) names.push_back("sm_" + std::to_string(arch));
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
