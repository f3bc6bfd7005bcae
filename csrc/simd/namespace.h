// simd/namespace.h: the first include of a source that is compiled once per instruction set
#pragma once

#define ZO_PASTE(a, b) a##b
#define ZO_JOIN(a, b) ZO_PASTE(a, b)
#if defined(ZOKERN_ISA)
// Every instruction set has its own namespace. Otherwise the linker would merge the inline functions of all
// of them, and the scalar path could call one with AVX-512 code.
#define zo ZO_JOIN(zo_, ZOKERN_ISA)
// clang-format off
#define ZO_QUOTE(path) #path
#define ZO_HEADER(isa) ZO_QUOTE(simd/isa.h)
// clang-format on
#define ZO_TRAIT ZO_HEADER(ZOKERN_ISA)
#endif

#define ZO_INLINE inline __attribute__((always_inline))
#define ZO_INLINE_LAMBDA __attribute__((always_inline))
