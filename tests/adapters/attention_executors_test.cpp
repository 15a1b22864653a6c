// SPDX-License-Identifier: Apache-2.0
// fovea::attention on every pool: the bits of the serial run, for more and fewer lanes than threads, and from inside the pool.
#include <atomic>
#include <cstddef>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/adapters/eigen_pool.hpp"
#include "fovea/adapters/std_threads.hpp"
#include "fovea/attention.hpp"
#if defined(_OPENMP)
#include "fovea/adapters/openmp.hpp"
#endif
#if defined(FOVEA_TEST_TBB)
#include "fovea/adapters/tbb.hpp"
#endif

namespace {

using fovea::index_t;

// Two sequences, one in the prefill and one in the decode regime with a split over the keys.
struct Problem {
  index_t q_heads = 4, kv_heads = 2, dim = 24;
  std::vector<index_t> cu_len_q{0, 70, 71}, cu_len_k{0, 90, 1690};
  std::vector<float> q, k, v;

  Problem() {
    std::mt19937 bits(5);
    const auto fill = [&](std::vector<float>& values, index_t count) {
      for (index_t i = 0; i < count; ++i) values.push_back(static_cast<float>(bits()) * 0x1p-31f - 1.f);
    };
    fill(q, cu_len_q.back() * q_heads * dim);
    fill(k, cu_len_k.back() * kv_heads * dim);
    fill(v, cu_len_k.back() * kv_heads * dim);
  }

  std::vector<float> run(fovea::Executor executor) const {
    std::vector<float> out(q.size(), -1.f);
    const fovea::Status status = fovea::attention(
        fovea::ragged(q.data(), cu_len_q.back(), q_heads, dim), fovea::ragged(k.data(), cu_len_k.back(), kv_heads, dim),
        fovea::ragged(v.data(), cu_len_k.back(), kv_heads, dim), fovea::ragged(out.data(), cu_len_q.back(), q_heads, dim),
        {.causal = fovea::Causal::bottom_right, .cu_len_q = cu_len_q, .cu_len_k = cu_len_k, .executor = executor});
    if (!status.ok()) out.clear();
    return out;
  }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

template <class Pool>
void gives_the_serial_bits(Pool& pool) {
  const Problem problem;
  const std::vector<float> expected = problem.run({});
  REQUIRE(!expected.empty());
  for (const int lanes : {1, 2, 3, 4, 8, 19}) {
    CAPTURE(lanes);
    CHECK(same_bits(problem.run(fovea::Executor(pool, lanes)), expected));
  }
  // Each lane of an outer run makes a call of its own on the same pool.
  std::atomic<int> different{0};
  auto outer = [&](int) { different += !same_bits(problem.run(fovea::Executor(pool, 3)), expected); };
  pool.run(5, fovea::LaneFunction(outer));
  CHECK(different.load() == 0);
  // Two threads of the caller's use the pool at the same time.
  std::thread other([&] { outer(0); });
  outer(1);
  other.join();
  CHECK(different.load() == 0);
}

}   // namespace

TEST_CASE("attention on StdThreads has the serial bits", "[adapters][bits]") {
  for (const int threads : {1, 2, 4}) {
    fovea::StdThreads pool(threads);
    gives_the_serial_bits(pool);
  }
}

TEST_CASE("attention on EigenPool has the serial bits", "[adapters][bits]") {
  for (const int threads : {1, 3}) {
    Eigen::ThreadPool threads_of_eigen(threads);
    fovea::EigenPool pool(threads_of_eigen);
    gives_the_serial_bits(pool);
  }
}

#if defined(_OPENMP)
TEST_CASE("attention on OpenMp has the serial bits", "[adapters][bits][openmp]") {
  for (const int threads : {1, 2, 4}) {
    fovea::OpenMp pool(threads);
    gives_the_serial_bits(pool);
  }
}
#endif

#if defined(FOVEA_TEST_TBB)
TEST_CASE("attention on Tbb has the serial bits", "[adapters][bits][tbb]") {
  fovea::Tbb pool;
  gives_the_serial_bits(pool);
  tbb::task_arena arena(3);
  fovea::Tbb in_arena(arena);
  gives_the_serial_bits(in_arena);
}
#endif
