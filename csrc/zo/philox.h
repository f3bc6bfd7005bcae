// philox.h: Philox4x32-R, the block function of the stream
//
// math     Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": R rounds of (x0, x1, x2, x3) <-
//          (hi(M1 x2) ^ x1 ^ k0, lo(M1 x2), hi(M0 x0) ^ x3 ^ k1, lo(M0 x0)); k0 += W0, k1 += W1
// address  counter = (block, who, step, draw), key = the 64-bit seed of the run: zokern/stream.py, version 1
// equal    to tests/vectors/philox4x32.txt, which includes the known answers that Random123 publishes
#pragma once

#include "portable.h"

namespace zo {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;  // golden ratio
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;  // sqrt(3) - 1
constexpr int kPhiloxRounds = 10;

struct Words {
  uint32_t w[4];
};

ZO_FN Words philox4x32(uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3, uint32_t k0, uint32_t k1,
                       int rounds = kPhiloxRounds) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < rounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * x2;
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return Words{{x0, x1, x2, x3}};
}

}  // namespace zo
