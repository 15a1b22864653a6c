// SPDX-License-Identifier: Apache-2.0
// The one block of memory a cache owns. Huge pages are asked for where the system knows them: a decode step reads the whole
// cache once, and with 4 KiB pages that is a TLB miss per 16 to 32 rows.
#pragma once
#include <cstddef>
#include <new>
#include <utility>

#include "../core/status.hpp"
#include "../core/types.hpp"
#if defined(__linux__) && __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

class MemoryBlock {
 public:
  MemoryBlock() = default;
  MemoryBlock(MemoryBlock&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  MemoryBlock& operator=(MemoryBlock&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~MemoryBlock() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{alignment_of(size_)});
  }

  // Uninitialised bytes at a cache line, from kHugePage on at a huge page. On error the block keeps what it had.
  Status allocate(std::size_t size) {
    void* const data = ::operator new(size, std::align_val_t{alignment_of(size)}, std::nothrow);
    if (data == nullptr) return Status::error(Code::out_of_memory, "cache: the system gives no %zu bytes", size);
#if defined(MADV_HUGEPAGE)
    // A wish: a kernel built without huge pages refuses it, and nothing is lost.
    if (size >= kHugePage) static_cast<void>(madvise(data, size / kHugePage * kHugePage, MADV_HUGEPAGE));
#endif
    MemoryBlock fresh;
    fresh.data_ = static_cast<std::byte*>(data);
    fresh.size_ = size;
    *this = std::move(fresh);
    return {};
  }

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;
  static constexpr std::size_t alignment_of(std::size_t size) { return size >= kHugePage ? kHugePage : 64; }

  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// A block and the plain data that says what lies in it; what was moved from is empty again.
template <class State>
struct Owned {
  MemoryBlock block;
  State state{};

  Owned() = default;
  Owned(Owned&& other) noexcept : block(std::move(other.block)), state(std::exchange(other.state, State{})) {}
  Owned& operator=(Owned&& other) noexcept {
    if (this != &other) {
      block = std::exchange(other.block, MemoryBlock{});
      state = std::exchange(other.state, State{});
    }
    return *this;
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
