// walk.h: the walk of a kernel over a list of tensors, on a GPU
//
// launch   one persistent grid for a list, in blocks of 256 threads. A block takes a chunk of the list, or a
//          part of one if chunks are few (run)
// units    a thread takes whole units, one at a time (each_unit). It loads and stores 16 bytes at a time:
//          once for a 16-bit type, twice for float32. A warp that makes 4096 signs shares their Philox blocks
//          (sign_tiles)
// pieces   rows of entries that are gathered or sliced, elements outside whole units, and entries that are
//          strided or off a 16-byte boundary: a thread takes a unit, or what the row has of it (pieces). It
//          moves 16 bytes at a time where they lie so, else an element at a time. A unit has one Philox block
// verb     a struct with units(), which calls each_unit(), and with piece(). A kernel calls run() with it
// include  after <cuda_runtime.h>, by .cu files
#pragma once

#include "units.h"

namespace zo {
namespace kernels {

// Blocks per multiprocessor that the registers of a kernel must allow
constexpr int kResident = 4;      // 64 registers a thread
constexpr int kResidentMore = 3;  // 80 registers: perturb, stochastic and residual rounding
constexpr int kResidentMost = 2;  // 128 registers: many terms with stochastic or residual rounding
constexpr int kPartsLog2 = 4;     // a chunk of 32768 elements is 16 turns of 256 threads, so it has 16 parts

// How threads divide a chunk. This thread takes units lane, lane + lanes, ...
// If `alone`, one block has the whole chunk.
struct Turn {
  uint32_t lane, lanes;
  bool alone;
};

constexpr int kWarp = 32, kSteps = 16;      // a tile: 32 blocks of signs, used in 16 steps by 32 lanes
constexpr int kTileUnits = kWarp * kSteps;  // 4096 elements

// Signs for whole tiles. Lane l computes block l of the tile. The warp keeps the tile's 4096 signs in 512
// bytes of shared memory, and in step s lane l reads byte 32 s + l. So a block is computed once. Unit by unit
// it would be computed 16 times.
template <class Body>
__device__ __forceinline__ uint32_t sign_tiles(const Place& place, uint32_t head, const Name& name,
                                               const Keys& keys, Body& body) {
  __shared__ uint4 tile_words[kThreads];
  const uint32_t thread = threadIdx.x, lane = thread % kWarp, tiles = (place.count - head) / kTileUnits;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(tile_words + (thread - lane)) + lane;
#pragma unroll 1
  for (uint32_t tile = thread / kWarp; tile < tiles; tile += kThreads / kWarp) {
    const uint32_t i = head + tile * kTileUnits;
    const Words words = philox_named((place.begin + i) / 16u + lane, name, keys);
    __syncwarp();  // every lane has read the tile before
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

// Gives each whole unit of the chunk to one thread. It calls body.unit(i, z_of), and z_of(z) fills in the
// unit's z. After units i, i + stride, ... below end it calls body.settle(i, end, stride).
template <Direction kDirection, class Body>
__device__ __forceinline__ void each_unit(const Place& place, const Turn& turn, const Name& name,
                                          const Keys& keys, Body& body) {
  uint32_t head = 0, tiled = 0;
  if constexpr (kDirection == Direction::kRademacher) {
    head = (0u - place.begin) % 16u;
    if (turn.alone && head + kTileUnits <= place.count) tiled = sign_tiles(place, head, name, keys, body);
  }
  uint32_t begin = tiled == 0 ? 0 : head + tiled;  // units after the tiles come first, then those before them
#pragma unroll 1
  for (uint32_t end = place.count;; begin = 0, end = head) {
    for (uint32_t i = begin + turn.lane; i < end; i += turn.lanes) {
      body.unit(i, [&](float (&z)[kUnit]) { values<kDirection>(place.begin + i, name, keys, z); });
    }
    body.settle(begin + turn.lane, end, turn.lanes);
    if (kDirection == Direction::kNormal || begin == 0) break;
  }
}

// Gives all other elements of the chunk to the threads, one Piece at a time.
template <class Verb>
__device__ __forceinline__ void pieces(Verb& verb, const Entry& e, const Chunk& chunk, const Units& whole,
                                       uint32_t lane, uint32_t lanes) {
  const bool merged =
      e.rows == nullptr && (e.row_count == 1 || (e.pitch == static_cast<uint64_t>(e.columns) &&
                                                 e.row_stride == e.columns * e.column_stride));
  const int64_t columns = merged ? e.row_count * e.columns : e.columns;
  const int64_t first_row = merged ? 0 : divide(chunk.begin, columns);
  const int64_t last_row = merged ? 0 : divide(chunk.end - 1, columns);
  const uint32_t rows = static_cast<uint32_t>(last_row - first_row) + 1;  // a chunk has under 2^28 elements
  const bool edges = whole.begin < whole.end;
  // If a row has whole units, only one before and one after are left. Each row gets a power of two of turns,
  // so that no turn needs a division. Some turns are empty.
  const int64_t longest = columns < chunk.end - chunk.begin ? columns : chunk.end - chunk.begin;
  // Rows that begin at the same place of a unit touch the same number of units.
  const uint32_t before =
      longest == columns && e.pitch % kUnit == 0 ? static_cast<uint32_t>(e.first % kUnit) : kUnit - 1;
  const uint32_t per_row = edges ? 2 : (before + static_cast<uint32_t>(longest) + kUnit - 1) / kUnit;
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
    const uint64_t unit = edges ? (slot == 0 ? whole.begin - 1 : whole.end)
                                : (number + static_cast<uint64_t>(begin)) / kUnit + slot;
    const int64_t column = static_cast<int64_t>(unit * kUnit - number);  // of the unit's element 0
    Piece piece;
    piece.low = static_cast<int>(begin > column ? (begin - column < kUnit ? begin - column : kUnit) : 0);
    piece.high = static_cast<int>(end - column < kUnit ? end - column : kUnit);
    if (piece.low >= piece.high) continue;
    piece.unit = static_cast<uint32_t>(unit);
    piece.at = source * e.row_stride + column * e.column_stride;
    piece.stride = e.column_stride;
    piece.residual_at = source * columns + column;
    piece.to = row * columns + column;
    piece.together = piece.high - piece.low == kUnit && (e.theta == nullptr || e.column_stride == 1) &&
                     aligned(e, piece.at, piece.to, piece.residual_at);
    verb.piece(e, piece);
  }
}

// Gives chunks to blocks: 2^parts_log2 blocks share a chunk. The verb takes the whole units of those types
// that it has an instance for, then the pieces.
template <class Verb>
__device__ __forceinline__ void run(Verb& verb, const Entry* entries, const Chunk* chunks,
                                    int64_t chunk_count, int parts_log2) {
  for (int64_t turn = blockIdx.x; turn < chunk_count << parts_log2; turn += gridDim.x) {
    const Chunk chunk = chunks[turn >> parts_log2];
    if (chunk.begin >= chunk.end) continue;
    const Entry& e = entries[chunk.entry];
    const int64_t part = turn & ((int64_t{1} << parts_log2) - 1);
    const uint32_t lane = static_cast<uint32_t>(part) * kThreads + threadIdx.x,
                   lanes = uint32_t{kThreads} << parts_log2;
    Units whole = whole_units(e, chunk);
    if (whole.begin < whole.end) {
      const Turn units = {lane, lanes, parts_log2 == 0};
      if (!verb.units(e, whole, units)) whole = Units{0, 0};
    }
    pieces(verb, e, chunk, whole, lane, lanes);
  }
}

// The arguments about a list, the same for all kernels.
struct List {
  const Entry* entries;
  const Chunk* chunks;
  int64_t chunk_count;
  int parts_log2;
  Keys keys;
  const int64_t* clock;
  const float* control;
};

__device__ __forceinline__ uint32_t clock_of(const List& list) {
  return list.clock == nullptr ? 0u : static_cast<uint32_t>(*list.clock);
}

// The number of project.h that a kernel looks at before anything else.
constexpr int kDecay = 0, kGo = 1, kFinite = 2;
__device__ __forceinline__ bool stopped(const List& list, int by) {
  return list.control != nullptr && list.control[by] == 0.0f;
}

template <class... Parameters, class... Arguments>
void start(const char* what, void (*kernel)(List, Parameters...), const Launch& launch,
           Arguments... arguments) {
  if (launch.chunk_count <= 0) return;
  const int64_t resident = resident_blocks(what, kernel, launch.workers);
  int parts_log2 = 0;
  while (parts_log2 < kPartsLog2 && launch.chunk_count << (parts_log2 + 1) <= resident) ++parts_log2;
  const unsigned blocks = static_cast<unsigned>(std::min(resident, launch.chunk_count << parts_log2));
  const List list = {launch.entries,         launch.chunks, launch.chunk_count, parts_log2,
                     make_keys(launch.seed), launch.clock,  launch.control};
  ZO_LAUNCH(kernel, blocks, kThreads, reinterpret_cast<cudaStream_t>(launch.stream), list, arguments...);
  check(cudaGetLastError(), what);
}

[[noreturn]] inline void unknown(const char* what, Direction direction) {
  throw std::runtime_error(std::string(what) + ": unknown direction " +
                           std::to_string(static_cast<int>(direction)));
}

}  // namespace kernels
}  // namespace zo
