// linear.cpp: y = shrink x (W + scale z)^T + thin products + bias on the CPU
//
// math     linear.h. A sum runs over k from 0 up, by fma, in registers for a panel's depth. Its bits do not
//          depend on the number of threads, on the other rows of x, or on the division of columns among
//          threads
// pairs    in bfloat16, k runs over pairs, the odd one first. The processor's dot product of pairs
//          (VDPBF16PS) does the same, and its products are exact. With this instruction x and W + scale z
//          stay in 16 bits, two in a word. That takes half the memory and half the instructions. It gives the
//          same bits, except that it takes numbers under 2^-126 for zero
// panel    y is made kColumns columns at a time. Their rows of W + scale z, kDepth wide, are turned into
//          panels of kWide columns in the second cache (simd/panels.h). All rows of x meet a panel there,
//          with kRows x kVectors sums in registers (simd/sweep.h). No tile of W + scale z is ever in memory
// rows     if rows of W begin with a block of the stream, z is made in the order of a panel (simd/aligned.h).
//          If not, the elementwise verb writes a few rows into the first cache, and they are turned there
// sides    both signs of a draw come from one evaluation of z. Sides that read W itself share its panels
// thin     x first^T middle comes first, by the same panels, its rows divided among the threads. Its product
//          with last^T is added to y's sums, so y is written once and rounded once. For a bfloat16 W the
//          factors first and last and the rows between them are rounded to bfloat16, each by 2^-8 of itself
//          or less. The sums are float32
// edges    a panel may hold more columns than W has. Their sums are not written
// traffic  W once for all sides, 4 or 2 B an element. y once. x comes from the caches, once for every 96
//          columns
// build    once per instruction set with -DZOKERN_ISA=avx512bf16 | avx512 | avx2 | scalar over the trait
//          simd/<isa>.h, and once without
// source   Goto and van de Geijn 2008 for the panel and the register block;
//          stream: zokern/stream.py, version 1
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

// clang-format off
#include "simd/namespace.h"  // comes first, because it renames the namespace of the others
// clang-format on
#include "job.h"
#include "linear.h"

namespace zo {

constexpr int64_t kDepth = 384;   // words in a column of a panel: 36 KB for 24 columns
constexpr int64_t kColumns = 96;  // most columns of y at a time; a multiple of kWide on every path
constexpr int64_t kBlock = 256;   // rows of x that meet all panels before the next rows

struct ThinRows {                  // intermediate results of a thin product, for all rows of its side
  std::vector<float> inner, rows;  // x first^T, and x first^T middle
  std::vector<uint16_t> half;      // rows, rounded, if W is bfloat16
};

struct LinearJob {
  const Linear* product;
  std::vector<ThinRows> thins;
  int64_t columns;               // of y at a time: kColumns, or half as many if y has few
  std::vector<int64_t> offsets;  // of each side's sums in a thread's memory
  int64_t rows;                  // of all sides together
  int64_t (*elementwise)(const void* job, int64_t chunk);
  Job piece;  // for the elementwise verb; each call adds entry, draw and scales
};

}  // namespace zo

#if defined(ZOKERN_ISA)

#include ZO_TRAIT
// clang-format off
#include "simd/words.h"
#include "simd/values.h"
#include "simd/rows.h"
#include "simd/panels.h"
#include "simd/aligned.h"
#include "simd/sweep.h"
// clang-format on

namespace zo {
namespace {

// A worker's rows of x in the first part of a thin product.
struct Share {
  int64_t begin, end;
};

Share share_of(const Side& side, int64_t worker, int64_t workers) {
  return {side.rows * worker / workers, side.rows * (worker + 1) / workers};
}

// inner <- x first^T, for thin products [t, end), which have the same `first`.
void start_thin(LinearJob& job, int64_t t, int64_t end, int64_t worker, int64_t workers, Memory& memory,
                float* sums) {
  const Linear& product = *job.product;
  const Thin& thin = product.thins[static_cast<size_t>(t)];
  const Order order = order_of(product.type);
  const auto each = [&](auto&& call) {  // of a thin product, its side, the worker's share and its sums
    float* own = sums;
    for (int64_t one = t; one < end; ++one) {
      const Side& side = product.sides[static_cast<size_t>(product.thins[static_cast<size_t>(one)].side)];
      const Share share = share_of(side, worker, workers);
      call(one, side, share, own);
      own += (share.end - share.begin) * kColumns;
    }
  };
  for (int64_t c = 0; c < thin.inner; c += kColumns) {
    const int64_t count = std::min(kColumns, thin.inner - c);
    for (int64_t column = 0; column < product.n; column += depth_of(order)) {
      const int64_t k = std::min(depth_of(order), product.n - column);
      make_factor_panels(product.type, thin.first + c * product.n + column, product.n, count, k, memory);
      each([&](int64_t, const Side& side, Share share, float* own) {
        const char* x =
            static_cast<const char*>(side.x) + share.begin * product.n * (order == Order::kPairs ? 2 : 4);
        sweep_thin(order, x, share.end - share.begin, product.n, column, k, memory.panel[0], count, own,
                   column == 0);
      });
    }
    each([&](int64_t one, const Side&, Share share, float* own) {
      float* const to = job.thins[static_cast<size_t>(one)].inner.data() + c;
      for (int64_t i = share.begin; i < share.end; ++i) {
        std::memcpy(to + i * thin.inner, own + (i - share.begin) * kColumns, static_cast<size_t>(count) * 4);
      }
    });
  }
}

// rows <- inner middle, for the rows of one worker, in the form that the last product reads.
void turn_thin(LinearJob& job, int64_t t, int64_t worker, int64_t workers, Memory& memory, float* sums) {
  const Thin& thin = job.product->thins[static_cast<size_t>(t)];
  ThinRows& rows = job.thins[static_cast<size_t>(t)];
  const Share share = share_of(job.product->sides[static_cast<size_t>(thin.side)], worker, workers);
  const Order order = order_of(job.product->type);
  const int64_t many = share.end - share.begin;
  for (int64_t c = 0; c < thin.rank; c += kColumns) {
    const int64_t count = std::min(kColumns, thin.rank - c);
    for (int64_t column = 0; column < thin.inner; column += kDepth) {
      const int64_t k = std::min(kDepth, thin.inner - column);
      for (int64_t j = 0; j < k; ++j) {
        const float* from = thin.middle + (column + j) * thin.row_stride + c * thin.column_stride;
        for (int64_t q = 0; q < count; ++q) {
          memory.panel[0][q / kWide * kWide * k + j * kWide + q % kWide] = from[q * thin.column_stride];
        }
      }
      sweep_thin(Order::kUp, rows.inner.data() + share.begin * thin.inner, many, thin.inner, column, k,
                 memory.panel[0], count, sums, column == 0);
    }
    for (int64_t i = 0; i < many; ++i) {
      const float* const from = sums + i * kColumns;
      const int64_t at = (share.begin + i) * thin.rank + c;
      if (order == Order::kUp) {
        std::memcpy(rows.rows.data() + at, from, static_cast<size_t>(count) * 4);
      } else {
        narrow_row(from, count, rows.half.data() + at);
        if (order == Order::kOddFirst)
          widen_row(Type::kBfloat16, rows.half.data() + at, count, rows.rows.data() + at);
      }
    }
  }
}

// y <- sums + bias for columns [begin, begin + count).
void finish(const Linear& product, const Side& side, int64_t begin, int64_t count, float* sums,
            uint16_t* half) {
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
  const int64_t sides = static_cast<int64_t>(product.sides.size()),
                thins = static_cast<int64_t>(product.thins.size());
  const auto of = [&](int64_t side) { return sums + job.offsets[static_cast<size_t>(side)]; };
  const Order order = order_of(product.type);
  const Make aligned = aligned_of(product);
  const auto sweep = order == Order::kUp ? sweep_rows<Order::kUp> : sweep_rows<kBfloat16>;
  const int64_t depth = depth_of(order);
  for (int64_t column = 0; column < product.n; column += depth) {
    const int64_t k = std::min(depth, product.n - column);
    for (int64_t s = 0; s < sides;) {
      const Side& side = product.sides[static_cast<size_t>(s)];
      int64_t end = s + 1;
      const auto same = [&](int64_t other) {
        const int64_t draw = product.sides[static_cast<size_t>(other)].draw;
        return draw == side.draw || (aligned != nullptr && side.draw >= 0 && draw >= 0);
      };
      while (end < sides && same(end) && (side.draw < 0 || end < s + 2)) ++end;
      const Make otherwise = product.transposed ? make_panels_of_columns : make_panels;
      const Make make = aligned != nullptr && side.draw >= 0 ? aligned : otherwise;
      make(job, &side, side.draw < 0 ? 1 : static_cast<int>(end - s), row, count, column, k, piece, memory);
      for (int64_t one = s; one < end; ++one) {
        const Side& now = product.sides[static_cast<size_t>(one)];
        sweep(now.x, now.rows, product.n, column, k, memory.panel[side.draw < 0 ? 0 : one - s], count,
              of(one), column == 0);
      }
      s = end;
    }
  }
  if (product.shrink != 1.0f) {
    for (float* sum = sums; sum < of(sides - 1) + product.sides.back().rows * kColumns; ++sum)
      *sum *= product.shrink;
  }
  for (int64_t t = 0; t < thins;) {
    const Thin& thin = product.thins[static_cast<size_t>(t)];
    int64_t end = t + 1;
    const auto same = [&](const Thin& other) {
      return other.last == thin.last && other.rank == thin.rank && other.stride == thin.stride;
    };
    while (end < thins && same(product.thins[static_cast<size_t>(end)])) ++end;
    for (int64_t column = 0; column < thin.rank; column += depth) {
      const int64_t k = std::min(depth, thin.rank - column);
      make_factor_panels(product.type, thin.last + row * thin.stride + column, thin.stride, count, k, memory);
      for (int64_t one = t; one < end; ++one) {
        const Thin& now = product.thins[static_cast<size_t>(one)];
        const ThinRows& rows = job.thins[static_cast<size_t>(one)];
        const void* const x =
            order == Order::kPairs ? static_cast<const void*>(rows.half.data()) : rows.rows.data();
        sweep(x, product.sides[static_cast<size_t>(now.side)].rows, now.rank, column, k, memory.panel[0],
              count, of(now.side), false);
      }
    }
    t = end;
  }
  for (int64_t s = 0; s < sides; ++s) {
    finish(product, product.sides[static_cast<size_t>(s)], row, count, of(s), memory.half);
  }
}

// The first part of all thin products, for the rows of one worker.
extern "C" void ZO_JOIN(zokern_linear_thin_, ZOKERN_ISA)(void* address, int64_t worker, int64_t workers,
                                                         char* bytes) {
  LinearJob& job = *static_cast<LinearJob*>(address);
  const std::vector<Thin>& all = job.product->thins;
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  float* const sums = reinterpret_cast<float*>(bytes + sizeof(Memory));
  for (size_t t = 0; t < all.size();) {
    size_t end = t;
    int64_t rows = 0;  // at most job.rows: there is no room for more sums, and a side may come twice
    do {
      rows += job.product->sides[static_cast<size_t>(all[end++].side)].rows;
    } while (end < all.size() && all[end].first == all[t].first && all[end].inner == all[t].inner &&
             rows + job.product->sides[static_cast<size_t>(all[end].side)].rows <= job.rows);
    start_thin(job, static_cast<int64_t>(t), static_cast<int64_t>(end), worker, workers, memory, sums);
    for (; t < end; ++t) turn_thin(job, static_cast<int64_t>(t), worker, workers, memory, sums);
  }
}

// Bytes of a thread's memory without the sums.
extern "C" int64_t ZO_JOIN(zokern_linear_memory_, ZOKERN_ISA)() { return sizeof(Memory); }

// Whether a bfloat16 W takes x in bfloat16.
extern "C" bool ZO_JOIN(zokern_linear_pairs_, ZOKERN_ISA)() { return Simd::kPairs; }

}  // namespace zo

#else  // this part is compiled once: it divides the columns among threads

#include <omp.h>

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace zo {
namespace {

constexpr int64_t kSmall = 1 << 15;  // below as many elements of W one thread is faster

constexpr uintptr_t kHuge = 1 << 21;  // a huge page: 512 faults in one

// Asks for huge pages under the memory of a large result that is written next. It is only a hint.
void enlarge_pages(const void* from, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(from) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(from) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(from), static_cast<void>(bytes);
#endif
}

struct Free {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

}  // namespace

bool linear_pairs() { return active().linear_pairs(); }

int64_t linear_memory(int64_t rows) { return active().linear_memory() + rows * kColumns * 4; }

void linear(const Linear& product) {
  LinearJob job;
  job.product = &product;
  job.elementwise = active().elementwise;
  job.piece.verb = Verb::kPerturb, job.piece.rounding = Rounding::kNearest,
  job.piece.direction = product.direction;
  job.piece.draw_count = 1;
  spread(product.seed, job.piece.keys);
  const int workers =
      product.m * product.n < kSmall ? 1 : static_cast<int>(std::max<int64_t>(1, product.workers));
  job.columns = product.m < 4 * workers * kColumns ? kColumns / 2 : kColumns;
  const int64_t groups = (product.m + job.columns - 1) / job.columns;
  job.rows = 0;
  for (const Side& side : product.sides) {
    job.offsets.push_back(job.rows * kColumns), job.rows += side.rows;
    const size_t size = static_cast<size_t>(side.rows * product.m) * (product.type == Type::kFloat32 ? 4 : 2);
    enlarge_pages(side.y, size);
  }
  const size_t bytes = static_cast<size_t>(linear_memory(job.rows));
  const std::unique_ptr<char[], Free> memory(  // not in parallel: an exception there ends the process
      static_cast<char*>(::operator new[](bytes* static_cast<size_t>(workers), std::align_val_t(64))));
  for (const Thin& thin : product.thins) {
    const size_t many = static_cast<size_t>(product.sides[static_cast<size_t>(thin.side)].rows);
    const size_t inner = static_cast<size_t>(thin.inner), rank = static_cast<size_t>(thin.rank);
    const size_t rounded = product.type == Type::kBfloat16 ? many * rank : 0;
    job.thins.push_back(
        {std::vector<float>(many * inner), std::vector<float>(many * rank), std::vector<uint16_t>(rounded)});
  }
  const Path& path = active();
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    DefaultMode mode;
    char* const own = memory.get() + bytes * static_cast<size_t>(omp_get_thread_num());
    if (!product.thins.empty()) {
#pragma omp for schedule(static)
      for (int worker = 0; worker < workers; ++worker) path.linear_thin(&job, worker, workers, own);
    }
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) path.linear(&job, group, own);
  }
}

}  // namespace zo
#endif
