// simd/words.h: Philox4x32-10 over the trait, many blocks at once. It is included after simd/<isa>.h
#pragma once

namespace zo {
namespace {

struct Name {
  uint32_t who, step, draw;
  const uint32_t (*keys)[16];
};

// kChains groups of blocks pass through the rounds side by side,
// because each round of a group waits for the one before.
template <int kChains>
struct Rounds {
  Simd::W a[kChains], c[kChains], e[kChains], g[kChains];

  ZO_INLINE void start(const Name& name) {  // after the counters have been put into a
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i)
      c[i] = Simd::wide(name.step), e[i] = Simd::wide(name.who), g[i] = Simd::wide(name.draw);
  }
  // Runs rounds [kFrom, kTo). finish() runs the last round.
  template <int kFrom, int kTo>
  ZO_INLINE void run(const Name& name) {
#pragma GCC unroll 9
    for (int round = kFrom; round < kTo; ++round) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        const auto p = Simd::multiply(a[i], kPhiloxM0), q = Simd::multiply(c[i], kPhiloxM1);
        a[i] = Simd::mix(q, e[i], name.keys[2 * round]), e[i] = q;
        c[i] = Simd::mix(p, g[i], name.keys[2 * round + 1]), g[i] = p;
      }
    }
  }
  ZO_INLINE void finish(const Name& name, Simd::W (&w01)[kChains], Simd::W (&w23)[kChains]) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const auto p = Simd::multiply(a[i], kPhiloxM0), q = Simd::multiply(c[i], kPhiloxM1);
      w01[i] = Simd::last(q, e[i], name.keys[18]), w23[i] = Simd::last(p, g[i], name.keys[19]);
    }
  }
};

// Writes the words of `blocks` blocks, rounded up to groups.
// With kUnpack their order is the one that interleave() undoes.
template <bool kUnpack, int kAhead>
ZO_INLINE void make_words(uint32_t block, int blocks, const Name& name, uint32_t* words, const char* ahead) {
  for (int b = 0; b < blocks; b += Simd::kGroup) {
    for (int byte = 0; byte < kAhead; byte += 64) __builtin_prefetch(ahead + byte);
    ahead += kAhead;
    Rounds<1> rounds;
    Simd::W w01[1], w23[1];
    rounds.a[0] = Simd::counters<kUnpack>(block + static_cast<uint32_t>(b));
    rounds.start(name), rounds.run<0, kPhiloxRounds - 1>(name), rounds.finish(name, w01, w23);
    Simd::store_words<kUnpack>(w01[0], w23[0], words + 4 * b);
  }
}

}  // namespace
}  // namespace zo
