// SPDX-License-Identifier: Apache-2.0
// The limits of recurrent kernels, as rows that stand in the same group as what is held against them: a state that is read,
// changed and written back where it lies, and exponentials in registers.
#pragma once
#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "fovea/simd/math.hpp"
#include "memory.hpp"
#include "peak.hpp"
#include "pool.hpp"
#include "rows.hpp"

namespace fovea_bench {

// x <- x a + b over the floats in place, prefetched 4 KiB ahead as in BandwidthProbe. Of 512 MiB on one core of a Sapphire
// Rapids it makes 19.4 GB/s, reads and writes counted; 18.2 without the prefetch, 10 with streaming stores.
inline __attribute__((noinline)) void scale_and_shift(float* x, std::size_t count, float a, float b) {
  constexpr std::size_t kNumbers = sizeof(PeakVector) / sizeof(float), kStep = 256 / sizeof(float);
  for (std::size_t at = 0; at + kStep <= count; at += kStep) {
#pragma GCC unroll 16
    for (std::size_t lane = 0; lane < kStep; lane += kNumbers) {
      if (lane % 16 == 0) __builtin_prefetch(x + at + lane + 1024, 1);   // past the end: harmless
      PeakVector& numbers = *reinterpret_cast<PeakVector*>(x + at + lane);
      numbers = numbers * a + b;
    }
  }
}

// States that no cache holds: `copies` blocks of `floats`, one per call, in turn. Every call reads and writes one block.
class PreparedUpdateProbe final : public PreparedRow {
 public:
  // The blocks begin at multiples of 64 bytes.
  PreparedUpdateProbe(std::span<float> blocks, std::size_t floats, PinnedPool& pool, int threads)
      : blocks_(blocks), floats_(floats), pool_(pool), threads_(threads) {}

  void call() override {
    at_ = at_ + 2 * floats_ > blocks_.size() ? 0 : at_ + floats_;
    const std::size_t share = floats_ / static_cast<std::size_t>(threads_) / 64 * 64;
    float* const begin = blocks_.data() + at_;
    auto lane = [&](int index) { scale_and_shift(begin + share * static_cast<std::size_t>(index), share, 0.999f, 1e-3f); };
    pool_.run(threads_, fovea::LaneFunction(lane));
  }
  double max_error() override { return 0; }
  std::string refusal() override { return ""; }

 private:
  std::span<float> blocks_;
  std::size_t floats_, at_ = 0;
  PinnedPool& pool_;
  int threads_;
};

// Rounds of x <- 2^(-x) on independent chains with the library's own vector exp2: a multiplication and an exponential per
// number, which is what a decay of exp(dt a) takes at the least. 2^(-x) has its fixed point at 0.64, so the chains stay in
// the range where no special case helps or hurts.
inline constexpr int kExp2Chains = 8;
inline constexpr double kExp2PerRound = static_cast<double>(kExp2Chains) * fovea::kLanes;

inline __attribute__((noinline)) float exp2_rounds(long rounds) {
  volatile float opaque = -1.f;
  const fovea::f32 minus(opaque);
  fovea::f32 x[kExp2Chains];
#pragma GCC unroll 8
  for (int chain = 0; chain < kExp2Chains; ++chain) x[chain] = fovea::f32(opaque * -0.1f * static_cast<float>(chain + 1));
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
    for (int chain = 0; chain < kExp2Chains; ++chain) x[chain] = fovea::exp2(x[chain] * minus);
  }
  float sum = 0.f;
#pragma GCC unroll 8
  for (int chain = 0; chain < kExp2Chains; ++chain) sum += fovea::first_lane(x[chain]);
  return sum;
}

// So many exponentials a call, spread over the threads.
class PreparedExp2Probe final : public PreparedRow {
 public:
  PreparedExp2Probe(double exponentials, PinnedPool& pool, int threads)
      : rounds_(std::max(1L, static_cast<long>(exponentials / kExp2PerRound / threads))), pool_(pool), threads_(threads) {}

  void call() override {
    auto lane = [&](int) { keep(exp2_rounds(rounds_)); };
    pool_.run(threads_, fovea::LaneFunction(lane));
  }
  double max_error() override { return 0; }
  std::string refusal() override { return ""; }

 private:
  long rounds_;
  PinnedPool& pool_;
  int threads_;
};

// A row that takes as long as `exponentials` exponentials do at best. Put it into the group of the row it limits; a goal
// compares the two (time_ratio: time of the probe / time of the row).
inline Row exp2_probe_row(std::string name, unsigned suites, double exponentials, int threads) {
  Row row;
  row.name = std::move(name);
  row.suites = suites;
  row.threads = threads;
  row.prepare = [exponentials, threads](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
    return std::make_unique<PreparedExp2Probe>(exponentials, *memory.pool, threads);
  };
  return row;
}

// A row that reads and writes `bytes_per_call / 2` bytes in place, walking through 512 MiB of a group's buffer. Rows whose
// states lie in the buffer of the same name walk through the same memory.
inline constexpr std::size_t kRotatedBytes = std::size_t{512} << 20;

// Random numbers in a buffer of the group; whoever writes to it must keep them finite.
inline std::span<float> rotated_floats(GroupBuffers& buffers, const std::string& name) {
  const auto fill = [](std::span<std::byte> bytes) {
    fill_random({reinterpret_cast<float*>(bytes.data()), bytes.size() / sizeof(float)});
  };
  const std::span<std::byte> bytes = buffers.get(name, kRotatedBytes, fill);
  return {reinterpret_cast<float*>(bytes.data()), bytes.size() / sizeof(float)};
}

inline Row update_probe_row(std::string name, unsigned suites, std::size_t floats, int threads,
                            const std::string& buffer = "states") {
  Row row;
  row.name = std::move(name);
  row.suites = suites;
  row.threads = threads;
  row.bytes = 2. * static_cast<double>(floats * sizeof(float));
  row.memory = Memory::streamed;
  row.prepare = [floats, threads, buffer](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
    return std::make_unique<PreparedUpdateProbe>(rotated_floats(*memory.buffers, buffer), floats, *memory.pool, threads);
  };
  return row;
}

}   // namespace fovea_bench
