// SPDX-License-Identifier: Apache-2.0
// What happens to a finished row.
#pragma once
#include "../../core/view.hpp"
#include "../../simd/simd.hpp"
#include "../plan.hpp"
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// out = acc * scale, and the LSE where it is asked for. + 0 turns an underflowed -0 into +0: otherwise its sign would depend on
// how many masked keys added their 0 after it.
struct Store {
  Tensor<float> out;           // [batch, q_head, pos, dim]
  View<float, 3> lse;          // [batch, q_head, pos]
  const Sequence* sequences;   // [sequence]

  FOVEA_INLINE void store(const Row& row, std::span<const float> acc, Final end) const {
    const Sequence& sequence = sequences[row.sequence];
    const index_t pos = sequence.q_begin + row.q_index, dim = static_cast<index_t>(acc.size());
    if (lse) lse.data[sequence.batch * lse.stride[0] + row.q_head * lse.stride[1] + pos * lse.stride[2]] = end.lse;
    float* const to = out.data + sequence.batch * out.stride[0] + row.q_head * out.stride[1] + pos * out.stride[2];
    if (out.stride[3] != 1) {
      for (index_t d = 0; d < dim; ++d) to[d * out.stride[3]] = (acc[static_cast<std::size_t>(d)] + 0.f) * end.scale;
      return;
    }
    const f32 scale(end.scale);
    index_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) fovea::store(to + d, (load(acc.data() + d) + f32(0.f)) * scale);
    if (d < dim) store_some(to + d, (load(acc.data() + d) + f32(0.f)) * scale, dim - d);
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
