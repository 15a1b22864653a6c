// SPDX-License-Identifier: Apache-2.0
// Mixtures of attention heads: a router gives every token a weight per head, out_ih = w_ih * attention_ih, most of them 0.
//   MoA (Zhang et al. 2022, arXiv 2210.05144): all experts share K and V, so an expert is a query projection. The caller
//     projects the k chosen experts of a token into k slots, query heads of one kv head; nothing is computed for the others.
//   MoH (Jin et al. 2024, arXiv 2410.11842): heads with K and V of their own; shared heads always, routed ones for the
//     tokens that chose them.
//   SwitchHead (Csordas et al. 2023, arXiv 2312.07987): experts are value and output projections, the attention is bare: a
//     router here, the projections and the whole layer in modules/switch_head_block.hpp.
// A row of weight 0 sees no key: output 0, LSE -inf. Where no row of a row group is chosen (a decode step's kv head, 12
// neighbouring rows of a prefill), its K and V are not read.
#pragma once
#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Rows without a weight see nothing.
struct ChosenRows {
  View<const float, 3> weight;         // [batch, q_head, pos]
  std::span<const index_t> cu_len_q;   // [sequence + 1], of a ragged call

  struct Lane {
    keep_t chosen;
    FOVEA_INLINE keep_t operator()(i32) const { return chosen; }
  };
  FOVEA_INLINE Lane at(const Row& row) const { return {f32(chosen(row) ? 1.f : 0.f) != f32(0.f)}; }
  FOVEA_INLINE KeyRange hull(std::span<const Row> rows) const {
    for (const Row& row : rows) {
      if (chosen(row)) return {0, PTRDIFF_MAX};
    }
    return {0, 0};
  }
  FOVEA_INLINE Cover cover(const Tile& tile) const {
    bool some = false, all = true;
    for (const Row& row : tile.rows) {
      const bool here = chosen(row);
      some = some || here;
      all = all && here;
    }
    return all ? Cover::full : some ? Cover::partial : Cover::skip;
  }

 private:
  FOVEA_INLINE bool chosen(const Row& row) const {
    const bool ragged = !cu_len_q.empty();
    const index_t first = ragged ? cu_len_q[static_cast<std::size_t>(row.sequence)] : 0;
    return weight.data[(ragged ? 0 : row.sequence) * weight.stride[0] + row.q_head * weight.stride[1] +
                       (first + row.q_index) * weight.stride[2]] != 0.f;
  }
};

// Multiplies rows by their head's weight.
struct HeadWeight {
  View<const float, 3> weight;   // [batch, q_head, pos]

  Status check(const AttentionShape& s) const {
    door::Bytes ignored;
    if (weight.extent != std::array<index_t, 3>{s.batch, s.q_heads, s.len_q})
      return door::invalid("fovea: weight is [%td, %td, %td], must be [%td, %td, %td]", weight.extent[0], weight.extent[1],
                           weight.extent[2], s.batch, s.q_heads, s.len_q);
    return door::check_data("weight", weight, ignored);
  }

  FOVEA_INLINE void operator()(const OutRow& row, std::span<float> values, Final) const {
    const f32 factor(weight.data[row.batch * weight.stride[0] + row.q_head * weight.stride[1] + row.pos * weight.stride[2]]);
    for (index_t d = 0; d < static_cast<index_t>(values.size()); d += kLanes)
      store(values.data() + d, load(values.data() + d) * factor);
  }
};

// fovea::attention(q, k, v, out, options, fovea::head_mixture(weight, options.cu_len_q)).
inline auto head_mixture(const View<const float, 3>& weight, std::span<const index_t> cu_len_q = {}) {
  return variant().with_mask(ChosenRows{tidy(weight), cu_len_q}).with_close(HeadWeight{tidy(weight)});
}

// fovea::attention with weight [batch, q_head, pos] on every row of out, rows of weight 0 left out.
template <class Compiled = AllFormats>
Status head_mixture_attention(const Operand& q, const Kv& kv, const Result& out, const View<const float, 3>& weight,
                              const AttentionOptions& options = {}) {
  door::Bytes bytes;
  if (Status s = door::check_data("weight", tidy(weight), bytes); !s.ok()) return s;
  if (Status s = door::check_learned("weight", bytes, out, options); !s.ok()) return s;
  const auto policies = head_mixture(weight, options.cu_len_q);
  return door::run(door::call_of_variant<Compiled>(q, kv, out, options, policies));
}
template <class TK, class TV>
Status head_mixture_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                              const View<const float, 3>& weight, const AttentionOptions& options = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return head_mixture_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, weight, options);
}

// The routers, one token at a time. Of equal logits the first wins.

namespace door {
// experts[s] of slot s: the largest logits in falling order, the first of equal ones.
inline Status choose_experts(std::span<const float> logits, std::span<index_t> experts, std::span<float> weights) {
  if (experts.size() != weights.size() || experts.empty() || experts.size() > logits.size())
    return invalid("fovea: %zu experts and %zu weights to be chosen from %zu logits", experts.size(), weights.size(),
                   logits.size());
  for (std::size_t s = 0; s < experts.size(); ++s) {
    const auto end = experts.begin() + static_cast<index_t>(s);
    index_t best = -1;
    for (std::size_t e = 0; e < logits.size(); ++e) {
      const auto candidate = static_cast<index_t>(e);
      if (std::find(experts.begin(), end, candidate) != end) continue;
      if (best < 0 || logits[e] > logits[static_cast<std::size_t>(best)]) best = candidate;
    }
    experts[s] = best;
  }
  return {};
}
}   // namespace door

// MoA: experts[s] and weights[s] of slot s, the k = experts.size() largest logits in falling order; the weights are their
// softmax over all logits divided by their sum, which is the softmax over the chosen ones.
inline Status moa_route(std::span<const float> logits, std::span<index_t> experts, std::span<float> weights) {
  if (Status s = door::choose_experts(logits, experts, weights); !s.ok()) return s;
  const auto logit = [&](index_t expert) { return static_cast<double>(logits[static_cast<std::size_t>(expert)]); };
  double sum = 0;
  for (std::size_t s = 0; s < experts.size(); ++s) {
    const double above = logit(experts[s]) - logit(experts[0]);
    sum += std::exp(above);
    weights[s] = static_cast<float>(std::exp(above));
  }
  for (float& weight : weights) weight = static_cast<float>(static_cast<double>(weight) / sum);
  return {};
}

// SwitchHead, one head of a token: experts[s] and weights[s] of slot s, the k = experts.size() largest logits in falling
// order, each weight the sigmoid of its logit, not renormalised. +inf is a weight of 1, -inf one of 0. Logits are compared,
// not their sigmoids, which large ones share after rounding.
inline Status switch_head_route(std::span<const float> logits, std::span<index_t> experts, std::span<float> weights) {
  if (Status s = door::choose_experts(logits, experts, weights); !s.ok()) return s;
  for (std::size_t s = 0; s < experts.size(); ++s) {
    const double logit = static_cast<double>(logits[static_cast<std::size_t>(experts[s])]);
    weights[s] = static_cast<float>(1 / (1 + std::exp(-logit)));
  }
  return {};
}

// MoH, as its published code has it: weights[shared heads, then routed ones];
//   shared  2 a_0 * softmax(shared)_i * shared heads
//   routed  2 a_1 * softmax(the top_k chosen)_i * top_k, others 0;   a = softmax(kinds).
// The paper's equations have neither 2 nor the counts, and the softmax over all routed heads. Without shared heads the a are
// left out.
inline Status moh_route(std::span<const float> shared, std::span<const float> routed, std::span<const float> kinds,
                        index_t top_k, std::span<float> weights) {
  if (weights.size() != shared.size() + routed.size() || top_k < 1 || top_k > static_cast<index_t>(routed.size()) ||
      kinds.size() != (shared.empty() ? 0u : 2u))
    return door::invalid("fovea: %zu weights for %zu shared and %zu routed heads, %td chosen, %zu kinds", weights.size(),
                         shared.size(), routed.size(), top_k, kinds.size());
  const double shared_kind =
      shared.empty() ? 0 : 1 / (1 + std::exp(static_cast<double>(kinds[1]) - static_cast<double>(kinds[0])));
  double sum = 0, top = shared.empty() ? 0 : static_cast<double>(*std::max_element(shared.begin(), shared.end()));
  for (const float logit : shared) sum += std::exp(static_cast<double>(logit) - top);
  for (std::size_t i = 0; i < shared.size(); ++i) {
    const double share = std::exp(static_cast<double>(shared[i]) - top) / sum;
    weights[i] = static_cast<float>(2 * shared_kind * share * static_cast<double>(shared.size()));
  }
  // A head is chosen when fewer than top_k stand before it.
  const std::span<float> to = weights.subspan(shared.size());
  top = static_cast<double>(*std::max_element(routed.begin(), routed.end()));
  sum = 0;
  for (std::size_t i = 0; i < routed.size(); ++i) {
    index_t before = 0;
    for (std::size_t j = 0; j < routed.size(); ++j) before += routed[j] > routed[i] || (routed[j] == routed[i] && j < i);
    const double weight = before < top_k ? std::exp(static_cast<double>(routed[i]) - top) : 0;
    sum += weight;
    to[i] = static_cast<float>(weight);
  }
  const double kind = shared.empty() ? 1 : 2 * (1 - shared_kind);
  for (float& weight : to)
    weight = static_cast<float>(kind * static_cast<double>(weight) / sum * static_cast<double>(top_k));
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
