// SPDX-License-Identifier: Apache-2.0
// Softpick beside the bare softmax kernel.
#include "fovea/mechanisms/softpick.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

std::vector<Group> softpick_groups(int) {
  return {variant_group("softpick", {bare_softmax(), {"fovea", [](const VariantTensors& x) {
                                                        return [x] {
                                                          return fovea::attention(x.q, x.k, x.v, x.out, x.options,
                                                                                  fovea::softpick());
                                                        };
                                                      }}})};
}

}   // namespace fovea_bench
