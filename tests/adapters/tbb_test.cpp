// SPDX-License-Identifier: Apache-2.0
#if defined(FOVEA_TEST_TBB)
#include "fovea/adapters/tbb.hpp"

#include <tbb/global_control.h>
#include <tbb/parallel_for.h>

#include <atomic>

#include "catch_compat.hpp"
#include "pool_checks.hpp"

TEST_CASE("Tbb keeps the promises of a pool, in the current arena and in one of its own", "[adapters][tbb]") {
  fovea::Tbb pool;
  test::keeps_the_promises_of_a_pool(pool);
  tbb::task_arena arena(3);
  fovea::Tbb in_arena(arena);
  CHECK(in_arena.threads() == 3);
  test::keeps_the_promises_of_a_pool(in_arena);
}

TEST_CASE("Tbb: one thread granted runs every lane", "[adapters][tbb]") {
  const tbb::global_control one(tbb::global_control::max_allowed_parallelism, 1);
  fovea::Tbb pool;
  test::runs_every_lane_once(pool);
}

TEST_CASE("Tbb: a thread inside a call does not begin another of the caller's tasks", "[adapters][tbb]") {
  tbb::task_arena arena(4);
  fovea::Tbb pool(arena);
  std::atomic<int> entered_again{0}, lanes{0};
  arena.execute([&] {
    tbb::parallel_for(0, 64, [&](int) {
      thread_local int depth = 0;
      if (++depth > 1) entered_again.fetch_add(1);
      auto count = [&](int) {
        for (int spin = 0; spin < 1000; ++spin) lanes.load(std::memory_order_relaxed);
        lanes.fetch_add(1);
      };
      pool.run(8, fovea::LaneFunction(count));
      --depth;
    });
  });
  CHECK(lanes.load() == 64 * 8);
  CHECK(entered_again.load() == 0);
}
#endif
