// SPDX-License-Identifier: Apache-2.0
// Attention as three plain loops per query, no SIMD and no blocking: what the first version of an engine does, and the floor
// every figure can be read against.
//
// Carries scale, causal, window, q_offset and len_k; other options are ignored. Any strides.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "deal_heads.hpp"
#include "visible_keys.hpp"

namespace fovea_baselines {
namespace scalar_detail {

inline void one_query(const fovea::Tensor<const float>& q, const fovea::Tensor<const float>& k,
                      const fovea::Tensor<const float>& v, const fovea::Tensor<float>& out, index_t batch, index_t q_head,
                      index_t query, float scale, KeyRange keys, std::vector<float>& weights) {
  const index_t kv_head = q_head / (q.extent[1] / k.extent[1]);
  const index_t dim_qk = q.extent[3], dim_v = v.extent[3];
  float largest = -std::numeric_limits<float>::infinity();
  for (index_t key = keys.begin; key < keys.end; ++key) {
    float score = 0.f;
    for (index_t d = 0; d < dim_qk; ++d) score += q(batch, q_head, query, d) * k(batch, kv_head, key, d);
    score *= scale;
    weights[static_cast<std::size_t>(key)] = score;
    largest = std::max(largest, score);
  }
  float sum = 0.f;
  for (index_t key = keys.begin; key < keys.end; ++key) {
    float& weight = weights[static_cast<std::size_t>(key)];
    weight = std::exp(weight - largest);
    sum += weight;
  }
  const float norm = sum > 0.f ? 1.f / sum : 0.f;
  for (index_t d = 0; d < dim_v; ++d) out(batch, q_head, query, d) = 0.f;
  for (index_t key = keys.begin; key < keys.end; ++key) {
    const float weight = weights[static_cast<std::size_t>(key)] * norm;
    for (index_t d = 0; d < dim_v; ++d) out(batch, q_head, query, d) += weight * v(batch, kv_head, key, d);
  }
}

}  // namespace scalar_detail

// Runs on the lanes of options.executor, heads dealt one by one.
inline void scalar_attention(fovea::Tensor<const float> q, fovea::Tensor<const float> k, fovea::Tensor<const float> v,
                             fovea::Tensor<float> out, const fovea::AttentionOptions& options = {}) {
  const float scale = options.scale.value_or(1.f / std::sqrt(static_cast<float>(q.extent[3])));
  deal_heads(options.executor, q, [&](index_t batch, index_t q_head, std::vector<float>& weights) {
    if (weights.size() < static_cast<std::size_t>(k.extent[2])) weights.resize(static_cast<std::size_t>(k.extent[2]));
    const VisibleKeys visible(options, batch, q.extent[2], k.extent[2]);
    for (index_t query = 0; query < q.extent[2]; ++query)
      scalar_detail::one_query(q, k, v, out, batch, q_head, query, scale, visible.of(query), weights);
  });
}

}  // namespace fovea_baselines
