// lowrank.h: theta <- decay theta + scale left right^T; what lowrank.cpp and lowrank.cu implement
//
// math     t = fma(scale, s, round(decay theta)), s = sum_k left[i, k] right[j, k]; then one rounding to the type of the
// result.
//          Element number e of the unsharded matrix (elementwise.h: first, pitch, rows) has i = e div n and j = e mod n, n
//          being the rows of `right`, whatever the shape of theta: shards and flattened matrices read what the whole would have
//          read.
// table    the Entry and Chunk of elementwise.h, and one Factors per tensor, found by Entry::tensor. With out[0] the results
//          go there and theta is only read; residual joins theta's low bits and, in place, takes the new ones.
// source   Chen et al. 2024 (LOZO, arXiv 2410.07698) for the form U V^T of a perturbation
#pragma once

#include "elementwise.h"

namespace zo {

struct Factors {
  const float* left;   // (m, rank), row-major
  const float* right;  // (columns, rank), row-major
  int64_t rank;
  int64_t columns;  // n
  float scale;
  int32_t reserved;
};
static_assert(sizeof(Factors) == 40, "zokern/backends/table.py packs 40 bytes");

// *nonfinite += results that are inf or NaN. launch.direction is not read; step names the bits of stochastic rounding.
void lowrank(const Launch& launch, const Factors* factors, int64_t factor_count, float decay, Rounding rounding, uint32_t step,
             int64_t* nonfinite);

}  // namespace zo
