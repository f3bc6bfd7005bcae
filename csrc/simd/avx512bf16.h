// simd/avx512bf16.h: simd/avx512.h, compiled with the dot product of bfloat16 pairs
#pragma once

#include "avx512.h"
