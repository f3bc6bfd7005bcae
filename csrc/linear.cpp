// linear.cpp: y = shrink x (W + scale z)^T + thin products + bias on the CPU
//
// math     linear.h; a sum runs over k from 0 up, by fma, in registers over a panel's depth: the same bits for any number of
//          threads, for any rows beside a row and for any way to share the columns out
// bfloat16 k runs over pairs, the odd one first, as the processor's dot product of pairs does it (VDPBF16PS; the products are
//          exact). Where there is one, x and W + scale z stay in 16 bits, two in a word: half the memory and half the
//          instructions for the same bits, but for numbers under 2^-126, which it takes for zero
// panel    kColumns columns of y are done at a time. Their rows of W + scale z, kDepth wide, are turned into panels of kWide
//          columns, k-major, in the second cache. There all rows of x meet them: kRows x kVectors sums in registers, x as
//          broadcasts from where it lies. No tile of W + scale z is ever in memory
// aligned  where rows of W begin with a block of the stream, a lane of the generator is a row, so that z comes out turned; W is
//          turned once for two sides, kBatch columns at a time, in the first cache
// else     rows come from the elementwise verb into the first cache, a few at a time, and are turned there
// sides    both signs of a draw are made from one evaluation of z, and sides that read W itself share its panels
// thin     x first^T middle comes first, rows shared out among the threads, by the same panels; its product with last^T goes on
//          in y's sums, so that y is written once, rounded once. Where W is bfloat16 all that is multiplied is: first, last and
//          the rows between them are rounded, each by 2^-8 of itself or less, as y is; the sums are float32
// edges    what a panel holds for columns that W does not have is not written
// traffic  W once, 4 or 2 B an element, for all sides; y once; x from the caches, once for every 96 columns
// build    once per instruction set with -DZOKERN_ISA=avx512bf16 | avx512 | avx2 | scalar over the trait simd/<isa>.h, and
//          once without
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

constexpr int64_t kDepth = 384;   // of a panel, in words: numbers, or pairs of them; 36 KB for 24 columns
constexpr int64_t kColumns = 96;  // columns of y at a time, at most: a multiple of every path's kWide
constexpr int64_t kBlock = 256;   // rows of x that meet all panels before the next rows are fetched

struct ThinRows {                  // of a thin product, for all rows of its side
  std::vector<float> inner, rows;  // x first^T, and that times middle
  std::vector<uint16_t> half;      // the latter rounded, where W is bfloat16
};

struct LinearJob {
  const Linear* product;
  std::vector<ThinRows> thins;
  int64_t columns;               // of y at a time: kColumns, or half as many where there are few
  std::vector<int64_t> offsets;  // of every side in a thread's sums
  int64_t rows;                  // of all sides
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
constexpr int kStrip = kLanes == 1 ? kWide : 8;  // rows of W that are turned at a time
constexpr int kBatch = 128;  // columns of W that are turned and made at a time where rows are aligned: 16 or 1 blocks of z
static_assert(kDepth % kBatch == 0 && kBatch % kNormalPerBlock == 0 && kBatch % kRademacherPerBlock == 0);
static_assert(kColumns / 2 % kWide == 0 && kWide % kStrip == 0 && kStrip % Simd::kTranspose == 0 && kColumns % kUnit == 0 &&
              kDepth % 2 == 0);

enum class Order { kUp, kOddFirst, kPairs };  // of k: one at a time, the odd one of two first, or both in one instruction

constexpr Order kBfloat16 = Simd::kPairs ? Order::kPairs : Order::kOddFirst;

Order order_of(Type type) { return type == Type::kBfloat16 ? kBfloat16 : Order::kUp; }

struct Memory {  // of a thread
  alignas(64) float panel[2][kColumns * kDepth];
  alignas(64) float raw[2][kStrip * kDepth];                 // of W's type
  alignas(64) float wide[std::max(kStrip, kRows) * kDepth];  // rows of 16 bits in float32, or in whole pairs
  alignas(64) float turned[kLanes * kBatch];                 // W, k-major; a bfloat16 one in pairs
  alignas(64) uint16_t half[kColumns];
  // then rows x kColumns sums of every side
};

struct Strip {  // rows of `n` words: numbers, or pairs of bfloat16
  const float* from;
  int64_t stride, n;
};

// kStrip rows to kStrip columns of rows `pitch` long; zeros where there are fewer rows
void turn(const Strip& strip, int64_t rows, float* to, int64_t pitch) {
  const auto [from, stride, n] = strip;
  for (int64_t c = 0; c < kStrip; c += Simd::kTranspose) {
    int64_t j = 0;
    if (c + Simd::kTranspose <= rows) {
      for (; j + Simd::kTranspose <= n; j += Simd::kTranspose) {
        Simd::transpose(from + c * stride + j, stride, to + j * pitch + c, pitch);
      }
    }
    for (; j < n; ++j) {
      for (int64_t i = c; i < c + Simd::kTranspose; ++i) to[j * pitch + i] = i < rows ? from[i * stride + j] : 0.0f;
    }
  }
}

// How many columns of x a panel takes
int64_t depth_of(Order order) { return order == Order::kPairs ? 2 * kDepth : kDepth; }

// 16 bits to float32, n of them
void widen_row(Type type, const uint16_t* half, int64_t n, float* value) {
  const int64_t whole = n / kUnit * kUnit;
  widen(type, half, static_cast<int>(n / kUnit), value);
  for (int64_t i = whole; i < n; ++i) value[i] = load(half, type, i);
}

// float32 to bfloat16, n of them
void narrow_row(const float* value, int64_t n, uint16_t* half) {
  const int64_t whole = n / kUnit * kUnit;
  narrow(Type::kBfloat16, value, static_cast<int>(n / kUnit), half);
  if (whole == n) return;
  float last[kUnit] = {};
  uint16_t rounded[kUnit];
  std::memcpy(last, value + whole, static_cast<size_t>(n - whole) * 4);
  narrow(Type::kBfloat16, last, 1, rounded);
  std::memcpy(half + whole, rounded, static_cast<size_t>(n - whole) * 2);
}

// `rows` rows of a matrix in float32: where they lie, or widened into rows of n
const float* in_float(Type type, const void* from, int64_t stride, int64_t rows, int64_t n, Memory& memory) {
  if (type == Type::kFloat32) return static_cast<const float*>(from);
  const uint16_t* half = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < rows; ++i) widen_row(type, half + i * stride, n, memory.wide + i * n);
  return memory.wide;
}

// The same as what a panel is turned from: float32, or whole pairs of bfloat16
Strip in_strip(Type type, const void* from, int64_t stride, int64_t rows, int64_t n, Memory& memory) {
  if (order_of(type) != Order::kPairs) {
    const float* values = in_float(type, from, stride, rows, n, memory);
    return {values, values == memory.wide ? n : stride, n};
  }
  const int64_t words = (n + 1) / 2;
  if (n % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
    return {static_cast<const float*>(from), stride / 2, words};
  }
  const uint16_t* half = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < rows; ++i) {
    memory.wide[(i + 1) * words - 1] = 0.0f;  // the odd one of the last pair
    std::memcpy(memory.wide + i * words, half + i * stride, static_cast<size_t>(n) * 2);
  }
  return {memory.wide, words, words};
}

// `count` rows of a factor, k columns of them, into panels: rounded to bfloat16 where W is one
void make_factor_panels(Type type, const float* from, int64_t stride, int64_t count, int64_t k, Memory& memory) {
  const int64_t padded = (count + kWide - 1) / kWide * kWide;
  for (int64_t q = 0; q < padded; q += kStrip) {
    const int64_t rows = std::max<int64_t>(0, std::min<int64_t>(kStrip, count - q));
    Strip strip{from + q * stride, stride, k};
    if (type == Type::kBfloat16) {
      uint16_t* const half = reinterpret_cast<uint16_t*>(memory.raw[0]);
      for (int64_t i = 0; i < rows; ++i) narrow_row(from + (q + i) * stride, k, half + i * k);
      strip = in_strip(type, half, k, rows, k, memory);
    }
    turn(strip, rows, memory.panel[0] + q / kWide * kWide * strip.n + q % kWide, kWide);
  }
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
      const Strip strip = in_strip(product.type, from, stride, rows, k, memory);
      turn(strip, rows, memory.panel[side] + q / kWide * kWide * strip.n + q % kWide, kWide);
    }
  }
}

// The rows of W that are turned next, fetched a part at a time
struct Ahead {
  const char* from;  // null: none
  int64_t stride, bytes, rows;

  ZO_INLINE void fetch(int64_t part, int64_t parts) const {
    if (from == nullptr) return;
    for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; ++row) {
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + row * stride + byte);
    }
  }
};

// Columns 2 i and 2 i + 1 of kLanes rows of W
template <Type T>
ZO_INLINE void load_two(const float* turned, int64_t i, F& even, F& odd) {
  if constexpr (T == Type::kBfloat16) {
    const U pair = Simd::bits(Simd::load(turned + i * kLanes));
    even = Simd::floats(pair << 16), odd = Simd::floats(pair & 0xffff0000u);
  } else {
    even = Simd::load(turned + 2 * i * kLanes), odd = Simd::load(turned + (2 * i + 1) * kLanes);
  }
}

// The same of a panel, rounded to W's type
template <Type T, class S = Simd>
ZO_INLINE void store_two(float* panel, int64_t i, F even, F odd) {
  if constexpr (T == Type::kBfloat16 && S::kPairs) return S::store(panel + i * kWide, S::pair(even, odd));
  if constexpr (T == Type::kBfloat16) {
    even = S::floats(bf16_round(even) & 0xffff0000u), odd = S::floats(bf16_round(odd) & 0xffff0000u);
  }
  if constexpr (T == Type::kFloat16) even = Simd::round_fp16(even), odd = Simd::round_fp16(odd);
  Simd::store(panel + 2 * i * kWide, even), Simd::store(panel + (2 * i + 1) * kWide, odd);
}

// W + scale z of one draw into the panels of one or two sides: n columns of kLanes rows, whose z begins with `block`. Where
// there are registers for both, the rounds of the next block run beside the values of this one.
template <Direction D, Type T, int kSides>
void add_turned(uint32_t block, uint32_t pitch, const Name& name, int64_t n, const float* turned, const F (&scales)[2],
                float* const (&panels)[2], const Ahead& ahead) {
  constexpr bool kBeside = D == Direction::kNormal && kLanes == 16;
  const Simd::W first = Simd::rows(block, pitch, 0), second = Simd::rows(block, pitch, 1);
  Rounds<2> rounds;
  const auto start = [&](int64_t b) ZO_INLINE_LAMBDA {
    rounds.a[0] = Simd::add(first, static_cast<uint32_t>(b)), rounds.a[1] = Simd::add(second, static_cast<uint32_t>(b));
    rounds.start(name);
  };
  const auto add = [&](int64_t i, F z, F next) ZO_INLINE_LAMBDA {
    F even, odd;
    load_two<T>(turned, i, even, odd);
#pragma GCC unroll 2
    for (int side = 0; side < kSides; ++side) {
      store_two<T>(panels[side], i, Simd::fma(scales[side], z, even), Simd::fma(scales[side], next, odd));
    }
  };
  if constexpr (kBeside) start(0), rounds.template run<0, kPhiloxRounds - 1>(name);
  for (int64_t b = 0; b < n / per_block(D); ++b) {
    ahead.fetch(b, kBatch / per_block(D));
    if constexpr (!kBeside) start(b), rounds.template run<0, kPhiloxRounds - 1>(name);
    U words[4];
    Simd::W w01[2], w23[2];
    rounds.finish(name, w01, w23);
    Simd::split(w01[0], w01[1], words[0], words[1]), Simd::split(w23[0], w23[1], words[2], words[3]);
    if constexpr (kBeside) start(b + 1);
    if constexpr (D == Direction::kNormal) {
      const auto values = [&](int w) ZO_INLINE_LAMBDA {
        F z, next;
        box_muller(words[w], z, next);
        add(4 * b + w, z, next);
      };
      if constexpr (kBeside) rounds.template run<0, 3>(name);
      values(0);
      if constexpr (kBeside) rounds.template run<3, 5>(name);
      values(1);
      if constexpr (kBeside) rounds.template run<5, 7>(name);
      values(2);
      if constexpr (kBeside) rounds.template run<7, kPhiloxRounds - 1>(name);
      values(3);
    } else {
      for (int w = 0; w < 4; ++w) {  // from its last bit down: the sign is the uppermost one
        U word = words[w];
        const int64_t begin = 64 * b + 16 * w;
        for (int64_t i = begin + 15; i >= begin; --i, word = word << 2) {
          const F next = Simd::floats((word & 0x80000000u) | 0x3f800000u);
          add(i, Simd::floats(((word << 1) & 0x80000000u) | 0x3f800000u), next);
        }
      }
    }
  }
}

// make_panels() where every row begins with a block: lanes are rows. Both sides may have a draw of their own.
template <Direction D, Type T>
void make_aligned(const LinearJob& job, const Side* sides, int many, int64_t row, int64_t count, int64_t column, int64_t k,
                  Job& piece, Memory& memory) {
  constexpr int64_t width = per_block(D);
  const Linear& product = *job.product;
  const int64_t words_of = T == Type::kBfloat16 ? 2 : 1;                          // elements of W in a word of `turned`
  const auto quiet = [](float x) { return x == x ? x : as_float(0x7fc00000u); };  // as perturb does
  const F scales[2] = {Simd::all(quiet(sides[0].scale)), Simd::all(many == 2 ? quiet(sides[1].scale) : 0.0f)};
  const bool shared = many == 2 && sides[0].draw == sides[1].draw;
  for (int64_t q = 0; q < count; q += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, count - q);
    for (int64_t j = 0; j < k; j += kBatch) {
      const int64_t n = std::min<int64_t>(kBatch, k - j), offset = (row + q) * product.n + column + j;
      for (int64_t strip = 0; strip < kLanes; strip += kStrip) {
        const int64_t some = std::max<int64_t>(0, std::min<int64_t>(kStrip, rows - strip));
        const void* from = address(product, offset + (some > 0 ? strip : 0) * product.n);
        const Strip words = T == Type::kFloat16 ? Strip{in_float(T, from, product.n, some, n, memory), n, n}
                                                : Strip{static_cast<const float*>(from), product.n / words_of, n / words_of};
        turn(words, some, memory.turned + strip, kLanes);
      }
      const uint32_t block = static_cast<uint32_t>((product.first + static_cast<uint64_t>(offset)) / width);
      const uint32_t pitch = static_cast<uint32_t>(product.n / width);
      const bool last = j + kBatch >= k;  // of these rows: the next ones follow
      const int64_t size = T == Type::kFloat32 ? 4 : 2, there = last ? offset - j + kLanes * product.n : offset + kBatch;
      const int64_t next = last ? std::min<int64_t>(kLanes, count - q - rows) : rows;
      const Ahead ahead{next > 0 ? static_cast<const char*>(address(product, there)) : nullptr, product.n * size, kBatch * size,
                        next};
      const int64_t at = q / kWide * kWide * (Simd::kPairs && T == Type::kBfloat16 ? k / 2 : k) + q % kWide;
      const int64_t down = (Simd::kPairs && T == Type::kBfloat16 ? j / 2 : j) * kWide;
      float* const panels[2] = {memory.panel[0] + at + down, memory.panel[1] + at + down};
      for (int side = 0; side < (shared ? 1 : many); ++side) {
        const Name name{product.who, product.step, static_cast<uint32_t>(sides[side].draw), piece.keys};
        if (shared) {
          add_turned<D, T, 2>(block, pitch, name, n, memory.turned, scales, panels, ahead);
        } else {
          add_turned<D, T, 1>(block, pitch, name, n, memory.turned, {scales[side], scales[side]}, {panels[side], panels[side]},
                              ahead);
        }
      }
    }
  }
}

using Make = void (*)(const LinearJob&, const Side*, int, int64_t, int64_t, int64_t, int64_t, Job&, Memory&);

// make_aligned(), or null where it does not apply
Make aligned_of(const Linear& product) {
  if constexpr (kLanes == 1) return nullptr;
  const auto width = static_cast<uint64_t>(product.direction == Direction::kNormal ? kNormalPerBlock : kRademacherPerBlock);
  const auto start = reinterpret_cast<uintptr_t>(product.weight);
  if (product.transposed || static_cast<uint64_t>(product.n) % width != 0 || product.first % width != 0) return nullptr;
  if (start % 4 != 0) return nullptr;
#define ZO_ALIGNED(D, T) \
  if (product.direction == D && product.type == T) return make_aligned<D, T>;
  ZO_ALIGNED(Direction::kNormal, Type::kFloat32)
  ZO_ALIGNED(Direction::kNormal, Type::kBfloat16)
  ZO_ALIGNED(Direction::kNormal, Type::kFloat16)
  ZO_ALIGNED(Direction::kRademacher, Type::kFloat32)
  ZO_ALIGNED(Direction::kRademacher, Type::kBfloat16)
  ZO_ALIGNED(Direction::kRademacher, Type::kFloat16)
#undef ZO_ALIGNED
  return nullptr;
}

// Rows j and j + 1 of a panel of pairs; a row that does not exist is zeros.
void interleave(const uint16_t* even, const uint16_t* odd, int64_t count, float* to) {
  for (int64_t c = 0; c < count; ++c) {
    to[c] = as_float(even[c] | static_cast<uint32_t>(odd != nullptr ? odd[c] : 0) << 16);
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
      const bool pairs = order_of(product.type) == Order::kPairs;
      const float* values = pairs ? nullptr : in_float(product.type, from, stride, rows, count, memory);
      if (values == memory.wide) stride = count;
      for (int64_t i = 0; i < rows; i += pairs ? 2 : 1) {
        for (int64_t q = 0; q < count; q += kWide) {
          const int64_t some = std::min<int64_t>(kWide, count - q);
          float* const panel = memory.panel[side] + q * (pairs ? (k + 1) / 2 : k);
          float* const to = panel + (pairs ? (j + i) / 2 : j + i) * kWide;
          if (pairs) {
            const uint16_t* even = static_cast<const uint16_t*>(from) + i * stride + q;
            interleave(even, i + 1 < rows ? even + stride : nullptr, some, to);
          } else {
            std::memcpy(to, values + i * stride + q, static_cast<size_t>(some) * 4);
          }
          for (int64_t c = some; c < kWide; ++c) to[c] = 0.0f;
        }
      }
    }
  }
}

// sum + x w, a word of each
template <Order O, class S = Simd>
ZO_INLINE F plus(F x, F w, F sum) {
  if constexpr (O == Order::kPairs) {
    return S::dot(x, w, sum);
  } else {
    return S::fma(x, w, sum);
  }
}

// R rows of x with one panel: sums += x panel, or = where they are the first
template <int R, Order O, int V>
ZO_INLINE void block(const void* rows, int64_t stride, int64_t k, const float* panel, float* sums, bool first) {
  F sum[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[i][v] = first ? Simd::all(0.0f) : Simd::load(sums + i * kColumns + v * kLanes);
  }
  const auto add = [&](const float* words, auto&& one_of) ZO_INLINE_LAMBDA {
    F right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) right[v] = Simd::load(words + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const F one = Simd::all(one_of(i));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[i][v] = plus<O>(one, right[v], sum[i][v]);
    }
  };
  if constexpr (O == Order::kPairs) {
    const uint16_t* const x = static_cast<const uint16_t*>(rows);
    for (int64_t j = 0; j + 1 < k; j += 2, panel += kWide) {
      add(panel, [&](int i) ZO_INLINE_LAMBDA {
        float pair;
        std::memcpy(&pair, x + i * stride + j, 4);
        return pair;
      });
    }
    if (k % 2 != 0) add(panel, [&](int i) ZO_INLINE_LAMBDA { return as_float(uint32_t{x[i * stride + k - 1]}); });
  } else {
    const float* const x = static_cast<const float*>(rows);
    const auto at = [&](int64_t j)
                        ZO_INLINE_LAMBDA { add(panel + j * kWide, [&](int i) ZO_INLINE_LAMBDA { return x[i * stride + j]; }); };
    int64_t j = 0;
    if constexpr (O == Order::kOddFirst) {
      for (; j + 1 < k; j += 2) at(j + 1), at(j);
    }
    for (; j < k; ++j) at(j);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) Simd::store(sums + i * kColumns + v * kLanes, sum[i][v]);
  }
}

template <Order O, int V, int R = kRows>
void rest(int64_t rows, const void* x, int64_t stride, int64_t k, const float* panel, float* sums, bool first) {
  if (rows == R) return block<R, O, V>(x, stride, k, panel, sums, first);
  if constexpr (R > 1) rest<O, V, R - 1>(rows, x, stride, k, panel, sums, first);
}

// Every row of x with every panel, from x's column `column` on; of a panel, V vectors of columns
template <Order O, int V = kVectors>
void sweep_rows(const void* x, int64_t rows, int64_t stride, int64_t column, int64_t k, const float* panels, int64_t count,
                float* sums, bool first) {
  const int64_t words = O == Order::kPairs ? (k + 1) / 2 : k;
  const auto row = [&](int64_t i) {
    return static_cast<const char*>(x) + (i * stride + column) * (O == Order::kPairs ? 2 : 4);
  };
  for (int64_t begin = 0; begin < rows; begin += kBlock) {
    const int64_t end = std::min(rows, begin + kBlock);
    for (int64_t q = 0; q < count; q += kWide) {
      int64_t i = begin;
      for (; i + kRows <= end; i += kRows) {
        block<kRows, O, V>(row(i), stride, k, panels + q * words, sums + i * kColumns + q, first);
      }
      if (i < end) rest<O, V>(end - i, row(i), stride, k, panels + q * words, sums + i * kColumns + q, first);
    }
  }
}

// Rows with the panels of a thin product, whose columns may be few
void sweep_thin(Order order, const void* x, int64_t rows, int64_t stride, int64_t column, int64_t k, const float* panels,
                int64_t count, float* sums, bool first) {
  const int64_t rest = count % kWide, whole = count - rest, words = order == Order::kPairs ? (k + 1) / 2 : k;
  const auto sweep = [&](auto one, auto two, auto three) {
    if (whole > 0) three(x, rows, stride, column, k, panels, whole, sums, first);
    const auto some = rest <= kLanes ? one : rest <= 2 * kLanes ? two : three;
    if (rest > 0) some(x, rows, stride, column, k, panels + whole * words, rest, sums + whole, first);
  };
  if (order == Order::kUp) {
    sweep(sweep_rows<Order::kUp, 1>, sweep_rows<Order::kUp, 2>, sweep_rows<Order::kUp, 3>);
  } else {
    sweep(sweep_rows<kBfloat16, 1>, sweep_rows<kBfloat16, 2>, sweep_rows<kBfloat16, 3>);
  }
}

// The rows of x that a worker takes in the first part of a thin product
struct Share {
  int64_t begin, end;
};

Share share_of(const Side& side, int64_t worker, int64_t workers) {
  return {side.rows * worker / workers, side.rows * (worker + 1) / workers};
}

// inner <- x first^T, for the thin products [t, end) of one `first`
void start_thin(LinearJob& job, int64_t t, int64_t end, int64_t worker, int64_t workers, Memory& memory, float* sums) {
  const Linear& product = *job.product;
  const Thin& thin = product.thins[static_cast<size_t>(t)];
  const Order order = order_of(product.type);
  const auto each = [&](auto&& call) {  // thin product, its side, the worker's share of it, where its sums are
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
        const char* x = static_cast<const char*>(side.x) + share.begin * product.n * (order == Order::kPairs ? 2 : 4);
        sweep_thin(order, x, share.end - share.begin, product.n, column, k, memory.panel[0], count, own, column == 0);
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

// rows <- inner middle, for the rows of one worker, as the last product reads them
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
      sweep_thin(Order::kUp, rows.inner.data() + share.begin * thin.inner, many, thin.inner, column, k, memory.panel[0], count,
                 sums, column == 0);
    }
    for (int64_t i = 0; i < many; ++i) {
      const float* const from = sums + i * kColumns;
      const int64_t at = (share.begin + i) * thin.rank + c;
      if (order == Order::kUp) {
        std::memcpy(rows.rows.data() + at, from, static_cast<size_t>(count) * 4);
      } else {
        narrow_row(from, count, rows.half.data() + at);
        if (order == Order::kOddFirst) widen_row(Type::kBfloat16, rows.half.data() + at, count, rows.rows.data() + at);
      }
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
        sweep(now.x, now.rows, product.n, column, k, memory.panel[side.draw < 0 ? 0 : one - s], count, of(one), column == 0);
      }
      s = end;
    }
  }
  if (product.shrink != 1.0f) {
    for (float* sum = sums; sum < of(sides - 1) + product.sides.back().rows * kColumns; ++sum) *sum *= product.shrink;
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
        const void* const x = order == Order::kPairs ? static_cast<const void*>(rows.half.data()) : rows.rows.data();
        sweep(x, product.sides[static_cast<size_t>(now.side)].rows, now.rank, column, k, memory.panel[0], count, of(now.side),
              false);
      }
    }
    t = end;
  }
  for (int64_t s = 0; s < sides; ++s) {
    finish(product, product.sides[static_cast<size_t>(s)], row, count, of(s), memory.half);
  }
}

// What the thin products start from, for the rows of one worker
extern "C" void ZO_JOIN(zokern_linear_thin_, ZOKERN_ISA)(void* address, int64_t worker, int64_t workers, char* bytes) {
  LinearJob& job = *static_cast<LinearJob*>(address);
  const std::vector<Thin>& all = job.product->thins;
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  float* const sums = reinterpret_cast<float*>(bytes + sizeof(Memory));
  for (size_t t = 0; t < all.size();) {
    size_t end = t;
    int64_t rows = 0;  // no more than there are sums for: a side may come twice
    do {
      rows += job.product->sides[static_cast<size_t>(all[end++].side)].rows;
    } while (end < all.size() && all[end].first == all[t].first && all[end].inner == all[t].inner &&
             rows + job.product->sides[static_cast<size_t>(all[end].side)].rows <= job.rows);
    start_thin(job, static_cast<int64_t>(t), static_cast<int64_t>(end), worker, workers, memory, sums);
    for (; t < end; ++t) turn_thin(job, static_cast<int64_t>(t), worker, workers, memory, sums);
  }
}

// Bytes of a thread, but for the sums
extern "C" int64_t ZO_JOIN(zokern_linear_memory_, ZOKERN_ISA)() { return sizeof(Memory); }

// Whether x is read in bfloat16 where W is
extern "C" bool ZO_JOIN(zokern_linear_pairs_, ZOKERN_ISA)() { return Simd::kPairs; }

}  // namespace zo

#else  // the part that is compiled once: share the columns out

#include <omp.h>

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace zo {
namespace {

constexpr int64_t kSmall = 1 << 15;  // elements of W below which waking a second thread costs more than it saves

constexpr uintptr_t kHuge = 1 << 21;  // a huge page: 512 faults in one

// Asks for huge pages under new memory, where a large result is about to be written; a hint, and no more
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
  job.rows = 0;
  for (const Side& side : product.sides) {
    job.offsets.push_back(job.rows * kColumns), job.rows += side.rows;
    const size_t size = static_cast<size_t>(side.rows * product.m) * (product.type == Type::kFloat32 ? 4 : 2);
    enlarge_pages(side.y, size);
  }
  const size_t bytes = static_cast<size_t>(linear_memory(job.rows));
  const std::unique_ptr<char[], Free> memory(  // here: what throws in a parallel region ends the process
      static_cast<char*>(::operator new[](bytes* static_cast<size_t>(workers), std::align_val_t(64))));
  for (const Thin& thin : product.thins) {
    const size_t many = static_cast<size_t>(product.sides[static_cast<size_t>(thin.side)].rows);
    const size_t inner = static_cast<size_t>(thin.inner), rank = static_cast<size_t>(thin.rank);
    const size_t rounded = product.type == Type::kBfloat16 ? many * rank : 0;
    job.thins.push_back({std::vector<float>(many * inner), std::vector<float>(many * rank), std::vector<uint16_t>(rounded)});
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
