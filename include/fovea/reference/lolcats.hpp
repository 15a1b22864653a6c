// SPDX-License-Identifier: Apache-2.0
// LoLCATs (Zhang et al. 2024, arXiv 2410.10254) as plain loops in double: softmax over the window W_i, linear attention over
// what is older, L_i, and one denominator for both:
//   o_i = (gamma sum_{W_i} e^{s_ij - c_i} v_j + lambda sum_{L_i} phi(q_i) . phi(k_j) v_j) / (the same with v = 1),
//   s_ij = scale * q_i . k_j,  c_i = max_{W_i} s_ij: part of the definition, it sets the proportion of the two sums.
#pragma once
#include "feature_maps.hpp"
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// out [batch, q_head, pos, dim_v]. States, key sums and windows are per query head: S [2 feature, dim_v].
inline void lolcats(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                    const Tensor<double>& out, const LolcatsOptions<double>& lolcats,
                    const RecurrentOptions<double>& options = {}) {
  struct Pair {
    Vector k, v;
  };
  RecurrentShape shape = recurrent_shape(k, v, out);
  shape.state_heads = out.extent[1];
  shape.dim_k = 2 * lolcats.key_map.extent[2];
  const double scale = scale_or(options, inverse_root(k.extent[3]));
  const auto map_of = [](const View<const double, 3>& maps, index_t head) {
    return MatrixView{&maps(head, 0, 0), {maps.extent[1], maps.extent[2]}, {maps.stride[1], maps.stride[2]}};
  };
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    const MatrixView query_map = map_of(lolcats.query_map, run.head), key_map = map_of(lolcats.key_map, run.head);
    const double gamma = lolcats.window_weight[size_of(run.head)], lambda = lolcats.linear_weight;
    Vector z = load(lolcats.initial_key_sum, run.sequence, run.head, shape.dim_k);
    std::vector<Pair> window;   // oldest first
    for (index_t n = 0; lolcats.initial_window_k && n < lolcats.initial_window_k.extent[2]; ++n) {
      window.push_back({reference::row(lolcats.initial_window_k, run.sequence, run.head, n),
                        reference::row(lolcats.initial_window_v, run.sequence, run.head, n)});
    }
    const auto keep_newest = [&](index_t count) {
      while (static_cast<index_t>(window.size()) > count) {
        const Vector features = lolcats_features(window[0].k, key_map);
        s.add(features, window[0].v);
        z += features;
        window.erase(window.begin());
      }
    };
    for (index_t t = run.begin; t < run.end; ++t) {
      window.push_back({run.row(k, t), run.row(v, t)});
      const bool terraced = lolcats.shape == LolcatsWindow::terraced;
      keep_newest(terraced ? lolcats.window + (t - run.begin) % lolcats.window + 1 : lolcats.window);
      run.write_out(q, out, t, [&](const Vector& q_t) {
        double largest = -HUGE_VAL;
        for (const Pair& pair : window) largest = std::max(largest, scale * dot(q_t, pair.k));
        const Vector features = lolcats_features(q_t, query_map);
        Vector sum = lambda * s.read(features);
        double weights = lambda * dot(features, z);
        for (const Pair& pair : window) {
          const double weight = gamma * std::exp(scale * dot(q_t, pair.k) - largest);
          sum += weight * pair.v;
          weights += weight;
        }
        return Vector(sum / weights);
      });
    }
    keep_newest(lolcats.window);
    save(lolcats.final_key_sum, run.sequence, run.head, z);
    for (std::size_t n = 0; lolcats.final_window_k && n < window.size(); ++n) {
      put(lolcats.final_window_k, run.sequence, run.head, static_cast<index_t>(n), window[n].k);
      put(lolcats.final_window_v, run.sequence, run.head, static_cast<index_t>(n), window[n].v);
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
