// SPDX-License-Identifier: Apache-2.0
// Operands of attention as plain data: any storage type, any place. Nothing here owns memory.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "formats.hpp"
#include "view.hpp"

namespace fovea {
inline namespace v0 {

// A tensor whose number type is run-time data: f32, f64, bf16 or f16. Made from any Tensor of those by itself. Strides count
// elements.
struct Operand {
  const std::byte* data = nullptr;
  Format format = Format::f32;
  std::array<index_t, 4> extent{};   // [batch, head, pos, dim]
  std::array<index_t, 4> stride{};

  FOVEA_DATA_INLINE Operand() {}   // a defaulted one is a symbol without an instruction set in its name (clang)
  template <class T>
  FOVEA_DATA_INLINE Operand(const Tensor<T>& tensor)
      : data(reinterpret_cast<const std::byte*>(tensor.data)),
        format(FormatOf<std::remove_const_t<T>>::value),
        extent(tensor.extent),
        stride(tensor.stride) {}
};

struct Result {
  std::byte* data = nullptr;
  Format format = Format::f32;
  std::array<index_t, 4> extent{};   // [batch, head, pos, dim]
  std::array<index_t, 4> stride{};

  FOVEA_DATA_INLINE Result() {}
  template <class T>
    requires(!std::is_const_v<T>)
  FOVEA_DATA_INLINE Result(const Tensor<T>& tensor)
      : data(reinterpret_cast<std::byte*>(tensor.data)),
        format(FormatOf<T>::value),
        extent(tensor.extent),
        stride(tensor.stride) {}
};

// Stored K or V rows in one of the formats of core/formats.hpp. Strides count bytes, so that rows may carry scales, stand in
// pages or interleave with others.
struct Stored {
  const std::byte* data = nullptr;
  Format format = Format::f32;
  std::array<index_t, 3> stride{};   // bytes per batch entry or page, per kv head, per position

  FOVEA_DATA_INLINE Stored() {}
  FOVEA_DATA_INLINE Stored(const std::byte* rows, Format format_of_rows, std::array<index_t, 3> strides)
      : data(rows), format(format_of_rows), stride(strides) {}
};

enum class Home : std::uint8_t { contiguous, paged, ring };

// K and V, wherever they live: made by dense_kv, by a container of cache/, or field by field. Keys are counted 0 ..
// len_k - 1 within a sequence whatever their home; AttentionOptions::len_k says how many are in use.
//   contiguous  key j of sequence b: entry b, position j (ragged: entry 0, position cu_len_k[b] + j)
//   paged       key j of sequence b: page table(b, j / page_size), slot j % page_size. The table is either a rectangle of pages
//               per sequence or CSR lists. Pages may repeat and be shared; entries behind the last page in use are never read.
//   ring        key j < sinks: slot j; others: slot sinks + (ring_begin[b] + j - sinks) mod (len - sinks)
// V may lie inside K (MLA: the same rows, dim_v < dim_qk).
struct Kv {
  FOVEA_DATA_INLINE Kv() {}

  Stored k, v;
  index_t kv_heads = 1, dim_qk = 0, dim_v = 0;
  index_t batch = 1;   // contiguous and ring: sequences; paged: pages in the pool
  index_t len = 0;     // contiguous and ring: positions per entry; paged: positions per page
  Home home = Home::contiguous;

  View<const std::int32_t, 2> block_table{};          // [sequence, page of the sequence]
  std::span<const std::int32_t> page_indices{};       // CSR: the pages of all sequences, one after the other
  std::span<const index_t> page_begin{};              // CSR: [sequence + 1]

  index_t sinks = 0;                                  // ring: slots that never move
  std::span<const index_t> ring_begin{};              // ring: [sequence], how far the circular part is turned

  // [kv_head, dim_qk], with Format::i8_channel. Multiplied into the queries, so into every k of the call: those of `exact` are
  // stored divided by them, and `exact` has none of its own.
  const float* k_channel_scale = nullptr;

  // Keys j < exact_first, and j >= exact_from[b], are read from `exact` instead (exact_from[b] may exceed len_k[b], up to
  // exact_first; pages are needed only for the keys between the two): the first tokens and a recent window in 16
  // bit around a quantised middle. `exact` counts its keys 0 .. exact_first - 1, then those of the window.
  const Kv* exact = nullptr;
  index_t exact_first = 0;
  std::span<const index_t> exact_from{};              // [sequence]
};

// K and V as two tensors, [batch, kv_head, pos, dim]; innermost stride 1 (checked by the call).
FOVEA_DATA_INLINE Kv dense_kv(const Operand& k, const Operand& v) {
  const index_t k_number = row_bytes(k.format, 1), v_number = row_bytes(v.format, 1);
  Kv kv;
  kv.k = {k.data, k.format, {k.stride[0] * k_number, k.stride[1] * k_number, k.stride[2] * k_number}};
  kv.v = {v.data, v.format, {v.stride[0] * v_number, v.stride[1] * v_number, v.stride[2] * v_number}};
  kv.kv_heads = k.extent[1];
  kv.dim_qk = k.extent[3];
  kv.dim_v = v.extent[3];
  kv.batch = k.extent[0];
  kv.len = k.extent[2];
  return kv;
}

// Rows of any format in one block, [batch, kv_head, pos] with the head's rows next to each other: the fast layout.
FOVEA_DATA_INLINE Stored stored_rows(const void* data, Format format, index_t dim, index_t heads, index_t len) {
  const index_t row = row_bytes(format, dim);
  return {static_cast<const std::byte*>(data), format, {heads * len * row, len * row, row}};
}

}   // namespace v0
}   // namespace fovea
