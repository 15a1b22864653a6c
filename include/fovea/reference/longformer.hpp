// SPDX-License-Identifier: Apache-2.0
// Longformer's self-attention as plain loops in double.
#pragma once
#include "listed_keys.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// kind [batch, pos]: < 0 padding, 0 local, > 0 global. A local row sees all global keys and the local ones up to `window`
// away, with q, k, v; a global row all keys that are no padding, with q_global, k_global, v_global; rows of padding are 0.
inline void longformer(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<const float> q_global,
                       Tensor<const float> k_global, Tensor<const float> v_global, View<const std::int8_t, 2> kind,
                       index_t window, Tensor<double> out, const AttentionOptions& options = {}, View<double, 3> lse = {}) {
  const index_t len = q.extent[2];
  listed_keys(q, k, v, out, options, lse, [&](index_t b, index_t, index_t t, const auto& see) {
    if (kind(b, t) != 0) return;
    for (index_t s = 0; s < len; ++s) {
      if (kind(b, s) > 0 || (kind(b, s) == 0 && std::abs(t - s) <= window)) see(s);
    }
  });
  bool any = false;
  for (index_t b = 0; b < q.extent[0]; ++b) {
    for (index_t t = 0; t < len; ++t) any = any || kind(b, t) > 0;
  }
  if (!any) return;
  const index_t rows = q.extent[0] * q.extent[1] * len, dim = v.extent[3];
  std::vector<double> values(static_cast<std::size_t>(rows * dim)), sums(static_cast<std::size_t>(rows));
  const Tensor<double> global = bhsd(values.data(), q.extent[0], q.extent[1], len, dim);
  const View<double, 3> global_lse{sums.data(), {q.extent[0], q.extent[1], len}, {q.extent[1] * len, len, 1}};
  listed_keys(q_global, k_global, v_global, global, options, global_lse, [&](index_t b, index_t, index_t, const auto& see) {
    for (index_t s = 0; s < len; ++s) {
      if (kind(b, s) >= 0) see(s);
    }
  });
  for (index_t b = 0; b < q.extent[0]; ++b) {
    for (index_t h = 0; h < q.extent[1]; ++h) {
      for (index_t t = 0; t < len; ++t) {
        if (kind(b, t) <= 0) continue;
        for (index_t d = 0; d < dim; ++d) out(b, h, t, d) = global(b, h, t, d);
        if (lse) lse(b, h, t) = global_lse(b, h, t);
      }
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
