// SPDX-License-Identifier: Apache-2.0
// Multi-token attention with the published kernels, 6 x 11 before and after softmax, and with all heads mixed besides.
#include "fovea/mechanisms/multi_token.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {
namespace {

constexpr index_t kQueries = 6, kKeys = 11;

VariantCall multi_token(const std::string& name, const VariantShape& shape, bool mixed) {
  const index_t heads = shape.q_heads, taps = heads * kQueries * kKeys;
  VariantCall call;
  call.impl = name;
  call.extra_floats = 2 * taps + 2 * heads * heads;
  call.make = [heads, taps, mixed](const VariantTensors& x) {
    fovea::MultiTokenOptions options;
    const float* const from = x.extra.data();
    const std::array<index_t, 3> extent{heads, kQueries, kKeys}, stride{kQueries * kKeys, kKeys, 1};
    options.pre = {from, extent, stride};
    options.post = {from + taps, extent, stride};
    if (mixed) {
      options.pre_mix = {from + 2 * taps, {heads, heads}, {heads, 1}};
      options.post_mix = {from + 2 * taps + heads * heads, {1, heads, heads}, {heads * heads, heads, 1}};
    }
    options.executor = x.options.executor;
    return [x, options] { return fovea::multi_token_attention(x.q, x.k, x.v, x.out, options); };
  };
  return call;
}

}   // namespace

std::vector<Group> multi_token_groups(int max_threads) {
  std::vector<Group> groups;
  for (int threads = 1; threads <= std::min(2, max_threads); ++threads) {
    VariantShape shape;
    shape.threads = threads;
    groups.push_back(
        variant_group("multi_token",
                      {bare_softmax(), multi_token("fovea", shape, false), multi_token("heads_mixed", shape, true)}, shape));
    groups.back().slow = true;
  }
  return groups;
}

}   // namespace fovea_bench
