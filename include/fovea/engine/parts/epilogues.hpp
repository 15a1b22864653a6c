// SPDX-License-Identifier: Apache-2.0
// What happens to a finished row.
#pragma once
#include "../../core/kv.hpp"
#include "../../simd/numbers.hpp"
#include "../plan.hpp"
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// out = acc * scale in the format of out, and the LSE where it is asked for. + 0 turns an underflowed -0 into +0: otherwise its
// sign would depend on how many masked keys added their 0 after it.
struct Store {
  Result out;                  // [batch, q_head, pos, dim]
  View<float, 3> lse;          // [batch, q_head, pos]
  const Sequence* sequences;   // [sequence]

  FOVEA_INLINE void store(const Row& row, std::span<float> acc, Final end) const {
    const Sequence& sequence = sequences[row.sequence];
    const index_t pos = sequence.q_begin + row.q_index, dim = static_cast<index_t>(acc.size());
    if (lse) lse.data[sequence.batch * lse.stride[0] + row.q_head * lse.stride[1] + pos * lse.stride[2]] = end.lse;
    const index_t at = sequence.batch * out.stride[0] + row.q_head * out.stride[1] + pos * out.stride[2];
    std::byte* const to = out.data + at * row_bytes(out.format, 1);
    const f32 scale(end.scale);
    if (out.format == Format::f32 && out.stride[3] == 1) {
      auto* const floats = reinterpret_cast<float*>(to);
      index_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) fovea::store(floats + d, (load(acc.data() + d) + f32(0.f)) * scale);
      if (d < dim) store_some(floats + d, (load(acc.data() + d) + f32(0.f)) * scale, dim - d);
      return;
    }
    for (index_t d = 0; d < dim; d += kLanes) fovea::store(acc.data() + d, (load(acc.data() + d) + f32(0.f)) * scale);
    write_numbers(out.format, acc.data(), dim, to, out.stride[3]);
  }
};

// Where a row stands in the views of the call: q, out, and whatever else has a row per query.
struct OutRow {
  index_t batch, q_head, pos;
};

// A finished row changed before it is stored: a gate, a norm, a sum with what stands in out. change(OutRow, values, end) gets the
// dim_v normalised numbers of the row, padded to whole vectors with numbers of no meaning, and may write all of them; end.lse
// is there where the call asks for it, or Change::kNeedsLse does.
template <class Change>
struct Closing {
  Store store_to;
  const Change& change;

  FOVEA_INLINE void store(const Row& row, std::span<float> acc, Final end) const {
    const Sequence& sequence = store_to.sequences[row.sequence];
    const f32 scale(end.scale);
    for (index_t d = 0; d < static_cast<index_t>(acc.size()); d += kLanes)
      fovea::store(acc.data() + d, (load(acc.data() + d) + f32(0.f)) * scale);
    change(OutRow{sequence.batch, row.q_head, sequence.q_begin + row.q_index}, acc, end);
    store_to.store(row, acc, {1.f, end.lse});
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
