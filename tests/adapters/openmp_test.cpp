// SPDX-License-Identifier: Apache-2.0
#if defined(_OPENMP)
#include "fovea/adapters/openmp.hpp"

#include <atomic>

#include "catch_compat.hpp"
#include "pool_checks.hpp"

TEST_CASE("OpenMp keeps the promises of a pool", "[adapters][openmp]") {
  for (const int threads : {1, 2, 4}) {
    CAPTURE(threads);
    fovea::OpenMp pool(threads);
    CHECK(pool.threads() == threads);
    test::keeps_the_promises_of_a_pool(pool);
  }
}

TEST_CASE("OpenMp: inside a parallel region one thread is granted and runs every lane", "[adapters][openmp]") {
  fovea::OpenMp pool(4);
  std::atomic<int> lanes{0}, regions{0};
#pragma omp parallel num_threads(3)
  {
    regions.fetch_add(1);
    auto count = [&](int) { lanes.fetch_add(1); };
    pool.run(11, fovea::LaneFunction(count));
  }
  CHECK(regions.load() >= 1);
  CHECK(lanes.load() == 11 * regions.load());
}
#endif
