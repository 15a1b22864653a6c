// SPDX-License-Identifier: Apache-2.0
// mLSTM of xLSTM.
#include "fovea/mechanisms/mlstm.hpp"

#include "fovea/reference/mlstm.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {
namespace {

template <class Real>
fovea::MlstmParameters<Real> gates(const RecurrentCall<Real>& x) {
  fovea::MlstmParameters<Real> parameters;
  parameters.i = x.extra[0];
  parameters.f = x.extra[1];
  parameters.initial_n = x.initial_sum;
  parameters.final_n = x.final_sum;
  parameters.initial_m = x.initial_max;
  parameters.final_m = x.final_max;
  return parameters;
}

}   // namespace

std::vector<Group> mlstm_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "mlstm";
  mechanism.keeps_sum = true;
  mechanism.extra = {{.low = -1.f, .high = 1.f}, {.low = 2.f, .high = 4.f}};   // input and forget gate
  mechanism.call = [](const RecurrentCall<float>& x) { return fovea::mlstm(x.q, x.k, x.v, gates(x), x.out, x.options); };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::mlstm(x.q, x.k, x.v, gates(x), x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    const float i = *x.extra[0], log_forget = -std::log1p(std::exp(-*x.extra[1])), before = *x.max;
    *x.max = std::max(log_forget + before, i);
    const float forget = std::exp(log_forget + before - *x.max), write = std::exp(i - *x.max) * x.inverse_root();
    x.decay_by(forget);
    fovea_baselines::scalar_decay_step(x, write, 1.f);
    float sum = 0.f;
    for (std::ptrdiff_t d = 0; d < x.dim_k; ++d) {
      x.sum[d] = forget * x.sum[d] + write * x.k[d];
      sum += x.sum[d] * x.q[d];
    }
    const float divide = 1.f / (std::max(std::abs(sum), std::exp(-*x.max)) + 1e-6f);
    for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) x.out[j] *= divide;
  };
  return recurrent_groups(mechanism, {}, max_threads);
}

}   // namespace fovea_bench
