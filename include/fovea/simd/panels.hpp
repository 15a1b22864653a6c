// SPDX-License-Identifier: Apache-2.0
// What prefill multiplies, as one interface: the engine is a template over a panel type and says Panels::scores. F32Panels
// keeps fp32. Bf16Panels rounds q, k, v and the weights to bf16 (8 significant bits: off by at most 2^-9 relative each),
// takes half the memory, and exists where the instruction set has the dot product of bf16 pairs. The sum of the weights
// that a row is divided by stays that of the unrounded ones.
//
//   operand   F32Panels               Bf16Panels                     of
//   queries   [dim, kTileRows]        [dim pair, kTileRows, 2]       a group of rows
//   keys      [panel, dim, kPanel]    [panel, dim pair, kPanel, 2]   a key tile
//   values    [panel, key, kPanel]    [panel, key pair, kPanel, 2]   a key tile, panels `panel_stride` elements apart
//   weights   [row, kScoreStride] floats: the scores; Bf16Panels rounds them in place before it uses them
//
// Where the CPU has matrix tiles (AMX) and the system gives them to the process, Bf16Panels is TileBf16Panels: larger groups of
// rows, queries row by row [kTileStep, dim], dims padded to kTileStep, products by gemm_tiles.hpp. Its sums are grouped otherwise,
// so its bits are its own. Elsewhere it is DotBf16Panels.
#pragma once
#include <optional>

#include "gemm_tiles.hpp"
#include "pack.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct F32Panels {
  using Element = float;

  // What a thread holds while it multiplies, if any of it is packed.
  struct Session {
    explicit Session(bool /*packed*/) {}
  };

  // In elements, of one row group and of a key tile.
  static constexpr index_t query_size(index_t dim) { return dim * kTileRows; }
  static constexpr index_t key_size(index_t dim, index_t keys) { return dim * keys; }
  static constexpr index_t value_size(index_t dim, index_t keys) { return (dim + kPanel - 1) / kPanel * kPanel * keys; }

  static void pack_queries(const float* const* rows, index_t count, index_t element_stride, index_t dim, float scale,
                           float* to) {
    fovea::pack_queries(rows, count, element_stride, dim, scale, to);
  }
  // Columns [first, first + count) of a key tile; `to` is where the tile starts.
  template <class Codec>
  static void pack_keys(const Codec& codec, const Segment& keys, index_t dim, index_t first, float* to) {
    fovea::pack_keys(codec, keys, dim, first, to);
  }
  template <class Codec>
  static bool pack_values(const Codec& codec, const Segment& values, index_t dim, index_t first, float* to,
                          index_t panel_stride) {
    return fovea::pack_values(codec, values, dim, to + first * kPanel, panel_stride);
  }
  // Columns that share a panel with keys in use but belong to none.
  static void clear_keys(float* to, index_t dim, index_t first, index_t last) { clear_columns(to, dim, first, last); }
  // Before the keys [begin, end) of a tile are packed: zeros for what else weigh multiplies by 0.
  static void clear_values(float*, index_t /*begin*/, index_t /*end*/, index_t /*dim*/, index_t /*panel_stride*/) {}
  // Whether weigh leaves values outside [begin, end) alone, so that those may be anything.
  static constexpr bool keeps_apart(index_t /*begin*/, index_t /*end*/) { return true; }

  // Scores of the columns [begin, end); others in the same panels are overwritten with what they come to.
  static void scores(index_t rows, index_t begin, index_t end, const float* queries, const float* keys, index_t dim,
                     float /*scale: in the queries*/, float* s) {
    for (index_t column = begin / kPanel * kPanel; column < end; column += kPanel) {
      if (end - column > kLanes) {
        gemm_nt<kPanelVectors>(rows, queries, keys + column * dim, dim, s + column);
      } else {
        gemm_nt<1>(rows, queries, keys + column * dim, dim, s + column);
      }
    }
  }

  // acc = rescale * acc + weights * values over the columns [begin, end). weights, rescale and acc hold kTileRows rows.
  static void weigh(index_t rows, index_t begin, index_t end, float* weights, const float* values, index_t panel_stride,
                    index_t dim, const float* rescale, float* acc, index_t acc_stride) {
    values += begin * kPanel;
    for (index_t d = 0; d < dim; d += kPanel, values += panel_stride) {
      if (dim - d > kLanes) {
        gemm_nn<kPanelVectors>(rows, weights + begin, values, end - begin, rescale, acc + d, acc_stride);
      } else {
        gemm_nn<1>(rows, weights + begin, values, end - begin, rescale, acc + d, acc_stride);
      }
    }
  }

  // One row of the same, over the columns with live[column] != 0 only. The weights of the others are zeros, their values may
  // be anything. The row gets the bits that weigh would give it if those values were finite.
  static void weigh_live(index_t begin, index_t end, const std::uint8_t* live, float* weights, const float* values,
                         index_t panel_stride, index_t dim, float rescale, float* acc) {
    for (index_t d = 0; d < dim; d += kLanes) {
      const float* const column = values + d / kPanel * panel_stride + d % kPanel;
      f32 sum = load(acc + d) * f32(rescale);
      for (index_t j = begin; j < end; ++j) {
        if (live[j] != 0) sum = fma(f32(weights[j]), load(column + j * kPanel), sum);
      }
      store(acc + d, sum);
    }
  }
};

#if defined(__AVX512BF16__)

inline constexpr std::uint32_t kLowHalf = 0xffffu, kHighHalf = 0xffff0000u;
inline const bf16* pairs_of(const float* weights) { return reinterpret_cast<const bf16*>(weights); }
// keep[key / 2]: the halves of a pair of keys in [begin, end) that are live.
inline void live_pairs(index_t begin, index_t end, const std::uint8_t* live, std::uint32_t* keep) {
  for (index_t j = begin / 2 * 2; j < end; j += 2) {
    const bool low = j >= begin && live[j] != 0, high = j + 1 < end && live[j + 1] != 0;
    keep[j / 2] = (low ? kLowHalf : 0u) | (high ? kHighHalf : 0u);
  }
}

// What both kinds of bf16 panels share: the layout of values, and keys of which no stale column matters, because neither product has
// slow numbers and the scores of such a column are nobody's.
struct StoredBf16Panels {
  using Element = bf16;

  static constexpr index_t value_size(index_t dim, index_t keys) { return (dim + kPanel - 1) / kPanel * kPanel * keys; }
  template <class Codec>
  static bool pack_values(const Codec& codec, const Segment& values, index_t dim, index_t first, bf16* to,
                          index_t panel_stride) {
    return pack_values_bf16(codec, values, dim, first, to, panel_stride);
  }
  static void clear_keys(bf16*, index_t, index_t, index_t) {}
};

// Where rows have a scale (8-bit formats) it is multiplied in before rounding; the scale of the scores multiplies the sums.
struct DotBf16Panels : StoredBf16Panels {
  using Session = F32Panels::Session;

  static constexpr index_t query_size(index_t dim) { return (dim + 1) / 2 * 2 * kTileRows; }
  static constexpr index_t key_size(index_t dim, index_t keys) { return (dim + 1) / 2 * 2 * keys; }

  static void pack_queries(const float* const* rows, index_t count, index_t element_stride, index_t dim,
                           float /*scale: in scores*/, bf16* to) {
    pack_queries_bf16(rows, count, element_stride, dim, to);
  }
  template <class Codec>
  static void pack_keys(const Codec& codec, const Segment& keys, index_t dim, index_t first, bf16* to) {
    pack_keys_bf16(codec, keys, dim, (dim + 1) / 2 * 2, first, to);
  }
  static void clear_values(bf16*, index_t, index_t, index_t, index_t) {}
  static constexpr bool keeps_apart(index_t, index_t) { return true; }

  static void scores(index_t rows, index_t begin, index_t end, const bf16* queries, const bf16* keys, index_t dim,
                     float scale, float* s) {
    const index_t pairs = (dim + 1) / 2;
    for (index_t column = begin / kPanel * kPanel; column < end; column += kPanel) {
      if (end - column > kLanes) {
        gemm_nt_bf16<kPanelVectors>(rows, queries, keys + column * pairs * 2, pairs, scale, s + column);
      } else {
        gemm_nt_bf16<1>(rows, queries, keys + column * pairs * 2, pairs, scale, s + column);
      }
    }
  }

  static void weigh(index_t rows, index_t begin, index_t end, float* weights, const bf16* values, index_t panel_stride,
                    index_t dim, const float* rescale, float* acc, index_t acc_stride) {
    for (index_t r = 0; r < rows; ++r) round_weights(weights + r * kScoreStride, begin, end);
    for (index_t d = 0; d < dim; d += kPanel, values += panel_stride) {
      if (dim - d > kLanes) {
        weigh_panel<kPanelVectors>(rows, begin, end, weights, values, rescale, acc + d, acc_stride);
      } else {
        weigh_panel<1>(rows, begin, end, weights, values, rescale, acc + d, acc_stride);
      }
    }
  }

  static void weigh_live(index_t begin, index_t end, const std::uint8_t* live, float* weights, const bf16* values,
                         index_t panel_stride, index_t dim, float rescale, float* acc) {
    round_weights(weights, begin, end);
    std::uint32_t keep[kMaxKeyTile / 2];
    live_pairs(begin, end, live, keep);
    const index_t first = begin / 2, pairs = (end + 1) / 2 - first;
    const bf16* const p = pairs_of(weights + first);
    values += 2 * first * kPanel;
    for (index_t d = 0; d < dim; d += kPanel, values += panel_stride) {
      if (dim - d > kLanes) {
        gemm_nn_bf16_tile<1, kPanelVectors, true>(p, values, keep + first, pairs, &rescale, acc + d, 0);
      } else {
        gemm_nn_bf16_tile<1, 1, true>(p, values, keep + first, pairs, &rescale, acc + d, 0);
      }
    }
  }

 private:
  // Half a pair may be a key that does not belong to the columns: those run masked, one pair at a time.
  template <int Vectors>
  static void weigh_panel(index_t rows, index_t begin, index_t end, const float* weights, const bf16* values,
                          const float* rescale, float* acc, index_t acc_stride) {
    FOVEA_ASSERT(begin < end);
    float unchanged[kTileRows];
    std::fill_n(unchanged, kTileRows, 1.f);
    const index_t first = (begin + 1) / 2, last = end / 2;
    if (begin % 2 != 0) {
      weigh_half<Vectors>(begin / 2, kHighHalf, weights, values, rescale, acc, acc_stride);
      rescale = unchanged;
    }
    if (first < last) {
      gemm_nn_bf16<Vectors>(rows, pairs_of(weights + first), values + 2 * first * kPanel, last - first, rescale, acc,
                            acc_stride);
      rescale = unchanged;
    }
    if (end % 2 != 0) weigh_half<Vectors>(end / 2, kLowHalf, weights, values, rescale, acc, acc_stride);
  }
  template <int Vectors>
  static void weigh_half(index_t pair, std::uint32_t half, const float* weights, const bf16* values, const float* rescale,
                         float* acc, index_t acc_stride) {
    gemm_nn_bf16_tile<kTileRows, Vectors, true>(pairs_of(weights + pair), values + 2 * pair * kPanel, &half, 1, rescale, acc,
                                                acc_stride);
  }
};

#if FOVEA_HAS_TILES

// For processes that have tile registers; a group is kTileStep rows.
struct TileBf16Panels : StoredBf16Panels {
  struct Session {
    explicit Session(bool packed) {
      if (packed) registers.emplace();
    }
    std::optional<TileRegisters> registers;
  };

  static constexpr index_t query_size(index_t dim) { return whole_tiles(dim) * kTileStep; }
  static constexpr index_t key_size(index_t dim, index_t keys) { return whole_tiles(dim) * keys; }

  static void pack_queries(const float* const* rows, index_t count, index_t element_stride, index_t dim,
                           float /*scale: in scores*/, bf16* to) {
    pack_query_rows(rows, count, element_stride, dim, to);
  }
  template <class Codec>
  static void pack_keys(const Codec& codec, const Segment& keys, index_t dim, index_t first, bf16* to) {
    pack_keys_bf16(codec, keys, dim, whole_tiles(dim), first, to);
  }
  // The rest of the blocks that begin and end lie in; half a pair is completed by pack_values.
  static void clear_values(bf16* to, index_t begin, index_t end, index_t dim, index_t panel_stride) {
    for (index_t d = 0; d < dim; d += kPanel, to += panel_stride) {
      std::fill(to + begin / kTileStep * kTileStep * kPanel, to + (begin + 1) / 2 * 2 * kPanel, bf16{});
      std::fill(to + end / 2 * 2 * kPanel, to + whole_tiles(end) * kPanel, bf16{});
    }
  }
  static constexpr bool keeps_apart(index_t begin, index_t end) { return begin % kTileStep == 0 && end % kTileStep == 0; }

  static void scores(index_t rows, index_t begin, index_t end, const bf16* queries, const bf16* keys, index_t dim,
                     float scale, float* s) {
    tile_scores(rows, begin, end, queries, keys, whole_tiles(dim), scale, s);
  }
  static void weigh(index_t rows, index_t begin, index_t end, float* weights, const bf16* values, index_t panel_stride,
                    index_t dim, const float* rescale, float* acc, index_t acc_stride) {
    for (index_t r = 0; r < rows; ++r) round_weights(weights + r * kScoreStride, begin, end);
    tile_weigh(rows, begin, end, pairs_of(weights), values, panel_stride, dim, rescale, acc, acc_stride);
  }
  static void weigh_live(index_t begin, index_t end, const std::uint8_t* live, float* weights, const bf16* values,
                         index_t panel_stride, index_t dim, float rescale, float* acc) {
    round_weights(weights, begin, end);
    std::uint32_t keep[kMaxKeyTile / 2] = {};
    live_pairs(begin, end, live, keep);
    tile_weigh_row(begin, end, pairs_of(weights), keep, values, panel_stride, dim, rescale, acc);
  }
};

// One of the two, for the whole process. A type of its own, because a call compiled for both would compile the engine twice.
struct Bf16Panels : StoredBf16Panels {
  using Dot = DotBf16Panels;
  using Tile = TileBf16Panels;

  struct Session : Tile::Session {
    explicit Session(bool packed) : Tile::Session(packed && tiles_allowed()) {}
  };

  static index_t query_size(index_t dim) { return tiles_allowed() ? Tile::query_size(dim) : Dot::query_size(dim); }
  static index_t key_size(index_t dim, index_t keys) {
    return tiles_allowed() ? Tile::key_size(dim, keys) : Dot::key_size(dim, keys);
  }

  static void pack_queries(const float* const* rows, index_t count, index_t element_stride, index_t dim, float scale,
                           bf16* to) {
    (tiles_allowed() ? &Tile::pack_queries : &Dot::pack_queries)(rows, count, element_stride, dim, scale, to);
  }
  template <class Codec>
  static void pack_keys(const Codec& codec, const Segment& keys, index_t dim, index_t first, bf16* to) {
    pack_keys_bf16(codec, keys, dim, key_size(dim, 1), first, to);
  }
  static void clear_values(bf16* to, index_t begin, index_t end, index_t dim, index_t panel_stride) {
    if (tiles_allowed()) Tile::clear_values(to, begin, end, dim, panel_stride);
  }
  static bool keeps_apart(index_t begin, index_t end) { return !tiles_allowed() || Tile::keeps_apart(begin, end); }

  static void scores(index_t rows, index_t begin, index_t end, const bf16* queries, const bf16* keys, index_t dim,
                     float scale, float* s) {
    (tiles_allowed() ? &Tile::scores : &Dot::scores)(rows, begin, end, queries, keys, dim, scale, s);
  }
  static void weigh(index_t rows, index_t begin, index_t end, float* weights, const bf16* values, index_t panel_stride,
                    index_t dim, const float* rescale, float* acc, index_t acc_stride) {
    (tiles_allowed() ? &Tile::weigh : &Dot::weigh)(rows, begin, end, weights, values, panel_stride, dim, rescale, acc,
                                                   acc_stride);
  }
  static void weigh_live(index_t begin, index_t end, const std::uint8_t* live, float* weights, const bf16* values,
                         index_t panel_stride, index_t dim, float rescale, float* acc) {
    (tiles_allowed() ? &Tile::weigh_live : &Dot::weigh_live)(begin, end, live, weights, values, panel_stride, dim, rescale,
                                                             acc);
  }
};

#else
using Bf16Panels = DotBf16Panels;
#endif

#endif

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
