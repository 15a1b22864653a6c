// SPDX-License-Identifier: Apache-2.0
// ReLU attention beside the bare softmax kernel, divided by a given number of keys and by the number seen.
#include "fovea/mechanisms/relu.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

std::vector<Group> relu_groups(int) {
  return {variant_group("relu", {bare_softmax(),
                                 {"fovea",
                                  [](const VariantTensors& x) {
                                    return [x] {
                                      return fovea::attention(x.q, x.k, x.v, x.out, x.options, fovea::relu(4096.f));
                                    };
                                  }},
                                 {"fovea_mean", [](const VariantTensors& x) {
                                    return [x] { return fovea::attention(x.q, x.k, x.v, x.out, x.options, fovea::relu()); };
                                  }}})};
}

}   // namespace fovea_bench
