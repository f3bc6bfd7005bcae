// axpy.cu: axpy_ for a list of tensors, on a GPU
//
// math       theta <- round(decay theta + sum_k a_k z_k), as in elementwise.h
// traffic    bf16: 2 B read and 2 B written per element, again for every 17 to 32 terms of a replay
// work       instructions of the whole loop per element, on sm_90, nvcc 13.0:
//            one term      normal 24.4 (16-bit) and 23.6 (float32), rademacher 7.0 and 6.0. Eight normals
//                          take 195, and 143 of these are products and float arithmetic of the stream
//            more          a decay adds 1.1, stochastic rounding to bf16 adds 7.1, residual adds 12.5
//            many terms    21.0 a term in groups of four, 21.9 for each term that is left over. A sum adds
//                          7.1, or 13.8 if its rounding is stochastic
//            replay        one-term steps: 23.7 a step in groups of four, 24.5 for each step that is left
//                          over. With stochastic rounding 31.1 and 32.9. Every 32 steps add 3.4, or 4.5
// registers  at most 64; 80 with stochastic or residual rounding, or with many terms or steps; 128 with both.
//            No spill on sm_80 to sm_120: tests/kernels_cuda/test_sass.py, `python -m benchmarks.predict`
// scaled     a list with factors of z has kernels of its own. At most 80 registers for one term, 117 for one
//            with stochastic rounding, which spills at 80 on sm_120, and 128 for sums. The others hold no
//            instruction for factors
// launch     walk.h
// equal      bit for bit to zokern/backends/reference.py for every grid. A value depends on its stream number
//            alone, and the non-finite results are counted in integers. cvt.rn rounds as zo/rounding.h does
// source     Malladi et al. 2023, Algorithm 1; stream: zokern/stream.py, version 1
#include <cuda_runtime.h>

#include "terms.h"
#include "walk.h"

namespace zo {
namespace kernels {

template <Direction kDirection, Rounding kRounding, Sum kSum, bool kScaled>
struct AxpyVerb {
  static constexpr bool kPlain = is_plain(kSum);
  // Signs to nearest have no register left for a decay that is read from memory: with it they spill on sm_80
  // and sm_100. Under a control their lists take the kernel of lists with factors, which are 1.
  static constexpr bool kReadsDecay =
      kScaled || kDirection == Direction::kNormal || kRounding != Rounding::kNearest;
  const Keys& keys;
  const Terms terms;
  float coefficient;   // of the one term of a plain sum
  uint32_t nonfinite;  // results of this thread that are inf or NaN

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
    const Factors<kScaled>& factors;
    const Name& random_name;  // of the rounding draw of a plain sum
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

    // Stores v rounded to nearest, or v with its low bits.
    __device__ __forceinline__ void store(uint32_t i, const float (&v)[kUnit]) {
      if constexpr (kJoin) {
        Stored<Type::kBfloat16> low;
        const Stored<kType> result = split(v, low);
        store_unit<Type::kBfloat16>(place.residual, i, low);
        store(i, result);
      } else {
        store(i, nearest<kType>(v));
      }
    }

    // One unit of a plain sum.
    template <class Z>
    __device__ __forceinline__ void unit(uint32_t i, const Z& z_of) {
      float v[kUnit], z[kUnit], f[kUnit];
      load(i, v);
      factors.load(i, f);
      z_of(z);
      factors.apply(f, z);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) v[j] = fma_rn(verb.coefficient, z[j], verb.decayed(v[j]));
      if constexpr (kRandom) {
        store(i, stochastic<kType>(v, philox_named(place.begin + i, random_name, verb.keys)));
      } else {
        store(i, v);
      }
    }

    // The form of v between two sums: the words of its type, or float32 where low bits are kept.
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

    __device__ __forceinline__ void end(uint32_t i, const Name& random, const float (&v)[kUnit],
                                        Kept& kept) const {
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

    // The loop only notes that some result was not finite. Then the thread reads its results again and counts
    // them.
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
  __device__ __forceinline__ bool loop(const Place& place, const Factors<kScaled>& factors,
                                       const Turn& turn) {
    const Name random(place.who, last_step(), kRoundingDraw, keys);
    Body<kType> body{*this, place, factors, random, {}};
    if constexpr (kPlain) {
      each_unit<kDirection>(place, turn, Name(place.who, last_step(), terms.last.draw, keys), keys, body);
    } else if constexpr (kSum == Sum::kTerms) {
      many(place, turn, body);
    } else {
      steps(place, turn, body);
    }
    return true;
  }

  // Sums of any length. A warp makes 32 terms ready at a time, one in each lane, in its own shared memory. So
  // the part of a name that does not depend on the block is computed once, not for each unit. A pass over the
  // chunk takes 1, 2, 4, ... whole sums, as many as fit into 32 terms, and their terms stay for all units. A
  // sum of more than 32 terms makes its terms ready again for each turn of a warp.
  template <class Body>
  __device__ __forceinline__ void many(const Place& place, const Turn& turn, Body& body) {
    __shared__ Ready all[kThreads];
    __shared__ uint4 all_random[Body::kRandom ? kThreads : 1];
    if (terms.each <= kWarp) {
      int32_t pass = terms.each;
#pragma unroll 1
      while (pass <= kWarp / 2) pass *= 2;  // nvcc makes a division, by MUFU.RCP, of adding one sum at a time
#pragma unroll 1
      for (int32_t k = 0; k < terms.count; k += pass) {
        sums<false>(k, terms.count - k < pass ? terms.count - k : pass, all, all_random, place, turn, body);
      }
    } else {
#pragma unroll 1
      for (int32_t k = 0; k < terms.count; k += terms.each)
        sums<true>(k, terms.each, all, all_random, place, turn, body);
    }
    body.settle(turn.lane, place.count, turn.lanes);
  }

  // Adds terms k .. k + here - 1: whole sums, or (kLong) one sum of more than 32 terms.
  template <bool kLong, class Body>
  __device__ __forceinline__ void sums(int32_t k, int32_t here, Ready* all, uint4* all_random,
                                       const Place& place, const Turn& turn, Body& body) {
    constexpr int kUnits = kLong || kScaled ? 1 : kTogether;  // factors take the registers of a second unit
    const uint32_t lane = threadIdx.x % kWarp;
    const Ready* const begin = all + (threadIdx.x - lane);
    const auto ready = [&](int32_t done) {
      done += static_cast<int32_t>(lane);
      __syncwarp();  // every lane has used the 32 terms before
      if (done < here) make_ready<Body::kRandom>(terms, k + done, place.who, keys, all, all_random);
      __syncwarp();
    };
    if constexpr (!kLong) ready(0);
    // In a long sum all lanes of a warp take the same number of turns.
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
      float f[kUnit];
      if (inside(0)) body.factors.load(i, f);
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
            body.factors.apply(f, z);
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

  // Sums of one term each, from terms made ready as in many(). The next term needs nothing but the stored
  // weights. So every 32 terms are a pass over the chunk, 4 bytes an element for about 760 instructions. The
  // loops decide nothing. Four terms of one unit share constants, keys and the branch. Two units with two
  // shared terms would cost as much, and spill.
  template <class Body>
  __device__ __forceinline__ void steps(const Place& place, const Turn& turn, Body& body) {
    __shared__ Ready all[kThreads];
    __shared__ uint4 all_random[Body::kRandom ? kThreads : 1];
    const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int32_t k = 0; k < terms.count; k += kWarp) {
      const int32_t mine = k + static_cast<int32_t>(lane);
      __syncwarp();  // every lane has used the 32 terms before
      if (mine < terms.count) make_ready<Body::kRandom>(terms, mine, place.who, keys, all, all_random);
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
    const Factors<kScaled> factors(e, whole);
    if (!factors.aligned()) return false;
    switch (static_cast<Type>(e.type)) {
      case Type::kFloat32:
        return loop<Type::kFloat32>(place, factors, turn);
      case Type::kBfloat16:
        if (kRounding == Rounding::kResidual && e.residual == nullptr) return false;
        return loop<Type::kBfloat16>(place, factors, turn);
      case Type::kFloat16:
        return loop<Type::kFloat16>(place, factors, turn);
    }
    return false;
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    const Type type = static_cast<Type>(e.type);
    const bool join = kRounding == Rounding::kResidual && type == Type::kBfloat16 && e.residual != nullptr;
    constexpr bool kStochastic = kRounding == Rounding::kStochastic;
    float v[kUnit];
    Words random = {};
    float z[kUnit], f[kUnit];
    Factors<kScaled>::load_piece(e, p, f);
    if constexpr (kPlain) {
      if constexpr (kStochastic)
        random = philox_named(p.unit, Name(e.who, last_step(), kRoundingDraw, keys), keys);
      // Signs, and stochastic rounding, load theta after z: before it a kernel would spill.
      constexpr bool kFirst = kDirection == Direction::kNormal && !kStochastic;
      if constexpr (kFirst) load_theta(e, p, join, v);
      values<kDirection>(p.unit, Name(e.who, last_step(), terms.last.draw, keys), keys, z);
      Factors<kScaled>::apply(f, z);
      if constexpr (!kFirst) load_theta(e, p, join, v);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = fma_rn(coefficient, z[i], decayed(v[i]));
    } else {
      load_theta(e, p, join, v);
#pragma unroll 1
      for (int32_t k = 0, left = 0; k < terms.count; ++k) {
        const Draw term = terms.at(k);
        if (left == 0) {
          left = terms.each;
#pragma unroll
          for (int i = 0; i < kUnit; ++i) v[i] = mul_rn(term.decay, v[i]);
        }
        values<kDirection>(p.unit, Name(e.who, term.step + terms.clock, term.draw, keys), keys, z);
        Factors<kScaled>::apply(f, z);
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
          const uint16_t half = static_cast<uint16_t>(rounded_one<kStochastic>(type, v[i], random, i));
          v[i] = type == Type::kBfloat16 ? bf16_to_float(half) : fp16_to_float(half);
        }
      }
    }
    nonfinite += store_theta < kPlain && kStochastic > (e, p, join, v, random);
  }
};

constexpr int resident(Rounding rounding, Sum sum) {
  if (is_plain(sum)) return rounding == Rounding::kNearest ? kResident : kResidentMore;
  return rounding == Rounding::kNearest ? kResidentMore : kResidentMost;
}

template <class Verb>
__device__ __forceinline__ void axpy_list(const List& list, Terms terms, unsigned long long* nonfinite) {
  if (Verb::kPlain && Verb::kReadsDecay && list.control != nullptr) terms.last.decay = list.control[kDecay];
  Verb verb{list.keys, terms, Verb::kPlain ? terms.coefficients[0] : 0.0f, 0};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
  // This is rare, so every thread adds for itself.
  if (verb.nonfinite != 0) atomicAdd(nonfinite, static_cast<unsigned long long>(verb.nonfinite));
}

template <Direction kDirection, Rounding kRounding, Sum kSum>
__global__ void __launch_bounds__(kThreads, resident(kRounding, kSum))
    axpy_kernel(const List list, const Draw* draws, const float* coefficients, int32_t draw_count,
                int32_t each, Draw last, unsigned long long* nonfinite) {
  if (stopped(list, kGo)) return;
  const Terms terms = {draws, coefficients, draw_count, each, clock_of(list), last, list.control};
  axpy_list<AxpyVerb<kDirection, kRounding, kSum, false>>(list, terms, nonfinite);
}

// Lists with factors of z: a sum of one term, or sums of any length.
template <Direction kDirection, Rounding kRounding, Sum kSum>
__global__ void __launch_bounds__(kThreads, kSum == Sum::kTerms || kRounding == Rounding::kStochastic
                                                ? kResidentMost
                                                : kResidentMore)
    scaled_axpy_kernel(const List list, const Draw* draws, const float* coefficients, int32_t draw_count,
                       int32_t each, Draw last, unsigned long long* nonfinite) {
  if (stopped(list, kGo)) return;
  const Terms terms = {draws, coefficients, draw_count, each, clock_of(list), last, list.control};
  axpy_list<AxpyVerb<kDirection, kRounding, kSum, true>>(list, terms, nonfinite);
}

template <Direction kDirection, Rounding kRounding>
void axpy_along(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each,
                unsigned long long* nonfinite) {
  // The common calls have kernels of their own, without the instructions of the others.
  auto* kernel = each == 1 ? axpy_kernel<kDirection, kRounding, Sum::kSteps>
                           : axpy_kernel<kDirection, kRounding, Sum::kTerms>;
  if (draw_count == 1) {
    kernel = draws[0].decay == 1.0f && launch.control == nullptr
                 ? axpy_kernel<kDirection, kRounding, Sum::kTerm>
                 : axpy_kernel<kDirection, kRounding, Sum::kDecayedTerm>;
  }
  constexpr bool kReads = AxpyVerb<kDirection, kRounding, Sum::kDecayedTerm, false>::kReadsDecay;
  if (launch.scaled || (!kReads && draw_count == 1 && launch.control != nullptr)) {
    kernel = draw_count == 1 ? scaled_axpy_kernel<kDirection, kRounding, Sum::kDecayedTerm>
                             : scaled_axpy_kernel<kDirection, kRounding, Sum::kTerms>;
  }
  start("axpy_", kernel, launch, launch.draws, launch.coefficients, draw_count, each, draws[draw_count - 1],
        nonfinite);
}

template <Rounding kRounding>
void axpy_rounded(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each,
                  unsigned long long* nonfinite) {
  switch (launch.direction) {
    case Direction::kNormal:
      return axpy_along<Direction::kNormal, kRounding>(launch, draws, draw_count, each, nonfinite);
    case Direction::kRademacher:
      return axpy_along<Direction::kRademacher, kRounding>(launch, draws, draw_count, each, nonfinite);
  }
  unknown("axpy_", launch.direction);
}

// setup.py compiles this file once for each rounding, side by side.
#define ZO_AXPY(rounding)                                                                      \
  template void axpy_rounded<Rounding::rounding>(const Launch&, const Draw*, int32_t, int32_t, \
                                                 unsigned long long*);
#if defined(ZOKERN_ROUNDING)
ZO_AXPY(ZOKERN_ROUNDING)
#else
ZO_AXPY(kNearest)
ZO_AXPY(kStochastic)
ZO_AXPY(kResidual)
#endif

}  // namespace kernels
}  // namespace zo
