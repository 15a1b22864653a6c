// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/entmax.hpp"

#include <algorithm>

#include "fovea/reference/entmax.hpp"
#include "normalizer_grid.hpp"

namespace {

using namespace test;

void weigh(std::span<double> scores, double alpha) {
  if (alpha == 2) return fovea::reference::SparsemaxWeights{}(scores);
  if (alpha == 1.5) return fovea::reference::Entmax15Weights{}(scores);
  fovea::reference::EntmaxWeights{alpha}(scores);
}

// How far an fp32 weight may be off. With x_j = (alpha - 1) s_j - tau the weight is max(x_j, 0)^P, P = 1 / (alpha - 1).
// - Scores off by at most `score` move tau by at most (alpha - 1) score, and an x by twice that.
// - Root and line: q = x / t <= 1 is one fma of a rounded gap and a rounded reciprocal; t is off by what the sum of n
//   terms is whose root it is, (n + 16) u / P, and by the last step, 4 u. Together t u ((n + 16) (alpha - 1) + 12).
// - Powers: 3 ULP of exp2, and a logarithm times P, off in proportion to itself.
struct WeightErrors {
  std::vector<double> weights, errors;
  double sum = 0;
};
WeightErrors weight_errors(std::vector<double> scores, double score, double alpha) {
  WeightErrors e;
  e.weights = scores;
  weigh(e.weights, alpha);
  const auto top = std::max_element(scores.begin(), scores.end());
  const double p_top = e.weights[static_cast<std::size_t>(top - scores.begin())], power = 1 / (alpha - 1);
  const double t = std::pow(p_top, alpha - 1), n = static_cast<double>(scores.size());
  const double line = 2 * (alpha - 1) * score + t * kUnit * ((n + 16) * (alpha - 1) + 12);
  const auto raised = [&](double x) { return x > 0 ? std::pow(x, power) : 0.; };
  for (std::size_t j = 0; j < scores.size(); ++j) {
    const double x = t - (alpha - 1) * (*top - scores[j]), p = raised(x);
    const double powers = p > 0 ? kUnit * (8 + 8 * std::abs(std::log2(p / p_top))) * p : 0;
    e.errors.push_back(std::max(raised(x + line) - p, p - raised(x - line)) + powers);
    e.sum += e.errors.back();
  }
  return e;
}

Expected expect_entmax(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, const AttentionOptions& options,
                       double alpha) {
  Expected e = expect(q, k, v, options);   // for the sizes
  const index_t batch = q.extent[0], heads = q.extent[1], len = q.extent[2], dim_v = v.extent[3];
  std::vector<double> ignored(e.out.size());
  fovea::reference::softmax(
      q, k, v, fovea::bhsd(ignored.data(), batch, heads, len, dim_v), options, {},
      [&](const fovea::reference::SoftmaxRow& row) {
        const auto at = static_cast<std::size_t>(((row.batch * heads + row.q_head) * len + row.pos_q) * dim_v);
        std::fill_n(e.out.begin() + static_cast<index_t>(at), dim_v, 0.);
        std::fill_n(e.out_error.begin() + static_cast<index_t>(at), dim_v, 1e-27);   // weights below 2^-100 count as 0
        if (row.terms.empty()) return;
        // Only scores near the top matter: those farther off can be wrong by as much as they like.
        std::vector<double> scores;
        double worst = 0, score = 0;
        for (const SoftmaxTerm& term : row.terms) worst = std::max(worst, score_error(term, q.extent[3], options, row.max));
        for (const SoftmaxTerm& term : row.terms) {
          scores.push_back(term.score);
          if (row.max - term.score <= 1 / (alpha - 1) + 2 * worst)
            score = std::max(score, score_error(term, q.extent[3], options, row.max));
        }
        const WeightErrors weights = weight_errors(scores, score, alpha);
        const auto terms = static_cast<double>(scores.size());
        for (index_t d = 0; d < dim_v; ++d) {
          double sum = 0, magnitude = 0, spread = 0;
          for (std::size_t n = 0; n < scores.size(); ++n) {
            const double value = double{v(row.batch, row.q_head / (heads / k.extent[1]), row.first_k + row.terms[n].key, d)};
            sum += weights.weights[n] * value;
            magnitude += weights.weights[n] * std::abs(value);
            spread += weights.errors[n] * std::abs(value);
          }
          const std::size_t n = at + static_cast<std::size_t>(d);
          e.out[n] = sum;
          e.out_error[n] += spread + (2 * weights.sum + kUnit * (2 * terms + 16)) * magnitude;
        }
      });
  return e;
}

template <class V>
double worst_over_grid(const V& variant, double alpha) {
  double worst_of_all = 0;
  for (const Problem& p : normalizer_problems()) {
    const Instance x(p);
    INFO(describe(p) << ", alpha " << alpha);
    Output one(x, false), three(x, false);
    REQUIRE(run_variant(x, one, 1, Pool::serial, variant) == "");
    const Worst worst = compare(expect_entmax(x.q, x.k, x.v, x.options(), alpha), one.out, {});
    INFO(worst.where);
    CHECK(worst.budgets <= 1);
    worst_of_all = std::max(worst_of_all, worst.budgets);
    REQUIRE(run_variant(x, three, 3, Pool::threads, variant) == "");
    CHECK(three == one);
  }
  return worst_of_all;
}

const auto kSparsemax = fovea::sparsemax();
const auto kEntmax15 = fovea::entmax15();

// Each of the three, and some alphas.
template <class F>
void for_each_alpha(const F& f) {
  f(kSparsemax, 2.);
  f(kEntmax15, 1.5);
  for (const float alpha : {1.01f, 1.25f, 1.5f, 2.f, 3.f}) f(fovea::entmax(alpha), double{alpha});
}

// One row of scores that fp32 holds exactly, so that only the weights can be off.
template <class V>
void check_row(const std::vector<float>& scores, const V& variant, double alpha) {
  const WeightErrors want = weight_errors({scores.begin(), scores.end()}, 0, alpha);
  const auto n = static_cast<double>(scores.size());
  for (const Regime regime : kRegimes) {
    const std::vector<float> got = weights_of(scores, variant, regime);
    double worst = 0, sum = 0;
    for (std::size_t j = 0; j < scores.size(); ++j) {
      const double budget = want.errors[j] + (2 * want.sum + kUnit * (2 * n + 16)) * want.weights[j] + 1e-27;
      worst = std::max(worst, in_budgets(double{got[j]}, want.weights[j], budget));
      sum += double{got[j]};
    }
    INFO("alpha " << alpha << ", regime " << name(regime) << ", " << scores.size() << " keys from " << scores.front());
    CHECK(worst <= 1);
    CHECK(std::abs(sum - 1) <= kUnit * (2 * n + 16));
  }
}

std::vector<float> row(index_t count, float (*f)(float j)) {
  std::vector<float> scores;
  for (index_t j = 0; j < count; ++j) scores.push_back(f(static_cast<float>(j)));
  return scores;
}

}   // namespace

TEST_CASE("sparsemax and entmax agree with their double references over the grid") {
  CHECK(worst_over_grid(kSparsemax.with_options(), 2) > 0.002);
  CHECK(worst_over_grid(kEntmax15.with_options(), 1.5) > 0.002);
  CHECK(worst_over_grid(fovea::entmax(1.25f).with_options(), 1.25) > 0.002);
}

TEST_CASE("sparsemax and entmax of (1, 0, -1) and (1, 0.5, -1)") {
  const auto check = [](const std::vector<float>& got, const std::vector<double>& want) {
    for (std::size_t j = 0; j < want.size(); ++j) CHECK(std::abs(double{got[j]} - want[j]) <= 1e-7);
  };
  for (const Regime regime : kRegimes) {
    check(weights_of({1, 0, -1}, kSparsemax, regime), {1, 0, 0});
    check(weights_of({1, 0.5f, -1}, kSparsemax, regime), {0.75, 0.25, 0});
    check(weights_of({1, 0, -1}, kEntmax15, regime), {0.8307189, 0.1692811, 0});
  }
}

// By hand: with two keys and d = s_1 - s_2 the first weight is (1 + d) / 2 for sparsemax, ((d / 2 + sqrt(2 - d d / 4)) /
// 2)^2 for 1.5-entmax, as long as the second has weight.
TEST_CASE("two keys") {
  for (const float d : {0.f, 0.125f, 0.5f, 0.75f, 1.f, 1.5f, 2.f, 7.f, 2e4f}) {
    const double narrow = std::min(double{d}, 1.), half = std::min(double{d}, 2.) / 2;
    const double sparse = (1 + narrow) / 2, root = (half + std::sqrt(2 - half * half)) / 2;
    CHECK(std::abs(double{weights_of({d, 0}, kSparsemax)[0]} - sparse) <= 16 * kUnit);
    CHECK(std::abs(double{weights_of({0, d}, kEntmax15)[1]} - root * root) <= 16 * kUnit);
    CHECK(std::abs(double{weights_of({d, 0}, fovea::entmax(2.f))[0]} - sparse) <= 16 * kUnit);
    CHECK(std::abs(double{weights_of({0, d}, fovea::entmax(1.5f))[1]} - root * root) <= 16 * kUnit);
  }
}

// Tsallis entropy's optimality conditions: p_j^(alpha - 1) - (alpha - 1) s_j is the same for every key with weight and not
// larger than -(alpha - 1) s_j for the rest. Scores of the engine, no reference.
TEST_CASE("weights are where the gradient is level") {
  for_each_alpha([](const auto& variant, double alpha) {
    Random random(31);
    std::vector<float> scores(290);
    for (float& s : scores) s = 0.5f * random.normal();
    const std::vector<float> p = weights_of(scores, variant, Regime::prefill);
    double low = kInfinity, high = -kInfinity, beyond = -kInfinity;
    for (std::size_t j = 0; j < p.size(); ++j) {
      const double s = (alpha - 1) * double{scores[j]};
      if (p[j] > 0) {
        const double tau = s - std::pow(double{p[j]}, alpha - 1);
        low = std::min(low, tau), high = std::max(high, tau);
      } else {
        beyond = std::max(beyond, s);
      }
    }
    // x = p^(alpha - 1) is off by the `line` of weight_errors and alpha - 1 times the relative error of the powers.
    const double n = 290, line = kUnit * ((n + 16) * (alpha - 1) + 12 + (alpha - 1) * (8 * 30 + 2 * n + 16));
    INFO("alpha " << alpha << ": tau " << low << " .. " << high << ", largest without weight " << beyond);
    CHECK(high - low <= 2 * line);
    CHECK(beyond <= high + line);
  });
}

TEST_CASE("extreme rows") {
  for_each_alpha([](const auto& variant, double alpha) {
    check_row(row(300, [](float j) { return j * 0.25f - 40.f; }), variant, alpha);
    check_row(row(300, [](float j) { return 40.f - j * 0.25f; }), variant, alpha);
    check_row(row(300, [](float j) { return j * 0x1p-8f; }), variant, alpha);
    check_row(row(300, [](float j) { return -j * 0x1p-12f; }), variant, alpha);
    check_row(row(40, [](float j) { return static_cast<int>(j) % 2 == 0 ? 1e4f : -1e4f; }), variant, alpha);
    check_row(row(40, [](float j) { return 1e4f + 0.125f * j; }), variant, alpha);
    check_row(row(40, [](float j) { return -1e4f - 0.125f * j; }), variant, alpha);
    check_row({-3.f}, variant, alpha);
    check_row({1e4f, 0.f}, variant, alpha);
    // Steps of all sizes: supports that shrink slowly.
    check_row(row(257, [](float j) { return -std::exp2(-0.0625f * j); }), variant, alpha);
    check_row(row(257, [](float j) { return std::exp2(-0.0625f * j) - 1.f; }), variant, alpha);
  });
}

TEST_CASE("equal scores have equal weights") {
  for_each_alpha([](const auto& variant, double alpha) {
    INFO("alpha " << alpha);
    for (const index_t count : {1, 2, 3, 16, 33, 300}) {
      for (const float score : {0.f, -1e4f, 3.25f}) {
        const std::vector<float> p = weights_of(std::vector<float>(static_cast<std::size_t>(count), score), variant);
        for (const float weight : p) CHECK(std::abs(double{weight} * static_cast<double>(count) - 1) <= 8 * kUnit);
        for (const float weight : p) CHECK(weight == p.front());
      }
    }
    std::vector<float> two(100, -5e3f);
    two[17] = two[80] = 1.f;
    const std::vector<float> p = weights_of(two, variant);
    for (std::size_t j = 0; j < 100; ++j) CHECK(p[j] == (j == 17 || j == 80 ? 0.5f : 0.f));
  });
}

TEST_CASE("a number added to all scores changes no bit") {
  for_each_alpha([](const auto& variant, double alpha) {
    Random random(32);
    std::vector<float> scores(70), shifted(70);
    for (std::size_t j = 0; j < 70; ++j) {
      scores[j] = std::round(256 * random.normal()) / 256;
      shifted[j] = scores[j] - 40.f;
    }
    INFO("alpha " << alpha);
    CHECK(same_bits(weights_of(scores, variant), weights_of(shifted, variant)));
  });
}

TEST_CASE("alpha 2 is sparsemax, 1.5 is entmax15, towards 1 comes softmax") {
  Random random(33);
  std::vector<float> scores(200);
  for (float& s : scores) s = random.uniform(-1.f, 1.f);
  const auto close = [&](const std::vector<float>& a, const std::vector<float>& b, double alpha) {
    const WeightErrors e = weight_errors({scores.begin(), scores.end()}, 0, alpha);
    for (std::size_t j = 0; j < a.size(); ++j) {
      const double budget = e.errors[j] + (2 * e.sum + kUnit * 416) * e.weights[j];
      CHECK(std::abs(double{a[j]} - double{b[j]}) <= 2 * budget);
    }
  };
  close(weights_of(scores, kSparsemax), weights_of(scores, fovea::entmax(2.f)), 2);
  close(weights_of(scores, kEntmax15), weights_of(scores, fovea::entmax(1.5f)), 1.5);

  // ln p_j = ln(1 - h g / t) / h - ln S with h = alpha - 1, g <= 2 and t = S^-h: the first term is -g - h (g ln S + g g / 2)
  // + O(h h), ln S <= ln 200; the second follows the largest change of the first.
  const ScoreProblem x(scores);
  const std::vector<float> soft = test::attend(x.q.view(), x.k.view(), x.v.view(), x.options).out.data;
  for (const float alpha : {1.01f, 1.001f, 1.0001f}) {
    const std::vector<float> p = weights_of(scores, fovea::entmax(alpha));
    const double change = 2 * (double{alpha} - 1) * (2 * std::log(200.) + 2) * 1.2;   // 1.2: the terms in h h, at h = 0.01
    double worst = 0;
    for (std::size_t j = 0; j < 200; ++j) worst = std::max(worst, std::abs(double{p[j]} / double{soft[j]} - 1));
    INFO("alpha " << alpha << ", largest relative difference " << worst);
    CHECK(worst <= change + 400 * kUnit);
  }
}

TEST_CASE("masked keys leave no trace, the future neither") {
  for_each_alpha([](const auto& variant, double alpha) {
    if (alpha != 1.25 && (alpha != 2 && alpha != 1.5)) return;
    check_masks(variant, false, 0.f);
  });
  for_each_alpha([](const auto& variant, double alpha) {
    for (const Regime regime : kRegimes) {
      INFO("alpha " << alpha << ", regime " << name(regime));
      Dense x(72, 1, 2, 1, 40, 300, 8, 8);
      AttentionOptions options;
      options.regime = regime;
      options.causal = Causal::bottom_right;
      const Result before = attend_with(x, options, false, variant);
      for (index_t j = 280; j < 300; ++j) {   // the queries at 260 .. 279 do not see them
        for (index_t d = 0; d < 8; ++d) x.k.view()(0, 0, j, d) = kNan, x.v.view()(0, 0, j, d) = kInfinity;
      }
      const Result after = attend_with(x, options, false, variant);
      for (index_t h = 0; h < 2; ++h) {
        for (index_t i = 0; i < 20; ++i) {
          CHECK(same_bits(std::span<const float>(&before.out.view()(0, h, i, 0), 8),
                          std::span<const float>(&after.out.view()(0, h, i, 0), 8)));
        }
        for (index_t i = 20; i < 40; ++i) CHECK(std::isnan(after.at(0, h, i, 0)));
      }
    }
  });
}

TEST_CASE("NaN in a query or a visible key reaches its rows, in V where there is weight", "[entmax]") {
  for_each_alpha([](const auto& variant, double alpha) {
    for (const Regime regime : kRegimes) {
      AttentionOptions options;
      options.regime = regime;
      options.causal = Causal::top_left;
      Dense x(73, 1, 1, 1, 6, 6, 6, 6);
      x.v = identity_values(1, 1, 6);
      const Result weights = attend_with(x, options, false, variant);
      for (int where = 0; where < 3; ++where) {
        Dense y = x;
        (where == 0 ? y.q : where == 1 ? y.k : y.v).view()(0, 0, 4, 3) = kNan;
        const Result r = attend_with(y, options, false, variant);
        INFO("alpha " << alpha << ", regime " << name(regime) << ", tensor " << where);
        for (index_t i = 0; i < 6; ++i) {
          const bool due = where == 0 ? i == 4 : where == 1 ? i >= 4 : weights.at(0, 0, i, 4) != 0;
          CHECK(std::isnan(r.at(0, 0, i, 3)) == due);
        }
      }
      Dense y = x;   // a score of +inf
      y.q.view()(0, 0, 4, 0) = y.k.view()(0, 0, 2, 0) = 1e30f;
      CHECK(std::isnan(attend_with(y, options, false, variant).at(0, 0, 4, 3)));
    }
  });
}

TEST_CASE("the keys around a row's own change no bit", "[bits]") {
  for_each_alpha([](const auto& variant, double alpha) {
    for (const Regime regime : kRegimes) {
      INFO("alpha " << alpha << ", regime " << name(regime));
      const Dense x(74, 1, 2, 1, 300, 600, 8, 10);
      AttentionOptions options;
      options.regime = regime;
      options.causal = Causal::top_left;
      options.window = {90, -1};
      const Result whole = attend_with(x, options, false, variant);
      // Fewer keys behind, other rows beside.
      for (const index_t first : {0, 5, 130, 290}) {
        const index_t count = std::min<index_t>(first == 5 ? 1 : 60, 300 - first);
        const std::vector<index_t> offset{first};
        AttentionOptions part = options;
        part.q_offset = offset;
        const Result some = attend_with(only_pos(x.q.view(), first, count), only_pos(x.k.view(), 0, first + count),
                                        only_pos(x.v.view(), 0, first + count), part, false, variant);
        for (index_t h = 0; h < 2; ++h) {
          CHECK(same_bits(std::span<const float>(&whole.out.view()(0, h, first, 0), static_cast<std::size_t>(10 * count)),
                          std::span<const float>(&some.out.view()(0, h, 0, 0), static_cast<std::size_t>(10 * count))));
        }
      }
    }
  });
}

TEST_CASE("5000 keys in decode, in one piece", "[entmax]") {
  const Dense x(75, 1, 4, 1, 1, 5000, 16, 16);
  AttentionOptions options;
  options.regime = Regime::decode;
  const fovea::AttentionShape shape{1, 4, 1, 1, 5000, 16, 16};
  for_each_alpha([&](const auto& variant, double alpha) {
    INFO("alpha " << alpha);
    fovea::Plan plan;
    REQUIRE(fovea::make_plan(plan, shape, options, variant).ok());
    CHECK(plan.partial_rows == 0);
    for (const fovea::Block& block : plan.blocks) CHECK(block.splits == 1);
    Result r = unwritten(x.q.view(), x.v.view());
    REQUIRE(fovea::attention(plan, x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, variant).ok());
    const Expected e = expect_entmax(x.q.view(), x.k.view(), x.v.view(), options, alpha);
    for (std::size_t n = 0; n < r.out.data.size(); ++n) CHECK(std::abs(double{r.out.data[n]} - e.out[n]) <= e.out_error[n]);
  });
}

TEST_CASE("there is no LSE and no sink, and alpha has a range", "[entmax]") {
  const char* const merging = "whole rows, so results over parts of the keys cannot be merged";
  check_refusals(kSparsemax, false, merging);
  check_refusals(kEntmax15, false, merging);
  check_refusals(fovea::entmax(1.25f), false, merging);
  for (const float alpha : {1.f, 0.5f, -2.f, 4.5f, kInfinity, kNan}) {
    const fovea::Status status = fovea::supports({1, 1, 1, 1, 3, 4, 4}, {}, fovea::entmax(alpha));
    INFO(status.message());
    CHECK(status.code() == fovea::Code::invalid_argument);
    CHECK(std::string(status.message()).find("1 < alpha <= 4") != std::string::npos);
  }
  check_row(row(60, [](float j) { return 0.03125f * j; }), fovea::entmax(4.f), 4);
}
