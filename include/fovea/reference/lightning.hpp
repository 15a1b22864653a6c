// SPDX-License-Identifier: Apache-2.0
// Lightning attention (Qin et al. 2024, arXiv 2401.04658) as plain loops in double:  S_t = e^{-s_h} S_{t-1} + k_t v_t',
// o_t = S_t' q_t, unscaled.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// MiniMax-01: 2^{-8 (h + 1) / heads} (1 - layer / (layers - 1 + 1e-5) + 1e-5); heads a power of two.
inline double minimax_slope(index_t head, index_t heads, index_t layer, index_t layers) {
  const double place = static_cast<double>(head + 1) / static_cast<double>(heads);
  return std::exp2(-8 * place) * (1 - static_cast<double>(layer) / (static_cast<double>(layers - 1) + 1e-5) + 1e-5);
}

// TransNormerLLM (Qin et al. 2023, arXiv 2307.14995) and flash-linear-attention: (8 h / heads) (1 - layer / layers).
inline double transnormer_slope(index_t head, index_t heads, index_t layer, index_t layers) {
  return 8 * static_cast<double>(head) / static_cast<double>(heads) *
         (1 - static_cast<double>(layer) / static_cast<double>(layers));
}

// slopes [state_head], s_h >= 0.
inline void lightning(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                      std::span<const double> slopes, const Tensor<double>& out,
                      const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, 1);
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    const double lambda = std::exp(-slopes[size_of(run.head)]);
    for (index_t t = run.begin; t < run.end; ++t) {
      s.decay(Vector(lambda, size_of(shape.dim_k)));
      s.add(run.row(k, t), run.row(v, t));
      run.write_out(q, out, t, [&](const Vector& q_t) { return Vector(scale * s.read(q_t)); });
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
