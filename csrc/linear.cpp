// linear.cpp: y = x (W + scale z)^T + thin products + bias on the CPU
//
// math     linear.h; a sum runs over k from 0 up, by fma, kDepth of them at a time in registers: the same bits for any number
//          of threads, for any rows beside a row and for any way to share the columns out
// panel    kColumns columns of y are done at a time. Their rows of W + scale z, kDepth wide, come from the elementwise verb
//          into the first cache, kStrip at a time, and are turned into panels of kWide columns, k-major, in the second. There
//          all rows of x meet them: kRows x kVectors sums in registers, x as broadcasts from where it lies. No tile of
//          W + scale z is ever in memory
// sides    both signs of a draw are made from one evaluation of z, and sides that read W itself share its panels; the thin
//          products go on in the same sums, so that y is written once, rounded once
// edges    columns that W does not have are zeros in the panel and are not written
// traffic  W once, 4 or 2 B an element, for all sides; y once; x from the caches, once for every 96 columns
// build    once per instruction set with -DZOKERN_ISA=avx512 | avx2 | scalar over the trait simd/<isa>.h, and once without
// source   Goto and van de Geijn 2008 for the panel and the register block; stream: zokern/stream.py, version 1
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

// clang-format off
#include "simd/namespace.h"  // first: it renames the namespace of the others
// clang-format on
#include "job.h"
#include "linear.h"

namespace zo {

constexpr int64_t kDepth = 384;   // of a panel: 36 KB for 24 columns
constexpr int64_t kColumns = 96;  // columns of y at a time, at most: a multiple of every path's kWide
constexpr int kStrip = 8;         // rows of W that are made before they are turned
constexpr int64_t kBlock = 256;   // rows of x that meet all panels before the next rows are fetched

struct LinearJob {
  const Linear* product;
  int64_t columns;               // of y at a time: kColumns, or half as many where there are few
  std::vector<int64_t> offsets;  // of every side in a thread's sums
  int64_t (*elementwise)(const void* job, int64_t chunk);
  Job piece;  // the elementwise verb, but for its entry, draw and scales
};

}  // namespace zo

#if defined(ZOKERN_ISA)

#include ZO_TRAIT
// clang-format off
#include "simd/words.h"
#include "simd/values.h"
#include "simd/rows.h"
// clang-format on

namespace zo {
namespace {

constexpr int kRows = kLanes == 16 ? 8 : 4;  // with kVectors: 24 of 32, or 12 of 16 registers hold sums
constexpr int kVectors = 3;
constexpr int kWide = kVectors * kLanes;
static_assert(kColumns / 2 % kWide == 0 && kStrip % Simd::kTranspose == 0 && kColumns % kUnit == 0);

struct Memory {  // of a thread
  alignas(64) float panel[2][kColumns * kDepth];
  alignas(64) float raw[2][kStrip * kDepth];  // of W's type
  alignas(64) float wide[kStrip * kDepth];    // a 16-bit one in float32
  alignas(64) uint16_t half[kColumns];
  // then rows x kColumns sums of every side
};

// Rows [q, q + kStrip) of `count` rows of a matrix, k columns of them, into the panels; zeros for rows that it does not have.
void turn(const float* from, int64_t stride, int64_t q, int64_t count, int64_t k, float* panels) {
  for (int64_t c = q; c < q + kStrip; c += Simd::kTranspose, from += Simd::kTranspose * stride) {
    float* to = panels + c / kWide * kWide * k + c % kWide;
    int64_t j = 0;
    if (c + Simd::kTranspose <= count) {
      for (; j + Simd::kTranspose <= k; j += Simd::kTranspose) Simd::transpose(from + j, stride, to + j * kWide, kWide);
    }
    for (; j < k; ++j) {
      for (int i = 0; i < Simd::kTranspose; ++i) to[j * kWide + i] = c + i < count ? from[i * stride + j] : 0.0f;
    }
  }
}

// 16 bits to float32, n of them
void widen_row(Type type, const uint16_t* half, int64_t n, float* value) {
  const int64_t whole = n / kUnit * kUnit;
  widen(type, half, static_cast<int>(n / kUnit), value);
  for (int64_t i = whole; i < n; ++i) value[i] = load(half, type, i);
}

// `rows` rows of a matrix in float32: where they lie, or widened into rows of n
const float* in_float(Type type, const void* from, int64_t stride, int64_t rows, int64_t n, Memory& memory) {
  if (type == Type::kFloat32) return static_cast<const float*>(from);
  const uint16_t* half = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < rows; ++i) widen_row(type, half + i * stride, n, memory.wide + i * n);
  return memory.wide;
}

void* address(const Linear& product, int64_t offset) {
  char* weight = static_cast<char*>(const_cast<void*>(product.weight));
  return weight + offset * (product.type == Type::kFloat32 ? 4 : 2);
}

// W + scale z for one or two sides of a draw, into raw: `rows` rows of n elements, from `offset` on, `pitch` apart
void make_rows(const LinearJob& job, const Side* sides, int many, int64_t offset, int64_t rows, int64_t n, int64_t pitch,
               Job& piece, Memory& memory) {
  const Linear& product = *job.product;
  const Draw draw{product.step, static_cast<uint32_t>(sides->draw), 0.0f, 1.0f};
  const float scales[2] = {sides[0].scale, many == 2 ? sides[1].scale : 0.0f};
  const int32_t type = static_cast<int32_t>(product.type);
  const Entry entry{address(product, offset),
                    {memory.raw[0], many == 2 ? memory.raw[1] : nullptr},
                    nullptr,
                    nullptr,
                    rows,
                    n,
                    pitch,
                    1,
                    product.first + static_cast<uint64_t>(offset),
                    static_cast<uint64_t>(pitch),
                    product.who,
                    type,
                    type,
                    0};
  const Chunk chunk{0, rows * n, 0};
  piece.entries = &entry, piece.chunks = &chunk, piece.draws = &draw, piece.scales = scales;
  job.elementwise(&piece, 0);
}

// W, or W + scale z for one or two sides of a draw, into panels: `count` rows from `row` on, columns [column, column + k)
void make_panels(const LinearJob& job, const Side* sides, int many, int64_t row, int64_t count, int64_t column, int64_t k,
                 Job& piece, Memory& memory) {
  const Linear& product = *job.product;
  const int64_t padded = (count + kWide - 1) / kWide * kWide;
  for (int64_t q = 0; q < padded; q += kStrip) {
    const int64_t rows = std::max<int64_t>(0, std::min<int64_t>(kStrip, count - q)), offset = (row + q) * product.n + column;
    if (sides->draw >= 0 && rows > 0) make_rows(job, sides, many, offset, rows, k, product.n, piece, memory);
    for (int side = 0; side < many; ++side) {
      const void* from = memory.raw[side];
      int64_t stride = k;
      if (sides->draw < 0) from = address(product, offset), stride = product.n;
      const float* values = in_float(product.type, from, stride, rows, k, memory);
      turn(values, product.type == Type::kFloat32 ? stride : k, q, count, k, memory.panel[side]);
    }
  }
}

// The same for a transposed W, whose rows are those of the panels: kStrip of them at a time.
void make_panels_of_columns(const LinearJob& job, const Side* sides, int many, int64_t row, int64_t count, int64_t column,
                            int64_t k, Job& piece, Memory& memory) {
  const Linear& product = *job.product;
  for (int64_t j = 0; j < k; j += kStrip) {
    const int64_t rows = std::min<int64_t>(kStrip, k - j), offset = (column + j) * product.m + row;
    if (sides->draw >= 0) make_rows(job, sides, many, offset, rows, count, product.m, piece, memory);
    for (int side = 0; side < many; ++side) {
      const void* from = memory.raw[side];
      int64_t stride = count;
      if (sides->draw < 0) from = address(product, offset), stride = product.m;
      const float* values = in_float(product.type, from, stride, rows, count, memory);
      if (product.type != Type::kFloat32) stride = count;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t q = 0; q < count; q += kWide) {
          float* to = memory.panel[side] + q * k + (j + i) * kWide;
          const int64_t some = std::min<int64_t>(kWide, count - q);
          std::memcpy(to, values + i * stride + q, static_cast<size_t>(some) * 4);
          for (int64_t c = some; c < kWide; ++c) to[c] = 0.0f;
        }
      }
    }
  }
}

// R rows of x with one panel: sums += x panel, or = where they are the first
template <int R>
ZO_INLINE void block(const float* x, int64_t stride, int64_t k, const float* panel, float* sums, bool first) {
  F sum[R][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[i][v] = first ? Simd::all(0.0f) : Simd::load(sums + i * kColumns + v * kLanes);
  }
  for (int64_t j = 0; j < k; ++j, panel += kWide) {
    F right[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) right[v] = Simd::load(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const F one = Simd::all(x[i * stride + j]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Simd::fma(one, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) Simd::store(sums + i * kColumns + v * kLanes, sum[i][v]);
  }
}

template <int R = kRows>
void rest(int64_t rows, const float* x, int64_t stride, int64_t k, const float* panel, float* sums, bool first) {
  if (rows == R) return block<R>(x, stride, k, panel, sums, first);
  if constexpr (R > 1) rest<R - 1>(rows, x, stride, k, panel, sums, first);
}

// Every row of x with every panel
void sweep_rows(const float* x, int64_t rows, int64_t stride, int64_t k, const float* panels, int64_t count, float* sums,
                bool first) {
  for (int64_t begin = 0; begin < rows; begin += kBlock) {
    const int64_t end = std::min(rows, begin + kBlock);
    for (int64_t q = 0; q < count; q += kWide) {
      int64_t i = begin;
      for (; i + kRows <= end; i += kRows) {
        block<kRows>(x + i * stride, stride, k, panels + q * k, sums + i * kColumns + q, first);
      }
      if (i < end) rest(end - i, x + i * stride, stride, k, panels + q * k, sums + i * kColumns + q, first);
    }
  }
}

// y <- sums + bias for columns [begin, begin + count)
void finish(const Linear& product, const Side& side, int64_t begin, int64_t count, float* sums, uint16_t* half) {
  for (int64_t i = 0; i < side.rows; ++i, sums += kColumns) {
    if (side.bias != nullptr) {
      for (int64_t c = 0; c < count; ++c) sums[c] += side.bias[begin + c];
    }
    const int64_t at = i * product.m + begin;
    if (product.type == Type::kFloat32) {
      std::memcpy(static_cast<float*>(side.y) + at, sums, static_cast<size_t>(count) * 4);
    } else {
      narrow(product.type, sums, static_cast<int>((count + kUnit - 1) / kUnit), half);
      std::memcpy(static_cast<uint16_t*>(side.y) + at, half, static_cast<size_t>(count) * 2);
    }
  }
}

}  // namespace

extern "C" void ZO_JOIN(zokern_linear_, ZOKERN_ISA)(const void* address, int64_t group, char* bytes) {
  const LinearJob& job = *static_cast<const LinearJob*>(address);
  const Linear& product = *job.product;
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  float* const sums = reinterpret_cast<float*>(bytes + sizeof(Memory));
  Job piece = job.piece;
  const int64_t row = group * job.columns, count = std::min(job.columns, product.m - row);
  const int64_t sides = static_cast<int64_t>(product.sides.size()), thins = static_cast<int64_t>(product.thins.size());
  const auto of = [&](int64_t side) { return sums + job.offsets[static_cast<size_t>(side)]; };
  for (int64_t column = 0; column < product.n; column += kDepth) {
    const int64_t k = std::min(kDepth, product.n - column);
    for (int64_t s = 0; s < sides;) {
      const Side& side = product.sides[static_cast<size_t>(s)];
      int64_t end = s + 1;
      const auto same = [&](int64_t other) { return product.sides[static_cast<size_t>(other)].draw == side.draw; };
      while (end < sides && same(end) && (side.draw < 0 || end < s + 2)) ++end;
      const auto make = product.transposed ? make_panels_of_columns : make_panels;
      make(job, &side, side.draw < 0 ? 1 : static_cast<int>(end - s), row, count, column, k, piece, memory);
      for (int64_t one = s; one < end; ++one) {
        const Side& now = product.sides[static_cast<size_t>(one)];
        sweep_rows(now.x + column, now.rows, product.n, k, memory.panel[side.draw < 0 ? 0 : one - s], count, of(one),
                   column == 0);
      }
      s = end;
    }
  }
  for (int64_t t = 0; t < thins;) {
    const Thin& thin = product.thins[static_cast<size_t>(t)];
    int64_t end = t + 1;
    const auto same = [&](const Thin& other) {
      return other.last == thin.last && other.rank == thin.rank && other.stride == thin.stride;
    };
    while (end < thins && same(product.thins[static_cast<size_t>(end)])) ++end;
    for (int64_t column = 0; column < thin.rank; column += kDepth) {
      const int64_t k = std::min(kDepth, thin.rank - column), padded = (count + kWide - 1) / kWide * kWide;
      for (int64_t q = 0; q < padded; q += kStrip) {
        turn(thin.last + (row + q) * thin.stride + column, thin.stride, q, count, k, memory.panel[0]);
      }
      for (int64_t one = t; one < end; ++one) {
        const Thin& now = product.thins[static_cast<size_t>(one)];
        const Side& side = product.sides[static_cast<size_t>(now.side)];
        sweep_rows(now.x + column, side.rows, now.rank, k, memory.panel[0], count, of(now.side), false);
      }
    }
    t = end;
  }
  for (int64_t s = 0; s < sides; ++s) {
    finish(product, product.sides[static_cast<size_t>(s)], row, count, of(s), memory.half);
  }
}

// Bytes of a thread, but for the sums
extern "C" int64_t ZO_JOIN(zokern_linear_memory_, ZOKERN_ISA)() { return sizeof(Memory); }

}  // namespace zo

#else  // the part that is compiled once: share the columns out

#include <omp.h>

#include <new>

namespace zo {
namespace {

constexpr int64_t kSmall = 1 << 15;  // elements of W below which waking a second thread costs more than it saves

struct Free {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

}  // namespace

int64_t linear_memory(int64_t rows) { return active().linear_memory() + rows * kColumns * 4; }  // a multiple of 64

void linear(const Linear& product) {
  LinearJob job;
  job.product = &product;
  job.elementwise = active().elementwise;
  job.piece.verb = Verb::kPerturb, job.piece.rounding = Rounding::kNearest, job.piece.direction = product.direction;
  job.piece.draw_count = 1;
  spread(product.seed, job.piece.keys);
  const int workers = product.m * product.n < kSmall ? 1 : static_cast<int>(std::max<int64_t>(1, product.workers));
  job.columns = product.m < 4 * workers * kColumns ? kColumns / 2 : kColumns;
  const int64_t groups = (product.m + job.columns - 1) / job.columns;
  int64_t rows = 0;
  for (const Side& side : product.sides) job.offsets.push_back(rows * kColumns), rows += side.rows;
  const size_t bytes = static_cast<size_t>(linear_memory(rows));
  const std::unique_ptr<char[], Free> memory(  // here: what throws in a parallel region ends the process
      static_cast<char*>(::operator new[](bytes* static_cast<size_t>(workers), std::align_val_t(64))));
  const auto path = active().linear;
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    DefaultMode mode;
    char* const own = memory.get() + bytes * static_cast<size_t>(omp_get_thread_num());
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) path(&job, group, own);
  }
}

}  // namespace zo
#endif
