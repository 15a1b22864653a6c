// SPDX-License-Identifier: Apache-2.0
#include "fovea/simd/select.hpp"

#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/simd/denormals.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace {

using fovea::index_t;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The total order as it is written down: by comparisons of doubles, then by index.
std::vector<std::int32_t> best(const std::vector<float>& scores, index_t k) {
  std::vector<std::int32_t> order;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] > -kInf) order.push_back(static_cast<std::int32_t>(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return double{scores[static_cast<std::size_t>(a)]} > double{scores[static_cast<std::size_t>(b)]};
  });
  order.resize(std::min(order.size(), static_cast<std::size_t>(k)));
  std::sort(order.begin(), order.end());
  return order;
}

constexpr std::int32_t kGuard = 0x5eed;

// The k entries that top_k wrote, checked for guards, padding and count.
std::vector<std::int32_t> run_top_k(const std::vector<float>& scores, index_t k) {
  const auto n = static_cast<index_t>(scores.size());
  test::Poisoned row(n);
  std::copy(scores.begin(), scores.end(), row.data());
  test::PoisonedBytes scratch(fovea::top_k_scratch_bytes(n, k), 3);
  std::vector<std::int32_t> to(static_cast<std::size_t>(k) + 8, kGuard);
  const index_t taken = fovea::top_k({row.data(), static_cast<std::size_t>(n)}, k, to.data(), scratch.bytes());
  REQUIRE(scratch.guards_intact());
  REQUIRE(taken <= k);
  for (index_t i = taken; i < k; ++i) REQUIRE(to[static_cast<std::size_t>(i)] == -1);
  for (std::size_t i = static_cast<std::size_t>(k); i < to.size(); ++i) REQUIRE(to[i] == kGuard);
  to.resize(static_cast<std::size_t>(taken));
  return to;
}

enum class Kind { normal, integers, equal, two, rising, falling, periodic, mostly_masked, special, outlier };
constexpr Kind kKinds[] = {Kind::normal,  Kind::integers, Kind::equal,         Kind::two,     Kind::rising,
                           Kind::falling, Kind::periodic, Kind::mostly_masked, Kind::special, Kind::outlier};

std::vector<float> make(Kind kind, index_t n, std::uint64_t seed) {
  test::Random random(seed);
  const float specials[] = {kNan,
                            -kNan,
                            kInf,
                            -kInf,
                            0.f,
                            -0.f,
                            1e-40f,
                            -1e-40f,
                            std::numeric_limits<float>::denorm_min(),
                            -1e-45f,
                            1.f,
                            -1.f,
                            std::numeric_limits<float>::max(),
                            std::numeric_limits<float>::lowest()};
  std::vector<float> scores(static_cast<std::size_t>(n));
  for (index_t i = 0; i < n; ++i) {
    float& x = scores[static_cast<std::size_t>(i)];
    switch (kind) {
      case Kind::normal:
        x = random.normal();
        break;
      case Kind::integers:
        x = static_cast<float>(random.between(-5, 5));
        break;
      case Kind::equal:
        x = -2.5f;
        break;
      case Kind::two:
        x = random.one_in(2) ? 1.f : -1.f;
        break;
      case Kind::rising:
        x = static_cast<float>(i);
        break;
      case Kind::falling:
        x = -static_cast<float>(i);
        break;
      case Kind::periodic:
        x = static_cast<float>(i % 64) + 0.25f * random.normal();
        break;
      case Kind::mostly_masked:
        x = random.one_in(50) ? random.normal() : -kInf;
        break;
      case Kind::special:
        x = specials[random.below(14)];
        break;
      case Kind::outlier:
        x = i == n / 2 ? 1e30f : 1e-3f * random.normal();
        break;
    }
  }
  return scores;
}

}   // namespace

TEST_CASE("order keys: the published radix keys, zeros together, NaN lowest", "[select]") {
  const auto radix = [](float x) { return static_cast<std::uint32_t>(fovea::order_key(x)) ^ 0x80000000u; };
  CHECK(radix(-kInf) == 0x007fffffu);
  CHECK(radix(-1.f) == 0x407fffffu);
  CHECK(radix(0.f) == 0x80000000u);
  CHECK(radix(-0.f) == 0x80000000u);
  CHECK(radix(1.f) == 0xbf800000u);
  CHECK(radix(3.5f) == 0xc0600000u);
  CHECK(radix(kInf) == 0xff800000u);
  CHECK(radix(kNan) == 0u);
  CHECK(radix(-kNan) == 0u);
  CHECK(fovea::score_of_key(fovea::order_key(-3.5f)) == -3.5f);
  // A vector of them has the same keys in every lane.
  const std::vector<float> scores = make(Kind::special, 4 * fovea::kLanes, 5);
  for (index_t i = 0; i < 4 * fovea::kLanes; i += fovea::kLanes) {
    alignas(fovea::i32) std::int32_t keys[fovea::kLanes];
    fovea::selection::order_keys(fovea::load(scores.data() + i)).store_aligned(keys);
    for (index_t n = 0; n < fovea::kLanes; ++n) {
      const float score = scores[static_cast<std::size_t>(i + n)];
      CHECK(keys[n] == (std::isnan(score) ? std::min(keys[n], fovea::selection::kNever - 1) : fovea::order_key(score)));
    }
  }
}

TEST_CASE("top-k: short rows, every kind of scores, k from 1 to beyond the row", "[select]") {
  for (const Kind kind : kKinds) {
    for (const index_t n : {0, 1, 3, 15, 16, 17, 31, 64, 65, 200}) {
      const std::vector<float> scores = make(kind, n, 17 + static_cast<std::uint64_t>(n));
      for (const index_t k : {index_t{1}, index_t{2}, index_t{7}, index_t{16}, n, n + 5}) {
        if (k < 1) continue;
        INFO("kind " << static_cast<int>(kind) << ", n " << n << ", k " << k);
        CHECK(run_top_k(scores, k) == best(scores, k));
      }
    }
  }
}

TEST_CASE("top-k: long rows, from a sample or by passes", "[select]") {
  for (const Kind kind : kKinds) {
    for (const index_t n : {1025, 4097, 20000}) {
      const std::vector<float> scores = make(kind, n, 3 + static_cast<std::uint64_t>(n));
      for (const index_t k : {index_t{1}, index_t{16}, index_t{300}, n / 4 - 1, n / 4, n - 1}) {
        INFO("kind " << static_cast<int>(kind) << ", n " << n << ", k " << k);
        CHECK(run_top_k(scores, k) == best(scores, k));
      }
    }
  }
}

TEST_CASE("top-k: more scores than the sample takes every 16th of", "[select]") {
  const index_t n = 150001;
  for (const Kind kind : {Kind::normal, Kind::integers, Kind::mostly_masked, Kind::special}) {
    const std::vector<float> scores = make(kind, n, 23);
    for (const index_t k : {16, 2048}) CHECK(run_top_k(scores, k) == best(scores, k));
  }
}

TEST_CASE("top-k: nothing taken, nothing asked for", "[select]") {
  CHECK(run_top_k({}, 3).empty());
  CHECK(run_top_k({-kInf, kNan, -kInf}, 2).empty());
  CHECK(run_top_k(std::vector<float>(5000, -kInf), 7).empty());
  CHECK(run_top_k(std::vector<float>(5000, kNan), 7).empty());
  std::int32_t untouched = kGuard;
  std::vector<std::byte> scratch(fovea::top_k_scratch_bytes(4, 0));
  const float scores[4] = {1, 2, 3, 4};
  CHECK(fovea::top_k(scores, 0, &untouched, scratch) == 0);
  CHECK(untouched == kGuard);
}

TEST_CASE("top-k: the golden tie of the index scores goes to the lower index", "[select]") {
  CHECK(run_top_k({0.f, 0.f, -0.5f, 0.f}, 1) == std::vector<std::int32_t>{0});
  CHECK(run_top_k({0.f, 0.f, -0.5f, 0.f}, 3) == std::vector<std::int32_t>{0, 1, 3});
  CHECK(run_top_k({-0.f, 0.f, -0.5f, 0.f}, 1) == std::vector<std::int32_t>{0});
}

TEST_CASE("top-k: a processor that flushes denormals selects the same", "[select]") {
  test::Random random(9);
  std::vector<float> scores(6000);
  for (float& x : scores)
    x = std::bit_cast<float>(static_cast<std::uint32_t>(random.below(1 << 20)) | (random.one_in(2) ? 0x80000000u : 0u));
  const std::vector<std::int32_t> wanted = best(scores, 500);
  const fovea::FlushDenormals flush;
  CHECK(run_top_k(scores, 500) == wanted);
}

TEST_CASE("top-k: memory for a long row and a large k serves every smaller one", "[select]") {
  for (const index_t k : {1, 16, 100, 1000}) {
    std::size_t before = 0;
    for (index_t n = 0; n < 9000; n += 7) {
      REQUIRE(fovea::top_k_scratch_bytes(n, k) >= before);
      REQUIRE(fovea::top_k_scratch_bytes(n, k + 1) >= fovea::top_k_scratch_bytes(n, k));
      before = fovea::top_k_scratch_bytes(n, k);
    }
  }
}

TEST_CASE("thresholds: at least, above, in order, NaN never", "[select]") {
  for (const Kind kind : kKinds) {
    for (const index_t n : {0, 1, 63, 64, 65, 4096, 5003}) {
      const std::vector<float> scores = make(kind, n, 41);
      for (const float bound : {0.f, -0.f, 1.f, -2.5f, kInf, -kInf, kNan}) {
        std::vector<std::int32_t> at_least, above;
        for (std::size_t i = 0; i < scores.size(); ++i) {
          if (scores[i] >= bound) at_least.push_back(static_cast<std::int32_t>(i));
          if (scores[i] > bound) above.push_back(static_cast<std::int32_t>(i));
        }
        std::vector<std::int32_t> to(static_cast<std::size_t>(n) + 4, kGuard);
        INFO("kind " << static_cast<int>(kind) << ", n " << n << ", bound " << bound);
        REQUIRE(fovea::select_at_least(scores, bound, to.data()) == static_cast<index_t>(at_least.size()));
        REQUIRE(std::equal(at_least.begin(), at_least.end(), to.begin()));
        REQUIRE(fovea::select_above(scores, bound, to.data()) == static_cast<index_t>(above.size()));
        REQUIRE(std::equal(above.begin(), above.end(), to.begin()));
        for (std::size_t i = static_cast<std::size_t>(n); i < to.size(); ++i) REQUIRE(to[i] == kGuard);
      }
    }
  }
}

TEST_CASE("smallest distances: ties to the lower index, larger ones never", "[select]") {
  test::Random random(77);
  for (const std::uint16_t most : {std::uint16_t{0}, std::uint16_t{1}, std::uint16_t{384}, std::uint16_t{65535}}) {
    for (const index_t n : {0, 1, 31, 32, 33, 100, 3000, 5003}) {
      std::vector<std::uint16_t> distances(static_cast<std::size_t>(n));
      for (std::uint16_t& d : distances)
        d = static_cast<std::uint16_t>(random.one_in(10) ? random.below(65536) : random.below(index_t{most} + 1));
      for (const index_t k : {index_t{1}, index_t{5}, n / 2, n, n + 3}) {
        if (k < 1) continue;
        std::vector<std::int32_t> order;
        for (std::size_t i = 0; i < distances.size(); ++i) {
          if (distances[i] <= most) order.push_back(static_cast<std::int32_t>(i));
        }
        std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
          return distances[static_cast<std::size_t>(a)] < distances[static_cast<std::size_t>(b)];
        });
        order.resize(std::min(order.size(), static_cast<std::size_t>(k)));
        std::sort(order.begin(), order.end());
        const std::size_t taken = order.size();
        order.resize(static_cast<std::size_t>(k), -1);
        order.push_back(kGuard);
        std::vector<std::int32_t> to(static_cast<std::size_t>(k) + 1, kGuard);
        INFO("most " << most << ", n " << n << ", k " << k);
        REQUIRE(fovea::select_smallest(distances, k, most, to.data()) == static_cast<index_t>(taken));
        REQUIRE(to == order);
      }
    }
  }
}
