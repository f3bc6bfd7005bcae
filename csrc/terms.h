// terms.h: the terms of axpy_, on a GPU: as a launch gives them, and as a warp makes them ready
//
// form     what kind of sum a call is (Sum). Each has a kernel of its own
// ready    a warp takes 32 terms at a time. Each lane makes one of them ready in shared memory, and then all
//          lanes read it (make_ready)
// include  after <cuda_runtime.h>, by .cu files
#pragma once

#include "walk.h"

namespace zo {
namespace kernels {

// The terms a_k z_k. The last name and decay also come by value, so that a sum of one term reads no list of
// names. Every `each` terms form a sum, which begins with a decay and ends with a rounding. The launch adds
// `clock` to every step number. The pointers are to device memory.
struct Terms {
  const Draw* draws;
  const float* coefficients;
  int32_t count, each;
  uint32_t clock;
  Draw last;
  const float* control;  // its decay is that of the first term

  __device__ __forceinline__ Draw at(int32_t k) const {
    Draw term = k + 1 < count ? draws[k] : last;
    if (k == 0 && control != nullptr) term.decay = control[kDecay];
    return term;
  }
};

// A term in the form that sums() and steps() read: 32 bytes of shared memory, the same for all lanes.
struct Ready {
  uint4 name;
  float coefficient, decay;
  uint32_t step, reserved;

  Ready() = default;
  __device__ __forceinline__ Ready(const Draw& term, float a, uint32_t who, uint32_t clock, const Keys& keys)
      : name(Name(who, term.step + clock, term.draw, keys).words()),
        coefficient(a),
        decay(term.decay),
        step(term.step + clock),
        reserved(0) {}
};

// Puts term k into this thread's place in the memory of its warp, and the name of its rounding draw.
template <bool kRandom>
__device__ __forceinline__ void make_ready(const Terms& terms, int32_t k, uint32_t who, const Keys& keys,
                                           Ready* all, uint4* all_random) {
  const Draw term = terms.at(k);
  all[threadIdx.x] = Ready(term, terms.coefficients[k], who, terms.clock, keys);
  if constexpr (kRandom) {
    all_random[threadIdx.x] = Name(who, term.step + terms.clock, kRoundingDraw, keys).words();
  }
}

// kTogether units share kUnrolled terms in a turn, and with them constants, keys and the branch.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kTogether = 1, kUnrolled = 4;  // two units would spill here
#else
constexpr int kTogether = 2, kUnrolled = 4;
#endif

// The form of a call: one term, one with a decay, sums of any length, or several sums of one term each.
enum class Sum : int32_t { kTerm = 0, kDecayedTerm = 1, kTerms = 2, kSteps = 3 };

constexpr bool is_plain(Sum sum) { return sum == Sum::kTerm || sum == Sum::kDecayedTerm; }

}  // namespace kernels
}  // namespace zo
