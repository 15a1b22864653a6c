// SPDX-License-Identifier: Apache-2.0
// RWKV-7: heads of 64, states V-first as in its own code as well.
#include "fovea/mechanisms/rwkv7.hpp"

#include "fovea/reference/rwkv7.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {

std::vector<Group> rwkv7_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "rwkv7";
  mechanism.work = Work::removal;
  // Log w, kappa and a. Kappa is not normalised: |kappa|^2 is near 21, so kappa . (kappa a) is near 0.33.
  mechanism.extra = {{.low = -0.6f, .high = 0.f, .width = ExtraInput::kDimK},
                     {.low = -1.f, .high = 1.f, .width = ExtraInput::kDimK},
                     {.low = 0.f, .high = 1.f / 32, .width = ExtraInput::kDimK}};
  mechanism.call = [](const RecurrentCall<float>& x) {
    return fovea::rwkv7(x.q, x.k, x.v, {x.extra[0]}, x.extra[1], x.extra[2], x.out, x.options);
  };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::rwkv7(x.q, x.k, x.v, {x.extra[0]}, x.extra[1], x.extra[2], x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    x.decay_by_exp(x.extra[0]);
    fovea_baselines::scalar_removal_step(x, x.extra[1], x.extra[2]);
  };
  return recurrent_groups(mechanism, {.dim_k = 64, .dim_v = 64, .v_first = true}, max_threads);
}

}   // namespace fovea_bench
