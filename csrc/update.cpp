// update.cpp: an update rule, momentum, Adam or the sign, on the CPU
//
// math     update.h, 512 elements at a time. g goes into 2 KB of the first cache, and then theta's values.
//          The rule reads and writes m and v in place, in whole vectors. The last elements of a row go
//          through a copy
// traffic  bytes an element: 8 (momentum), 16 (adam) or 0 (sign) for the state, 8 (float32) or 4 for theta,
//          for any number of terms. Memory is the limit, so one path serves every stride, rounding and number
//          of terms
// build    once per instruction set with -DZOKERN_ISA=avx512 | avx2 | scalar over the trait simd/<isa>.h, and
//          once without
// equal    bit for bit to zokern/backends/reference.py on every path and number of threads, without
//          contraction and fast-math
// source   update.h; stream: zokern/stream.py, version 1
#include <cstdint>
#include <cstring>

// clang-format off
#include "simd/namespace.h"  // comes first, because it renames the namespace of the others
// clang-format on
#include "isa.h"
#include "update.h"

namespace zo {

struct UpdateJob {
  Rule rule;
  Rounding rounding;
  Direction direction;
  int32_t draw_count;
  const Entry* entries;
  const Chunk* chunks;
  const Draw* draws;
  Scalars scalars;
  alignas(64) Keys keys;
};

}  // namespace zo

#if defined(ZOKERN_ISA)

#include ZO_TRAIT
// clang-format off
#include "simd/words.h"
#include "simd/values.h"
#include "simd/rows.h"
// clang-format on

namespace zo {
namespace {

struct Buffers {
  alignas(64) uint32_t words[4 * kBlocks];
  alignas(64) float sum[kPiece];
  alignas(64) float factor[kPiece];
  alignas(64) float value[kPiece];
  alignas(64) uint16_t half[kPiece];
};

// One vector. `value` is the old theta, and then the new one.
template <Rule kRule>
ZO_INLINE void advance(const Scalars& s, const float* g, float* m, float* v, float* value) {
  const F gradient = Simd::load(g);
  if constexpr (kRule == Rule::kSign) {
    const U bits = Simd::bits(gradient), magnitude = bits & 0x7fffffffu;
    const U unit = (bits & 0x80000000u) | 0x3f800000u;  // 1 with the sign of g; zeros and NaNs stay
    const F sign = Simd::floats(magnitude - 1u < 0x7f800000u ? unit : bits);
    return Simd::store(value, Simd::fma(Simd::all(s.lr), sign, Simd::all(s.decay) * Simd::load(value)));
  }
  const F first = Simd::fma(Simd::all(s.alpha1), gradient, Simd::all(s.beta1) * Simd::load(m));
  Simd::store(m, first);
  F move = first;
  if constexpr (kRule == Rule::kAdam) {
    const F second = Simd::fma(Simd::all(s.alpha2), gradient * gradient, Simd::all(s.beta2) * Simd::load(v));
    Simd::store(v, second);
    move = first /
           Simd::fma(Simd::root(second + Simd::all(s.inside)), Simd::all(s.correction), Simd::all(s.eps));
  }
  Simd::store(value, Simd::fma(Simd::all(s.lr), move, Simd::all(s.decay) * Simd::load(value)));
}

template <Rule kRule>
void advance_all(const Scalars& s, const float* g, float* m, float* v, float* value, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) advance<kRule>(s, g + i, m + i, v + i, value + i);
  if (i == n) return;
  alignas(64) float rest[4][kLanes] = {};
  const size_t bytes = static_cast<size_t>(n - i) * sizeof(float);
  std::memcpy(rest[0], g + i, bytes), std::memcpy(rest[3], value + i, bytes);
  if (states_of(kRule) > 0) std::memcpy(rest[1], m + i, bytes);
  if (states_of(kRule) > 1) std::memcpy(rest[2], v + i, bytes);
  advance<kRule>(s, rest[0], rest[1], rest[2], rest[3]);
  std::memcpy(value + i, rest[3], bytes);
  if (states_of(kRule) > 0) std::memcpy(m + i, rest[1], bytes);
  if (states_of(kRule) > 1) std::memcpy(v + i, rest[2], bytes);
}

// sum += c z for all elements of some blocks; z has the factors with kScaled.
template <Direction D, bool kScaled>
void add_term(const UpdateJob& job, const Draw& draw, uint32_t who, uint64_t block, int blocks,
              Buffers& buffers) {
  const Name name{who, draw.step, draw.draw, job.keys};
  make_words<D == Direction::kNormal, 0>(static_cast<uint32_t>(block), blocks, name, buffers.words, nullptr);
  const F scale = Simd::all(draw.coefficient);
  sweep<D, false>(buffers.words, (blocks * per_block(D) + kUnit - 1) / kUnit,
                  [&](int unit, F a, F b) ZO_INLINE_LAMBDA {
                    float* p = buffers.sum + unit * kUnit;
                    if constexpr (kScaled) {
                      const float* factor = buffers.factor + unit * kUnit;
                      a = a * Simd::load(factor), b = b * Simd::load(factor + kLanes);
                    }
                    Simd::store(p, Simd::fma(scale, a, Simd::load(p)));
                    Simd::store(p + kLanes, Simd::fma(scale, b, Simd::load(p + kLanes)));
                  });
}

int64_t piece(const UpdateJob& job, const Run& run, int skip, int n, Buffers& buffers) {
  const Entry& entry = *run.entry;
  const Type type = static_cast<Type>(entry.type);
  const int width = per_block(job.direction);
  const int blocks = (skip + n + width - 1) / width;
  const size_t whole = static_cast<size_t>((blocks * width + kUnit - 1) / kUnit * kUnit) * sizeof(float);
  std::memset(buffers.sum, 0, whole);
  const bool normal = job.direction == Direction::kNormal;
  auto* add = normal ? add_term<Direction::kNormal, false> : add_term<Direction::kRademacher, false>;
  if (entry.scale != nullptr) {
    std::memset(buffers.factor, 0, whole);
    gather_factors(entry, run.low, n, buffers.factor + skip);
    add = normal ? add_term<Direction::kNormal, true> : add_term<Direction::kRademacher, true>;
  }
  for (int k = 0; k < job.draw_count; ++k)
    add(job, job.draws[k], entry.who, run.number / width, blocks, buffers);

  void* theta = const_cast<void*>(run.theta);
  uint16_t* half = buffers.half;
  int16_t* low = type == Type::kBfloat16 && job.rounding == Rounding::kResidual && entry.residual != nullptr
                     ? entry.residual + run.low
                     : nullptr;
  const int units = (n + kUnit - 1) / kUnit;
  if (type == Type::kFloat32) {
    gather(theta, run.column_stride, n, buffers.value);
  } else {
    std::memset(half, 0, static_cast<size_t>(units * kUnit) * sizeof(uint16_t));
    gather(theta, run.column_stride, n, half);
    widen(type, half, units, buffers.value);
    for (int i = 0; low != nullptr && i < n; ++i) buffers.value[i] = residual_join(half[i], low[i]);
  }

  float *m = nullptr, *v = nullptr;
  if (states_of(job.rule) > 0) m = static_cast<float*>(entry.out[0]) + run.position;
  if (states_of(job.rule) > 1) v = static_cast<float*>(entry.out[1]) + run.position;
  const auto go = job.rule == Rule::kMomentum ? advance_all<Rule::kMomentum>
                  : job.rule == Rule::kAdam   ? advance_all<Rule::kAdam>
                                              : advance_all<Rule::kSign>;
  go(job.scalars, buffers.sum + skip, m, v, buffers.value, n);

  if (type == Type::kFloat32) {
    scatter(buffers.value, n, theta, run.column_stride);
    return count_nonfinite<Type::kFloat32>(buffers.value, n);
  }
  if (low != nullptr) {
    for (int i = 0; i < n; ++i) half[i] = residual_split(buffers.value[i], low[i]);
  } else if (job.rounding == Rounding::kStochastic) {
    const Name name{entry.who, job.draws[job.draw_count - 1].step, kRoundingDraw, job.keys};
    round_stochastic(name, run.number, n, type, buffers.value, half, buffers.words);
  } else {
    narrow(type, buffers.value, units, half);
  }
  scatter(half, n, theta, run.column_stride);
  return type == Type::kBfloat16 ? count_nonfinite<Type::kBfloat16>(half, n)
                                 : count_nonfinite<Type::kFloat16>(half, n);
}

}  // namespace

// Runs one chunk of a job. Returns the number of new weights that are inf or NaN.
extern "C" int64_t ZO_JOIN(zokern_update_, ZOKERN_ISA)(const void* address, int64_t which) {
  const UpdateJob& job = *static_cast<const UpdateJob*>(address);
  const Chunk& chunk = job.chunks[which];
  Buffers buffers;
  int64_t nonfinite = 0;
  each_run(job.entries[chunk.entry], chunk, [&](const Run& run) {
    for (int64_t begin = 0; begin < run.n;) {
      const int skip =
          static_cast<int>((run.number + static_cast<uint64_t>(begin)) % per_block(job.direction));
      const int n = static_cast<int>(run.n - begin < kPiece - skip ? run.n - begin : kPiece - skip);
      nonfinite += piece(job, part(run, begin, begin + n), skip, n, buffers);
      begin += n;
    }
  });
  return nonfinite;
}

}  // namespace zo

#else  // this part is compiled once: it divides the chunks among threads

#include <omp.h>

#include <stdexcept>

namespace zo {

void update(const Launch& launch, const Draw* draws, int32_t draw_count, Rule rule, const float* scalars,
            Rounding rounding, int64_t* nonfinite) {
  UpdateJob job;
  job.rule = rule, job.rounding = rounding, job.direction = launch.direction, job.draw_count = draw_count;
  job.entries = launch.entries, job.chunks = launch.chunks, job.draws = draws;
  std::memset(&job.scalars, 0, sizeof job.scalars);
  std::memcpy(&job.scalars, scalars, static_cast<size_t>(scalars_of(rule)) * sizeof(float));
  spread(launch.seed, job.keys);
  for (int64_t c = 0; c < launch.chunk_count; ++c) {
    const Entry& entry = launch.entries[launch.chunks[c].entry];
    const int states = states_of(rule);
    if (entry.rows != nullptr || (states > 0 && entry.out[0] == nullptr) ||
        (states > 1 && entry.out[1] == nullptr) ||
        (states > 0 && entry.out_type != static_cast<int32_t>(Type::kFloat32))) {
      throw std::invalid_argument("update: an entry has rows, or no float32 state");
    }
  }
  const auto chunk = active().update;
  const int workers = static_cast<int>(launch.workers);
  int64_t total = 0;
#pragma omp parallel num_threads(workers) if (workers > 1) reduction(+ : total)
  {
    DefaultMode mode;
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < launch.chunk_count; ++c) total += chunk(&job, c);
  }
  *nonfinite += total;
}

}  // namespace zo
#endif
