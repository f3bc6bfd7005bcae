// simd/aligned.h: panels of W + scale z, if each row of W
// begins with a block of the stream. linear.cpp includes it
//
// lanes    a lane of the random number generator is a row of W, so z is made in the order of a panel
// memory   W is turned once for two sides, kBatch columns at a time, in the first cache
#pragma once

namespace zo {
namespace {

// The next rows of W. fetch() brings a part of them into the cache.
struct Ahead {
  const char* from;  // null if there are none
  int64_t stride, bytes, rows;

  ZO_INLINE void fetch(int64_t part, int64_t parts) const {
    if (from == nullptr) return;
    for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; ++row) {
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + row * stride + byte);
    }
  }
};

// Loads columns 2 i and 2 i + 1 of kLanes rows of W.
template <Type T>
ZO_INLINE void load_two(const float* turned, int64_t i, F& even, F& odd) {
  if constexpr (T == Type::kBfloat16) {
    const U pair = Simd::bits(Simd::load(turned + i * kLanes));
    even = Simd::floats(pair << 16), odd = Simd::floats(pair & 0xffff0000u);
  } else {
    even = Simd::load(turned + 2 * i * kLanes), odd = Simd::load(turned + (2 * i + 1) * kLanes);
  }
}

// Stores the same columns into a panel, rounded to W's type.
template <Type T, class S = Simd>
ZO_INLINE void store_two(float* panel, int64_t i, F even, F odd) {
  if constexpr (T == Type::kBfloat16 && S::kPairs) return S::store(panel + i * kWide, S::pair(even, odd));
  if constexpr (T == Type::kBfloat16) {
    even = S::floats(bf16_round(even) & 0xffff0000u), odd = S::floats(bf16_round(odd) & 0xffff0000u);
  }
  if constexpr (T == Type::kFloat16) even = Simd::round_fp16(even), odd = Simd::round_fp16(odd);
  Simd::store(panel + 2 * i * kWide, even), Simd::store(panel + (2 * i + 1) * kWide, odd);
}

// Puts W + scale z of one draw into the panels of one or two sides: n columns of kLanes rows. Their z begins
// with `block`. With enough registers (kBeside) the rounds of the next block run beside the values of this
// one.
template <Direction D, Type T, int kSides>
void add_turned(uint32_t block, uint32_t pitch, const Name& name, int64_t n, const float* turned,
                const F (&scales)[2], float* const (&panels)[2], const Ahead& ahead) {
  constexpr bool kBeside = D == Direction::kNormal && kLanes == 16;
  const Simd::W first = Simd::rows(block, pitch, 0), second = Simd::rows(block, pitch, 1);
  Rounds<2> rounds;
  const auto start = [&](int64_t b) ZO_INLINE_LAMBDA {
    rounds.a[0] = Simd::add(first, static_cast<uint32_t>(b)),
    rounds.a[1] = Simd::add(second, static_cast<uint32_t>(b));
    rounds.start(name);
  };
  const auto add = [&](int64_t i, F z, F next) ZO_INLINE_LAMBDA {
    F even, odd;
    load_two<T>(turned, i, even, odd);
#pragma GCC unroll 2
    for (int side = 0; side < kSides; ++side) {
      store_two<T>(panels[side], i, Simd::fma(scales[side], z, even), Simd::fma(scales[side], next, odd));
    }
  };
  if constexpr (kBeside) start(0), rounds.template run<0, kPhiloxRounds - 1>(name);
  for (int64_t b = 0; b < n / per_block(D); ++b) {
    ahead.fetch(b, kBatch / per_block(D));
    if constexpr (!kBeside) start(b), rounds.template run<0, kPhiloxRounds - 1>(name);
    U words[4];
    Simd::W w01[2], w23[2];
    rounds.finish(name, w01, w23);
    Simd::split(w01[0], w01[1], words[0], words[1]), Simd::split(w23[0], w23[1], words[2], words[3]);
    if constexpr (kBeside) start(b + 1);
    if constexpr (D == Direction::kNormal) {
      const auto values = [&](int w) ZO_INLINE_LAMBDA {
        F z, next;
        box_muller(words[w], z, next);
        add(4 * b + w, z, next);
      };
      if constexpr (kBeside) rounds.template run<0, 3>(name);
      values(0);
      if constexpr (kBeside) rounds.template run<3, 5>(name);
      values(1);
      if constexpr (kBeside) rounds.template run<5, 7>(name);
      values(2);
      if constexpr (kBeside) rounds.template run<7, kPhiloxRounds - 1>(name);
      values(3);
    } else {
      for (int w = 0; w < 4; ++w) {  // from the last sign to the first: the next sign moves to the top bit
        U word = words[w];
        const int64_t begin = 64 * b + 16 * w;
        for (int64_t i = begin + 15; i >= begin; --i, word = word << 2) {
          const F next = Simd::floats((word & 0x80000000u) | 0x3f800000u);
          add(i, Simd::floats(((word << 1) & 0x80000000u) | 0x3f800000u), next);
        }
      }
    }
  }
}

// make_panels() for rows that begin with a block. The two sides may have different draws.
template <Direction D, Type T>
void make_aligned(const LinearJob& job, const Side* sides, int many, int64_t row, int64_t count,
                  int64_t column, int64_t k, Job& piece, Memory& memory) {
  constexpr int64_t width = per_block(D);
  const Linear& product = *job.product;
  const int64_t words_of = T == Type::kBfloat16 ? 2 : 1;                          // elements in a word
  const auto quiet = [](float x) { return x == x ? x : as_float(0x7fc00000u); };  // as in elementwise.cpp
  const F scales[2] = {Simd::all(quiet(sides[0].scale)), Simd::all(many == 2 ? quiet(sides[1].scale) : 0.0f)};
  const bool shared = many == 2 && sides[0].draw == sides[1].draw;
  for (int64_t q = 0; q < count; q += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, count - q);
    for (int64_t j = 0; j < k; j += kBatch) {
      const int64_t n = std::min<int64_t>(kBatch, k - j), offset = (row + q) * product.n + column + j;
      for (int64_t strip = 0; strip < kLanes; strip += kStrip) {
        const int64_t some = std::max<int64_t>(0, std::min<int64_t>(kStrip, rows - strip));
        const void* from = address(product, offset + (some > 0 ? strip : 0) * product.n);
        const Strip words = T == Type::kFloat16
                                ? Strip{in_float(T, from, product.n, some, n, memory), n, n}
                                : Strip{static_cast<const float*>(from), product.n / words_of, n / words_of};
        turn(words, some, memory.turned + strip, kLanes);
      }
      const uint32_t block = static_cast<uint32_t>((product.first + static_cast<uint64_t>(offset)) / width);
      const uint32_t pitch = static_cast<uint32_t>(product.n / width);
      const bool last = j + kBatch >= k;  // of these rows; other rows follow
      const int64_t size = T == Type::kFloat32 ? 4 : 2,
                    there = last ? offset - j + kLanes * product.n : offset + kBatch;
      const int64_t next = last ? std::min<int64_t>(kLanes, count - q - rows) : rows;
      const Ahead ahead{next > 0 ? static_cast<const char*>(address(product, there)) : nullptr,
                        product.n * size, kBatch * size, next};
      const int64_t at = q / kWide * kWide * (Simd::kPairs && T == Type::kBfloat16 ? k / 2 : k) + q % kWide;
      const int64_t down = (Simd::kPairs && T == Type::kBfloat16 ? j / 2 : j) * kWide;
      float* const panels[2] = {memory.panel[0] + at + down, memory.panel[1] + at + down};
      for (int side = 0; side < (shared ? 1 : many); ++side) {
        const Name name{product.who, product.step, static_cast<uint32_t>(sides[side].draw), piece.keys};
        if (shared) {
          add_turned<D, T, 2>(block, pitch, name, n, memory.turned, scales, panels, ahead);
        } else {
          add_turned<D, T, 1>(block, pitch, name, n, memory.turned, {scales[side], scales[side]},
                              {panels[side], panels[side]}, ahead);
        }
      }
    }
  }
}

// make_aligned() for this product, or null if its rows are not aligned.
Make aligned_of(const Linear& product) {
  if constexpr (kLanes == 1) return nullptr;
  const auto width =
      static_cast<uint64_t>(product.direction == Direction::kNormal ? kNormalPerBlock : kRademacherPerBlock);
  const auto start = reinterpret_cast<uintptr_t>(product.weight);
  if (product.transposed || static_cast<uint64_t>(product.n) % width != 0 || product.first % width != 0)
    return nullptr;
  if (start % 4 != 0) return nullptr;
#define ZO_ALIGNED(D, T) \
  if (product.direction == D && product.type == T) return make_aligned<D, T>;
  ZO_ALIGNED(Direction::kNormal, Type::kFloat32)
  ZO_ALIGNED(Direction::kNormal, Type::kBfloat16)
  ZO_ALIGNED(Direction::kNormal, Type::kFloat16)
  ZO_ALIGNED(Direction::kRademacher, Type::kFloat32)
  ZO_ALIGNED(Direction::kRademacher, Type::kBfloat16)
  ZO_ALIGNED(Direction::kRademacher, Type::kFloat16)
#undef ZO_ALIGNED
  return nullptr;
}

}  // namespace
}  // namespace zo
