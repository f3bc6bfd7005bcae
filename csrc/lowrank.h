// lowrank.h: theta <- decay theta + scale left right^T; what lowrank.cpp and lowrank.cu implement
//
// math     t = fma(scale, s, round(decay theta)), s = sum_k left[i, k] right[j, k]; then one rounding to the type of the
// result.
//          Element number e of the unsharded matrix (elementwise.h: first, pitch, rows) has i = e div n and j = e mod n, n
//          being the rows of `right`, whatever the shape of theta: shards and flattened matrices read what the whole would have
//          read.
// table    the Entry and Chunk of elementwise.h, and one Factors per tensor, found by Entry::tensor. With out[0] the results
//          go there and theta is only read; residual joins theta's low bits and, in place, takes the new ones.
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

// *nonfinite += results that are inf or NaN. launch.direction is not read; step names the bits of stochastic rounding.
void lowrank(const Launch& launch, const Factors* factors, int64_t factor_count, float decay, Rounding rounding, uint32_t step,
             int64_t* nonfinite);

// What lowrank.cu works on instead of chunks, beside Factors; both are made by zokern/backends/pack_lowrank.py.
struct Tile {  // rows [begin, end) of the matrix from `column` on, or, where that is -1, elements [begin, end) of the entry
  int64_t begin;
  int64_t end;
  int32_t entry;
  int32_t column;
};
static_assert(sizeof(Tile) == 24, "zokern/backends/pack_lowrank.py packs 24 bytes");

struct Frame {                    // of an entry that is a rectangle of the matrix, on 16-byte boundaries
  int64_t stride, shift;          // element (i, j) of the matrix lies at theta + i stride + j + shift
  int64_t out_stride, out_shift;  // and at i out_stride + j + out_shift of out and residual
  int64_t last;                   // columns end here
};
static_assert(sizeof(Frame) == 40, "zokern/backends/pack_lowrank.py packs 40 bytes");

struct TileList {  // and what a launch has to know about it before it reads it
  const Tile* tiles;
  int64_t count;
  const Frame* frames;  // one an entry
  int64_t max_rank;
  bool general;   // there are tiles whose elements go one at a time
  int32_t types;  // bit Type: there are other tiles, in a theta of this type
  bool simple;    // in place, nearest and no decay throughout
  bool whole;     // every rank is 16, 32, 64 or 128, whichever is the first that max_rank fits
};

void lowrank_tiles(const Launch& launch, const TileList& list, const Factors* factors, float decay, Rounding rounding,
                   uint32_t step, int64_t* nonfinite);

}  // namespace zo
