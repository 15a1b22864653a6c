// SPDX-License-Identifier: Apache-2.0
// Lightning attention: one slope per head, no scale.
#include "fovea/mechanisms/lightning.hpp"

#include "fovea/reference/lightning.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {

std::vector<Group> lightning_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "lightning";
  mechanism.extra = {{.low = 0.001f, .high = 0.5f, .per_token = false}};   // slopes
  mechanism.call = [](const RecurrentCall<float>& x) {
    return fovea::lightning(x.q, x.k, x.v, x.per_head(0), x.out, x.options);
  };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::lightning(x.q, x.k, x.v, x.per_head(0), x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    x.decay_by(std::exp(-*x.extra[0]));
    fovea_baselines::scalar_decay_step(x, 1.f, 1.f);
  };
  return recurrent_groups(mechanism, {}, max_threads);
}

}   // namespace fovea_bench
