// cuda_runtime.h: the few names of CUDA that csrc/elementwise.cu uses, for g++: its kernels then run on the host
//
// A launch is a loop over blocks and their warps. The 32 threads of a warp are contexts that run one after the other, each
// until it ends or reaches __syncwarp, where it waits for the other 31; there are no other barriers and no shuffles.
// ZO_SHIM_ORDER = 1 runs blocks, warps and threads last to first: results may not depend on the order.
// A launch is refused where a GPU would refuse it; a barrier that some threads of a warp never reach ends the process.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define __global__
#define __shared__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
static_assert(sizeof(uint4) == 16, "as on a GPU");

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

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

constexpr unsigned kShimWarp = 32;

struct ShimWarp {  // one warp: a context for each thread, and where the loop over them goes on
  enum State { kReady, kWaiting, kEnded };
  ucontext_t scheduler, threads[kShimWarp];
  State states[kShimWarp];
  unsigned running = 0;
  std::vector<char> stacks = std::vector<char>(kShimWarp << 17);
  std::function<void()> kernel;

  static ShimWarp& get() {
    static ShimWarp warp;
    return warp;
  }

  static void enter() {
    get().kernel();
    get().states[get().running] = kEnded;
  }

  void run(unsigned first, bool backwards) {
    for (unsigned i = 0; i < kShimWarp; ++i) {
      getcontext(&threads[i]);
      threads[i].uc_stack.ss_sp = stacks.data() + (i << 17);
      threads[i].uc_stack.ss_size = 1 << 17;
      threads[i].uc_link = &scheduler;
      makecontext(&threads[i], enter, 0);
      states[i] = kReady;
    }
    for (unsigned ended = 0, waiting = 0; ended < kShimWarp; waiting = 0) {
      for (unsigned i = 0; i < kShimWarp; ++i) {
        running = backwards ? kShimWarp - 1 - i : i;
        if (states[running] == kEnded) continue;
        states[running] = kReady;
        threadIdx.x = first + running;
        swapcontext(&scheduler, &threads[running]);
        ended += states[running] == kEnded;
        waiting += states[running] == kWaiting;
      }
      if (waiting != 0 && waiting != kShimWarp) {
        std::fprintf(stderr, "shim: %u threads of a warp wait at __syncwarp, and the others never reach it\n", waiting);
        std::abort();
      }
    }
  }
};

inline void __syncwarp() {
  ShimWarp& warp = ShimWarp::get();
  warp.states[warp.running] = ShimWarp::kWaiting;
  swapcontext(&warp.threads[warp.running], &warp.scheduler);
}

template <class... Parameters, class... Arguments>
void shim_launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  if (blocks == 0 || threads == 0 || threads > 1024 || threads % kShimWarp != 0) {
    shim_error() = cudaErrorInvalidConfiguration;
    return;
  }
  const bool backwards = shim_number("ZO_SHIM_ORDER", 0) == 1;
  shim_mistake = shim_number("ZO_SHIM_MISTAKE", 0);
  gridDim.x = blocks;
  blockDim.x = threads;
  ShimWarp& warp = ShimWarp::get();
  warp.kernel = [&] { kernel(arguments...); };
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx.x = backwards ? blocks - 1 - block : block;
    for (unsigned i = 0; i < threads / kShimWarp; ++i) {
      warp.run((backwards ? threads / kShimWarp - 1 - i : i) * kShimWarp, backwards);
    }
  }
}

#define ZO_LAUNCH(kernel, blocks, threads, stream, ...) shim_launch(kernel, blocks, threads, __VA_ARGS__)
