// SPDX-License-Identifier: Apache-2.0
// DeltaNet (Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484) as plain loops in double:
//   S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}' k_t))',   o_t = scale * S_t' q_t.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// beta [batch, state_head, pos, 1 | dim_v]; scale is 1/sqrt(dim_k). Keys are normalised by the caller.
inline void delta(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                  const Tensor<const double>& beta, const Tensor<double>& out,
                  const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, inverse_root(shape.dim_k));
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      const Vector k_t = run.row(k, t), beta_t = widened(run.row(beta, t), shape.dim_v);
      s.add(k_t, beta_t * (run.row(v, t) - s.read(k_t)));
      run.write_out(q, out, t, [&](const Vector& q_t) { return Vector(scale * s.read(q_t)); });
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
