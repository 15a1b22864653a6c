// SPDX-License-Identifier: Apache-2.0
// The baseline to beat: attention as an engine writes it with a good matrix library. Per head and block of queries
// S = Q K^T (one GEMM over the keys the block can see), a vectorised softmax per row, O = P V (one GEMM). Keys no row of the
// block sees are not computed, so causal and windowed calls are not charged twice.
//
// Carries scale, causal, window, q_offset and len_k; other options are ignored. q, k, v and out need stride 1 along dim.
#pragma once
#ifndef EIGEN_DONT_PARALLELIZE
#define EIGEN_DONT_PARALLELIZE   // threads split heads; a second level inside the GEMM would only get in their way
#endif
#include <Eigen/Dense>
#include <array>
#include <cmath>
#include <vector>

#include "deal_heads.hpp"
#include "visible_keys.hpp"

namespace fovea_baselines {
namespace eigen_detail {

using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class Matrix>
using Strided = Eigen::Map<Matrix, Eigen::Unaligned, Eigen::OuterStride<>>;

// [rows, dim] of one head, from `first` on.
template <class T>
auto rows_of(const fovea::Tensor<T>& tensor, index_t batch, index_t head, index_t first, index_t count) {
  using Matrix = std::conditional_t<std::is_const_v<T>, const RowMajor, RowMajor>;
  T* const data = tensor.data + batch * tensor.stride[0] + head * tensor.stride[1] + first * tensor.stride[2];
  return Strided<Matrix>(data, count, tensor.extent[3], Eigen::OuterStride<>(tensor.stride[2]));
}

// Queries per block: about 1 MiB of scores, so that the softmax finds them near the core, and enough rows that the GEMM does
// not spend its time packing K. Measured with Eigen 3.4 at 2048 keys, dim 128: 128 and 256 rows are best, 32 lose a tenth,
// 1024 and more a quarter in Q K^T.
constexpr index_t kMaxBlockRows = 256;
inline index_t block_rows(index_t keys) {
  return std::clamp<index_t>((index_t{1} << 18) / std::max<index_t>(keys, 1), 32, kMaxBlockRows);
}

inline void one_head(const fovea::Tensor<const float>& q, const fovea::Tensor<const float>& k,
                     const fovea::Tensor<const float>& v, const fovea::Tensor<float>& out, index_t batch, index_t q_head,
                     float scale, const VisibleKeys& visible, std::vector<float>& scores) {
  const index_t len_q = q.extent[2], kv_head = q_head / (q.extent[1] / k.extent[1]);
  const index_t step = block_rows(visible.len_k());
  for (index_t first = 0; first < len_q; first += step) {
    const index_t rows = std::min(step, len_q - first);
    auto result = rows_of(out, batch, q_head, first, rows);
    // Positions rise with the query, so the first row starts the block's keys and the last one ends them.
    const index_t key = visible.of(first).begin, keys = visible.of(first + rows - 1).end - key;
    if (keys <= 0) {
      result.setZero();
      continue;
    }
    if (scores.size() < static_cast<std::size_t>(rows * keys)) scores.resize(static_cast<std::size_t>(rows * keys));
    Eigen::Map<RowMajor> weights(scores.data(), rows, keys);
    weights.noalias() = rows_of(q, batch, q_head, first, rows) * rows_of(k, batch, kv_head, key, keys).transpose();
    std::array<float, kMaxBlockRows> sums;
    for (index_t row = 0; row < rows; ++row) {
      const KeyRange range = visible.of(first + row);
      const index_t begin = range.begin - key, count = range.end - range.begin;
      auto whole = weights.row(row).array();
      if (count <= 0) {
        whole.setZero();
        sums[static_cast<std::size_t>(row)] = 1.f;
        continue;
      }
      whole.head(begin).setZero();
      whole.tail(keys - begin - count).setZero();
      auto seen = whole.segment(begin, count);
      const float largest = scale >= 0.f ? seen.maxCoeff() : seen.minCoeff();
      seen = ((seen - largest) * scale).exp();
      sums[static_cast<std::size_t>(row)] = seen.sum();
    }
    result.noalias() = weights * rows_of(v, batch, kv_head, key, keys);
    // Dividing the output instead of the weights saves one pass over the scores.
    for (index_t row = 0; row < rows; ++row) result.row(row) *= 1.f / sums[static_cast<std::size_t>(row)];
  }
}

}  // namespace eigen_detail

// Runs on the lanes of options.executor, heads dealt one by one.
inline void eigen_attention(fovea::Tensor<const float> q, fovea::Tensor<const float> k, fovea::Tensor<const float> v,
                            fovea::Tensor<float> out, const fovea::AttentionOptions& options = {}) {
  const float scale = options.scale.value_or(1.f / std::sqrt(static_cast<float>(q.extent[3])));
  deal_heads(options.executor, q, [&](index_t batch, index_t q_head, std::vector<float>& scores) {
    const VisibleKeys visible(options, batch, q.extent[2], k.extent[2]);
    eigen_detail::one_head(q, k, v, out, batch, q_head, scale, visible, scores);
  });
}

}  // namespace fovea_baselines
