// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/relu.hpp"

#include "fovea/reference/relu.hpp"
#include "normalizer_grid.hpp"

namespace {

using namespace test;

constexpr float kKeys = 12.f;

// A weight is off by as much as its score at most; a score near 0 may fall on either side.
const Meaning kGiven{[](const SoftmaxTerm& term, double delta, double) {
                       return Weighed{std::max(term.score, 0.), term.score > -delta ? delta : 0};
                     },
                     &no_reference, kKeys, false};
// Counts have no error.
const Meaning kMean{[](const SoftmaxTerm& term, double delta, double) {
                      return Weighed{std::max(term.score, 0.), term.score > -delta ? delta : 0, 1, 0};
                    },
                    &no_reference, 0, true};

const auto given = [](auto q, auto k, auto v, auto out, const AttentionOptions& options) {
  fovea::reference::relu(q, k, v, out, options, double{kKeys});
};
const auto mean = [](auto q, auto k, auto v, auto out, const AttentionOptions& options) {
  fovea::reference::relu(q, k, v, out, options);
};

}   // namespace

TEST_CASE("relu attention agrees with the double reference over the grid") {
  check_over_grid(fovea::relu(kKeys), given, kGiven);
  check_over_grid(fovea::relu(), mean, kMean);
}

TEST_CASE("relu of extreme rows, masks, futures, NaN and refusals") {
  check_extreme_rows(fovea::relu(kKeys), given, kGiven);
  check_extreme_rows(fovea::relu(), mean, kMean);
  check_masks(fovea::relu(kKeys), false, 0.f);
  check_masks(fovea::relu(), true, -kInfinity);
  check_future(fovea::relu(kKeys));
  check_future(fovea::relu());
  check_nan(fovea::relu(kKeys));
  check_nan(fovea::relu());
  check_refusals(fovea::relu(kKeys), false);
  check_refusals(fovea::relu(), true);
}

TEST_CASE("relu of (1, 0, -1) over 2 or 3 keys") {
  for (const Regime regime : kRegimes) {
    CHECK(weights_of({1, 0, -1}, fovea::relu(2), regime) == std::vector<float>{0.5f, 0, 0});
    CHECK(weights_of({1, 0, -1}, fovea::relu(), regime) == std::vector<float>{1.f / 3, 0, 0});
  }
}

// relu(s) - relu(-s) = s: q and -q together are linear attention, scale / L sum_j (q . k_j) v_j = scale / L (sum_j v_j k_j')
// q.
TEST_CASE("relu of q minus relu of -q is linear attention") {
  const index_t len_k = 273, dim = 16, dim_v = 24, len_q = 21;
  const Dense x(92, 1, 4, 2, len_q, len_k, dim, dim_v);
  Dense negated = x;
  for (float& q : negated.q.data) q = -q;
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const Result one = attend_with(x, options, false, fovea::relu(kKeys));
    const Result other = attend_with(negated, options, false, fovea::relu(kKeys));
    const Expected e = expect_weighed(x.q.view(), x.k.view(), x.v.view(), options, given, kGiven);
    const Expected f = expect_weighed(negated.q.view(), negated.k.view(), negated.v.view(), options, given, kGiven);
    double worst = 0;
    for (index_t h = 0; h < 4; ++h) {
      std::vector<double> state(static_cast<std::size_t>(dim * dim_v));   // [dim, dim_v]
      for (index_t j = 0; j < len_k; ++j) {
        for (index_t n = 0; n < dim * dim_v; ++n)
          state[static_cast<std::size_t>(n)] +=
              double{x.k.view()(0, h / 2, j, n / dim_v)} * double{x.v.view()(0, h / 2, j, n % dim_v)};
      }
      for (index_t i = 0; i < len_q; ++i) {
        for (index_t d = 0; d < dim_v; ++d) {
          double sum = 0;
          for (index_t c = 0; c < dim; ++c)
            sum += double{x.q.view()(0, h, i, c)} * state[static_cast<std::size_t>(c * dim_v + d)];
          sum *= 0.25 / double{kKeys};
          const auto n = static_cast<std::size_t>((h * len_q + i) * dim_v + d);
          const double budget = e.out_error[n] + f.out_error[n];
          worst = std::max(worst, std::abs(double{one.out.data[n]} - double{other.out.data[n]} - sum) / budget);
        }
      }
    }
    CHECK(worst <= 1);
  }
}

TEST_CASE("relu() counts the keys a row sees, and its LSE is their logarithm") {
  const Dense x(93, 1, 2, 1, 40, 300, 8, 8);
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    options.window = {16, -1};
    const Result counted = attend_with(x, options, true, fovea::relu());
    const Result given_17 = attend_with(x, options, false, fovea::relu(17));
    for (const float lse : counted.lse) CHECK(lse == std::log(17.f));
    CHECK(same_bits(counted.out.data, given_17.out.data));
  }
}

TEST_CASE("parts of relu attention add up, those of relu() through merge", "[merge]") {
  check_merge(fovea::relu(kKeys), given, kGiven,
              [](Result& a, const Result& b) { return fovea::merge_added(a.out.view(), b.out.view()); });
  check_merge(fovea::relu(), mean, kMean, [](Result& a, const Result& b) {
    return fovea::merge(a.out.view(), a.lse_view(), b.out.view(), b.lse_view());
  });
}
