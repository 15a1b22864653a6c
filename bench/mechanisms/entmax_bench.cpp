// SPDX-License-Identifier: Apache-2.0
// 1.5-entmax (fovea), sparsemax and alpha-entmax beside the bare softmax kernel.
#include "fovea/mechanisms/entmax.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {
namespace {

template <class V>
VariantCall call_of(const char* impl, const V& variant) {
  return {impl, [variant](const VariantTensors& x) {
            return [x, variant] { return fovea::attention(x.q, x.k, x.v, x.out, x.options, variant); };
          }};
}

}   // namespace

std::vector<Group> entmax_groups(int) {
  return {variant_group("entmax",
                        {bare_softmax(), call_of("fovea", fovea::entmax15()), call_of("fovea_sparsemax", fovea::sparsemax()),
                         call_of("fovea_alpha_1.25", fovea::entmax(1.25f))})};
}

}   // namespace fovea_bench
