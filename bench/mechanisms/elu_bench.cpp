// SPDX-License-Identifier: Apache-2.0
// ELU + 1 beside the bare softmax kernel, plain and normalised.
#include "fovea/mechanisms/elu.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

std::vector<Group> elu_groups(int) {
  return {variant_group("elu", {bare_softmax(),
                                {"fovea",
                                 [](const VariantTensors& x) {
                                   return [x] { return fovea::attention(x.q, x.k, x.v, x.out, x.options, fovea::elu()); };
                                 }},
                                {"fovea_normalized", [](const VariantTensors& x) {
                                   return [x] {
                                     return fovea::attention(x.q, x.k, x.v, x.out, x.options, fovea::elu_normalized());
                                   };
                                 }}})};
}

}   // namespace fovea_bench
