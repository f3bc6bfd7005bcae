// lowrank.cpp: theta <- decay theta + scale left right^T on the CPU
//
// math     lowrank.h. The sum is by fma over k = 0 .. rank - 1, from zero
// panel    `right` is rewritten once a launch into tiles of kWide columns, k-major. The inner loop loads a
//          tile's columns as vectors and the elements of `left` as broadcasts. It keeps kRows x kVectors sums
//          in registers
// pieces   a chunk is cut at the ends of matrix rows. Pieces with the same columns are done kRows at a time,
//          wherever they lie in memory: rows of a matrix, rows of a slice of columns, looked-up rows
// blocks   high ranks are limited by arithmetic. There all pieces of a batch use the tiles that fit the first
//          cache, in turn. At low ranks the panel may come from the second cache, and theta is read in long
//          runs, which suits memory
// edges    tiles that a piece covers in part go through rows of floats. So do all other strides, residuals
//          and stochastic rounding
// traffic  float32: 4 B read and 4 B written an element. bfloat16 and float16: 2 B and 2 B. The panel adds 12
//          rank (m + n) B
// build    once per instruction set with -DZOKERN_ISA=avx512 | avx2 | scalar over the trait simd/<isa>.h, and
//          once without
// equal    bit for bit to zokern/backends/reference.py on every path and number of threads, without
//          contraction and fast-math
// source   Chen et al. 2024, LOZO; Goto and van de Geijn 2008 for the panel and the register block

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

// clang-format off
#include "simd/namespace.h"  // comes first, because it renames the namespace of the others
// clang-format on
#include "isa.h"
#include "lowrank.h"

namespace zo {

struct LowrankJob {
  Rounding rounding;
  uint32_t step;
  float decay;
  const Entry* entries;
  const Chunk* chunks;
  const Factors* factors;
  const float* const* panels;
  alignas(64) Keys keys;
};

}  // namespace zo

#if defined(ZOKERN_ISA)

#include ZO_TRAIT
#include "simd/words.h"

namespace zo {
namespace {

using F = Simd::F;
using U = Simd::U;
constexpr int kLanes = Simd::kLanes;
constexpr int kRows = kLanes == 16 ? 8 : 4;  // with kVectors, sums take 24 of 32 or 12 of 16 registers
constexpr int kVectors = 3;
constexpr int kWide = kVectors * kLanes;
static_assert(48 % kWide == 0, "a panel is padded to 48 columns for every path");
constexpr int kBatch = 32;  // pieces that use a block of tiles before the next block
constexpr int64_t kArithmeticRank = 32;
constexpr int64_t kFirstCache = 24 << 10, kSecondCache = 192 << 10;  // most bytes of panel in a block

template <Type T>
using Element = std::conditional_t<T == Type::kFloat32, float, uint16_t>;

template <Type T>
ZO_INLINE F load_vector(const Element<T>* p) {
  if constexpr (T == Type::kFloat32) {
    return Simd::load(p);
  } else if constexpr (T == Type::kFloat16) {
    return Simd::load_fp16(p);
  } else {
    return Simd::floats(Simd::load_half(p) << 16);
  }
}

// A lane of flag becomes NaN after a result that is inf or NaN, or a float16 just below inf.
template <Type T>
ZO_INLINE void store_vector(Element<T>* p, F x, F& flag) {
  const F zero = Simd::all(0.0f);
  if constexpr (T == Type::kFloat32) {
    Simd::store(p, x);
    flag = Simd::fma(x, zero, flag);
  } else if constexpr (T == Type::kFloat16) {
    Simd::store_fp16(p, x);
    flag = Simd::fma(x * Simd::all(0x1.002p112f), zero, flag);
  } else {
    const U bits = Simd::bits(x);
    const U nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    const U half = x == x ? nearest : bits;  // an fma returns a quiet NaN, which stays a NaN when it is cut
    Simd::store_half(p, half >> 16);
    flag = Simd::fma(Simd::floats(half), zero, flag);  // the lower half does not make a number inf
  }
}

bool finite(Type type, const void* p, int64_t i) {
  if (type == Type::kFloat32) return (as_bits(static_cast<const float*>(p)[i]) & 0x7f800000u) != 0x7f800000u;
  const uint16_t exponent = type == Type::kBfloat16 ? 0x7f80u : 0x7c00u;
  return (static_cast<const uint16_t*>(p)[i] & exponent) != exponent;
}

struct Piece {  // elements of one row of the matrix, in the columns of the batch
  const char* theta;
  char* out;
  int16_t* low;
  const float* left;
  uint64_t number;
};

struct Batch {
  const LowrankJob* job;
  const Entry* entry;
  const Factors* factors;
  const float* panel;
  Type type, out_type;
  int64_t stride, out_stride;  // between columns, in elements
  bool keep;                   // the pieces have low bits
  bool direct;                 // whole tiles go without a buffer
  int64_t begin, end;          // columns
  int count;
  Piece pieces[kBatch];
};

template <int R, Type T, Type O, bool kDecay>
ZO_INLINE void finish(const F (&sum)[R][kVectors], float scale, float decay, const Element<T>* const* theta,
                      Element<O>* const* out, int64_t at, F* flags) {
  const F factor = Simd::all(scale), keep = Simd::all(decay);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      F old = load_vector<T>(theta[i] + at + v * kLanes);
      if (kDecay) old = keep * old;
      store_vector<O>(out[i] + at + v * kLanes, Simd::fma(factor, sum[i][v], old), flags[v]);
    }
  }
}

// R rows of a tile, which begin `at` elements after their first column.
// Only the order of each sum is prescribed.
template <int R, Type T, Type O>
ZO_INLINE void tile(const float* panel, const Factors& factors, float decay, const float* const* left,
                    const Element<T>* const* theta, Element<O>* const* out, int64_t at, F* flags) {
  F sum[R][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Simd::all(0.0f);
  }
  const int64_t rank = factors.rank;
  for (int64_t k = 0; k < rank; ++k, panel += kWide) {
    F right[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) right[v] = Simd::load(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const F one = Simd::all(left[i][k]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Simd::fma(one, right[v], sum[i][v]);
    }
  }
  if (decay == 1.0f) {
    finish<R, T, O, false>(sum, factors.scale, decay, theta, out, at, flags);
  } else {
    finish<R, T, O, true>(sum, factors.scale, decay, theta, out, at, flags);
  }
}

// The way through rows of floats: columns [lo, hi) of the matrix, inside the tile that starts at `start`.

ZO_INLINE void read_row(const Batch& batch, const Piece& piece, int64_t from, int n, float* to) {
  const bool wide = batch.type == Type::kFloat32;
  const char* p = piece.theta + from * batch.stride * (wide ? 4 : 2);
  for (int c = 0; c < n; ++c) {
    const int64_t offset = c * batch.stride;
    to[c] = batch.keep ? residual_join(reinterpret_cast<const uint16_t*>(p)[offset], piece.low[from + c])
                       : load(p, batch.type, offset);
  }
}

// Returns whether every result is finite.
bool write_row(const Batch& batch, const Piece& piece, int64_t from, int n, const float* value) {
  const bool wide = batch.out_type == Type::kFloat32;
  char* p = piece.out + from * batch.out_stride * (wide ? 4 : 2);
  uint16_t* half = reinterpret_cast<uint16_t*>(p);
  if (!wide && batch.keep && batch.entry->out[0] == nullptr) {
    for (int c = 0; c < n; ++c) half[c * batch.out_stride] = residual_split(value[c], piece.low[from + c]);
  } else if (!wide && batch.job->rounding == Rounding::kStochastic) {
    alignas(64) uint32_t words[4 * (kWide / 8 + 2 + Simd::kGroup)];
    const uint64_t number = piece.number + static_cast<uint64_t>(from);
    const int skip = static_cast<int>(number % 8);
    const Name name{batch.entry->who, batch.job->step, kRoundingDraw, batch.job->keys};
    make_words<false, 0>(static_cast<uint32_t>(number / 8), (skip + n + 7) / 8, name, words, nullptr);
    uint16_t random[kWide];  // little-endian: half-words in order
    std::memcpy(random, reinterpret_cast<const char*>(words) + 2 * skip, static_cast<size_t>(n) * 2);
    for (int c = 0; c < n; ++c) {
      half[c * batch.out_stride] = batch.out_type == Type::kBfloat16 ? bf16_stochastic(value[c], random[c])
                                                                     : fp16_stochastic(value[c], random[c]);
    }
  } else {
    for (int c = 0; c < n; ++c) store_nearest(p, batch.out_type, c * batch.out_stride, value[c]);
  }
  bool all = true;
  for (int c = 0; c < n; ++c) all &= finite(batch.out_type, p, c * batch.out_stride);
  return all;
}

template <int R>
bool buffered(const Batch& batch, int first, int64_t start, int64_t lo, int64_t hi) {
  alignas(64) float value[R][kWide] = {};
  const float* left[R];
  const float* from[R];
  float* to[R];
  const int skip = static_cast<int>(lo - start), n = static_cast<int>(hi - lo);
  for (int i = 0; i < R; ++i) {
    left[i] = batch.pieces[first + i].left, from[i] = to[i] = value[i];
    read_row(batch, batch.pieces[first + i], lo - batch.begin, n, value[i] + skip);
  }
  F flags[kVectors] = {};
  tile<R, Type::kFloat32, Type::kFloat32>(batch.panel + start * batch.factors->rank, *batch.factors,
                                          batch.job->decay, left, from, to, 0, flags);
  bool all = true;
  for (int i = 0; i < R; ++i)
    all &= write_row(batch, batch.pieces[first + i], lo - batch.begin, n, value[i] + skip);
  return all;
}

// R pieces from `first` on, tiles [t0, t1). Returns whether every result is finite.

template <int R, Type T, Type O>
bool rows(const Batch& batch, int first, int64_t t0, int64_t t1) {
  const float* left[R];
  const Element<T>* theta[R];
  Element<O>* out[R];
  for (int i = 0; i < R; ++i) {
    const Piece& piece = batch.pieces[first + i];
    left[i] = piece.left;
    theta[i] = reinterpret_cast<const Element<T>*>(piece.theta);
    out[i] = reinterpret_cast<Element<O>*>(piece.out);
  }
  constexpr int64_t kAhead = 4 * kWide;
  F flags[kVectors] = {};  // one for each vector of a row: a single one would be a slow chain of fma
  bool all = true;
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t start = t * kWide, lo = std::max(start, batch.begin),
                  hi = std::min(start + kWide, batch.end);
    if (batch.direct && hi - lo == kWide) {
      const int64_t at = start - batch.begin;
      for (int i = 0; i < R; ++i) {
        for (int64_t byte = 0; byte < kWide * static_cast<int64_t>(sizeof(Element<T>)); byte += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(theta[i] + at + kAhead) + byte);
        }
      }
      tile<R, T, O>(batch.panel + start * batch.factors->rank, *batch.factors, batch.job->decay, left, theta,
                    out, at, flags);
    } else {
      all &= buffered<R>(batch, first, start, lo, hi);
    }
  }
  return all && !Simd::any_nan(flags[0] + flags[1] + flags[2]);
}

template <Type T, Type O>
bool block(const Batch& batch, int64_t t0, int64_t t1) {
  bool all = true;
  int first = 0;
  for (; first + kRows <= batch.count; first += kRows) all &= rows<kRows, T, O>(batch, first, t0, t1);
  if (kRows > 4 && first + 4 <= batch.count) all &= rows<4, T, O>(batch, first, t0, t1), first += 4;
  if (first + 2 <= batch.count) all &= rows<2, T, O>(batch, first, t0, t1), first += 2;
  if (first < batch.count) all &= rows<1, T, O>(batch, first, t0, t1);
  return all;
}

bool instance(const Batch& batch, int64_t t0, int64_t t1) {
#define ZO_INSTANCE(T, O) \
  if (batch.type == T && batch.out_type == O) return block<T, O>(batch, t0, t1);
  ZO_INSTANCE(Type::kFloat32, Type::kFloat32)
  ZO_INSTANCE(Type::kBfloat16, Type::kBfloat16)
  ZO_INSTANCE(Type::kBfloat16, Type::kFloat32)
  ZO_INSTANCE(Type::kFloat16, Type::kFloat16)
  ZO_INSTANCE(Type::kFloat16, Type::kFloat32)
#undef ZO_INSTANCE
  return true;
}

int64_t flush(Batch& batch) {
  if (batch.count == 0) return 0;
  const int64_t tile_bytes = 4 * batch.factors->rank * kWide;
  const int64_t budget = batch.factors->rank > kArithmeticRank ? kFirstCache : kSecondCache;
  const int64_t tiles = std::max<int64_t>(1, budget / tile_bytes);
  const int64_t last = (batch.end + kWide - 1) / kWide;
  bool all = true;
  for (int64_t t = batch.begin / kWide; t < last; t += tiles)
    all &= instance(batch, t, std::min(t + tiles, last));
  int64_t nonfinite = 0;
  if (!all) {
    for (int i = 0; i < batch.count; ++i) {
      for (int64_t c = 0; c < batch.end - batch.begin; ++c) {
        nonfinite += !finite(batch.out_type, batch.pieces[i].out, c * batch.out_stride);
      }
    }
  }
  batch.count = 0;
  return nonfinite;
}

}  // namespace

// Writes columns [begin, end) of the panel, in multiples of 48. Columns that `right` lacks are zeros.
extern "C" void ZO_JOIN(zokern_panel_, ZOKERN_ISA)(const float* right, int64_t rank, int64_t columns,
                                                   int64_t begin, int64_t end, float* panel) {
  constexpr int kBlock = Simd::kTranspose;
  for (int64_t start = begin; start < end; start += kWide) {
    float* to = panel + start * rank;
    for (int64_t c = 0; c < kWide; c += kBlock) {
      int64_t k = 0;
      if (start + c + kBlock <= columns) {
        for (; k + kBlock <= rank; k += kBlock) {
          Simd::transpose(right + (start + c) * rank + k, rank, to + k * kWide + c, kWide);
        }
      }
      for (; k < rank; ++k) {
        for (int64_t i = c; i < c + kBlock; ++i) {
          to[k * kWide + i] = start + i < columns ? right[(start + i) * rank + k] : 0.0f;
        }
      }
    }
  }
}

// Runs one chunk of a job. Returns the number of results that are inf or NaN.
extern "C" int64_t ZO_JOIN(zokern_lowrank_, ZOKERN_ISA)(const void* address, int64_t which) {
  const LowrankJob& job = *static_cast<const LowrankJob*>(address);
  const Chunk& chunk = job.chunks[which];
  const Entry& entry = job.entries[chunk.entry];
  const Factors& factors = job.factors[entry.tensor];
  Batch batch;
  batch.job = &job, batch.entry = &entry, batch.factors = &factors, batch.panel = job.panels[entry.tensor],
  batch.count = 0;
  batch.type = static_cast<Type>(entry.type), batch.out_type = static_cast<Type>(entry.out_type);
  const bool outside = entry.out[0] != nullptr;
  batch.stride = entry.column_stride, batch.out_stride = outside ? 1 : entry.column_stride;
  batch.keep =
      batch.type == Type::kBfloat16 && entry.residual != nullptr && job.rounding == Rounding::kResidual;
  const bool nearest = batch.out_type == Type::kFloat32 || job.rounding != Rounding::kStochastic;
  batch.direct = batch.stride == 1 && !batch.keep && nearest;
  const int64_t width = batch.type == Type::kFloat32 ? 4 : 2,
                out_width = batch.out_type == Type::kFloat32 ? 4 : 2;
  // Rows are one row if they follow one another in memory, in the stream and in the outputs.
  const bool flat = entry.rows == nullptr && entry.pitch == static_cast<uint64_t>(entry.columns) &&
                    entry.row_stride == entry.columns * entry.column_stride;
  const int64_t columns = flat || entry.row_count == 1 ? entry.columns * entry.row_count : entry.columns;
  const uint64_t n = static_cast<uint64_t>(factors.columns);
  int64_t nonfinite = 0;
  for (int64_t p = chunk.begin; p < chunk.end;) {
    const int64_t r = p / columns, c = p % columns;
    const int64_t row = entry.rows != nullptr ? entry.rows[r] : r;
    const uint64_t number = entry.first + static_cast<uint64_t>(row) * entry.pitch + static_cast<uint64_t>(c);
    const int64_t i = static_cast<int64_t>(number / n), j = static_cast<int64_t>(number % n);
    const int64_t count = std::min({chunk.end - p, columns - c, factors.columns - j});
    const char* theta =
        static_cast<const char*>(entry.theta) + (row * entry.row_stride + c * entry.column_stride) * width;
    char* out = outside ? static_cast<char*>(entry.out[0]) + p * out_width : const_cast<char*>(theta);
    int16_t* low = batch.keep ? entry.residual + row * entry.columns + c : nullptr;
    if (batch.count == kBatch || (batch.count != 0 && (batch.begin != j || batch.end != j + count)))
      nonfinite += flush(batch);
    batch.begin = j, batch.end = j + count;
    batch.pieces[batch.count++] = {theta, out, low, factors.left + i * factors.rank, number};
    p += count;
  }
  return nonfinite + flush(batch);
}

}  // namespace zo

#else  // this part is compiled once: it makes panels and divides the chunks among threads

#include <omp.h>

#include <stdexcept>

namespace zo {
namespace {

constexpr int64_t kColumns = 48;           // a panel is padded to a multiple of every path's tile
constexpr int64_t kPanelFloats = 1 << 20;  // of all panels in memory, unless a single one is larger
constexpr int64_t kSmallPanel = 1 << 16;   // up to as many floats, one thread writes the panels
constexpr int64_t kColumnsAtOnce = 4 * kColumns;

int64_t padded(const Factors& factors) { return (factors.columns + kColumns - 1) / kColumns * kColumns; }

}  // namespace

void lowrank(const Launch& launch, const Factors* factors, int64_t factor_count, float decay,
             Rounding rounding, uint32_t step, int64_t* nonfinite) {
  for (int64_t c = 0; c < launch.chunk_count; ++c) {
    const int32_t tensor = launch.entries[launch.chunks[c].entry].tensor;
    if (tensor < 0 || tensor >= factor_count)
      throw std::invalid_argument("an entry names factors that the launch does not have");
  }
  std::vector<const float*> panels(static_cast<size_t>(factor_count));
  LowrankJob job;
  job.rounding = rounding, job.step = step, job.decay = decay;
  job.entries = launch.entries, job.chunks = launch.chunks, job.factors = factors, job.panels = panels.data();
  spread(launch.seed, job.keys);
  const Path& path = active();
  const int workers = static_cast<int>(launch.workers);
  int64_t total = 0;
  for (int64_t begin = 0; begin < launch.chunk_count;) {
    // Chunks [begin, end) belong to tensors whose panels fit into memory together.
    const auto tensor_of = [&](int64_t c) { return launch.entries[launch.chunks[c].entry].tensor; };
    std::vector<int32_t> tensors;
    int64_t floats = 0, end = begin;
    for (; end < launch.chunk_count; ++end) {
      const int32_t tensor = tensor_of(end);
      if (!tensors.empty() && tensors.back() == tensor) continue;
      const int64_t more = padded(factors[tensor]) * factors[tensor].rank;
      if (!tensors.empty() && floats + more > kPanelFloats) break;
      tensors.push_back(tensor), floats += more;
    }
    const std::unique_ptr<float[]> memory(new float[static_cast<size_t>(floats)]);
    float* next = memory.get();
    for (const int32_t tensor : tensors) {
      panels[static_cast<size_t>(tensor)] = next, next += padded(factors[tensor]) * factors[tensor].rank;
    }
    const auto write_panel = [&](const Factors& f, int32_t tensor, int64_t column) {
      path.panel(f.right, f.rank, f.columns, column, std::min(column + kColumnsAtOnce, padded(f)),
                 const_cast<float*>(panels[static_cast<size_t>(tensor)]));
    };
    const bool alone = workers == 1 || floats < kSmallPanel;
    for (const int32_t tensor : alone ? tensors : std::vector<int32_t>()) {
      for (int64_t column = 0; column < padded(factors[tensor]); column += kColumnsAtOnce) {
        write_panel(factors[tensor], tensor, column);
      }
    }
#pragma omp parallel num_threads(workers) if (workers > 1) reduction(+ : total)
    {
      DefaultMode mode;
      if (!alone) {
        for (const int32_t tensor : tensors) {
#pragma omp for schedule(static) nowait
          for (int64_t column = 0; column < padded(factors[tensor]); column += kColumnsAtOnce) {
            write_panel(factors[tensor], tensor, column);
          }
        }
#pragma omp barrier
      }
#pragma omp for schedule(dynamic)
      for (int64_t c = begin; c < end; ++c) total += path.lowrank(&job, c);
    }
    begin = end;
  }
  *nonfinite += total;
}

}  // namespace zo
#endif
