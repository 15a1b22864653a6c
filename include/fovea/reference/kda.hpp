// SPDX-License-Identifier: Apache-2.0
// Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692) as plain loops in double: the decay of every key channel first,
// then the delta rule on the decayed state,
//   S~ = Diag(alpha_t) S_{t-1},   S_t = S~ + k_t (beta_t (v_t - S~' k_t))',   o_t = scale * S_t' q_t.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// The model's two gates in log form. They are different activations: the second is not the first, clamped.
inline double kda_gate(double f, double a_log, double dt_bias) { return -std::exp(a_log) * softplus(f + dt_bias); }
inline double kda_bounded_gate(double f, double a_log, double dt_bias, double lower_bound) {
  return lower_bound * logistic(std::exp(a_log) * (f + dt_bias));
}

// decay.gate [batch, state_head, pos, dim_k], beta [batch, state_head, pos, 1 | dim_v]; scale is 1/sqrt(dim_k). Keys are
// normalised by the caller.
inline void kda(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                const Decay<double>& decay, const Tensor<const double>& beta, const Tensor<double>& out,
                const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, inverse_root(shape.dim_k));
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      const Vector k_t = run.row(k, t), beta_t = widened(run.row(beta, t), shape.dim_v);
      s.decay(run.alpha(decay, t, shape.dim_k));
      s.add(k_t, beta_t * (run.row(v, t) - s.read(k_t)));
      run.write_out(q, out, t, [&](const Vector& q_t) { return Vector(scale * s.read(q_t)); });
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
