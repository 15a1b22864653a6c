// SPDX-License-Identifier: Apache-2.0
// Performer (Choromanski et al. 2021, arXiv 2009.14794) as plain loops in double: FAVOR+ features, then linear attention.
// The stabilisers are those of the published code: the largest number of W x' without |x'|^2 / 2.
#pragma once
#include "feature_maps.hpp"
#include "linear.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

struct PerformerReference {
  MatrixView w = {};   // [feature, dim]
  bool relu = false;   // relu(W x') + eps in place of FAVOR+
  double eps = 1e-4;
  View<const double, 2> key_stabiliser = {};   // [sequence, k_head]  null = the largest of the sequence's keys
};

inline double favor_largest(const Vector& x, const MatrixView& w) {
  return affine(w, x / std::pow(static_cast<double>(x.size()), 0.25)).max();
}

// out [batch, out_head, pos, dim_v].
inline void performer(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                      const Tensor<double>& out, const PerformerReference& performer, const LinearOptions<double>& options,
                      const RecurrentOptions<double>& how = {}) {
  const index_t features = performer.w.extent[0], len = k.extent[2];
  std::vector<double> q_data(size_of(q.extent[0] * q.extent[1] * len * features)),
      k_data(size_of(k.extent[0] * k.extent[1] * len * features));
  const Tensor<double> q_features = bhsd(q_data.data(), q.extent[0], q.extent[1], len, features);
  const Tensor<double> k_features = bhsd(k_data.data(), k.extent[0], k.extent[1], len, features);
  const index_t sequences = how.cu_len.empty() ? k.extent[0] : static_cast<index_t>(how.cu_len.size()) - 1;
  for (index_t n = 0; n < sequences; ++n) {
    const index_t b = how.cu_len.empty() ? n : 0;
    const index_t begin = how.cu_len.empty() ? 0 : how.cu_len[size_of(n)],
                  end = how.cu_len.empty() ? len : how.cu_len[size_of(n + 1)];
    const auto map = [&](const Tensor<const double>& x, const Tensor<double>& to, index_t h, index_t t, double stabiliser) {
      const Vector row_of_x = row(x, b, h, t);
      put(to, b, h, t,
          performer.relu ? favor_relu_features(row_of_x, performer.w, performer.eps)
                         : favor_features(favor_exponents(row_of_x, performer.w), stabiliser, performer.eps));
    };
    for (index_t h = 0; h < q.extent[1]; ++h) {
      for (index_t t = begin; t < end; ++t) map(q, q_features, h, t, favor_largest(row(q, b, h, t), performer.w));
    }
    for (index_t h = 0; h < k.extent[1]; ++h) {
      double largest = -HUGE_VAL;
      for (index_t t = begin; t < end; ++t) largest = std::max(largest, favor_largest(row(k, b, h, t), performer.w));
      if (performer.key_stabiliser) largest = performer.key_stabiliser(n, h);
      for (index_t t = begin; t < end; ++t) map(k, k_features, h, t, largest);
    }
  }
  linear(q_features, k_features, v, out, options, how);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
