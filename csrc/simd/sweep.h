// simd/sweep.h: the products of rows of x with panels, summed in registers. linear.cpp includes it
//
// block    kRows rows of x meet one panel: kRows x kVectors vectors of sums stay in registers for the panel's
//          depth
// order    each sum runs over k in the same order (Order), so its bits do not depend on the other rows
#pragma once

namespace zo {
namespace {

// sum + x w for one word of each: a number, or a pair.
template <Order O, class S = Simd>
ZO_INLINE F plus(F x, F w, F sum) {
  if constexpr (O == Order::kPairs) {
    return S::dot(x, w, sum);
  } else {
    return S::fma(x, w, sum);
  }
}

// R rows of x with V vectors of one panel: sums += x panel, or sums = x panel if `first`.
template <int R, Order O, int V>
ZO_INLINE void block(const void* rows, int64_t stride, int64_t k, const float* panel, float* sums,
                     bool first) {
  F sum[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      sum[i][v] = first ? Simd::all(0.0f) : Simd::load(sums + i * kColumns + v * kLanes);
  }
  const auto add = [&](const float* words, auto&& one_of) ZO_INLINE_LAMBDA {
    F right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) right[v] = Simd::load(words + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const F one = Simd::all(one_of(i));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[i][v] = plus<O>(one, right[v], sum[i][v]);
    }
  };
  if constexpr (O == Order::kPairs) {
    const uint16_t* const x = static_cast<const uint16_t*>(rows);
    for (int64_t j = 0; j + 1 < k; j += 2, panel += kWide) {
      add(panel, [&](int i) ZO_INLINE_LAMBDA {
        float pair;
        std::memcpy(&pair, x + i * stride + j, 4);
        return pair;
      });
    }
    if (k % 2 != 0)
      add(panel, [&](int i) ZO_INLINE_LAMBDA { return as_float(uint32_t{x[i * stride + k - 1]}); });
  } else {
    const float* const x = static_cast<const float*>(rows);
    const auto at = [&](int64_t j) ZO_INLINE_LAMBDA {
      add(panel + j * kWide, [&](int i) ZO_INLINE_LAMBDA { return x[i * stride + j]; });
    };
    int64_t j = 0;
    if constexpr (O == Order::kOddFirst) {
      for (; j + 1 < k; j += 2) at(j + 1), at(j);
    }
    for (; j < k; ++j) at(j);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) Simd::store(sums + i * kColumns + v * kLanes, sum[i][v]);
  }
}

template <Order O, int V, int R = kRows>
void rest(int64_t rows, const void* x, int64_t stride, int64_t k, const float* panel, float* sums,
          bool first) {
  if (rows == R) return block<R, O, V>(x, stride, k, panel, sums, first);
  if constexpr (R > 1) rest<O, V, R - 1>(rows, x, stride, k, panel, sums, first);
}

// All rows of x with all panels, from x's column `column` on, and with V vectors of each panel.
template <Order O, int V = kVectors>
void sweep_rows(const void* x, int64_t rows, int64_t stride, int64_t column, int64_t k, const float* panels,
                int64_t count, float* sums, bool first) {
  const int64_t words = O == Order::kPairs ? (k + 1) / 2 : k;
  const auto row = [&](int64_t i) {
    return static_cast<const char*>(x) + (i * stride + column) * (O == Order::kPairs ? 2 : 4);
  };
  for (int64_t begin = 0; begin < rows; begin += kBlock) {
    const int64_t end = std::min(rows, begin + kBlock);
    for (int64_t q = 0; q < count; q += kWide) {
      int64_t i = begin;
      for (; i + kRows <= end; i += kRows) {
        block<kRows, O, V>(row(i), stride, k, panels + q * words, sums + i * kColumns + q, first);
      }
      if (i < end) rest<O, V>(end - i, row(i), stride, k, panels + q * words, sums + i * kColumns + q, first);
    }
  }
}

// All rows with the panels of a thin product, which may have few columns.
void sweep_thin(Order order, const void* x, int64_t rows, int64_t stride, int64_t column, int64_t k,
                const float* panels, int64_t count, float* sums, bool first) {
  const int64_t rest = count % kWide, whole = count - rest, words = order == Order::kPairs ? (k + 1) / 2 : k;
  const auto sweep = [&](auto one, auto two, auto three) {
    if (whole > 0) three(x, rows, stride, column, k, panels, whole, sums, first);
    const auto some = rest <= kLanes ? one : rest <= 2 * kLanes ? two : three;
    if (rest > 0) some(x, rows, stride, column, k, panels + whole * words, rest, sums + whole, first);
  };
  if (order == Order::kUp) {
    sweep(sweep_rows<Order::kUp, 1>, sweep_rows<Order::kUp, 2>, sweep_rows<Order::kUp, 3>);
  } else {
    sweep(sweep_rows<kBfloat16, 1>, sweep_rows<kBfloat16, 2>, sweep_rows<kBfloat16, 3>);
  }
}

}  // namespace
}  // namespace zo
