// isa.h: the instruction sets of the CPU module. One choice holds for every verb.
//
// Each verb is compiled once per instruction set over a trait simd/<isa>.h; the parts that are compiled once call through
// active(). ZOKERN_CPU_ISA forces a path that this machine can run; all give the same bits.
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
  int64_t (*elementwise)(const void* job, int64_t chunk);        // how many results of the chunk are inf or NaN
  int64_t (*lowrank)(const void* job, int64_t chunk);            // the same
  int64_t (*update)(const void* job, int64_t chunk);             // the same
  void (*linear)(const void* job, int64_t group, char* memory);  // some columns of y
  void (*linear_thin)(void* job, int64_t worker, int64_t workers, char* memory);  // what its thin products start from
  int64_t (*linear_memory)();                                                     // bytes of it, beside the sums
  bool (*linear_pairs)();                                                         // whether x is read in bfloat16 where W is
  void (*panel)(const float* right, int64_t rank, int64_t columns, int64_t begin, int64_t end, float* panel);
};

const Path& active();

// The caller's thread keeps its floating-point mode; the arithmetic runs in the default one (torch.set_flush_denormal).
struct DefaultMode {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  DefaultMode() { _mm_setcsr(0x1f80); }
  ~DefaultMode() { _mm_setcsr(saved); }
#endif
};

// round r of Philox adds keys[2 r] and keys[2 r + 1], one copy a lane
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
