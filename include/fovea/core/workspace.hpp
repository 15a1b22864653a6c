// SPDX-License-Identifier: Apache-2.0
// A bump allocator over bytes the caller owns. Sizes are known before the call: the same `take` calls over a null buffer
// count the bytes, so that workspace_bytes and the real allocation cannot disagree.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "types.hpp"

namespace fovea {
inline namespace v0 {

inline constexpr std::size_t kAlignment = 64;   // a cache line, and the widest vector

class Bump {
 public:
  FOVEA_DATA_INLINE explicit Bump(std::byte* begin = nullptr) : begin_(begin) {}

  // `count` objects of T on a fresh cache line, uninitialised. Null while counting.
  template <class T>
  FOVEA_DATA_INLINE T* take(index_t count) {
    used_ = (used_ + kAlignment - 1) / kAlignment * kAlignment;
    std::byte* const at = begin_ == nullptr ? nullptr : begin_ + used_;
    used_ += static_cast<std::size_t>(count) * sizeof(T);
    return reinterpret_cast<T*>(at);
  }

  FOVEA_DATA_INLINE std::size_t used() const { return (used_ + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  std::byte* begin_;
  std::size_t used_ = 0;
};

// The aligned part of a caller's buffer.
FOVEA_DATA_INLINE std::span<std::byte> aligned(std::span<std::byte> bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
  const std::size_t skip = (kAlignment - address % kAlignment) % kAlignment;
  return bytes.size() < skip ? std::span<std::byte>{} : bytes.subspan(skip);
}

}   // namespace v0
}   // namespace fovea
