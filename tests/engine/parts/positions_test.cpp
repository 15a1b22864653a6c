// SPDX-License-Identifier: Apache-2.0
#include "fovea/engine/parts/positions.hpp"

#include "catch_compat.hpp"
#include "fovea/reference/relative_bias.hpp"
#include "support/random.hpp"

using namespace fovea;

namespace {

std::vector<float> press(std::size_t heads) {
  std::vector<float> slopes(heads);
  alibi_slopes_press(slopes);
  return slopes;
}
std::vector<float> power(std::size_t heads) {
  std::vector<float> slopes(heads);
  alibi_slopes_power(slopes);
  return slopes;
}

// The bucket without a logarithm: with n buckets, e of them exact, the m-th shared one starts at e (max / e)^(m / (n - e)),
// so r is in it or behind it when r^(n - e) >= e^(n - e - m) max^m.
index_t bucket_by_powers(index_t r, index_t n, index_t max) {
  const index_t e = n / 2, root = n - e;
  if (r < e) return r;
  const auto raised = [](index_t base, index_t times) {
    long double product = 1;   // exact: powers of two, or up to 2^64
    for (index_t t = 0; t < times; ++t) product *= static_cast<long double>(base);
    return product;
  };
  index_t m = 0;
  while (m + 1 < root && raised(r, root) >= raised(e, root - m - 1) * raised(max, m + 1)) ++m;
  return e + m;
}

}   // namespace

TEST_CASE("ALiBi slopes: the two published rules", "[positions]") {
  CHECK(press(8) == std::vector<float>{0x1p-1f, 0x1p-2f, 0x1p-3f, 0x1p-4f, 0x1p-5f, 0x1p-6f, 0x1p-7f, 0x1p-8f});
  CHECK(press(6) == std::vector<float>{0x1p-2f, 0x1p-4f, 0x1p-6f, 0x1p-8f, 0x1p-1f, 0x1p-3f});
  CHECK(press(1) == std::vector<float>{0x1p-8f});
  CHECK(press(0).empty());
  const std::vector<float> twelve = press(12);
  CHECK(std::vector<float>(twelve.begin(), twelve.begin() + 8) == press(8));
  const double rest[4] = {0.707107, 0.353553, 0.176777, 0.0883883};
  for (std::size_t h = 0; h < 4; ++h) CHECK(twelve[8 + h] == Catch::Approx(rest[h]).margin(5e-7));
  for (const std::size_t heads : {1u, 2u, 4u, 16u, 64u}) CHECK(press(heads) == power(heads));
  for (const std::size_t heads : {3u, 6u, 12u, 20u}) CHECK(press(heads) != power(heads));
  CHECK(power(12)[11] == 0x1p-8f);
  CHECK(power(12)[2] == 0x1p-2f);
  CHECK(power(12)[0] == Catch::Approx(std::pow(2., -2. / 3)).epsilon(1e-7));
}

TEST_CASE("T5 buckets: golden numbers", "[positions]") {
  const std::pair<index_t, index_t> both[] = {{0, 0},   {1, 17},  {-1, 1},   {8, 24},    {-8, 8},    {16, 26},
                                              {32, 28}, {64, 30}, {127, 31}, {1000, 31}, {-1000, 15}};
  for (const auto& [distance, bucket] : both) CHECK(t5_bucket(distance, {}) == bucket);
  const std::pair<index_t, index_t> back[] = {{1, 0},    {-15, 15}, {-16, 16},  {-18, 16}, {-19, 17},
                                              {-32, 21}, {-64, 26}, {-100, 30}, {-127, 31}};
  for (const auto& [distance, bucket] : back) CHECK(t5_bucket(distance, {.bidirectional = false}) == bucket);
  const std::pair<index_t, index_t> edges[] = {{11, 8},  {12, 9},  {15, 9},  {16, 10}, {23, 11},
                                               {32, 12}, {46, 13}, {64, 14}, {90, 14}, {91, 15}};
  for (const auto& [far, bucket] : edges) {
    CHECK(t5_bucket(-far, {}) == bucket);
    CHECK(t5_bucket(far, {}) == 16 + bucket);
  }
}

TEST_CASE("T5 buckets: every edge, without logarithms", "[positions]") {
  for (const bool bidirectional : {true, false}) {
    const index_t side = bidirectional ? 16 : 32;
    for (index_t r = 0; r <= 300; ++r) {
      const index_t expected = bucket_by_powers(std::min<index_t>(r, 128), side, 128);
      INFO(r);
      CHECK(t5_bucket(-r, {.bidirectional = bidirectional}) == expected);
      CHECK(t5_bucket(r, {.bidirectional = bidirectional}) == (bidirectional ? (r == 0 ? 0 : side + expected) : 0));
      CHECK(reference::t5_bucket(-r, 32, 128, bidirectional) == expected);
      CHECK(reference::t5_bucket(r, 32, 128, bidirectional) == t5_bucket(r, {.bidirectional = bidirectional}));
    }
  }
}

TEST_CASE("a vector of neighbouring distances, far beyond both ends of the table", "[positions]") {
  test::Random random(3);
  for (const index_t distances : {1, 2, 15, 16, 17, 40}) {
    for (const index_t lowest : {index_t{-30}, index_t{-3}, index_t{0}, index_t{5}}) {
      std::vector<float> values(static_cast<std::size_t>(distances)),
          table(static_cast<std::size_t>(distance_floats(distances)));
      for (float& x : values) x = random.normal();
      for (std::size_t n = 0; n < table.size(); ++n)
        table[n] =
            values[static_cast<std::size_t>(std::clamp<index_t>(static_cast<index_t>(n) - kDistancePad, 0, distances - 1))];
      const index_t pos = random.between(-50, 200), highest = lowest + distances - 1;
      const DistanceLane lane = distance_lane(table.data(), pos, lowest, highest);
      for (index_t key = pos - 100; key < pos + 100; key += 3) {
        alignas(f32) float lanes[kLanes];
        store(lanes, lane(f32(0.5f), lane_numbers() + i32(static_cast<std::int32_t>(key))));
        for (index_t n = 0; n < kLanes; ++n) {
          const index_t distance = std::clamp(key + n - pos, lowest, highest);
          REQUIRE(lanes[n] == 0.5f + values[static_cast<std::size_t>(distance - lowest)]);
        }
      }
    }
  }
}
