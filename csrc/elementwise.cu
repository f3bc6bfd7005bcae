// elementwise.cu: draw and perturb for a list of tensors, on a GPU, and the entry points of the module
//
// math     elementwise.h: float32 inside, one rounding. axpy.cu has the kernels of axpy_
// traffic  draw: one write per element. perturb: bf16 2 B read and one write for each side. z moves no bytes
// work     perturb with both signs, instructions of the whole loop per element, on sm_90: normal 26.3
//          (16-bit), rademacher 7.9. At most 64 registers, 80 for perturb. No spill on sm_80 to sm_120:
//          tests/kernels_cuda/test_sass.py, `python -m benchmarks.predict`, nvcc 13.0
// scaled   a list with factors of z has kernels of its own. The others hold no instruction for factors
// launch   walk.h
// equal    bit for bit to zokern/backends/reference.py for every grid. A value depends on its stream number
//          alone. cvt.rn rounds as zo/rounding.h does
// source   Malladi et al. 2023, Algorithm 1; stream: zokern/stream.py, version 1
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "walk.h"

namespace zo {
namespace kernels {  // named, so that a kernel has the same symbol in every build

template <Direction kDirection, bool kScaled>
struct DrawVerb {
  const Keys& keys;
  uint32_t step, draw;

  template <Type kType>
  struct Body {
    void* out;
    const Factors<kScaled>& factors;

    template <class Z>
    __device__ __forceinline__ void unit(uint32_t i, const Z& z_of) {
      float z[kUnit], f[kUnit];
      factors.load(i, f);
      z_of(z);
      factors.apply(f, z);
      store_unit<kType>(out, i, nearest<kType>(z));
    }
    __device__ __forceinline__ void settle(uint32_t, uint32_t, uint32_t) {}
  };

  template <Type kType>
  __device__ __forceinline__ bool loop(const Place& place, const Factors<kScaled>& factors,
                                       const Turn& turn) {
    Body<kType> body{place.out[0], factors};
    each_unit<kDirection>(place, turn, Name(place.who, step, draw, keys), keys, body);
    return true;
  }

  __device__ __forceinline__ bool units(const Entry& e, const Units& whole, const Turn& turn) {
    const Place place(e, whole);
    const Factors<kScaled> factors(e, whole);
    if (!factors.aligned()) return false;
    switch (static_cast<Type>(e.out_type)) {
      case Type::kFloat32:
        return loop<Type::kFloat32>(place, factors, turn);
      case Type::kBfloat16:
        return loop<Type::kBfloat16>(place, factors, turn);
      case Type::kFloat16:
        return loop<Type::kFloat16>(place, factors, turn);
    }
    return false;
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    float z[kUnit], f[kUnit];
    values<kDirection>(p.unit, Name(e.who, step, draw, keys), keys, z);
    Factors<kScaled>::load_piece(e, p, f);
    Factors<kScaled>::apply(f, z);
    store_piece(p, e.out[0], static_cast<Type>(e.out_type), z);
  }
};

template <Direction kDirection, bool kScaled>
struct PerturbVerb {
  const Keys& keys;
  uint32_t step, draw;
  float plus, minus;

  template <Type kType, Type kOut>
  struct Body {
    const PerturbVerb& verb;
    const Place& place;
    const Factors<kScaled>& factors;

    template <class Z>
    __device__ __forceinline__ void unit(uint32_t i, const Z& z_of) {
      float v[kUnit], z[kUnit], f[kUnit], out[kUnit];
      factors.load(i, f);
      if (kType == Type::kBfloat16 && place.residual != nullptr) {
        load_joined(place.theta, place.residual, i, v);
      } else {
        load_unit<kType>(place.theta, i, v);
      }
      z_of(z);
      factors.apply(f, z);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) out[j] = fma_rn(verb.plus, z[j], v[j]);
      store_unit<kOut>(place.out[0], i, nearest<kOut>(out));
      if (place.out[1] == nullptr) return;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) out[j] = fma_rn(verb.minus, z[j], v[j]);
      store_unit<kOut>(place.out[1], i, nearest<kOut>(out));
    }
    __device__ __forceinline__ void settle(uint32_t, uint32_t, uint32_t) {}
  };

  __device__ __forceinline__ bool units(const Entry& e, const Units& whole, const Turn& turn) {
    const Place place(e, whole);
    const Factors<kScaled> factors(e, whole);
    if (!factors.aligned()) return false;
#define ZO_INSTANCE(direction, theta, out)                                                  \
  if constexpr (kDirection == direction) {                                                  \
    if (e.type == static_cast<int32_t>(theta) && e.out_type == static_cast<int32_t>(out)) { \
      Body<theta, out> body{*this, place, factors};                                         \
      each_unit<kDirection>(place, turn, Name(place.who, step, draw, keys), keys, body);    \
      return true;                                                                          \
    }                                                                                       \
  }
#include "instances.def"
#undef ZO_INSTANCE
    return false;
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    const Type out_type = static_cast<Type>(e.out_type);
    float v[kUnit], z[kUnit], f[kUnit], out[kUnit];
    load_theta(e, p, e.type == static_cast<int32_t>(Type::kBfloat16) && e.residual != nullptr, v);
    values<kDirection>(p.unit, Name(e.who, step, draw, keys), keys, z);
    Factors<kScaled>::load_piece(e, p, f);
    Factors<kScaled>::apply(f, z);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) out[i] = fma_rn(plus, z[i], v[i]);
    store_piece(p, e.out[0], out_type, out);
    if (e.out[1] == nullptr) return;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) out[i] = fma_rn(minus, z[i], v[i]);
    store_piece(p, e.out[1], out_type, out);
  }
};

template <Direction kDirection>
__global__ void __launch_bounds__(kThreads, kResident)
    draw_kernel(const List list, uint32_t step, uint32_t draw) {
  DrawVerb<kDirection, false> verb{list.keys, step + clock_of(list), draw};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
}

template <Direction kDirection>
__global__ void __launch_bounds__(kThreads, kResidentMore)
    perturb_kernel(const List list, uint32_t step, uint32_t draw, float plus, float minus) {
  PerturbVerb<kDirection, false> verb{list.keys, step + clock_of(list), draw, plus, minus};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
}

// Lists with factors of z.
template <Direction kDirection>
__global__ void __launch_bounds__(kThreads, kResidentMore)
    scaled_draw_kernel(const List list, uint32_t step, uint32_t draw) {
  DrawVerb<kDirection, true> verb{list.keys, step + clock_of(list), draw};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
}

template <Direction kDirection>
__global__ void __launch_bounds__(kThreads, kResidentMore)
    scaled_perturb_kernel(const List list, uint32_t step, uint32_t draw, float plus, float minus) {
  PerturbVerb<kDirection, true> verb{list.keys, step + clock_of(list), draw, plus, minus};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
}

__global__ void __launch_bounds__(kThreads, kResident)
    philox_kernel(const uint32_t* counters, int64_t count, uint32_t k0, uint32_t k1, int rounds,
                  uint32_t* words) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const uint32_t* counter = counters + 4 * i;
    const Words four = philox4x32(counter[0], counter[1], counter[2], counter[3], k0, k1, rounds);
#pragma unroll
    for (int j = 0; j < 4; ++j) words[4 * i + j] = four.w[j];
  }
}

// axpy.cu defines it.
template <Rounding kRounding>
void axpy_rounded(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each,
                  unsigned long long* nonfinite);

}  // namespace kernels

using namespace kernels;

void philox(const uint32_t* counters, int64_t count, uint32_t k0, uint32_t k1, int rounds, uint32_t* words,
            const Launch& launch) {
  if (count <= 0) return;
  const int64_t needed = (count + kThreads - 1) / kThreads;
  const unsigned blocks =
      static_cast<unsigned>(std::min(resident_blocks("philox", philox_kernel, launch.workers), needed));
  ZO_LAUNCH(philox_kernel, blocks, kThreads, reinterpret_cast<cudaStream_t>(launch.stream), counters, count,
            k0, k1, rounds, words);
  check(cudaGetLastError(), "philox");
}

void draw(const Launch& launch, uint32_t step, uint32_t draw) {
  switch (launch.direction) {
    case Direction::kNormal: {
      auto* kernel = launch.scaled ? scaled_draw_kernel<Direction::kNormal> : draw_kernel<Direction::kNormal>;
      return start("draw", kernel, launch, step, draw);
    }
    case Direction::kRademacher: {
      auto* kernel =
          launch.scaled ? scaled_draw_kernel<Direction::kRademacher> : draw_kernel<Direction::kRademacher>;
      return start("draw", kernel, launch, step, draw);
    }
  }
  unknown("draw", launch.direction);
}
void axpy(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each, Rounding rounding,
          int64_t* nonfinite) {
  if (draw_count < 1)
    throw std::runtime_error("axpy_: draw_count is " + std::to_string(draw_count) + "; expected at least 1");
  if (launch.coefficients == nullptr || (draw_count > 1 && launch.draws == nullptr)) {
    throw std::runtime_error("axpy_: coefficients or the draws of several terms are not in device memory");
  }
  auto* count = reinterpret_cast<unsigned long long*>(nonfinite);
  switch (rounding) {
    case Rounding::kNearest:
      return axpy_rounded<Rounding::kNearest>(launch, draws, draw_count, each, count);
    case Rounding::kStochastic:
      return axpy_rounded<Rounding::kStochastic>(launch, draws, draw_count, each, count);
    case Rounding::kResidual:
      return axpy_rounded<Rounding::kResidual>(launch, draws, draw_count, each, count);
  }
  throw std::runtime_error("axpy_: unknown rounding " + std::to_string(static_cast<int>(rounding)));
}

void perturb(const Launch& launch, uint32_t step, uint32_t draw, const float* scales) {
  switch (launch.direction) {
    case Direction::kNormal: {
      auto* kernel =
          launch.scaled ? scaled_perturb_kernel<Direction::kNormal> : perturb_kernel<Direction::kNormal>;
      return start("perturb", kernel, launch, step, draw, scales[0], scales[1]);
    }
    case Direction::kRademacher: {
      auto* kernel = launch.scaled ? scaled_perturb_kernel<Direction::kRademacher>
                                   : perturb_kernel<Direction::kRademacher>;
      return start("perturb", kernel, launch, step, draw, scales[0], scales[1]);
    }
  }
  unknown("perturb", launch.direction);
}

std::string implementation() { return "cuda"; }

void select(const std::string& name) {
  if (name != "cuda")
    throw std::invalid_argument("unknown implementation '" + name + "'; the module has cuda");
}

std::vector<std::string> architectures() {
#if defined(ZOKERN_ARCHITECTURES)
  std::vector<std::string> names;
  for (const int arch : {ZOKERN_ARCHITECTURES}) names.push_back("sm_" + std::to_string(arch));
  names.push_back("compute_" + std::to_string(ZOKERN_PTX));  // a newer device compiles it
  return names;
#else
  return {"host"};
#endif
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

}  // namespace zo
