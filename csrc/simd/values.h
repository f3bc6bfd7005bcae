// simd/values.h: makes z from words over the trait, in units of two vectors.
// It is included after simd/words.h
//
// equal    zo/normal.h and zo/rademacher.h, the same operations in the same order
#pragma once

namespace zo {
namespace {

using F = Simd::F;
using U = Simd::U;
constexpr int kLanes = Simd::kLanes;
constexpr int kUnit = 2 * kLanes;    // elements of one step of the second stage
constexpr int kBlocks = 64;          // blocks between the two stages: 1 KB of words
constexpr int kPiece = 8 * kBlocks;  // elements of the general path's buffers

constexpr int per_block(Direction d) {
  return d == Direction::kNormal ? kNormalPerBlock : kRademacherPerBlock;
}

// The second stage: a unit of z.
ZO_INLINE void box_muller(U word, F& even, F& odd) {  // normal.h, the same operations in the same order
  const F f = Simd::floats((word & 0xfffffu) | 0x4b000000u) + Simd::all(-8388607.5f);
  const U bits = Simd::bits(f);
  const F m = Simd::floats((bits & 0x7fffffu) | 0x3f800000u);
  F p = Simd::all(0x1.cf6f9ap-4f);
  p = Simd::fma(p, m, Simd::all(-0x1.c9e934p-1f));
  p = Simd::fma(p, m, Simd::all(0x1.784dfep+1f));
  p = Simd::fma(p, m, Simd::all(-0x1.10631ep+2f));
  p = Simd::fma(p, m, Simd::all(0x1.9bc3dcp+7f));
  const F square = Simd::fma(Simd::from_int(bits), Simd::all(-0x1.62e430p-23f), p);
  const F y = Simd::floats(0x5f375800u - (Simd::bits(square) >> 1));
  const F s = square * y;
  const F e = Simd::fma(-s, y, Simd::all(1.0f));
  const F h = Simd::fma(e, Simd::all(0x1.80a102p-2f), Simd::all(0x1.008f72p-1f)) * e;
  const F r = Simd::fma(s, h, s);
  const F t = Simd::from_int(word) * Simd::all(0x1p-31f);
  const F q = t * t;
  F sine = Simd::all(0x1.06404ep-4f);
  sine = Simd::fma(sine, q, Simd::all(-0x1.29e97ap-1f));
  sine = Simd::fma(sine, q, Simd::all(0x1.45779ep+1f));
  sine = Simd::fma(sine, q, Simd::all(-0x1.4aa654p+2f));
  sine = Simd::fma(sine, q, Simd::all(0x1.921d96p+1f));
  sine = sine * t;
  F cosine = Simd::all(0x1.6d2c2ep-3f);
  cosine = Simd::fma(cosine, q, Simd::all(-0x1.499d3ep+0f));
  cosine = Simd::fma(cosine, q, Simd::all(0x1.02b198p+2f));
  cosine = Simd::fma(cosine, q, Simd::all(-0x1.3bb258p+2f));
  cosine = Simd::fma(cosine, q, Simd::all(0x1.fffabcp-1f));
  even = r * sine, odd = r * cosine;
}

// With kPaired, a is the even and b the odd elements of a unit.
// Without it, a is the first half and b the second.
template <Direction D, bool kPaired>
ZO_INLINE void unit_values(const uint32_t* words, int unit, F& a, F& b) {
  if constexpr (D == Direction::kNormal) {
    F even, odd;
    box_muller(Simd::load(words + unit * kLanes), even, odd);
    if (kPaired) {
      a = even, b = odd;
    } else {
      Simd::interleave(even, odd, a, b);
    }
  } else {
    const int first = unit * kUnit;
    const U word = U{} + (words[first / 32] >> (first % 32));
    const U to_sign = 31u - Simd::lane() * (kPaired ? 2u : 1u);
    a = Simd::floats(((word << to_sign) & 0x80000000u) | 0x3f800000u);
    b = Simd::floats(((word << (to_sign - (kPaired ? 1u : static_cast<uint32_t>(kLanes)))) & 0x80000000u) |
                     0x3f800000u);
  }
}

template <Direction D, bool kPaired, class Body>
ZO_INLINE void sweep(const uint32_t* words, int units, Body&& body) {
  for (int u = 0; u < units; ++u) {
    F a, b;
    unit_values<D, kPaired>(words, u, a, b);
    body(u, a, b);
  }
}

}  // namespace
}  // namespace zo
