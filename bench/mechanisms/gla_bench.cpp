// SPDX-License-Identifier: Apache-2.0
// GLA: one gate per token and key channel.
#include "fovea/mechanisms/gla.hpp"

#include "fovea/reference/gla.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {

std::vector<Group> gla_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "gla";
  mechanism.extra = {{.low = -0.1f, .high = 0.f, .width = ExtraInput::kDimK}};   // log decay
  mechanism.call = [](const RecurrentCall<float>& x) { return fovea::gla(x.q, x.k, x.v, {x.extra[0]}, x.out, x.options); };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::gla(x.q, x.k, x.v, {x.extra[0]}, x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    x.decay_by_exp(x.extra[0]);
    fovea_baselines::scalar_decay_step(x, 1.f, x.inverse_root());
  };
  return recurrent_groups(mechanism, {.forms = true}, max_threads);
}

}   // namespace fovea_bench
