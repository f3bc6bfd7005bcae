// linear.h: products with perturbed weights, for several sides at once. linear.cpp implements it
//
// math     y = shrink x (W + scale z)^T + sum_t x first_t^T middle_t last_t^T + bias, rounded to W's type
//          once. W is m x n, row-major, and only read. If it is transposed, W is n x m and the first product
//          is x (W + scale z)
// rounded  W + scale z is first rounded to W's type: bit for bit the values that `perturb` writes. Sums are
//          float32. For a bfloat16 W, first, last and x first^T middle are rounded to bfloat16 before they
//          are multiplied
// source   Malladi et al. 2023, Algorithm 1 (dense z); Chen et al. 2024, LOZO (the thin products)
#pragma once

#include <vector>

#include "elementwise.h"

namespace zo {

struct Side {     // one product; sides with the same draw follow one another
  const void* x;  // rows x n, contiguous; float32, but bfloat16 if W is bfloat16 and linear_pairs()
  int64_t rows;
  void* y;            // rows x m, contiguous, of W's type
  const float* bias;  // m, or null
  float scale;
  int64_t draw;  // number of z in the step, or -1: W itself
};

struct Thin {  // a thin product of a side; those with the same `first` or `last` follow one another
  int64_t side;
  const float* first;  // inner x n, contiguous
  int64_t inner;
  const float* middle;  // inner x rank, with strides row_stride and column_stride
  int64_t row_stride, column_stride;
  const float* last;  // m x rank, rows `stride` apart
  int64_t rank, stride;
};

struct Linear {
  const void* weight;
  Type type;
  bool transposed;
  int64_t m, n;  // columns of y and of x
  Direction direction;
  uint64_t seed, first;  // number of W's first element in the unsharded parameter
  uint32_t who, step;
  float shrink;
  std::vector<Side> sides;
  std::vector<Thin> thins;
  int64_t workers;  // threads
};

void linear(const Linear& product);
bool linear_pairs();                  // whether a bfloat16 W takes x in bfloat16
int64_t linear_memory(int64_t rows);  // bytes of a thread for `rows` rows of all sides together

}  // namespace zo
