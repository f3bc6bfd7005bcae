// isa.cpp: chooses the instruction set that runs (isa.h)
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "elementwise.h"

#define ZO_DECLARE_LINEAR(isa)                                   \
  void zokern_linear_##isa(const void*, int64_t, char*);         \
  void zokern_linear_thin_##isa(void*, int64_t, int64_t, char*); \
  int64_t zokern_linear_memory_##isa();                          \
  bool zokern_linear_pairs_##isa();
#define ZO_DECLARE(isa)                                         \
  int64_t zokern_chunk_##isa(const void* job, int64_t chunk);   \
  int64_t zokern_lowrank_##isa(const void* job, int64_t chunk); \
  int64_t zokern_update_##isa(const void* job, int64_t chunk);  \
  void zokern_panel_##isa(const float*, int64_t, int64_t, int64_t, int64_t, float*);
// The functions of a path. `products` is the same instruction set, or one that adds to it.
#define ZO_FUNCTIONS(isa, products)                                                                   \
  zokern_chunk_##isa, zokern_lowrank_##isa, zokern_update_##isa, zokern_linear_##products,            \
      zokern_linear_thin_##products, zokern_linear_memory_##products, zokern_linear_pairs_##products, \
      zokern_panel_##isa
extern "C" {
ZO_DECLARE(scalar)
ZO_DECLARE_LINEAR(scalar)
#if defined(__x86_64__)
ZO_DECLARE(avx2)
ZO_DECLARE_LINEAR(avx2)
ZO_DECLARE(avx512)
ZO_DECLARE_LINEAR(avx512)
ZO_DECLARE_LINEAR(avx512bf16)  // if the compiler has it: setup.py
#endif
}
#undef ZO_DECLARE
#undef ZO_DECLARE_LINEAR

namespace zo {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

std::vector<Path>& paths() {  // best first
  static std::vector<Path> list = {
#if defined(__x86_64__)
#if defined(ZOKERN_AVX512BF16)
      {"avx512bf16", has_avx512() && __builtin_cpu_supports("avx512bf16"), ZO_FUNCTIONS(avx512, avx512bf16)},
#endif
      {"avx512", has_avx512(), ZO_FUNCTIONS(avx512, avx512)},
      {"avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       ZO_FUNCTIONS(avx2, avx2)},
#endif
      {"scalar", true, ZO_FUNCTIONS(scalar, scalar)},
  };
  return list;
}

const Path* find(const std::string& name) {
  for (const Path& path : paths()) {
    if (path.usable && (name.empty() || name == path.name)) return &path;
  }
  std::string message = "instruction set '" + name + "' cannot run here; usable: ";
  for (const std::string& usable : architectures()) message += usable + " ";
  throw std::invalid_argument(message);
}

const Path*& chosen() {
  static const Path* path =
      find(std::getenv("ZOKERN_CPU_ISA") != nullptr ? std::getenv("ZOKERN_CPU_ISA") : "");
  return path;
}

}  // namespace

const Path& active() { return *chosen(); }

std::string implementation() { return active().name; }

void select(const std::string& name) { chosen() = find(name); }

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  for (const Path& path : paths()) {
    if (path.usable) names.push_back(path.name);
  }
  return names;
}

int device_count() { return 1; }

}  // namespace zo
