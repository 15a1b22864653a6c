// SPDX-License-Identifier: Apache-2.0
// Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) as plain loops in double:
//   S_t = alpha_t (S_{t-1} - k_t (beta_t S_{t-1}' k_t)') + k_t (beta_t v_t)',   o_t = scale * S_t' q_t.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// The model's gate in log form: -exp(A_log) softplus(a + dt_bias).
inline double gated_delta_gate(double a, double a_log, double dt_bias) { return -std::exp(a_log) * softplus(a + dt_bias); }

// decay.gate [batch, state_head, pos, 1], beta [batch, state_head, pos, 1 | dim_v]; scale is 1/sqrt(dim_k). Keys are
// normalised by the caller.
inline void gated_delta(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                        const Decay<double>& decay, const Tensor<const double>& beta, const Tensor<double>& out,
                        const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, inverse_root(shape.dim_k));
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      const Vector k_t = run.row(k, t), beta_t = widened(run.row(beta, t), shape.dim_v);
      const double alpha = run.alpha(decay, t, 1)[0];
      s.add(-k_t, beta_t * s.read(k_t));
      s.decay(Vector(alpha, size_of(shape.dim_k)));
      s.add(k_t, beta_t * run.row(v, t));
      run.write_out(q, out, t, [&](const Vector& q_t) { return Vector(scale * s.read(q_t)); });
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
