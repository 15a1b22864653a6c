// SPDX-License-Identifier: Apache-2.0
// The four registers of the paper, and the 128 meta tokens of Hymba.
#include "fovea/mechanisms/registers.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

namespace {

VariantCall with_registers(const char* impl, index_t count) {
  const VariantShape shape;
  return {impl,
          [=](const VariantTensors& x) {
            const index_t heads = x.k.extent[1], dim = x.k.extent[3], len = x.q.extent[2];
            const auto lse = std::make_shared<std::vector<float>>(static_cast<std::size_t>(x.q.extent[1] * len));
            const fovea::RegisterTokens tokens{fovea::bhsd(x.extra.data(), 1, heads, count, dim),
                                               fovea::bhsd(x.extra.data() + heads * count * dim, 1, heads, count, dim)};
            fovea::AttentionOptions options = x.options;
            options.lse = {lse->data(), {1, x.q.extent[1], len}, {x.q.extent[1] * len, len, 1}};
            return [=, keep = lse] { return fovea::register_attention(x.q, x.k, x.v, x.out, tokens, options); };
          },
          2 * shape.kv_heads * count * shape.dim};
}

}   // namespace

std::vector<Group> registers_groups(int) {
  return {variant_group("registers", {bare_softmax(), with_registers("fovea", 4), with_registers("tokens128", 128)})};
}

}   // namespace fovea_bench
