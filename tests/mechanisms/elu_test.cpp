// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/elu.hpp"

#include "fovea/reference/elu.hpp"
#include "normalizer_grid.hpp"

namespace {

using namespace test;

// d ln p / ds is 1 below 0 and 1 / (s + 1) above: a score off by delta moves a weight by the factor e^delta at most. The
// weight itself is within 4 ULP, and 0 below 2^-100.
Weighed weigh(const SoftmaxTerm& term, double delta, double) {
  const double p = term.score > 0 ? term.score + 1 : std::exp(term.score);
  const double error = p * std::expm1(delta + 8 * kUnit) + 0x1p-100;
  return {p, error, p, error};
}
const Meaning kPlain{&weigh, &no_reference, 1, false};
const Meaning kNormalized{&weigh, &no_reference, 1e-8, true};

const auto plain = [](auto q, auto k, auto v, auto out, const AttentionOptions& options) {
  fovea::reference::elu(q, k, v, out, options, false);
};
const auto normalized = [](auto q, auto k, auto v, auto out, const AttentionOptions& options) {
  fovea::reference::elu(q, k, v, out, options, true);
};

}   // namespace

TEST_CASE("elu attention agrees with the double reference over the grid") {
  check_over_grid(fovea::elu(), plain, kPlain);
  check_over_grid(fovea::elu_normalized(), normalized, kNormalized);
}

TEST_CASE("elu of extreme rows, masks, futures, NaN and refusals") {
  check_extreme_rows(fovea::elu(), plain, kPlain);
  check_extreme_rows(fovea::elu_normalized(), normalized, kNormalized);
  check_masks(fovea::elu(), false, 0.f);
  check_masks(fovea::elu_normalized(), true, static_cast<float>(std::log(double{1e-8f})));
  check_future(fovea::elu());
  check_future(fovea::elu_normalized());
  check_nan(fovea::elu());
  check_nan(fovea::elu_normalized());
  check_refusals(fovea::elu(), false);
  check_refusals(fovea::elu_normalized(), true);
}

TEST_CASE("elu of (1, 0, -1)") {
  for (const Regime regime : kRegimes) {
    const std::vector<float> p = weights_of({1, 0, -1}, fovea::elu(), regime);
    CHECK(p[0] == 2.f);
    CHECK(p[1] == 1.f);
    CHECK(p[2] == Catch::Approx(0.3678794).margin(5e-8));
    const std::vector<float> shares = weights_of({1, 0, -1}, fovea::elu_normalized(), regime);
    CHECK(shares[0] == Catch::Approx(2 / 3.3678794).margin(1e-7));
    CHECK(shares[2] == Catch::Approx(0.3678794 / 3.3678794).margin(1e-7));
  }
}

TEST_CASE("the weight of elu is within 4 ULP, 0 where masked") {
  double worst = 0;
  for (double s = -69.3; s < 20; s += 0.00031) {
    const auto rounded = static_cast<float>(s);
    const double exact = rounded > 0 ? double{rounded} + 1 : std::exp(double{rounded});
    const float got = fovea::first_lane(fovea::Elu::weight(fovea::f32(rounded)));
    // the rounding of s log2 e is an error of the exponent, 2 |s| units of the weight, beside what the exponential adds
    const double unit = std::ldexp(1., std::ilogb(exact) - 23) + 2 * kUnit * exact * std::max(-double{rounded}, 0.);
    worst = std::max(worst, std::abs(double{got} - exact) / unit);
  }
  INFO("largest error " << worst << " ULP");
  CHECK(worst <= 4);
  CHECK(worst > 0.5);
  CHECK(fovea::first_lane(fovea::Elu::weight(fovea::f32(-kInfinity))) == 0.f);
  CHECK(fovea::first_lane(fovea::Elu::weight(fovea::f32(3e38f))) == 3e38f);
  CHECK(std::isnan(fovea::first_lane(fovea::Elu::weight(fovea::f32(kNan)))));
}

// Where every score is negative, ELU + 1 is the exponential: the normalised form is softmax, the plain one softmax times
// e^LSE.
TEST_CASE("elu of negative scores = softmax") {
  Dense x(94, 1, 4, 2, 19, 270, 16, 24);
  for (float& q : x.q.data) q = std::abs(q);
  for (float& k : x.k.data) k = -std::abs(k);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
    const Result soft = attend(x, options);
    const Result one = attend_with(x, options, true, fovea::elu_normalized());
    // 1e-8 beside sums of at least e^-20
    for (const double lse : e.lse) REQUIRE(lse > 0);
    CHECK(distance(one, soft, e) <= 1);
    const Result sum = attend_with(x, options, false, fovea::elu());
    double worst = 0;
    for (std::size_t n = 0; n < sum.out.data.size(); ++n) {
      const double factor = std::exp(e.lse[n / 24]);
      worst = std::max(worst, std::abs(double{sum.out.data[n]} - factor * e.out[n]) / (factor * e.out_error[n]));
    }
    CHECK(worst <= 1);
  }
}

TEST_CASE("parts of elu attention add up, those of the normalised form share an epsilon", "[merge]") {
  check_merge(fovea::elu(), plain, kPlain,
              [](Result& a, const Result& b) { return fovea::merge_added(a.out.view(), b.out.view()); });
  check_merge(fovea::elu_normalized(), normalized, kNormalized, [](Result& a, const Result& b) {
    return fovea::merge_elu_normalized(a.out.view(), a.lse_view(), b.out.view(), b.lse_view());
  });
}
