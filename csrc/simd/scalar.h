// simd/scalar.h: one lane, for any CPU. This is the simplest form of the trait Simd. elementwise.cpp,
// update.cpp, lowrank.cpp and linear.cpp are written over that trait
#pragma once

namespace zo {

struct Simd {
  static constexpr int kLanes = 1;  // floats in F, words in U
  static constexpr int kGroup = 1;  // Philox blocks in W, one 64-bit lane each
  using F = float;
  using U = uint32_t;
  using W = uint64_t;

  static F all(float x) { return x; }
  static U bits(F x) { return as_bits(x); }
  static F floats(U x) { return as_float(x); }
  static F from_int(U x) { return zo::from_int(static_cast<int32_t>(x)); }
  static F fma(F a, F b, F c) { return fma_rn(a, b, c); }
  static constexpr bool kPairs = false;  // has dot(x, w, sum) = sum + odd x odd w + even x even w
  static F root(F x) { return sqrt_rn(x); }
  static U lane() { return 0; }

  static F load(const float* p) { return *p; }
  static void store(float* p, F x) { *p = x; }
  static U load(const uint32_t* p) { return *p; }
  // Two 16-bit elements in each word.
  static U load_pairs(const uint16_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 16; }
  static void store_pairs(uint16_t* p, U x) {
    p[0] = static_cast<uint16_t>(x), p[1] = static_cast<uint16_t>(x >> 16);
  }
  static U load_half(const uint16_t* p) { return *p; }
  static void store_half(uint16_t* p, U x) { *p = static_cast<uint16_t>(x); }
  static F load_byte(const uint8_t* p) { return *p; }
  static F load_fp16(const uint16_t* p) { return fp16_to_float(*p); }
  static void store_fp16(uint16_t* p, F x) { *p = fp16_nearest(x); }
  static F round_fp16(F x) { return fp16_to_float(fp16_nearest(x)); }
  static bool any_nan(F x) { return x != x; }

  // Turns the (even, odd) of one vector of words into consecutive elements.
  // It undoes the order of store_words<true>.
  static void interleave(F even, F odd, F& low, F& high) { low = even, high = odd; }

  // The even and the odd elements of two vectors.
  static void deinterleave(F low, F high, F& even, F& odd) { even = low, odd = high; }

  // to[k to_stride + c] = from[c from_stride + k] for c, k in [0, kTranspose)
  static constexpr int kTranspose = 1;
  static void transpose(const float* from, int64_t, float* to, int64_t) { *to = *from; }

  // Philox: one block in each 64-bit lane. The upper half of a lane may hold anything.
  template <bool kUnpack>
  static W counters(uint32_t block) {
    return block;
  }
  // The blocks of kLanes rows, `pitch` blocks apart, in two halves. split() puts them in order. With one lane
  // the second half is not used.
  static W rows(uint32_t block, uint32_t pitch, int half) {
    return block + static_cast<uint64_t>(half) * pitch;
  }
  static W add(W x, uint32_t y) { return x + y; }
  static void split(W first, W, U& low, U& high) {
    low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  }
  static W wide(uint32_t x) { return x; }
  static W multiply(W x, uint32_t constant) {
    return static_cast<uint64_t>(static_cast<uint32_t>(x)) * constant;
  }
  static W mix(W product, W x, const uint32_t* key) { return (product >> 32) ^ x ^ *key; }
  // Two output words: high ^ x ^ key, and low.
  static W last(W product, W x, const uint32_t* key) {
    return (product >> 32 | product << 32) ^ static_cast<uint32_t>(static_cast<uint32_t>(x) ^ *key);
  }
  template <bool kUnpack>
  static void store_words(W w01, W w23, uint32_t* words) {
    words[0] = static_cast<uint32_t>(w01), words[1] = static_cast<uint32_t>(w01 >> 32);
    words[2] = static_cast<uint32_t>(w23), words[3] = static_cast<uint32_t>(w23 >> 32);
  }
};

}  // namespace zo
