// rademacher.h: direction `rademacher`, one bit a sign, 128 signs a block
//
// math     z(i) = -1 if bit i mod 32 of word (i mod 128) / 32 of block i / 128 is set, and +1 if not
// quality  exact: mean 0, variance 1, kurtosis 1 over all words
// work     one Philox4x32-10 per 128 elements. A sign is one bit, moved to the sign position
// equal    bit for bit on every backend. No arithmetic is rounded
// source   Spall 1992 (SPSA uses exactly this distribution)
#pragma once

#include "portable.h"

namespace zo {

constexpr int kRademacherPerBlock = 128;

// The sign in bit number `bit` of a word, 0 to 31.
ZO_FN float rademacher_sign(uint32_t word, uint32_t bit) {
  return as_float(insert_bits(word << (31u - bit), 0x80000000u, 0x3f800000u));
}

}  // namespace zo
