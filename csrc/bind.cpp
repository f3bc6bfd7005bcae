// bind.cpp: elementwise.h for Python; compiled once with elementwise.cpp (zokern._cpu) and once with elementwise.cu
// (zokern._cuda)
//
// Addresses are Python integers: zokern/backends/table.py makes them, the backends own what they point to. The interpreter's
// lock is released while a kernel runs; a C++ exception becomes a Python exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "elementwise.h"

namespace {

using Free = pybind11::call_guard<pybind11::gil_scoped_release>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

zo::Launch launch(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, int32_t direction, uint64_t seed, int64_t workers,
                  uintptr_t stream, uintptr_t clock = 0, uintptr_t draws = 0, uintptr_t coefficients = 0) {
  check(chunk_count >= 0, "chunk_count is negative");
  check(chunk_count == 0 || (entries != 0 && chunks != 0), "entries or chunks is a null address");
  check(direction >= 0 && direction <= 1, "direction is not one of 0 (normal), 1 (rademacher)");
  check(workers >= 0, "workers is negative");
  return {at<zo::Entry>(entries),
          at<zo::Chunk>(chunks),
          chunk_count,
          static_cast<zo::Direction>(direction),
          seed,
          workers,
          stream,
          at<zo::Draw>(draws),
          at<float>(coefficients),
          at<int64_t>(clock)};
}

void philox(uintptr_t counters, int64_t count, uint32_t k0, uint32_t k1, int rounds, uintptr_t words, int64_t workers,
            uintptr_t stream) {
  check(count >= 0 && rounds >= 0, "count or rounds is negative");
  check(count == 0 || (counters != 0 && words != 0), "counters or words is a null address");
  zo::philox(at<uint32_t>(counters), count, k0, k1, rounds, at<uint32_t>(words), launch(0, 0, 0, 0, 0, workers, stream));
}

void draw(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, int32_t direction, uint64_t seed, uint32_t step,
          uint32_t draw, int64_t workers, uintptr_t stream, uintptr_t clock) {
  zo::draw(launch(entries, chunks, chunk_count, direction, seed, workers, stream, clock), step, draw);
}

void axpy(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, int32_t direction, uint64_t seed, uintptr_t draws,
          int32_t draw_count, float decay, int32_t rounding, uintptr_t nonfinite, int64_t workers, uintptr_t stream,
          uintptr_t clock, uintptr_t device_draws, uintptr_t coefficients) {
  check(draw_count > 0 && draws != 0, "draws is empty");
  check(rounding >= 0 && rounding <= 2, "rounding is not one of 0 (nearest), 1 (stochastic), 2 (residual)");
  check(nonfinite != 0, "nonfinite is a null address");
  zo::axpy(launch(entries, chunks, chunk_count, direction, seed, workers, stream, clock, device_draws, coefficients),
           at<zo::Draw>(draws), draw_count, decay, static_cast<zo::Rounding>(rounding), at<int64_t>(nonfinite));
}

void perturb(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, int32_t direction, uint64_t seed, uint32_t step,
             uint32_t draw, uintptr_t scales, int64_t workers, uintptr_t stream, uintptr_t clock) {
  check(scales != 0, "scales is a null address");
  zo::perturb(launch(entries, chunks, chunk_count, direction, seed, workers, stream, clock), step, draw, at<float>(scales));
}

}  // namespace

PYBIND11_MODULE(ZOKERN_MODULE, module) {
  using pybind11::arg;
  module.def("philox", &philox, Free(), arg("counters"), arg("count"), arg("k0"), arg("k1"), arg("rounds"), arg("words"),
             arg("workers"), arg("stream"));
  module.def("draw", &draw, Free(), arg("entries"), arg("chunks"), arg("chunk_count"), arg("direction"), arg("seed"),
             arg("step"), arg("draw"), arg("workers"), arg("stream"), arg("clock") = 0);
  module.def("axpy", &axpy, Free(), arg("entries"), arg("chunks"), arg("chunk_count"), arg("direction"), arg("seed"),
             arg("draws"), arg("draw_count"), arg("decay"), arg("rounding"), arg("nonfinite"), arg("workers"), arg("stream"),
             arg("clock") = 0, arg("device_draws") = 0, arg("coefficients") = 0);
  module.def("perturb", &perturb, Free(), arg("entries"), arg("chunks"), arg("chunk_count"), arg("direction"), arg("seed"),
             arg("step"), arg("draw"), arg("scales"), arg("workers"), arg("stream"), arg("clock") = 0);
  module.def("implementation", &zo::implementation);
  module.def("select", &zo::select, arg("name"));
  module.def("architectures", &zo::architectures);
  module.def("device_count", &zo::device_count);
}
