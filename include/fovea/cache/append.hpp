// SPDX-License-Identifier: Apache-2.0
// Append as an inference engine means it: rotate the new keys, encode keys and values in the cache's formats, store them; one
// pass over the new tokens, through one row of scratch on the stack.
#pragma once
#include "../core/rope.hpp"
#include "../engine/parts/rope.hpp"
#include "../simd/numbers.hpp"
#include "../simd/quantise.hpp"
#include "mixed_cache.hpp"

namespace fovea {
inline namespace v0 {

// The rotation of appended keys; without a table they are stored as they come.
struct AppendRope {
  const RopeTable* table = nullptr;
  RopeLayout layout = RopeLayout::half_split;
  index_t position = 0;   // of the first token appended; with a table of one row per token its row there
};

inline namespace FOVEA_ARCH {

// Rows of this many numbers at most.
inline constexpr index_t kAppendDim = 1024;

// Row (kv_head, token) of a tensor [1, kv_head, token, dim].
inline void read_token_row(const Operand& from, index_t token, index_t kv_head, float* to) {
  const index_t at = kv_head * from.stride[1] + token * from.stride[2];
  read_numbers(from.format, from.data + at * row_bytes(from.format, 1), from.stride[3], from.extent[3], to);
}

// Stores the key of a kv head; says how many numbers i8_channel had to clip.
inline index_t store_key(const CacheRows& rows, index_t kv_head, const float* numbers, std::byte* k_row) {
  const float* const scale = rows.k_channel_scale == nullptr ? nullptr : rows.k_channel_scale + kv_head * rows.dim_qk;
  return quantise_row(rows.k, numbers, 1, rows.dim_qk, scale, k_row);
}

// Has the table rows for `count` positions of keys? what: "positions", "sinks at".
inline Status check_rope_table(const RopeTable& table, index_t dim, const char* what, index_t position, index_t count) {
  if (2 * table.pairs > dim)
    return Status::error(Code::invalid_argument, "cache: the RoPE table turns %td numbers, keys have %td", 2 * table.pairs, dim);
  const index_t first = table.first_pos, end = first + table.len;
  if (position < first || position > end - count)
    return Status::error(Code::invalid_argument, "cache: %s %td to %td are outside the RoPE table's %td to %td", what, position,
                         position + count - 1, first, end - 1);
  return {};
}

// Encodes tokens of k [1, kv_head, token, dim_qk] and v [1, kv_head, token, dim_v] (f32, f64, bf16 or f16, any strides) as a
// cache's RowWriter. `lost` counts numbers that i8_channel, or a divisor, had to clip.
struct TokenWriter {
  const Operand &k, &v;
  const CacheRows& rows;
  const AppendRope& rope;
  index_t* lost;
  const float* divisor = nullptr;   // [kv_head, dim_qk]  of keys that stand beside i8_channel ones (MixedCache)

  void operator()(index_t token, index_t kv_head, std::byte* k_row, std::byte* v_row) const {
    float numbers[kAppendDim];
    read_token_row(k, token, kv_head, numbers);
    if (rope.table != nullptr) {
      const RopeTable& table = *rope.table;
      const index_t position = rope.position + token;
      rotate_rows(rope.layout, numbers, rows.dim_qk, numbers, rows.dim_qk, 1, table.cos_at(position), table.sin_at(position),
                  table.stride, table.pairs, rows.dim_qk);
    }
    if (divisor != nullptr) {
      // Within what the format holds: an infinity would be a NaN in the score of a query that is 0 there. A scale of 0 reads as 0
      // whatever is stored. A NaN stays.
      const float most = rows.k == Format::f16 ? 65504.f : 0x1.fep127f;
      for (index_t d = 0; d < rows.dim_qk; ++d) {
        const float scale = divisor[kv_head * rows.dim_qk + d], quotient = scale == 0.f ? 0.f : numbers[d] / scale;
        numbers[d] = std::clamp(quotient, -most, most);
        *lost += numbers[d] < quotient || numbers[d] > quotient;
      }
    }
    *lost += store_key(rows, kv_head, numbers, k_row);
    if (v_row == nullptr) return;
    read_token_row(v, token, kv_head, numbers);
    *lost += quantise_row(rows.v, numbers, 1, rows.dim_v, nullptr, v_row);
  }
};

inline Status check_append(const CacheRows& rows, const Operand& k, const Operand& v, const AppendRope& rope) {
  const auto bad = [](const char* name, const Operand& tensor, index_t heads, index_t len, index_t dim) {
    return Status::error(Code::invalid_argument, "cache: %s to append is [%td, %td, %td, %td], must be [1, %td, %td, %td]", name,
                         tensor.extent[0], tensor.extent[1], tensor.extent[2], tensor.extent[3], heads, len, dim);
  };
  const auto fits = [](const Operand& tensor, index_t heads, index_t len, index_t dim) {
    return tensor.extent == std::array<index_t, 4>{1, heads, len, dim} && len >= 0 && is_plain(tensor.format);
  };
  const index_t len = k.extent[2];
  if (!fits(k, rows.kv_heads, len, rows.dim_qk)) return bad("k", k, rows.kv_heads, len, rows.dim_qk);
  if (!rows.v_in_k && !fits(v, rows.kv_heads, len, rows.dim_v)) return bad("v", v, rows.kv_heads, len, rows.dim_v);
  if (rows.dim_qk > kAppendDim || rows.dim_v > kAppendDim)
    return Status::error(Code::unsupported, "cache: append encodes up to %td numbers, dims are %td and %td", kAppendDim,
                         rows.dim_qk, rows.dim_v);
  if (len > 0 && (k.data == nullptr || (!rows.v_in_k && v.data == nullptr)))
    return Status::error(Code::invalid_argument, "cache: k or v to append has null data");
  if (rope.table == nullptr || len == 0) return {};
  return check_rope_table(*rope.table, rows.dim_qk, "positions", rope.position, len);
}

// Appends the tokens of k and v to a sequence of any cache: contiguous, paged or ring. With v_in_k v is ignored. Refused without
// a trace when the cache has no room. `lost`, where given, grows by what a row had to clip: of i8_channel, or divided beside it.
template <class Cache>
Status append_tokens(Cache& cache, index_t sequence, const Operand& k, const Operand& v, const AppendRope& rope = {},
                     index_t* lost = nullptr) {
  if (Status status = check_append(cache.rows(), k, v, rope); !status.ok()) return status;
  index_t clipped = 0;
  Status status = cache.append(sequence, k.extent[2], TokenWriter{k, v, cache.rows(), rope, &clipped});
  if (lost != nullptr) *lost += clipped;
  return status;
}

// The same for a mixed cache: every token is encoded in both formats, exact keys beside i8_channel ones divided by the scales.
inline Status append_tokens(MixedCache& cache, index_t sequence, const Operand& k, const Operand& v,
                            const AppendRope& rope = {}, index_t* lost = nullptr) {
  if (Status status = check_append(cache.rows(), k, v, rope); !status.ok()) return status;
  index_t clipped = 0;
  Status status = cache.append(sequence, k.extent[2], TokenWriter{k, v, cache.exact_rows(), rope, &clipped, cache.rows().k_channel_scale},
                               TokenWriter{k, v, cache.rows(), rope, &clipped});
  if (lost != nullptr) *lost += clipped;
  return status;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
