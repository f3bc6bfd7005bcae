// bind.cpp: the functions of elementwise.h, update.h, lowrank.h and linear.h for Python. setup.py compiles it
// once for zokern._cpu and once for zokern._cuda
//
// address  addresses are Python integers. zokern/backends/pack.py makes them, and the backends own the
//          memory
// threads  the interpreter's lock is released while a kernel runs
// errors   a C++ exception becomes a Python exception
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "elementwise.h"
#include "linear.h"
#include "lowrank.h"
#include "project.h"
#include "update.h"

namespace {

using Free = pybind11::call_guard<pybind11::gil_scoped_release>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

zo::Launch launch(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, int32_t direction, uint64_t seed,
                  int64_t workers, uintptr_t stream, uintptr_t clock = 0, uintptr_t draws = 0,
                  uintptr_t coefficients = 0, bool scaled = false, uintptr_t control = 0) {
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
          at<int64_t>(clock),
          at<float>(control),
          scaled};
}

void philox(uintptr_t counters, int64_t count, uint32_t k0, uint32_t k1, int rounds, uintptr_t words,
            int64_t workers, uintptr_t stream) {
  check(count >= 0 && rounds >= 0, "count or rounds is negative");
  check(count == 0 || (counters != 0 && words != 0), "counters or words is a null address");
  zo::philox(at<uint32_t>(counters), count, k0, k1, rounds, at<uint32_t>(words),
             launch(0, 0, 0, 0, 0, workers, stream));
}

void draw(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, int32_t direction, uint64_t seed,
          uint32_t step, uint32_t draw, int64_t workers, uintptr_t stream, uintptr_t clock, bool scaled) {
  zo::draw(launch(entries, chunks, chunk_count, direction, seed, workers, stream, clock, 0, 0, scaled), step,
           draw);
}

void axpy(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, int32_t direction, uint64_t seed,
          uintptr_t draws, int32_t draw_count, int32_t each, int32_t rounding, uintptr_t nonfinite,
          int64_t workers, uintptr_t stream, uintptr_t clock, uintptr_t device_draws, uintptr_t coefficients,
          bool scaled, uintptr_t control) {
  check(draw_count > 0 && draws != 0, "draws is empty");
  check(each > 0 && draw_count % each == 0, "each does not divide draw_count");
  check(rounding >= 0 && rounding <= 2, "rounding is not one of 0 (nearest), 1 (stochastic), 2 (residual)");
  check(nonfinite != 0, "nonfinite is a null address");
  check(control == 0 || each == draw_count, "each is not draw_count, with a control");
  zo::axpy(launch(entries, chunks, chunk_count, direction, seed, workers, stream, clock, device_draws,
                  coefficients, scaled, control),
           at<zo::Draw>(draws), draw_count, each, static_cast<zo::Rounding>(rounding),
           at<int64_t>(nonfinite));
}

void perturb(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, int32_t direction, uint64_t seed,
             uint32_t step, uint32_t draw, uintptr_t scales, int64_t workers, uintptr_t stream,
             uintptr_t clock, bool scaled) {
  check(scales != 0, "scales is a null address");
  zo::perturb(launch(entries, chunks, chunk_count, direction, seed, workers, stream, clock, 0, 0, scaled),
              step, draw, at<float>(scales));
}

#if defined(ZOKERN_UPDATE)
void update(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, int32_t direction, uint64_t seed,
            uintptr_t draws, int32_t draw_count, int32_t rule, uintptr_t scalars, int32_t rounding,
            uintptr_t nonfinite, int64_t workers, uintptr_t stream, uintptr_t clock, uintptr_t device_draws,
            uintptr_t coefficients, bool scaled, uintptr_t control) {
  check(draw_count > 0 && draws != 0, "draws is empty");
  check(rule >= 0 && rule <= 2, "rule is not one of 0 (momentum), 1 (adam), 2 (sign)");
  check(rounding >= 0 && rounding <= 2, "rounding is not one of 0 (nearest), 1 (stochastic), 2 (residual)");
  check(nonfinite != 0 && scalars != 0, "nonfinite or scalars is a null address");
  zo::update(launch(entries, chunks, chunk_count, direction, seed, workers, stream, clock, device_draws,
                    coefficients, scaled, control),
             at<zo::Draw>(draws), draw_count, static_cast<zo::Rule>(rule), at<float>(scalars),
             static_cast<zo::Rounding>(rounding), at<int64_t>(nonfinite));
}
#endif

#if defined(ZOKERN_LOWRANK_CPU)
void lowrank(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, uintptr_t factors,
             int64_t factor_count, uint64_t seed, uint32_t step, float decay, int32_t rounding,
             uintptr_t nonfinite, int64_t workers, uintptr_t stream) {
  check(factor_count >= 0 && (factor_count == 0 || factors != 0), "factors is a null address");
  check(rounding >= 0 && rounding <= 2, "rounding is not one of 0 (nearest), 1 (stochastic), 2 (residual)");
  check(nonfinite != 0, "nonfinite is a null address");
  zo::lowrank(launch(entries, chunks, chunk_count, 0, seed, workers, stream), at<zo::Factors>(factors),
              factor_count, decay, static_cast<zo::Rounding>(rounding), step, at<int64_t>(nonfinite));
}

// perturb for one contiguous CPU tensor. It makes the table itself,
// because a linear layer calls it for every product.
void lowrank_one(uintptr_t theta, uintptr_t out, uintptr_t residual, int64_t size, uint64_t first,
                 uint32_t who, int32_t type, int32_t out_type, uintptr_t left, uintptr_t right, int64_t rank,
                 int64_t columns, float scale, int64_t elements, uint64_t seed, uint32_t step, float decay,
                 int32_t rounding, uintptr_t nonfinite, int64_t workers) {
  check(size >= 0 && rank >= 0 && elements > 0 && nonfinite != 0,
        "size, rank, elements or nonfinite is out of range");
  check(size == 0 || (theta != 0 && left != 0 && right != 0 && columns > 0),
        "theta, left or right is a null address");
  const zo::Entry entry{at<void>(theta),
                        {at<void>(out), nullptr},
                        at<int16_t>(residual),
                        nullptr,
                        1,
                        size,
                        0,
                        1,
                        first,
                        static_cast<uint64_t>(size),
                        who,
                        type,
                        out_type,
                        0,
                        nullptr,
                        0,
                        0};
  const zo::Factors factors{at<float>(left), at<float>(right), rank, columns, scale, 0};
  std::vector<zo::Chunk> chunks;
  for (int64_t begin = 0; begin < size; begin += elements)
    chunks.push_back({begin, std::min(begin + elements, size), 0});
  const zo::Launch launch{&entry,
                          chunks.data(),
                          static_cast<int64_t>(chunks.size()),
                          zo::Direction::kNormal,
                          seed,
                          chunks.size() > 1 ? workers : 1,
                          0};
  *at<int64_t>(nonfinite) = 0;
  zo::lowrank(launch, &factors, 1, decay, static_cast<zo::Rounding>(rounding), step, at<int64_t>(nonfinite));
}
#endif

#if defined(ZOKERN_LINEAR)
// The fields of Side and Thin in linear.h.
using SideRow = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t, float, int64_t>;
using ThinRow =
    std::tuple<int64_t, uintptr_t, int64_t, uintptr_t, int64_t, int64_t, uintptr_t, int64_t, int64_t>;

void linear(uintptr_t weight, int32_t type, bool transposed, int64_t m, int64_t n, int32_t direction,
            uint64_t seed, uint64_t first, uint32_t who, uint32_t step, float shrink,
            const std::vector<SideRow>& sides, const std::vector<ThinRow>& thins, int64_t workers) {
  check(m >= 0 && n >= 0 && (m * n == 0 || weight != 0), "weight is a null address, or m or n is negative");
  check(type >= 0 && type <= 2, "type is not one of 0 (float32), 1 (bfloat16), 2 (float16)");
  check(direction >= 0 && direction <= 1, "direction is not one of 0 (normal), 1 (rademacher)");
  zo::Linear product{at<void>(weight),
                     static_cast<zo::Type>(type),
                     transposed,
                     m,
                     n,
                     static_cast<zo::Direction>(direction),
                     seed,
                     first,
                     who,
                     step,
                     shrink,
                     {},
                     {},
                     workers};
  for (const auto& [x, rows, y, bias, scale, draw] : sides) {
    check(rows >= 0 && (rows == 0 || (x != 0 && y != 0)) && draw < int64_t{1} << 32,
          "a side's rows, x, y or draw is out of range");
    product.sides.push_back({at<void>(x), rows, at<void>(y), at<float>(bias), scale, draw});
  }
  for (const auto& [side, first_factor, inner, middle, row_stride, column_stride, last, rank, stride] :
       thins) {
    check(side >= 0 && side < static_cast<int64_t>(sides.size()) && inner >= 0 && rank >= 0 && stride >= rank,
          "a thin product's side, inner, rank or stride is out of range");
    check(inner * rank == 0 || (first_factor != 0 && middle != 0 && last != 0),
          "a thin product's factor is a null address");
    product.thins.push_back({side, at<float>(first_factor), inner, at<float>(middle), row_stride,
                             column_stride, at<float>(last), rank, stride});
  }
  pybind11::gil_scoped_release unlocked;
  zo::linear(product);
}
#endif

#if defined(ZOKERN_LOWRANK_CUDA)
void lowrank_tiles(uintptr_t entries, uintptr_t tiles, int64_t tile_count, uintptr_t frames,
                   uintptr_t factors, int64_t max_rank, bool general, int32_t types, bool simple, bool whole,
                   uint64_t seed, uint32_t step, float decay, int32_t rounding, uintptr_t nonfinite,
                   int64_t workers, uintptr_t stream, uintptr_t clock, uintptr_t control) {
  check(tile_count >= 0, "tile_count is negative");
  check(tile_count == 0 || (entries != 0 && tiles != 0 && frames != 0 && factors != 0),
        "a table is a null address");
  check(rounding >= 0 && rounding <= 2, "rounding is not one of 0 (nearest), 1 (stochastic), 2 (residual)");
  check(nonfinite != 0, "nonfinite is a null address");
  const zo::TileList list{
      at<zo::Tile>(tiles), tile_count, at<zo::Frame>(frames), max_rank, general, types, simple, whole};
  zo::Launch launch{at<zo::Entry>(entries), nullptr, 0, zo::Direction::kNormal, seed, workers, stream};
  launch.clock = at<int64_t>(clock), launch.control = at<float>(control);
  zo::lowrank_tiles(launch, list, at<zo::Factors>(factors), decay, static_cast<zo::Rounding>(rounding), step,
                    at<int64_t>(nonfinite));
}
#endif

void project(uintptr_t losses, int64_t reads, int64_t points, uintptr_t weights, int64_t draws,
             uintptr_t scalars, uintptr_t out, int64_t, uintptr_t stream) {
  check(reads > 0 && points > 0 && draws > 0, "reads, points or draws is not positive");
  check(weights != 0 || draws == points, "without weights there are as many draws as points");
  check(losses != 0 && scalars != 0 && out != 0, "losses, scalars or out is a null address");
  zo::project({at<double>(losses), at<double>(weights), at<double>(scalars), reads, points, draws,
               at<double>(out), stream});
}

// Asks for the memory of a dict that is looked at soon: first for its head, which says where its values lie,
// and some dicts later for the values.
constexpr size_t kAhead = 8;

void fetch_head(PyObject* held) { __builtin_prefetch(held); }

void fetch_values(PyObject* held) {
  if (!PyDict_Check(held)) return;
  const auto* dict = reinterpret_cast<PyDictObject*>(held);
  const char* const keys = reinterpret_cast<const char*>(dict->ma_keys);
  const char* const values = reinterpret_cast<const char*>(dict->ma_values);
  for (int line = 0; line < 4; ++line) __builtin_prefetch((values == nullptr ? keys : values) + 64 * line);
}

// Returns whether the values of some dicts, one dict after another, are the very objects of a list. Compares
// addresses only: no method of an object is called. A step asks it of every attribute of a model a few times.
// In between a forward of the model takes the caches, so the wait for memory would be most of its time.
bool same_values(const pybind11::list& dicts, const pybind11::list& kept) {
  size_t k = 0;
  const size_t count = kept.size(), size = dicts.size();
  for (size_t d = 0; d < size; ++d) {
    if (d + 2 * kAhead < size) fetch_head(PyList_GET_ITEM(dicts.ptr(), d + 2 * kAhead));
    if (d + kAhead < size) fetch_values(PyList_GET_ITEM(dicts.ptr(), d + kAhead));
    PyObject *const held = PyList_GET_ITEM(dicts.ptr(), d), *key, *value;
    check(PyDict_Check(held), "dicts holds something that is no dict");
    for (Py_ssize_t at = 0; PyDict_Next(held, &at, &key, &value); ++k) {
      if (k == count || PyList_GET_ITEM(kept.ptr(), k) != value) return false;
    }
  }
  return k == count;
}

#if defined(ZOKERN_LINEAR)
// outs <- theta, bit for bit, of contiguous tensors whose outs have their dtype: a table's chunks.
void copy(uintptr_t entries, uintptr_t chunks, int64_t chunk_count, int64_t workers) {
  check(chunk_count == 0 || (entries != 0 && chunks != 0), "entries or chunks is a null address");
#pragma omp parallel for num_threads(static_cast<int>(workers)) if (workers > 1) schedule(dynamic)
  for (int64_t c = 0; c < chunk_count; ++c) {
    const zo::Chunk& chunk = at<zo::Chunk>(chunks)[c];
    const zo::Entry& entry = at<zo::Entry>(entries)[chunk.entry];
    const int64_t width = static_cast<zo::Type>(entry.type) == zo::Type::kFloat32 ? 4 : 2;
    std::memcpy(static_cast<char*>(entry.out[0]) + width * chunk.begin,
                static_cast<const char*>(entry.theta) + width * chunk.begin,
                static_cast<size_t>(width * (chunk.end - chunk.begin)));
  }
}
#endif

}  // namespace

PYBIND11_MODULE(ZOKERN_MODULE, module) {
  using pybind11::arg;
  module.def("same_values", &same_values, arg("dicts"), arg("kept"));
  module.def("philox", &philox, Free(), arg("counters"), arg("count"), arg("k0"), arg("k1"), arg("rounds"),
             arg("words"), arg("workers"), arg("stream"));
  module.def("draw", &draw, Free(), arg("entries"), arg("chunks"), arg("chunk_count"), arg("direction"),
             arg("seed"), arg("step"), arg("draw"), arg("workers"), arg("stream"), arg("clock") = 0,
             arg("scaled") = false);
  module.def("axpy", &axpy, Free(), arg("entries"), arg("chunks"), arg("chunk_count"), arg("direction"),
             arg("seed"), arg("draws"), arg("draw_count"), arg("each"), arg("rounding"), arg("nonfinite"),
             arg("workers"), arg("stream"), arg("clock") = 0, arg("device_draws") = 0,
             arg("coefficients") = 0, arg("scaled") = false, arg("control") = 0);
  module.def("perturb", &perturb, Free(), arg("entries"), arg("chunks"), arg("chunk_count"), arg("direction"),
             arg("seed"), arg("step"), arg("draw"), arg("scales"), arg("workers"), arg("stream"),
             arg("clock") = 0, arg("scaled") = false);
#if defined(ZOKERN_UPDATE)
  module.def("update", &update, Free(), arg("entries"), arg("chunks"), arg("chunk_count"), arg("direction"),
             arg("seed"), arg("draws"), arg("draw_count"), arg("rule"), arg("scalars"), arg("rounding"),
             arg("nonfinite"), arg("workers"), arg("stream"), arg("clock") = 0, arg("device_draws") = 0,
             arg("coefficients") = 0, arg("scaled") = false, arg("control") = 0);
#endif
#if defined(ZOKERN_LOWRANK_CPU)
  module.def("lowrank", &lowrank, Free(), arg("entries"), arg("chunks"), arg("chunk_count"), arg("factors"),
             arg("factor_count"), arg("seed"), arg("step"), arg("decay"), arg("rounding"), arg("nonfinite"),
             arg("workers"), arg("stream"));
  module.def("lowrank_one", &lowrank_one, Free());
#endif
#if defined(ZOKERN_LINEAR)
  module.def("copy", &copy, Free());
  module.def("linear", &linear);
  module.def("linear_pairs", &zo::linear_pairs);
  module.def("linear_memory", &zo::linear_memory, Free(), arg("rows"));
#endif
#if defined(ZOKERN_LOWRANK_CUDA)
  module.def("lowrank_tiles", &lowrank_tiles, Free(), arg("entries"), arg("tiles"), arg("tile_count"),
             arg("frames"), arg("factors"), arg("max_rank"), arg("general"), arg("types"), arg("simple"),
             arg("whole"), arg("seed"), arg("step"), arg("decay"), arg("rounding"), arg("nonfinite"),
             arg("workers"), arg("stream"), arg("clock") = 0, arg("control") = 0);
#endif
  module.def("project", &project);
  module.def("implementation", &zo::implementation);
  module.def("select", &zo::select, arg("name"));
  module.def("architectures", &zo::architectures);
  module.def("device_count", &zo::device_count);
}
