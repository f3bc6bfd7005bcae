// job.h: a job of elementwise.cpp: the arguments of all its chunks. linear.cpp makes one for each piece of W
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
  const Draw* draws;    // draw and perturb have one
  const float* scales;  // for perturb
  alignas(64) Keys keys;
};

}  // namespace zo
