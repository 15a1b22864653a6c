// SPDX-License-Identifier: Apache-2.0
// Weights recomputed from the LSE: rows sum to one and rebuild the output.
#include <cmath>

#include "support/dense.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;

// All rows of a problem: weights against the reference's, their sum, and the output they rebuild.
void check_weights(const Instance& x) {
  INFO(describe(x.p));
  Output output(x, true);
  REQUIRE(run(x, output, 1, Pool::serial) == "");
  const AttentionOptions options = x.options();
  const index_t width = *std::max_element(x.p.stored_k.begin(), x.p.stored_k.end()), group = x.p.q_heads / x.p.kv_heads;

  std::vector<double> wanted, error, rebuilt_error;
  std::vector<fovea::WeightRow> rows;
  std::vector<std::array<index_t, 3>> places;   // batch, pos in q, first key
  std::vector<double> sink_share;
  const Expected e = x.expected();
  std::vector<double> unused(e.out.size());
  const auto view = fovea::bhsd(unused.data(), x.q.extent[0], x.p.q_heads, x.q.extent[2], x.p.dim_v);
  fovea::reference::softmax(x.q, x.k, x.v, view, options, {}, [&](const fovea::reference::SoftmaxRow& row) {
    rows.push_back({row.sequence, row.q_head, row.q_index});
    places.push_back({row.batch, row.pos_q, row.first_k});
    sink_share.push_back(std::isfinite(row.sink) ? std::exp(row.sink - row.lse) : 0);
    const std::size_t first = wanted.size();
    wanted.resize(first + static_cast<std::size_t>(width), 0.);
    error.resize(first + static_cast<std::size_t>(width), 0.);
    const auto at = static_cast<std::size_t>((row.batch * x.p.q_heads + row.q_head) * x.q.extent[2] + row.pos_q);
    for (const auto& term : row.terms) {
      const auto n = first + static_cast<std::size_t>(term.key);
      wanted[n] = term.weight;
      // exp(score - lse): the errors of both, and of exp at that argument.
      error[n] =
          term.weight * std::expm1(score_error(term, x.p.dim_qk, options, row.lse) + e.lse_error[at] + 8 * kUnit) + 1e-37;
    }
  });
  std::vector<float> store(rows.size() * static_cast<std::size_t>(width + 3), canary());
  const View<float, 2> weights{store.data(), {static_cast<index_t>(rows.size()), width}, {width + 3, 1}};
  const fovea::Status status = fovea::attention_weights(x.q, x.k, output.lse, rows, weights, options);
  INFO(status.message());
  REQUIRE(status.ok());

  for (std::size_t n = 0; n < rows.size(); ++n) {
    const auto [batch, pos, first_k] = places[n];
    const auto row = static_cast<index_t>(n);
    double sum = sink_share[n], sum_error = 1e-6, worst = 0;
    std::vector<double> out(static_cast<std::size_t>(x.p.dim_v)), out_error(out);
    for (index_t j = 0; j < width; ++j) {
      const std::size_t at = n * static_cast<std::size_t>(width) + static_cast<std::size_t>(j);
      const double weight = weights(row, j);
      if (wanted[at] == 0 && error[at] == 0) {
        CHECK(weight == 0);
        continue;
      }
      worst = std::max(worst, in_budgets(weight, wanted[at], error[at]));
      sum += weight;
      sum_error += error[at];
      for (index_t d = 0; d < x.p.dim_v; ++d) {
        const double value = x.v(batch, rows[n].q_head / group, first_k + j, d);
        out[static_cast<std::size_t>(d)] += weight * value;
        out_error[static_cast<std::size_t>(d)] += error[at] * std::abs(value);
      }
    }
    CHECK(worst <= 1);
    for (index_t j = width; j < width + 3 && n + 1 < rows.size(); ++j) {
      CHECK(is_canary(store[n * static_cast<std::size_t>(width + 3) + static_cast<std::size_t>(j)]));
    }
    const bool is_empty = output.lse(batch, rows[n].q_head, pos) == -kInfinity;
    CHECK(std::abs(sum - (is_empty ? 0 : 1)) <= sum_error);
    for (index_t d = 0; d < x.p.dim_v; ++d) {
      const auto at =
          static_cast<std::size_t>(((batch * x.p.q_heads + rows[n].q_head) * x.q.extent[2] + pos) * x.p.dim_v + d);
      const double difference =
          std::abs(out[static_cast<std::size_t>(d)] - double{output.out(batch, rows[n].q_head, pos, d)});
      CHECK(difference <= out_error[static_cast<std::size_t>(d)] + e.out_error[at]);
    }
  }
}

}  // namespace

TEST_CASE("weights of every row under every option", "[weights]") {
  Problem p;
  p.q_heads = 4, p.kv_heads = 2, p.dim_qk = 24, p.dim_v = 5, p.len_q = {6, 6}, p.stored_k = {150, 150};
  check_weights(Instance(p));
  p.causal = Causal::bottom_right;
  check_weights(Instance(p));
  p.len_k = {70, 3};
  check_weights(Instance(p));
  p.window = {40, -1};
  check_weights(Instance(p));
  p.sink = true;
  check_weights(Instance(p));
  p.softcap = 2, p.alibi = true;
  check_weights(Instance(p));
  p.bias = Share::full, p.bias_masks = true, p.keep = Share::heads;
  check_weights(Instance(p));
  p.scale = -0.7f;
  for (const Regime regime : kRegimes) {
    p.regime = regime;
    check_weights(Instance(p));
  }
  p.q_offset = {-3, 20}, p.layout = Layout::padded;
  check_weights(Instance(p));
}

TEST_CASE("weights of ragged batches count sequences, queries and keys from each sequence's start", "[weights]") {
  Problem p;
  p.is_ragged = true, p.layout = Layout::bshd, p.q_heads = 2, p.dim_qk = 9, p.dim_v = 4;
  p.len_q = {3, 0, 5, 1}, p.stored_k = {10, 4, 0, 70}, p.causal = Causal::bottom_right;
  check_weights(Instance(p));
  p.len_k = {10, 4, 0, 33}, p.sink = true;
  check_weights(Instance(p));
}

TEST_CASE("weights of single rows = those rows of all", "[weights]") {
  const Dense x(91, 2, 4, 2, 6, 80, 16, 16);
  const Result r = attend(x);
  std::vector<fovea::WeightRow> all, some{{1, 3, 5}, {0, 0, 0}, {1, 3, 5}, {0, 2, 4}};
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 0; i < 6; ++i) all.push_back({b, h, i});
    }
  }
  Values every(1, 1, 48, 80), few(1, 1, 4, 80);
  REQUIRE(fovea::attention_weights(x.q.view(), x.k.view(), r.lse_view(), all, {every.data.data(), {48, 80}, {80, 1}}).ok());
  REQUIRE(fovea::attention_weights(x.q.view(), x.k.view(), r.lse_view(), some, {few.data.data(), {4, 80}, {80, 1}}).ok());
  for (std::size_t n = 0; n < some.size(); ++n) {
    const index_t at = (some[n].sequence * 4 + some[n].q_head) * 6 + some[n].q_index;
    for (index_t j = 0; j < 80; ++j) CHECK(few.view()(0, 0, static_cast<index_t>(n), j) == every.view()(0, 0, at, j));
  }
  CHECK(fovea::attention_weights(x.q.view(), x.k.view(), r.lse_view(), {}, {few.data.data(), {0, 80}, {80, 1}}).ok());
}

TEST_CASE("weights of a query that is no number: NaN at the keys it sees, 0 at masked ones", "[weights]") {
  Dense x(92, 1, 2, 1, 6, 20, 8, 8);
  x.q.view()(0, 1, 3, 2) = std::numeric_limits<float>::quiet_NaN();
  const AttentionOptions options{.causal = Causal::top_left, .window = {1, -1}};
  const Result r = attend(x, options);
  Values weights(1, 1, 2, 20);
  const std::vector<fovea::WeightRow> rows{{0, 1, 3}, {0, 0, 3}};
  REQUIRE(fovea::attention_weights(x.q.view(), x.k.view(), r.lse_view(), rows, {weights.data.data(), {2, 20}, {20, 1}}, options)
              .ok());
  for (index_t j = 0; j < 20; ++j) {
    const bool is_seen = j == 2 || j == 3;
    CHECK(std::isnan(weights.view()(0, 0, 0, j)) == is_seen);
    if (!is_seen) CHECK(weights.view()(0, 0, 0, j) == 0);
    CHECK((weights.view()(0, 0, 1, j) > 0) == is_seen);
  }
}
