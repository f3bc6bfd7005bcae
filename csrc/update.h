// update.h: theta <- decay theta + lr move, a rule with state; what update.cpp and update.cu implement
//
// math     g = sum_k a_k z_k from 0, by fma in draw order
//          momentum  m <- fma(alpha, g, round(beta m)), move = m
//          adam      m <- fma(alpha1, g, round(beta1 m)), v <- fma(alpha2, round(g g), round(beta2 v)),
//                    move = m / fma(sqrt(v + inside), correction, eps), each operation rounded once
//          theta <- round(fma(lr, move, round(decay theta))): float32 inside, one rounding to the type of theta
// table    the Entry and Chunk of elementwise.h: out[0] is m and out[1] is v, contiguous float32; residual as for axpy_
// forms    lr holds 1 / (1 - beta1^t) and correction 1 / sqrt(1 - beta2^t), both 1 without bias correction; either eps (outside
//          the root, Kingma and Ba 2015) or inside (TeZO) is 0
// source   Polyak 1964; Kingma and Ba 2015, as in torch.optim; Zhang et al. 2024 (ZO-Bench) for both on a zeroth-order estimate
#pragma once

#include "elementwise.h"

namespace zo {

enum class Rule : int32_t { kMomentum = 0, kAdam = 1 };

// zokern/backends/base.py, SCALARS: in host memory for the CPU, in device memory for CUDA; momentum has the first four
struct Scalars {
  float decay, lr, beta1, alpha1;
  float beta2, alpha2, inside, correction, eps;
};
constexpr int kMomentumScalars = 4, kAdamScalars = 9;

// *nonfinite += new weights that are inf or NaN
void update(const Launch& launch, const Draw* draws, int32_t draw_count, Rule rule, const float* scalars, Rounding rounding,
            int64_t* nonfinite);

}  // namespace zo
