// isa.h: the instruction sets of the CPU module. One choice holds for every verb
//
// build    each verb is compiled once per instruction set, over a trait simd/<isa>.h. The parts that are
//          compiled once call it through active()
// choice   the best path that this machine can run. ZOKERN_CPU_ISA forces another one
// equal    all paths give the same bits
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "zo/philox.h"

namespace zo {

struct Path {
  const char* name;
  bool usable;
  // These run one chunk of a job. They return the number of results that are inf or NaN.
  int64_t (*elementwise)(const void* job, int64_t chunk);
  int64_t (*lowrank)(const void* job, int64_t chunk);
  int64_t (*update)(const void* job, int64_t chunk);
  // linear.cpp: some columns of y, the first part of thin products,
  // the size of `memory` without sums, linear_pairs().
  void (*linear)(const void* job, int64_t group, char* memory);
  void (*linear_thin)(void* job, int64_t worker, int64_t workers, char* memory);
  int64_t (*linear_memory)();
  bool (*linear_pairs)();
  void (*panel)(const float* right, int64_t rank, int64_t columns, int64_t begin, int64_t end, float* panel);
};

const Path& active();

// Sets the default floating-point mode, and puts the caller's back at the end.
// torch.set_flush_denormal changes it.
struct DefaultMode {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  DefaultMode() { _mm_setcsr(0x1f80); }
  ~DefaultMode() { _mm_setcsr(saved); }
#endif
};

// Round r of Philox uses the keys keys[2 r] and keys[2 r + 1]. There is one copy for each lane.
using Keys = uint32_t[2 * kPhiloxRounds][16];

inline void spread(uint64_t seed, Keys& keys) {
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    for (int lane = 0; lane < 16; ++lane) {
      keys[2 * round][lane] = static_cast<uint32_t>(seed) + round * kPhiloxW0;
      keys[2 * round + 1][lane] = static_cast<uint32_t>(seed >> 32) + round * kPhiloxW1;
    }
  }
}

}  // namespace zo
