// SPDX-License-Identifier: Apache-2.0
// Shaw's relative positions (arXiv 1803.02155) as plain loops in double.
#pragma once
#include "relative_bias.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// a_k, a_v [q_head | 1, 2 K + 1, dim], either may be absent: row c of the distance c - K.
template <class Watch = IgnoreRow>
void shaw(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out, View<const float, 3> a_k,
          View<const float, 3> a_v, const AttentionOptions& options, View<double, 3> lse = {}, Watch&& watch = {}) {
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(q.extent[3]));
  const index_t clip = ((a_k ? a_k : a_v).extent[1] - 1) / 2;
  const auto number = [&](const View<const float, 3>& table, const RelativePair& pair, index_t d) {
    const index_t c = std::clamp<index_t>(pair.key - pair.pos, -clip, clip) + clip;
    return double{table(table.extent[0] == 1 ? 0 : pair.q_head, c, d)};
  };
  const auto term = [&](const RelativePair& pair) {
    RelativeTerm sum{0, 0, 0};
    for (index_t d = 0; a_k && d < q.extent[3]; ++d) {
      const double product = scale * double{q(pair.batch, pair.q_head, pair.q_pos, d)} * number(a_k, pair, d);
      sum.score += product;
      sum.dots += std::abs(product);
    }
    sum.added = std::abs(sum.score);
    return sum;
  };
  const auto value = [&](const RelativePair& pair, index_t d) { return a_v ? number(a_v, pair, d) : 0.; };
  relative(q, k, v, out, options, term, value, lse, watch);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
