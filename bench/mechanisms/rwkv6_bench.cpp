// SPDX-License-Identifier: Apache-2.0
// RWKV-6: heads of 64.
#include "fovea/mechanisms/rwkv6.hpp"

#include "fovea/reference/rwkv6.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {
namespace {

template <class Real>
fovea::View<const Real, 2> bonus(const RecurrentCall<Real>& x) {
  const auto& u = x.extra[1];
  return {u.data, {u.extent[1], u.extent[3]}, {u.extent[3], 1}};
}

}   // namespace

std::vector<Group> rwkv6_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "rwkv6";
  mechanism.extra = {{.low = -0.6f, .high = 0.f, .width = ExtraInput::kDimK},                       // log w
                     {.low = -1.f, .high = 1.f, .width = ExtraInput::kDimK, .per_token = false}};   // u
  mechanism.call = [](const RecurrentCall<float>& x) {
    return fovea::rwkv6(x.q, x.k, x.v, {x.extra[0]}, bonus(x), x.out, x.options);
  };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::rwkv6(x.q, x.k, x.v, {x.extra[0]}, bonus(x), x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    x.decay_by_exp(x.extra[0]);
    fovea_baselines::scalar_bonus_step(x, x.extra[1]);
  };
  return recurrent_groups(mechanism, {.dim_k = 64, .dim_v = 64}, max_threads);
}

}   // namespace fovea_bench
