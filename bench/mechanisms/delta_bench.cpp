// SPDX-License-Identifier: Apache-2.0
// DeltaNet.
#include "fovea/mechanisms/delta.hpp"

#include "fovea/reference/delta.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {

std::vector<Group> delta_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "delta";
  mechanism.work = Work::delta;
  // Keys are not normalised: |k|^2 is near 43, so beta |k|^2 is in [0, 0.67).
  mechanism.extra = {{.low = 0.f, .high = 1.f / 64}};
  mechanism.call = [](const RecurrentCall<float>& x) {
    return fovea::delta_net(x.q, x.k, x.v, x.extra[0], x.out, x.options);
  };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::delta(x.q, x.k, x.v, x.extra[0], x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    x.decay_by(1.f);
    fovea_baselines::scalar_delta_step(x, *x.extra[0], x.inverse_root());
  };
  return recurrent_groups(mechanism, {}, max_threads);
}

}   // namespace fovea_bench
