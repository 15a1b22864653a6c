// SPDX-License-Identifier: Apache-2.0
// A gate per feature costs a read of a row and a sigmoid per number of it, once per query.
#include "fovea/mechanisms/gated.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

namespace {

VariantCall gated(const char* impl, index_t gates_per_row, fovea::GateFunction function,
                  fovea::GateForm form = fovea::GateForm::multiply) {
  const VariantShape shape;
  return {impl,
          [=](const VariantTensors& x) {
            const auto gate = fovea::bhsd(x.extra.data(), 1, x.q.extent[1], x.q.extent[2], gates_per_row);
            return [=] { return fovea::gated_attention(x.q, x.k, x.v, x.out, gate, x.options, function, form); };
          },
          shape.q_heads * shape.len * gates_per_row};
}

}   // namespace

std::vector<Group> gated_groups(int) {
  const index_t dim = VariantShape{}.dim;
  return {variant_group("gated",
                        {bare_softmax(), gated("fovea", dim, fovea::GateFunction::sigmoid),
                         gated("silu", dim, fovea::GateFunction::silu), gated("headwise", 1, fovea::GateFunction::sigmoid),
                         gated("added", dim, fovea::GateFunction::silu, fovea::GateForm::add)})};
}

}   // namespace fovea_bench
