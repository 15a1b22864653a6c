// SPDX-License-Identifier: Apache-2.0
// Native sparse attention as plain loops in double: compression, importance of blocks, selection, three softmaxes, gates.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "../core/view.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

// l, s, l', n, forced blocks, w.
struct NsaRule {
  index_t block = 32, stride = 16, selected_block = 64, selected = 16, init = 1, local = 2, window = 512;
};

inline namespace FOVEA_ARCH {

// Entry c is there for position t if its last token c s + l - 1 is.
inline index_t nsa_visible(index_t t, const NsaRule& rule) {
  index_t entries = 0;
  while (entries * rule.stride + rule.block - 1 <= t) ++entries;
  return entries;
}

// Every token of an entry adds p / s to the block it stands in: the entry's share of the block, in strides.
inline std::vector<double> nsa_importance(const std::vector<double>& p, index_t blocks, const NsaRule& rule) {
  std::vector<double> sums(static_cast<std::size_t>(blocks));
  for (index_t c = 0; c < static_cast<index_t>(p.size()); ++c) {
    for (index_t token = c * rule.stride; token < c * rule.stride + rule.block; ++token) {
      const index_t block = token / rule.selected_block;
      if (block < blocks)
        sums[static_cast<std::size_t>(block)] += p[static_cast<std::size_t>(c)] / static_cast<double>(rule.stride);
    }
  }
  return sums;
}

// Blocks of position t: forced ones, then the best others, the lower index first among equals; ascending.
inline std::vector<index_t> nsa_select(const std::vector<double>& scores, index_t t, const NsaRule& rule) {
  const index_t own = t < 0 ? -1 : t / rule.selected_block;
  std::set<index_t> taken;
  for (index_t j = 0; j <= own; ++j) {
    if (j < rule.init || j > own - rule.local) taken.insert(j);
  }
  while (static_cast<index_t>(taken.size()) < std::min(rule.selected, own + 1)) {
    index_t best = -1;
    for (index_t j = 0; j <= own; ++j) {
      if (!taken.contains(j) && (best < 0 || scores[static_cast<std::size_t>(j)] > scores[static_cast<std::size_t>(best)]))
        best = j;
    }
    taken.insert(best);
  }
  return {taken.begin(), taken.end()};
}

// phi(kv_head, block [l * dim], to [dim out]) for every complete entry of x [batch, kv_head, pos, dim].
template <class Phi>
void nsa_compress(Tensor<const float> x, const NsaRule& rule, Tensor<double> to, const Phi& phi) {
  const index_t dim = x.extent[3];
  std::vector<double> block(static_cast<std::size_t>(rule.block * dim)), pooled(static_cast<std::size_t>(to.extent[3]));
  for (index_t b = 0; b < x.extent[0]; ++b) {
    for (index_t h = 0; h < x.extent[1]; ++h) {
      for (index_t c = 0; c < to.extent[2]; ++c) {
        for (index_t j = 0; j < rule.block; ++j) {
          for (index_t d = 0; d < dim; ++d)
            block[static_cast<std::size_t>(j * dim + d)] = double{x(b, h, c * rule.stride + j, d)};
        }
        phi(h, block.data(), pooled.data());
        for (index_t d = 0; d < to.extent[3]; ++d) to(b, h, c, d) = pooled[static_cast<std::size_t>(d)];
      }
    }
  }
}

// Weights of one query over the keys for which keep(j); weights of the others are 0.
template <class Keep>
std::vector<double> nsa_weights(Tensor<const float> q, Tensor<const float> k, index_t b, index_t head, index_t kv_head,
                                index_t i, index_t len_k, double scale, const Keep& keep) {
  std::vector<double> p(static_cast<std::size_t>(len_k));
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  for (index_t j = 0; j < len_k; ++j) {
    if (!keep(j)) continue;
    double dot = 0;
    for (index_t d = 0; d < q.extent[3]; ++d) dot += double{q(b, head, i, d)} * double{k(b, kv_head, j, d)};
    p[static_cast<std::size_t>(j)] = scale * dot;
    max = std::max(max, scale * dot);
  }
  for (index_t j = 0; j < len_k; ++j) {
    double& x = p[static_cast<std::size_t>(j)];
    x = keep(j) ? std::exp(x - max) : 0;
    sum += x;
  }
  for (double& x : p) x = sum == 0 ? 0 : x / sum;
  return p;
}

// out[:, :, i] of the three branches [branch][batch, q_head, pos, dim_v], query i at position offset + i. `lists` holds the
// blocks of each (batch, kv_head, query), in this order; where it comes empty it is filled with nsa_select's.
inline void nsa_branches(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                         Tensor<const float> compressed_k, Tensor<const float> compressed_v, index_t offset,
                         const NsaRule& rule, std::vector<std::vector<index_t>>& lists, const Tensor<double> (&out)[3],
                         std::vector<std::vector<double>>* importance = nullptr) {
  const index_t group = q.extent[1] / k.extent[1], len_q = q.extent[2];
  const double scale = 1 / std::sqrt(static_cast<double>(q.extent[3]));
  const bool choose = lists.empty();
  for (index_t b = 0; b < q.extent[0]; ++b) {
    for (index_t kv_head = 0; kv_head < k.extent[1]; ++kv_head) {
      for (index_t i = 0; i < len_q; ++i) {
        const index_t t = offset + i, entries = nsa_visible(t, rule), keys = std::max<index_t>(t + 1, 0);
        std::vector<double> blocks(static_cast<std::size_t>(keys / rule.selected_block + 1));
        const auto add = [&](index_t branch, index_t head, const std::vector<double>& p, Tensor<const float> values) {
          for (index_t d = 0; d < values.extent[3]; ++d) {
            double sum = 0;
            for (std::size_t j = 0; j < p.size(); ++j) {
              if (p[j] != 0) sum += p[j] * double{values(b, kv_head, static_cast<index_t>(j), d)};
            }
            out[branch](b, head, i, d) = sum;
          }
        };
        for (index_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          const auto p = nsa_weights(q, compressed_k, b, head, kv_head, i, entries, scale, [](index_t) { return true; });
          add(0, head, p, compressed_v);
          const auto share = nsa_importance(p, static_cast<index_t>(blocks.size()), rule);
          for (std::size_t j = 0; j < blocks.size(); ++j) blocks[j] += share[j];
        }
        if (choose) lists.push_back(nsa_select(blocks, t, rule));
        if (importance != nullptr) importance->push_back(blocks);
        const auto& list = lists[static_cast<std::size_t>((b * k.extent[1] + kv_head) * len_q + i)];
        for (index_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          add(1, head,
              nsa_weights(
                  q, k, b, head, kv_head, i, keys, scale,
                  [&](index_t j) { return std::find(list.begin(), list.end(), j / rule.selected_block) != list.end(); }),
              v);
          add(2, head, nsa_weights(q, k, b, head, kv_head, i, keys, scale, [&](index_t j) { return j > t - rule.window; }),
              v);
        }
      }
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
