// elementwise.cu: draw, axpy_ and perturb for a list of tensors, on a GPU
//
// math     as elementwise.h: float32 inside, fma in draw order, one rounding; unit u is elements 8 u .. 8 u + 7 of the stream
// traffic  bf16 axpy_: 2 B read + 2 B written per element for any K; perturb: 2 B read + one write per side; z moves no bytes
// work     whole loop per element, sm_90, one draw, no decay: normal 24.4 instructions (16-bit), 23.9 (float32), of which
//          143 of 195 for eight elements are products and float arithmetic of the stream; rademacher 7.0, 6.0; both signs of
//          perturb: normal 26.1 (16-bit), rademacher 7.9; stochastic rounding to bf16 8.6 more, residual 12.6 more; decay
//          1.1 more. Many terms: 21.2 each and 10.6 around them; a replay of steps of one term 28.8 a step, stochastic 36.3.
//          At most 64 registers (perturb, stochastic, residual, many terms: 80; both of these: 128), no spill, sm_80 to sm_120:
//          `python tests/test_sass.py build/cubins`, `python -m benchmarks.predict`, nvcc 13.0
// launch   one persistent grid per list, blocks of 256 threads. A block takes a chunk or, when chunks are few, part of one; a
//          thread takes whole units, with one 16-byte load and store for 16-bit types and two for float32. A warp that has
//          4096 signs to make shares their Philox blocks through 512 bytes of shared memory (sign_tiles). Elements outside
//          whole units, and entries that are strided, gathered, sliced or off a 16-byte boundary, go one at a time, still
//          with one Philox block for the unit.
// equal    bit for bit to zokern/backends/reference.py for every grid: a value depends on its stream number alone, and the
//          count of non-finite results is an integer sum. Conversions in registers (cvt.rn) round as rounding.h does.
// source   Malladi et al. 2023, Algorithm 1; stream: zokern/stream.py, version 1
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "elementwise.h"

#ifndef ZO_LAUNCH  // tests run this file on the host, where a launch is a loop
#define ZO_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace zo {
namespace kernels {  // named, so that a kernel has the same symbol in every build

constexpr int kThreads = 256;
constexpr int kUnit = 8;      // elements a thread handles at a time: one Philox block of `normal`, 16 bytes of a 16-bit type
constexpr int kResident = 4;  // blocks per multiprocessor that registers must allow: 64 registers a thread
constexpr int kResidentMore = 3;  // 80 registers, for perturb and the roundings that make or keep more than a result
constexpr int kResidentMost = 2;  // 128 registers, for many terms with stochastic rounding or low bits
constexpr int kPartsLog2 = 5;     // a chunk of 65536 elements has 32 turns of 256 threads: more parts would be empty

// The key of every round, made once on the host: kernel parameters are operands that cost no instruction.
struct Keys {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

inline Keys make_keys(uint64_t seed) {
  Keys keys;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.k0[round] = static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * kPhiloxW0;
    keys.k1[round] = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * kPhiloxW1;
  }
  return keys;
}

// What all blocks of one z share. who, step and draw are the same for a whole entry, so round 1 multiplies only the block
// number, half of round 2 is known beforehand, and the known part of an exclusive or is one operand: 18 products of 20.
struct Name {
  uint32_t x2_1, x0_2, x2_2, x2_3;  // what is xored into word x of round r

  __device__ __forceinline__ explicit Name(const uint4& words) : x2_1(words.x), x0_2(words.y), x2_2(words.z), x2_3(words.w) {}
  __device__ __forceinline__ uint4 words() const { return make_uint4(x2_1, x0_2, x2_2, x2_3); }

  __device__ __forceinline__ Name(uint32_t who, uint32_t step, uint32_t draw, const Keys& keys) {
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * step;
    const uint64_t p2 = static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(p1 >> 32) ^ who ^ keys.k0[0]);
    x2_1 = draw ^ keys.k1[0];
    x0_2 = static_cast<uint32_t>(p1) ^ keys.k0[1];
    x2_2 = static_cast<uint32_t>(p2 >> 32) ^ keys.k1[1];
    x2_3 = static_cast<uint32_t>(p2) ^ keys.k1[2];
  }
};

// `first` is the product of round 1, kPhiloxM0 * block: the same for every name, so a loop over names makes it once.
__device__ __forceinline__ Words philox_from(uint64_t first, const Name& name, const Keys& keys) {
  const uint64_t second = static_cast<uint64_t>(kPhiloxM1) * (static_cast<uint32_t>(first >> 32) ^ name.x2_1);
  uint32_t x0 = static_cast<uint32_t>(second >> 32) ^ name.x0_2, x1 = static_cast<uint32_t>(second);
  uint32_t x2 = name.x2_2 ^ static_cast<uint32_t>(first), x3 = 0;
#pragma unroll
  for (int round = 2; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * x2;
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ keys.k0[round];
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ (round == 2 ? name.x2_3 : x3 ^ keys.k1[round]);
    x3 = static_cast<uint32_t>(p0);
  }
  return Words{{x0, x1, x2, x3}};
}

__device__ __forceinline__ Words philox_named(uint32_t block, const Name& name, const Keys& keys) {
  return philox_from(static_cast<uint64_t>(kPhiloxM0) * block, name, keys);
}

// A pointer read from a table, which the compiler must be told is global memory.
template <class T>
__device__ __forceinline__ T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// 64-bit numerator / divisor, by shift and subtract: nvcc divides integers through MUFU.RCP, and a file without any
// approximation is a file whose machine code can be checked for it.
__device__ __forceinline__ int64_t divide(int64_t numerator, int64_t divisor) {
  uint64_t left = static_cast<uint64_t>(numerator), quotient = 0;
  int shift = 0;
  while (static_cast<uint64_t>(divisor) << shift <= left >> 1) ++shift;
  for (; shift >= 0; --shift) {
    const uint64_t part = static_cast<uint64_t>(divisor) << shift;
    quotient <<= 1;
    if (part <= left) left -= part, quotient |= 1;
  }
  return static_cast<int64_t>(quotient);
}

__device__ __forceinline__ void signs(uint32_t byte, float (&z)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) z[i] = rademacher_sign(byte, static_cast<uint32_t>(i));
}

// The block of `kDirection` that a unit's z is in, times kPhiloxM0.
template <Direction kDirection>
__device__ __forceinline__ uint64_t first_product(uint32_t unit) {
  return static_cast<uint64_t>(kPhiloxM0) * (kDirection == Direction::kNormal ? unit : unit >> 4);
}

// The z of one unit. For `rademacher`, 16 units share a block: this computes it for one of them (sign_tiles for all).
template <Direction kDirection>
__device__ __forceinline__ void values(uint64_t first, uint32_t unit, const Name& name, const Keys& keys, float (&z)[kUnit]) {
  const Words words = philox_from(first, name, keys);
  if constexpr (kDirection == Direction::kNormal) {
#pragma unroll
    for (int j = 0; j < 4; ++j) normal_pair(words.w[j], z[2 * j], z[2 * j + 1]);
  } else {
    const uint32_t low = unit & 4u ? words.w[1] : words.w[0];
    const uint32_t high = unit & 4u ? words.w[3] : words.w[2];
    signs((unit & 8u ? high : low) >> ((unit & 3u) * 8u), z);
  }
}

template <Direction kDirection>
__device__ __forceinline__ void values(uint32_t unit, const Name& name, const Keys& keys, float (&z)[kUnit]) {
  values<kDirection>(first_product<kDirection>(unit), unit, name, keys, z);
}

// Eight consecutive values of one type, at a 16-byte boundary.
struct Pack {
  uint32_t w[4];
};

__device__ __forceinline__ Pack load_pack(const void* from) {
  const uint4 four = *global(static_cast<const uint4*>(from));
  return Pack{{four.x, four.y, four.z, four.w}};
}

__device__ __forceinline__ void store_pack(void* to, const Pack& pack) {
  *global(static_cast<uint4*>(to)) = make_uint4(pack.w[0], pack.w[1], pack.w[2], pack.w[3]);
}

// Two float32 to two halves in one instruction; rounding.h says what it computes.
template <Type kType>
__device__ __forceinline__ uint32_t nearest_pair(float even, float odd) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if constexpr (kType == Type::kBfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
  }
  return pair;
#else
  if constexpr (kType == Type::kBfloat16) return bf16_nearest(even) | static_cast<uint32_t>(bf16_nearest(odd)) << 16;
  return fp16_nearest(even) | static_cast<uint32_t>(fp16_nearest(odd)) << 16;
#endif
}

template <Type kType>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float& even, float& odd) {
  if constexpr (kType == Type::kBfloat16) {
    even = as_float(pair << 16);
    odd = as_float(pair & 0xffff0000u);
  } else {
#if defined(__CUDA_ARCH__)
    asm("{.reg .b16 e, o; mov.b32 {e, o}, %2; cvt.f32.f16 %0, e; cvt.f32.f16 %1, o;}" : "=f"(even), "=f"(odd) : "r"(pair));
#else
    even = fp16_to_float(static_cast<uint16_t>(pair));
    odd = fp16_to_float(static_cast<uint16_t>(pair >> 16));
#endif
  }
}

// Unit i of a run of units that begins at `base`, where each takes 16 bytes in a 16-bit type and 32 in float32. A 32-bit i
// makes the address one instruction.
template <class T>
__device__ __forceinline__ T* unit_at(T* base, uint32_t i, uint64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + i * bytes);
}

template <Type kType>
__device__ __forceinline__ void load_unit(const void* base, uint32_t i, float (&v)[kUnit]) {
  if constexpr (kType == Type::kFloat32) {
    const float* from = unit_at(static_cast<const float*>(base), i, 32);
    const Pack low = load_pack(from), high = load_pack(from + 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = as_float(low.w[j]), v[4 + j] = as_float(high.w[j]);
  } else {
    const Pack pack = load_pack(unit_at(static_cast<const uint16_t*>(base), i, 16));
#pragma unroll
    for (int j = 0; j < 4; ++j) unpack_pair<kType>(pack.w[j], v[2 * j], v[2 * j + 1]);
  }
}

// A unit in the type that it is stored in: 4 words of two halves, or 8 of one float32.
template <Type kType>
struct Stored {
  static constexpr int kWords = kType == Type::kFloat32 ? 8 : 4;
  uint32_t w[kWords];
};

template <Type kType>
__device__ __forceinline__ Stored<kType> nearest(const float (&v)[kUnit]) {
  Stored<kType> unit;
#pragma unroll
  for (int j = 0; j < unit.kWords; ++j) {
    if constexpr (kType == Type::kFloat32) {
      unit.w[j] = as_bits(v[j]);
    } else {
      unit.w[j] = nearest_pair<kType>(v[2 * j], v[2 * j + 1]);
    }
  }
  return unit;
}

template <Type kType>
__device__ __forceinline__ Stored<kType> stochastic(const float (&v)[kUnit], const Words& random) {
  static_assert(kType != Type::kFloat32);
  Stored<kType> unit;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t first = random.w[j] & 0xffffu, second = random.w[j] >> 16;
    if constexpr (kType == Type::kBfloat16) {
      unit.w[j] = bf16_stochastic(v[2 * j], first) | bf16_stochastic(v[2 * j + 1], second) << 16;
    } else {
      unit.w[j] = fp16_stochastic(v[2 * j], first) | fp16_stochastic(v[2 * j + 1], second) << 16;
    }
  }
  return unit;
}

template <Type kType>
__device__ __forceinline__ void store_unit(void* base, uint32_t i, const Stored<kType>& unit) {
  if constexpr (kType == Type::kFloat32) {
    float* to = unit_at(static_cast<float*>(base), i, 32);
    store_pack(to, Pack{{unit.w[0], unit.w[1], unit.w[2], unit.w[3]}});
    store_pack(to + 4, Pack{{unit.w[4], unit.w[5], unit.w[6], unit.w[7]}});
  } else {
    store_pack(unit_at(static_cast<uint16_t*>(base), i, 16), Pack{{unit.w[0], unit.w[1], unit.w[2], unit.w[3]}});
  }
}

__device__ __forceinline__ void load_joined(const void* base, const int16_t* residual, uint32_t i, float (&v)[kUnit]) {
  const Pack high = load_pack(unit_at(static_cast<const uint16_t*>(base), i, 16)), low = load_pack(unit_at(residual, i, 16));
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const uint32_t shift = static_cast<uint32_t>(j & 1) * 16u;
    v[j] = residual_join(static_cast<uint16_t>(high.w[j >> 1] >> shift), static_cast<int16_t>(low.w[j >> 1] >> shift));
  }
}

// The whole units [begin, end) of a chunk whose elements follow one another in the stream and in memory at 16-byte boundaries;
// empty where there are none. Element i of unit u is element 8 u + i - first of the entry.
struct Units {
  uint64_t begin, end;
};

__device__ __forceinline__ int64_t width(int32_t type) { return static_cast<Type>(type) == Type::kFloat32 ? 4 : 2; }

__device__ __forceinline__ Units whole_units(const Entry& e, const Chunk& chunk) {
  Units units = {(e.first + static_cast<uint64_t>(chunk.begin) + kUnit - 1) / kUnit,
                 (e.first + static_cast<uint64_t>(chunk.end)) / kUnit};
  const bool one_row = e.row_count == 1;
  const bool numbered = e.rows == nullptr && (one_row || e.pitch == static_cast<uint64_t>(e.columns));
  const bool dense = e.theta == nullptr || (e.column_stride == 1 && (one_row || e.row_stride == e.columns));
  if (!numbered || !dense || units.begin >= units.end) return Units{0, 0};
  const int64_t at = static_cast<int64_t>(units.begin * kUnit - e.first);
  uintptr_t addresses = 0;
  if (e.theta != nullptr) addresses |= reinterpret_cast<uintptr_t>(e.theta) + at * width(e.type);
  if (e.out[0] != nullptr) addresses |= reinterpret_cast<uintptr_t>(e.out[0]) + at * width(e.out_type);
  if (e.out[1] != nullptr) addresses |= reinterpret_cast<uintptr_t>(e.out[1]) + at * width(e.out_type);
  if (e.residual != nullptr) addresses |= reinterpret_cast<uintptr_t>(e.residual + at);
  return addresses % 16 == 0 ? units : Units{0, 0};
}

// The whole units of a chunk, numbered from 0: unit i of them is unit `begin` + i of the stream and lies at byte 16 i or 32 i
// of each buffer. Read once, before the loop: for all the compiler knows, a store could change the table.
struct Place {
  void* theta;
  void* out[2];
  int16_t* residual;
  uint32_t begin, count, who;

  __device__ __forceinline__ Place(const Entry& e, const Units& whole)
      : begin(static_cast<uint32_t>(whole.begin)), count(static_cast<uint32_t>(whole.end - whole.begin)), who(e.who) {
    const int64_t at = static_cast<int64_t>(whole.begin * kUnit - e.first);
    theta = unit_base(e.theta, at, e.type);
    out[0] = unit_base(e.out[0], at, e.out_type);
    out[1] = unit_base(e.out[1], at, e.out_type);
    residual = e.residual == nullptr ? nullptr : e.residual + at;
  }

  __device__ __forceinline__ static void* unit_base(void* base, int64_t at, int32_t type) {
    return base == nullptr ? nullptr : static_cast<char*>(base) + at * width(type);
  }
};

// How the threads of a launch divide a chunk: this thread takes units lane, lane + lanes, ...; `alone` says that one block has
// the chunk for itself.
struct Turn {
  uint32_t lane, lanes;
  bool alone;
};

constexpr int kWarp = 32, kSteps = 16;      // a tile: 32 blocks of signs, used up by 32 lanes in 16 steps of one unit each
constexpr int kTileUnits = kWarp * kSteps;  // 4096 elements

// Signs for whole tiles: lane l computes block l of the tile, the warp keeps the tile's 4096 signs as the 512 bytes that they
// are, and lane l's unit in step s needs byte 32 s + l of them. So a block is computed once, where unit by unit it would be 16
// times.
template <class Body>
__device__ __forceinline__ uint32_t sign_tiles(const Place& place, uint32_t head, const Name& name, const Keys& keys,
                                               Body& body) {
  __shared__ uint4 tile_words[kThreads];
  const uint32_t thread = threadIdx.x, lane = thread % kWarp, tiles = (place.count - head) / kTileUnits;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(tile_words + (thread - lane)) + lane;
#pragma unroll 1
  for (uint32_t tile = thread / kWarp; tile < tiles; tile += kThreads / kWarp) {
    const uint32_t i = head + tile * kTileUnits;
    const Words words = philox_named((place.begin + i) / 16u + lane, name, keys);
    __syncwarp();  // the tile before has been read
    tile_words[thread] = make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]);
    __syncwarp();
#pragma unroll 4
    for (uint32_t step = 0; step < kSteps; ++step) {
      const uint32_t byte = bytes[step * kWarp];
      body.unit(i + lane + step * kWarp, [&](float (&z)[kUnit]) { signs(byte, z); });
    }
    body.settle(i + lane, i + kTileUnits, kWarp);
  }
  return tiles * kTileUnits;
}

// Every whole unit of the chunk, each by one thread of the launch: body.unit(i, z_of) with z_of(z) filling in its z, and
// body.settle(i, end, stride) after units i, i + stride, ... below end.
template <Direction kDirection, class Body>
__device__ __forceinline__ void each_unit(const Place& place, const Turn& turn, const Name& name, const Keys& keys,
                                          Body& body) {
  uint32_t head = 0, tiled = 0;
  if constexpr (kDirection == Direction::kRademacher) {
    head = (0u - place.begin) % 16u;
    if (turn.alone && head + kTileUnits <= place.count) tiled = sign_tiles(place, head, name, keys, body);
  }
  uint32_t begin = tiled == 0 ? 0 : head + tiled;  // after the tiles, then before them
#pragma unroll 1
  for (uint32_t end = place.count;; begin = 0, end = head) {
    for (uint32_t i = begin + turn.lane; i < end; i += turn.lanes) {
      body.unit(i, [&](float (&z)[kUnit]) { values<kDirection>(place.begin + i, name, keys, z); });
    }
    body.settle(begin + turn.lane, end, turn.lanes);
    if (kDirection == Direction::kNormal || begin == 0) break;
  }
}

// Some elements [low, high) of a unit, anywhere. Element i lies at theta + at + i stride, residual + residual_at + i and
// out + to + i.
struct Piece {
  uint32_t unit;
  int low, high;
  int64_t at, stride, residual_at, to;
};

// Every element of the chunk that is in no whole unit, one Piece at a time.
template <class Verb>
__device__ __forceinline__ void pieces(Verb& verb, const Entry& e, const Chunk& chunk, const Units& whole, uint32_t lane,
                                       uint32_t lanes) {
  const bool merged =
      e.rows == nullptr &&
      (e.row_count == 1 || (e.pitch == static_cast<uint64_t>(e.columns) && e.row_stride == e.columns * e.column_stride));
  const int64_t columns = merged ? e.row_count * e.columns : e.columns;
  const int64_t first_row = merged ? 0 : divide(chunk.begin, columns);
  const int64_t last_row = merged ? 0 : divide(chunk.end - 1, columns);
  const uint32_t rows = static_cast<uint32_t>(last_row - first_row) + 1;  // a chunk has less than 2^28 elements
  const bool edges = whole.begin < whole.end;
  // A row of c columns touches at most c / 8 + 2 units; next to whole units only the one before and the one after are left.
  // Rows get a power of two of turns each: some are empty, and none needs a division.
  const int64_t longest = columns < chunk.end - chunk.begin ? columns : chunk.end - chunk.begin;
  const uint32_t per_row = edges ? 2 : static_cast<uint32_t>(longest / kUnit) + 2;
  int shift = 1;
  while (1u << shift < per_row) ++shift;
  for (uint32_t item = lane; item < rows << shift; item += lanes) {
    const int64_t row = first_row + (item >> shift);
    const uint32_t slot = item & ((1u << shift) - 1);
    if (slot >= per_row) continue;
    const int64_t begin = row == first_row ? chunk.begin - row * columns : 0;
    const int64_t end = row == last_row ? chunk.end - row * columns : columns;
    const int64_t source = e.rows != nullptr ? e.rows[row] : row;
    const uint64_t number = e.first + static_cast<uint64_t>(source) * e.pitch;
    const uint64_t unit =
        edges ? (slot == 0 ? whole.begin - 1 : whole.end) : (number + static_cast<uint64_t>(begin)) / kUnit + slot;
    const int64_t column = static_cast<int64_t>(unit * kUnit - number);  // of the unit's element 0; may lie outside the row
    Piece piece;
    piece.low = static_cast<int>(begin > column ? (begin - column < kUnit ? begin - column : kUnit) : 0);
    piece.high = static_cast<int>(end - column < kUnit ? end - column : kUnit);
    if (piece.low >= piece.high) continue;
    piece.unit = static_cast<uint32_t>(unit);
    piece.at = source * e.row_stride + column * e.column_stride;
    piece.stride = e.column_stride;
    piece.residual_at = source * columns + column;
    piece.to = row * columns + column;
    verb.piece(e, piece);
  }
}

// Chunks to blocks. 2^parts_log2 blocks share a chunk; a verb takes the whole units it has an instance for, then the pieces.
template <class Verb>
__device__ __forceinline__ void run(Verb& verb, const Entry* entries, const Chunk* chunks, int64_t chunk_count,
                                    int parts_log2) {
  for (int64_t turn = blockIdx.x; turn < chunk_count << parts_log2; turn += gridDim.x) {
    const Chunk chunk = chunks[turn >> parts_log2];
    if (chunk.begin >= chunk.end) continue;
    const Entry& e = entries[chunk.entry];
    const int64_t part = turn & ((int64_t{1} << parts_log2) - 1);
    const uint32_t lane = static_cast<uint32_t>(part) * kThreads + threadIdx.x, lanes = uint32_t{kThreads} << parts_log2;
    Units whole = whole_units(e, chunk);
    if (whole.begin < whole.end) {
      const Turn units = {lane, lanes, parts_log2 == 0};
      if (!verb.units(e, whole, units)) whole = Units{0, 0};
    }
    pieces(verb, e, chunk, whole, lane, lanes);
  }
}

template <Direction kDirection>
struct DrawVerb {
  const Keys& keys;
  uint32_t step, draw;

  template <Type kType>
  struct Body {
    void* out;

    template <class Z>
    __device__ __forceinline__ void unit(uint32_t i, const Z& z_of) {
      float z[kUnit];
      z_of(z);
      store_unit<kType>(out, i, nearest<kType>(z));
    }
    __device__ __forceinline__ void settle(uint32_t, uint32_t, uint32_t) {}
  };

  template <Type kType>
  __device__ __forceinline__ bool loop(const Place& place, const Turn& turn) {
    Body<kType> body{place.out[0]};
    each_unit<kDirection>(place, turn, Name(place.who, step, draw, keys), keys, body);
    return true;
  }

  __device__ __forceinline__ bool units(const Entry& e, const Units& whole, const Turn& turn) {
    const Place place(e, whole);
    switch (static_cast<Type>(e.out_type)) {
      case Type::kFloat32:
        return loop<Type::kFloat32>(place, turn);
      case Type::kBfloat16:
        return loop<Type::kBfloat16>(place, turn);
      case Type::kFloat16:
        return loop<Type::kFloat16>(place, turn);
    }
    return false;
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    float z[kUnit];
    values<kDirection>(p.unit, Name(e.who, step, draw, keys), keys, z);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i >= p.low && i < p.high) store_nearest(e.out[0], static_cast<Type>(e.out_type), p.to + i, z[i]);
    }
  }
};

template <Type kType>
__device__ __forceinline__ void load_stored(const void* base, uint32_t i, Stored<kType>& unit) {
  const char* from = unit_at(static_cast<const char*>(base), i, kType == Type::kFloat32 ? 32 : 16);
#pragma unroll
  for (int j = 0; j < unit.kWords; j += 4) {
    const Pack pack = load_pack(from + 4 * j);
#pragma unroll
    for (int k = 0; k < 4; ++k) unit.w[j + k] = pack.w[k];
  }
}

// Sees inf and NaN at half an instruction per 16-bit element: 0 x + state is 0 until x is not finite, and a NaN from then on.
template <Type kType>
struct Watch {
  uint32_t state = 0;

  __device__ __forceinline__ void see(uint32_t bits) {  // one float32, or two halves
#if defined(__CUDA_ARCH__)
    if constexpr (kType == Type::kFloat32) {
      state = as_bits(fma_rn(as_float(bits), 0.0f, as_float(state)));
    } else if constexpr (kType == Type::kBfloat16) {
      asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(state) : "r"(bits), "r"(0));
    } else {
      asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(state) : "r"(bits), "r"(0));
    }
#else
    constexpr uint32_t kInfinity = kType == Type::kFloat32 ? 0x7f800000u : kType == Type::kBfloat16 ? 0x7f80u : 0x7c00u;
    const bool high = kType != Type::kFloat32 && ((bits >> 16) & kInfinity) == kInfinity;
    if ((bits & kInfinity) == kInfinity || high) state = 1;
#endif
  }

  __device__ __forceinline__ bool seen() const { return (state & (kType == Type::kFloat32 ? 0x7fffffffu : 0x7fff7fffu)) != 0; }
};

__device__ __forceinline__ bool is_nonfinite(Type type, uint32_t bits) {
  const uint32_t exponent = type == Type::kFloat32 ? 0x7f800000u : type == Type::kBfloat16 ? 0x7f80u : 0x7c00u;
  return (bits & exponent) == exponent;
}

// The terms a_k z_k: coefficients, names and decays in device memory, and the last name and decay by value, so that a sum of
// one term reads no list of names. Every `each` terms are a sum: they begin with a decay and end with a rounding. `clock` is
// what the launch adds to every step number.
struct Terms {
  const Draw* draws;
  const float* coefficients;
  int32_t count, each;
  uint32_t clock;
  Draw last;

  __device__ __forceinline__ Draw at(int32_t k) const { return k + 1 < count ? draws[k] : last; }
};

// A term as `many` wants it: 32 bytes of shared memory, read by all lanes at once.
struct Ready {
  uint4 name;
  float coefficient, decay;
  uint32_t step, reserved;

  Ready() = default;
  __device__ __forceinline__ Ready(const Draw& term, float a, uint32_t who, uint32_t clock, const Keys& keys)
      : name(Name(who, term.step + clock, term.draw, keys).words()),
        coefficient(a),
        decay(term.decay),
        step(term.step + clock),
        reserved(0) {}
};

constexpr int kTogether = 2;  // units that a thread adds a term to: what does not depend on the unit costs half

// kPlain: one term, and where kDecay a decay; otherwise any number of both
template <Direction kDirection, Rounding kRounding, bool kPlain, bool kDecay>
struct AxpyVerb {
  const Keys& keys;
  const Terms terms;
  float coefficient;   // of a plain sum
  uint32_t nonfinite;  // of this thread

  __device__ __forceinline__ uint32_t last_step() const { return terms.last.step + terms.clock; }
  __device__ __forceinline__ float decayed(float x) const { return kDecay ? mul_rn(terms.last.decay, x) : x; }

  template <Type kType>
  struct Body {
    static constexpr bool kJoin = kRounding == Rounding::kResidual && kType == Type::kBfloat16;
    static constexpr bool kRandom = kRounding == Rounding::kStochastic && kType != Type::kFloat32;
    AxpyVerb& verb;
    const Place& place;
    const Name& random_name;  // of a plain sum
    Watch<kType> watch;

    __device__ __forceinline__ void load(uint32_t i, float (&v)[kUnit]) const {
      if constexpr (kJoin) {
        load_joined(place.theta, place.residual, i, v);
      } else {
        load_unit<kType>(place.theta, i, v);
      }
    }

    __device__ __forceinline__ void store(uint32_t i, const Stored<kType>& result) {
      store_unit<kType>(place.theta, i, result);
#pragma unroll
      for (int j = 0; j < result.kWords; ++j) watch.see(result.w[j]);
    }

    // to nearest, or with its low bits
    __device__ __forceinline__ void store(uint32_t i, const float (&v)[kUnit]) {
      if constexpr (kJoin) {
        Stored<kType> result;
        Stored<Type::kBfloat16> low;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int16_t low_even, low_odd;
          const uint32_t even = residual_split(v[2 * j], low_even), odd = residual_split(v[2 * j + 1], low_odd);
          result.w[j] = even | odd << 16;
          low.w[j] = static_cast<uint16_t>(low_even) | static_cast<uint32_t>(static_cast<uint16_t>(low_odd)) << 16;
        }
        store_unit<Type::kBfloat16>(place.residual, i, low);
        store(i, result);
      } else {
        store(i, nearest<kType>(v));
      }
    }

    // of a plain sum
    template <class Z>
    __device__ __forceinline__ void unit(uint32_t i, const Z& z_of) {
      float v[kUnit], z[kUnit];
      load(i, v);
      z_of(z);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) v[j] = fma_rn(verb.coefficient, z[j], verb.decayed(v[j]));
      if constexpr (kRandom) {
        store(i, stochastic<kType>(v, philox_named(place.begin + i, random_name, verb.keys)));
      } else {
        store(i, v);
      }
    }

    // The end of a sum: what storing v and loading it again would make of it. A float32 with its low bits is exact.
    __device__ __forceinline__ void round(uint32_t i, const Name& random, float (&v)[kUnit]) const {
      if constexpr (kRandom) {
        unpack(stochastic<kType>(v, philox_named(place.begin + i, random, verb.keys)), v);
      } else if constexpr (kType != Type::kFloat32 && !kJoin) {
        unpack(nearest<kType>(v), v);
      }
    }

    __device__ __forceinline__ static void unpack(const Stored<kType>& unit, float (&v)[kUnit]) {
#pragma unroll
      for (int j = 0; j < unit.kWords; ++j) unpack_pair<kType>(unit.w[j], v[2 * j], v[2 * j + 1]);
    }

    // The loop only watches whether a result was not finite; if one was, the thread reads its results again and counts.
    __device__ __forceinline__ void settle(uint32_t i, uint32_t end, uint32_t stride) {
      if (!watch.seen()) return;
      watch.state = 0;
#pragma unroll 1
      for (; i < end; i += stride) {
        Stored<kType> result;
        load_stored<kType>(place.theta, i, result);
#pragma unroll
        for (int j = 0; j < result.kWords; ++j) {
          verb.nonfinite += is_nonfinite(kType, result.w[j]);
          if (kType != Type::kFloat32) verb.nonfinite += is_nonfinite(kType, result.w[j] >> 16);
        }
      }
    }
  };

  template <Type kType>
  __device__ __forceinline__ bool loop(const Place& place, const Turn& turn) {
    const Name random(place.who, last_step(), kRoundingDraw, keys);
    Body<kType> body{*this, place, random, {}};
    if constexpr (kPlain) {
      each_unit<kDirection>(place, turn, Name(place.who, last_step(), terms.last.draw, keys), keys, body);
    } else {
      many(place, turn, body);
    }
    return true;
  }

  // Any number of terms. A warp makes 32 of them ready at a time, one a lane, in its own part of shared memory: what a name
  // needs before it meets a block is then computed once in 32 lanes and not by each thread for each unit.
  template <class Body>
  __device__ __forceinline__ void many(const Place& place, const Turn& turn, Body& body) {
    __shared__ Ready all[kThreads];
    const uint32_t lane = threadIdx.x % kWarp;
    Ready* const terms_of_warp = all + (threadIdx.x - lane);
    const auto ready = [&](int32_t k) {
      __syncwarp();  // the 32 before have been used
      k += static_cast<int32_t>(lane);
      if (k < terms.count) all[threadIdx.x] = Ready(terms.at(k), terms.coefficients[k], place.who, terms.clock, keys);
      __syncwarp();
    };
    if (terms.count <= kWarp) ready(0);
    // the same number of turns for all lanes of a warp
#pragma unroll 1
    for (uint32_t i = turn.lane; i - lane < place.count; i += kTogether * turn.lanes) {
      float v[kTogether][kUnit] = {};
      uint64_t first[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (i + u * turn.lanes < place.count) body.load(i + u * turn.lanes, v[u]);
        first[u] = first_product<kDirection>(place.begin + i + u * turn.lanes);
      }
      int32_t left = 0;  // terms of the sum that has begun
#pragma unroll 1
      for (int32_t k = 0; k < terms.count;) {
        const int32_t slot = k % kWarp;
        if (slot == 0 && terms.count > kWarp) ready(k);
        const Ready* term = terms_of_warp + slot;
        if (left == 0) {
          left = terms.each;
#pragma unroll
          for (int u = 0; u < kTogether; ++u) {
#pragma unroll
            for (int j = 0; j < kUnit; ++j) v[u][j] = mul_rn(term->decay, v[u][j]);
          }
        }
        const int32_t here = slot + left < kWarp ? left : kWarp - slot;
        const Ready* const end = term + here;
#pragma unroll 2
        for (; term != end; ++term) {
          const Name name(term->name);
          const float factor = term->coefficient;
#pragma unroll
          for (int u = 0; u < kTogether; ++u) {
            float z[kUnit];
            values<kDirection>(first[u], place.begin + i + u * turn.lanes, name, keys, z);
#pragma unroll
            for (int j = 0; j < kUnit; ++j) v[u][j] = fma_rn(factor, z[j], v[u][j]);
          }
        }
        k += here, left -= here;
        if (left == 0 && (Body::kRandom || k < terms.count)) {
          const Name random(place.who, (term - 1)->step, kRoundingDraw, keys);
#pragma unroll
          for (int u = 0; u < kTogether; ++u) body.round(i + u * turn.lanes, random, v[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (i + u * turn.lanes < place.count) body.store(i + u * turn.lanes, v[u]);
      }
    }
    body.settle(turn.lane, place.count, turn.lanes);
  }

  __device__ __forceinline__ bool units(const Entry& e, const Units& whole, const Turn& turn) {
    const Place place(e, whole);
    switch (static_cast<Type>(e.type)) {
      case Type::kFloat32:
        return loop<Type::kFloat32>(place, turn);
      case Type::kBfloat16:
        if (kRounding == Rounding::kResidual && e.residual == nullptr) return false;
        return loop<Type::kBfloat16>(place, turn);
      case Type::kFloat16:
        return loop<Type::kFloat16>(place, turn);
    }
    return false;
  }

  // element i of a unit in a 16-bit type
  template <bool kStochastic>
  __device__ __forceinline__ static uint32_t rounded(Type type, float value, const Words& random, int i) {
    const uint32_t some = (random.w[i >> 1] >> ((i & 1) * 16)) & 0xffffu;
    if (type == Type::kBfloat16) return kStochastic ? bf16_stochastic(value, some) : bf16_nearest(value);
    return kStochastic ? fp16_stochastic(value, some) : fp16_nearest(value);
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    const Type type = static_cast<Type>(e.type);
    const bool join = kRounding == Rounding::kResidual && type == Type::kBfloat16 && e.residual != nullptr;
    constexpr bool kStochastic = kRounding == Rounding::kStochastic;
    float v[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      v[i] = 0.0f;
      if (i < p.low || i >= p.high) continue;
      const int64_t at = p.at + i * p.stride;
      v[i] = join ? residual_join(static_cast<const uint16_t*>(e.theta)[at], e.residual[p.residual_at + i])
                  : load(e.theta, type, at);
    }
    Words random = {};
    float z[kUnit];
    if constexpr (kPlain) {
      if constexpr (kStochastic) random = philox_named(p.unit, Name(e.who, last_step(), kRoundingDraw, keys), keys);
      values<kDirection>(p.unit, Name(e.who, last_step(), terms.last.draw, keys), keys, z);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) v[i] = fma_rn(coefficient, z[i], decayed(v[i]));
    } else {
#pragma unroll 1
      for (int32_t k = 0, left = 0; k < terms.count; ++k) {
        const Draw term = terms.at(k);
        if (left == 0) {
          left = terms.each;
#pragma unroll
          for (int i = 0; i < kUnit; ++i) v[i] = mul_rn(term.decay, v[i]);
        }
        values<kDirection>(p.unit, Name(e.who, term.step + terms.clock, term.draw, keys), keys, z);
        const float factor = terms.coefficients[k];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) v[i] = fma_rn(factor, z[i], v[i]);
        if (--left != 0 || type == Type::kFloat32 || join || (!kStochastic && k + 1 == terms.count)) continue;
        Words random = {};
        if constexpr (kStochastic) {
          random = philox_named(p.unit, Name(e.who, term.step + terms.clock, kRoundingDraw, keys), keys);
        }
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          const uint16_t half = static_cast<uint16_t>(rounded<kStochastic>(type, v[i], random, i));
          v[i] = type == Type::kBfloat16 ? bf16_to_float(half) : fp16_to_float(half);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i < p.low || i >= p.high) continue;
      const int64_t at = p.at + i * p.stride;
      uint32_t bits;
      if (type == Type::kFloat32) {
        bits = as_bits(v[i]);
        static_cast<float*>(e.theta)[at] = v[i];
      } else {
        bits = join ? residual_split(v[i], e.residual[p.residual_at + i])
                    : rounded < kPlain && kStochastic > (type, v[i], random, i);
        static_cast<uint16_t*>(e.theta)[at] = static_cast<uint16_t>(bits);
      }
      nonfinite += is_nonfinite(type, bits);
    }
  }
};

template <Direction kDirection>
struct PerturbVerb {
  const Keys& keys;
  uint32_t step, draw;
  float plus, minus;

  template <Type kType, Type kOut>
  struct Body {
    const PerturbVerb& verb;
    const Place& place;

    template <class Z>
    __device__ __forceinline__ void unit(uint32_t i, const Z& z_of) {
      float v[kUnit], z[kUnit], out[kUnit];
      if (kType == Type::kBfloat16 && place.residual != nullptr) {
        load_joined(place.theta, place.residual, i, v);
      } else {
        load_unit<kType>(place.theta, i, v);
      }
      z_of(z);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) out[j] = fma_rn(verb.plus, z[j], v[j]);
      store_unit<kOut>(place.out[0], i, nearest<kOut>(out));
      if (place.out[1] == nullptr) return;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) out[j] = fma_rn(verb.minus, z[j], v[j]);
      store_unit<kOut>(place.out[1], i, nearest<kOut>(out));
    }
    __device__ __forceinline__ void settle(uint32_t, uint32_t, uint32_t) {}
  };

  __device__ __forceinline__ bool units(const Entry& e, const Units& whole, const Turn& turn) {
    const Place place(e, whole);
#define ZO_INSTANCE(direction, theta, out)                                                  \
  if constexpr (kDirection == direction) {                                                  \
    if (e.type == static_cast<int32_t>(theta) && e.out_type == static_cast<int32_t>(out)) { \
      Body<theta, out> body{*this, place};                                                  \
      each_unit<kDirection>(place, turn, Name(place.who, step, draw, keys), keys, body);    \
      return true;                                                                          \
    }                                                                                       \
  }
#include "instances.def"
#undef ZO_INSTANCE
    return false;
  }

  __device__ __forceinline__ void piece(const Entry& e, const Piece& p) {
    const Type type = static_cast<Type>(e.type), out_type = static_cast<Type>(e.out_type);
    const bool join = type == Type::kBfloat16 && e.residual != nullptr;
    float z[kUnit];
    values<kDirection>(p.unit, Name(e.who, step, draw, keys), keys, z);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i < p.low || i >= p.high) continue;
      const int64_t at = p.at + i * p.stride;
      const float v = join ? residual_join(static_cast<const uint16_t*>(e.theta)[at], e.residual[p.residual_at + i])
                           : load(e.theta, type, at);
      store_nearest(e.out[0], out_type, p.to + i, fma_rn(plus, z[i], v));
      if (e.out[1] != nullptr) store_nearest(e.out[1], out_type, p.to + i, fma_rn(minus, z[i], v));
    }
  }
};

// What every kernel is told about its list.
struct List {
  const Entry* entries;
  const Chunk* chunks;
  int64_t chunk_count;
  int parts_log2;
  Keys keys;
  const int64_t* clock;
};

__device__ __forceinline__ uint32_t clock_of(const List& list) {
  return list.clock == nullptr ? 0u : static_cast<uint32_t>(*list.clock);
}

template <Direction kDirection>
__global__ void __launch_bounds__(kThreads, kResident) draw_kernel(const List list, uint32_t step, uint32_t draw) {
  DrawVerb<kDirection> verb{list.keys, step + clock_of(list), draw};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
}

constexpr int resident(Rounding rounding, bool plain) {
  if (plain) return rounding == Rounding::kNearest ? kResident : kResidentMore;
  return rounding == Rounding::kNearest ? kResidentMore : kResidentMost;
}

template <Direction kDirection, Rounding kRounding, bool kPlain, bool kDecay>
__global__ void __launch_bounds__(kThreads, resident(kRounding, kPlain))
    axpy_kernel(const List list, const Draw* draws, const float* coefficients, int32_t draw_count, int32_t each, Draw last,
                unsigned long long* nonfinite) {
  const Terms terms = {draws, coefficients, draw_count, each, clock_of(list), last};
  AxpyVerb<kDirection, kRounding, kPlain, kDecay> verb{list.keys, terms, kPlain ? coefficients[0] : 0.0f, 0};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
  if (verb.nonfinite != 0) atomicAdd(nonfinite, static_cast<unsigned long long>(verb.nonfinite));  // rare: no reduction first
}

template <Direction kDirection>
__global__ void __launch_bounds__(kThreads, kResidentMore)
    perturb_kernel(const List list, uint32_t step, uint32_t draw, float plus, float minus) {
  PerturbVerb<kDirection> verb{list.keys, step + clock_of(list), draw, plus, minus};
  run(verb, list.entries, list.chunks, list.chunk_count, list.parts_log2);
}

__global__ void __launch_bounds__(kThreads, kResident)
    philox_kernel(const uint32_t* counters, int64_t count, uint32_t k0, uint32_t k1, int rounds, uint32_t* words) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const uint32_t* counter = counters + 4 * i;
    const Words four = philox4x32(counter[0], counter[1], counter[2], counter[3], k0, k1, rounds);
#pragma unroll
    for (int j = 0; j < 4; ++j) words[4 * i + j] = four.w[j];
  }
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (CUDA error " +
                           std::to_string(static_cast<int>(error)) + ")");
}

// Blocks that the current device holds at once, or what the caller asked for.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int64_t workers) {
  if (workers > 0) return std::min<int64_t>(workers, 0x7fffffff);
  int device = 0, processors = 0, each = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0), "kernel");
  return std::max<int64_t>(1, static_cast<int64_t>(processors) * each);
}

template <class... Parameters, class... Arguments>
void start(const char* what, void (*kernel)(List, Parameters...), const Launch& launch, Arguments... arguments) {
  if (launch.chunk_count <= 0) return;
  const int64_t resident = resident_blocks(kernel, launch.workers);
  int parts_log2 = 0;
  while (parts_log2 < kPartsLog2 && launch.chunk_count << (parts_log2 + 1) <= resident) ++parts_log2;
  const unsigned blocks = static_cast<unsigned>(std::min(resident, launch.chunk_count << parts_log2));
  const List list = {launch.entries, launch.chunks, launch.chunk_count, parts_log2, make_keys(launch.seed), launch.clock};
  ZO_LAUNCH(kernel, blocks, kThreads, reinterpret_cast<cudaStream_t>(launch.stream), list, arguments...);
  check(cudaGetLastError(), what);
}

template <Direction kDirection, Rounding kRounding>
void start_axpy(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each, unsigned long long* nonfinite) {
  // the common calls have no instruction for what they do without
  auto* kernel = axpy_kernel<kDirection, kRounding, false, false>;
  if (draw_count == 1) {
    kernel = draws[0].decay == 1.0f ? axpy_kernel<kDirection, kRounding, true, false>
                                    : axpy_kernel<kDirection, kRounding, true, true>;
  }
  start("axpy_", kernel, launch, launch.draws, launch.coefficients, draw_count, each, draws[draw_count - 1], nonfinite);
}

template <Direction kDirection>
void start_axpy(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each, Rounding rounding,
                unsigned long long* nonfinite) {
  switch (rounding) {
    case Rounding::kNearest:
      return start_axpy<kDirection, Rounding::kNearest>(launch, draws, draw_count, each, nonfinite);
    case Rounding::kStochastic:
      return start_axpy<kDirection, Rounding::kStochastic>(launch, draws, draw_count, each, nonfinite);
    case Rounding::kResidual:
      return start_axpy<kDirection, Rounding::kResidual>(launch, draws, draw_count, each, nonfinite);
  }
  throw std::runtime_error("axpy_: unknown rounding " + std::to_string(static_cast<int>(rounding)));
}

[[noreturn]] inline void unknown(const char* what, Direction direction) {
  throw std::runtime_error(std::string(what) + ": unknown direction " + std::to_string(static_cast<int>(direction)));
}

}  // namespace kernels

using namespace kernels;

void philox(const uint32_t* counters, int64_t count, uint32_t k0, uint32_t k1, int rounds, uint32_t* words,
            const Launch& launch) {
  if (count <= 0) return;
  const int64_t needed = (count + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(std::min(resident_blocks(philox_kernel, launch.workers), needed));
  ZO_LAUNCH(philox_kernel, blocks, kThreads, reinterpret_cast<cudaStream_t>(launch.stream), counters, count, k0, k1, rounds,
            words);
  check(cudaGetLastError(), "philox");
}

void draw(const Launch& launch, uint32_t step, uint32_t draw) {
  switch (launch.direction) {
    case Direction::kNormal:
      return start("draw", draw_kernel<Direction::kNormal>, launch, step, draw);
    case Direction::kRademacher:
      return start("draw", draw_kernel<Direction::kRademacher>, launch, step, draw);
  }
  unknown("draw", launch.direction);
}

void axpy(const Launch& launch, const Draw* draws, int32_t draw_count, int32_t each, Rounding rounding, int64_t* nonfinite) {
  if (draw_count < 1) throw std::runtime_error("axpy_: draw_count is " + std::to_string(draw_count) + "; expected at least 1");
  if (launch.coefficients == nullptr || (draw_count > 1 && launch.draws == nullptr)) {
    throw std::runtime_error("axpy_: coefficients or the draws of several terms are not in device memory");
  }
  auto* count = reinterpret_cast<unsigned long long*>(nonfinite);
  switch (launch.direction) {
    case Direction::kNormal:
      return start_axpy<Direction::kNormal>(launch, draws, draw_count, each, rounding, count);
    case Direction::kRademacher:
      return start_axpy<Direction::kRademacher>(launch, draws, draw_count, each, rounding, count);
  }
  unknown("axpy_", launch.direction);
}

void perturb(const Launch& launch, uint32_t step, uint32_t draw, const float* scales) {
  switch (launch.direction) {
    case Direction::kNormal:
      return start("perturb", perturb_kernel<Direction::kNormal>, launch, step, draw, scales[0], scales[1]);
    case Direction::kRademacher:
      return start("perturb", perturb_kernel<Direction::kRademacher>, launch, step, draw, scales[0], scales[1]);
  }
  unknown("perturb", launch.direction);
}

std::string implementation() { return "cuda"; }

void select(const std::string& name) {
  if (name != "cuda") throw std::invalid_argument("unknown implementation '" + name + "'; the module has cuda");
}

std::vector<std::string> architectures() {
#if defined(__CUDA_ARCH_LIST__)
  std::vector<std::string> names;
  for (const int arch : {__CUDA_ARCH_LIST__}) names.push_back("sm_" + std::to_string(arch / 10));
  return names;
#else
  return {"host"};
#endif
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

}  // namespace zo
