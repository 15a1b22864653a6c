// SPDX-License-Identifier: Apache-2.0
// Softmax-off-by-one beside the bare softmax kernel.
#include "fovea/mechanisms/off_by_one.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

std::vector<Group> off_by_one_groups(int) {
  return {variant_group("off_by_one", {bare_softmax(), {"fovea", [](const VariantTensors& x) {
                                                          return [x] {
                                                            return fovea::attention(x.q, x.k, x.v, x.out, x.options,
                                                                                    fovea::off_by_one());
                                                          };
                                                        }}})};
}

}   // namespace fovea_bench
