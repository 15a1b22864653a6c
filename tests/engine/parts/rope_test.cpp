// SPDX-License-Identifier: Apache-2.0
#include "fovea/engine/parts/rope.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/reference/rope.hpp"
#include "reference/rope_golden.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

using namespace fovea;
using Catch::Matchers::ContainsSubstring;

namespace {

constexpr double kUnit = 0x1p-24;
constexpr RopeLayout kLayouts[] = {RopeLayout::half_split, RopeLayout::interleaved};

const char* name_of(RopeLayout layout) { return layout == RopeLayout::half_split ? "half-split" : "interleaved"; }

// A table with its memory and frequencies, of the positions first_pos .. first_pos + len - 1.
struct Table {
  RopeOptions options;
  std::vector<double> inv_freq;
  float attention = 0;
  std::vector<float> memory;
  RopeTable rows;

  Table(const RopeOptions& o, index_t first_pos, index_t len)
      : options(o),
        inv_freq(static_cast<std::size_t>(o.rotary_dim / 2)),
        memory(static_cast<std::size_t>(rope_table_floats(len, o.rotary_dim))) {
    REQUIRE(rope_frequencies(o, inv_freq, attention).ok());
    REQUIRE(make_rope_table(rows, inv_freq, attention, first_pos, len, memory).ok());
  }
  // The row of one token with three positions.
  Table(const RopeOptions& o, std::array<index_t, 3> ids) : Table(o, 0, 1) {
    REQUIRE(make_rope_table(rows, inv_freq, attention, {ids.data(), {3, 1}, {1, 1}}, o.sections, memory).ok());
  }
};

std::vector<float> random_numbers(index_t count, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& value : x) value = random.normal();
  return x;
}

// The two places of pair m.
std::array<std::size_t, 2> pair_at(RopeLayout layout, index_t m, index_t pairs) {
  if (layout == RopeLayout::half_split) return {static_cast<std::size_t>(m), static_cast<std::size_t>(m + pairs)};
  return {static_cast<std::size_t>(2 * m), static_cast<std::size_t>(2 * m + 1)};
}

// What each number of a turned row may be off by. A number is x cos - y sin or y cos + x sin, times the attention factor:
// that factor, the table's cosine, the product and the sum are rounded once each, 4 u of |x cos| + |y sin|; the angle is
// computed in double. A product below the normal range loses up to 2^-149.
std::vector<double> budgets(const float* x, index_t dim, std::array<index_t, 3> pos, const RopeOptions& options,
                            RopeLayout layout) {
  const std::vector<double> theta = reference::rope_frequencies(options);
  const std::vector<int> axes = reference::rope_axes(options);
  const double attention = reference::rope_attention_factor(options);
  std::vector<double> budget(static_cast<std::size_t>(dim));
  for (index_t m = 0; m < options.rotary_dim / 2; ++m) {
    const auto at = static_cast<std::size_t>(m);
    const auto [first, second] = pair_at(layout, m, options.rotary_dim / 2);
    const double angle = static_cast<double>(pos[static_cast<std::size_t>(axes[at])]) * theta[at];
    const double c = attention * std::abs(std::cos(angle)), s = attention * std::abs(std::sin(angle));
    const double one = std::abs(static_cast<double>(x[first])), other = std::abs(static_cast<double>(x[second]));
    const double turned_away = attention * test::rope_angle_error(angle) * (one + other) + 0x1p-147;
    budget[first] = 4 * kUnit * (one * c + other * s) + turned_away;
    budget[second] = 4 * kUnit * (other * c + one * s) + turned_away;
  }
  return budget;
}

// The largest error of a row in budgets; infinite where a copied number changed.
double in_budgets(const float* x, const float* got, index_t dim, std::array<index_t, 3> pos, const RopeOptions& options,
                  RopeLayout layout) {
  std::vector<double> expected(static_cast<std::size_t>(dim));
  reference::rope_row(x, expected.data(), dim, pos, options, layout);
  const std::vector<double> budget = budgets(x, dim, pos, options, layout);
  double worst = 0;
  for (std::size_t d = 0; d < expected.size(); ++d) {
    const double error = std::abs(static_cast<double>(got[d]) - expected[d]);
    if (error == 0) continue;
    worst =
        std::max(worst, budget[d] > 0 && std::isfinite(error) ? error / budget[d] : std::numeric_limits<double>::infinity());
  }
  return worst;
}

std::vector<RopeOptions> all_scalings(index_t rotary_dim, const std::vector<double>& pair_factors) {
  std::vector<RopeOptions> all = {
      {.rotary_dim = rotary_dim},
      {.rotary_dim = rotary_dim, .base = 5e5, .scaling = RopeScaling::linear, .factor = 8},
      {.rotary_dim = rotary_dim, .scaling = RopeScaling::yarn, .factor = 40, .original_len = 4096},
      {.rotary_dim = rotary_dim, .scaling = RopeScaling::yarn, .factor = 40, .original_len = 4096, .attention_factor = 1},
      {.rotary_dim = rotary_dim,
       .base = 150000,
       .scaling = RopeScaling::yarn,
       .factor = 32,
       .original_len = 4096,
       .round_range = false},
      {.rotary_dim = rotary_dim, .scaling = RopeScaling::yarn, .factor = 0.5, .original_len = 16},   // from below 0
      {.rotary_dim = rotary_dim, .scaling = RopeScaling::yarn, .factor = 2, .original_len = 6},      // an empty ramp
      {.rotary_dim = rotary_dim,
       .base = 20,
       .scaling = RopeScaling::yarn,
       .factor = 2,
       .original_len = 4096,
       .beta_fast = 300},   // cut at R - 1
      {.rotary_dim = rotary_dim, .base = 5e5, .scaling = RopeScaling::llama3, .factor = 8, .original_len = 8192},
      {.rotary_dim = rotary_dim,
       .scaling = RopeScaling::longrope,
       .factor = 32,
       .original_len = 4096,
       .pair_factors = pair_factors},
      {.rotary_dim = rotary_dim,
       .scaling = RopeScaling::longrope,
       .factor = 0.5,
       .original_len = 4096,
       .pair_factors = pair_factors},
  };
  if (rotary_dim > 2) {
    all.push_back({.rotary_dim = rotary_dim, .scaling = RopeScaling::ntk, .factor = 4});
    all.push_back({.rotary_dim = rotary_dim,
                   .scaling = RopeScaling::dynamic_ntk,
                   .factor = 4,
                   .original_len = 4096,
                   .current_len = 10000});
    all.push_back({.rotary_dim = rotary_dim,
                   .scaling = RopeScaling::dynamic_ntk,
                   .factor = 4,
                   .original_len = 4096,
                   .current_len = 7});
  }
  return all;
}

std::uint32_t bits(float x) { return std::bit_cast<std::uint32_t>(x); }
bool same_bits(const float* a, const float* b, index_t count) {
  return std::equal(a, a + count, b, [](float x, float y) { return bits(x) == bits(y); });
}

}   // namespace

TEST_CASE("rope: frequencies and attention factors of published models") {
  for (const test::RopeGolden& golden : test::rope_goldens()) {
    INFO(golden.name);
    const auto pairs = static_cast<std::size_t>(golden.options.rotary_dim / 2);
    std::vector<double> theta(pairs);
    std::vector<float> rounded(pairs);
    float attention = 0, same = 0;
    REQUIRE(rope_frequencies(golden.options, theta, attention).ok());
    REQUIRE(rope_frequencies(golden.options, rounded, same).ok());
    for (const auto& [pair, expected] : golden.inv_freq) {
      INFO("pair " << pair);
      CHECK(theta[pair] == Catch::Approx(expected).epsilon(1e-13));
    }
    for (std::size_t m = 0; m < pairs; ++m) CHECK(rounded[m] == static_cast<float>(theta[m]));
    CHECK(attention == static_cast<float>(golden.attention_factor));
    CHECK(same == attention);
  }
}

TEST_CASE("rope: YaRN's ramp, and its factor in DeepSeek's softmax scale") {
  RopeOptions deepseek{.rotary_dim = 64, .scaling = RopeScaling::yarn, .factor = 40, .original_len = 4096};
  CHECK(rope::yarn_range(deepseek).low == 10);
  CHECK(rope::yarn_range(deepseek).high == 23);
  deepseek.round_range = false;
  CHECK(rope::yarn_range(deepseek).low == Catch::Approx(10.472).margin(5e-4));
  CHECK(rope::yarn_range(deepseek).high == Catch::Approx(22.513).margin(5e-4));
  const RopeOptions gpt_oss{.rotary_dim = 64,
                            .base = 150000,
                            .scaling = RopeScaling::yarn,
                            .factor = 32,
                            .original_len = 4096,
                            .round_range = false};
  CHECK(rope::yarn_range(gpt_oss).low == Catch::Approx(8.0928).margin(5e-5));
  CHECK(rope::yarn_range(gpt_oss).high == Catch::Approx(17.3980).margin(5e-5));

  CHECK(yarn_mscale(40) == Catch::Approx(1.3688879).margin(5e-8));
  CHECK(yarn_mscale(40, 0.707) == Catch::Approx(1.2608038).margin(5e-8));
  CHECK(yarn_mscale(1) == 1);
  CHECK(yarn_mscale(0.5) == 1);
  CHECK(yarn_mscale(40) * yarn_mscale(40) / std::sqrt(192.) == Catch::Approx(0.1352338).margin(5e-8));
  CHECK(yarn_mscale(40, 0.707) * yarn_mscale(40, 0.707) / std::sqrt(192.) == Catch::Approx(0.1147214).margin(5e-8));
}

TEST_CASE("rope: one vector by hand") {
  const Table table({.rotary_dim = 4}, 0, 2);
  float half_split[4] = {1, 2, 3, 4}, interleaved[4] = {1, 2, 3, 4};
  REQUIRE(rotate(bhsd(half_split, 1, 1, 1, 4), {.start = 1}, table.rows, RopeLayout::half_split).ok());
  REQUIRE(rotate(bhsd(interleaved, 1, 1, 1, 4), {.start = 1}, table.rows, RopeLayout::interleaved).ok());
  const double first[4] = {-1.9841106, 1.9599007, 2.4623779, 4.0197997};
  const double second[4] = {-1.1426397, 1.9220756, 2.9598507, 4.0297995};
  for (int d = 0; d < 4; ++d) {
    CHECK(static_cast<double>(half_split[d]) == Catch::Approx(first[d]).margin(5 * 4 * kUnit));   // 4 u of at most 5
    CHECK(static_cast<double>(interleaved[d]) == Catch::Approx(second[d]).margin(5 * 4 * kUnit));
  }
}

TEST_CASE("rope: a table's cosines are right to one rounding at positions of 1e6 and more") {
  for (const test::RopeAngle& golden : test::kRopeAngles) {
    INFO("position " << golden.pos << " pair " << golden.pair << " base " << golden.base);
    const Table table({.rotary_dim = golden.rotary_dim, .base = golden.base}, golden.pos, 1);
    const double angle = static_cast<double>(golden.pos) * table.inv_freq[static_cast<std::size_t>(golden.pair)];
    const double drift = test::rope_angle_error(angle);
    CHECK(std::abs(static_cast<double>(table.rows.cos_at(golden.pos)[golden.pair]) - golden.cos) <=
          kUnit * std::abs(golden.cos) + drift);
    CHECK(std::abs(static_cast<double>(table.rows.sin_at(golden.pos)[golden.pair]) - golden.sin) <=
          kUnit * std::abs(golden.sin) + drift);
  }
}

TEST_CASE("rope: every scaling, layout and dim against the reference") {
  double worst = 0;
  for (const index_t rotary_dim : {2, 4, 6, 14, 16, 18, 30, 32, 34, 64, 96, 128, 130}) {
    const std::vector<double> factors = [&] {
      std::vector<double> list;
      for (index_t m = 0; m < rotary_dim / 2; ++m) list.push_back(1 + 0.3 * static_cast<double>(m));
      return list;
    }();
    for (const RopeOptions& options : all_scalings(rotary_dim, factors)) {
      for (const index_t first_pos : {index_t{0}, index_t{4090}, index_t{1000000}, index_t{-3}}) {
        const Table table(options, first_pos, 3);
        for (const RopeLayout layout : kLayouts) {
          for (const index_t rest : {0, 1, 13, 64}) {
            const index_t dim = rotary_dim + rest;
            INFO("rotary_dim " << rotary_dim << " of " << dim << " scaling " << static_cast<int>(options.scaling) << " from "
                               << first_pos << " " << name_of(layout));
            const std::vector<float> x = random_numbers(2 * 3 * dim, static_cast<std::uint64_t>(dim + first_pos));
            std::vector<float> y(x.size(), std::numeric_limits<float>::quiet_NaN());
            REQUIRE(
                rotate(bshd(x.data(), 1, 3, 2, dim), bshd(y.data(), 1, 3, 2, dim), {.start = first_pos}, table.rows, layout)
                    .ok());
            double here = 0;
            for (index_t row = 0; row < 6; ++row) {
              const index_t pos = first_pos + row / 2;
              here = std::max(here,
                              in_budgets(x.data() + row * dim, y.data() + row * dim, dim, {pos, pos, pos}, options, layout));
            }
            worst = std::max(worst, here);
            CHECK(here <= 1);
          }
        }
      }
    }
  }
  CHECK(worst > 0.2);   // a budget nobody comes near would prove little
}

TEST_CASE("rope: what the budget is for is far outside of it") {
  const RopeOptions options{.rotary_dim = 64, .scaling = RopeScaling::yarn, .factor = 40, .original_len = 4096};
  const std::vector<float> x = random_numbers(80, 5);
  const auto error_of = [&](const RopeOptions& used, index_t pos, RopeLayout layout) {
    const Table table(used, pos, 1);
    std::vector<float> y(x);
    REQUIRE(rotate(bhsd(y.data(), 1, 1, 1, 80), {.start = pos}, table.rows, layout).ok());
    return in_budgets(x.data(), y.data(), 80, {1000, 1000, 1000}, options, RopeLayout::half_split);
  };
  CHECK(error_of(options, 1000, RopeLayout::half_split) <= 1);
  CHECK(error_of(options, 1001, RopeLayout::half_split) > 1e4);
  CHECK(error_of(options, 1000, RopeLayout::interleaved) > 1e4);
  for (const auto change :
       {+[](RopeOptions& o) { o.rotary_dim = 62; }, +[](RopeOptions& o) { o.base = 10001; },
        +[](RopeOptions& o) { o.round_range = false; }, +[](RopeOptions& o) { o.attention_factor = 1; },
        +[](RopeOptions& o) { o.scaling = RopeScaling::linear; }, +[](RopeOptions& o) { o.factor = 41; }}) {
    RopeOptions wrong = options;
    change(wrong);
    CHECK(error_of(wrong, 1000, RopeLayout::half_split) > 100);
  }
}

TEST_CASE("rope: lanes, tails and layouts run the same two chains") {
  // For every number of pairs each number equals the scalar statement, wherever in the row it stands. Without a fused FMA
  // both products are rounded before the sum.
  const auto chain = [](float a, float c, float b, float s) {
    const float product = b * s;
    if (kFusedFma) return std::fma(a, c, product);
    const volatile float other = a * c;
    return other + product;
  };
  for (index_t pairs = 1; pairs <= 70; ++pairs) {
    const Table table({.rotary_dim = 2 * pairs}, 77, 1);
    const std::vector<float> x = random_numbers(2 * pairs, static_cast<std::uint64_t>(pairs));
    for (const RopeLayout layout : kLayouts) {
      for (const RopeDirection direction : {RopeDirection::forward, RopeDirection::backward}) {
        INFO(pairs << " pairs, " << name_of(layout));
        std::vector<float> y(x);
        REQUIRE(rotate(bhsd(y.data(), 1, 1, 1, 2 * pairs), {.start = 77}, table.rows, layout, direction).ok());
        index_t different = 0;
        for (index_t m = 0; m < pairs; ++m) {
          const auto [first, second] = pair_at(layout, m, pairs);
          const float c = table.rows.cos_at(77)[m];
          const float s = direction == RopeDirection::forward ? table.rows.sin_at(77)[m] : -table.rows.sin_at(77)[m];
          different += bits(y[first]) != bits(chain(x[first], c, x[second], -s));
          different += bits(y[second]) != bits(chain(x[second], c, x[first], s));
        }
        CHECK(different == 0);
      }
    }
  }
}

TEST_CASE("rope: a row's bits do not depend on strides, neighbours, or where it goes") {
  const index_t dim = 50, heads = 3, len = 70;   // more tokens than a block of the loop
  const Table table({.rotary_dim = 46}, 0, 100);
  const std::vector<float> x = random_numbers(2 * heads * len * dim, 1);
  const Tensor<const float> from = bhsd(x.data(), 2, heads, len, dim);
  std::vector<index_t> ids;
  for (index_t i = 0; i < len; ++i) ids.push_back(5 + i);
  for (const RopeLayout layout : kLayouts) {
    std::vector<float> apart(x.size()), in_place(x), listed(x.size());
    REQUIRE(rotate(from, bhsd(apart.data(), 2, heads, len, dim), {.start = 5}, table.rows, layout).ok());
    REQUIRE(rotate(bhsd(in_place.data(), 2, heads, len, dim), {.start = 5}, table.rows, layout).ok());
    REQUIRE(
        rotate(from, bhsd(listed.data(), 2, heads, len, dim), {.ids = {ids.data(), {1, len}, {0, 1}}}, table.rows, layout)
            .ok());
    CHECK(same_bits(apart.data(), in_place.data(), static_cast<index_t>(x.size())));
    CHECK(same_bits(apart.data(), listed.data(), static_cast<index_t>(x.size())));

    test::Poisoned one(dim), packed(2 * len * (2 * heads + 1) * dim);   // alone, and token-major between other heads
    const Tensor<float> alone = bhsd(one.data(), 1, 1, 1, dim);
    const Tensor<float> among{
        packed.data(), {2, heads, len, dim}, {len * (2 * heads + 1) * dim, 2 * dim, (2 * heads + 1) * dim, 1}};
    REQUIRE(rotate(from, among, {.start = 5}, table.rows, layout).ok());
    CHECK(test::first_overwritten(packed, {among}) == -1);
    index_t different = 0;
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < len; ++i) {
          const float* const expected = apart.data() + ((b * heads + h) * len + i) * dim;
          std::copy_n(&from(b, h, i, 0), dim, one.data());
          REQUIRE(rotate(alone, {.start = 5 + i}, table.rows, layout).ok());
          different += !same_bits(one.data(), expected, dim) || !same_bits(&among(b, h, i, 0), expected, dim);
        }
      }
    }
    CHECK(different == 0);
    CHECK(test::first_overwritten(one, {alone}) == -1);
  }
}

TEST_CASE("rope: nothing beyond a row, a table or an output is read or written") {
  for (index_t pairs = 1; pairs <= 40; ++pairs) {
    for (const index_t rest : {0, 1, 5}) {
      const index_t dim = 2 * pairs + rest;
      const Table table({.rotary_dim = 2 * pairs}, 9, 1);
      test::Poisoned x(dim), y(dim), cos(pairs), sin(pairs);   // a read of what surrounds them makes a NaN
      std::copy_n(table.rows.cos, pairs, cos.data());
      std::copy_n(table.rows.sin, pairs, sin.data());
      const RopeTable rows{cos.data(), sin.data(), pairs, pairs, 9, 1};
      const std::vector<float> values = random_numbers(dim, 3);
      std::copy_n(values.data(), dim, x.data());
      const Tensor<float> from = bhsd(x.data(), 1, 1, 1, dim), to = bhsd(y.data(), 1, 1, 1, dim);
      for (const RopeLayout layout : kLayouts) {
        INFO(pairs << " pairs and " << rest << ", " << name_of(layout));
        REQUIRE(rotate(from, to, {.start = 9}, rows, layout).ok());
        CHECK(std::none_of(y.data(), y.data() + dim, [](float v) { return std::isnan(v); }));
        CHECK(same_bits(y.data() + 2 * pairs, values.data() + 2 * pairs, rest));
        CHECK(same_bits(x.data(), values.data(), dim));
        CHECK(test::first_overwritten(y, {to}) == -1);
        CHECK(test::first_overwritten(x, {from}) == -1);
      }
    }
  }
}

TEST_CASE("rope: a number that is not finite spoils its own pair and no other") {
  const index_t pairs = 37;
  const Table table({.rotary_dim = 2 * pairs}, 3, 1);
  for (const RopeLayout layout : kLayouts) {
    for (index_t spoiled = 0; spoiled < pairs; ++spoiled) {
      std::vector<float> x = random_numbers(2 * pairs, 4), y(x);
      const auto [first, second] = pair_at(layout, spoiled, pairs);
      y[first] = std::numeric_limits<float>::quiet_NaN();
      REQUIRE(rotate(bhsd(x.data(), 1, 1, 1, 2 * pairs), {.start = 3}, table.rows, layout).ok());
      REQUIRE(rotate(bhsd(y.data(), 1, 1, 1, 2 * pairs), {.start = 3}, table.rows, layout).ok());
      CHECK(std::isnan(y[first]));
      CHECK(std::isnan(y[second]));
      x[first] = x[second] = y[first] = y[second] = 0.f;
      CHECK(x == y);
    }
  }
}

TEST_CASE("rope: position 0 is the identity, and norms stay") {
  const index_t dim = 74;
  const Table table({.rotary_dim = dim}, 0, 1000);
  const std::vector<float> x = random_numbers(dim, 8);
  for (const RopeLayout layout : kLayouts) {
    std::vector<float> y(x);
    REQUIRE(rotate(bhsd(y.data(), 1, 1, 1, dim), {.start = 0}, table.rows, layout).ok());
    CHECK(x == y);
    for (const index_t pos : {1, 17, 999}) {
      y = x;
      REQUIRE(rotate(bhsd(y.data(), 1, 1, 1, dim), {.start = pos}, table.rows, layout).ok());
      for (index_t m = 0; m < dim / 2; ++m) {
        const std::array<std::size_t, 2> at = pair_at(layout, m, dim / 2);
        const auto norm = [&](const std::vector<float>& v) {
          return std::hypot(static_cast<double>(v[at[0]]), static_cast<double>(v[at[1]]));
        };
        // Each of both numbers is off by at most 3 u (|x| + |y|) <= 3 sqrt(2) u norm.
        CHECK(std::abs(norm(y) - norm(x)) <= 6.1 * kUnit * norm(x));
      }
    }
  }
}

TEST_CASE("rope: the two layouts are one permutation apart, bit for bit") {
  for (const index_t pairs : {1, 7, 16, 23, 64}) {
    const Table table({.rotary_dim = 2 * pairs}, 41, 1);
    const std::vector<float> x = random_numbers(2 * pairs, 2);
    std::vector<float> split(x), woven(x.size());
    for (index_t m = 0; m < pairs; ++m) {
      const auto [a, b] = pair_at(RopeLayout::half_split, m, pairs);
      const auto [first, second] = pair_at(RopeLayout::interleaved, m, pairs);
      woven[first] = x[a];
      woven[second] = x[b];
    }
    REQUIRE(rotate(bhsd(split.data(), 1, 1, 1, 2 * pairs), {.start = 41}, table.rows, RopeLayout::half_split).ok());
    REQUIRE(rotate(bhsd(woven.data(), 1, 1, 1, 2 * pairs), {.start = 41}, table.rows, RopeLayout::interleaved).ok());
    index_t different = 0;
    for (index_t m = 0; m < pairs; ++m) {
      const auto [a, b] = pair_at(RopeLayout::half_split, m, pairs);
      const auto [first, second] = pair_at(RopeLayout::interleaved, m, pairs);
      different += bits(woven[first]) != bits(split[a]) || bits(woven[second]) != bits(split[b]);
    }
    CHECK(different == 0);
  }
}

TEST_CASE("rope: a score depends on the distance only") {
  const index_t dim = 80, rotary_dim = 64;   // the last 16 numbers have no position
  const std::vector<float> q = random_numbers(dim, 21), k = random_numbers(dim, 22);
  const RopeOptions options{
      .rotary_dim = rotary_dim, .base = 5e5, .scaling = RopeScaling::llama3, .factor = 8, .original_len = 8192};
  for (const RopeLayout layout : kLayouts) {
    const auto score = [&](index_t q_pos, index_t k_pos) {
      std::vector<float> a(q), b(k);
      const Table q_table(options, q_pos, 1), k_table(options, k_pos, 1);
      REQUIRE(rotate(bhsd(a.data(), 1, 1, 1, dim), {.start = q_pos}, q_table.rows, layout).ok());
      REQUIRE(rotate(bhsd(b.data(), 1, 1, 1, dim), {.start = k_pos}, k_table.rows, layout).ok());
      double sum = 0;
      for (std::size_t d = 0; d < a.size(); ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
      return sum;
    };
    double budget = 0;   // both vectors are off by 3 u of |x| + |y| per number, before and after the move
    for (index_t m = 0; m < rotary_dim / 2; ++m) {
      const auto [first, second] = pair_at(layout, m, rotary_dim / 2);
      const double of_q = std::abs(static_cast<double>(q[first])) + std::abs(static_cast<double>(q[second]));
      const double of_k = std::abs(static_cast<double>(k[first])) + std::abs(static_cast<double>(k[second]));
      budget += 2 * 2 * 2 * 3.1 * kUnit * of_q * of_k;
    }
    const double here = score(90, 17);
    CHECK(std::abs(score(73, 0) - here) <= budget);
    CHECK(std::abs(score(100073, 100000) - here) <= budget);
    CHECK(std::abs(score(0, -73) - here) <= budget);
    CHECK(std::abs(score(74, 0) - here) > 1000 * budget);
  }
}

TEST_CASE("rope: re-rotation by a shift composes, and backward undoes") {
  const index_t dim = 128;
  const RopeOptions options{.rotary_dim = dim};
  const Table table(options, 0, 4097);
  const std::vector<float> x = random_numbers(dim * 5, 6);
  for (const RopeLayout layout : kLayouts) {
    std::vector<float> moved(x), direct(x), undone(x);
    const Tensor<float> keys = bhsd(moved.data(), 1, 1, 5, dim);
    REQUIRE(rotate(keys, {.start = 4000}, table.rows, layout).ok());
    REQUIRE(rotate(bhsd(direct.data(), 1, 1, 5, dim), {.start = 700}, table.rows, layout).ok());

    // Every key 3300 places back, with a table of one row, and with row 3300 of the large one: the same bits.
    const Table shift(options, -3300, 1);
    std::vector<float> other(moved);
    REQUIRE(rotate(keys, {.start = -3300, .step = 0}, shift.rows, layout).ok());
    REQUIRE(rotate(bhsd(other.data(), 1, 1, 5, dim), {.start = 3300, .step = 0}, table.rows, layout, RopeDirection::backward)
                .ok());
    CHECK(same_bits(moved.data(), other.data(), dim * 5));

    REQUIRE(rotate(bhsd(undone.data(), 1, 1, 5, dim), {.start = 10}, table.rows, layout).ok());
    REQUIRE(rotate(bhsd(undone.data(), 1, 1, 5, dim), {.start = 10}, table.rows, layout, RopeDirection::backward).ok());
    for (index_t row = 0; row < 5; ++row) {
      for (index_t m = 0; m < dim / 2; ++m) {
        const auto [first, second] = pair_at(layout, m, dim / 2);
        const auto base = static_cast<std::size_t>(row * dim);
        // A turn is off by at most 3 u (|x| + |y|) <= 3 sqrt(2) u norm a number; two turns, then the direct one.
        const double norm = std::hypot(static_cast<double>(x[base + first]), static_cast<double>(x[base + second]));
        const double turn = 3 * 1.4143 * kUnit * norm;
        for (const std::size_t d : {base + first, base + second}) {
          CHECK(std::abs(static_cast<double>(moved[d]) - static_cast<double>(direct[d])) <= (1.4143 + 1 + 1) * turn);
          CHECK(std::abs(static_cast<double>(undone[d]) - static_cast<double>(x[d])) <= (1.4143 + 1) * turn);
        }
      }
    }
  }
}

TEST_CASE("rope: M-RoPE follows three positions, and with equal ones is plain") {
  for (const auto& [rotary_dim, sections] :
       {std::pair<index_t, RopeSections>{128, {{16, 24, 24}}}, std::pair<index_t, RopeSections>{128, {{24, 20, 20}, true}},
        std::pair<index_t, RopeSections>{32, {{4, 7, 5}}}, std::pair<index_t, RopeSections>{32, {{6, 5, 5}, true}}}) {
    RopeOptions options{.rotary_dim = rotary_dim, .base = 1e6, .sections = sections};
    const index_t dim = rotary_dim + 3;
    const std::vector<float> x = random_numbers(dim, 12);
    for (const RopeLayout layout : kLayouts) {
      INFO("rotary_dim " << rotary_dim << (sections.interleaved ? " interleaved sections, " : " blocks, ")
                         << name_of(layout));
      for (const std::array<index_t, 3> ids : {std::array<index_t, 3>{100, 7, 33}, {0, 0, 5}, {4, 4, 4}}) {
        const Table table(options, ids);
        std::vector<float> y(x);
        REQUIRE(rotate(bhsd(y.data(), 1, 1, 1, dim), {}, table.rows, layout).ok());
        CHECK(in_budgets(x.data(), y.data(), dim, ids, options, layout) <= 1);
        if (ids[0] != ids[2]) CHECK(in_budgets(x.data(), y.data(), dim, {ids[0], ids[2], ids[1]}, options, layout) > 1e4);
      }
      const Table plain({.rotary_dim = rotary_dim, .base = 1e6}, 0, 51), equal(options, {50, 50, 50});
      std::vector<float> a(x), b(x);
      REQUIRE(rotate(bhsd(a.data(), 1, 1, 1, dim), {.start = 50}, plain.rows, layout).ok());
      REQUIRE(rotate(bhsd(b.data(), 1, 1, 1, dim), {.start = 0}, equal.rows, layout).ok());
      CHECK(same_bits(a.data(), b.data(), dim));
    }
  }
}

TEST_CASE("rope: a table per token equals the table per position") {
  const Table plain({.rotary_dim = 40}, 0, 100);
  const index_t ids[] = {7, 99, 0, 0, 64};
  std::vector<float> memory(5 * 40);
  RopeTable rows;
  REQUIRE(make_rope_table(rows, plain.inv_freq, plain.attention, {ids, {1, 5}, {5, 1}}, {}, memory).ok());
  CHECK(rows.first_pos == 0);
  CHECK(rows.len == 5);
  for (index_t t = 0; t < 5; ++t) {
    CHECK(same_bits(rows.cos_at(t), plain.rows.cos_at(ids[t]), 20));
    CHECK(same_bits(rows.sin_at(t), plain.rows.sin_at(ids[t]), 20));
  }
}

TEST_CASE("rope: positions of a ragged batch, one list for all or one each") {
  const index_t dim = 24;
  const Table table({.rotary_dim = 24}, 0, 64);
  const std::vector<float> x = random_numbers(2 * 3 * dim, 30);
  const index_t each[] = {3, 3, 60, 0, 17, 1};   // [batch, pos]
  std::vector<float> y(x);
  const Tensor<float> tensor = bhsd(y.data(), 2, 1, 3, dim);
  REQUIRE(rotate(tensor, {.ids = {each, {2, 3}, {3, 1}}}, table.rows, RopeLayout::half_split).ok());
  for (index_t row = 0; row < 6; ++row) {
    CHECK(in_budgets(x.data() + row * dim, y.data() + row * dim, dim, {each[row], each[row], each[row]}, table.options,
                     RopeLayout::half_split) <= 1);
  }
  y = x;
  REQUIRE(rotate(tensor, {.ids = {each, {1, 3}, {0, 1}}}, table.rows, RopeLayout::half_split).ok());
  std::vector<double> expected(x.size());
  reference::rope(bhsd(x.data(), 2, 1, 3, dim), bhsd(expected.data(), 2, 1, 3, dim), {each, {1, 3}, {0, 1}}, table.options,
                  RopeLayout::half_split);
  for (index_t row = 0; row < 6; ++row) {
    const index_t pos = each[row % 3];
    const std::vector<double> budget =
        budgets(x.data() + row * dim, dim, {pos, pos, pos}, table.options, RopeLayout::half_split);
    for (index_t d = 0; d < dim; ++d) {
      const auto at = static_cast<std::size_t>(row * dim + d);
      CHECK(std::abs(static_cast<double>(y[at]) - expected[at]) <= budget[static_cast<std::size_t>(d)]);
    }
  }
}

TEST_CASE("rope: options that contradict themselves are refused with their numbers, and nothing is written") {
  const std::vector<double> five(5, 1.), with_zero(32, 0.), ones(32, 1.);
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const auto refused = [&](RopeOptions options, const char* words, index_t size = -1) {
    INFO(words);
    std::vector<double> theta(static_cast<std::size_t>(size >= 0 ? size : 32), -7.);
    float attention = -7;
    const Status status = rope_frequencies(options, theta, attention);
    CHECK(status.code() == Code::invalid_argument);
    CHECK_THAT(status.message(), ContainsSubstring(words));
    CHECK(attention == -7.f);
    CHECK(std::count(theta.begin(), theta.end(), -7.) == static_cast<index_t>(theta.size()));
  };
  refused({.rotary_dim = 63}, "rotary_dim = 63");
  refused({.rotary_dim = 0}, "rotary_dim = 0");
  refused({.rotary_dim = -2}, "rotary_dim = -2");
  refused({.rotary_dim = 64, .base = 0}, "base = 0");
  refused({.rotary_dim = 64, .base = -1e4}, "base = -10000");
  refused({.rotary_dim = 64, .base = nan}, "base = ");
  refused({.rotary_dim = 64, .scaling = static_cast<RopeScaling>(9)}, "scaling = 9");
  refused({.rotary_dim = 64, .scaling = RopeScaling::linear, .factor = 0}, "factor = 0");
  refused({.rotary_dim = 64, .scaling = RopeScaling::ntk, .factor = -2}, "factor = -2");
  refused({.rotary_dim = 64, .scaling = RopeScaling::yarn, .factor = infinity, .original_len = 4096}, "factor = inf");
  refused({.rotary_dim = 2, .scaling = RopeScaling::ntk, .factor = 2}, "rotary_dim = 2", 1);
  refused({.rotary_dim = 64, .scaling = RopeScaling::dynamic_ntk, .factor = 2}, "original_len = 0");
  refused({.rotary_dim = 64, .scaling = RopeScaling::dynamic_ntk, .original_len = 9, .current_len = -4}, "current_len = -4");
  refused({.rotary_dim = 64, .scaling = RopeScaling::yarn, .factor = 2}, "original_len = 0");
  refused({.rotary_dim = 64, .base = 1, .scaling = RopeScaling::yarn, .original_len = 9}, "base = 1");
  refused({.rotary_dim = 64, .scaling = RopeScaling::yarn, .original_len = 9, .beta_slow = 0}, "beta_slow = 0");
  refused({.rotary_dim = 64, .scaling = RopeScaling::yarn, .original_len = 9, .beta_fast = 1, .beta_slow = 3},
          "beta_fast = 1");
  refused({.rotary_dim = 64, .scaling = RopeScaling::llama3, .original_len = -8}, "original_len = -8");
  refused({.rotary_dim = 64, .scaling = RopeScaling::llama3, .original_len = 9, .high_freq_factor = 1},
          "high_freq_factor = 1");
  refused({.rotary_dim = 64, .scaling = RopeScaling::llama3, .original_len = 9, .low_freq_factor = 0},
          "low_freq_factor = 0");
  refused({.rotary_dim = 64, .scaling = RopeScaling::longrope}, "0 pair_factors, needs rotary_dim / 2 = 32");
  refused({.rotary_dim = 64, .scaling = RopeScaling::longrope, .pair_factors = five}, "5 pair_factors");
  refused({.rotary_dim = 64, .scaling = RopeScaling::longrope, .pair_factors = with_zero}, "pair_factors[0] = 0");
  refused({.rotary_dim = 64, .scaling = RopeScaling::longrope, .factor = 4, .original_len = 1, .pair_factors = ones},
          "original_len = 1");
  refused({.rotary_dim = 64, .attention_factor = 0}, "attention_factor = 0");
  refused({.rotary_dim = 64, .sections = {{8, 8, 8}}}, "sections 8, 8, 8 must add up to rotary_dim / 2 = 32");
  refused({.rotary_dim = 64, .sections = {{40, -4, -4}}}, "sections 40, -4, -4");
  refused({.rotary_dim = 64, .sections = {{10, 12, 10}, true}}, "12 height and 10 width pairs");
  refused({.rotary_dim = 64, .sections = {{10, 11, 11}, true}}, "11 width pairs");
  refused({.rotary_dim = 62, .sections = {{10, 11, 10}, true}}, "11 height and 10 width pairs", 31);
  refused({.rotary_dim = 64}, "inv_freq has 31 elements", 31);
}

TEST_CASE("rope: a table that does not fit is refused") {
  const double theta[2] = {1, 0.5};
  std::vector<float> memory(12, -7.f);
  RopeTable table;
  const auto refused = [&](const Status& status, Code code, const char* words) {
    INFO(words);
    CHECK(status.code() == code);
    CHECK_THAT(status.message(), ContainsSubstring(words));
    CHECK(table.cos == nullptr);
    CHECK(std::count(memory.begin(), memory.end(), -7.f) == 12);
  };
  const index_t huge = std::numeric_limits<index_t>::max();
  refused(make_rope_table(table, theta, 1.f, 0, 4, memory), Code::workspace_too_small,
          "12 floats for a table of 4 positions");
  refused(make_rope_table(table, theta, 1.f, 0, huge, memory), Code::workspace_too_small, "12 floats");
  refused(make_rope_table(table, theta, 1.f, 0, -1, memory), Code::invalid_argument, "-1 positions");
  refused(make_rope_table(table, theta, 1.f, huge, 3, memory), Code::invalid_argument, "overflow");
  refused(make_rope_table(table, theta, 0.f, 0, 1, memory), Code::invalid_argument, "attention_factor = 0");
  refused(make_rope_table(table, {}, 1.f, 0, 1, memory), Code::invalid_argument, "inv_freq is empty");
  const index_t ids[6] = {};
  refused(make_rope_table(table, theta, 1.f, {ids, {2, 1}, {1, 1}}, {}, memory), Code::invalid_argument, "ids is [2, 1]");
  refused(make_rope_table(table, theta, 1.f, {ids, {3, 1}, {1, 1}}, {}, memory), Code::invalid_argument, "need sections");
  refused(make_rope_table(table, theta, 1.f, {ids, {3, 1}, {1, 1}}, {{1, 1, 1}}, memory), Code::invalid_argument,
          "must add up to rotary_dim / 2 = 2");
  refused(make_rope_table(table, theta, 1.f, {nullptr, {1, 2}, {2, 1}}, {}, memory), Code::invalid_argument, "null data");
  REQUIRE(make_rope_table(table, theta, 1.f, 0, 3, memory).ok());
  CHECK(rope_table_floats(3, 4) == 12);
}

TEST_CASE("rope: a call that cannot be served is refused before anything is written") {
  const Table table({.rotary_dim = 8}, 10, 20);
  const std::vector<float> original = random_numbers(2 * 3 * 4 * 8, 1);
  std::vector<float> x(original), y(x.size());
  const Tensor<float> tensor = bhsd(x.data(), 2, 3, 4, 8), to = bhsd(y.data(), 2, 3, 4, 8);
  const auto refused = [&](const Status& status, Code code, const char* words) {
    INFO(words);
    CHECK(status.code() == code);
    CHECK_THAT(status.message(), ContainsSubstring(words));
    CHECK(x == original);
    CHECK(std::count(y.begin(), y.end(), 0.f) == static_cast<index_t>(y.size()));
  };
  const RopeLayout layout = RopeLayout::interleaved;
  const index_t huge = std::numeric_limits<index_t>::max();
  refused(rotate(tensor, {.start = 9}, table.rows, layout), Code::invalid_argument,
          "token 0 of batch 0 has position 9, the table holds 20 positions from 10 on");
  refused(rotate(tensor, {.start = 27}, table.rows, layout), Code::invalid_argument, "token 3 of batch 0 has position 30");
  refused(rotate(tensor, {.start = 12, .step = -1}, table.rows, layout), Code::invalid_argument, "position 9");
  refused(rotate(tensor, {.start = huge, .step = 2}, table.rows, layout), Code::invalid_argument, "overflow");
  refused(rotate(tensor, {.start = -huge, .step = 0}, table.rows, layout), Code::invalid_argument, "the table holds");
  const index_t ids[8] = {10, 11, 12, 13, 29, 28, 30, 27};
  refused(rotate(tensor, {.ids = {ids, {2, 4}, {4, 1}}}, table.rows, layout), Code::invalid_argument,
          "token 2 of batch 1 has position 30");
  refused(rotate(tensor, {.ids = {ids, {2, 3}, {4, 1}}}, table.rows, layout), Code::invalid_argument, "must be [2 or 1, 4]");
  refused(rotate(bhsd(x.data(), 2, 3, 4, 7), {.start = 10}, table.rows, layout), Code::invalid_argument,
          "2 x 4 numbers of a vector of 7");
  refused(rotate(tensor, bhsd(y.data(), 2, 3, 4, 7), {.start = 10}, table.rows, layout), Code::invalid_argument,
          "to [2, 3, 4, 7]");
  refused(rotate(tensor, {.start = 10}, table.rows, static_cast<RopeLayout>(2)), Code::invalid_argument, "layout 2");
  refused(rotate(tensor, {.start = 10}, table.rows, layout, static_cast<RopeDirection>(3)), Code::invalid_argument,
          "direction 3");
  refused(rotate(tensor, {.start = 10}, RopeTable{nullptr, nullptr, 8, 4, 10, 20}, layout), Code::invalid_argument,
          "table has null data");
  refused(rotate(bhsd<float>(nullptr, 2, 3, 4, 8), to, {.start = 10}, table.rows, layout), Code::invalid_argument,
          "from has null data");
  Tensor<float> other = tensor;
  other.stride = {96, 32, 1, 4};
  refused(rotate(other, {.start = 10}, table.rows, layout), Code::unsupported, "innermost strides 4 and 4");
  other = tensor;
  other.stride[1] = 0;
  refused(rotate(other, {.start = 10}, table.rows, layout), Code::invalid_argument, "output overlaps itself");
  other = tensor;
  other.stride[0] = huge / 2;
  refused(rotate(other, {.start = 10}, table.rows, layout), Code::invalid_argument, "address space");
  Tensor<float> shifted = bhsd(x.data() + 8, 1, 3, 4, 8);
  refused(rotate(bhsd(x.data(), 1, 3, 4, 8), shifted, {.start = 10}, table.rows, layout), Code::invalid_argument,
          "without being it");
  CHECK(rotate(bhsd(x.data(), 2, 0, 4, 8), {.start = 10}, table.rows, layout).ok());   // nothing to do
  CHECK(rotate(tensor, to, {.start = 26}, table.rows, layout).ok());
}
