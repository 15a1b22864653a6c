// SPDX-License-Identifier: Apache-2.0
// View: a pointer, extents and strides. Owns nothing; strides are in elements, may be 0 (broadcast) or negative.
#pragma once
#include <array>
#include <cstddef>
#include <type_traits>

#include "types.hpp"

namespace fovea {
inline namespace v0 {

template <class T, int Rank>
struct View {
  T* data = nullptr;
  std::array<index_t, Rank> extent{};
  std::array<index_t, Rank> stride{};

  template <class... Index>
    requires(sizeof...(Index) == Rank)
  FOVEA_DATA_INLINE T& operator()(Index... index) const {
    const index_t at[Rank] = {static_cast<index_t>(index)...};
    index_t offset = 0;
    for (int axis = 0; axis < Rank; ++axis) {
      FOVEA_ASSERT(at[axis] >= 0 && at[axis] < extent[static_cast<std::size_t>(axis)]);
      offset += at[axis] * stride[static_cast<std::size_t>(axis)];
    }
    return data[offset];
  }

  FOVEA_DATA_INLINE explicit operator bool() const { return data != nullptr; }

  // A writable view is a readable one.
  FOVEA_DATA_INLINE operator View<const T, Rank>() const requires(!std::is_const_v<T>) { return {data, extent, stride}; }
};

// The same view with stride 0 on the axes of extent 1: their stride is never used, other libraries leave anything there, and 0
// neither overflows nor stops a mask from being broadcast.
template <class T, int Rank>
FOVEA_DATA_INLINE View<T, Rank> tidy(View<T, Rank> view) {
  for (int axis = 0; axis < Rank; ++axis) {
    if (view.extent[static_cast<std::size_t>(axis)] <= 1) view.stride[static_cast<std::size_t>(axis)] = 0;
  }
  return view;
}

// Four axes everywhere: [batch, head, pos, dim]. Ragged batches are batch 1 with the sequences one after the other along
// pos.
template <class T>
using Tensor = View<T, 4>;

// Dense token-major storage: data[((b * len + s) * heads + h) * dim + d].
template <class T>
FOVEA_DATA_INLINE Tensor<T> bshd(T* data, index_t batch, index_t len, index_t heads, index_t dim) {
  return {data, {batch, heads, len, dim}, {len * heads * dim, dim, heads * dim, 1}};
}

// Dense head-major storage: data[((b * heads + h) * len + s) * dim + d]. The fast layout for a KV cache.
template <class T>
FOVEA_DATA_INLINE Tensor<T> bhsd(T* data, index_t batch, index_t heads, index_t len, index_t dim) {
  return {data, {batch, heads, len, dim}, {heads * len * dim, len * dim, dim, 1}};
}

// Ragged storage: all tokens of all sequences one after the other, data[(t * heads + h) * dim + d].
template <class T>
FOVEA_DATA_INLINE Tensor<T> ragged(T* data, index_t total_len, index_t heads, index_t dim) {
  return bshd(data, 1, total_len, heads, dim);
}

template <class T>
struct QkvViews {
  Tensor<T> q, k, v;
};

// One fused projection per token: all q heads, then all k heads, then all v heads,
// data[(b * len + s) * (q_heads + 2 kv_heads) * dim + ...]; with q_heads == kv_heads this is [batch, pos, 3, head, dim].
template <class T>
FOVEA_DATA_INLINE QkvViews<T> packed_qkv(T* data, index_t batch, index_t len, index_t q_heads, index_t kv_heads,
                                         index_t dim) {
  const index_t token = (q_heads + 2 * kv_heads) * dim;
  const std::array<index_t, 4> stride{len * token, dim, token, 1};
  const std::array<index_t, 4> kv_extent{batch, kv_heads, len, dim};
  T* const k = data == nullptr ? nullptr : data + q_heads * dim;
  T* const v = data == nullptr ? nullptr : k + kv_heads * dim;
  return {{data, {batch, q_heads, len, dim}, stride}, {k, kv_extent, stride}, {v, kv_extent, stride}};
}

template <class T>
struct KvViews {
  Tensor<T> k, v;
};

// K and V of a token side by side: data[((b * len + s) * 2 + {k: 0, v: 1}) * kv_heads * dim + h * dim + d].
template <class T>
FOVEA_DATA_INLINE KvViews<T> interleaved_kv(T* data, index_t batch, index_t len, index_t kv_heads, index_t dim) {
  const index_t half = kv_heads * dim;
  const std::array<index_t, 4> extent{batch, kv_heads, len, dim}, stride{2 * len * half, dim, 2 * half, 1};
  return {{data, extent, stride}, {data == nullptr ? nullptr : data + half, extent, stride}};
}

}   // namespace v0
}   // namespace fovea
