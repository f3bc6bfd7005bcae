// elementwise.cpp: draw, axpy and perturb on the CPU
//
// math     elementwise.h. z is made in two stages: first 64 Philox blocks, 1 KB of words on the stack, then
//          values from words. This breaks the latency chain of the ten rounds. Blocks may sit in any lane, so
//          the lanes are chosen to make the transpose of the four words short
// build    once per instruction set with -DZOKERN_ISA=avx512 | avx2 | scalar over the trait simd/<isa>.h, and
//          once without. The latter part chooses a path when it runs (ZOKERN_CPU_ISA forces one) and divides
//          the chunks among OpenMP threads
// fast     the path for contiguous tensors, to nearest, with one term or one sum of up to eight, for whole
//          vectors from a block boundary. With one term it prefetches theta a piece ahead. A bfloat16 word
//          holds the sine and the cosine of one Philox word, so nothing is widened or packed
// general  the path for all other cases (simd/general.h)
// traffic  float32: 4 B read and 4 B written an element. bfloat16 and float16: 2 B and 2 B. The number of
//          terms does not matter
// equal    bit for bit to zokern/backends/reference.py on every path (tests/backends/test_cpu.py), without
//          contraction and fast-math
// source   Malladi et al. 2023, Algorithm 1; stream: zokern/stream.py, version 1
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

// clang-format off
#include "simd/namespace.h"  // comes first, because it renames the namespace of the others
// clang-format on
#include "job.h"

#if defined(ZOKERN_ISA)

#include ZO_TRAIT
// clang-format off
#include "simd/words.h"
#include "simd/values.h"
#include "simd/rows.h"
#include "simd/general.h"
// clang-format on

namespace zo {
namespace {

template <Type T, bool kPaired>
ZO_INLINE void load_unit(const Element<T>* p, F& a, F& b) {
  if constexpr (T == Type::kFloat32) {
    a = Simd::load(p), b = Simd::load(p + kLanes);
  } else if constexpr (T == Type::kFloat16) {
    a = Simd::load_fp16(p), b = Simd::load_fp16(p + kLanes);
  } else if constexpr (kPaired) {
    const U pairs = Simd::load_pairs(p);
    a = Simd::floats(pairs << 16), b = Simd::floats(pairs & 0xffff0000u);
  } else {
    a = Simd::floats(Simd::load_half(p) << 16), b = Simd::floats(Simd::load_half(p + kLanes) << 16);
  }
}

// A lane becomes NaN after a result that is inf or NaN. There are two vectors, so that Rademacher does not
// wait for one chain of fma.
struct Flag {
  F a, b;
};

template <Type T, bool kPaired>
ZO_INLINE void store_unit(Element<T>* p, F a, F b, Flag& flag) {
  const F zero = Simd::all(0.0f);
  if constexpr (T == Type::kFloat32) {
    Simd::store(p, a), Simd::store(p + kLanes, b);
    flag.a = Simd::fma(a, zero, flag.a), flag.b = Simd::fma(b, zero, flag.b);
  } else if constexpr (T == Type::kFloat16) {
    Simd::store_fp16(p, a), Simd::store_fp16(p + kLanes, b);
    // float16 overflows from 65504 (1 + 2^-12) = 65520 on. A flag for a little less only costs one count.
    const F scale = Simd::all(0x1.002p112f);
    flag.a = Simd::fma(a * scale, zero, flag.a), flag.b = Simd::fma(b * scale, zero, flag.b);
  } else {
    const U x = bf16_round(a), y = bf16_round(b);
    if (kPaired) {
      Simd::store_pairs(p, (x >> 16) | (y & 0xffff0000u));
    } else {
      Simd::store_half(p, x >> 16), Simd::store_half(p + kLanes, y >> 16);
    }
    flag.a = Simd::fma(Simd::floats(x), zero, flag.a), flag.b = Simd::fma(Simd::floats(y), zero, flag.b);
  }
}

// The fast path for one term. kSides is 0 for draw,
// 1 for axpy and for perturb with one side, 2 for perturb with two.
template <Direction D, Type T, Type O, int kSides, bool kDecay, bool kScaled>
int64_t fast(const Job& job, const Run& run, const Element<T>* theta, Element<O>* out0, Element<O>* out1,
             float scale0, float scale1) {
  constexpr bool kPaired = O == Type::kBfloat16;
  constexpr int kSpan = kBlocks * per_block(D);
  constexpr int kAhead =
      D == Direction::kNormal && kSides > 0 ? Simd::kGroup * 8 * static_cast<int>(sizeof(*theta)) : 0;
  alignas(64) uint32_t words[4 * kBlocks];
  const Name name{run.entry->who, job.draws[0].step, job.draws[0].draw, job.keys};
  const F c0 = Simd::all(scale0), c1 = Simd::all(scale1), decay = Simd::all(job.draws[0].decay);
  const Scale scale = static_cast<Scale>(run.entry->scale_type);
  Flag flag{Simd::all(0.0f), Simd::all(0.0f)};
  for (int64_t done = 0; done < run.n; done += kSpan) {
    const int n = static_cast<int>(run.n - done < kSpan ? run.n - done : kSpan);
    const uint64_t block = (run.number + static_cast<uint64_t>(done)) / per_block(D);
    make_words<D == Direction::kNormal && !kPaired, kAhead>(
        static_cast<uint32_t>(block), (n + per_block(D) - 1) / per_block(D), name, words,
        reinterpret_cast<const char*>(theta + done + kSpan));
    sweep<D, kPaired>(words, n / kUnit, [&](int unit, F a, F b) ZO_INLINE_LAMBDA {
      const int64_t i = done + unit * kUnit;
      if constexpr (kScaled) {
        F f, g;
        load_factors<kPaired>(run.entry->scale, scale, run.low + i, f, g);
        a = a * f, b = b * g;
      }
      if constexpr (kSides == 0) {
        store_unit<O, kPaired>(out0 + i, a, b, flag);
      } else {
        F x, y;
        load_unit<T, kPaired>(theta + i, x, y);
        if (kDecay) x = decay * x, y = decay * y;
        store_unit<O, kPaired>(out0 + i, Simd::fma(c0, a, x), Simd::fma(c0, b, y), flag);
        if (kSides == 2) store_unit<O, kPaired>(out1 + i, Simd::fma(c1, a, x), Simd::fma(c1, b, y), flag);
      }
    });
  }
  return Simd::any_nan(flag.a + flag.b) ? 1 : 0;
}

// The fast path for one sum of a few terms: theta moves once, and the sum stays in registers.
constexpr int kTerms = 8;

bool is_short_sum(const Job& job) {
  return job.verb == Verb::kAxpy && job.each == job.draw_count && job.draw_count <= kTerms;
}

template <Direction D, Type T, bool kScaled>
int64_t fast_sum(const Job& job, const Run& run, Element<T>* theta) {
  constexpr bool kPaired = T == Type::kBfloat16;
  constexpr int kSpan = kBlocks * per_block(D);
  alignas(64) uint32_t words[kTerms][4 * kBlocks];
  F c[kTerms];
  for (int k = 0; k < job.draw_count; ++k) c[k] = Simd::all(quiet(job.draws[k].coefficient));
  const F decay = Simd::all(quiet(job.draws[0].decay));
  Flag flag{Simd::all(0.0f), Simd::all(0.0f)};
  for (int64_t done = 0; done < run.n; done += kSpan) {
    const int n = static_cast<int>(run.n - done < kSpan ? run.n - done : kSpan);
    const uint64_t block = (run.number + static_cast<uint64_t>(done)) / per_block(D);
    for (int k = 0; k < job.draw_count; ++k) {
      const Name name{run.entry->who, job.draws[k].step, job.draws[k].draw, job.keys};
      make_words<D == Direction::kNormal && !kPaired, 0>(
          static_cast<uint32_t>(block), (n + per_block(D) - 1) / per_block(D), name, words[k], nullptr);
    }
    for (int unit = 0; unit < n / kUnit; ++unit) {
      Element<T>* const at = theta + done + unit * kUnit;
      F x, y;
      load_unit<T, kPaired>(at, x, y);
      x = decay * x, y = decay * y;
      F f, g;
      if constexpr (kScaled) {
        const Scale scale = static_cast<Scale>(run.entry->scale_type);
        load_factors<kPaired>(run.entry->scale, scale, run.low + done + unit * kUnit, f, g);
      }
      for (int k = 0; k < job.draw_count; ++k) {
        F a, b;
        unit_values<D, kPaired>(words[k], unit, a, b);
        if constexpr (kScaled) a = a * f, b = b * g;
        x = Simd::fma(c[k], a, x), y = Simd::fma(c[k], b, y);
      }
      store_unit<T, kPaired>(at, x, y, flag);
    }
  }
  return Simd::any_nan(flag.a + flag.b) ? 1 : 0;
}

template <Direction D, Type T, Type O, bool kScaled>
int64_t fast_verb(const Job& job, const Run& run) {
  const auto* theta = static_cast<const Element<T>*>(run.theta);
  auto* out0 = static_cast<Element<O>*>(run.entry->out[0]);
  auto* out1 = static_cast<Element<O>*>(run.entry->out[1]);
  if (out0 != nullptr) out0 += run.position;
  if (out1 != nullptr) out1 += run.position;
  if (job.verb == Verb::kDraw) {
    if constexpr (T == O) fast<D, T, O, 0, false, kScaled>(job, run, theta, out0, out1, 0.0f, 0.0f);
    return 0;
  }
  if (job.verb == Verb::kPerturb) {
    const float c0 = quiet(job.scales[0]);
    if (out1 == nullptr) {
      fast<D, T, O, 1, false, kScaled>(job, run, theta, out0, out1, c0, 0.0f);
    } else {
      fast<D, T, O, 2, false, kScaled>(job, run, theta, out0, out1, c0, quiet(job.scales[1]));
    }
    return 0;
  }
  if constexpr (T == O) {
    auto* here = static_cast<Element<O>*>(const_cast<void*>(run.theta));
    const float c = quiet(job.draws[0].coefficient);
    const auto one =
        job.draws[0].decay == 1.0f ? fast<D, T, O, 1, false, kScaled> : fast<D, T, O, 1, true, kScaled>;
    const int64_t flag = job.draw_count > 1 ? fast_sum<D, T, kScaled>(job, run, here)
                                            : one(job, run, theta, here, nullptr, c, 0.0f);
    if (flag != 0) return count_nonfinite<T>(here, run.n);
  }
  return 0;
}

int64_t fast_instance(const Job& job, const Run& run) {
  const auto theta = static_cast<Type>(run.entry->type), out = static_cast<Type>(run.entry->out_type);
#define ZO_INSTANCE(D, T, O)                                                 \
  if (job.direction == D && theta == T && out == O)                          \
    return run.entry->scale == nullptr ? fast_verb<D, T, O, false>(job, run) \
                                       : fast_verb<D, T, O, true>(job, run);
#include "instances.def"
#undef ZO_INSTANCE
  return 0;
}

int64_t consecutive(const Job& job, const Run& run) {
  const int width = job.direction == Direction::kNormal ? kNormalPerBlock : kRademacherPerBlock;
  const Type type = static_cast<Type>(run.entry->type);
  const bool keep = type == Type::kBfloat16 && run.entry->residual != nullptr && job.verb == Verb::kPerturb;
  const bool nearest = type == Type::kFloat32 || job.rounding == Rounding::kNearest ||
                       (job.rounding == Rounding::kResidual && type != Type::kBfloat16);
  const bool few = job.draw_count == 1 || is_short_sum(job);
  if (run.column_stride != 1 || !few || keep || !nearest) return general(job, run);
  int64_t head = static_cast<int64_t>((width - run.number % width) % width);
  if (head > run.n) head = run.n;
  const int64_t tail = head + (run.n - head) / kUnit * kUnit;
  int64_t nonfinite = 0;
  if (head > 0) nonfinite += general(job, part(run, 0, head));
  if (tail > head) nonfinite += fast_instance(job, part(run, head, tail));
  if (run.n > tail) nonfinite += general(job, part(run, tail, run.n));
  return nonfinite;
}

}  // namespace

// Runs one chunk of a job. Returns the number of results that are inf or NaN.
extern "C" int64_t ZO_JOIN(zokern_chunk_, ZOKERN_ISA)(const void* address, int64_t which) {
  const Job& job = *static_cast<const Job*>(address);
  const Chunk& chunk = job.chunks[which];
  const Entry& entry = job.entries[chunk.entry];
  int64_t nonfinite = 0;
  each_run(entry, chunk, [&](const Run& run) { nonfinite += consecutive(job, run); });
  return nonfinite;
}

}  // namespace zo

#else  // this part is compiled once: it divides the chunks among threads

#include <omp.h>

#include <stdexcept>

namespace zo {
namespace {

bool compiled(Direction direction, const Entry& entry) {
  const auto theta = static_cast<Type>(entry.type), out = static_cast<Type>(entry.out_type);
#define ZO_INSTANCE(D, T, O) \
  if (direction == D && theta == T && out == O) return true;
#include "instances.def"
#undef ZO_INSTANCE
  return false;
}

int64_t run(Job& job, const Launch& launch) {
  job.direction = launch.direction;
  job.entries = launch.entries;
  job.chunks = launch.chunks;
  spread(launch.seed, job.keys);
  for (int64_t c = 0; c < launch.chunk_count; ++c) {
    if (!compiled(launch.direction, launch.entries[launch.chunks[c].entry])) {
      throw std::invalid_argument(
          "a launch names a direction or dtypes that csrc/instances.def does not list");
    }
  }
  const auto chunk = active().elementwise;
  const int workers = static_cast<int>(launch.workers);
  int64_t nonfinite = 0;
#pragma omp parallel num_threads(workers) if (workers > 1) reduction(+ : nonfinite)
  {
    DefaultMode mode;
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < launch.chunk_count; ++c) nonfinite += chunk(&job, c);
  }
  return nonfinite;
}

}  // namespace

void philox(const uint32_t* counters, int64_t count, uint32_t k0, uint32_t k1, int rounds, uint32_t* words,
            const Launch&) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* x = counters + 4 * i;
    const Words result = philox4x32(x[0], x[1], x[2], x[3], k0, k1, rounds);
    std::memcpy(words + 4 * i, result.w, sizeof result.w);
  }
}

void draw(const Launch& launch, uint32_t step, uint32_t draw) {
  const Draw one{step, draw, 0.0f, 1.0f};
  Job job;
  job.verb = Verb::kDraw, job.rounding = Rounding::kNearest, job.draws = &one, job.draw_count = 1;
  run(job, launch);
}

void axpy(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each, Rounding rounding,
          int64_t* nonfinite) {
  Job job;
  job.verb = Verb::kAxpy, job.rounding = rounding, job.draws = draws, job.draw_count = draw_count,
  job.each = each;
  *nonfinite += run(job, launch);
}

void perturb(const Launch& launch, uint32_t step, uint32_t draw, const float* scales) {
  const Draw one{step, draw, 0.0f, 1.0f};
  Job job;
  job.verb = Verb::kPerturb, job.rounding = Rounding::kNearest, job.draws = &one, job.draw_count = 1,
  job.scales = scales;
  run(job, launch);
}

}  // namespace zo
#endif
