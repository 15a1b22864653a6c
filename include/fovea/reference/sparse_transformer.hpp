// SPDX-License-Identifier: Apache-2.0
// The three patterns of the Sparse Transformer as plain loops in double.
#pragma once
#include "listed_keys.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// keys t - bandwidth + 1 .. t
inline void sparse_transformer_local(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                                     index_t bandwidth, const AttentionOptions& options, View<double, 3> lse = {}) {
  listed_keys(q, k, v, out, options, lse, [&](index_t, index_t, index_t t, const auto& see) {
    for (index_t s = t - bandwidth + 1; s <= t; ++s) see(s);
  });
}

// keys t, t - stride, t - 2 stride ...
inline void sparse_transformer_strided(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                                       Tensor<double> out, index_t stride, const AttentionOptions& options,
                                       View<double, 3> lse = {}) {
  listed_keys(q, k, v, out, options, lse, [&](index_t, index_t, index_t t, const auto& see) {
    for (index_t s = 0; s <= t; ++s) {
      if ((t - s) % stride == 0) see(s);
    }
  });
}

// Block row i sees the block columns of its own stride up to i, and of each earlier stride the columns
// stride - (n + 1) vertsize .. stride - n vertsize - 1, n = head mod num_verts. Of all of them the keys up to t.
inline void sparse_transformer_fixed(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                                     index_t block, index_t stride, index_t vertsize, index_t num_verts,
                                     const AttentionOptions& options, View<double, 3> lse = {}) {
  listed_keys(q, k, v, out, options, lse, [&](index_t, index_t head, index_t t, const auto& see) {
    const index_t row = t / block, n = head % num_verts;
    for (index_t s = 0; s <= t; ++s) {
      const index_t column = s / block, place = column % stride;
      const bool local = column / stride == row / stride;
      if (local || (place >= stride - (n + 1) * vertsize && place < stride - n * vertsize)) see(s);
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
