// SPDX-License-Identifier: Apache-2.0
// Attention with one learned key and value in every row, as plain loops in double.
#pragma once
#include "softmax.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// key [head, dim_qk] and value [head, dim_v] with 1, kv_heads or q_heads heads; a value without data is 0.
inline void kv_bias(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                    View<const float, 2> key, View<const float, 2> value, const AttentionOptions& options,
                    View<double, 3> lse = {}) {
  const index_t q_heads = q.extent[1], group = q_heads / k.extent[1];
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(q.extent[3]));
  softmax(q, k, v, out, options, {}, [&](const SoftmaxRow& row) {
    const index_t key_head = row.q_head * key.extent[0] / q_heads;
    double logit = 0;
    for (index_t d = 0; d < q.extent[3]; ++d)
      logit += scale * double{q(row.batch, row.q_head, row.pos_q, d)} * double{key(key_head, d)};
    double top = logit, sum = 0;
    for (const SoftmaxTerm& term : row.terms) top = std::max(top, term.score);
    for (const SoftmaxTerm& term : row.terms) sum += std::exp(term.score - top);
    sum += std::exp(logit - top);
    for (index_t d = 0; d < v.extent[3]; ++d) {
      double weighed = value ? std::exp(logit - top) * double{value(row.q_head * value.extent[0] / q_heads, d)} : 0;
      for (const SoftmaxTerm& term : row.terms)
        weighed += std::exp(term.score - top) * double{v(row.batch, row.q_head / group, row.first_k + term.key, d)};
      out(row.batch, row.q_head, row.pos_q, d) = weighed / sum;
    }
    if (lse) lse(row.batch, row.q_head, row.pos_q) = top + std::log(sum);
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
