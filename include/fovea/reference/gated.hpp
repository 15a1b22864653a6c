// SPDX-License-Identifier: Apache-2.0
// Gated attention as plain loops in double: y_i = attention_i * f(g_i), or attention_i + f(g_i).
#pragma once
#include "softmax.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

inline double gate_sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double gate_silu(double x) { return x * gate_sigmoid(x); }

// gate [batch | 1, head | 1, pos, dim | 1]; rows [batch, head, pos, dim], changed in place.
template <class F>
void gate_rows(Tensor<double> rows, Tensor<const float> gate, const F& f, bool add = false) {
  const auto shared = [&](int axis, index_t n) { return gate.extent[static_cast<std::size_t>(axis)] == 1 ? 0 : n; };
  for (index_t b = 0; b < rows.extent[0]; ++b) {
    for (index_t h = 0; h < rows.extent[1]; ++h) {
      for (index_t i = 0; i < rows.extent[2]; ++i) {
        for (index_t d = 0; d < rows.extent[3]; ++d) {
          const double gated = f(double{gate(shared(0, b), shared(1, h), i, shared(3, d))});
          rows(b, h, i, d) = add ? rows(b, h, i, d) + gated : rows(b, h, i, d) * gated;
        }
      }
    }
  }
}

template <class F>
void gated(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out, Tensor<const float> gate,
           const AttentionOptions& options, const F& f, bool add = false) {
  softmax(q, k, v, out, options);
  gate_rows(out, gate, f, add);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
