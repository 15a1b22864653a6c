// SPDX-License-Identifier: Apache-2.0
// Where K and V are.
#pragma once
#include <span>

#include "../plan.hpp"
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// K and V as strided views; a sequence's keys follow each other along pos. Byte strides: batch, head, pos.
struct DenseSource {
  const std::byte* k;
  const std::byte* v;
  std::array<index_t, 3> k_stride, v_stride;
  const Sequence* sequences;   // [sequence]
  KvKernels kernels;

  Where where(const Tile& tile) const {
    const Row& row = tile.rows.front();
    const Sequence& sequence = sequences[row.sequence];
    const auto segment = [&](const std::byte* data, const std::array<index_t, 3>& stride) {
      return Segment{
          data + sequence.batch * stride[0] + row.kv_head * stride[1] + (sequence.k_begin + tile.k_begin) * stride[2],
          stride[2], tile.k_end - tile.k_begin};
    };
    return {{segment(k, k_stride), Segment{}}, {segment(v, v_stride), Segment{}}};
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
