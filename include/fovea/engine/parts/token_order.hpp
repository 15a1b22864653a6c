// SPDX-License-Identifier: Apache-2.0
// Rows and keys that stand in another order than in the text (sorted into buckets, chosen by clusters), and what follows for
// masks and scores: they go by the tokens, not by the places. Also how rows of any plain format get into such an order.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../../core/kv.hpp"
#include "../../simd/lookup.hpp"
#include "../../simd/numbers.hpp"
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Sequence n is one group: its row i is token rows[row_begin[n] + i], its key j token keys[key_begin[n] + j]. A key of -1 is
// before all tokens (a learned one). `keys` can be read a whole vector beyond the last key.
struct TokenOrder {
  const std::int32_t* rows = nullptr;
  const std::int32_t* keys = nullptr;
  const index_t* row_begin = nullptr;   // [sequence]
  const index_t* key_begin = nullptr;   // [sequence]

  FOVEA_INLINE std::int32_t row(const Row& row) const { return rows[row_begin[row.sequence] + row.q_index]; }
  FOVEA_INLINE const std::int32_t* keys_of(int sequence) const { return keys + key_begin[sequence]; }
};

// A row sees the keys of its own token and of earlier ones.
struct CausalTokens {
  TokenOrder order;
  bool causal = true;   // false: all keys
  FOVEA_INLINE bool off() const { return !causal; }

  struct Lane {
    const std::int32_t* keys;
    i32 token;
    FOVEA_INLINE keep_t operator()(i32 pos) const { return as_keep(i32::load_unaligned(keys + first_lane(pos)) <= token); }
  };
  FOVEA_INLINE Lane at(const Row& row) const {
    return {order.keys_of(row.sequence), i32(causal ? order.row(row) : INT32_MAX)};
  }
  FOVEA_INLINE KeyRange hull(std::span<const Row>) const { return {0, PTRDIFF_MAX}; }
  // A look at 256 keys costs about as much as one of the 12 x 256 products of the tile it may save.
  FOVEA_INLINE Cover cover(const Tile& tile) const {
    if (!causal) return Cover::full;
    const std::int32_t* const keys = order.keys_of(tile.rows.front().sequence);
    std::int32_t first = INT32_MAX, last = -1, low = INT32_MAX, high = -1;
    for (index_t j = tile.k_begin; j < tile.k_end; ++j) {
      first = std::min(first, keys[j]);
      last = std::max(last, keys[j]);
    }
    for (const Row& row : tile.rows) {
      low = std::min(low, order.row(row));
      high = std::max(high, order.row(row));
    }
    return first > high ? Cover::skip : last <= low ? Cover::full : Cover::partial;
  }
};

// The score of a token with itself is a constant: where queries are keys, it would win every row.
struct SelfScore {
  TokenOrder order;
  bool replace = true;
  float score = -5e4f;
  FOVEA_INLINE bool off() const { return !replace; }

  struct Lane {
    const std::int32_t* keys;
    i32 token;
    float score;
    FOVEA_INLINE f32 operator()(f32 s, i32 pos) const {
      return select(as_keep(i32::load_unaligned(keys + first_lane(pos)) == token), f32(score), s);
    }
  };
  FOVEA_INLINE Lane at(const Row& row) const {
    return {order.keys_of(row.sequence), i32(replace ? order.row(row) : INT32_MIN), score};
  }
};

// Vector (batch, head, pos) of a tensor, as floats, and back.
FOVEA_INLINE void read_token(const Operand& x, index_t batch, index_t head, index_t pos, float* to) {
  const index_t at = batch * x.stride[0] + head * x.stride[1] + pos * x.stride[2];
  read_numbers(x.format, x.data + at * row_bytes(x.format, 1), x.stride[3], x.extent[3], to);
}
FOVEA_INLINE void write_token(const float* from, const Result& x, index_t batch, index_t head, index_t pos) {
  const index_t at = batch * x.stride[0] + head * x.stride[1] + pos * x.stride[2];
  write_numbers(x.format, from, x.extent[3], x.data + at * row_bytes(x.format, 1), x.stride[3]);
}

// x / max(|x|, 1e-12), the published normalisation of keys and of what is routed. One chain of FMAs per lane of the vector.
inline void make_unit(float* x, index_t dim) {
  f32 sum(0.f);
  for (index_t d = 0; d < dim; d += kLanes) {
    const f32 part = dim - d >= kLanes ? load(x + d) : load_some(x + d, dim - d);
    sum = fma(part, part, sum);
  }
  const float inverse = 1.f / std::max(std::sqrt(reduce_add(sum)), 1e-12f);
  for (index_t d = 0; d < dim; ++d) x[d] *= inverse;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
