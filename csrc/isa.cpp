// isa.cpp: which instruction set runs; isa.h
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "elementwise.h"

#define ZO_DECLARE(isa)                                         \
  int64_t zokern_chunk_##isa(const void* job, int64_t chunk);   \
  int64_t zokern_lowrank_##isa(const void* job, int64_t chunk); \
  int64_t zokern_update_##isa(const void* job, int64_t chunk);  \
  void zokern_linear_##isa(const void*, int64_t, char*);        \
  int64_t zokern_linear_memory_##isa();                         \
  void zokern_panel_##isa(const float*, int64_t, int64_t, int64_t, int64_t, float*);
extern "C" {
ZO_DECLARE(scalar)
#if defined(__x86_64__)
ZO_DECLARE(avx2)
ZO_DECLARE(avx512)
#endif
}
#undef ZO_DECLARE

namespace zo {
namespace {

std::vector<Path>& paths() {  // best first
  static std::vector<Path> list = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       zokern_chunk_avx512, zokern_lowrank_avx512, zokern_update_avx512, zokern_linear_avx512, zokern_linear_memory_avx512,
       zokern_panel_avx512},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       zokern_chunk_avx2, zokern_lowrank_avx2, zokern_update_avx2, zokern_linear_avx2, zokern_linear_memory_avx2,
       zokern_panel_avx2},
#endif
      {"scalar", true, zokern_chunk_scalar, zokern_lowrank_scalar, zokern_update_scalar, zokern_linear_scalar,
       zokern_linear_memory_scalar, zokern_panel_scalar},
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
  static const Path* path = find(std::getenv("ZOKERN_CPU_ISA") != nullptr ? std::getenv("ZOKERN_CPU_ISA") : "");
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
