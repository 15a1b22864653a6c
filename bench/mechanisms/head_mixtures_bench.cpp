// SPDX-License-Identifier: Apache-2.0
// Weights on every row; and half of the rows chosen, at random (nothing is saved in a prefill) or in runs of 128 tokens.
#include "fovea/mechanisms/head_mixtures.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

namespace {

template <class Chosen>
VariantCall mixture(const char* impl, const Chosen& chosen) {
  return {impl, [=](const VariantTensors& x) {
            const index_t heads = x.q.extent[1], len = x.q.extent[2];
            const auto weights = std::make_shared<std::vector<float>>(static_cast<std::size_t>(heads * len));
            for (index_t n = 0; n < heads * len; ++n)
              (*weights)[static_cast<std::size_t>(n)] = chosen(n / len, n % len) ? 0.5f : 0.f;
            const fovea::View<const float, 3> view{weights->data(), {1, heads, len}, {heads * len, len, 1}};
            return [=, keep = weights] { return fovea::head_mixture_attention(x.q, x.k, x.v, x.out, view, x.options); };
          }};
}

}   // namespace

std::vector<Group> head_mixtures_groups(int) {
  const auto hashed = [](index_t head, index_t i) { return ((head * 4096 + i) * 2654435761u >> 16 & 1) != 0; };
  return {variant_group(
      "head_mixtures",
      {bare_softmax(), mixture("fovea", [](index_t, index_t) { return true; }), mixture("half_at_random", hashed),
       mixture("half_in_runs", [](index_t head, index_t i) { return (i / 128 + head) % 2 == 0; })})};
}

}   // namespace fovea_bench
