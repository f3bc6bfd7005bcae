// device.h: small functions that every .cu file needs
//
// memory   global() tells the compiler that a pointer is in global memory
// numbers  divide() divides integers. nearest_pair() rounds two float32 to 16 bits. is_nonfinite() looks at
//          stored bits
// host     check() turns a CUDA error into an exception. resident_blocks() gives the size of a persistent
//          grid
// include  after <cuda_runtime.h>
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "elementwise.h"

#ifndef ZO_LAUNCH  // the tests define it: they run the .cu files on the host, where a launch is a loop
#define ZO_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace zo {
namespace device {

constexpr int kThreads = 256;  // of a block

// A kernel reads this pointer from a table. The compiler cannot see that it points to global memory.
template <class T>
__device__ __forceinline__ T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// numerator / divisor, by shift and subtract. nvcc would divide integers through the approximate MUFU.RCP,
// and the tests allow no approximate instruction in the machine code.
__device__ __forceinline__ int64_t divide(int64_t numerator, int64_t divisor) {
  uint64_t left = static_cast<uint64_t>(numerator), quotient = 0;
  int shift = 0;
  while (static_cast<uint64_t>(divisor) << shift <= left >> 1) ++shift;
  for (; shift >= 0; --shift) {
    const uint64_t part = static_cast<uint64_t>(divisor) << shift;
    quotient <<= 1;
    if (part <= left) left -= part, quotient |= 1;
  }
  return static_cast<int64_t>(quotient);
}

// Rounds two float32 to two halves in one instruction. zo/rounding.h defines the rounding.
template <Type kType>
__device__ __forceinline__ uint32_t nearest_pair(float even, float odd) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if constexpr (kType == Type::kBfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
  }
  return pair;
#else
  if constexpr (kType == Type::kBfloat16)
    return bf16_nearest(even) | static_cast<uint32_t>(bf16_nearest(odd)) << 16;
  return fp16_nearest(even) | static_cast<uint32_t>(fp16_nearest(odd)) << 16;
#endif
}

// Whether the stored bits of one value are inf or NaN.
__device__ __forceinline__ bool is_nonfinite(Type type, uint32_t bits) {
  const uint32_t exponent = type == Type::kFloat32    ? 0x7f800000u
                            : type == Type::kBfloat16 ? 0x7f80u
                                                      : 0x7c00u;
  return (bits & exponent) == exponent;
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (CUDA error " +
                           std::to_string(static_cast<int>(error)) + ")");
}

// How many blocks the current device holds at once, or the number that the caller asks for. The runtime is
// asked once for a device and a kernel: it takes longer to answer than to launch.
template <class Kernel>
int64_t resident_blocks(const char* what, Kernel kernel, int64_t workers) {
  if (workers > 0) return std::min<int64_t>(workers, 0x7fffffff);
  static std::mutex mutex;
  static std::map<std::pair<int, Kernel>, int64_t> known;
  int device = 0, processors = 0, each = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& blocks = known[{device, kernel}];
  if (blocks == 0) {
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0), what);
    blocks = std::max<int64_t>(1, static_cast<int64_t>(processors) * each);
  }
  return blocks;
}

}  // namespace device
}  // namespace zo
