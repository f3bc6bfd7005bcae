// cuda_runtime.h: the few names of CUDA that csrc/*.cu use, for g++: their kernels then run on the host
//
// A launch is a loop over blocks and their warps. The 32 threads of a warp are contexts that run one after the other, each
// until it ends or reaches __syncwarp, a matrix product or ldmatrix, where it waits for the other 31. A warp runs until all its
// threads end or wait at __syncthreads; then the next warp runs. There are no other barriers and no shuffles. A product is
// computed from what all lanes gave, by the fragment layouts that the PTX manual prints.
// ZO_SHIM_ORDER = 1 runs blocks, warps and threads last to first: results may not depend on the order.
// A launch is refused where a GPU would refuse it; a barrier that some threads never reach ends the process.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __shared__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))


struct uint2 {
  uint32_t x, y;
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

struct ShimDimension {
  unsigned x;
};

inline thread_local ShimDimension threadIdx, blockIdx, blockDim, gridDim;

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorMisalignedAddress = 716, shimBankConflict = 9999 };
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

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorMisalignedAddress) return "misaligned address";
  if (error == shimBankConflict) return "rows of a matrix in the same banks";
  return error == cudaSuccess ? "no error" : "invalid configuration";
}

// Four words that are loaded or stored at once: at an address that is no multiple of 16 a GPU does neither.
struct alignas(16) uint4 {
  uint32_t x, y, z, w;

  uint4() = default;
  uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) : x(x), y(y), z(z), w(w) {}
  uint4(const uint4& other) : uint4(other.x, other.y, other.z, other.w) { look(&other); }
  uint4& operator=(const uint4& other) {
    x = other.x, y = other.y, z = other.z, w = other.w;
    return look(&other), look(this), *this;
  }

  static void look(const uint4* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) shim_error() = cudaErrorMisalignedAddress;
  }
};
static_assert(sizeof(uint4) == 16, "as on a GPU");

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// Two floats that are loaded at once: from an address that is no multiple of 8 a GPU does not load them.
struct float2 {
  float x, y;

  float2(const float2& other) : x(other.x), y(other.y) {
    if (reinterpret_cast<uintptr_t>(&other) % 8 != 0) shim_error() = cudaErrorMisalignedAddress;
  }
};


inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

// Small numbers, so that grids of a few blocks walk over many chunks; tests change them.
inline int shim_number(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}

// A device is named by its number of processors: what is remembered of one is not true of another.
inline cudaError_t cudaGetDevice(int* device) {
  *device = shim_number("ZO_SHIM_PROCESSORS", 3);
  return cudaSuccess;
}

// ZO_SHIM_MUTE = 1: the device tells nothing more about itself.
inline cudaError_t shim_answer() {
  return shim_number("ZO_SHIM_MUTE", 0) != 0 ? cudaErrorInvalidConfiguration : cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = device;
  return shim_answer();
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return shim_answer();
}

inline int shim_mistake = 0;  // tests/support/host.py builds kernels with mistakes and chooses one by its number

constexpr unsigned kShimWarp = 32;

struct ShimWarp {  // one warp: a context for each thread, and where the loop over them goes on
  enum State { kReady, kWaiting, kBarred, kEnded };
  ucontext_t scheduler, threads[kShimWarp];
  State states[kShimWarp];
  unsigned first = 0, running = 0;
  std::unique_ptr<char[]> stacks{new char[kShimWarp << 18]};
  uint32_t a[kShimWarp][4], b[kShimWarp][2];  // operands of the matrix product that the lanes wait at
  float c[kShimWarp][4];
  uintptr_t rows[kShimWarp];  // of the matrices that they wait for
  unsigned arrived = 0;

  static ShimWarp*& current() {
    static ShimWarp* warp;
    return warp;
  }

  static ShimWarp& get() { return *current(); }

  static std::function<void()>& kernel() {
    static std::function<void()> kernel;
    return kernel;
  }

  static void enter() {
    kernel()();
    get().states[get().running] = kEnded;
  }

  void begin(unsigned thread) {
    first = thread;
    for (unsigned i = 0; i < kShimWarp; ++i) {
      getcontext(&threads[i]);
      threads[i].uc_stack.ss_sp = stacks.get() + (static_cast<size_t>(i) << 18);
      threads[i].uc_stack.ss_size = 1 << 18;
      threads[i].uc_link = &scheduler;
      makecontext(&threads[i], enter, 0);
      states[i] = kReady;
    }
  }

  // Until all threads have ended, or wait for the block: returns whether they have ended.
  bool run(bool backwards) {
    current() = this;
    while (true) {
      unsigned count[kEnded + 1] = {};
      for (unsigned i = 0; i < kShimWarp; ++i) {
        running = backwards ? kShimWarp - 1 - i : i;
        if (states[running] != kEnded) {
          states[running] = kReady;
          threadIdx.x = first + running;
          swapcontext(&scheduler, &threads[running]);
        }
        ++count[states[running]];
      }
      if (count[kEnded] == kShimWarp || count[kBarred] == kShimWarp) return count[kBarred] == 0;
      if (count[kWaiting] != kShimWarp) {
        std::fprintf(stderr, "shim: %u threads of a warp wait at __syncwarp, and %u at __syncthreads\n", count[kWaiting],
                     count[kBarred]);
        std::abort();
      }
    }
  }

  void wait(State state) {
    states[running] = state;
    swapcontext(&threads[running], &scheduler);
  }
};

inline void __syncwarp() { ShimWarp::get().wait(ShimWarp::kWaiting); }
inline void __syncthreads() { ShimWarp::get().wait(ShimWarp::kBarred); }

inline void shim_block(unsigned count, bool backwards) {
  static std::vector<std::unique_ptr<ShimWarp>> warps;
  while (warps.size() < count) warps.push_back(std::make_unique<ShimWarp>());
  for (unsigned i = 0; i < count; ++i) warps[i]->begin(i * kShimWarp);
  for (unsigned ended = 0; ended == 0;) {
    for (unsigned i = 0; i < count; ++i) ended += warps[backwards ? count - 1 - i : i]->run(backwards);
    if (ended != 0 && ended != count) {
      std::fprintf(stderr, "shim: %u warps wait at __syncthreads, and the others never reach it\n", count - ended);
      std::abort();
    }
  }
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
  ShimWarp::kernel() = [&] { kernel(arguments...); };
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx.x = backwards ? blocks - 1 - block : block;
    shim_block(threads / kShimWarp, backwards);
  }
}

#define ZO_LAUNCH(kernel, blocks, threads, stream, ...) shim_launch(kernel, blocks, threads, __VA_ARGS__)

// ---- matrix products

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

// The first lane that goes on after all have come multiplies for all; a lane may then give its next operands, its own alone.
inline void shim_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ShimWarp& w = ShimWarp::get();
  const unsigned lane = w.running;
  std::memcpy(w.a[lane], a, sizeof a), std::memcpy(w.b[lane], b, sizeof b), std::memcpy(w.c[lane], c, sizeof c);
  ++w.arrived;
  __syncwarp();
  if (w.arrived == kShimWarp) shim_multiply(w), w.arrived = 0;
  std::memcpy(c, w.c[lane], sizeof c);
}

#define ZO_HOST_MMA(c, a, b) shim_mma(c, a, b)

// ldmatrix.x4 for all lanes. Lane 8 i + r has the address of row r of matrix i; lane 4 g + t takes elements 2 t and 2 t + 1 of row g
// of each matrix. A row lies on 16 bytes, and the eight rows of a matrix in different banks.
inline void shim_load_matrices(uint32_t (&a)[4], uintptr_t row) {
  ShimWarp& w = ShimWarp::get();
  const unsigned lane = w.running;
  w.rows[lane] = row;
  ++w.arrived;
  __syncwarp();
  if (w.arrived == kShimWarp) {
    w.arrived = 0;
    for (unsigned i = 0; i < 4; ++i) {
      unsigned banks = 0;
      for (unsigned r = 0; r < 8; ++r) {
        const uintptr_t from = w.rows[8 * i + r];
        if (from % 16 != 0) shim_error() = cudaErrorMisalignedAddress;
        banks |= 1u << (from / 16 % 8);
        for (unsigned t = 0; t < 4; ++t) std::memcpy(&w.a[4 * r + t][i], reinterpret_cast<const char*>(from) + 4 * t, 4);
      }
      if (banks != 0xffu) shim_error() = shimBankConflict;
    }
  }
  std::memcpy(a, w.a[lane], sizeof a);
}

#define ZO_HOST_LOAD_MATRICES(a, row) shim_load_matrices(a, row)
