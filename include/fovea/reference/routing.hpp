// SPDX-License-Identifier: Apache-2.0
// Routing Transformer as plain loops in double; lists are best first, as published.
#pragma once
#include <vector>

#include "best_of.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

inline std::vector<double> routing_unit(std::vector<double> x) {
  double sum = 0;
  for (const double value : x) sum += value * value;
  for (double& value : x) value /= std::max(std::sqrt(sum), 1e-12);
  return x;
}

// x . mu of every token for one cluster.
inline std::vector<double> routing_scores(const std::vector<std::vector<double>>& x, const std::vector<double>& centroid) {
  std::vector<double> scores;
  for (const auto& row : x) {
    const std::vector<double> unit = routing_unit(row);
    double dot = 0;
    for (std::size_t d = 0; d < unit.size(); ++d) dot += unit[d] * centroid[d];
    scores.push_back(dot);
  }
  return scores;
}

struct RoutingCluster {
  std::vector<index_t> q, k;                             // tokens
  std::vector<std::vector<double>> memory_k, memory_v;   // learned keys and values
};
struct RoutingRule {
  bool causal, shared_qk;
  double self_score, scale;
};

// One head: q, k, v [token][number].
inline std::vector<std::vector<double>> routing(const std::vector<std::vector<double>>& q,
                                                const std::vector<std::vector<double>>& k,
                                                const std::vector<std::vector<double>>& v,
                                                const std::vector<RoutingCluster>& clusters, const RoutingRule& rule) {
  std::vector<std::vector<double>> out(q.size(), std::vector<double>(v[0].size(), 0.));
  std::vector<double> times(q.size(), 0.);
  for (const RoutingCluster& cluster : clusters) {
    for (const index_t token : cluster.q) {
      const auto i = static_cast<std::size_t>(token);
      std::vector<double> score;
      std::vector<std::vector<double>> value;
      const auto dot = [&](const std::vector<double>& key) {
        double sum = 0;
        for (std::size_t d = 0; d < key.size(); ++d) sum += q[i][d] * key[d];
        return rule.scale * sum;
      };
      for (std::size_t n = 0; n < cluster.memory_k.size(); ++n) {
        score.push_back(dot(cluster.memory_k[n]));
        value.push_back(cluster.memory_v[n]);
      }
      for (const index_t key : cluster.k) {
        const auto j = static_cast<std::size_t>(key);
        if (rule.causal && key > token) continue;
        score.push_back(!rule.shared_qk ? dot(k[j]) : key == token ? rule.self_score : dot(routing_unit(k[j])));
        value.push_back(v[j]);
      }
      times[i] += 1;
      if (score.empty()) continue;
      const double max = *std::max_element(score.begin(), score.end());
      double sum = 0;
      for (const double s : score) sum += std::exp(s - max);
      for (std::size_t n = 0; n < score.size(); ++n) {
        for (std::size_t d = 0; d < out[i].size(); ++d) out[i][d] += std::exp(score[n] - max) / sum * value[n][d];
      }
    }
  }
  for (std::size_t i = 0; i < out.size(); ++i) {
    for (double& value : out[i]) value /= std::max(times[i], 1.);
  }
  return out;
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
