// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/off_by_one.hpp"

#include "fovea/reference/off_by_one.hpp"
#include "normalizer_grid.hpp"

namespace {

using namespace test;

// As softmax in tolerance.hpp; the 1 is a term like the others, e^-m with a rounded exponent.
Weighed weigh(const SoftmaxTerm& term, double delta, double m) {
  const double p = std::exp(term.score - m), error = p * std::expm1(delta + (kExpUnits + 4 * m) * kUnit) + 0x1p-100;
  return {p, error, p, error};
}
const Meaning kMeaning{&weigh, &above_zero, 1, true};

const auto reference_of = [](auto q, auto k, auto v, auto out, const AttentionOptions& options) {
  fovea::reference::off_by_one(q, k, v, out, options);
};

fovea::Status join(Result& a, const Result& b) {
  return fovea::merge_off_by_one(a.out.view(), a.lse_view(), b.out.view(), b.lse_view());
}

}   // namespace

TEST_CASE("softmax-off-by-one agrees with the double reference over the grid") {
  check_over_grid(fovea::off_by_one(), reference_of, kMeaning);
}

TEST_CASE("softmax-off-by-one of extreme rows, masks, futures, NaN and refusals") {
  check_extreme_rows(fovea::off_by_one(), reference_of, kMeaning);
  check_masks(fovea::off_by_one(), true, 0.f);
  check_future(fovea::off_by_one());
  check_nan(fovea::off_by_one());
  check_refusals(fovea::off_by_one(), true);
}

TEST_CASE("softmax-off-by-one of (1, 0, -1), and of shifted scores") {
  for (const Regime regime : kRegimes) {
    const std::vector<float> p = weights_of({1, 0, -1}, fovea::off_by_one(), regime);
    CHECK(p[0] == Catch::Approx(0.5344466).margin(1e-7));
    CHECK(p[1] == Catch::Approx(0.1966119).margin(1e-7));
    CHECK(p[2] == Catch::Approx(0.0723295).margin(1e-7));
    // Shifts matter: the function that adds 1 after subtracting the maximum would give (0.4995, 0.0677) for both.
    CHECK(weights_of({-20, -22}, fovea::off_by_one(), regime)[0] == Catch::Approx(std::exp(-20.)).epsilon(3e-6));
    CHECK(weights_of({20, 18}, fovea::off_by_one(), regime)[0] == Catch::Approx(1 / (1 + std::exp(-2.))).epsilon(1e-6));
  }
}

// The 1 is a key whose score and value are 0.
TEST_CASE("softmax-off-by-one = softmax with one more key of zeros") {
  const index_t len_k = 270;
  const Dense x(98, 1, 4, 2, 19, len_k, 16, 24);
  Values k(1, 2, len_k + 1, 16), v(1, 2, len_k + 1, 24);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t j = 0; j < len_k; ++j) {
      for (index_t d = 0; d < 16; ++d) k.view()(0, h, j + 1, d) = x.k.view()(0, h, j, d);
      for (index_t d = 0; d < 24; ++d) v.view()(0, h, j + 1, d) = x.v.view()(0, h, j, d);
    }
  }
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    AttentionOptions options;
    options.regime = regime;
    const Expected e = expect(x.q.view(), k.view(), v.view(), options);
    CHECK(distance(attend_with(x, options, true, fovea::off_by_one()), e) <= 1);
  }
}

TEST_CASE("softmax-off-by-one has the bits of a sink logit of 0") {
  const Dense x(99, 1, 4, 2, 5, 1300, 8, 8);
  const std::vector<float> zeros(4, 0.f);
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    AttentionOptions options;
    options.regime = regime;
    const Result one = attend_with(x, options, true, fovea::off_by_one());
    options.sink = zeros;
    CHECK(same_bits(one, attend(x, options)));
  }
}

TEST_CASE("parts of softmax-off-by-one share the 1, and one part joins plain softmax", "[merge]") {
  check_merge(fovea::off_by_one(), reference_of, kMeaning, join);
  const Dense x(100, 1, 2, 1, 3, 90, 8, 8);
  const Expected e = expect_weighed(x.q.view(), x.k.view(), x.v.view(), {}, reference_of, kMeaning);
  Result a =
      attend_with(x.q.view(), only_pos(x.k.view(), 0, 50), only_pos(x.v.view(), 0, 50), {}, true, fovea::off_by_one());
  const Result b = attend(x.q.view(), only_pos(x.k.view(), 50, 40), only_pos(x.v.view(), 50, 40));
  REQUIRE(fovea::merge(a.out.view(), a.lse_view(), b.out.view(), b.lse_view()).ok());
  CHECK(distance(a, e) <= 2);
}

TEST_CASE("merges that share a constant refuse what does not fit and write nothing", "[merge]") {
  const Dense x(101, 1, 2, 1, 3, 9, 4, 4);
  Result a = attend_with(x, {}, true, fovea::off_by_one());
  const Result b = a, before = a;
  const auto invalid = [](const fovea::Status& s) { return s.code() == fovea::Code::invalid_argument; };
  const View<const float, 3> short_lse{b.lse.data(), {1, 2, 2}, {6, 3, 1}};
  CHECK(invalid(fovea::merge_off_by_one(a.out.view(), a.lse_view(), b.out.view(), short_lse)));
  CHECK(invalid(fovea::merge_off_by_one(a.out.view(), a.lse_view(), a.out.view(), b.lse_view())));
  CHECK(invalid(fovea::merge_off_by_one(a.out.view(), a.lse_view(), b.out.view(), a.lse_view())));
  CHECK(
      invalid(fovea::merge_off_by_one(a.out.view(), {a.out.data.data(), {1, 2, 3}, {6, 3, 1}}, b.out.view(), b.lse_view())));
  CHECK(invalid(fovea::merge_off_by_one(a.out.view(), {a.lse.data(), {1, 2, 3}, {6, 0, 1}}, b.out.view(), b.lse_view())));
  CHECK(invalid(fovea::merge_off_by_one(a.out.view(), a.lse_view(), b.out.view(), {nullptr, {1, 2, 3}, {6, 3, 1}})));
  CHECK(invalid(fovea::merge_off_by_one(a.out.view(), {nullptr, {1, 2, 3}, {6, 3, 1}}, b.out.view(), b.lse_view())));
  for (const float constant : {0.f, -1.f, kInfinity, kNan})
    CHECK(invalid(fovea::merge_sharing(a.out.view(), a.lse_view(), b.out.view(), b.lse_view(), constant)));
  CHECK(same_bits(a, before));
  const Tensor<float> none{nullptr, {1, 2, 0, 4}, {0, 0, 4, 1}};
  const View<float, 3> no_lse{nullptr, {1, 2, 0}, {0, 0, 1}};
  CHECK(fovea::merge_off_by_one(none, no_lse, none, no_lse).ok());
}
