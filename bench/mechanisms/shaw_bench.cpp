// SPDX-License-Identifier: Apache-2.0
// Relative keys and values with the paper's distance (16) and a long one, and each table alone.
#include "fovea/mechanisms/shaw.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {
namespace {

VariantCall shaw(const std::string& impl, index_t clip, bool keys, bool values) {
  const index_t rows = 2 * clip + 1;
  return {impl,
          [=](const VariantTensors& x) -> std::function<fovea::Status()> {
            const index_t dim = x.q.extent[3];
            fovea::ShawTables tables;
            if (keys) tables.k = {x.extra.data(), {1, rows, dim}, {0, dim, 1}};
            if (values) tables.v = {x.extra.data() + rows * dim, {1, rows, dim}, {0, dim, 1}};
            const fovea::AttentionShape shape{
                x.q.extent[0], x.q.extent[1], x.k.extent[1], x.q.extent[2], x.k.extent[2], dim, dim};
            auto workspace = std::make_shared<std::vector<std::byte>>(
                fovea::shaw_workspace_bytes(shape, tables, x.options.executor.lanes()));
            return [x, tables, workspace] {
              fovea::AttentionOptions options = x.options;
              options.workspace = *workspace;
              return fovea::shaw_attention(x.q, x.k, x.v, x.out, tables, options);
            };
          },
          2 * rows * 128};
}

}   // namespace

std::vector<Group> shaw_groups(int) {
  return {variant_group("shaw", {bare_softmax(), shaw("fovea", 16, true, true), shaw("fovea_clip128", 128, true, true),
                                 shaw("fovea_keys", 16, true, false), shaw("fovea_values", 16, false, true)})};
}

}   // namespace fovea_bench
