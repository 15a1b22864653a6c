// SPDX-License-Identifier: Apache-2.0
// Mamba-2, state space duality (Dao and Gu 2024, arXiv 2405.21060), as plain loops in double:
//   h_t = e^{dt_t A} h_{t-1} + dt_t B_t x_t',   y_t = h_t' C_t + D x_t.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// x, y [batch, head, pos, head_dim]; b, c [batch, group, pos, dim_state].
inline void mamba2(const Tensor<const double>& x, const Tensor<const double>& b, const Tensor<const double>& c,
                   const Mamba2Parameters<double>& parameters, const Tensor<double>& y,
                   const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(b, x, y);
  const double scale = scale_or(options, 1);
  each_head(shape, options, [&](StateMatrix& h, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      const Vector x_t = run.row(x, t);
      const double dt = run.number(parameters.dt, t);
      h.decay(Vector(std::exp(dt * parameters.a[size_of(run.head)]), size_of(shape.dim_k)));
      h.add(run.row(b, t), dt * x_t);
      run.write_out(c, y, t, [&](const Vector& c_t) {
        Vector y_t = scale * h.read(c_t);
        for (std::size_t p = 0; parameters.d && p < x_t.size(); ++p) {
          y_t[p] += parameters.d(run.head, parameters.d.extent[1] == 1 ? 0 : static_cast<index_t>(p)) * x_t[p];
        }
        return y_t;
      });
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
