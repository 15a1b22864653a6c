// SPDX-License-Identifier: Apache-2.0
#include "fovea/core/workspace.hpp"

#include <vector>

#include "catch_compat.hpp"

TEST_CASE("counting and taking agree", "[workspace]") {
  const auto take_all = [](fovea::Bump& bump) {
    bump.take<float>(3);
    bump.take<double>(17);
    bump.take<std::byte>(0);
    bump.take<std::byte>(1);
    return bump.take<float>(16);
  };
  fovea::Bump counting;
  CHECK(take_all(counting) == nullptr);
  alignas(64) std::byte bytes[1024];
  fovea::Bump taking(bytes);
  const float* const last = take_all(taking);
  CHECK(counting.used() == taking.used());
  CHECK(reinterpret_cast<const std::byte*>(last + 16) <= bytes + taking.used());
  CHECK(taking.used() % fovea::kAlignment == 0);
}

TEST_CASE("every take starts on its own cache line", "[workspace]") {
  alignas(64) std::byte bytes[1024];
  fovea::Bump bump(bytes);
  for (fovea::index_t count : {1, 5, 16, 17}) {
    const auto address = reinterpret_cast<std::uintptr_t>(bump.take<float>(count));
    CHECK(address % fovea::kAlignment == 0);
  }
}

TEST_CASE("the aligned part of a buffer", "[workspace]") {
  alignas(64) std::byte bytes[256];
  CHECK(fovea::aligned(std::span(bytes)).size() == 256);
  CHECK(fovea::aligned(std::span(bytes).subspan(1)).size() == 192);
  CHECK(fovea::aligned(std::span(bytes).subspan(1)).data() == bytes + 64);
  CHECK(fovea::aligned(std::span(bytes).subspan(1, 10)).empty());
}
