// simd/panels.h: rows of a matrix, turned into panels for a matrix product. linear.cpp includes it
//
// panel    kWide columns of y. For each k it holds kWide numbers, one for each column: the rows of W, turned
// pairs    a word of a bfloat16 panel may hold two numbers, those of k and k + 1 (Order::kPairs)
#pragma once

namespace zo {
namespace {

constexpr int kRows = kLanes == 16 ? 8 : 4;  // with kVectors, sums take 24 of 32 or 12 of 16 registers
constexpr int kVectors = 3;
constexpr int kWide = kVectors * kLanes;
constexpr int kStrip = kLanes == 1 ? kWide : 8;  // rows of W that are turned at a time
constexpr int kBatch = 128;                      // columns of W at a time in aligned.h: 16 blocks of z, or 1
static_assert(kDepth % kBatch == 0 && kBatch % kNormalPerBlock == 0 && kBatch % kRademacherPerBlock == 0);
static_assert(kColumns / 2 % kWide == 0 && kWide % kStrip == 0 && kStrip % Simd::kTranspose == 0 &&
              kColumns % kUnit == 0 && kDepth % 2 == 0);

// The order of k: up, the odd one of two first, or both in one instruction.
enum class Order { kUp, kOddFirst, kPairs };

constexpr Order kBfloat16 = Simd::kPairs ? Order::kPairs : Order::kOddFirst;

Order order_of(Type type) { return type == Type::kBfloat16 ? kBfloat16 : Order::kUp; }

struct Memory {  // of one thread; the sums follow it: rows x kColumns for each side
  alignas(64) float panel[2][kColumns * kDepth];
  alignas(64) float raw[2][kStrip * kDepth];                 // rows in W's type
  alignas(64) float wide[std::max(kStrip, kRows) * kDepth];  // 16-bit rows, widened or in whole pairs
  alignas(64) float turned[kLanes * kBatch];                 // W, turned; in pairs if bfloat16
  alignas(64) uint16_t half[kColumns];
};

struct Strip {  // rows of `n` words; a word is a number, or a pair of bfloat16
  const float* from;
  int64_t stride, n;
};

// Turns kStrip rows into kStrip columns of `to`, whose rows are `pitch` long. Missing rows become zeros.
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
      for (int64_t i = c; i < c + Simd::kTranspose; ++i)
        to[j * pitch + i] = i < rows ? from[i * stride + j] : 0.0f;
    }
  }
}

// The number of columns of x that meet one panel.
int64_t depth_of(Order order) { return order == Order::kPairs ? 2 * kDepth : kDepth; }

// Converts n numbers of a 16-bit type to float32.
void widen_row(Type type, const uint16_t* half, int64_t n, float* value) {
  const int64_t whole = n / kUnit * kUnit;
  widen(type, half, static_cast<int>(n / kUnit), value);
  for (int64_t i = whole; i < n; ++i) value[i] = load(half, type, i);
}

// Rounds n float32 to bfloat16.
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

// Rows of a matrix in float32: in their place, or widened into memory.wide as rows of n.
const float* in_float(Type type, const void* from, int64_t stride, int64_t rows, int64_t n, Memory& memory) {
  if (type == Type::kFloat32) return static_cast<const float*>(from);
  const uint16_t* half = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < rows; ++i) widen_row(type, half + i * stride, n, memory.wide + i * n);
  return memory.wide;
}

// Rows of a matrix in the form that turn() takes: float32, or whole pairs of bfloat16.
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
    memory.wide[(i + 1) * words - 1] = 0.0f;  // the last pair may have no odd number
    std::memcpy(memory.wide + i * words, half + i * stride, static_cast<size_t>(n) * 2);
  }
  return {memory.wide, words, words};
}

// Turns `count` rows and k columns of a factor into panels. It rounds them to bfloat16 if W is bfloat16.
void make_factor_panels(Type type, const float* from, int64_t stride, int64_t count, int64_t k,
                        Memory& memory) {
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

// Writes W + scale z into memory.raw, for one or two sides of a draw: `rows` rows of n elements, from element
// `offset` on, `pitch` apart.
void make_rows(const LinearJob& job, const Side* sides, int many, int64_t offset, int64_t rows, int64_t n,
               int64_t pitch, Job& piece, Memory& memory) {
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
                    0,
                    nullptr,
                    0,
                    0};
  const Chunk chunk{0, rows * n, 0};
  piece.entries = &entry, piece.chunks = &chunk, piece.draws = &draw, piece.scales = scales;
  job.elementwise(&piece, 0);
}

// Turns W, or W + scale z for one or two sides of a draw, into panels:
// `count` rows from `row` on, columns [column, column + k).
void make_panels(const LinearJob& job, const Side* sides, int many, int64_t row, int64_t count,
                 int64_t column, int64_t k, Job& piece, Memory& memory) {
  const Linear& product = *job.product;
  const int64_t padded = (count + kWide - 1) / kWide * kWide;
  for (int64_t q = 0; q < padded; q += kStrip) {
    const int64_t rows = std::max<int64_t>(0, std::min<int64_t>(kStrip, count - q)),
                  offset = (row + q) * product.n + column;
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

// One row of a panel of pairs, from two rows of bfloat16. If `odd` is null it is zeros.
void interleave(const uint16_t* even, const uint16_t* odd, int64_t count, float* to) {
  for (int64_t c = 0; c < count; ++c) {
    to[c] = as_float(even[c] | static_cast<uint32_t>(odd != nullptr ? odd[c] : 0) << 16);
  }
}

// make_panels() for a transposed W: a row of W is a row of the panels. It takes kStrip of them at a time.
void make_panels_of_columns(const LinearJob& job, const Side* sides, int many, int64_t row, int64_t count,
                            int64_t column, int64_t k, Job& piece, Memory& memory) {
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

using Make = void (*)(const LinearJob&, const Side*, int, int64_t, int64_t, int64_t, int64_t, Job&, Memory&);

}  // namespace
}  // namespace zo
