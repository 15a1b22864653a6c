// SPDX-License-Identifier: Apache-2.0
#include "fovea/core/executor.hpp"

#include <atomic>
#include <vector>

#include "catch_compat.hpp"
#include "support/executors.hpp"

TEST_CASE("the default executor runs one lane here and now", "[executor]") {
  const fovea::Executor executor;
  CHECK(executor.lanes() == 1);
  std::vector<int> seen;
  auto note = [&](int lane) { seen.push_back(lane); };
  executor.run(note);
  CHECK(seen == std::vector<int>{0});
  executor.run(3, note);
  CHECK(seen == std::vector<int>{0, 0, 1, 2});
}

TEST_CASE("a pool is called with all lanes, each once", "[executor]") {
  test::ThreadPerLane threads;
  test::Reversed reversed;
  test::OneThreadAfterTheOther turns;
  const fovea::Executor executors[] = {{threads, 7}, {reversed, 7}, {turns, 7}};
  for (const fovea::Executor& executor : executors) {
    std::atomic<int> calls[7] = {};
    auto count = [&](int lane) { ++calls[lane]; };
    executor.run(count);
    for (const auto& one : calls) CHECK(one == 1);
    executor.run(2, count);
    CHECK(calls[1] == 2);
    CHECK(calls[2] == 1);
  }
}
