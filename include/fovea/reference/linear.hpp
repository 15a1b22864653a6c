// SPDX-License-Identifier: Apache-2.0
// Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) as plain loops in double:
//   S_t = S_{t-1} + phi(k_t) v_t',  z_t = z_{t-1} + phi(k_t),  o_t = S_t' phi(q_t) / (phi(q_t) . z_t + eps).
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

struct IdentityFeatures {
  const Vector& operator()(const Vector& x) const { return x; }
};

// out [batch, head, pos, dim_v]; phi(row) gives the features, as many as the states have rows. Maps that look at positions
// or at other rows are applied by the caller. scale is 1 if normalised, else 1/sqrt(features).
template <class Phi = IdentityFeatures>
void linear(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
            const Tensor<double>& out, const LinearOptions<double>& linear, const RecurrentOptions<double>& options = {},
            Phi&& phi = {}) {
  RecurrentShape shape = recurrent_shape(k, v, out);
  shape.dim_k = static_cast<index_t>(Vector(phi(Vector(size_of(k.extent[3])))).size());
  const double scale = scale_or(options, linear.normalize ? 1 : inverse_root(shape.dim_k));
  each_head(shape, options, [&](StateMatrix& s, const HeadRun& run) {
    Vector z = load(linear.initial_key_sum, run.sequence, run.head, shape.dim_k);
    const auto write = [&](index_t t) {
      const Vector k_t = phi(run.row(k, t));
      s.add(k_t, run.row(v, t));
      z += k_t;
    };
    const auto read = [&](index_t t) {
      run.write_out(q, out, t, [&](const Vector& x) {
        const Vector q_t = phi(x);
        if (!linear.normalize) return Vector(scale * s.read(q_t));
        const double sum = scale * dot(q_t, z);
        return Vector(scale * s.read(q_t) / (linear.clamp_denominator ? std::max(sum, linear.eps) : sum + linear.eps));
      });
    };
    for (index_t t = run.begin; t < run.end; ++t) {
      write(t);
      if (linear.causal) read(t);
    }
    for (index_t t = run.begin; !linear.causal && t < run.end; ++t) read(t);
    save(linear.final_key_sum, run.sequence, run.head, z);
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
