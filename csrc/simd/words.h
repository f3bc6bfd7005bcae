// simd/words.h: Philox4x32-10 over the trait, many blocks at once; included after simd/<isa>.h
#pragma once

namespace zo {
namespace {

struct Name {
  uint32_t who, step, draw;
  const uint32_t (*keys)[16];
};

// The words of `blocks` blocks (rounded up to groups). kUnpack: in the order that interleave() undoes.
template <bool kUnpack, int kAhead>
ZO_INLINE void make_words(uint32_t block, int blocks, const Name& name, uint32_t* words, const char* ahead) {
  const auto x1 = Simd::wide(name.who), x2 = Simd::wide(name.step), x3 = Simd::wide(name.draw);
  for (int b = 0; b < blocks; b += Simd::kGroup) {
    for (int byte = 0; byte < kAhead; byte += 64) __builtin_prefetch(ahead + byte);
    ahead += kAhead;
    auto a = Simd::counters<kUnpack>(block + static_cast<uint32_t>(b)), c = x2, e = x1, g = x3;
#pragma GCC unroll 9
    for (int round = 0; round < kPhiloxRounds - 1; ++round) {
      const auto p = Simd::multiply(a, kPhiloxM0), q = Simd::multiply(c, kPhiloxM1);
      a = Simd::mix(q, e, name.keys[2 * round]), e = q;
      c = Simd::mix(p, g, name.keys[2 * round + 1]), g = p;
    }
    const auto p = Simd::multiply(a, kPhiloxM0), q = Simd::multiply(c, kPhiloxM1);
    Simd::store_words<kUnpack>(Simd::last(q, e, name.keys[18]), Simd::last(p, g, name.keys[19]), words + 4 * b);
  }
}

}  // namespace
}  // namespace zo
