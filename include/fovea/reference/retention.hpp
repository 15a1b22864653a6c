// SPDX-License-Identifier: Apache-2.0
// Retention (Sun et al. 2023, arXiv 2307.08621) as plain loops in double:  S_t = gamma_h S_{t-1} + k_t v_t',
// o_t = scale * S_t' q_t.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// gamma_h = 1 - 2^{-5 - h}
inline double retention_gamma(index_t head) { return 1 - std::ldexp(1., -5 - static_cast<int>(head)); }

// The rotation of q and k in the authors' code: pairs (even, odd), angle pos * 10000^{-m / (pairs - 1)} of pair m. No xPos.
inline Vector retention_rotated(const Vector& x, index_t pos) {
  Vector out = x;
  const std::size_t pairs = x.size() / 2;
  for (std::size_t m = 0; m < pairs; ++m) {
    const double place = pairs == 1 ? 0 : static_cast<double>(m) / static_cast<double>(pairs - 1);
    const double angle = static_cast<double>(pos) * std::pow(10000., -place);
    out[2 * m] = x[2 * m] * std::cos(angle) - x[2 * m + 1] * std::sin(angle);
    out[2 * m + 1] = x[2 * m + 1] * std::cos(angle) + x[2 * m] * std::sin(angle);
  }
  return out;
}

// gamma [state_head]; scale is 1/sqrt(dim_k), which the paper puts on k: the state holds unscaled keys.
inline void retention(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                      std::span<const double> gamma, const Tensor<double>& out,
                      const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, inverse_root(shape.dim_k));
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      s.decay(Vector(gamma[size_of(run.head)], size_of(shape.dim_k)));
      s.add(run.row(k, t), run.row(v, t));
      run.write_out(q, out, t, [&](const Vector& q_t) { return Vector(scale * s.read(q_t)); });
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
