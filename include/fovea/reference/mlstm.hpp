// SPDX-License-Identifier: Apache-2.0
// xLSTM's matrix memory, mLSTM (Beck et al. 2024, arXiv 2405.04517), as plain loops in double:
//   m_t = max(log f_t + m_{t-1}, i~_t),  f' = e^{log f_t + m_{t-1} - m_t},  i' = e^{i~_t - m_t},  log f = logsigmoid(f~),
//   C_t = f' C_{t-1} + i' k_t v_t',  n_t = f' n_{t-1} + i' k_t,  h_t = C_t' q_t / (max(|n_t . q_t|, e^{-m_t}) + eps).
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// scale is of k, 1/sqrt(dim_k), and so is in C and n.
inline void mlstm(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                  const MlstmParameters<double>& gates, const Tensor<double>& out,
                  const RecurrentOptions<double>& options = {}) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, inverse_root(shape.dim_k));
  each_head(shape, options, [&](StateMatrix& c, const HeadRun& run) {
    Vector n = load(gates.initial_n, run.sequence, run.head, shape.dim_k);
    double m = gates.initial_m ? gates.initial_m(run.sequence, run.head) : 0;
    for (index_t t = run.begin; t < run.end; ++t) {
      const double log_f = log_sigmoid(run.number(gates.f, t)), i = run.number(gates.i, t);
      const double m_before = m;
      m = std::max(log_f + m_before, i);
      const double forget = std::exp(log_f + m_before - m), input = std::exp(i - m);
      const Vector k_t = scale * run.row(k, t);
      c.decay(Vector(forget, size_of(shape.dim_k)));
      c.add(input * k_t, run.row(v, t));
      n = forget * n + input * k_t;
      run.write_out(q, out, t, [&](const Vector& q_t) {
        return Vector(c.read(q_t) / (std::max(std::abs(dot(n, q_t)), std::exp(-m)) + gates.eps));
      });
    }
    save(gates.final_n, run.sequence, run.head, n);
    if (gates.final_m) gates.final_m(run.sequence, run.head) = m;
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
