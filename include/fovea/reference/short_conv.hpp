// SPDX-License-Identifier: Apache-2.0
// The causal depthwise convolution in front of most recurrent layers, as plain loops in double:
//   y_t[c] = act(bias[c] + sum_j weight[c, j] x_{t - width + 1 + j}[c]).  Missing history is the state, or zero.
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// x, y [batch, 1, pos, channel]. Of the options, cu_len. The state holds inputs, before the activation.
inline void short_conv(const Tensor<const double>& x, const ShortConvParameters<double>& parameters, const Tensor<double>& y,
                       const RecurrentOptions<double>& options = {}) {
  const index_t width = parameters.weight.extent[1];
  each_head({x.extent[0], x.extent[2], 1, 1, 0, 0}, {.cu_len = options.cu_len}, [&](StateMatrix&, const HeadRun& run) {
    for (index_t c = 0; c < x.extent[3]; ++c) {
      const index_t before = parameters.initial_state ? parameters.initial_state.extent[2] : 0;
      std::vector<double> history;
      for (index_t n = 0; n < before; ++n) history.push_back(parameters.initial_state(run.sequence, c, n));
      for (index_t t = run.begin; t < run.end; ++t) history.push_back(x(run.batch, 0, t, c));
      const auto input = [&](index_t n) { return n < 0 ? 0 : history[size_of(n)]; };
      for (index_t t = run.begin; t < run.end; ++t) {
        double sum = parameters.bias.empty() ? 0 : parameters.bias[size_of(c)];
        for (index_t j = 0; j < width; ++j) sum += parameters.weight(c, j) * input(before + t - run.begin - width + 1 + j);
        y(run.batch, 0, t, c) = parameters.silu ? silu(sum) : sum;
      }
      const index_t kept = parameters.final_state ? parameters.final_state.extent[2] : 0;
      for (index_t n = 0; n < kept; ++n) {
        parameters.final_state(run.sequence, c, n) = input(static_cast<index_t>(history.size()) - kept + n);
      }
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
