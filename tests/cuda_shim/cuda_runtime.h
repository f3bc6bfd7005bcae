// cuda_runtime.h: the few names of CUDA that csrc/elementwise.cu uses, for g++: its kernels then run on the host
//
// A launch is a loop over blocks and threads, one after the other, which is exact for kernels without barriers, shuffles and
// shared memory; ours have none. ZO_SHIM_ORDER = 1 runs blocks and threads last to first: results may not depend on the order.
// A launch is refused where a GPU would refuse it.
#pragma once

#include <cstdint>
#include <cstdlib>

#define __global__
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
