// SPDX-License-Identifier: Apache-2.0
// Buffers whose every element that is not part of a tensor is a NaN of known bits, so that a read of it reaches a result
// and a write of it is noticed.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "fovea/core/view.hpp"

namespace test {

using fovea::index_t;

inline constexpr std::uint32_t kCanaryBits = 0x7fc0beefu;   // a quiet NaN

inline float canary() { return std::bit_cast<float>(kCanaryBits); }
inline bool is_canary(float x) { return std::bit_cast<std::uint32_t>(x) == kCanaryBits; }

// Floats with a guard of canaries before and after.
class Poisoned {
 public:
  static constexpr index_t guard = 67;   // odd, so that data() has no friendly alignment

  Poisoned() = default;
  explicit Poisoned(index_t count) : all_(static_cast<std::size_t>(count + 2 * guard), canary()) {}

  float* data() { return all_.data() + guard; }
  const float* data() const { return all_.data() + guard; }
  index_t size() const { return static_cast<index_t>(all_.size()) - 2 * guard; }
  std::span<const float> everything() const { return all_; }

 private:
  std::vector<float> all_;
};

// Index, from the start of the buffer, of the first float that changed although no element of the views lies there, or -1.
template <int Rank>
index_t first_overwritten(const Poisoned& buffer, std::initializer_list<fovea::View<float, Rank>> views) {
  std::vector<bool> owned(buffer.everything().size(), false);
  for (const auto& view : views) {
    std::array<index_t, Rank> at{};
    bool empty = false;
    for (index_t extent : view.extent) empty = empty || extent == 0;
    while (!empty) {
      index_t offset = view.data - buffer.everything().data();
      for (std::size_t axis = 0; axis < Rank; ++axis) offset += at[axis] * view.stride[axis];
      owned[static_cast<std::size_t>(offset)] = true;
      std::size_t axis = Rank;
      while (axis-- > 0) {
        if (++at[axis] < view.extent[axis]) break;
        at[axis] = 0;
        if (axis == 0) empty = true;
      }
    }
  }
  for (std::size_t n = 0; n < owned.size(); ++n) {
    if (!owned[n] && !is_canary(buffer.everything()[n])) return static_cast<index_t>(n);
  }
  return -1;
}

// Bytes for a workspace: all ones (a NaN in every float), with a guard behind that must not change.
class PoisonedBytes {
 public:
  explicit PoisonedBytes(std::size_t count, std::size_t misalign = 0)
      : all_(misalign + count + guard, std::byte{0xff}), begin_(misalign), count_(count) {}

  std::span<std::byte> bytes() { return std::span(all_).subspan(begin_, count_); }
  bool guards_intact() const {
    for (std::size_t n = 0; n < all_.size(); ++n) {
      if ((n < begin_ || n >= begin_ + count_) && all_[n] != std::byte{0xff}) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t guard = 256;
  std::vector<std::byte> all_;
  std::size_t begin_, count_;
};

}  // namespace test
