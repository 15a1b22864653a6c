// SPDX-License-Identifier: Apache-2.0
// Recurrent attention token by token as plain loops in fp32, the state [dim_k, dim_v] in memory: what a first version of an
// engine does, and what every kernel must beat at any length. No intrinsics and no blocking; the compiler vectorises the
// inner loops as it likes.
#pragma once
#include <cmath>
#include <cstddef>

namespace fovea_baselines {

// One token of one head. A mechanism computes `factor` and calls one of the steps below.
struct ScalarToken {
  static constexpr std::ptrdiff_t kMostDim = 256;

  std::ptrdiff_t dim_k, dim_v;
  const float *q, *k, *v;
  float* out;
  float *state, *sum, *max;   // [dim_k, dim_v], [dim_k], [1]
  const float* extra[4];      // the token's numbers of each of the mechanism's own tensors
  float* factor;              // [kMostDim]  of the state's rows
  float* scratch;             // [kMostDim]

  void decay_by(float alpha) const {
    for (std::ptrdiff_t i = 0; i < dim_k; ++i) factor[i] = alpha;
  }
  void decay_by_exp(const float* gates) const {
    for (std::ptrdiff_t i = 0; i < dim_k; ++i) factor[i] = std::exp(gates[i]);
  }
  float inverse_root() const { return 1.f / std::sqrt(static_cast<float>(dim_k)); }
};

// S <- Diag(factor) S + write k v', out = read S' q: one sweep.
inline void scalar_decay_step(const ScalarToken& x, float write, float read) {
  float* __restrict out = x.out;
  const float* __restrict v = x.v;
  for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) out[j] = 0.f;
  for (std::ptrdiff_t i = 0; i < x.dim_k; ++i) {
    float* __restrict row = x.state + i * x.dim_v;
    const float factor = x.factor[i], key = write * x.k[i], query = read * x.q[i];
    for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) {
      row[j] = factor * row[j] + key * v[j];
      out[j] += query * row[j];
    }
  }
}

// S~ = Diag(factor) S, S = S~ + k beta (v - S~' k)', out = read S' q: two sweeps.
inline void scalar_delta_step(const ScalarToken& x, float beta, float read) {
  float* __restrict out = x.out;
  float* __restrict change = x.scratch;
  for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) change[j] = 0.f;
  for (std::ptrdiff_t i = 0; i < x.dim_k; ++i) {
    float* __restrict row = x.state + i * x.dim_v;
    const float factor = x.factor[i], key = x.k[i];
    for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) {
      row[j] *= factor;
      change[j] += key * row[j];
    }
  }
  for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) {
    change[j] = beta * (x.v[j] - change[j]);
    out[j] = 0.f;
  }
  for (std::ptrdiff_t i = 0; i < x.dim_k; ++i) {
    float* __restrict row = x.state + i * x.dim_v;
    const float key = x.k[i], query = read * x.q[i];
    for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) {
      row[j] += key * change[j];
      out[j] += query * row[j];
    }
  }
}

// RWKV-6: out = S' q + (q . (bonus k)) v, then S <- Diag(factor) S + k v'.
inline void scalar_bonus_step(const ScalarToken& x, const float* bonus) {
  float* __restrict out = x.out;
  const float* __restrict v = x.v;
  float own = 0.f;
  for (std::ptrdiff_t i = 0; i < x.dim_k; ++i) own += x.q[i] * bonus[i] * x.k[i];
  for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) out[j] = own * v[j];
  for (std::ptrdiff_t i = 0; i < x.dim_k; ++i) {
    float* __restrict row = x.state + i * x.dim_v;
    const float factor = x.factor[i], key = x.k[i], query = x.q[i];
    for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) {
      out[j] += query * row[j];
      row[j] = factor * row[j] + key * v[j];
    }
  }
}

// RWKV-7: S <- Diag(factor) S - (kappa a) (S' kappa)' + k v', out = S' q.
inline void scalar_removal_step(const ScalarToken& x, const float* kappa, const float* a) {
  float* __restrict out = x.out;
  float* __restrict removed = x.scratch;
  const float* __restrict v = x.v;
  for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) removed[j] = out[j] = 0.f;
  for (std::ptrdiff_t i = 0; i < x.dim_k; ++i) {
    const float* __restrict row = x.state + i * x.dim_v;
    for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) removed[j] += kappa[i] * row[j];
  }
  for (std::ptrdiff_t i = 0; i < x.dim_k; ++i) {
    float* __restrict row = x.state + i * x.dim_v;
    const float factor = x.factor[i], key = x.k[i], query = x.q[i], erase = kappa[i] * a[i];
    for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) {
      row[j] = factor * row[j] - erase * removed[j] + key * v[j];
      out[j] += query * row[j];
    }
  }
}

}   // namespace fovea_baselines
