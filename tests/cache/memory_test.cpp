// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/memory.hpp"

#include <cstdint>
#include <cstring>

#include "catch_compat.hpp"

using fovea::MemoryBlock;

TEST_CASE("a block starts at a cache line, a large one at a huge page, and is writable to its last byte", "[cache]") {
  for (const std::size_t size : {std::size_t{1}, std::size_t{100}, (std::size_t{2} << 20) - 1, std::size_t{2} << 20,
                                 (std::size_t{4} << 20) + 12345}) {
    CAPTURE(size);
    MemoryBlock block;
    REQUIRE(block.allocate(size).ok());
    CHECK(block.size() == size);
    CHECK(reinterpret_cast<std::uintptr_t>(block.data()) % (size >= std::size_t{2} << 20 ? std::size_t{2} << 20 : 64) == 0);
    std::memset(block.data(), 0xa5, size);
    CHECK(block.data()[size - 1] == std::byte{0xa5});
  }
}

TEST_CASE("a moved block is owned once", "[cache]") {
  MemoryBlock first;
  REQUIRE(first.allocate(1000).ok());
  std::byte* const data = first.data();
  MemoryBlock second(std::move(first));
  CHECK(first.data() == nullptr);
  CHECK(first.size() == 0);
  CHECK(second.data() == data);
  MemoryBlock third;
  REQUIRE(third.allocate(10).ok());
  third = std::move(second);
  CHECK(third.data() == data);
  CHECK(third.size() == 1000);
  REQUIRE(third.allocate(20).ok());
  CHECK(third.size() == 20);
}

TEST_CASE("an owned state that was moved from is empty", "[cache]") {
  struct Numbers {
    int count = 7;
    int* at = nullptr;
  };
  fovea::Owned<Numbers> first;
  REQUIRE(first.block.allocate(64).ok());
  first.state.count = 1;
  fovea::Owned<Numbers> second(std::move(first));
  CHECK(first.state.count == 7);
  CHECK(first.block.data() == nullptr);
  CHECK(second.state.count == 1);
  fovea::Owned<Numbers> third;
  third = std::move(second);
  CHECK(third.state.count == 1);
  CHECK(second.state.count == 7);
  CHECK(second.block.data() == nullptr);
}

// The sanitizers' own allocators end the program instead of returning null.
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define FOVEA_TEST_SANITIZED
#endif
#endif
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(FOVEA_TEST_SANITIZED)
TEST_CASE("memory the system has not got is a status, and the block keeps what it had", "[cache]") {
  MemoryBlock block;
  REQUIRE(block.allocate(100).ok());
  std::byte* const data = block.data();
  const fovea::Status status = block.allocate(std::size_t{1} << 47);
  CHECK(status.code() == fovea::Code::out_of_memory);
  CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring("140737488355328"));
  CHECK(block.data() == data);
  CHECK(block.size() == 100);
}
#endif
