// header.cpp: csrc/zo/*.h and csrc/elementwise.h behind plain C functions, for header.py
#include <cstddef>

#include "elementwise.h"

extern "C" {

void words_of(const uint32_t* counters, int64_t count, const uint32_t* key, int rounds, uint32_t* words) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* x = counters + 4 * i;
    const zo::Words out = zo::philox4x32(x[0], x[1], x[2], x[3], key[0], key[1], rounds);
    for (int j = 0; j < 4; ++j) words[4 * i + j] = out.w[j];
  }
}

void normal_pairs(const uint32_t* words, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) zo::normal_pair(words[i], values[2 * i], values[2 * i + 1]);
}

void values_of(int direction, uint64_t seed, uint32_t who, uint32_t step, uint32_t draw, uint64_t first, int64_t count,
               float* values) {
  const auto which = static_cast<zo::Direction>(direction);
  const uint32_t per_block = which == zo::Direction::kNormal ? zo::kNormalPerBlock : zo::kRademacherPerBlock;
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  zo::Words words{};
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t index = first + static_cast<uint64_t>(i);
    if (i == 0 || index % per_block == 0) {
      words = zo::philox4x32(static_cast<uint32_t>(index / per_block), who, step, draw, k0, k1);
    }
    values[i] = zo::value_at(words, which, static_cast<uint32_t>(index % per_block));
  }
}

void value_of(int direction, uint64_t seed, uint32_t who, uint32_t step, uint32_t draw, uint64_t index, float* value) {
  *value = zo::value(static_cast<zo::Direction>(direction), index, who, step, draw, static_cast<uint32_t>(seed),
                     static_cast<uint32_t>(seed >> 32));
}

void rounding_bits_of(uint64_t seed, uint32_t who, uint32_t step, uint64_t first, int64_t count, uint32_t* bits) {
  for (int64_t i = 0; i < count; ++i) {
    bits[i] = zo::rounding_bits(first + static_cast<uint64_t>(i), who, step, static_cast<uint32_t>(seed),
                                static_cast<uint32_t>(seed >> 32));
  }
}

// halves: bfloat16 nearest, bfloat16 stochastic, float16 nearest, float16 stochastic, high and low half of the split
void rounded(const float* values, const uint32_t* random, int64_t count, uint16_t* halves) {
  for (int64_t i = 0; i < count; ++i) {
    int16_t low = 0;
    uint16_t* out = halves + 6 * i;
    out[0] = zo::bf16_nearest(values[i]);
    out[1] = zo::bf16_stochastic(values[i], random[i]);
    out[2] = zo::fp16_nearest(values[i]);
    out[3] = zo::fp16_stochastic(values[i], random[i]);
    out[4] = zo::residual_split(values[i], low);
    out[5] = static_cast<uint16_t>(low);
  }
}

void joined(const uint16_t* high, const int16_t* low, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = zo::residual_join(high[i], low[i]);
}

void widened(const uint16_t* halves, int64_t count, float* bfloat16, float* float16) {
  for (int64_t i = 0; i < count; ++i) {
    bfloat16[i] = zo::bf16_to_float(halves[i]);
    float16[i] = zo::fp16_to_float(halves[i]);
  }
}

}  // extern "C"
