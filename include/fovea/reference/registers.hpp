// SPDX-License-Identifier: Apache-2.0
// Attention whose queries also see n registers, as plain loops in double.
#pragma once
#include "softmax.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// register_k, register_v [sequence | 1, kv_head, n, dim]; a sink of the options counts once.
inline void registers(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                      Tensor<const float> register_k, Tensor<const float> register_v, const AttentionOptions& options,
                      View<double, 3> lse = {}) {
  const index_t group = q.extent[1] / k.extent[1], count = register_k.extent[2];
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(q.extent[3]));
  std::vector<double> logits(static_cast<std::size_t>(count));
  softmax(q, k, v, out, options, {}, [&](const SoftmaxRow& row) {
    const index_t entry = register_k.extent[0] == 1 ? 0 : row.sequence, kv_head = row.q_head / group;
    double top = row.sink, sum = 0;
    for (index_t r = 0; r < count; ++r) {
      double& logit = logits[static_cast<std::size_t>(r)] = 0;
      for (index_t d = 0; d < q.extent[3]; ++d)
        logit += scale * double{q(row.batch, row.q_head, row.pos_q, d)} * double{register_k(entry, kv_head, r, d)};
      top = std::max(top, logit);
    }
    for (const SoftmaxTerm& term : row.terms) top = std::max(top, term.score);
    for (const double logit : logits) sum += std::exp(logit - top);
    for (const SoftmaxTerm& term : row.terms) sum += std::exp(term.score - top);
    sum += std::exp(row.sink - top);
    for (index_t d = 0; d < v.extent[3]; ++d) {
      double weighed = 0;
      for (index_t r = 0; r < count; ++r)
        weighed += std::exp(logits[static_cast<std::size_t>(r)] - top) * double{register_v(entry, kv_head, r, d)};
      for (const SoftmaxTerm& term : row.terms)
        weighed += std::exp(term.score - top) * double{v(row.batch, kv_head, row.first_k + term.key, d)};
      out(row.batch, row.q_head, row.pos_q, d) = weighed / sum;
    }
    if (lse) lse(row.batch, row.q_head, row.pos_q) = top + std::log(sum);
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
