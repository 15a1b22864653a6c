// SPDX-License-Identifier: Apache-2.0
// Sigmoid attention beside the bare softmax kernel.
#include "fovea/mechanisms/sigmoid.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

std::vector<Group> sigmoid_groups(int) {
  return {variant_group("sigmoid", {bare_softmax(), {"fovea", [](const VariantTensors& x) {
                                                       return [x] {
                                                         return fovea::attention(x.q, x.k, x.v, x.out, x.options,
                                                                                 fovea::sigmoid(fovea::sigmoid_bias(4096)));
                                                       };
                                                     }}})};
}

}   // namespace fovea_bench
