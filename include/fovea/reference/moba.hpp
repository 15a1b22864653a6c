// SPDX-License-Identifier: Apache-2.0
// MoBA as plain loops in double: history blocks by the dot product with the mean of their keys, the own block always, then
// softmax over their keys up to the query's own position.
#pragma once
#include "kept_keys.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

struct MobaRule {
  index_t block = 2048, k = 3;   // k counts the own block
};

inline namespace FOVEA_ARCH {

// 1 for every key of a selected block: [sequence, q_head, q.extent[2], k.extent[2]]. One sequence per batch entry.
inline std::vector<std::uint8_t> moba_selection(Tensor<const float> q, Tensor<const float> k,
                                                const AttentionOptions& options, const MobaRule& rule) {
  const index_t heads = q.extent[1], len_q = q.extent[2], len_k = k.extent[2], group = heads / k.extent[1];
  std::vector<std::uint8_t> keep(static_cast<std::size_t>(q.extent[0] * heads * len_q * len_k), 0);
  for (index_t b = 0; b < q.extent[0]; ++b) {
    const SoftmaxSequence s = softmax_sequence(b, q, k, options);
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < len_q; ++i) {
        const index_t pos = i + s.q_offset;
        if (pos < 0) continue;
        const index_t own = pos / rule.block;
        std::vector<double> gate;
        std::vector<index_t> blocks;
        for (index_t j = 0; j < own && j * rule.block < s.len_k; ++j) {
          const index_t begin = j * rule.block, end = std::min(begin + rule.block, s.len_k);
          double dot = 0;
          for (index_t d = 0; d < q.extent[3]; ++d) {
            double sum = 0;
            for (index_t key = begin; key < end; ++key) sum += double{k(b, h / group, key, d)};
            dot += double{q(b, h, i, d)} * sum / static_cast<double>(end - begin);
          }
          gate.push_back(dot);
          blocks.push_back(j);
        }
        std::sort(blocks.begin(), blocks.end(), [&](index_t a, index_t c) {
          const double x = gate[static_cast<std::size_t>(a)], y = gate[static_cast<std::size_t>(c)];
          return x != y ? x > y : a < c;
        });
        if (static_cast<index_t>(blocks.size()) > rule.k - 1) blocks.resize(static_cast<std::size_t>(rule.k - 1));
        blocks.push_back(own);
        for (const index_t j : blocks) {
          for (index_t key = j * rule.block; key < std::min((j + 1) * rule.block, s.len_k); ++key)
            keep[static_cast<std::size_t>(((b * heads + h) * len_q + i) * len_k + key)] = 1;
        }
      }
    }
  }
  return keep;
}

// out [batch, q_head, pos, dim_v]; options are causal and without a keep of their own.
inline void moba(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                 const AttentionOptions& options, const MobaRule& rule, View<double, 3> lse = {}) {
  softmax_of_kept(q, k, v, out, options, moba_selection(q, k, options, rule), lse);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
