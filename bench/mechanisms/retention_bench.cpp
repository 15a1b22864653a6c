// SPDX-License-Identifier: Apache-2.0
// RetNet: one decay per head.
#include "fovea/mechanisms/retention.hpp"

#include "fovea/reference/retention.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {

std::vector<Group> retention_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "retention";
  mechanism.extra = {{.low = 0.97f, .high = 1.f, .per_token = false}};   // gamma
  mechanism.call = [](const RecurrentCall<float>& x) {
    return fovea::retention(x.q, x.k, x.v, x.per_head(0), x.out, x.options);
  };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::retention(x.q, x.k, x.v, x.per_head(0), x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    x.decay_by(*x.extra[0]);
    fovea_baselines::scalar_decay_step(x, 1.f, x.inverse_root());
  };
  return recurrent_groups(mechanism, {}, max_threads);
}

}   // namespace fovea_bench
