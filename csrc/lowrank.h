// lowrank.h: theta <- decay theta + scale left right^T. lowrank.cpp and lowrank.cu implement it
//
// math     s = sum_k left[i, k] right[j, k], then fma(scale, s, round(decay theta)), then one rounding to the
//          type of the result
// index    element number e of the unsharded matrix has i = e div n and j = e mod n, and n is the number of
//          rows of `right`. elementwise.h defines e (first, pitch, rows). The shape of theta does not matter:
//          shards and flattened matrices read the same values as the whole matrix
// table    the Entry and Chunk of elementwise.h, and one Factors per tensor, found by Entry::tensor. With
//          out[0] the results go there, and theta is only read. residual holds theta's low bits. In place it
//          also takes the new ones
// source   Chen et al. 2024 (LOZO, arXiv 2410.07698) for the form U V^T of a perturbation
#pragma once

#include "elementwise.h"

namespace zo {

struct Factors {
  const float* left;   // (m, rank), row-major
  const float* right;  // (columns, rank), row-major
  int64_t rank;
  int64_t columns;  // n
  float scale;
  int32_t reserved;
};
static_assert(sizeof(Factors) == 40, "zokern/backends/pack_lowrank.py packs 40 bytes");

// Adds the number of results that are inf or NaN to *nonfinite. `step` names the random bits of stochastic
// rounding. launch.direction is not read.
void lowrank(const Launch& launch, const Factors* factors, int64_t factor_count, float decay,
             Rounding rounding, uint32_t step, int64_t* nonfinite);

// lowrank.cu works on tiles instead of chunks. zokern/backends/pack_lowrank.py makes them. A tile is rows
// [begin, end) of the matrix from `column` on. If `column` is -1, it is elements [begin, end) of the entry.
struct Tile {
  int64_t begin;
  int64_t end;
  int32_t entry;
  int32_t column;
};
static_assert(sizeof(Tile) == 24, "zokern/backends/pack_lowrank.py packs 24 bytes");

struct Frame {                    // of an entry that is a rectangle of the matrix, on 16-byte boundaries
  int64_t stride, shift;          // element (i, j) of the matrix lies at theta + i stride + j + shift
  int64_t out_stride, out_shift;  // and at i out_stride + j + out_shift of out and residual
  int64_t last;                   // end of the columns
};
static_assert(sizeof(Frame) == 40, "zokern/backends/pack_lowrank.py packs 40 bytes");

struct TileList {  // tiles, and the facts about them that choose a kernel
  const Tile* tiles;
  int64_t count;
  const Frame* frames;  // one an entry
  int64_t max_rank;
  bool general;   // some tiles have column -1: their elements go one at a time
  int32_t types;  // bit number Type is set if other tiles belong to a theta of this type
  bool simple;    // all of it is in place, rounds to nearest and has no decay, which a control may change
  bool whole;     // every rank is the smallest of 16, 32, 64 and 128 that max_rank fits in
};

// launch.clock is added to `step`, and the decay of launch.control stands in the place of `decay`.
void lowrank_tiles(const Launch& launch, const TileList& list, const Factors* factors, float decay,
                   Rounding rounding, uint32_t step, int64_t* nonfinite);

}  // namespace zo
