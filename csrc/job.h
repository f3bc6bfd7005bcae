// job.h: what a chunk of elementwise.cpp works on; linear.cpp makes one for each piece of W
#pragma once

#include "elementwise.h"
#include "isa.h"

namespace zo {

enum class Verb : int32_t { kDraw, kAxpy, kPerturb };

struct Job {
  Verb verb;
  Rounding rounding;
  Direction direction;
  int32_t draw_count, each;
  const Entry* entries;
  const Chunk* chunks;
  const Draw* draws;    // one for draw and perturb
  const float* scales;  // perturb
  alignas(64) Keys keys;
};

}  // namespace zo
