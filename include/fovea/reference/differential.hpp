// SPDX-License-Identifier: Apache-2.0
// Differential attention as plain loops in double. V1: RMSNorm(A1 V - lambda A2 V) (1 - lambda_init); V2: A1 V - sigmoid(l)
// A2 V.
#pragma once
#include "softmax.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// The heads first, first + 2, ... of a view.
template <class T>
Tensor<T> differential_half(Tensor<T> x, index_t first) {
  return {x.data + first * x.stride[1],
          {x.extent[0], x.extent[1] / 2, x.extent[2], x.extent[3]},
          {x.stride[0], 2 * x.stride[1], x.stride[2], x.stride[3]}};
}

// A V of one half, for k with as many heads as v.
inline std::vector<double> differential_part(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                                             const AttentionOptions& options) {
  std::vector<double> out(static_cast<std::size_t>(q.extent[0] * q.extent[1] * q.extent[2] * v.extent[3]));
  softmax(q, k, v, bhsd(out.data(), q.extent[0], q.extent[1], q.extent[2], v.extent[3]), options);
  return out;
}

inline void differential(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                         const AttentionOptions& options, double lambda, double lambda_init, std::span<const float> weight,
                         double eps) {
  const auto a1 = differential_part(differential_half(q, 0), differential_half(k, 0), v, options);
  const auto a2 = differential_part(differential_half(q, 1), differential_half(k, 1), v, options);
  std::size_t at = 0;
  for (index_t b = 0; b < out.extent[0]; ++b) {
    for (index_t h = 0; h < out.extent[1]; ++h) {
      for (index_t i = 0; i < out.extent[2]; ++i, at += static_cast<std::size_t>(out.extent[3])) {
        double squares = 0;
        for (index_t d = 0; d < out.extent[3]; ++d) {
          const auto n = at + static_cast<std::size_t>(d);
          out(b, h, i, d) = a1[n] - lambda * a2[n];
          squares += out(b, h, i, d) * out(b, h, i, d);
        }
        const double mean = squares / static_cast<double>(out.extent[3]) + eps;
        const double scale = mean == 0 ? 0 : (1 - lambda_init) / std::sqrt(mean);   // a row that sees no key, with eps 0
        for (index_t d = 0; d < out.extent[3]; ++d)
          out(b, h, i, d) *= scale * (weight.empty() ? 1 : double{weight[static_cast<std::size_t>(d)]});
      }
    }
  }
}

// lambda [batch, head, pos], before the sigmoid.
inline void differential_v2(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                            const AttentionOptions& options, View<const float, 3> lambda) {
  const auto a1 = differential_part(differential_half(q, 0), k, v, options);
  const auto a2 = differential_part(differential_half(q, 1), k, v, options);
  std::size_t n = 0;
  for (index_t b = 0; b < out.extent[0]; ++b) {
    for (index_t h = 0; h < out.extent[1]; ++h) {
      for (index_t i = 0; i < out.extent[2]; ++i) {
        for (index_t d = 0; d < out.extent[3]; ++d, ++n)
          out(b, h, i, d) = a1[n] - a2[n] / (1 + std::exp(-double{lambda(b, h, i)}));
      }
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
