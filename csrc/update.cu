// update.cu: an update rule, momentum, Adam or the sign, for a list of tensors, on a GPU
//
// math     update.h
// traffic  bytes an element: 8 (momentum), 16 (adam) or 0 (sign) for the state, 4 (16-bit) or 8 (float32) for
//          theta. z moves no bytes
// work     instructions of the whole loop per element, on sm_90, one term, rounding to nearest:
//          momentum  normal 32.8 (16-bit) and 32.1 (float32), rademacher 20.0 and 19.4
//          adam      normal 66.0 and 64.9, rademacher 53.3 and 52.3. This counts subroutines that only
//                    operands at the ends of the range call
//          Memory leaves time for 83 (momentum) and 138 (adam) on an H200, bf16. Momentum has 80 registers
//          and adam at most 116. No spill on sm_80 to sm_120: tests/kernels_cuda/test_update_sass.py,
//          nvcc 13.0
// scaled   a list with factors of z has kernels of its own, at most 128 registers
// launch   walk.h. The numbers of the rule and the coefficients lie in device memory
// equal    bit for bit to zokern/backends/reference.py for every grid. Root and quotient are correctly
//          rounded
// source   update.h; stream: zokern/stream.py, version 1
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "update.h"
#include "walk.h"

namespace zo {
namespace updates {  // named, so that a kernel has the same symbol in every build

using namespace kernels;

// Blocks per multiprocessor that the registers must allow. Adam loads 80 to 96 bytes at once in each thread,
// so 16 warps cover the latency of memory. With 80 registers it would spill.
constexpr int resident(Rule rule) { return rule == Rule::kAdam ? 2 : kResidentMore; }

// The terms of g. The last name comes by value too, so that a sum of one term reads no list of names.
struct Sum {
  const Draw* draws;
  const float* coefficients;
  int32_t count;
  uint32_t clock;
  Draw last;
};

// One element: updates m and v, and returns the new theta.
template <Rule kRule>
__device__ __forceinline__ float advance(const Scalars& s, float g, float theta, float& m, float& v) {
  if constexpr (kRule == Rule::kSign) {
    const float sign = g > 0.0f ? 1.0f : g < 0.0f ? -1.0f : g;
    return fma_rn(s.lr, sign, mul_rn(s.decay, theta));
  }
  m = fma_rn(s.alpha1, g, mul_rn(s.beta1, m));
  float move = m;
  if constexpr (kRule == Rule::kAdam) {
    v = fma_rn(s.alpha2, mul_rn(g, g), mul_rn(s.beta2, v));
    move = div_rn(m, fma_rn(sqrt_rn(add_rn(v, s.inside)), s.correction, s.eps));
  }
  return fma_rn(s.lr, move, mul_rn(s.decay, theta));
}

template <Direction kDirection, Rule kRule, Rounding kRounding, bool kScaled>
struct UpdateVerb {
  static constexpr bool kStochastic = kRounding == Rounding::kStochastic, kHasMoments = kRule != Rule::kSign;
  const Keys& keys;
  const Sum sum;
  const Scalars scalars;
  uint64_t nonfinite;

  __device__ __forceinline__ uint32_t last_step() const { return sum.last.step + sum.clock; }

  // Evaluates z unit by unit, although up to 16 units of `rademacher` share a block. Memory is the limit, so
  // there is time for it.
  __device__ __forceinline__ void gradient(uint32_t unit, uint32_t who, const float (&f)[kUnit],
                                           float (&g)[kUnit]) {
    float z[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) g[i] = 0.0f;
#pragma unroll 1
    for (int32_t k = 0; k < sum.count; ++k) {
      Draw term = sum.last;
      if (k + 1 < sum.count) term = sum.draws[k];
      values<kDirection>(unit, Name(who, term.step + sum.clock, term.draw, keys), keys, z);
      Factors<kScaled>::apply(f, z);
      const float factor = sum.coefficients[k];
#pragma unroll
      for (int i = 0; i < kUnit; ++i) g[i] = fma_rn(factor, z[i], g[i]);
    }
  }

  template <Type kType>
  struct Body {
    static constexpr bool kJoin = kRounding == Rounding::kResidual && kType == Type::kBfloat16;
    UpdateVerb& verb;
    const Place& place;
    const Factors<kScaled>& factors;
    const Name& random_name;
    Watch<kType> watch;

    __device__ __forceinline__ void unit(uint32_t i) {
      float theta[kUnit], g[kUnit], f[kUnit], m[kUnit] = {}, v[kUnit] = {};
      if constexpr (kJoin) {
        load_joined(place.theta, place.residual, i, theta);
      } else {
        load_unit<kType>(place.theta, i, theta);
      }
      if constexpr (kHasMoments) load_unit<Type::kFloat32>(place.out[0], i, m);
      if constexpr (kRule == Rule::kAdam) load_unit<Type::kFloat32>(place.out[1], i, v);
      factors.load(i, f);
      verb.gradient(place.begin + i, place.who, f, g);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) theta[j] = advance<kRule>(verb.scalars, g[j], theta[j], m[j], v[j]);
      if constexpr (kHasMoments) store_unit<Type::kFloat32>(place.out[0], i, nearest<Type::kFloat32>(m));
      if constexpr (kRule == Rule::kAdam)
        store_unit<Type::kFloat32>(place.out[1], i, nearest<Type::kFloat32>(v));
      Stored<kType> result;
      if constexpr (kJoin) {
        Stored<Type::kBfloat16> low;
        result = split(theta, low);
        store_unit<Type::kBfloat16>(place.residual, i, low);
      } else {
        Words random = {};
        if constexpr (kStochastic && kType != Type::kFloat32)
          random = philox_named(place.begin + i, random_name, verb.keys);
        result = rounded<kType, kStochastic>(theta, random);
      }
      store_unit<kType>(place.theta, i, result);
#pragma unroll
      for (int j = 0; j < result.kWords; ++j) watch.see(result.w[j]);
    }

    // The loop only notes that some result was not finite. Then the thread reads its results again and counts
    // them.
    __device__ __forceinline__ void settle(uint32_t i, uint32_t end, uint32_t stride) {
      if (!watch.seen()) return;
      watch.state = 0;
      verb.nonfinite += count_nonfinite<kType>(place.theta, i, end, stride);
    }
  };

  template <Type kType>
  __device__ __forceinline__ bool loop(const Place& place, const Factors<kScaled>& factors,
                                       const Turn& turn) {
    const Name random(place.who, last_step(), kRoundingDraw, keys);
    Body<kType> body{*this, place, factors, random, {}};
#pragma unroll 1
    for (uint32_t i = turn.lane; i < place.count; i += turn.lanes) body.unit(i);
    body.settle(turn.lane, place.count, turn.lanes);
    return true;
  }

  __device__ __forceinline__ bool units(const Entry& e, const Units& whole, const Turn& turn) {
    const Place place(e, whole);
    const Factors<kScaled> factors(e, whole);
    if (!factors.aligned()) return false;
    switch (static_cast<Type>(e.type)) {
      case Type::kFloat32:
        return loop<Type::kFloat32>(place, factors, turn);
      case Type::kBfloat16:
        if (kRounding == Rounding::kResidual && e.residual == nullptr) return false;
        return loop<Type::kBfloat16>(place, factors, turn);
      case Type::kFloat16:
        return loop<Type::kFloat16>(place, factors, turn);
    }
    return false;
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    const bool join = kRounding == Rounding::kResidual && e.residual != nullptr &&
                      e.type == static_cast<int32_t>(Type::kBfloat16);
    float g[kUnit], f[kUnit];
    Factors<kScaled>::load_piece(e, p, f);
    gradient(p.unit, e.who, f, g);
    Words random = {};
    if constexpr (kStochastic)
      random = philox_named(p.unit, Name(e.who, last_step(), kRoundingDraw, keys), keys);
    float theta[kUnit], m[kUnit] = {}, v[kUnit] = {};
    load_theta(e, p, join, theta);
    if constexpr (kHasMoments) load_piece(p, e.out[0], Type::kFloat32, p.to, 1, m);
    if constexpr (kRule == Rule::kAdam) load_piece(p, e.out[1], Type::kFloat32, p.to, 1, v);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) theta[i] = advance<kRule>(scalars, g[i], theta[i], m[i], v[i]);
    if constexpr (kHasMoments) store_piece(p, e.out[0], Type::kFloat32, m);
    if constexpr (kRule == Rule::kAdam) store_piece(p, e.out[1], Type::kFloat32, v);
    nonfinite += store_theta<kStochastic>(e, p, join, theta, random);
  }
};

template <Rule kRule>
__device__ __forceinline__ Scalars scalars_at(const float* from) {
  Scalars s = {from[0], from[1], 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  if constexpr (kRule != Rule::kSign) s.beta1 = from[2], s.alpha1 = from[3];
  if constexpr (kRule == Rule::kAdam) {
    s.beta2 = from[4], s.alpha2 = from[5], s.inside = from[6], s.correction = from[7], s.eps = from[8];
  }
  return s;
}

template <Direction kDirection, Rule kRule, Rounding kRounding>
__global__ void __launch_bounds__(kThreads, resident(kRule))
    update_kernel(const List list, const Draw* draws, const float* coefficients, int32_t draw_count,
                  Draw last, const float* scalars, unsigned long long* nonfinite) {
  if (stopped(list, kFinite)) return;
  const Sum sum = {draws, coefficients, draw_count, clock_of(list), last};
  UpdateVerb<kDirection, kRule, kRounding, false> verb{list.keys, sum, scalars_at<kRule>(scalars), 0};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
  // This is rare, so every thread adds for itself.
  if (verb.nonfinite != 0) atomicAdd(nonfinite, static_cast<unsigned long long>(verb.nonfinite));
}

// Lists with factors of z.
template <Direction kDirection, Rule kRule, Rounding kRounding>
__global__ void __launch_bounds__(kThreads, kResidentMost)
    scaled_update_kernel(const List list, const Draw* draws, const float* coefficients, int32_t draw_count,
                         Draw last, const float* scalars, unsigned long long* nonfinite) {
  if (stopped(list, kFinite)) return;
  const Sum sum = {draws, coefficients, draw_count, clock_of(list), last};
  UpdateVerb<kDirection, kRule, kRounding, true> verb{list.keys, sum, scalars_at<kRule>(scalars), 0};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
  if (verb.nonfinite != 0) atomicAdd(nonfinite, static_cast<unsigned long long>(verb.nonfinite));
}

template <Direction kDirection, Rule kRule, Rounding kRounding>
auto* one_of(bool scaled) {
  return scaled ? scaled_update_kernel<kDirection, kRule, kRounding>
                : update_kernel<kDirection, kRule, kRounding>;
}

template <Direction kDirection, Rule kRule>
auto* rounded_by(Rounding rounding, bool scaled) {
  switch (rounding) {
    case Rounding::kNearest:
      return one_of<kDirection, kRule, Rounding::kNearest>(scaled);
    case Rounding::kStochastic:
      return one_of<kDirection, kRule, Rounding::kStochastic>(scaled);
    case Rounding::kResidual:
      return one_of<kDirection, kRule, Rounding::kResidual>(scaled);
  }
  throw std::runtime_error("update_: unknown rounding " + std::to_string(static_cast<int>(rounding)));
}

template <Direction kDirection>
auto* update_of(Rule rule, Rounding rounding, bool scaled) {
  switch (rule) {
    case Rule::kMomentum:
      return rounded_by<kDirection, Rule::kMomentum>(rounding, scaled);
    case Rule::kAdam:
      return rounded_by<kDirection, Rule::kAdam>(rounding, scaled);
    case Rule::kSign:
      return rounded_by<kDirection, Rule::kSign>(rounding, scaled);
  }
  throw std::runtime_error("update_: unknown rule " + std::to_string(static_cast<int>(rule)));
}

}  // namespace updates

using namespace updates;

void update(const Launch& launch, const Draw* draws, int32_t draw_count, Rule rule, const float* scalars,
            Rounding rounding, int64_t* nonfinite) {
  if (draw_count < 1)
    throw std::runtime_error("update_: draw_count is " + std::to_string(draw_count) +
                             "; expected at least 1");
  if (launch.coefficients == nullptr || (draw_count > 1 && launch.draws == nullptr)) {
    throw std::runtime_error("update_: coefficients or the draws of several terms are not in device memory");
  }
  if (launch.direction != Direction::kNormal && launch.direction != Direction::kRademacher) {
    kernels::unknown("update_", launch.direction);
  }
  auto* kernel = launch.direction == Direction::kNormal
                     ? update_of<Direction::kNormal>(rule, rounding, launch.scaled)
                     : update_of<Direction::kRademacher>(rule, rounding, launch.scaled);
  kernels::start("update_", kernel, launch, launch.draws, launch.coefficients, draw_count,
                 draws[draw_count - 1], scalars, reinterpret_cast<unsigned long long*>(nonfinite));
}

}  // namespace zo
