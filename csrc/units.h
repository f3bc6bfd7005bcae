// units.h: what the elementwise kernels of a GPU are made of: blocks of z, units of eight elements, and the walk over a list
//
// unit     elements 8 u .. 8 u + 7 of the stream: one Philox block of `normal`, 16 bytes of a 16-bit type, and what a thread
// handles
//          at a time. Elements outside whole units go one at a time, in a Piece, still with one Philox block for the unit.
// use      a verb is a struct with units(), which runs each_unit over the whole units of a chunk, and piece(); run() calls both
// include  after <cuda_runtime.h>, by .cu files
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

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

// A unit rounded to nearest or, with the words of its rounding draw, stochastically
template <Type kType, bool kStochastic>
__device__ __forceinline__ Stored<kType> rounded(const float (&v)[kUnit], const Words& random) {
  if constexpr (!kStochastic || kType == Type::kFloat32) {
    return nearest<kType>(v);
  } else {
    return stochastic<kType>(v, random);
  }
}

// The bfloat16 halves of a unit and the low bits that make it exact again
__device__ __forceinline__ Stored<Type::kBfloat16> split(const float (&v)[kUnit], Stored<Type::kBfloat16>& low) {
  Stored<Type::kBfloat16> unit;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int16_t low_even, low_odd;
    const uint32_t even = residual_split(v[2 * j], low_even), odd = residual_split(v[2 * j + 1], low_odd);
    unit.w[j] = even | odd << 16;
    low.w[j] = static_cast<uint16_t>(low_even) | static_cast<uint32_t>(static_cast<uint16_t>(low_odd)) << 16;
  }
  return unit;
}

// Reads the results of a thread's units i, i + stride, ... again and counts what is inf or NaN.
template <Type kType>
__device__ __forceinline__ uint64_t count_nonfinite(const void* base, uint32_t i, uint32_t end, uint32_t stride) {
  uint64_t count = 0;
#pragma unroll 1
  for (; i < end; i += stride) {
    Stored<kType> result;
    load_stored<kType>(base, i, result);
#pragma unroll
    for (int j = 0; j < result.kWords; ++j) {
      count += is_nonfinite(kType, result.w[j]);
      if (kType != Type::kFloat32) count += is_nonfinite(kType, result.w[j] >> 16);
    }
  }
  return count;
}

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

[[noreturn]] inline void unknown(const char* what, Direction direction) {
  throw std::runtime_error(std::string(what) + ": unknown direction " + std::to_string(static_cast<int>(direction)));
}

}  // namespace kernels
}  // namespace zo
