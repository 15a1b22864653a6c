// SPDX-License-Identifier: Apache-2.0
// Version, the name of the instruction set this translation unit is compiled for, and the few macros of the library.
#pragma once

#define FOVEA_VERSION_MAJOR 0
#define FOVEA_VERSION_MINOR 1
#define FOVEA_VERSION_PATCH 0
#define FOVEA_VERSION (FOVEA_VERSION_MAJOR * 10000 + FOVEA_VERSION_MINOR * 100 + FOVEA_VERSION_PATCH)
#define FOVEA_VERSION_AT_LEAST(major, minor, patch) (FOVEA_VERSION >= (major) * 10000 + (minor) * 100 + (patch))

// -inf is a value here (a masked score, the LSE of an empty row); a compiler told that infinities do not exist breaks it
// silently. Define FOVEA_ALLOW_FAST_MATH to take that risk.
#if (defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)) && !defined(FOVEA_ALLOW_FAST_MATH)
#error "fovea: -ffast-math / -ffinite-math-only break masks and empty rows; compile without them (or define FOVEA_ALLOW_FAST_MATH)"
#endif

#if defined(__AVX512F__) && !(defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__))
#error "fovea: AVX-512F without DQ, BW and VL (Knights Landing) is not supported; compile with -mno-avx512f"
#endif

// Every function from floor 1 up lives in fovea::v0::FOVEA_ARCH, a name made of the ISA macros that change generated code,
// so that translation units with different -m flags never share a symbol (docs/odr-and-dispatch.md). The psABI levels alone
// would hide VNNI, BF16 and FP16, hence one letter group per extension.
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
#define FOVEA_ISA_BASE x86
#elif defined(__aarch64__) || defined(__ARM_NEON)
#define FOVEA_ISA_BASE arm
#else
#define FOVEA_ISA_BASE any
#endif
#if defined(__SSE4_2__)
#define FOVEA_ISA_SSE _sse42
#elif defined(__SSE4_1__)
#define FOVEA_ISA_SSE _sse41
#elif defined(__SSSE3__)
#define FOVEA_ISA_SSE _ssse3
#elif defined(__SSE3__)
#define FOVEA_ISA_SSE _sse3
#else
#define FOVEA_ISA_SSE
#endif
#if defined(__AVX2__)
#define FOVEA_ISA_AVX _avx2
#elif defined(__AVX__)
#define FOVEA_ISA_AVX _avx
#else
#define FOVEA_ISA_AVX
#endif
#if defined(__FMA__)
#define FOVEA_ISA_FMA _fma
#else
#define FOVEA_ISA_FMA
#endif
#if defined(__F16C__)
#define FOVEA_ISA_F16C _f16c
#else
#define FOVEA_ISA_F16C
#endif
#if defined(__BMI2__)
#define FOVEA_ISA_BMI _bmi2
#else
#define FOVEA_ISA_BMI
#endif
#if defined(__AVX512F__)
#define FOVEA_ISA_AVX512 _avx512
#else
#define FOVEA_ISA_AVX512
#endif
#if defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)
#define FOVEA_ISA_VBMI _vbmi2
#elif defined(__AVX512VBMI__)
#define FOVEA_ISA_VBMI _vbmi
#else
#define FOVEA_ISA_VBMI
#endif
#if defined(__AVX512VNNI__)
#define FOVEA_ISA_VNNI _vnni
#elif defined(__AVXVNNI__)
#define FOVEA_ISA_VNNI _avxvnni
#else
#define FOVEA_ISA_VNNI
#endif
#if defined(__AVX512BF16__)
#define FOVEA_ISA_BF16 _bf16
#else
#define FOVEA_ISA_BF16
#endif
#if defined(__AVX512FP16__)
#define FOVEA_ISA_FP16 _fp16
#else
#define FOVEA_ISA_FP16
#endif
#if defined(__ARM_FEATURE_SVE)
#define FOVEA_ISA_SVE _sve
#else
#define FOVEA_ISA_SVE
#endif
#if defined(__LZCNT__) && defined(__BMI__)
#define FOVEA_ISA_LZCNT _lzcnt
#else
#define FOVEA_ISA_LZCNT
#endif
#if defined(__GFNI__)
#define FOVEA_ISA_GFNI _gfni
#else
#define FOVEA_ISA_GFNI
#endif
#if defined(__AMX_BF16__) || defined(__AMXBF16__)   // the second is clang 14's name
#define FOVEA_ISA_AMX _amx
#else
#define FOVEA_ISA_AMX
#endif
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#define FOVEA_ISA_MATH _fastmath
#else
#define FOVEA_ISA_MATH
#endif
#if defined(FOVEA_CHECKED)
#define FOVEA_ISA_CHECKED _checked
#else
#define FOVEA_ISA_CHECKED
#endif
#define FOVEA_PASTE_(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q) \
  a##b##c##d##e##f##g##h##i##j##k##l##m##n##o##p##q
#define FOVEA_PASTE(...) FOVEA_PASTE_(__VA_ARGS__)
#define FOVEA_ARCH                                                                                                      \
  FOVEA_PASTE(FOVEA_ISA_BASE, FOVEA_ISA_SSE, FOVEA_ISA_AVX, FOVEA_ISA_FMA, FOVEA_ISA_F16C, FOVEA_ISA_BMI, FOVEA_ISA_AVX512, \
              FOVEA_ISA_VBMI, FOVEA_ISA_VNNI, FOVEA_ISA_BF16, FOVEA_ISA_FP16, FOVEA_ISA_SVE, FOVEA_ISA_LZCNT, FOVEA_ISA_GFNI, \
              FOVEA_ISA_AMX, FOVEA_ISA_MATH, FOVEA_ISA_CHECKED)
#define FOVEA_STRING_(x) #x
#define FOVEA_STRING(x) FOVEA_STRING_(x)
#define FOVEA_ARCH_NAME FOVEA_STRING(FOVEA_ARCH)

// Lane policies and micro-kernels must be inlined or every vector is spilled around the call; unoptimised builds keep plain
// `inline`, which is safe only because of FOVEA_ARCH.
#if defined(__OPTIMIZE__) && !defined(FOVEA_CHECKED)
#define FOVEA_INLINE inline __attribute__((always_inline))
#else
#define FOVEA_INLINE inline
#endif
// Floor 0 bodies have no ISA in their name, so no copy of them may survive as a symbol.
#define FOVEA_DATA_INLINE inline __attribute__((always_inline))
#define FOVEA_NOINLINE __attribute__((noinline))
#define FOVEA_UNROLL _Pragma("GCC unroll 32")

// FOVEA_CHECKED turns internal assertions on; it is part of FOVEA_ARCH, so checked and unchecked code can be linked together.
#if defined(FOVEA_CHECKED)
#include <cstdio>
#include <cstdlib>
#define FOVEA_ASSERT(condition)                                                                            \
  ((condition) ? void(0)                                                                                    \
               : (std::fprintf(stderr, "fovea: assertion failed: %s (%s:%d)\n", #condition, __FILE__, __LINE__), std::abort()))
#else
#define FOVEA_ASSERT(condition) void(0)
#endif
