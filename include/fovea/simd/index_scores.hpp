// SPDX-License-Identifier: Apache-2.0
// The lightning indexer of DeepSeek Sparse Attention: a small score of every key for a query token,
//   I[s] = scale[s] * sum_h w[h] * max(q[h] . k[s], 0),
// 64 heads of dim 128 against one key per token. Keys are fp8 rows with one scale each, so a token costs 132 bytes and 16384
// flops: bound by arithmetic, 124 flops a byte.
//
// fp8 numbers are exact in fp32, and so are their products, so the sums here are those of the dequantised formula up to the
// rounding of the sums: keys are widened into panels of fp32 once for all queries of a task, and each tile of heads is
// multiplied, cut at zero, weighted and added to the row of scores without leaving registers.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "../core/formats.hpp"
#include "../core/kv.hpp"
#include "../core/shapes.hpp"
#include "project.hpp"

namespace fovea {
inline namespace v0 {

// How numbers of the indexer become e4m3. plain: scale = max(max|x|, 1e-4) / 448. ue8m0: the same rounded up to a power of
// two, as DeepSeek-V3.2 is trained. none: numbers stay what they are.
enum class IndexRounding : std::uint8_t { none, plain, ue8m0 };

// Index keys as plain data: key j of sequence b is key j % page_size of page j / page_size of its own pages, which follow
// each other (sequence b owns the pages from b * ceil(len / page_size) on) or stand in a block table.
struct IndexKeys {
  const std::byte* codes = nullptr;
  const std::byte* scales = nullptr;   // an f32 per key of any alignment; null: 1
  Format format = Format::e4m3;        // of the codes; f32, f64, bf16 and f16 as well
  index_t dim = 128;
  index_t sequences = 1, len = 0;              // keys a sequence has room for
  index_t page_size = 1;                       // keys of a page, at least 1
  index_t pages = 0;                           // of the pool
  index_t code_page = 0, code_key = 0;         // bytes from page to page and from key to key
  index_t scale_page = 0, scale_key = 0;       // the same for the scales
  View<const std::int32_t, 2> block_table{};   // [sequence, page of the sequence]

  FOVEA_DATA_INLINE IndexKeys() {}
};

// Rows one behind the other, [sequence, len]: Format::e4m3 rows carry their scale behind their numbers (132 bytes at dim
// 128).
FOVEA_DATA_INLINE IndexKeys index_rows(const void* rows, Format format, index_t dim, index_t sequences, index_t len) {
  IndexKeys keys;
  keys.codes = static_cast<const std::byte*>(rows);
  keys.format = format;
  keys.dim = dim;
  keys.sequences = keys.pages = sequences;
  keys.len = len;
  keys.page_size = len < 1 ? 1 : len;
  keys.code_key = row_bytes(format, dim);
  keys.code_page = len * keys.code_key;
  if (format == Format::e4m3 && keys.codes != nullptr) {
    keys.scales = keys.codes + dim;
    keys.scale_key = keys.code_key;
    keys.scale_page = keys.code_page;
  }
  return keys;
}

// Codes [sequence, len, dim] and scales [sequence, len] apart, as DeepGEMM's fp8_mqa_logits takes them.
FOVEA_DATA_INLINE IndexKeys index_arrays(const fp8_e4m3* codes, const float* scales, index_t dim, index_t sequences,
                                         index_t len) {
  IndexKeys keys;
  keys.codes = reinterpret_cast<const std::byte*>(codes);
  keys.scales = reinterpret_cast<const std::byte*>(scales);
  keys.dim = dim;
  keys.sequences = keys.pages = sequences;
  keys.len = len;
  keys.page_size = len < 1 ? 1 : len;
  keys.code_key = dim;
  keys.code_page = len * dim;
  keys.scale_key = 4;
  keys.scale_page = len * 4;
  return keys;
}

// DeepGEMM's pages: the codes of page_size keys first, then their scales; 64 * 128 and 64 * 4 bytes.
FOVEA_DATA_INLINE IndexKeys index_pages(const void* pool, index_t dim, index_t pages, index_t page_size, index_t sequences,
                                        index_t len, View<const std::int32_t, 2> block_table = {}) {
  IndexKeys keys;
  keys.codes = static_cast<const std::byte*>(pool);
  keys.scales = keys.codes == nullptr ? nullptr : keys.codes + page_size * dim;
  keys.dim = dim;
  keys.sequences = sequences;
  keys.len = len;
  keys.page_size = page_size;
  keys.pages = pages;
  keys.code_key = dim;
  keys.scale_key = 4;
  keys.code_page = keys.scale_page = page_size * (dim + 4);
  keys.block_table = block_table;
  return keys;
}

inline namespace FOVEA_ARCH {

inline constexpr float kSmallestIndexMaximum = 1e-4f;

// The scale of numbers up to `largest`.
FOVEA_INLINE float index_scale(float largest, IndexRounding rounding) {
  const float scale = (largest < kSmallestIndexMaximum ? kSmallestIndexMaximum : largest) / 448.f;
  if (rounding != IndexRounding::ue8m0) return scale;
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(scale) + 0x7fffffu) & 0xff800000u);   // the next power of two
}

// x [dim] to e4m3 codes; returns their scale. A number that is not finite stays what it is where it is (in e4m3: NaN); the
// published clamp would make 448 scales of an infinity.
inline float quantise_index_row(const float* x, index_t dim, IndexRounding rounding, std::byte* codes) {
  const QuantiseSource from{x, 1, dim};
  const float scale = index_scale(std::bit_cast<float>(largest_bits<true>(from, 0, dim)), rounding);
  for (index_t d = 0; d < dim; d += kLanes) store_as<fp8_e4m3>(codes + d, from.at(d) / f32(scale), from.lanes(d));
  return scale;
}

// The numbers that codes stand for, without their scale.
inline void read_codes(const std::byte* codes, index_t dim, float* to) {
  for (index_t d = 0; d < dim; d += kLanes) {
    if (dim - d >= kLanes) {
      store(to + d, load_e4m3(codes + d));
    } else {
      store_some(to + d, load_e4m3_some(codes + d, dim - d), dim - d);
    }
  }
}

namespace index_keys {

using E4m3Row = project::PlainCodec<1, load_e4m3, load_e4m3_some>;

struct Place {
  const std::byte* codes;
  const std::byte* scales;
  index_t count;   // keys that stand behind each other from here on
};

FOVEA_INLINE Place place_of(const IndexKeys& keys, index_t sequence, index_t key) {
  const index_t own = key / keys.page_size, slot = key - own * keys.page_size;
  const index_t page = keys.block_table
                           ? keys.block_table.data[sequence * keys.block_table.stride[0] + own * keys.block_table.stride[1]]
                           : sequence * ((keys.len + keys.page_size - 1) / keys.page_size) + own;
  return {keys.codes + page * keys.code_page + slot * keys.code_key,
          keys.scales == nullptr ? nullptr : keys.scales + page * keys.scale_page + slot * keys.scale_key,
          keys.page_size - slot};
}

inline void pack(Format format, const Segment& segment, index_t dim, index_t first, float* panel) {
  switch (format) {
    case Format::e4m3:
      return pack_keys(E4m3Row{}, segment, dim, first, panel);
    case Format::bf16:
      return pack_keys(project::Bf16Row{}, segment, dim, first, panel);
    case Format::f16:
      return pack_keys(project::F16Row{}, segment, dim, first, panel);
    case Format::f64:
      return pack_keys(project::F64Row{}, segment, dim, first, panel);
    default:
      return pack_keys(project::F32Row{}, segment, dim, first, panel);
  }
}

}   // namespace index_keys

// Keys [first, first + count) of a sequence as one panel, count <= kPanel, and their scales; zeros behind them.
inline void pack_index_panel(const IndexKeys& keys, index_t sequence, index_t first, index_t count,
                             float* panel,     // [dim, kPanel]
                             float* scale) {   // [kPanel]
  for (index_t n = 0; n < count;) {
    const index_keys::Place place = index_keys::place_of(keys, sequence, first + n);
    const index_t here = std::min(count - n, place.count);
    const index_t ahead = place.count >= 2 * kPanel ? kPanel * keys.code_key : -1;
    index_keys::pack(keys.format, Segment{place.codes, keys.code_key, here, ahead}, keys.dim, n, panel);
    for (index_t i = 0; i < here; ++i)
      scale[n + i] = place.scales == nullptr ? 1.f : read_f32(place.scales + i * keys.scale_key);
    n += here;
  }
  clear_columns(panel, keys.dim, count, kPanel);
  std::fill(scale + count, scale + kPanel, 0.f);
}

constexpr index_t index_tiles(index_t heads) { return (heads + kTileRows - 1) / kTileRows; }

// Heads as tiles of kTileRows, the last one padded with zeros; q rows are `stride` floats apart.
inline void pack_index_query(const float* q, index_t stride, index_t heads, index_t dim,
                             float* to) {   // [tile, dim, kTileRows]
  for (index_t h = 0; h < heads; h += kTileRows, to += dim * kTileRows) {
    const float* rows[kTileRows];
    const index_t here = std::min(kTileRows, heads - h);
    for (index_t r = 0; r < kTileRows; ++r) rows[r] = q + std::min(h + r, heads - 1) * stride;
    pack_queries(rows, here, 1, dim, 1.f, to);
  }
}

// to[n] += sum_r weight[r] * max(sum_d a[d, r] panel[d, n], 0), r < live, in the order of r. A NaN stays one.
template <int Rows>
FOVEA_NOINLINE void index_tile(const float* a,       // [dim, kTileRows]
                               const float* panel,   // [dim, kPanel]
                               index_t dim, index_t live, const float* weight, float* to) {
  constexpr int kVectors = static_cast<int>(kPanelVectors);
  f32 sum[Rows][kVectors];
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < kVectors; ++n) sum[r][n] = f32(0.f);
  }
  for (index_t d = 0; d < dim; ++d, a += kTileRows, panel += kPanel) {
    f32 column[kVectors];
    FOVEA_UNROLL
    for (int n = 0; n < kVectors; ++n) column[n] = load(panel + n * kLanes);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) multiply_row<kVectors>(r, a + r, column, sum[r]);
  }
  FOVEA_UNROLL
  for (int n = 0; n < kVectors; ++n) {
    f32 score = load(to + n * kLanes);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const f32 dot = select(sum[r][n] < f32(0.f), f32(0.f), sum[r][n]);
      if (r < live) score = fma(f32(weight[r]), dot, score);
    }
    store(to + n * kLanes, score);
  }
}

// to[n] = scale[n] * sum_h weight[h] * max(q[h] . key n, 0) for a panel of keys. Every score is one chain over d and then
// over h, whatever stands beside it.
inline void score_index_panel(const float* q,   // [tile, dim, kTileRows]
                              index_t heads, const float* weight, const float* panel, const float* scale, index_t dim,
                              float* to) {   // [kPanel]
  std::fill_n(to, kPanel, 0.f);
  for (index_t h = 0; h < heads; h += kTileRows, q += dim * kTileRows) {
    const index_t live = std::min(kTileRows, heads - h);
    const float* const w = weight + h;
    if constexpr (kTileRows > 6) {
      if (live > 6) {
        index_tile<kTileRows>(q, panel, dim, live, w, to);
        continue;
      }
    }
    if (live > 4) {
      index_tile<6>(q, panel, dim, live, w, to);
    } else if (live > 2) {
      index_tile<4>(q, panel, dim, live, w, to);
    } else {
      index_tile<2>(q, panel, dim, live, w, to);
    }
  }
  FOVEA_UNROLL
  for (index_t n = 0; n < kPanelVectors; ++n) store(to + n * kLanes, load(to + n * kLanes) * load(scale + n * kLanes));
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
