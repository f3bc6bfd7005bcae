// blocks.h: the random numbers z of eight consecutive elements, on a GPU
//
// unit     elements 8 u .. 8 u + 7 of the stream. One Philox block of `normal` holds a unit, one of
//          `rademacher` holds 16
// names    all blocks of one z share a Name. It holds the part of Philox that does not depend on the block's
//          number
// include  after <cuda_runtime.h>, by .cu files
#pragma once

#include "device.h"

namespace zo {
namespace kernels {  // named, so that a kernel has the same symbol in every build

using namespace device;

constexpr int kUnit = 8;  // elements of a unit

// The keys of all rounds, made once on the host.
// As kernel parameters they are operands without an instruction.
struct Keys {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

inline Keys make_keys(uint64_t seed) {
  Keys keys;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.k0[round] = static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * kPhiloxW0;
    keys.k1[round] = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * kPhiloxW1;
  }
  return keys;
}

// The part of Philox that all blocks of one z share. who, step and draw are the same for a whole entry. So
// round 1 multiplies the block number alone, and half of round 2 is known beforehand: 18 products remain of
// 20. The known words of each exclusive or are one operand.
struct Name {
  uint32_t x2_1, x0_2, x2_2, x2_3;  // xN_R is combined by exclusive or with word N of round R

  __device__ __forceinline__ explicit Name(const uint4& words)
      : x2_1(words.x), x0_2(words.y), x2_2(words.z), x2_3(words.w) {}
  __device__ __forceinline__ uint4 words() const { return make_uint4(x2_1, x0_2, x2_2, x2_3); }

  __device__ __forceinline__ Name(uint32_t who, uint32_t step, uint32_t draw, const Keys& keys) {
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * step;
    const uint64_t p2 =
        static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(p1 >> 32) ^ who ^ keys.k0[0]);
    x2_1 = draw ^ keys.k1[0];
    x0_2 = static_cast<uint32_t>(p1) ^ keys.k0[1];
    x2_2 = static_cast<uint32_t>(p2 >> 32) ^ keys.k1[1];
    x2_3 = static_cast<uint32_t>(p2) ^ keys.k1[2];
  }
};

// `first` is the product of round 1, kPhiloxM0 * block.
// It is the same for every name, so a loop over names makes it once.
__device__ __forceinline__ Words philox_from(uint64_t first, const Name& name, const Keys& keys) {
  const uint64_t second = static_cast<uint64_t>(kPhiloxM1) * (static_cast<uint32_t>(first >> 32) ^ name.x2_1);
  uint32_t x0 = static_cast<uint32_t>(second >> 32) ^ name.x0_2, x1 = static_cast<uint32_t>(second);
  uint32_t x2 = name.x2_2 ^ static_cast<uint32_t>(first), x3 = 0;
#pragma unroll
  for (int round = 2; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * x2;
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ keys.k0[round];
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ (round == 2 ? name.x2_3 : x3 ^ keys.k1[round]);
    x3 = static_cast<uint32_t>(p0);
  }
  return Words{{x0, x1, x2, x3}};
}

__device__ __forceinline__ Words philox_named(uint32_t block, const Name& name, const Keys& keys) {
  return philox_from(static_cast<uint64_t>(kPhiloxM0) * block, name, keys);
}

__device__ __forceinline__ void signs(uint32_t byte, float (&z)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) z[i] = rademacher_sign(byte, static_cast<uint32_t>(i));
}

// The number of the block with a unit's z, times kPhiloxM0.
template <Direction kDirection>
__device__ __forceinline__ uint64_t first_product(uint32_t unit) {
  return static_cast<uint64_t>(kPhiloxM0) * (kDirection == Direction::kNormal ? unit : unit >> 4);
}

// The z of one unit. For `rademacher` 16 units share a block: this computes the block for one of them, and
// sign_tiles() in walk.h computes it for all.
template <Direction kDirection>
__device__ __forceinline__ void values(uint64_t first, uint32_t unit, const Name& name, const Keys& keys,
                                       float (&z)[kUnit]) {
  const Words words = philox_from(first, name, keys);
  if constexpr (kDirection == Direction::kNormal) {
#pragma unroll
    for (int j = 0; j < 4; ++j) normal_pair(words.w[j], z[2 * j], z[2 * j + 1]);
  } else {
    const uint32_t low = unit & 4u ? words.w[1] : words.w[0];
    const uint32_t high = unit & 4u ? words.w[3] : words.w[2];
    signs((unit & 8u ? high : low) >> ((unit & 3u) * 8u), z);
  }
}

template <Direction kDirection>
__device__ __forceinline__ void values(uint32_t unit, const Name& name, const Keys& keys, float (&z)[kUnit]) {
  values<kDirection>(first_product<kDirection>(unit), unit, name, keys, z);
}

}  // namespace kernels
}  // namespace zo
