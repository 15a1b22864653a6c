// SPDX-License-Identifier: Apache-2.0
// Gated linear attention (Yang et al. 2023, arXiv 2312.06635) as plain loops in double:
//   S_t = Diag(alpha_t) S_{t-1} + k_t v_t',   o_t = scale * S_t' q_t.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// The paper's gate in log form: logsigmoid(x) / 16.
inline double gla_gate(double x) { return log_sigmoid(x) / 16; }

// HGRN2 (Qin et al. 2024, arXiv 2404.07904) is this with alpha = bound + (1 - bound) sigmoid(f) and k = 1 - alpha.
inline double hgrn2_alpha(double f, double bound) { return bound + (1 - bound) * logistic(f); }

// decay.gate [batch, state_head, pos, dim_k]; scale is 1/sqrt(dim_k).
inline void gla(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                const Decay<double>& decay, const Tensor<double>& out, const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, inverse_root(shape.dim_k));
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      s.decay(run.alpha(decay, t, shape.dim_k));
      s.add(run.row(k, t), run.row(v, t));
      run.write_out(q, out, t, [&](const Vector& q_t) { return Vector(scale * s.read(q_t)); });
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
