// SPDX-License-Identifier: Apache-2.0
// Linear attention with the sum of keys as a denominator, features elu + 1.
#include "fovea/mechanisms/linear.hpp"

#include "fovea/engine/parts/feature_maps.hpp"
#include "fovea/reference/feature_maps.hpp"
#include "fovea/reference/linear.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {
namespace {

template <class Real>
fovea::LinearOptions<Real> sums(const RecurrentCall<Real>& x) {
  fovea::LinearOptions<Real> options;
  options.initial_key_sum = x.initial_sum;
  options.final_key_sum = x.final_sum;
  return options;
}

void elu_features(const float* x, std::ptrdiff_t dim, float* features) {
  for (std::ptrdiff_t d = 0; d < dim; ++d) features[d] = x[d] > 0.f ? x[d] + 1.f : std::exp(x[d]);
}

}   // namespace

std::vector<Group> linear_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "linear";
  mechanism.keeps_sum = true;
  mechanism.call = [](const RecurrentCall<float>& x) {
    const fovea::EluMap elu{x.k.extent[3]};
    return fovea::linear_attention(x.q, x.k, x.v, x.out, sums(x), x.options, elu, elu);
  };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::linear(x.q, x.k, x.v, x.out, sums(x), x.options, fovea::reference::elu_features);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    float query[ScalarToken::kMostDim];
    elu_features(x.q, x.dim_k, query);
    elu_features(x.k, x.dim_k, x.scratch);
    ScalarToken mapped = x;
    mapped.q = query;
    mapped.k = x.scratch;
    x.decay_by(1.f);
    fovea_baselines::scalar_decay_step(mapped, 1.f, 1.f);
    float sum = 0.f;
    for (std::ptrdiff_t d = 0; d < x.dim_k; ++d) {
      x.sum[d] += mapped.k[d];
      sum += x.sum[d] * query[d];
    }
    const float divide = 1.f / (sum + 1e-6f);
    for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) x.out[j] *= divide;
  };
  return recurrent_groups(mechanism, {}, max_threads);
}

}   // namespace fovea_bench
