// SPDX-License-Identifier: Apache-2.0
#include "fovea/adapters/std_threads.hpp"

#include <set>
#include <thread>
#include <vector>

#include "catch_compat.hpp"
#include "pool_checks.hpp"

TEST_CASE("StdThreads keeps the promises of a pool for 1 to 8 threads", "[adapters]") {
  for (const int threads : {1, 2, 3, 8}) {
    CAPTURE(threads);
    fovea::StdThreads pool(threads);
    CHECK(pool.threads() == threads);
    test::keeps_the_promises_of_a_pool(pool);
  }
}

TEST_CASE("StdThreads counts the calling thread, and no number of threads means one", "[adapters]") {
  CHECK(fovea::StdThreads(0).threads() == 1);
  CHECK(fovea::StdThreads(-3).threads() == 1);
}

TEST_CASE("StdThreads: lanes that wait for each other run at the same time", "[adapters]") {
  fovea::StdThreads pool(3);
  std::atomic<int> arrived{0};
  std::vector<std::thread::id> ran_on(3);
  auto meet = [&](int lane) {
    ran_on[static_cast<std::size_t>(lane)] = std::this_thread::get_id();
    arrived.fetch_add(1);
    while (arrived.load() < 3) std::this_thread::yield();
  };
  pool.run(3, fovea::LaneFunction(meet));
  CHECK(std::set<std::thread::id>(ran_on.begin(), ran_on.end()).size() == 3);
}

TEST_CASE("StdThreads: two threads may use one pool at the same time", "[adapters]") {
  fovea::StdThreads pool(3);
  std::atomic<int> wrong{0};
  auto user = [&] {
    for (int round = 0; round < 300; ++round) {
      std::vector<int> calls(7);
      auto count = [&](int lane) { ++calls[static_cast<std::size_t>(lane)]; };
      pool.run(7, fovea::LaneFunction(count));
      for (const int n : calls) wrong += n != 1;
    }
  };
  std::thread other(user);
  user();
  other.join();
  CHECK(wrong.load() == 0);
}

TEST_CASE("StdThreads: pools come and go, used or not", "[adapters]") {
  int lanes = 0;
  for (int n = 0; n < 50; ++n) {
    fovea::StdThreads pool(4);
    if (n % 2 == 0) continue;
    std::atomic<int> ran{0};
    auto count = [&](int) { ran.fetch_add(1); };
    pool.run(4, fovea::LaneFunction(count));
    lanes += ran.load();
  }
  CHECK(lanes == 100);
}
