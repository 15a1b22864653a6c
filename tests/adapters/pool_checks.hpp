// SPDX-License-Identifier: Apache-2.0
// What every pool owes to fovea::Executor, whatever it is made of.
#pragma once
#include <atomic>
#include <cstddef>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/core/executor.hpp"

namespace test {

// Each lane 0 .. lanes-1 exactly once, all done when run returns: fewer lanes than threads, as many, and far more.
template <class Pool>
void runs_every_lane_once(Pool& pool) {
  for (const int lanes : {0, 1, 2, 3, 4, 7, 64, 1000}) {
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(lanes));
    auto count = [&](int lane) { calls[static_cast<std::size_t>(lane)].fetch_add(1, std::memory_order_relaxed); };
    pool.run(lanes, fovea::LaneFunction(count));
    int wrong = 0;
    for (const std::atomic<int>& n : calls) wrong += n.load(std::memory_order_relaxed) != 1;
    CAPTURE(lanes);
    CHECK(wrong == 0);
  }
}

// Writes of the lanes are seen by the caller without further ado, over many short rounds: stale wake-ups and lanes that leak
// into the next round show here, and as races under ThreadSanitizer.
template <class Pool>
void publishes_results_in_every_round(Pool& pool, int rounds = 2000) {
  const int lanes = 5;
  std::vector<int> written(lanes);
  int wrong = 0;
  for (int round = 1; round <= rounds; ++round) {
    auto write = [&](int lane) { written[static_cast<std::size_t>(lane)] = round + lane; };
    pool.run(lanes, fovea::LaneFunction(write));
    for (int lane = 0; lane < lanes; ++lane) wrong += written[static_cast<std::size_t>(lane)] != round + lane;
  }
  CHECK(wrong == 0);
}

// A lane may itself run lanes on the same pool (an engine that calls the library from its own tasks): no deadlock, nothing
// lost.
template <class Pool>
void may_be_entered_again(Pool& pool) {
  const int outer = 6, inner = 9;
  std::vector<std::atomic<int>> calls(outer * inner);
  auto outer_lane = [&](int i) {
    auto inner_lane = [&](int j) { calls[static_cast<std::size_t>(i * inner + j)].fetch_add(1, std::memory_order_relaxed); };
    pool.run(inner, fovea::LaneFunction(inner_lane));
  };
  pool.run(outer, fovea::LaneFunction(outer_lane));
  int wrong = 0;
  for (const std::atomic<int>& n : calls) wrong += n.load(std::memory_order_relaxed) != 1;
  CHECK(wrong == 0);
}

template <class Pool>
void keeps_the_promises_of_a_pool(Pool& pool) {
  runs_every_lane_once(pool);
  publishes_results_in_every_round(pool);
  may_be_entered_again(pool);
  const fovea::Executor executor(pool, pool.threads());
  CHECK(executor.lanes() == pool.threads());
  std::atomic<int> lanes{0};
  auto count = [&](int) { lanes.fetch_add(1, std::memory_order_relaxed); };
  executor.run(count);
  CHECK(lanes.load() == pool.threads());
}

}   // namespace test
