// SPDX-License-Identifier: Apache-2.0
#include "fovea/adapters/eigen_pool.hpp"

#include <atomic>

#include "catch_compat.hpp"
#include "pool_checks.hpp"

TEST_CASE("EigenPool keeps the promises of a pool", "[adapters]") {
  for (const int threads : {1, 2, 4}) {
    CAPTURE(threads);
    Eigen::ThreadPool threads_of_eigen(threads);
    fovea::EigenPool pool(threads_of_eigen);
    CHECK(pool.threads() == threads + 1);
    test::keeps_the_promises_of_a_pool(pool);
  }
}

TEST_CASE("EigenPool: a call from inside the pool ends although every pool thread is busy", "[adapters]") {
  const int threads = 2;
  Eigen::ThreadPool threads_of_eigen(threads);
  fovea::EigenPool pool(threads_of_eigen);
  Eigen::Barrier begun(threads), done(threads);
  std::atomic<int> lanes{0}, seen_threads{0};
  for (int n = 0; n < threads; ++n) {
    threads_of_eigen.Schedule([&] {
      begun.Notify();
      begun.Wait();   // from here on no thread of the pool is idle
      seen_threads.fetch_add(pool.threads());
      auto count = [&](int) { lanes.fetch_add(1); };
      pool.run(16, fovea::LaneFunction(count));
      done.Notify();
    });
  }
  done.Wait();
  CHECK(lanes.load() == 16 * threads);
  CHECK(seen_threads.load() == threads * threads);   // inside the pool the caller is one of its threads
}
