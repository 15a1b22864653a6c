// SPDX-License-Identifier: Apache-2.0
// The limit of memory: reads from DRAM, 64 bytes at a time, prefetched 4 KiB ahead, every thread in its own part of a buffer
// that no cache holds.
#pragma once
#include <cstring>

#include "memory.hpp"
#include "peak.hpp"
#include "pool.hpp"

namespace fovea_bench {

typedef long long ReadVector __attribute__((vector_size(64)));

inline __attribute__((noinline)) long long read_all(const std::byte* data, std::size_t bytes) {
  ReadVector sum[4] = {};
  for (std::size_t at = 0; at + 256 <= bytes; at += 256) {
#pragma GCC unroll 4
    for (std::size_t line = 0; line < 4; ++line) {
      __builtin_prefetch(data + at + 4096 + 64 * line);   // past the end: harmless
      sum[line] ^= *reinterpret_cast<const ReadVector*>(data + at + 64 * line);
    }
  }
  const ReadVector all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
}

class BandwidthProbe {
 public:
  static constexpr std::size_t kBytes = std::size_t{1} << 30;

  // GB/s of `threads` cores together over the next `bytes` of the buffer, which is walked round and round.
  double read_gbps(PinnedPool& pool, int threads, std::size_t bytes) {
    if (buffer_.reserve(kBytes)) std::memset(buffer_.data(), 1, kBytes);
    if (at_ + bytes > kBytes) at_ = 0;
    const std::byte* const begin = buffer_.data() + at_;
    at_ += bytes;
    const std::size_t share = bytes / static_cast<std::size_t>(threads) / 4096 * 4096;
    auto lane = [&](int index) { keep(read_all(begin + share * static_cast<std::size_t>(index), share)); };
    const double start = now();
    pool.run(threads, fovea::LaneFunction(lane));
    return static_cast<double>(share) * threads / (now() - start) * 1e-9;
  }

 private:
  HugeBuffer buffer_;
  std::size_t at_ = 0;
};

}  // namespace fovea_bench
