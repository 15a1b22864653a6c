// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) as data. A token caches one row for all heads,
// [c | k_pe]: the normalised latent c and the rotated shared key k_pe. Key and value of head h are
//   k_h = [W_UK_h c | k_pe],   v_h = W_UV_h c.
#pragma once
#include <cmath>
#include <cstdint>
#include <span>

#include "kv.hpp"

namespace fovea {
inline namespace v0 {

// DeepSeek-V3: {128, 128, 64, 512, 128}; V2-Lite: 16 heads; Kimi K2: 64 heads.
struct MlaDims {
  index_t heads = 0;
  index_t nope = 0;     // numbers of a query head that meet W_UK_h c
  index_t rope = 0;     // numbers of a query head that meet k_pe
  index_t latent = 0;   // of c
  index_t value = 0;    // of v_h
};

// absorbed: W_UK is multiplied into the query and W_UV into the output, so attention runs over the cached rows themselves,
// one kv head for all heads: few queries. expanded: keys and values of every head are made from the cache: many queries.
enum class MlaForm : std::uint8_t { automatic, absorbed, expanded };

// mscale^2 / sqrt(nope + rope): YaRN's mscale (yarn_mscale in engine/parts/rope.hpp) enters both query and key.
FOVEA_DATA_INLINE float mla_scale(const MlaDims& dims, double mscale = 1) {
  return static_cast<float>(mscale * mscale / std::sqrt(static_cast<double>(dims.nope + dims.rope)));
}

// V lies in K: the first `latent` numbers of a row. Where a row's scale stands behind all of its numbers a shorter row would
// look for it in the wrong place, so V is the whole row there and its last `rope` numbers are for nobody.
FOVEA_DATA_INLINE constexpr index_t latent_value_dim(Format format, const MlaDims& dims) {
  return is_plain(format) || format == Format::latent_fp8 ? dims.latent : dims.latent + dims.rope;
}

// Latent rows as K and V of one kv head. `rows` has strides [entry or page, -, position] in bytes.
FOVEA_DATA_INLINE Kv latent_kv(const Stored& rows, const MlaDims& dims, index_t batch, index_t len) {
  Kv kv;
  kv.k = kv.v = rows;
  kv.kv_heads = 1;
  kv.dim_qk = dims.latent + dims.rope;
  kv.dim_v = latent_value_dim(rows.format, dims);
  kv.batch = batch;
  kv.len = len;
  return kv;
}

// The same from rows one behind the other, [batch, len].
FOVEA_DATA_INLINE Kv latent_kv(const void* rows, Format format, const MlaDims& dims, index_t batch, index_t len) {
  return latent_kv(stored_rows(rows, format, dims.latent + dims.rope, 1, len), dims, batch, len);
}

// From a tensor [batch, 1, len, latent + rope], innermost stride 1.
template <class T>
FOVEA_DATA_INLINE Kv latent_kv(const Tensor<T>& rows, const MlaDims& dims) {
  Kv kv = dense_kv(rows, rows);
  kv.dim_v = dims.latent;
  return kv;
}

// From a pool of pages: rows [page, slot], and which pages are whose, as a rectangle or as CSR lists.
FOVEA_DATA_INLINE Kv latent_pages(const Stored& rows, const MlaDims& dims, index_t pages, index_t page_size,
                                  View<const std::int32_t, 2> block_table) {   // [sequence, page of the sequence]
  Kv kv = latent_kv(rows, dims, pages, page_size);
  kv.home = Home::paged;
  kv.block_table = block_table;
  return kv;
}
FOVEA_DATA_INLINE Kv latent_pages(const Stored& rows, const MlaDims& dims, index_t pages, index_t page_size,
                                  std::span<const std::int32_t> page_indices,
                                  std::span<const index_t> page_begin) {   // [sequence + 1]
  Kv kv = latent_kv(rows, dims, pages, page_size);
  kv.home = Home::paged;
  kv.page_indices = page_indices;
  kv.page_begin = page_begin;
  return kv;
}

}   // namespace v0
}   // namespace fovea
