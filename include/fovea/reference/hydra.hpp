// SPDX-License-Identifier: Apache-2.0
// Hydra attention as plain loops in double, every sum made anew for every query.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/view.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// max(|x|, eps) of every row of one head.
inline std::vector<double> hydra_norms(Tensor<const float> x, index_t b, index_t h, double eps) {
  std::vector<double> norms;
  for (index_t i = 0; i < x.extent[2]; ++i) {
    double squares = 0;
    for (index_t d = 0; d < x.extent[3]; ++d) squares += double{x(b, h, i, d)} * double{x(b, h, i, d)};
    norms.push_back(std::max(std::sqrt(squares), eps));
  }
  return norms;
}

// Causal: keys j <= i; else the first len_k keys.
inline void hydra(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out, bool causal,
                  index_t len_k, double eps) {
  for (index_t b = 0; b < q.extent[0]; ++b) {
    for (index_t h = 0; h < q.extent[1]; ++h) {
      const std::vector<double> q_norms = hydra_norms(q, b, h, eps), k_norms = hydra_norms(k, b, h, eps);
      for (index_t i = 0; i < q.extent[2]; ++i) {
        for (index_t d = 0; d < q.extent[3]; ++d) {
          double sum = 0;
          for (index_t j = 0; j < (causal ? i + 1 : len_k); ++j)
            sum += double{k(b, h, j, d)} / k_norms[static_cast<std::size_t>(j)] * double{v(b, h, j, d)};
          out(b, h, i, d) = double{q(b, h, i, d)} / q_norms[static_cast<std::size_t>(i)] * sum;
        }
      }
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
