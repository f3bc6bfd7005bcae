// cuda_runtime.h: the few names of CUDA that csrc/elementwise.cu uses, for g++: its kernels then run on the host
//
// A launch is a loop over blocks and threads, one after the other, which is exact for kernels without barriers, shuffles and
// shared memory; ours have none. ZO_SHIM_ORDER = 1 runs blocks and threads last to first: results may not depend on the order.
// ZO_LAUNCH_WARPS runs the 32 threads of a warp side by side, as coroutines that wait for one another at every matrix product;
// the product itself is computed from what all lanes gave, by the fragment layouts that the PTX manual prints.
// A launch is refused where a GPU would refuse it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
static_assert(sizeof(uint4) == 16, "as on a GPU");

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct float2 {
  float x, y;
};

struct ShimDimension {
  unsigned x;
};

inline thread_local ShimDimension threadIdx, blockIdx, blockDim, gridDim;

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

inline cudaError_t& shim_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = shim_error();
  shim_error() = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid configuration"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

// Small numbers, so that grids of a few blocks walk over many chunks; tests change them.
inline int shim_number(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = shim_number("ZO_SHIM_PROCESSORS", 3);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

inline int shim_mistake = 0;  // tests/test_cuda.py builds kernels with mistakes and chooses one by its number

template <class... Parameters, class... Arguments>
void shim_launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  if (blocks == 0 || threads == 0 || threads > 1024) {
    shim_error() = cudaErrorInvalidConfiguration;
    return;
  }
  const bool backwards = shim_number("ZO_SHIM_ORDER", 0) == 1;
  shim_mistake = shim_number("ZO_SHIM_MISTAKE", 0);
  gridDim.x = blocks;
  blockDim.x = threads;
  for (unsigned block = 0; block < blocks; ++block) {
    for (unsigned thread = 0; thread < threads; ++thread) {
      blockIdx.x = backwards ? blocks - 1 - block : block;
      threadIdx.x = backwards ? threads - 1 - thread : thread;
      kernel(arguments...);
    }
  }
}

#define ZO_LAUNCH(kernel, blocks, threads, stream, ...) shim_launch(kernel, blocks, threads, __VA_ARGS__)

// ---- warps

struct ShimWarp {
  static constexpr int kLanes = 32;
  ucontext_t caller, lanes[kLanes];
  std::vector<char> stacks = std::vector<char>(kLanes * (256 << 10));
  bool done[kLanes];
  int lane;  // that runs now
  uint32_t a[kLanes][4], b[kLanes][2];
  float c[kLanes][4];
};

inline thread_local ShimWarp* shim_warp = nullptr;

inline float shim_bf16(uint32_t pair, int which) {
  const uint32_t bits = (which == 0 ? pair << 16 : pair & 0xffff0000u);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// mma.m16n8k16 for all lanes. Lane 4 g + t holds: a_i, i = 0 .. 7: row g (+ 8 for i = 2, 3, 6, 7), column 2 t + i mod 2 (+ 8 for i >= 4);
// b_i, i = 0 .. 3: row 2 t + i mod 2 (+ 8 for i >= 2), column g; c_i, i = 0 .. 3: row g (+ 8 for i >= 2), column 2 t + i mod 2.
inline void shim_multiply(ShimWarp& w) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) a[g + (i / 2 % 2) * 8][2 * t + i % 2 + (i / 4) * 8] = shim_bf16(w.a[lane][i / 2], i % 2);
    for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + (i / 2) * 8][g] = shim_bf16(w.b[lane][i / 2], i % 2);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i / 2) * 8, column = 2 * (lane % 4) + i % 2;
      double sum = w.c[lane][i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      w.c[lane][i] = static_cast<float>(sum);
    }
  }
}

// The last lane to arrive multiplies for all. A lane that has ended would hang a GPU here; the host stops.
inline void shim_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ShimWarp& w = *shim_warp;
  const int lane = w.lane;
  std::memcpy(w.a[lane], a, sizeof a), std::memcpy(w.b[lane], b, sizeof b), std::memcpy(w.c[lane], c, sizeof c);
  for (int other = 0; other < 32; ++other) {
    if (w.done[other]) std::abort();
  }
  if (lane == 31) shim_multiply(w);
  const int next = (lane + 1) % 32;
  w.lane = next;
  threadIdx.x = threadIdx.x / 32 * 32 + static_cast<unsigned>(next);
  swapcontext(&w.lanes[lane], &w.lanes[next]);
  std::memcpy(c, w.c[lane], sizeof c);
}

#define ZO_HOST_MMA(c, a, b) shim_mma(c, a, b)

// Lanes start in order and each runs to its next product, so that lane 31 is always the last to arrive.
template <class Body>
void shim_lane(unsigned low, unsigned high) {
  const Body& body = *reinterpret_cast<const Body*>(static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32);
  body();
  ShimWarp& w = *shim_warp;
  const int lane = w.lane;
  w.done[lane] = true;
  const int next = lane + 1;
  if (next == 32) {
    setcontext(&w.caller);
  } else {
    w.lane = next;
    threadIdx.x = threadIdx.x / 32 * 32 + static_cast<unsigned>(next);
    setcontext(&w.lanes[next]);
  }
}

template <class Body>
void shim_run_warp(unsigned first, const Body& body) {
  static thread_local ShimWarp warp;
  shim_warp = &warp;
  const auto address = reinterpret_cast<uintptr_t>(&body);
  for (int lane = 0; lane < 32; ++lane) {
    warp.done[lane] = false;
    getcontext(&warp.lanes[lane]);
    warp.lanes[lane].uc_stack.ss_sp = warp.stacks.data() + static_cast<size_t>(lane) * (256 << 10);
    warp.lanes[lane].uc_stack.ss_size = 256 << 10;
    warp.lanes[lane].uc_link = nullptr;
    makecontext(&warp.lanes[lane], reinterpret_cast<void (*)()>(shim_lane<Body>), 2, static_cast<unsigned>(address),
                static_cast<unsigned>(address >> 32));
  }
  warp.lane = 0;
  threadIdx.x = first;
  swapcontext(&warp.caller, &warp.lanes[0]);
}

template <class... Parameters, class... Arguments>
void shim_launch_warps(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  if (blocks == 0 || threads == 0 || threads > 1024 || threads % 32 != 0) {
    shim_error() = cudaErrorInvalidConfiguration;
    return;
  }
  const bool backwards = shim_number("ZO_SHIM_ORDER", 0) == 1;
  shim_mistake = shim_number("ZO_SHIM_MISTAKE", 0);
  gridDim.x = blocks;
  blockDim.x = threads;
  for (unsigned block = 0; block < blocks; ++block) {
    for (unsigned warp = 0; warp < threads / 32; ++warp) {
      blockIdx.x = backwards ? blocks - 1 - block : block;
      shim_run_warp(32 * (backwards ? threads / 32 - 1 - warp : warp), [&] { kernel(arguments...); });
    }
  }
}

#define ZO_LAUNCH_WARPS(kernel, blocks, threads, stream, ...) shim_launch_warps(kernel, blocks, threads, __VA_ARGS__)
