// SPDX-License-Identifier: Apache-2.0
// How stored values become vectors, and the kernels of a pair of codecs.
#pragma once
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct F32Codec {
  static constexpr index_t kBytes = 4;
  FOVEA_INLINE f32 load(const std::byte* row, index_t d) const {
    return fovea::load(reinterpret_cast<const float*>(row) + d);
  }
  FOVEA_INLINE f32 load_some(const std::byte* row, index_t d, index_t count) const {
    return fovea::load_some(reinterpret_cast<const float*>(row) + d, count);
  }
};

template <Codec KeyCodec, Codec ValueCodec>
constexpr KvKernels kv_kernels() {
  return {
      [](const std::byte* rows, index_t stride, index_t count, index_t dim, index_t first, float* to) {
        pack_keys(KeyCodec{}, rows, stride, count, dim, first, to);
      },
      [](const std::byte* rows, index_t stride, index_t count, index_t dim, float* to, index_t panel_stride) {
        return pack_values(ValueCodec{}, rows, stride, count, dim, to, panel_stride);
      },
      [](index_t rows, const float* q, index_t q_stride, const std::byte* keys, index_t stride, index_t count, index_t dim,
         float* s) { stream_scores(KeyCodec{}, rows, q, q_stride, keys, stride, count, dim, s); },
      [](index_t rows, const float* p, const std::byte* values, index_t stride, index_t count, index_t dim,
         const float* rescale, float* acc,
         index_t acc_stride) { stream_weigh(ValueCodec{}, rows, p, values, stride, count, dim, rescale, acc, acc_stride); },
      [](const std::byte* values, index_t stride, index_t count, index_t dim) {
        return all_finite(ValueCodec{}, values, stride, count, dim);
      },
  };
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
