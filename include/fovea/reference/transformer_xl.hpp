// SPDX-License-Identifier: Apache-2.0
// Transformer-XL's attention (arXiv 1901.02860) as plain loops in double.
#pragma once
#include "relative_bias.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// s = scale ((q + u) . k + (q + v) . r_d), d = position - key. r [q_head | 1, ahead + distance, dim], its row ahead + d, the
// nearest one where there is none; u, v [q_head | 1, dim], either may be absent.
template <class Watch = IgnoreRow>
void transformer_xl(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                    View<const float, 3> r, index_t ahead, View<const float, 2> content_bias,
                    View<const float, 2> position_bias, const AttentionOptions& options, View<double, 3> lse = {},
                    Watch&& watch = {}) {
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(q.extent[3]));
  const auto bias = [](const View<const float, 2>& b, index_t head, index_t d) {
    return b ? double{b(b.extent[0] == 1 ? 0 : head, d)} : 0.;
  };
  const auto term = [&](const RelativePair& p) {
    const index_t row = std::clamp<index_t>(p.pos - p.key + ahead, 0, r.extent[1] - 1);
    RelativeTerm sum{0, 0, 0};
    double by_distance = 0;
    for (index_t d = 0; d < q.extent[3]; ++d) {
      const double key = k(p.batch, p.kv_head, p.k_pos, d), back = r(r.extent[0] == 1 ? 0 : p.q_head, row, d);
      const double query = q(p.batch, p.q_head, p.q_pos, d), u = bias(content_bias, p.q_head, d),
                   w = bias(position_bias, p.q_head, d);
      by_distance += scale * (query + w) * back;
      sum.score += scale * u * key;
      sum.dots += std::abs(scale) * (std::abs(u * key) + std::abs((query + w) * back));
    }
    sum.score += by_distance;
    sum.added = std::abs(by_distance);
    return sum;
  };
  relative(q, k, v, out, options, term, NoRelativeValue{}, lse, watch);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
