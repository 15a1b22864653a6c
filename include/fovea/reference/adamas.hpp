// SPDX-License-Identifier: Apache-2.0
// Adamas as plain loops: Hadamard transform from its definition, codes by counting thresholds, the k nearest keys in
// Manhattan distance of codes, then softmax over them.
#pragma once
#include "kept_keys.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

struct AdamasRule {
  index_t budget = 1024;
  bool current = true;
  bool xor_popcount = false;
  double threshold = 10;
};

inline namespace FOVEA_ARCH {

// Codes 0 .. 3 of one row: H_ij = (-1)^popcount(i & j) / sqrt(n).
inline std::vector<int> adamas_codes(const float* row, index_t dim, double threshold) {
  std::vector<int> codes;
  for (index_t i = 0; i < dim; ++i) {
    double sum = 0;
    for (index_t j = 0; j < dim; ++j) {
      int bits = 0;
      for (index_t both = i & j; both != 0; both >>= 1) bits += static_cast<int>(both & 1);
      sum += bits % 2 == 0 ? double{row[j]} : -double{row[j]};
    }
    const double x = sum / std::sqrt(static_cast<double>(dim));
    codes.push_back((-threshold < x) + (0 < x) + (threshold < x));
  }
  return codes;
}

inline int adamas_distance(const std::vector<int>& a, const std::vector<int>& b, bool xor_popcount) {
  int sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += xor_popcount ? (a[i] ^ b[i]) : std::abs(a[i] - b[i]);
  return sum;
}

// 1 for every selected key: [sequence, q_head, q.extent[2], k.extent[2]]. One sequence per batch entry.
inline std::vector<std::uint8_t> adamas_selection(Tensor<const float> q, Tensor<const float> k,
                                                  const AttentionOptions& options, const AdamasRule& rule) {
  const index_t heads = q.extent[1], len_q = q.extent[2], len_k = k.extent[2], dim = q.extent[3],
                group = heads / k.extent[1];
  std::vector<std::uint8_t> keep(static_cast<std::size_t>(q.extent[0] * heads * len_q * len_k), 0);
  for (index_t b = 0; b < q.extent[0]; ++b) {
    const SoftmaxSequence s = softmax_sequence(b, q, k, options);
    for (index_t h = 0; h < heads; ++h) {
      std::vector<std::vector<int>> codes;
      for (index_t j = 0; j < s.len_k; ++j) codes.push_back(adamas_codes(&k(b, h / group, j, 0), dim, rule.threshold));
      for (index_t i = 0; i < len_q; ++i) {
        const index_t pos = i + s.q_offset;
        const std::vector<int> query = adamas_codes(&q(b, h, i, 0), dim, rule.threshold);
        std::vector<index_t> keys;
        std::vector<int> distance;
        for (index_t j = 0; j < s.len_k; ++j) {
          distance.push_back(adamas_distance(query, codes[static_cast<std::size_t>(j)], rule.xor_popcount));
          if (options.causal != Causal::none && j > pos) continue;
          if (options.window.left >= 0 && pos - j > options.window.left) continue;
          if (options.window.right >= 0 && j - pos > options.window.right) continue;
          keys.push_back(j);
        }
        if (static_cast<index_t>(keys.size()) > rule.budget) {
          const index_t last = keys.back();
          std::sort(keys.begin(), keys.end(), [&](index_t a, index_t c) {
            if (rule.current && (a == last) != (c == last)) return a == last;
            const int x = distance[static_cast<std::size_t>(a)], y = distance[static_cast<std::size_t>(c)];
            return x != y ? x < y : a < c;
          });
          keys.resize(static_cast<std::size_t>(rule.budget));
        }
        for (const index_t j : keys) keep[static_cast<std::size_t>(((b * heads + h) * len_q + i) * len_k + j)] = 1;
      }
    }
  }
  return keep;
}

// out [batch, q_head, pos, dim_v]; options without a keep of their own.
inline void adamas(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                   const AttentionOptions& options, const AdamasRule& rule, View<double, 3> lse = {}) {
  softmax_of_kept(q, k, v, out, options, adamas_selection(q, k, options, rule), lse);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
