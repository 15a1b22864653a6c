// SPDX-License-Identifier: Apache-2.0
// Executor over oneTBB: fovea::Tbb pool; options.executor = {pool, pool.threads()};
#pragma once
#include <tbb/parallel_for.h>
#include <tbb/partitioner.h>
#include <tbb/task_arena.h>

#include "../core/executor.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Runs in the arena it is called from, or in one of the caller's that must outlive the adapter.
class Tbb {
 public:
  Tbb() = default;
  explicit Tbb(tbb::task_arena& arena) : arena_(&arena) {}

  int threads() const { return arena_ == nullptr ? tbb::this_task_arena::max_concurrency() : arena_->max_concurrency(); }

  void run(int lanes, LaneFunction f) {
    if (lanes <= 1) {
      for (int lane = 0; lane < lanes; ++lane) f(lane);
      return;
    }
    if (arena_ == nullptr) return deal(lanes, f);
    arena_->execute([&] { deal(lanes, f); });
  }

 private:
  // A thread that waits for the last lanes steals work. Isolation keeps it from stealing a task of the caller's that enters
  // the library again on the same thread. simple_partitioner: one lane is one task, none are lumped together.
  static void deal(int lanes, LaneFunction f) {
    tbb::this_task_arena::isolate([&] {
      tbb::parallel_for(
          0, lanes, 1, [&](int lane) { f(lane); }, tbb::simple_partitioner());
    });
  }

  tbb::task_arena* arena_ = nullptr;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
