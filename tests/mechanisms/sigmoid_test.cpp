// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/sigmoid.hpp"

#include "fovea/reference/sigmoid.hpp"
#include "normalizer_grid.hpp"
#include "support/stored.hpp"

namespace {

using namespace test;

constexpr float kBias = -2.5f;

double of_bias(double) { return kBias; }

// d ln sigmoid(x) / dx is at most 1, so a score off by delta moves a weight by the factor e^delta at most. The weight itself
// is within 5 ULP, and 0 below 2^-100.
const Meaning kMeaning{[](const SoftmaxTerm& term, double delta, double bias) {
                         const double p = 1 / (1 + std::exp(-(term.score + bias)));
                         return Weighed{p, p * std::expm1(delta + 10 * kUnit) + 0x1p-100};
                       },
                       &of_bias, 1, false};

const auto reference_of = [](auto q, auto k, auto v, auto out, const AttentionOptions& options) {
  fovea::reference::sigmoid(q, k, v, out, options, kBias);
};

fovea::Status join(Result& a, const Result& b) { return fovea::merge_added(a.out.view(), b.out.view()); }

}   // namespace

TEST_CASE("sigmoid attention agrees with the double reference over the grid") {
  check_over_grid(fovea::sigmoid(kBias), reference_of, kMeaning);
}

TEST_CASE("sigmoid of extreme rows, masks, futures, NaN and refusals") {
  check_extreme_rows(fovea::sigmoid(kBias), reference_of, kMeaning);
  check_masks(fovea::sigmoid(kBias), false, 0.f);
  check_future(fovea::sigmoid(kBias));
  check_nan(fovea::sigmoid(kBias));
  check_refusals(fovea::sigmoid(kBias), false);
}

TEST_CASE("sigmoid of (1, 0, -1) with bias -ln 3, and rows of zeros") {
  for (const Regime regime : kRegimes) {
    const std::vector<float> p = weights_of({1, 0, -1}, fovea::sigmoid(fovea::sigmoid_bias(3)), regime);
    CHECK(p[0] == Catch::Approx(0.4753669).margin(5e-8));
    CHECK(p[1] == Catch::Approx(0.25).margin(5e-8));
    CHECK(p[2] == Catch::Approx(0.1092318).margin(5e-8));
    for (const index_t n : {1, 7, 300}) {
      const std::vector<float> equal =
          weights_of(std::vector<float>(at(n), 0.f), fovea::sigmoid(fovea::sigmoid_bias(n)), regime);
      double sum = 0;
      for (const float x : equal) sum += double{x};
      // -ln n, its product with log2 e and the weight: relative errors of 3 |ln n| and 10 units
      const auto count = static_cast<double>(n);
      CHECK(std::abs(sum - count / (count + 1)) <= kUnit * (3 * std::log(count) + 10) * sum);
    }
  }
}

TEST_CASE("the weight of sigmoid is within 5 ULP, 0 where masked and at most 1 + 2^-22") {
  double worst = 0;
  for (double t = -99.99; t < 40; t += 0.00037) {
    const auto rounded = static_cast<float>(t);
    const double exact = 1 / (1 + std::exp2(-double{rounded}));
    const float got = fovea::first_lane(fovea::Sigmoid::weight(fovea::f32(rounded)));
    worst = std::max(worst, std::abs(double{got} - exact) / std::ldexp(1., std::ilogb(exact) - 23));
  }
  INFO("largest error " << worst << " ULP");
  CHECK(worst <= 5);
  CHECK(worst > 1);
  const auto weight = [](float t) { return fovea::first_lane(fovea::Sigmoid::weight(fovea::f32(t))); };
  CHECK(weight(-kInfinity) == 0.f);
  CHECK(weight(-101.f) == 0.f);
  CHECK(weight(3e38f) == Catch::Approx(1.).epsilon(3e-7));
  CHECK(weight(kInfinity) == Catch::Approx(1.).epsilon(3e-7));
  CHECK(std::isnan(weight(kNan)));
}

// sigmoid(s + b) is the softmax weight of a score s beside a sink of -b, and a row with one visible key has no other.
TEST_CASE("sigmoid of one visible key = softmax with a sink") {
  const Dense x(91, 2, 4, 2, 30, 30, 16, 24);
  AttentionOptions options;
  options.window = {0, 0};
  const Result by_sigmoid = attend_with(x, options, false, fovea::sigmoid(kBias));
  const std::vector<float> sinks(4, -kBias);
  options.sink = sinks;
  const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
  Result by_sink = attend(x, options);
  by_sink.lse.clear();
  CHECK(distance(by_sigmoid, by_sink, e) <= 1);
}

// sigmoid(x) + sigmoid(-x) = 1: with -q and -b, the two outputs add up to the sum of the visible values.
TEST_CASE("sigmoid of negated queries and bias is the rest to a sum of values") {
  const Dense x(92, 1, 4, 2, 21, 273, 16, 24);
  Dense negated = x;
  for (float& q : negated.q.data) q = -q;
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  for (const Regime regime : kRegimes) {
    options.regime = regime;
    const Result one = attend_with(x, options, false, fovea::sigmoid(kBias));
    const Result other = attend_with(negated, options, false, fovea::sigmoid(-kBias));
    const Expected e = expect_weighed(x.q.view(), x.k.view(), x.v.view(), options, reference_of, kMeaning);
    auto opposite = kMeaning;
    opposite.reference = [](double) { return -double{kBias}; };
    const auto opposite_reference = [](auto q, auto k, auto v, auto out, const AttentionOptions& o) {
      fovea::reference::sigmoid(q, k, v, out, o, -double{kBias});
    };
    const Expected f =
        expect_weighed(negated.q.view(), negated.k.view(), negated.v.view(), options, opposite_reference, opposite);
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 0; i < 21; ++i) {
        for (index_t d = 0; d < 24; ++d) {
          double sum = 0;
          for (index_t j = 0; j <= 273 - 21 + i; ++j) sum += double{x.v.view()(0, h / 2, j, d)};
          const std::size_t n = at((h * 21 + i) * 24 + d);
          CHECK(std::abs(double{one.out.data[n]} + double{other.out.data[n]} - sum) <= e.out_error[n] + f.out_error[n]);
        }
      }
    }
  }
}

// Softmax forgives slope * j for slope * |pos - j|; a normaliser that shifts do change must see the distance itself.
TEST_CASE("sigmoid sees ALiBi's true distance") {
  for (const Regime regime : kRegimes) {
    const index_t len = 20;
    const Values q(1, 2, len, 4, 0.f), k(1, 1, len, 4, 1.f), v = identity_values(1, 1, len);
    const std::vector<float> slopes{0.5f, 0.0625f};
    AttentionOptions options;
    options.alibi_slopes = slopes;
    options.regime = regime;
    const Result r = attend_with(q.view(), k.view(), v.view(), options, false, fovea::sigmoid(-1.f).with_options());
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < len; ++i) {
        for (index_t j = 0; j < len; ++j) {
          const double score = -double{slopes[at(h)]} * std::abs(static_cast<double>(i - j)) - 1;
          const double p = 1 / (1 + std::exp(-score));
          CHECK(std::abs(double{r.at(0, h, i, j)} - p) <= p * kUnit * (10 + 4 * (std::abs(score) + 1)));
        }
      }
    }
    const fovea::Status without =
        fovea::attention(q.view(), k.view(), v.view(), Result(r).out.view(), options, fovea::sigmoid(-1.f));
    CHECK(without.code() == fovea::Code::unsupported);
  }
}

TEST_CASE("parts of sigmoid attention add up", "[merge]") {
  check_merge(fovea::sigmoid(kBias), reference_of, kMeaning, join);
  Values a(1, 2, 3, 4, 1.f), b(1, 2, 3, 5, 2.f), c(1, 2, 3, 4, 2.f);
  const Values before = a;
  CHECK(fovea::merge_added(a.view(), b.view()).code() == fovea::Code::invalid_argument);
  CHECK(fovea::merge_added(a.view(), a.view()).code() == fovea::Code::invalid_argument);
  CHECK(fovea::merge_added(Tensor<float>{nullptr, {1, 2, 3, 4}, {24, 12, 4, 1}}, c.view()).code() ==
        fovea::Code::invalid_argument);
  CHECK(fovea::merge_added(a.view(), Tensor<const float>{nullptr, {1, 2, 3, 4}, {24, 12, 4, 1}}).code() ==
        fovea::Code::invalid_argument);
  CHECK(fovea::merge_added(Tensor<float>{a.data.data(), {1, 2, 3, 4}, {24, 12, 0, 1}}, c.view()).code() ==
        fovea::Code::invalid_argument);
  CHECK(a.data == before.data);
  CHECK(fovea::merge_added(a.view(), c.view()).ok());
  for (const float x : a.data) CHECK(x == 3.f);
}

namespace {

template <class Compiled>
void check_stored(Format format) {
  Keys keys(31, format, format, 2, 24, 16, {70, 300});
  Tokens q = random_queries(33, 4, 4, 24);
  const Placement tokens = consecutive(keys.len);
  Lodging flat, paged;
  paged.home = Home::paged;
  const Housed in_rows(keys.k, keys.v, tokens, flat), in_pages(keys.k, keys.v, tokens, paged);
  // Two queries of each of two sequences; the reference reads the stored numbers as ragged floats.
  const std::vector<index_t> cu_q{0, 2, 4}, cu_k = cumulative(keys.len);
  AttentionOptions dense;
  dense.causal = Causal::bottom_right;
  dense.cu_len_q = cu_q;
  dense.cu_len_k = cu_k;
  const Expected e = expect_weighed(q.floats(), keys.k.floats(), keys.v.floats(), dense, reference_of, kMeaning);
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  options.cu_len_q = cu_q;
  options.len_k = keys.len;
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    options.regime = regime;
    Values rows(1, 4, 4, 16, canary()), pages = rows;
    const fovea::Status first =
        fovea::attention<Compiled>(q.operand(), in_rows.kv(), rows.view(), options, fovea::sigmoid(kBias));
    const fovea::Status second =
        fovea::attention<Compiled>(q.operand(), in_pages.kv(), pages.view(), options, fovea::sigmoid(kBias));
    INFO(name(regime) << ": " << first.message() << second.message());
    REQUIRE(first.ok());
    REQUIRE(second.ok());
    const Worst worst = compare(e, rows.view(), {});
    INFO(worst.where);
    CHECK(worst.budgets <= 1);
    CHECK(same_bits(rows.data, pages.data));
  }
}

}   // namespace

TEST_CASE("sigmoid over bf16 keys and values, in rows and in pages", "[paged]") {
  check_stored<fovea::Formats<Format::bf16>>(Format::bf16);
}

TEST_CASE("sigmoid over int8 keys and values, in rows and in pages", "[paged]") {
  check_stored<fovea::Formats<Format::i8_token>>(Format::i8_token);
}
