// project.h: the losses of a step to the numbers of its update. project.cpp and project.cu implement it
//
// math     L_j = (sum_i losses[i, j]) / reads
//          c_k = float32((sum_j weights[k, j] L_j) / eps), cut to +-clip; without weights c_k = L_k
//          w_k = sign c_k / count      a_k = float32(lr w_k)      decay = float32(1 - lr weight_decay)
//          float64, every operation rounded once. Sums go in order from their first term, and a weight of 0
//          is no term
// control  {decay, go, finite}. A step with a c, w, lr w, lr or decay that is inf or NaN in float32 has
//          finite = 0, w = a = 0 and decay = 1. go = 0 says that no weight changes
// out      coefficients [draws], weights [draws], float amounts [draws] and control [3], then the means of
//          several reads. zokern/backends/launch.py makes the memory and cuts it
// equal    bit for bit to zokern/backends/reference.py
// source   Malladi et al. 2023, Algorithm 1
#pragma once

#include <cstdint>

namespace zo {

struct Projection {
  const double* losses;   // [reads, points], row-major
  const double* weights;  // [draws, points], or null: the losses are the coefficients, and draws = points
  const double* scalars;  // eps, lr, weight_decay, clip, sign, count
  int64_t reads, points, draws;
  double* out;
  uintptr_t stream;  // CUDA: cudaStream_t; CPU: unused
};

void project(const Projection& projection);

}  // namespace zo
