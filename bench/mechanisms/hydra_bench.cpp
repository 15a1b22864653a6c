// SPDX-License-Identifier: Apache-2.0
// Linear in the length: flops are those of its own sums, so the times compare and the GFLOP/s do not.
#include "fovea/mechanisms/hydra.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

namespace {

VariantCall hydra(const char* impl, bool causal) {
  const VariantShape shape;
  const auto len = static_cast<double>(shape.len);
  return {impl,
          [=](const VariantTensors& x) {
            const index_t heads = x.q.extent[1], dim = x.q.extent[3];
            const auto memory = std::make_shared<std::vector<float>>(static_cast<std::size_t>(heads * dim));
            const fovea::View<float, 3> state{memory->data(), {1, heads, dim}, {heads * dim, dim, 1}};
            fovea::HydraOptions options;
            options.causal = causal;
            options.executor = x.options.executor;
            return [=, keep = memory] {
              std::fill(keep->begin(), keep->end(), 0.f);
              return fovea::hydra_attention(x.q, x.k, x.v, x.out, state, options);
            };
          },
          0,
          // Norms, products and sums: 9 len dim a head, against 2 len (len + 1) dim of causal attention.
          9 * len / (2 * len * (len + 1))};
}

}   // namespace

std::vector<Group> hydra_groups(int) {
  return {variant_group("hydra", {bare_softmax(), hydra("fovea", true), hydra("whole", false)})};
}

}   // namespace fovea_bench
