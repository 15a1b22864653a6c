// SPDX-License-Identifier: Apache-2.0
// RWKV-6 (Peng et al. 2024, arXiv 2404.05892) as plain loops in double: read before the write, with a bonus for the
// current token,
//   o_t = S_{t-1}' r_t + (r_t . (u * k_t)) v_t,   S_t = Diag(w_t) S_{t-1} + k_t v_t'.
// RWKV-5 has one w per head and channel.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// The model's decay in log form: -e^x.
inline double rwkv6_gate(double x) { return -std::exp(x); }

// w.gate [batch, head, pos, dim_k]; u [head, dim_k].
inline void rwkv6(const Tensor<const double>& r, const Tensor<const double>& k, const Tensor<const double>& v,
                  const Decay<double>& w, const View<const double, 2>& u, const Tensor<double>& out,
                  const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, 1);
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      const Vector k_t = run.row(k, t), v_t = run.row(v, t);
      Vector bonus = k_t;
      for (index_t i = 0; i < shape.dim_k; ++i) bonus[size_of(i)] *= u(run.head, i);
      run.write_out(r, out, t, [&](const Vector& r_t) { return Vector(scale * (s.read(r_t) + dot(r_t, bonus) * v_t)); });
      s.decay(run.alpha(w, t, shape.dim_k));
      s.add(k_t, v_t);
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
