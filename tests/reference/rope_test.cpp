// SPDX-License-Identifier: Apache-2.0
#include "fovea/reference/rope.hpp"

#include <string>

#include "catch_compat.hpp"
#include "reference/rope_golden.hpp"

using namespace fovea;

TEST_CASE("reference rope: frequencies and attention factors of published models") {
  for (const test::RopeGolden& golden : test::rope_goldens()) {
    INFO(golden.name);
    const std::vector<double> theta = reference::rope_frequencies(golden.options);
    REQUIRE(static_cast<index_t>(theta.size()) == golden.options.rotary_dim / 2);
    for (const auto& [pair, expected] : golden.inv_freq) {
      INFO("pair " << pair);
      CHECK(theta[pair] == Catch::Approx(expected).epsilon(1e-13));
    }
    CHECK(reference::rope_attention_factor(golden.options) == Catch::Approx(golden.attention_factor).epsilon(1e-15));
  }
}

TEST_CASE("reference rope: one vector by hand") {
  const double x[4] = {1, 2, 3, 4};
  double out[4];
  reference::rope_row(x, out, 4, {1, 1, 1}, {.rotary_dim = 4}, RopeLayout::half_split);
  const double half_split[4] = {-1.9841106, 1.9599007, 2.4623779, 4.0197997};
  for (int d = 0; d < 4; ++d) CHECK(out[d] == Catch::Approx(half_split[d]).margin(6e-8));
  reference::rope_row(x, out, 4, {1, 1, 1}, {.rotary_dim = 4}, RopeLayout::interleaved);
  const double interleaved[4] = {-1.1426397, 1.9220756, 2.9598507, 4.0297995};
  for (int d = 0; d < 4; ++d) CHECK(out[d] == Catch::Approx(interleaved[d]).margin(6e-8));
}

TEST_CASE("reference rope: large angles keep their digits") {
  for (const test::RopeAngle& golden : test::kRopeAngles) {
    INFO("position " << golden.pos << " pair " << golden.pair << " base " << golden.base);
    std::vector<double> x(static_cast<std::size_t>(golden.rotary_dim)), out(x.size());
    x[static_cast<std::size_t>(golden.pair)] = 1;   // (1, 0) turns into (cos, sin)
    const RopeOptions options{.rotary_dim = golden.rotary_dim, .base = golden.base};
    reference::rope_row(x.data(), out.data(), golden.rotary_dim, {golden.pos, golden.pos, golden.pos}, options,
                        RopeLayout::half_split);
    const double theta = reference::rope_frequencies(options)[static_cast<std::size_t>(golden.pair)];
    const double error = test::rope_angle_error(static_cast<double>(golden.pos) * theta) + 0x1p-50;
    CHECK(std::abs(out[static_cast<std::size_t>(golden.pair)] - golden.cos) <= error);
    CHECK(std::abs(out[static_cast<std::size_t>(golden.pair + golden.rotary_dim / 2)] - golden.sin) <= error);
  }
}

TEST_CASE("reference rope: which position a pair follows") {
  const auto axes = [](const RopeSections& sections) {
    std::string text;
    for (const int axis : reference::rope_axes({.rotary_dim = 128, .sections = sections})) text += "thw"[axis];
    return text;
  };
  CHECK(axes({{16, 24, 24}}) == std::string(16, 't') + std::string(24, 'h') + std::string(24, 'w'));   // Qwen2-VL
  std::string qwen3_vl;
  for (int n = 0; n < 20; ++n) qwen3_vl += "thw";
  CHECK(axes({{24, 20, 20}, true}) == qwen3_vl + "tttt");
  CHECK(axes({}) == std::string(64, 't'));
}
