// SPDX-License-Identifier: Apache-2.0
// The limits of compute: fp32 fused multiply-adds, or dot products of bf16 pairs, in registers and nothing else. Chains
// start from different values and go through inline assembly, because a compiler merges identical ones (and reports twice
// the truth) and spills arrays of them.
#pragma once
#include <algorithm>
#include <chrono>

#include "pool.hpp"

namespace fovea_bench {

inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Makes the compiler believe that somebody reads the value.
template <class T>
inline void keep(const T& value) {
  __asm__ volatile("" : : "m"(value) : "memory");
}

#if defined(__AVX512F__)
typedef float PeakVector __attribute__((vector_size(64)));
inline constexpr int kPeakChains = 24;   // 32 registers; latency 4 on two ports asks for 8
#define FOVEA_BENCH_FMA(acc, a, b) __asm__("vfmadd213ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b))
#elif defined(__FMA__)
typedef float PeakVector __attribute__((vector_size(32)));
inline constexpr int kPeakChains = 12;   // 16 registers; latency 5 on two ports asks for 10
#define FOVEA_BENCH_FMA(acc, a, b) __asm__("vfmadd213ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b))
#else
typedef float PeakVector __attribute__((vector_size(16)));
inline constexpr int kPeakChains = 12;
#define FOVEA_BENCH_FMA(acc, a, b) acc = acc * a + b
#endif

inline constexpr double kPeakFlopsPerRound = 2. * kPeakChains * (sizeof(PeakVector) / sizeof(float));

inline __attribute__((noinline)) float fma_rounds(long rounds) {
  volatile float opaque = 0.25f;
  const PeakVector shrink = PeakVector{} + opaque * 0.5f, step = PeakVector{} + opaque;
  PeakVector acc[kPeakChains];
#pragma GCC unroll 32
  for (int chain = 0; chain < kPeakChains; ++chain) acc[chain] = PeakVector{} + opaque * static_cast<float>(chain + 1);
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int chain = 0; chain < kPeakChains; ++chain) FOVEA_BENCH_FMA(acc[chain], shrink, step);
  }
  float sum = 0.f;
#pragma GCC unroll 32
  for (int chain = 0; chain < kPeakChains; ++chain) sum += acc[chain][0];
  return sum;
}

#if defined(__AVX512BF16__)
inline constexpr bool kHasBf16Peak = true;
#define FOVEA_BENCH_BF16_DOT(acc, a, b) __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b))
#else
inline constexpr bool kHasBf16Peak = false;
#define FOVEA_BENCH_BF16_DOT(acc, a, b) acc = acc * a + b
#endif

// A lane multiplies and adds two numbers.
inline constexpr double kPeakBf16FlopsPerRound = 2. * kPeakFlopsPerRound;

// Latency 8 and one every second cycle (Sapphire Rapids) ask for 4 chains, latency 6 and one a cycle (Zen 4) for 6.
inline __attribute__((noinline)) float bf16_dot_rounds(long rounds) {
  volatile float opaque = 0x1.020202p-3f;   // as a pair: 0.126 and a small normal number
  const PeakVector pairs = PeakVector{} + opaque, others = PeakVector{} + opaque * 0.5f;
  PeakVector acc[kPeakChains];
#pragma GCC unroll 32
  for (int chain = 0; chain < kPeakChains; ++chain) acc[chain] = PeakVector{} + opaque * static_cast<float>(chain + 1);
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int chain = 0; chain < kPeakChains; ++chain) FOVEA_BENCH_BF16_DOT(acc[chain], pairs, others);
  }
  float sum = 0.f;
#pragma GCC unroll 32
  for (int chain = 0; chain < kPeakChains; ++chain) sum += acc[chain][0];
  return sum;
}

// GFLOP/s of `threads` cores together: the best of `windows` runs of about `seconds` each. Noise only ever takes away.
template <float (*run_rounds)(long)>
inline double rounds_gflops(PinnedPool& pool, int threads, double seconds, int windows, double flops_per_round) {
  static const double seconds_per_round = [] {
    double best = 1;
    for (int attempt = 0; attempt < 5; ++attempt) {
      const double start = now();
      keep(run_rounds(20000));
      best = std::min(best, (now() - start) / 20000);
    }
    return best;
  }();
  const long rounds = std::max(1L, static_cast<long>(seconds / seconds_per_round));
  auto lane = [&](int) { keep(run_rounds(rounds)); };
  double best = 0;
  for (int window = 0; window < windows; ++window) {
    const double start = now();
    pool.run(threads, fovea::LaneFunction(lane));
    best = std::max(best, flops_per_round * static_cast<double>(rounds) * threads / (now() - start) * 1e-9);
  }
  return best;
}

inline double fma_gflops(PinnedPool& pool, int threads, double seconds, int windows) {
  return rounds_gflops<fma_rounds>(pool, threads, seconds, windows, kPeakFlopsPerRound);
}

// 0 where this build has no dot product of bf16 pairs.
inline double bf16_gflops(PinnedPool& pool, int threads, double seconds, int windows) {
  if (!kHasBf16Peak) return 0;
  return rounds_gflops<bf16_dot_rounds>(pool, threads, seconds, windows, kPeakBf16FlopsPerRound);
}

}  // namespace fovea_bench
