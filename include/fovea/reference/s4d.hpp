// SPDX-License-Identifier: Apache-2.0
// S4D (Gu et al. 2022, arXiv 2206.11893) as plain loops in double. Per channel, over complex modes n with
// A_n = -exp(log_a_real) + i a_imag:
//   s_n <- e^{dt A_n} s_n + u_t,   y_t = 2 Re sum_n C_n (e^{dt A_n} - 1) / A_n s_n + D u_t.
#pragma once
#include <complex>

#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// u, y [batch, 1, pos, channel]. Of the options, cu_len.
inline void s4d(const Tensor<const double>& u, const S4dParameters<double>& parameters, const Tensor<double>& y,
                const RecurrentOptions<double>& options = {}) {
  using Complex = std::complex<double>;
  each_head({u.extent[0], u.extent[2], 1, 1, 0, 0}, {.cu_len = options.cu_len}, [&](StateMatrix&, const HeadRun& run) {
    for (index_t channel = 0; channel < u.extent[3]; ++channel) {
      const auto at = size_of(channel);
      const double dt = std::exp(parameters.log_dt[at]);
      std::vector<double> sums(size_of(run.end - run.begin));
      for (index_t n = 0; n < parameters.c_real.extent[1]; ++n) {
        const Complex a(-std::exp(parameters.log_a_real(channel, n)), parameters.a_imag(channel, n));
        const Complex c =
            Complex(parameters.c_real(channel, n), parameters.c_imag(channel, n)) * (std::exp(dt * a) - 1.) / a;
        Complex s = 0;
        if (parameters.initial_state) {
          s = {parameters.initial_state(run.sequence, channel, n, 0), parameters.initial_state(run.sequence, channel, n, 1)};
        }
        for (index_t t = run.begin; t < run.end; ++t) {
          s = std::exp(dt * a) * s + u(run.batch, 0, t, channel);
          sums[size_of(t - run.begin)] += 2 * (c * s).real();
        }
        if (parameters.final_state) {
          parameters.final_state(run.sequence, channel, n, 0) = s.real();
          parameters.final_state(run.sequence, channel, n, 1) = s.imag();
        }
      }
      for (index_t t = run.begin; t < run.end; ++t) {
        y(run.batch, 0, t, channel) = sums[size_of(t - run.begin)] + parameters.d[at] * u(run.batch, 0, t, channel);
      }
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
