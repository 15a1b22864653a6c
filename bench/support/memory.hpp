// SPDX-License-Identifier: Apache-2.0
// Memory in huge pages where the kernel grants them: on one thread they add 20 to 35 % to the read bandwidth of 4 KiB pages,
// and a decode row without them would measure the page table.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <span>
#include <string>

namespace fovea_bench {

class HugeBuffer {
 public:
  HugeBuffer() = default;
  ~HugeBuffer() { release(); }
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;

  // Contents are lost when the buffer grows. Returns whether it grew.
  bool reserve(std::size_t bytes) {
    if (bytes <= bytes_) return false;
    release();
    bytes_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* const address = mmap(nullptr, bytes_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) {
      std::fprintf(stderr, "fovea_bench: cannot map %zu MiB\n", bytes_ >> 20);
      std::exit(1);
    }
    mapped_ = address;
    const auto start = (reinterpret_cast<std::uintptr_t>(address) + kHugePage - 1) / kHugePage * kHugePage;
    data_ = reinterpret_cast<std::byte*>(start);
    madvise(data_, bytes_, MADV_HUGEPAGE);   // a refusal costs speed only
    return true;
  }

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  std::span<float> floats() const { return {reinterpret_cast<float*>(data_), bytes_ / sizeof(float)}; }

  void release() {
    if (mapped_ != nullptr) munmap(mapped_, bytes_ + kHugePage);
    mapped_ = nullptr;
    data_ = nullptr;
    bytes_ = 0;
  }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;

  void* mapped_ = nullptr;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Buffers the rows of a group share, by name; they go when the group is measured.
class GroupBuffers {
 public:
  // Filled by the first who asks for the name.
  std::span<std::byte> get(const std::string& name, std::size_t bytes,
                           const std::function<void(std::span<std::byte>)>& fill) {
    const auto [place, is_new] = buffers_.try_emplace(name);
    if (is_new) {
      place->second.reserve(bytes);
      fill({place->second.data(), bytes});
    }
    return {place->second.data(), bytes};
  }

 private:
  std::map<std::string, HugeBuffer> buffers_;
};

// Uniform in [-1, 1), the same at every place whatever the length. Touches every page, because
// untouched ones are all the same zero page and would be read from the cache.
inline void fill_random(std::span<float> numbers) {
  constexpr std::size_t kBlock = 1 << 16;
  for (std::size_t begin = 0; begin < numbers.size(); begin += kBlock) {
    std::uint64_t state = 0x9e3779b97f4a7c15u * (begin / kBlock + 1);
    for (float& number : numbers.subspan(begin, std::min(kBlock, numbers.size() - begin))) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      number = static_cast<float>(static_cast<std::int32_t>(state >> 32)) * 0x1p-31f;
    }
  }
}

}  // namespace fovea_bench
