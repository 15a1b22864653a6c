// SPDX-License-Identifier: Apache-2.0
// Pools that call the lanes in every order an executor may: at once, one after the other, backwards.
#pragma once
#include <thread>
#include <vector>

#include "fovea/core/executor.hpp"

namespace test {

// One std::thread per lane. The caller is lane 0's thread in real pools; here it only waits, which is allowed too.
struct ThreadPerLane {
  void run(int lanes, fovea::LaneFunction f) {
    std::vector<std::thread> threads;
    threads.reserve(static_cast<std::size_t>(lanes));
    for (int lane = 0; lane < lanes; ++lane) threads.emplace_back([f, lane] { f(lane); });
    for (std::thread& thread : threads) thread.join();
  }
};

struct InOrder {
  void run(int lanes, fovea::LaneFunction f) {
    for (int lane = 0; lane < lanes; ++lane) f(lane);
  }
};

struct Reversed {
  void run(int lanes, fovea::LaneFunction f) {
    for (int lane = lanes - 1; lane >= 0; --lane) f(lane);
  }
};

// Each lane on a thread of its own, but never two at a time: thread-local state of the library is fresh in each.
struct OneThreadAfterTheOther {
  void run(int lanes, fovea::LaneFunction f) {
    for (int lane = 0; lane < lanes; ++lane) std::thread([f, lane] { f(lane); }).join();
  }
};

}  // namespace test
