// update.h: theta <- decay theta + lr move, an update rule. update.cpp and update.cu implement it
//
// math     g = sum_k a_k z_k from 0, by fma in draw order
//          momentum  m <- fma(alpha, g, round(beta m)), move = m
//          adam      m <- fma(alpha1, g, round(beta1 m)), v <- fma(alpha2, round(g g), round(beta2 v)),
//                    move = m / fma(sqrt(v + inside), correction, eps). Each operation is rounded once
//          sign      move = 1, -1, or g itself where g is 0 or NaN. It keeps no state
//          theta <- round(fma(lr, move, round(decay theta))): float32 inside, one rounding to theta's type
// table    the Entry and Chunk of elementwise.h. out[0] is m and out[1] is v, contiguous float32. residual is
//          as for axpy_, and scale too
// forms    lr includes 1 / (1 - beta1^t), and correction is 1 / sqrt(1 - beta2^t). Both factors are 1 without
//          bias correction. Either eps or inside is 0: eps stands outside the root (Kingma and Ba 2015),
//          inside stands inside it (TeZO)
// source   Polyak 1964; Kingma and Ba 2015, as in torch.optim; Zhang et al. 2024 (ZO-Bench) for both on a
//          zeroth-order estimate; Bernstein et al. 2018 (signSGD), Liu et al. 2019 (ZO-signSGD)
#pragma once

#include "elementwise.h"

namespace zo {

enum class Rule : int32_t { kMomentum = 0, kAdam = 1, kSign = 2 };

// The numbers of a rule, in the order of SCALARS in zokern/backends/base.py. They lie in host memory for the
// CPU and in device memory for CUDA. Momentum has the first four, sign the first two.
struct Scalars {
  float decay, lr, beta1, alpha1;
  float beta2, alpha2, inside, correction, eps;
};
constexpr int scalars_of(Rule rule) { return rule == Rule::kAdam ? 9 : rule == Rule::kMomentum ? 4 : 2; }
constexpr int states_of(Rule rule) { return rule == Rule::kAdam ? 2 : rule == Rule::kMomentum ? 1 : 0; }

// Adds the number of new weights that are inf or NaN to *nonfinite.
void update(const Launch& launch, const Draw* draws, int32_t draw_count, Rule rule, const float* scalars,
            Rounding rounding, int64_t* nonfinite);

}  // namespace zo
