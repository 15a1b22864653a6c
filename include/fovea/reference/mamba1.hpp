// SPDX-License-Identifier: Apache-2.0
// Mamba's selective scan, S6 (Gu and Dao 2023, arXiv 2312.00752), as plain loops in double. For channel d and mode n:
//   h_t[n, d] = exp(dt_t[d] A[d, n]) h_{t-1}[n, d] + dt_t[d] B_t[n] x_t[d],   y_t[d] = sum_n C_t[n] h_t[n, d] + D[d] x_t[d].
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// x, y [batch, group, pos, channel]; b, c [batch, group, pos, dim_state].
inline void mamba1(const Tensor<const double>& x, const Tensor<const double>& b, const Tensor<const double>& c,
                   const Mamba1Parameters<double>& parameters, const Tensor<double>& y,
                   const RecurrentOptions<double>& options = {}) {
  const double scale = scale_or(options, 1);
  each_head(recurrent_shape(b, x, y), options, [&](StateMatrix& h, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      const Vector x_t = run.row(x, t), b_t = run.row(b, t), dt = run.row(parameters.dt, t);
      for (std::size_t n = 0; n < b_t.size(); ++n) {
        for (std::size_t d = 0; d < x_t.size(); ++d) {
          const double a = parameters.a(run.head, static_cast<index_t>(d), static_cast<index_t>(n));
          h.rows[n][d] = std::exp(dt[d] * a) * h.rows[n][d] + dt[d] * b_t[n] * x_t[d];
        }
      }
      run.write_out(c, y, t, [&](const Vector& c_t) {
        Vector y_t = scale * h.read(c_t);
        for (std::size_t d = 0; parameters.d && d < x_t.size(); ++d) {
          y_t[d] += parameters.d(run.head, static_cast<index_t>(d)) * x_t[d];
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
