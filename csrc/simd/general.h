// simd/general.h: the path of elementwise.cpp for any strides, roundings, low bits and number of terms.
// It is included after simd/rows.h
//
// work     512 elements at a time: gather, add the terms in draw order, round, scatter. theta moves once. The
//          roundings between the sums of a replay happen in registers
// equal    zo/rounding.h, the same operations in the same order
#pragma once

#include "../job.h"

namespace zo {
namespace {

// Replaces a NaN coefficient by the canonical NaN. Then the lower half of each NaN in bf16_round() is zero.
float quiet(float x) { return x == x ? x : as_float(0x7fc00000u); }

// A piece has at most kPiece elements, with the head and tail of their blocks.
struct Buffers {
  alignas(64) uint32_t words[4 * kBlocks];
  alignas(64) uint32_t random[4 * kBlocks];
  alignas(64) float value[kPiece];
  alignas(64) float side[kPiece];
  alignas(64) float factor[kPiece];
  alignas(64) uint16_t half[kPiece];
};

// Roundings in registers. They give the value that x would have after it is stored and loaded again. `at` is
// the place of x in the buffers.
struct Unrounded {
  F operator()(F x, int) const { return x; }
};

template <Type T>
struct Nearest {
  F operator()(F x, int) const {
    if constexpr (T == Type::kFloat16) return Simd::round_fp16(x);
    return Simd::floats(bf16_round(x) & 0xffff0000u);  // quiet() made the lower half of a NaN zero
  }
};

template <Type T>
struct Stochastic {  // as bf16_stochastic and fp16_stochastic in zo/rounding.h
  const uint16_t* random;

  F operator()(F x, int at) const {
    const U bits = Simd::bits(x), r = Simd::load_half(random + at), a = bits & 0x7fffffffu,
            quiet = bits | 0x400000u;
    if constexpr (T == Type::kBfloat16)
      return Simd::floats((a > 0x7f800000u ? quiet : bits + r) & 0xffff0000u);
    const U exponent = a >> 23, more = a + (r >> 3);  // a normal float16 loses 13 bits; 2^16 is inf
    const U large = more >= 0x47800000u ? U{} + 0x7f800000u : more & 0xffffe000u;
    const U magnitude = (a & 0x7fffffu) | (exponent != 0u ? U{} + 0x800000u : U{});
    const U shift = exponent > 95u ? (exponent < 113u ? 126u - exponent : U{} + 13u) : U{} + 31u;
    const U units = (magnitude + ((r << 16) >> (32u - shift))) >> shift;  // subnormal, in units of 2^-24
    const U small = Simd::bits(Simd::from_int(units) * Simd::all(0x1p-24f));
    return Simd::floats(a > 0x7f800000u ? quiet : (bits & 0x80000000u) | (exponent >= 113u ? large : small));
  }
};

// to <- finish(c z + decay from), or finish(z) without kAdd. z has the factors if there are some.
template <Direction D, bool kAdd, bool kScaled, class Finish>
void term_of(const Name& name, uint64_t block, int blocks, float c, float decay, const float* from, float* to,
             uint32_t* words, const float* factor, const Finish& finish) {
  make_words<D == Direction::kNormal, 0>(static_cast<uint32_t>(block), blocks, name, words, nullptr);
  const F scale = Simd::all(c), before = Simd::all(decay);
  sweep<D, false>(
      words, (blocks * per_block(D) + kUnit - 1) / kUnit, [&](int unit, F a, F b) ZO_INLINE_LAMBDA {
        const int at = unit * kUnit;
        if constexpr (kScaled) a = a * Simd::load(factor + at), b = b * Simd::load(factor + at + kLanes);
        Simd::store(to + at, finish(kAdd ? Simd::fma(scale, a, before * Simd::load(from + at)) : a, at));
        const int next = at + kLanes;
        Simd::store(to + next,
                    finish(kAdd ? Simd::fma(scale, b, before * Simd::load(from + next)) : b, next));
      });
}

template <bool kAdd, class Finish>
void term(const Job& job, const Draw& draw, const Entry& entry, uint64_t block, int blocks, float c,
          const float* from, float* to, Buffers& buffers, const Finish& finish) {
  const Name name{entry.who, draw.step, draw.draw, job.keys};
  const auto run = [&](auto* of) {
    of(name, block, blocks, quiet(c), quiet(draw.decay), from, to, buffers.words, buffers.factor, finish);
  };
  const bool normal = job.direction == Direction::kNormal;
  if (entry.scale == nullptr) {
    run(normal ? term_of<Direction::kNormal, kAdd, false, Finish>
               : term_of<Direction::kRademacher, kAdd, false, Finish>);
  } else {
    run(normal ? term_of<Direction::kNormal, kAdd, true, Finish>
               : term_of<Direction::kRademacher, kAdd, true, Finish>);
  }
}

// Adds the last term of a sum, with the rounding that follows it.
void add_last(const Job& job, const Draw& draw, const Entry& entry, Type type, uint64_t block, int blocks,
              int units, Buffers& buffers) {
  const auto add = [&](const auto& finish) {
    term<true>(job, draw, entry, block, blocks, draw.coefficient, buffers.value, buffers.value, buffers,
               finish);
  };
  if (job.rounding != Rounding::kStochastic)
    return type == Type::kBfloat16 ? add(Nearest<Type::kBfloat16>{}) : add(Nearest<Type::kFloat16>{});
  const uint64_t first =
      block * (job.direction == Direction::kNormal ? kNormalPerBlock : kRademacherPerBlock) / 8;
  const Name name{entry.who, draw.step, kRoundingDraw, job.keys};
  make_words<false, 0>(static_cast<uint32_t>(first), (units * kUnit + 7) / 8, name, buffers.random, nullptr);
  const auto* random = reinterpret_cast<const uint16_t*>(buffers.random);  // half-words in order
  return type == Type::kBfloat16 ? add(Stochastic<Type::kBfloat16>{random})
                                 : add(Stochastic<Type::kFloat16>{random});
}

int64_t general_piece(const Job& job, const Run& run, int64_t begin, int n, Buffers& buffers) {
  const Entry& entry = *run.entry;
  const Type type = static_cast<Type>(entry.type), out_type = static_cast<Type>(entry.out_type);
  const int width = job.direction == Direction::kNormal ? kNormalPerBlock : kRademacherPerBlock;
  const uint64_t number = run.number + static_cast<uint64_t>(begin);
  const uint64_t block = number / width;
  const int skip = static_cast<int>(number % width);
  const int blocks = (skip + n + width - 1) / width;
  const int units = (blocks * width + kUnit - 1) / kUnit;
  const bool keep = type == Type::kBfloat16 && entry.residual != nullptr &&
                    (job.verb == Verb::kPerturb || job.rounding == Rounding::kResidual);
  float* value = buffers.value;
  for (int i = 0; i < units * kUnit; ++i) value[i] = 0.0f;
  if (entry.scale != nullptr) {
    for (int i = 0; i < units * kUnit; ++i) buffers.factor[i] = 0.0f;
    gather_factors(entry, run.low + begin, n, buffers.factor + skip);
  }
  char* theta = static_cast<char*>(const_cast<void*>(run.theta));
  if (job.verb != Verb::kDraw) {
    theta += begin * run.column_stride * (type == Type::kFloat32 ? 4 : 2);
    if (type == Type::kFloat32) {
      gather(theta, run.column_stride, n, value + skip);
    } else {
      for (int i = 0; i < units * kUnit; ++i) buffers.half[i] = 0;
      gather(theta, run.column_stride, n, buffers.half + skip);
      widen(type, buffers.half, units, value);
      if (keep) {
        for (int i = 0; i < n; ++i)
          value[skip + i] = residual_join(buffers.half[skip + i], entry.residual[run.low + begin + i]);
      }
    }
  }
  if (job.verb == Verb::kAxpy) {
    const bool stochastic = job.rounding == Rounding::kStochastic;
    for (int k = 0; k < job.draw_count; ++k) {
      const Draw& draw = job.draws[k];
      // The split of a float32 into a bfloat16 and low bits is exact.
      // narrow() below rounds the last sum to nearest.
      const bool exact = type == Type::kFloat32 || keep || (k + 1) % job.each != 0;
      if (exact || (!stochastic && k + 1 == job.draw_count)) {
        term<true>(job, draw, entry, block, blocks, draw.coefficient, value, value, buffers, Unrounded{});
      } else {
        add_last(job, draw, entry, type, block, blocks, units, buffers);
      }
    }
    value += skip;
    int64_t nonfinite = 0;
    if (type == Type::kFloat32) {
      for (int i = 0; i < n; ++i) nonfinite += !finite(value[i]);
      scatter(value, n, theta, run.column_stride);
      return nonfinite;
    }
    uint16_t* half = buffers.half + skip;
    if (keep) {
      for (int i = 0; i < n; ++i) half[i] = residual_split(value[i], entry.residual[run.low + begin + i]);
    } else {
      narrow(type, buffers.value, units, buffers.half);
    }
    scatter(half, n, theta, run.column_stride);
    return type == Type::kBfloat16 ? count_nonfinite<Type::kBfloat16>(half, n)
                                   : count_nonfinite<Type::kFloat16>(half, n);
  }
  for (int side = 0; side < 2 && entry.out[side] != nullptr; ++side) {
    const int64_t at = run.position + begin;
    if (job.verb == Verb::kDraw) {
      term<false>(job, job.draws[0], entry, block, blocks, 0.0f, value, buffers.side, buffers, Unrounded{});
    } else {
      term<true>(job, job.draws[0], entry, block, blocks, job.scales[side], value, buffers.side, buffers,
                 Unrounded{});
    }
    if (out_type == Type::kFloat32) {
      scatter(buffers.side + skip, n, static_cast<float*>(entry.out[side]) + at, 1);
    } else {
      narrow(out_type, buffers.side, units, buffers.half);
      scatter(buffers.half + skip, n, static_cast<uint16_t*>(entry.out[side]) + at, 1);
    }
  }
  return 0;
}

int64_t general(const Job& job, const Run& run) {
  Buffers buffers;
  const int width = job.direction == Direction::kNormal ? kNormalPerBlock : kRademacherPerBlock;
  int64_t nonfinite = 0;
  for (int64_t begin = 0; begin < run.n;) {
    const int skip = static_cast<int>((run.number + static_cast<uint64_t>(begin)) % width);
    const int n = static_cast<int>(run.n - begin < kPiece - skip ? run.n - begin : kPiece - skip);
    nonfinite += general_piece(job, run, begin, n, buffers);
    begin += n;
  }
  return nonfinite;
}

}  // namespace
}  // namespace zo
