// SPDX-License-Identifier: Apache-2.0
// What the tests of mechanisms with relative positions share: the error budget around such a reference, and their grid of
// calls.
#pragma once
#include "fovea/reference/relative_bias.hpp"
#include "support/dense.hpp"
#include "support/problem.hpp"

namespace test {

// reference(out, lse, watch) runs a reference of relative_bias.hpp; value(pair, d) is what a pair adds to its value. Budgets
// as expect() in tolerance.hpp derives them, where a row's relative values are one more sum of `distances` products.
template <class Reference, class Value = fovea::reference::NoRelativeValue>
Expected expect_relative(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                         const AttentionOptions& options, const Reference& reference, const Value& value = {},
                         index_t distances = 0) {
  const index_t batch = q.extent[0], heads = q.extent[1], len = q.extent[2], dim_v = v.extent[3],
                group = heads / k.extent[1];
  const auto rows = static_cast<std::size_t>(batch * heads * len), values = rows * static_cast<std::size_t>(dim_v);
  Expected e{heads,
             len,
             dim_v,
             std::vector<double>(values),
             std::vector<double>(values),
             std::vector<double>(rows),
             std::vector<double>(rows)};
  const auto watch = [&](const fovea::reference::SoftmaxRow& row) {
    std::vector<double> magnitude(static_cast<std::size_t>(dim_v)), spread(magnitude);
    const auto sequence = fovea::reference::softmax_sequence(row.sequence, q, k, options);
    double mean_error = 0;
    for (const auto& term : row.terms) {
      const double relative = std::expm1(score_error(term, q.extent[3], options, row.max) + kExpUnits * kUnit);
      mean_error += term.weight * relative;
      const fovea::reference::RelativePair pair{row.sequence,
                                                row.q_head,
                                                row.batch,
                                                row.pos_q,
                                                row.q_head / group,
                                                row.first_k + term.key,
                                                row.q_index + sequence.q_offset,
                                                term.key};
      for (index_t d = 0; d < dim_v; ++d) {
        const double part =
            term.weight * (std::abs(double{v(row.batch, pair.kv_head, pair.k_pos, d)}) + std::abs(value(pair, d)));
        magnitude[static_cast<std::size_t>(d)] += part;
        spread[static_cast<std::size_t>(d)] += part * relative;
      }
    }
    if (std::isfinite(row.sink)) {
      const double relative = std::expm1(kUnit * (4 * (std::abs(row.sink) + std::abs(row.max)) + kExpUnits));
      mean_error += std::exp(row.sink - row.lse) * relative;
    }
    const auto terms = static_cast<index_t>(row.terms.size());
    const double common = mean_error + sum_error(terms, terms == 0 ? 0 : row.terms.back().key - row.terms.front().key + 1) +
                          kUnit * static_cast<double>(distances);
    const auto at = static_cast<std::size_t>((row.batch * heads + row.q_head) * len + row.pos_q);
    for (std::size_t d = 0; d < static_cast<std::size_t>(dim_v); ++d)
      e.out_error[at * static_cast<std::size_t>(dim_v) + d] = spread[d] + common * magnitude[d] + 1e-30;
    e.lse_error[at] =
        std::isfinite(row.lse) ? common + kUnit * (kLogUnits * 16 + 4 * (std::abs(row.max) + std::abs(row.lse))) : 0;
  };
  reference(fovea::bhsd(e.out.data(), batch, heads, len, dim_v),
            View<double, 3>{e.lse.data(), {batch, heads, len}, {heads * len, len, 1}}, watch);
  return e;
}

// Lengths around the edges of vectors and key tiles, causal and windowed, grouped heads, ragged, offsets, every regime, one
// lane and three.
inline std::vector<Problem> relative_grid(bool causal_only = false) {
  std::vector<Problem> all;
  Random random(77);
  const std::vector<index_t> lengths{1, 15, 16, 17, 255, 256, 257};
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    for (const index_t len : lengths) {
      Problem p;
      p.seed = random.bits();
      p.regime = regime;
      p.layout = random.pick({Layout::bhsd, Layout::bshd, Layout::padded});
      p.kv_heads = random.between(1, 2);
      p.q_heads = p.kv_heads * random.between(1, 3);
      p.dim_qk = random.pick<index_t>({1, 8, 20, 33});
      p.dim_v = random.pick<index_t>({1, 16, 19, 72});
      p.is_ragged = random.one_in(3);
      p.len_q = {random.pick<index_t>({1, 3, 14, 30}), 9};
      p.stored_k = {len, random.pick<index_t>({16, 40})};
      if (!p.is_ragged) p.len_q[1] = p.len_q[0], p.stored_k[1] = p.stored_k[0];
      p.causal = causal_only ? random.pick({Causal::top_left, Causal::bottom_right})
                             : random.pick({Causal::none, Causal::top_left, Causal::bottom_right});
      if (random.one_in(3))
        p.window = {random.pick<index_t>({0, 5, 20}), causal_only ? -1 : random.pick<index_t>({-1, 0, 7})};
      if (random.one_in(3)) p.q_offset = {random.between(-4, 40), random.between(0, 40)};
      if (random.one_in(3)) p.len_k = {random.between(0, p.stored_k[0]), random.between(0, p.stored_k[1])};
      p.lanes = random.one_in(2) ? 3 : 1;
      p.pool = random.pick({Pool::serial, Pool::threads, Pool::reversed});
      all.push_back(p);
    }
  }
  return all;
}

// What `call(q, k, v, out, options)` wrote for a problem, in guarded memory, against `expected`; "" or what is wrong.
template <class Call>
std::string check_call(const Instance& x, const Expected& expected, const Call& call) {
  Pools pools;
  Output output(x, true);
  AttentionOptions options = x.options();
  options.lse = output.lse;
  options.executor = pools.get(x.p.pool, x.p.lanes);
  const fovea::Status status = call(x.q, x.k, x.v, output.out, options);
  if (!status.ok()) return status.message();
  if (first_overwritten(output.out_store, {output.out}) >= 0) return "wrote beside out";
  const Worst worst = compare(expected, output.out, output.lse);
  if (worst.budgets > 1) return worst.where + " (" + std::to_string(worst.budgets) + " budgets off)";
  return "";
}

// A table of random numbers with NaN around it.
struct Table {
  Poisoned store;
  index_t a, b, c;
  Table(std::uint64_t seed, index_t a_, index_t b_, index_t c_, float spread = 1)
      : store(a_ * b_ * c_), a(a_), b(b_), c(c_) {
    Random random(seed);
    for (index_t n = 0; n < store.size(); ++n) store.data()[n] = spread * random.normal();
  }
  View<const float, 3> view() const { return {store.data(), {a, b, c}, {b * c, c, 1}}; }
  View<const float, 2> flat() const { return {store.data(), {a * b, c}, {c, 1}}; }
};

}   // namespace test
