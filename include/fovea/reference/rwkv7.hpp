// SPDX-License-Identifier: Apache-2.0
// RWKV-7 (Peng et al. 2025, arXiv 2503.14456) as plain loops in double, in this library's S of dim_k x dim_v:
//   S_t = Diag(w_t) S_{t-1} - (kappa_t * a_t) (S_{t-1}' kappa_t)' + k_t v_t',   o_t = S_t' r_t.
// The removal reads the state before its decay.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// The model's decay in log form: -e^{-1/2} sigmoid(x).
inline double rwkv7_gate(double x) { return -std::exp(-0.5) * logistic(x); }

// What the model adds to v's multiple after the group norm: sum_i r_i k_i rho_i.
inline double rwkv7_bonus(const Vector& r, const Vector& k, const Vector& rho) { return dot(r * k, rho); }

// w.gate, kappa, a, k [batch, head, pos, dim_k]; kappa is normalised by the caller, a is the rate in [0, 1].
inline void rwkv7(const Tensor<const double>& r, const Tensor<const double>& k, const Tensor<const double>& v,
                  const Decay<double>& w, const Tensor<const double>& kappa, const Tensor<const double>& a,
                  const Tensor<double>& out, const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, 1);
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      const Vector kappa_t = run.row(kappa, t), removed = s.read(kappa_t);
      s.decay(run.alpha(w, t, shape.dim_k));
      s.add(-(kappa_t * run.row(a, t)), removed);
      s.add(run.row(k, t), run.row(v, t));
      run.write_out(r, out, t, [&](const Vector& r_t) { return Vector(scale * s.read(r_t)); });
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
