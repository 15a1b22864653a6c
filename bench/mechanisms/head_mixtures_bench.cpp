// SPDX-License-Identifier: Apache-2.0
// Weights on every row; and half of the rows chosen, at random (nothing is saved in a prefill) or in runs of 128 tokens.
// SwitchHead's outputs: 2 of 5 experts per row, into a model as wide as all heads.
#include "fovea/mechanisms/head_mixtures.hpp"

#include "fovea/modules/switch_head_block.hpp"
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

struct OwnedRoutes {
  std::vector<fovea::index_t> experts;
  std::vector<float> weights;
  std::vector<std::byte> workspace;
};

VariantCall switch_head_outputs() {
  using fovea::index_t;
  constexpr index_t kExperts = 5, kSlots = 2;
  const VariantShape shape;
  const index_t heads = shape.q_heads, len = shape.len, model = heads * shape.dim;
  VariantCall call;
  call.impl = "switch_head_outputs";
  call.extra_floats = heads * kExperts * shape.dim * model;
  // Two flops per number of an expert's matrix; the causal attention has 4 dim (len + 1) / 2 per row.
  call.flops_share = 2. * static_cast<double>(kSlots * model) / (2. * static_cast<double>(len + 1));
  call.make = [=](const VariantTensors& x) {
    const auto owned = std::make_shared<OwnedRoutes>();
    for (index_t row = 0; row < heads * len; ++row) {
      const index_t first = (row * 2654435761u >> 16) % kExperts;
      for (index_t slot = 0; slot < kSlots; ++slot) owned->experts.push_back((first + slot) % kExperts);
    }
    owned->weights.assign(owned->experts.size(), 0.5f);
    owned->workspace.resize(fovea::expert_mixture_bytes(len, x.options.executor.lanes()));
    const std::array<index_t, 4> extent{1, heads, len, kSlots}, stride{heads * len * kSlots, len * kSlots, kSlots, 1};
    const fovea::ExpertRoutes routes{{owned->experts.data(), extent, stride}, {owned->weights.data(), extent, stride}};
    const auto w_o = fovea::bhsd(x.extra.data(), heads, kExperts, shape.dim, model);
    const auto y = fovea::bhsd(x.out.data, 1, 1, len, model);
    return [=] { return fovea::expert_mixture(x.q, w_o, routes, y, owned->workspace, x.options.executor); };
  };
  return call;
}

}   // namespace

std::vector<Group> head_mixtures_groups(int) {
  const auto hashed = [](index_t head, index_t i) { return ((head * 4096 + i) * 2654435761u >> 16 & 1) != 0; };
  return {variant_group(
      "head_mixtures",
      {bare_softmax(), mixture("fovea", [](index_t, index_t) { return true; }), mixture("half_at_random", hashed),
       mixture("half_in_runs", [](index_t head, index_t i) { return (i / 128 + head) % 2 == 0; }), switch_head_outputs()})};
}

}   // namespace fovea_bench
