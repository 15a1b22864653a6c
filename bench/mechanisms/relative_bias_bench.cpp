// SPDX-License-Identifier: Apache-2.0
// T5's bias in a decoder and in an encoder, and Swin's on windows of 16 x 16 tokens.
#include "fovea/mechanisms/relative_bias.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {
namespace {

VariantCall t5(const std::string& impl, const fovea::T5Buckets& buckets) {
  return {impl,
          [buckets](const VariantTensors& x) -> std::function<fovea::Status()> {
            const index_t heads = x.q.extent[1];
            auto memory = std::make_shared<std::vector<float>>(fovea::t5_bias_floats(heads, buckets));
            fovea::DistanceBias bias;
            fovea::t5_bias({x.extra.data(), {buckets.count, heads}, {heads, 1}}, buckets, *memory, bias).or_throw();
            return [x, memory, bias] {
              return fovea::attention(x.q, x.k, x.v, x.out, x.options, fovea::relative_bias(bias));
            };
          },
          32 * 8};
}

VariantCall swin(index_t side, index_t heads) {
  const index_t entries = (2 * side - 1) * (2 * side - 1), tokens = side * side, floats = entries * heads;
  return {"fovea",
          [=](const VariantTensors& x) -> std::function<fovea::Status()> {
            auto index = std::make_shared<std::vector<std::int32_t>>(static_cast<std::size_t>(tokens * tokens));
            const fovea::View<const float, 2> table{x.extra.data(), {entries, heads}, {heads, 1}};
            fovea::GridBias bias;
            fovea::grid_bias_index(side, side, *index).or_throw();
            fovea::grid_bias(table, {index->data(), {tokens, tokens}, {tokens, 1}}, bias).or_throw();
            return [x, index, bias] {
              return fovea::attention(x.q, x.k, x.v, x.out, x.options, fovea::relative_bias(bias));
            };
          },
          floats};
}

}   // namespace

std::vector<Group> relative_bias_groups(int) {
  VariantShape grid;
  grid.len = 256;
  grid.q_heads = grid.kv_heads = 64;
  grid.causal = false;
  const VariantCall both_sides = t5("fovea_both_sides", {}), one_side = t5("fovea", {.bidirectional = false});
  return {variant_group("relative_bias", {bare_softmax(), one_side, both_sides}),
          variant_group("relative_bias", {bare_softmax(), swin(16, 64)}, grid)};
}

}   // namespace fovea_bench
