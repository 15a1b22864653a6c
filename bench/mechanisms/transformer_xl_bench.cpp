// SPDX-License-Identifier: Apache-2.0
// Transformer-XL with a row of r per distance; the products with r are 1 to 1.1 times those with k.
#include "fovea/mechanisms/transformer_xl.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {
namespace {

VariantCall xl(const std::string& impl, index_t distances, index_t heads, index_t dim) {
  return {
      impl,
      [=](const VariantTensors& x) -> std::function<fovea::Status()> {
        const float* const extra = x.extra.data();
        const fovea::View<const float, 2> u{extra, {heads, dim}, {dim, 1}}, v{extra + heads * dim, {heads, dim}, {dim, 1}};
        const fovea::XlTables tables{{extra + 2 * heads * dim, {heads, distances, dim}, {distances * dim, dim, 1}}, 0, u, v};
        const fovea::AttentionShape shape{1, heads, x.k.extent[1], x.q.extent[2], x.k.extent[2], dim, dim};
        auto workspace =
            std::make_shared<std::vector<std::byte>>(fovea::transformer_xl_workspace_bytes(shape, tables, x.options));
        return [x, tables, workspace] {
          fovea::AttentionOptions options = x.options;
          options.workspace = *workspace;
          return fovea::transformer_xl_attention(x.q, x.k, x.v, x.out, tables, options);
        };
      },
      heads*(distances + 2) * dim};
}

}   // namespace

std::vector<Group> transformer_xl_groups(int) {
  const VariantShape shape;
  return {variant_group("transformer_xl", {bare_softmax(), xl("fovea", shape.len, shape.q_heads, shape.dim),
                                           xl("fovea_clamp400", 401, shape.q_heads, shape.dim)})};
}

}   // namespace fovea_bench
