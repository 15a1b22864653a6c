// SPDX-License-Identifier: Apache-2.0
// Gated linear attention with one gate per head and token, as plain loops in double:  S_t = alpha_t S_{t-1} + k_t v_t',
// o_t = scale * S_t' q_t. The core of Mamba-2, gated RetNet and YOCO.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// decay.gate [batch, state_head, pos, 1]; scale is 1/sqrt(dim_k).
inline void simple_gla(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                       const Decay<double>& decay, const Tensor<double>& out, const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, inverse_root(shape.dim_k));
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      const double alpha = run.alpha(decay, t, 1)[0];
      s.decay(Vector(alpha, size_of(shape.dim_k)));
      s.add(run.row(k, t), run.row(v, t));
      run.write_out(q, out, t, [&](const Vector& q_t) { return Vector(scale * s.read(q_t)); });
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
