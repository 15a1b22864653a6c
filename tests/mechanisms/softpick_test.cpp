// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/softpick.hpp"

#include <limits>

#include "fovea/reference/softpick.hpp"
#include "normalizer_grid.hpp"

namespace {

using namespace test;

// Everything in units of e^m, m = max(0, top). A score off by delta moves e^s by the factor e^delta. Beyond |s| = 0.5 the
// weight is a difference of two exponentials, each within 3 ULP and with a rounded exponent (of e^-m: m 4 units; that of
// e^(s - m) is in delta), and a rounding; below, a polynomial within 3 ULP times e^-m. Exponentials below 2^-100 are 0.
Weighed weigh(const SoftmaxTerm& term, double delta, double m) {
  const double s = term.score, scale = std::exp(-m), exponential = std::exp(s - m), size = std::abs(exponential - scale);
  const double moved = exponential * std::expm1(delta);
  const double of_scale = scale * std::expm1((kExpUnits + 4 * m) * kUnit);
  const double rounded = std::abs(s) + delta < 0.5 ? (kExpUnits + 2 + kExpUnits + 4 * m) * kUnit * size
                                                   : exponential * kExpUnits * kUnit + of_scale + 2 * kUnit * size;
  const double error = moved + rounded + 0x1p-99;
  return {std::max(exponential - scale, 0.), s > -delta ? error : 0, size, error};
}
const Meaning kMeaning{&weigh, &above_zero, 1e-6, true};

const auto reference_of = [](auto q, auto k, auto v, auto out, const AttentionOptions& options) {
  fovea::reference::softpick(q, k, v, out, options, 1e-6);
};

fovea::Status join(Result& a, const Result& b) {
  return fovea::merge_softpick(a.out.view(), a.lse_view(), b.out.view(), b.lse_view());
}

}   // namespace

TEST_CASE("softpick agrees with the double reference over the grid") {
  check_over_grid(fovea::softpick(), reference_of, kMeaning);
}

TEST_CASE("softpick of extreme rows, masks, futures, NaN and refusals") {
  check_extreme_rows(fovea::softpick(), reference_of, kMeaning);
  check_masks(fovea::softpick(), true, static_cast<float>(std::log(double{1e-6f})));
  check_future(fovea::softpick());
  check_nan(fovea::softpick());
  check_refusals(fovea::softpick(), true);
}

TEST_CASE("softpick of (1, 0, -1)") {
  for (const Regime regime : kRegimes) {
    const std::vector<float> p = weights_of({1, 0, -1}, fovea::softpick(), regime);
    CHECK(p[0] == Catch::Approx(0.7310586).margin(4e-7));   // the table leaves epsilon out: 1e-6 / 2.35 of it
    CHECK(p[1] == 0.f);
    CHECK(p[2] == 0.f);
    const std::vector<float> wide = weights_of({1, 0, -1}, fovea::softpick(0.5f), regime);
    CHECK(wide[0] == Catch::Approx((std::exp(1.) - 1) / (std::exp(1.) - std::exp(-1.) + 0.5)).margin(1e-7));
  }
}

TEST_CASE("e^x - 1 near 0 is within 2 ULP") {
  double worst = 0;
  for (double x = -0.5; x <= 0.5; x += 1.7e-6) {
    const auto rounded = static_cast<float>(x);
    const double exact = std::expm1(double{rounded});
    const float got = fovea::first_lane(fovea::Softpick::expm1_small(fovea::f32(rounded)));
    if (exact != 0) worst = std::max(worst, std::abs(double{got} - exact) / std::ldexp(1., std::ilogb(exact) - 23));
  }
  INFO("largest error " << worst << " ULP");
  CHECK(worst <= 2);
  CHECK(worst > 0.5);
}

TEST_CASE("keys without a positive score get nothing, rows add up to at most 1") {
  Dense x(95, 1, 4, 2, 19, 270, 16, 24);
  const Values v = identity_values(1, 2, 270);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const Result p = attend_with(x.q.view(), x.k.view(), v.view(), options, false, fovea::softpick());
    index_t none = 0;
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 0; i < 19; ++i) {
        double sum = 0;
        for (index_t j = 0; j < 270; ++j) {
          double dot = 0, dots = 0;
          for (index_t d = 0; d < 16; ++d) {
            dot += double{x.q.view()(0, h, i, d)} * double{x.k.view()(0, h / 2, j, d)};
            dots += std::abs(double{x.q.view()(0, h, i, d)} * double{x.k.view()(0, h / 2, j, d)});
          }
          const double error = 22 * kUnit * dots;   // of the dot product
          if (dot < -error) CHECK(p.at(0, h, i, j) == 0.f);
          if (dot > error) CHECK(p.at(0, h, i, j) > 0.f);
          none += p.at(0, h, i, j) == 0.f;
          sum += double{p.at(0, h, i, j)};
        }
        CHECK(sum <= 1);
        CHECK(sum > 0.3);
      }
    }
    CHECK(none > 4 * 19 * 90);
  }
}

// Where every score is above 30, the 1 in e^s - 1 is less than a rounding: softpick is softmax.
TEST_CASE("softpick of large scores = softmax") {
  Dense x(96, 1, 4, 2, 19, 270, 16, 24);
  const std::vector<float> constant(270, 40.f);
  for (float& q : x.q.data) q *= 0.5f;
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    options.bias = {constant.data(), {1, 1, 1, 270}, {0, 0, 0, 1}};
    const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
    const Result soft = attend(x, options);
    CHECK(distance(attend_with(x, options, true, fovea::softpick().with_options()), soft, e) <= 1);
  }
}

TEST_CASE("parts of softpick share an epsilon", "[merge]") {
  check_merge(fovea::softpick(), reference_of, kMeaning, join);
  // Rows whose maximum stands in the other part, and rows without a positive score.
  for (const float top : {5.f, 200.f, -1.f}) {
    const Values q(1, 1, 1, 1, 1.f);
    Values k(1, 1, 40, 1, -2.f);
    for (index_t j = 0; j < 20; ++j) k.data[static_cast<std::size_t>(j)] = 0.25f * top + 0.01f * static_cast<float>(j);
    k.data[33] = top;
    const Values v = random_values(97, 1, 1, 40, 8);
    AttentionOptions options;
    options.scale = 1.f;
    const auto part = [&](index_t begin, index_t count) {
      return attend_with(q.view(), only_pos(k.view(), begin, count), only_pos(v.view(), begin, count), options, true,
                         fovea::softpick());
    };
    Result a = part(0, 20);
    const Result b = part(20, 20);
    REQUIRE(join(a, b).ok());
    CHECK(distance(a, expect_weighed(q.view(), k.view(), v.view(), options, reference_of, kMeaning)) <= 2);
  }
}
