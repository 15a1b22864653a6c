// SPDX-License-Identifier: Apache-2.0
#include "fovea/engine/parts/select.hpp"

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "catch_compat.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace {

using fovea::index_t;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> normal(index_t n, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<float> numbers(static_cast<std::size_t>(n));
  for (float& x : numbers) x = random.normal();
  return numbers;
}

// By weight descending, then by index; only what is there.
std::vector<std::int32_t> ordered(const std::vector<float>& weights) {
  std::vector<std::int32_t> order;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] >= 0.f) order.push_back(static_cast<std::int32_t>(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return weights[static_cast<std::size_t>(a)] > weights[static_cast<std::size_t>(b)];
  });
  return order;
}

std::vector<std::int32_t> run_top_p(const std::vector<float>& weights, double p, bool by_mass = false) {
  test::PoisonedBytes scratch(fovea::top_p_scratch_bytes(), 5);
  std::vector<std::int32_t> to(weights.size() + 4, -7);
  const index_t taken = by_mass ? fovea::top_mass(weights, p, to.data(), scratch.bytes())
                                : fovea::top_p(weights, p, to.data(), scratch.bytes());
  REQUIRE(scratch.guards_intact());
  for (std::size_t i = weights.size(); i < to.size(); ++i) REQUIRE(to[i] == -7);
  to.resize(static_cast<std::size_t>(taken));
  return to;
}

// The shortest prefix of the order that reaches p of the whole, sorted by index. Sums of the tests' numbers are exact.
std::vector<std::int32_t> prefix(const std::vector<float>& weights, double p) {
  const std::vector<std::int32_t> order = ordered(weights);
  double whole = 0, sum = 0;
  for (const std::int32_t i : order) whole += double{weights[static_cast<std::size_t>(i)]};
  std::vector<std::int32_t> taken;
  for (const std::int32_t i : order) {
    if (sum >= p * whole) break;
    sum += double{weights[static_cast<std::size_t>(i)]};
    taken.push_back(i);
  }
  std::sort(taken.begin(), taken.end());
  return taken;
}

}   // namespace

TEST_CASE("top-k of many rows: each as by itself, whatever the lanes", "[select]") {
  const index_t rows = 9, n = 1500, k = 40, stride = n + 5;
  std::vector<float> scores(static_cast<std::size_t>(rows * stride), kNan);
  std::vector<index_t> lengths;
  for (index_t r = 0; r < rows; ++r) {
    const std::vector<float> row = normal(n, 100 + static_cast<std::uint64_t>(r));
    std::copy(row.begin(), row.end(), scores.begin() + r * stride);
    lengths.push_back(r == 0 ? 0 : r == 1 ? 13 : r == 2 ? k : n - 150 * (r - 3));
  }
  const fovea::View<const float, 2> view{scores.data(), {rows, n}, {stride, 1}};
  std::vector<std::int32_t> wanted, wanted_counts;
  for (index_t r = 0; r < rows; ++r) {
    const auto length = static_cast<std::size_t>(lengths[static_cast<std::size_t>(r)]);
    std::vector<std::byte> scratch(fovea::top_k_scratch_bytes(static_cast<index_t>(length), k));
    std::vector<std::int32_t> to(static_cast<std::size_t>(k));
    wanted_counts.push_back(
        static_cast<std::int32_t>(fovea::top_k({scores.data() + r * stride, length}, k, to.data(), scratch)));
    wanted.insert(wanted.end(), to.begin(), to.end());
  }
  REQUIRE(wanted_counts[0] == 0);
  REQUIRE(wanted_counts[1] == 13);
  test::ThreadPerLane threads;
  test::Reversed reversed;
  for (const fovea::Executor& executor : {fovea::Executor(), fovea::Executor(threads, 3), fovea::Executor(reversed, 2)}) {
    test::PoisonedBytes scratch(fovea::top_k_rows_scratch_bytes(n, k, executor.lanes()), 1);
    std::vector<std::int32_t> to(wanted.size(), -7), counts(static_cast<std::size_t>(rows), -7);
    fovea::top_k_rows(view, lengths, k, to.data(), counts.data(), executor, scratch.bytes());
    CHECK(to == wanted);
    CHECK(counts == wanted_counts);
    CHECK(scratch.guards_intact());
  }
  // Without lengths and counts.
  std::vector<std::byte> scratch(fovea::top_k_rows_scratch_bytes(n, k, 1));
  std::vector<std::int32_t> to(wanted.size());
  fovea::top_k_rows(view, {}, k, to.data(), nullptr, {}, scratch);
  CHECK(std::equal(to.begin() + 3 * k, to.begin() + 4 * k, wanted.begin() + 3 * k));
  CHECK(std::count(to.begin(), to.end(), -1) == 0);
}

TEST_CASE("top-k of one row on several lanes is that of one", "[select]") {
  const index_t n = 3 * fovea::selection::kLaneScores + 77;
  test::ThreadPerLane threads;
  test::Reversed reversed;
  for (const bool many_ties : {false, true}) {
    std::vector<float> scores = normal(n, 4);
    for (float& x : scores) x = many_ties ? std::floor(x) : x;
    for (const index_t k : {16, 2048}) {
      std::vector<std::int32_t> wanted(static_cast<std::size_t>(k)), to(wanted.size());
      std::vector<std::byte> serial(fovea::top_k_scratch_bytes(n, k));
      REQUIRE(fovea::top_k(scores, k, wanted.data(), serial) == k);
      for (const fovea::Executor& executor :
           {fovea::Executor(), fovea::Executor(threads, 3), fovea::Executor(reversed, 7)}) {
        test::PoisonedBytes scratch(fovea::top_k_lanes_scratch_bytes(n, k), 9);
        std::fill(to.begin(), to.end(), -7);
        CHECK(fovea::top_k(scores, k, to.data(), scratch.bytes(), executor) == k);
        CHECK(to == wanted);
        CHECK(scratch.guards_intact());
      }
    }
  }
}

TEST_CASE("top-p: exact sums, every prefix and every tie", "[select]") {
  test::Random random(6);
  for (const index_t n : {1, 2, 16, 63, 200, 1000}) {
    for (const bool few_values : {false, true}) {
      std::vector<float> weights(static_cast<std::size_t>(n));
      // Multiples of 1/1024 below 4: sums are exact in any order.
      for (float& x : weights) x = static_cast<float>(few_values ? random.between(0, 3) : random.between(0, 4095)) / 1024.f;
      for (const double p : {0.015625, 0.25, 0.5, 0.75, 0.984375}) {
        INFO("n " << n << ", few values " << few_values << ", p " << p);
        CHECK(run_top_p(weights, p) == prefix(weights, p));
      }
    }
  }
}

TEST_CASE("top-p: softmax weights keep the least that reaches the mass", "[select]") {
  const index_t n = 5000;
  std::vector<float> weights = normal(n, 8);
  for (float& x : weights) x = std::exp(4 * x);
  double whole = 0;
  for (const float x : weights) whole += double{x};
  for (const double p : {0.1, 0.5, 0.85, 0.9, 0.98, 0.999}) {
    const std::vector<std::int32_t> taken = run_top_p(weights, p);
    double sum = 0;
    float least = kInf;
    for (const std::int32_t i : taken) {
      sum += double{weights[static_cast<std::size_t>(i)]};
      least = std::min(least, weights[static_cast<std::size_t>(i)]);
    }
    // A double rounds 5000 sums by less than 1e-12 of the whole.
    CHECK(sum >= (p - 1e-12) * whole);
    CHECK(sum - double{least} < (p + 1e-12) * whole);
    const std::vector<std::int32_t> order = ordered(weights);
    std::vector<std::int32_t> first(order.begin(), order.begin() + static_cast<index_t>(taken.size()));
    std::sort(first.begin(), first.end());
    CHECK(taken == first);
  }
}

TEST_CASE("top-p: the whole, nothing, equal weights, what is not there", "[select]") {
  const std::vector<float> weights{0.5f, kNan, 0.f, -1.f, 0.25f, 0.25f, -0.f};
  CHECK(run_top_p(weights, 1) == std::vector<std::int32_t>{0, 2, 4, 5, 6});
  CHECK(run_top_p(weights, 2) == std::vector<std::int32_t>{0, 2, 4, 5, 6});
  CHECK(run_top_p(weights, 0).empty());
  CHECK(run_top_p(weights, -1).empty());
  CHECK(run_top_p(weights, kNan).empty());
  CHECK(run_top_p(weights, 0.5) == std::vector<std::int32_t>{0});
  CHECK(run_top_p(weights, 0.75) == std::vector<std::int32_t>{0, 4});
  CHECK(run_top_p(weights, 0.76) == std::vector<std::int32_t>{0, 4, 5});
  CHECK(run_top_p({}, 0.9).empty());
  CHECK(run_top_p({}, 1).empty());
  CHECK(run_top_p({0.f, 0.f}, 0.9).empty());
  CHECK(run_top_p(std::vector<float>(100, 0.01f), 0.5).size() == 50);
  // A sum in floating point reaches 1 before the last weights; p = 1 takes them all the same.
  std::vector<float> tiny(1000, 1e-30f);
  tiny[7] = 1.f;
  CHECK(run_top_p(tiny, 1).size() == 1000);
  CHECK(run_top_p(tiny, 0.9999999) == std::vector<std::int32_t>{7});
}

TEST_CASE("top-mass: a mass given, also more than there is", "[select]") {
  const std::vector<float> weights{1.f, 4.f, 0.f, 2.f, 2.f};
  CHECK(run_top_p(weights, 4., true) == std::vector<std::int32_t>{1});
  CHECK(run_top_p(weights, 4.5, true) == std::vector<std::int32_t>{1, 3});
  CHECK(run_top_p(weights, 8.5, true) == std::vector<std::int32_t>{0, 1, 3, 4});
  CHECK(run_top_p(weights, 100., true) == std::vector<std::int32_t>{0, 1, 3, 4});
  CHECK(run_top_p(weights, 0., true).empty());
}
