// SPDX-License-Identifier: Apache-2.0
// Attention with a weight per token and head, as plain loops in double; weight 0 gives 0 without a look at the row. The routers
// of MoA, MoH and SwitchHead, and SwitchHead's layer.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "softmax.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// weight [batch, q_head, pos].
template <class T>
void head_mixtures(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                   View<T, 3> weight, const AttentionOptions& options) {
  softmax(q, k, v, out, options);
  for (index_t b = 0; b < out.extent[0]; ++b) {
    for (index_t h = 0; h < out.extent[1]; ++h) {
      for (index_t i = 0; i < out.extent[2]; ++i) {
        const double w = weight(b, h, i);
        for (index_t d = 0; d < out.extent[3]; ++d) out(b, h, i, d) = w == 0 ? 0 : w * out(b, h, i, d);
      }
    }
  }
}

struct ChosenExpert {
  std::size_t expert;
  double weight;
};

// The k largest logits in falling order, the first of equal ones, without weights yet.
inline std::vector<ChosenExpert> largest_logits(const std::vector<double>& logits, std::size_t k) {
  std::vector<ChosenExpert> order;
  for (std::size_t e = 0; e < logits.size(); ++e) order.push_back({e, 0});
  std::stable_sort(order.begin(), order.end(),
                   [&](const ChosenExpert& a, const ChosenExpert& b) { return logits[a.expert] > logits[b.expert]; });
  order.resize(k);
  return order;
}

inline std::vector<double> logits_to_shares(const std::vector<double>& logits) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  std::vector<double> shares;
  for (const double logit : logits) top = std::max(top, logit);
  for (const double logit : logits) sum += std::exp(logit - top);
  for (const double logit : logits) shares.push_back(std::exp(logit - top) / sum);
  return shares;
}

// MoA: G_i = softmax(x W_g)_i / sum of the chosen ones.
inline std::vector<ChosenExpert> moa_route(const std::vector<double>& logits, std::size_t k) {
  const std::vector<double> shares = logits_to_shares(logits);
  std::vector<ChosenExpert> chosen = largest_logits(logits, k);
  double sum = 0;
  for (const ChosenExpert& c : chosen) sum += shares[c.expert];
  for (ChosenExpert& c : chosen) c.weight = shares[c.expert] / sum;
  return chosen;
}

// MoH, the published code: the weights of the shared heads, then of the routed ones; kinds are the logits of both kinds,
// none where no head is shared.
inline std::vector<double> moh_route(const std::vector<double>& shared, const std::vector<double>& routed,
                                     const std::vector<double>& kinds, std::size_t k) {
  const std::vector<double> a = shared.empty() ? std::vector<double>{0, 0.5} : logits_to_shares(kinds);
  std::vector<double> weights = logits_to_shares(shared), all = logits_to_shares(routed), of_routed(routed.size());
  for (double& w : weights) w *= 2 * a[0] * static_cast<double>(shared.size());
  double sum = 0;
  for (const ChosenExpert& c : largest_logits(routed, k)) sum += of_routed[c.expert] = all[c.expert];
  for (const double w : of_routed) weights.push_back(2 * a[1] * w / sum * static_cast<double>(k));
  return weights;
}

// SwitchHead: sigmoid of the logit, not renormalised.
inline std::vector<ChosenExpert> switch_head_route(const std::vector<double>& logits, std::size_t k) {
  std::vector<ChosenExpert> chosen = largest_logits(logits, k);
  for (ChosenExpert& c : chosen) c.weight = 1 / (1 + std::exp(-logits[c.expert]));
  return chosen;
}

// W_Q, W_K, W_S, W_D [1, 1, output, model]; W_V [head, expert, model, dim_v], W_O [head, expert, dim_v, model].
struct SwitchHeadMatrices {
  index_t heads, experts, active;
  Tensor<const float> q, k, v_router, o_router, v, o;
};

// y [batch, 1, pos, model] of the tokens x [batch, 1, pos, model]; causal: keys up to the query.
inline void switch_head(Tensor<const float> x, const SwitchHeadMatrices& w, Tensor<double> y, bool causal) {
  using Rows = std::vector<std::vector<double>>;
  const index_t len = x.extent[2], model = x.extent[3], dim_v = w.v.extent[3], dim_qk = w.q.extent[2] / w.heads;
  for (index_t b = 0; b < x.extent[0]; ++b) {
    // x_i W' of the rows [first, first + count) of W.
    const auto project = [&](Tensor<const float> matrix, index_t first, index_t count) {
      Rows rows(static_cast<std::size_t>(len), std::vector<double>(static_cast<std::size_t>(count)));
      for (index_t i = 0; i < len; ++i) {
        for (index_t n = 0; n < count; ++n) {
          for (index_t d = 0; d < model; ++d)
            rows[static_cast<std::size_t>(i)][static_cast<std::size_t>(n)] +=
                double{x(b, 0, i, d)} * double{matrix(0, 0, first + n, d)};
        }
      }
      return rows;
    };
    for (index_t i = 0; i < len; ++i) {
      for (index_t n = 0; n < model; ++n) y(b, 0, i, n) = 0;
    }
    for (index_t h = 0; h < w.heads; ++h) {
      const Rows q = project(w.q, h * dim_qk, dim_qk), k = project(w.k, h * dim_qk, dim_qk);
      const Rows source = project(w.v_router, h * w.experts, w.experts);
      const Rows destination = project(w.o_router, h * w.experts, w.experts);
      // v[s] = sum_e s_e x_s W_V[h, e].
      Rows v(static_cast<std::size_t>(len), std::vector<double>(static_cast<std::size_t>(dim_v)));
      for (std::size_t s = 0; s < v.size(); ++s) {
        for (const ChosenExpert& c : switch_head_route(source[s], static_cast<std::size_t>(w.active))) {
          for (index_t n = 0; n < dim_v; ++n) {
            for (index_t d = 0; d < model; ++d)
              v[s][static_cast<std::size_t>(n)] += c.weight * double{x(b, 0, static_cast<index_t>(s), d)} *
                                                   double{w.v(h, static_cast<index_t>(c.expert), d, n)};
          }
        }
      }
      for (std::size_t t = 0; t < q.size(); ++t) {
        std::vector<double> scores;
        for (std::size_t s = 0; s < k.size() && (!causal || s <= t); ++s) {
          double dot = 0;
          for (std::size_t d = 0; d < q[t].size(); ++d) dot += q[t][d] * k[s][d];
          scores.push_back(dot / std::sqrt(static_cast<double>(dim_qk)));
        }
        const std::vector<double> shares = logits_to_shares(scores);
        std::vector<double> row(static_cast<std::size_t>(dim_v));   // (A v)[t, h]
        for (std::size_t s = 0; s < shares.size(); ++s) {
          for (std::size_t n = 0; n < row.size(); ++n) row[n] += shares[s] * v[s][n];
        }
        for (const ChosenExpert& c : switch_head_route(destination[t], static_cast<std::size_t>(w.active))) {
          for (index_t n = 0; n < model; ++n) {
            for (index_t d = 0; d < dim_v; ++d)
              y(b, 0, static_cast<index_t>(t), n) +=
                  c.weight * row[static_cast<std::size_t>(d)] * double{w.o(h, static_cast<index_t>(c.expert), d, n)};
          }
        }
      }
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
