// SPDX-License-Identifier: Apache-2.0
// The tests that every online normaliser other than softmax passes: against its double reference over a grid, with the
// budget of each element derived from its row, and what holds whatever the weights are.
//
// Budget. tests/support/tolerance.hpp says how far a score may be off (delta). A mechanism adds, per key, how far its weight
// p may then be off, and the part of the key in the denominator D likewise:
//   out: sum_j |dp_j| |v_jd| / D + (sum_j |dD_j| / D + sums) sum_j p_j |v_jd| / D,   LSE = ln D: sum_j |dD_j| / D + sums
// where `sums` is what sums over keys, rescaling and the closing division may add.
#pragma once
#include <span>
#include <utility>

#include "catch_compat.hpp"
#include "support/dense.hpp"
#include "support/problem.hpp"

namespace test {

using fovea::reference::SoftmaxTerm;

// What a key adds to numerator and denominator, in double, and how far fp32 may be off; both in units of e^reference.
struct Weighed {
  double weight, weight_error;
  double part = 0, part_error = 0;
};

// What is known of a mechanism from outside. `weigh(term, delta, reference)` with delta the error of the score;
// `reference(top)` is the number subtracted from scores whose largest is `top`, or added to them. With an LSE, D = constant
// e^-reference + sum of parts, without one D = constant.
template <class Weigh>
struct Meaning {
  Weigh weigh;
  double (*reference)(double top);
  double constant;
  bool has_lse;
};
template <class Weigh>
Meaning(Weigh, double (*)(double), double, bool) -> Meaning<Weigh>;

inline double no_reference(double) { return 0; }
inline double above_zero(double top) { return std::max(top, 0.); }

// `run` is the mechanism's reference: run(q, k, v, out, options).
template <class Reference, class Weigh>
Expected expect_weighed(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, const AttentionOptions& options,
                        const Reference& run, const Meaning<Weigh>& meaning) {
  Expected e = expect(q, k, v, options);   // for the sizes
  const index_t batch = q.extent[0], heads = q.extent[1], len = q.extent[2], dim_v = v.extent[3];
  const index_t group = heads / k.extent[1];
  const Tensor<double> out = fovea::bhsd(e.out.data(), batch, heads, len, dim_v);
  std::vector<double> ignored(e.out.size());
  run(q, k, v, out, options);
  fovea::reference::softmax(
      q, k, v, fovea::bhsd(ignored.data(), batch, heads, len, dim_v), options, {},
      [&](const fovea::reference::SoftmaxRow& row) {
        const double reference = row.terms.empty() ? 0 : meaning.reference(row.max);
        double denominator = meaning.constant * (meaning.has_lse ? std::exp(-reference) : 1), error = 0;
        std::vector<double> magnitude(static_cast<std::size_t>(dim_v)), spread(magnitude);
        for (const SoftmaxTerm& term : row.terms) {
          const double delta = score_error(term, q.extent[3], options, reference);
          const Weighed key = meaning.weigh(term, delta, reference);
          if (meaning.has_lse) denominator += key.part, error += key.part_error;
          for (index_t d = 0; d < dim_v; ++d) {
            const double size = std::abs(double{v(row.batch, row.q_head / group, row.first_k + term.key, d)});
            magnitude[static_cast<std::size_t>(d)] += key.weight * size;
            spread[static_cast<std::size_t>(d)] += key.weight_error * size;
          }
        }
        const auto terms = static_cast<index_t>(row.terms.size());
        const double sums = sum_error(terms, terms == 0 ? 0 : row.terms.back().key - row.terms.front().key + 1);
        const double common = denominator == 0 ? 0 : error / denominator + sums;
        const auto at = static_cast<std::size_t>((row.batch * heads + row.q_head) * len + row.pos_q);
        for (std::size_t d = 0; d < static_cast<std::size_t>(dim_v); ++d) {
          const double divided = denominator == 0 ? 0 : 1 / denominator;
          e.out_error[at * static_cast<std::size_t>(dim_v) + d] = divided * (spread[d] + common * magnitude[d]) + 1e-30;
        }
        e.lse[at] = reference + std::log(denominator);
        e.lse_error[at] = common + kUnit * (kLogUnits * 16 + 4 * (std::abs(reference) + std::abs(e.lse[at])));
        if (!std::isfinite(e.lse[at])) e.lse_error[at] = 0;
      });
  return e;
}

// Plan, poisoned workspace, guarded output; "" or what is wrong with the call.
template <class V>
std::string run_variant(const Instance& x, Output& output, int lanes, Pool pool, const V& variant) {
  Pools pools;
  AttentionOptions options = x.options();
  options.lse = output.lse;
  options.executor = pools.get(pool, lanes);
  fovea::Plan plan;
  if (const fovea::Status s = fovea::make_plan(plan, x.shape(), options, variant); !s.ok())
    return std::string("make_plan: ") + s.message();
  PoisonedBytes workspace(fovea::workspace_bytes(plan, lanes));
  options.workspace = workspace.bytes();
  if (const fovea::Status s = fovea::attention(plan, x.q, x.k, x.v, output.out, options, variant); !s.ok())
    return std::string("attention: ") + s.message();
  if (!workspace.guards_intact()) return "wrote outside the workspace";
  if (const index_t at = first_overwritten(output.out_store, {output.out}); at >= 0)
    return "wrote beside the rows of out, float " + std::to_string(at);
  return "";
}

// Lengths around vectors, key tiles and splits, every regime, every option that acts on scores or masks; NaN and infinities
// wherever a key is masked for all of its rows.
inline std::vector<Problem> normalizer_problems() {
  std::vector<Problem> all;
  const Regime regimes[] = {Regime::prefill, Regime::decode, Regime::wide_decode};
  const index_t lengths[] = {1, 15, 16, 17, 255, 256, 257};
  const std::pair<index_t, index_t> dims[] = {{8, 8}, {19, 33}, {64, 40}};
  std::size_t n = 0;
  for (const index_t len_k : lengths) {
    for (const Regime regime : regimes) {
      Problem p;
      p.seed = 500 + n;
      p.regime = regime;
      p.q_heads = n % 2 == 0 ? 4 : 3, p.kv_heads = n % 2 == 0 ? 2 : 1;
      p.dim_qk = dims[n % 3].first, p.dim_v = dims[n / 3 % 3].second;
      p.len_q = {std::array<index_t, 3>{1, 5, 18}[n % 3]}, p.stored_k = {len_k};
      p.causal = std::array{Causal::none, Causal::bottom_right}[n % 2];
      p.q_spread = std::array{1.f, 0.05f, 4.f, 12.f}[n % 4];
      if (n % 4 == 1) p.window = {9, 2};
      if (n % 4 == 2) p.alibi = true;
      if (n % 5 == 3) p.softcap = 3;
      if (n % 6 == 4) p.keep = Share::heads;
      if (n % 7 == 5) p.bias = Share::full, p.bias_masks = true;
      p.layout = n % 3 == 0 ? Layout::padded : Layout::bhsd;
      all.push_back(p);
      ++n;
    }
  }
  for (const Regime regime : regimes) {
    Problem ragged;
    ragged.seed = 600, ragged.regime = regime, ragged.is_ragged = true, ragged.layout = Layout::bshd;
    ragged.q_heads = 4, ragged.kv_heads = 2, ragged.dim_qk = ragged.dim_v = 16;
    ragged.len_q = {1, 0, 20, 3}, ragged.stored_k = {70, 5, 20, 0}, ragged.causal = Causal::bottom_right;
    all.push_back(ragged);
    Problem split;   // three partial results in the regimes that split
    split.seed = 601, split.regime = regime, split.q_heads = 2, split.dim_qk = split.dim_v = 8;
    split.len_q = {2}, split.stored_k = {2100}, split.q_spread = 3;
    all.push_back(split);
    split.seed = 602, split.window = {600, 0}, split.causal = Causal::bottom_right;   // empty splits
    all.push_back(split);
  }
  return all;
}

template <class V, class Reference, class Weigh>
void check_over_grid(const V& variant, const Reference& reference, const Meaning<Weigh>& meaning) {
  double worst_of_all = 0;
  for (const Problem& p : normalizer_problems()) {
    const Instance x(p);
    INFO(describe(p));
    const auto run = [&](Output& output, int lanes, Pool pool) {
      const bool plain = p.softcap == 0 && !p.alibi && p.bias == Share::absent && p.keep == Share::absent;
      return plain ? run_variant(x, output, lanes, pool, variant)
                   : run_variant(x, output, lanes, pool, variant.with_options());
    };
    Output one(x, meaning.has_lse), three(x, meaning.has_lse);
    REQUIRE(run(one, 1, Pool::serial) == "");
    const Expected e = expect_weighed(x.q, x.k, x.v, x.options(), reference, meaning);
    const Worst worst = compare(e, one.out, one.lse);
    INFO(worst.where);
    CHECK(worst.budgets <= 1);
    worst_of_all = std::max(worst_of_all, worst.budgets);
    REQUIRE(run(three, 3, Pool::threads) == "");
    CHECK(three == one);
  }
  INFO("worst error in budgets: " << worst_of_all);
  CHECK(worst_of_all > 0.01);   // a budget that nothing comes near would find nothing
}

// One query of dim 1 and its scores: k = scores, scale 1. `v` is the identity, so that out is the row of weights.
struct ScoreProblem {
  Values q, k, v;
  AttentionOptions options;

  explicit ScoreProblem(const std::vector<float>& scores, Regime regime = Regime::decode)
      : q(1, 1, 1, 1, 1.f),
        k(1, 1, static_cast<index_t>(scores.size()), 1),
        v(identity_values(1, 1, static_cast<index_t>(scores.size()))) {
    k.data = scores;
    options.scale = 1.f;
    options.regime = regime;
  }
};

template <class V>
Result attend_with(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, AttentionOptions options,
                   bool with_lse, const V& variant) {
  Result r = unwritten(q, v);
  if (with_lse) {
    options.lse = r.lse_view();
  } else {
    r.lse.clear();
  }
  const fovea::Status status = fovea::attention(q, k, v, r.out.view(), options, variant);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}
template <class V>
Result attend_with(const Dense& x, const AttentionOptions& options, bool with_lse, const V& variant) {
  return attend_with(x.q.view(), x.k.view(), x.v.view(), options, with_lse, variant);
}
template <class V>
std::vector<float> weights_of(const std::vector<float>& scores, const V& variant, Regime regime = Regime::decode) {
  const ScoreProblem x(scores, regime);
  return attend_with(x.q.view(), x.k.view(), x.v.view(), x.options, false, variant).out.data;
}

// Rising, falling, huge, tiny and equal scores.
template <class V, class Reference, class Weigh>
void check_extreme_rows(const V& variant, const Reference& reference, const Meaning<Weigh>& meaning) {
  const auto row = [](index_t count, auto f) {
    std::vector<float> scores;
    for (index_t j = 0; j < count; ++j) scores.push_back(f(static_cast<float>(j)));
    return scores;
  };
  const std::vector<std::vector<float>> rows = {row(300, [](float j) { return j * 0.4f - 60.f; }),
                                                row(300, [](float j) { return 60.f - j * 0.4f; }),
                                                row(40, [](float j) { return static_cast<int>(j) % 2 == 0 ? 1e4f : -1e4f; }),
                                                row(40, [](float j) { return -1e4f - j; }),
                                                row(40, [](float j) { return 1e4f + j; }),
                                                row(300, [](float j) { return (j - 150.f) * 1e-5f; }),
                                                row(33, [](float) { return 0.f; }),
                                                row(33, [](float) { return -1e-20f; }),
                                                row(2, [](float j) { return j == 0.f ? 1e4f : 0.f; }),
                                                row(1, [](float) { return -3.f; })};
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    for (std::size_t n = 0; n < rows.size(); ++n) {
      const ScoreProblem x(rows[n], regime);
      const Result result = attend_with(x.q.view(), x.k.view(), x.v.view(), x.options, meaning.has_lse, variant);
      const Expected e = expect_weighed(x.q.view(), x.k.view(), x.v.view(), x.options, reference, meaning);
      INFO("row " << n << ", regime " << name(regime));
      CHECK(distance(result, e) <= 1);
    }
  }
}

// Rows that see nothing are 0 with the given LSE, rows that see one key are a multiple of its value, and NaN in the masked
// rest is not noticed.
template <class V>
void check_masks(const V& variant, bool has_lse, float empty_lse) {
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    Dense x(71, 1, 2, 1, 3, 20, 8, 8);
    std::vector<std::uint8_t> keep(3 * 20, 0);
    keep[20 + 7] = 1;   // query 1 sees key 7
    keep[40 + 7] = keep[40 + 19] = 1;
    for (const index_t j : {0, 1, 6, 8, 18}) {
      for (index_t d = 0; d < 8; ++d) x.k.view()(0, 0, j, d) = kNan, x.v.view()(0, 0, j, d) = d % 2 == 0 ? kNan : kInfinity;
    }
    AttentionOptions options;
    options.regime = regime;
    options.keep = {keep.data(), {1, 1, 3, 20}, {60, 60, 20, 1}};
    const Result r = attend_with(x, options, has_lse, variant.with_options());
    for (index_t h = 0; h < 2; ++h) {
      if (has_lse) CHECK(r.lse_at(0, h, 0) == empty_lse);
      const double share = double{r.at(0, h, 1, 0)} / double{x.v.view()(0, 0, 7, 0)};
      for (index_t d = 0; d < 8; ++d) {
        CHECK(r.at(0, h, 0, d) == 0.f);
        CHECK(std::isfinite(r.at(0, h, 2, d)));
        // weight times value and the closing factor: two roundings each
        CHECK(std::abs(double{r.at(0, h, 1, d)} - share * double{x.v.view()(0, 0, 7, d)}) <=
              4 * kUnit * std::abs(share * double{x.v.view()(0, 0, 7, d)}));
      }
    }
    // The same rows without the masked keys.
    AttentionOptions one_key;
    one_key.regime = regime;
    const Result alone = attend_with(only_pos(x.q.view(), 1, 1), only_pos(x.k.view(), 7, 1), only_pos(x.v.view(), 7, 1),
                                     one_key, has_lse, variant);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t d = 0; d < 8; ++d) CHECK(r.at(0, h, 1, d) == alone.at(0, h, 0, d));
    }
  }
}

// What lies behind a query's position changes none of its bits.
template <class V>
void check_future(const V& variant) {
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    Dense x(72, 1, 2, 1, 40, 300, 8, 8);
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    const Result before = attend_with(x, options, false, variant);
    const index_t first = 280;   // the queries at 260 .. 279 do not see it
    for (index_t j = first; j < 300; ++j) {
      for (index_t d = 0; d < 8; ++d) x.k.view()(0, 0, j, d) = j % 3 == 0 ? kNan : 50.f, x.v.view()(0, 0, j, d) = kInfinity;
    }
    const Result after = attend_with(x, options, false, variant);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < 20; ++i) {
        CHECK(same_bits(std::span<const float>(&before.out.view()(0, h, i, 0), 8),
                        std::span<const float>(&after.out.view()(0, h, i, 0), 8)));
      }
      CHECK(!std::isfinite(after.at(0, h, 20, 0)));
    }
  }
}

// NaN in a query, or in K or V of a visible key, reaches that row and no other.
template <class V>
void check_nan(const V& variant) {
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::top_left;
    for (int where = 0; where < 3; ++where) {
      Dense x(73, 1, 1, 1, 6, 6, 8, 8);
      (where == 0 ? x.q : where == 1 ? x.k : x.v).view()(0, 0, 4, 3) = kNan;
      const Result r = attend_with(x, options, false, variant);
      INFO("regime " << name(regime) << ", tensor " << where);
      for (index_t i = 0; i < 6; ++i) CHECK(std::isnan(r.at(0, 0, i, 3)) == (where == 0 ? i == 4 : i >= 4));
    }
  }
}

// A sink belongs to softmax; LSE is there where a sum is. Without it the refusal says how parts merge.
template <class V>
void check_refusals(const V& variant, bool has_lse,
                    const char* merging = "no sum, so there is no LSE; results over parts of the keys merge by merge_added") {
  const Dense x(74, 1, 2, 1, 2, 3, 4, 4);
  Result r = unwritten(x.q.view(), x.v.view());
  const Result untouched = r;
  AttentionOptions options;
  const std::vector<float> sinks{0.f, 1.f};
  options.sink = sinks;
  const fovea::Status sink = fovea::attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, variant);
  CHECK(sink.code() == fovea::Code::unsupported);
  options.sink = {};
  options.lse = r.lse_view();
  if (!has_lse) {
    const fovea::Status lse = fovea::attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, variant);
    CHECK(lse.code() == fovea::Code::unsupported);
    CHECK_THAT(lse.message(), Catch::Matchers::ContainsSubstring(merging));
  }
  CHECK(same_bits(r, untouched));
}

// Parts over [0, at) and [at, len_k) joined by join(a, b) against the whole, whose error each of the three may have.
template <class V, class Reference, class Weigh, class Join>
void check_merge(const V& variant, const Reference& reference, const Meaning<Weigh>& meaning, const Join& join) {
  const index_t len_k = 300;
  const Dense x(75, 2, 4, 2, 3, len_k, 16, 19);
  const Expected e = expect_weighed(x.q.view(), x.k.view(), x.v.view(), {}, reference, meaning);
  const auto part = [&](index_t begin, index_t count) {
    return attend_with(x.q.view(), only_pos(x.k.view(), begin, count), only_pos(x.v.view(), begin, count), {},
                       meaning.has_lse, variant);
  };
  for (const index_t at : {0, 1, 37, 256, 299, 300}) {
    Result a = part(0, at), b = part(at, len_k - at), b_first = b;
    const Result a_kept = a;
    INFO("cut at " << at);
    const fovea::Status joined = join(a, b), swapped = join(b_first, a_kept);
    REQUIRE(joined.ok());
    REQUIRE(swapped.ok());
    CHECK(distance(a, e) <= 2);
    CHECK(distance(b_first, e) <= 2);
  }
}

}   // namespace test
