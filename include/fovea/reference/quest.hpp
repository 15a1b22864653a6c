// SPDX-License-Identifier: Apache-2.0
// Quest as plain loops in double: pages by the upper bound of their dot products, then softmax over their keys.
#pragma once
#include "kept_keys.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

struct QuestRule {
  index_t page = 16, pages = 128;
  bool current_page = true;
};

inline namespace FOVEA_ARCH {

// sum_d max(q_d smallest_d, q_d largest_d) over the keys [begin, end) of one head.
inline double quest_bound(const float* q, Tensor<const float> k, index_t batch, index_t kv_head, index_t begin,
                          index_t end) {
  double bound = 0;
  for (index_t d = 0; d < k.extent[3]; ++d) {
    double smallest = double{k(batch, kv_head, begin, d)}, largest = smallest;
    for (index_t j = begin; j < end; ++j) {
      smallest = std::min(smallest, double{k(batch, kv_head, j, d)});
      largest = std::max(largest, double{k(batch, kv_head, j, d)});
    }
    bound += std::max(double{q[d]} * smallest, double{q[d]} * largest);
  }
  return bound;
}

// 1 for every key of a selected page: [sequence, q_head, q.extent[2], k.extent[2]]. One sequence per batch entry.
inline std::vector<std::uint8_t> quest_selection(Tensor<const float> q, Tensor<const float> k,
                                                 const AttentionOptions& options, const QuestRule& rule) {
  const index_t heads = q.extent[1], len_q = q.extent[2], len_k = k.extent[2], group = heads / k.extent[1];
  std::vector<std::uint8_t> keep(static_cast<std::size_t>(q.extent[0] * heads * len_q * len_k), 0);
  for (index_t b = 0; b < q.extent[0]; ++b) {
    const SoftmaxSequence s = softmax_sequence(b, q, k, options);
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < len_q; ++i) {
        const index_t pos = i + s.q_offset;
        std::vector<index_t> pages;
        for (index_t j = 0; j < s.len_k; ++j) {
          if (options.causal != Causal::none && j > pos) continue;
          if (options.window.left >= 0 && pos - j > options.window.left) continue;
          if (options.window.right >= 0 && j - pos > options.window.right) continue;
          if (pages.empty() || pages.back() != j / rule.page) pages.push_back(j / rule.page);
        }
        if (static_cast<index_t>(pages.size()) > rule.pages) {
          const index_t last = pages.back();
          std::vector<double> score;
          for (index_t page = 0; page <= last; ++page) {
            const index_t begin = page * rule.page;
            score.push_back(quest_bound(&q(b, h, i, 0), k, b, h / group, begin, std::min(begin + rule.page, s.len_k)));
          }
          std::sort(pages.begin(), pages.end(), [&](index_t a, index_t c) {
            if (rule.current_page && (a == last) != (c == last)) return a == last;
            const double x = score[static_cast<std::size_t>(a)], y = score[static_cast<std::size_t>(c)];
            return x != y ? x > y : a < c;
          });
          pages.resize(static_cast<std::size_t>(rule.pages));
        }
        for (const index_t page : pages) {
          for (index_t j = page * rule.page; j < std::min((page + 1) * rule.page, s.len_k); ++j)
            keep[static_cast<std::size_t>(((b * heads + h) * len_q + i) * len_k + j)] = 1;
        }
      }
    }
  }
  return keep;
}

// out [batch, q_head, pos, dim_v]; options without a keep of their own.
inline void quest(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                  const AttentionOptions& options, const QuestRule& rule, View<double, 3> lse = {}) {
  softmax_of_kept(q, k, v, out, options, quest_selection(q, k, options, rule), lse);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
