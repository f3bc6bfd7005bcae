// projector.h: project for one of several lanes, which project.cpp and project.cu share
//
// math     project.h, by float64 operations that no compiler contracts
// order    average(), rows() and finish(), each by all lanes before the next one
// equal    the same bits from g++ and from nvcc, for any number of lanes
#pragma once

#include "project.h"
#include "zo/portable.h"

namespace zo {

ZO_FN double add_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

ZO_FN double mul_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

ZO_FN double div_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __ddiv_rn(a, b);
#else
  return a / b;
#endif
}

ZO_FN float to_float(double x) {
#if defined(__CUDA_ARCH__)
  return __double2float_rn(x);
#else
  return static_cast<float>(x);
#endif
}

ZO_FN bool fits_float(double x) { return (as_bits(to_float(x)) & 0x7f800000u) != 0x7f800000u; }

// Below, a lane of a number of lanes has every lanes-th point or draw.
struct Projector {
  const Projection p;
  const double eps, lr, weight_decay, clip, sign, count;
  double *const coefficients, *const weights, *const means;
  float *const amounts, *const control;

  static constexpr uint32_t kMoves = 1, kBroken = 2;

  ZO_FN explicit Projector(const Projection& given)
      : p(given),
        eps(p.scalars[0]),
        lr(p.scalars[1]),
        weight_decay(p.scalars[2]),
        clip(p.scalars[3]),
        sign(p.scalars[4]),
        count(p.scalars[5]),
        coefficients(p.out),
        weights(p.out + p.draws),
        means(p.out + 2 * p.draws + (p.draws + 4) / 2),
        amounts(reinterpret_cast<float*>(p.out + 2 * p.draws)),
        control(amounts + p.draws) {}

  ZO_FN bool has_means() const { return p.reads > 1 && p.weights != nullptr; }

  ZO_FN double mean(int64_t j) const {
    double total = p.losses[j];
    for (int64_t i = 1; i < p.reads; ++i) total = add_rn(total, p.losses[i * p.points + j]);
    return p.reads == 1 ? total : div_rn(total, static_cast<double>(p.reads));
  }

  // First, once. The other lanes have to be done before rows().
  ZO_FN void average(int64_t lane, int64_t lanes) const {
    for (int64_t j = has_means() ? lane : p.points; j < p.points; j += lanes) means[j] = mean(j);
  }

  ZO_FN double coefficient(int64_t k) const {
    if (p.weights == nullptr) return mean(k);
    const double *row = p.weights + k * p.points, *read = has_means() ? means : p.losses;
    double total = -0.0;  // adding to it changes nothing, a sign of zero included
    bool any = false;
    for (int64_t j = 0; j < p.points; ++j) {
      const double weight = row[j];
      if (weight != 0.0) total = add_rn(total, mul_rn(weight, read[j])), any = true;
    }
    const double c = to_float(div_rn(any ? total : 0.0, eps));
    if (c != c || clip != clip) return c != c ? c : clip;
    const double low = c < -clip ? -clip : c;
    return clip < low ? clip : low;
  }

  // Then the draws. Returns kMoves if an amount is not 0, kBroken if a number is not finite.
  ZO_FN uint32_t rows(int64_t lane, int64_t lanes) const {
    uint32_t seen = 0;
    for (int64_t k = lane; k < p.draws; k += lanes) {
      const double c = coefficient(k), w = div_rn(mul_rn(sign, c), count), a = mul_rn(lr, w);
      coefficients[k] = c, weights[k] = w, amounts[k] = to_float(a);
      if (!fits_float(c) || !fits_float(w) || !fits_float(a)) seen |= kBroken;
      if (to_float(a) != 0.0f) seen |= kMoves;
    }
    return seen;
  }

  // Last, with what all lanes saw.
  ZO_FN void finish(int64_t lane, int64_t lanes, uint32_t seen) const {
    const double decay = add_rn(1.0, -mul_rn(lr, weight_decay));
    const bool finite = (seen & kBroken) == 0 && fits_float(lr) && fits_float(decay);
    for (int64_t k = finite ? p.draws : lane; k < p.draws; k += lanes) weights[k] = 0.0, amounts[k] = 0.0f;
    if (lane != 0) return;
    const float factor = finite ? to_float(decay) : 1.0f;
    control[0] = factor;
    control[1] = finite && (factor != 1.0f || (seen & kMoves) != 0) ? 1.0f : 0.0f;
    control[2] = finite ? 1.0f : 0.0f;
  }
};

}  // namespace zo
