// SPDX-License-Identifier: Apache-2.0
// RWKV-4's wkv (Peng et al. 2023, arXiv 2305.13048) as plain loops in double. Per channel
//   wkv_t = (sum_{s<t} e^{(t-1-s) w + k_s} v_s + e^{u + k_t} v_t) / (the same with v = 1),
// by numerator and denominator divided by e^epsilon, where epsilon is the largest exponent so far.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// k, v, out [batch, head, pos, channel].
inline void rwkv4(const Tensor<const double>& k, const Tensor<const double>& v, const Rwkv4Parameters<double>& parameters,
                  const Tensor<double>& out, const RecurrentOptions<double>& options = {}) {
  RecurrentShape shape = recurrent_shape(k, v, out);
  shape.dim_k = 3;
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    Vector &numerator = s.rows[0], &denominator = s.rows[1], &epsilon = s.rows[2];
    if (!options.initial_state) epsilon = -1e38;
    for (index_t t = run.begin; t < run.end; ++t) {
      const Vector k_t = run.row(k, t), v_t = run.row(v, t);
      Vector wkv(v_t.size());
      for (std::size_t c = 0; c < v_t.size(); ++c) {
        const double w = parameters.w(run.head, static_cast<index_t>(c)),
                     u = parameters.u(run.head, static_cast<index_t>(c));
        const double tau = std::max(u + k_t[c], epsilon[c]);
        const double past = std::exp(epsilon[c] - tau), now = std::exp(u + k_t[c] - tau);
        wkv[c] = (past * numerator[c] + now * v_t[c]) / (past * denominator[c] + now);

        const double largest = std::max(w + epsilon[c], k_t[c]);
        const double decayed = std::exp(w + epsilon[c] - largest), written = std::exp(k_t[c] - largest);
        numerator[c] = decayed * numerator[c] + written * v_t[c];
        denominator[c] = decayed * denominator[c] + written;
        epsilon[c] = largest;
      }
      put(out, run.batch, run.head, t, wkv);
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
