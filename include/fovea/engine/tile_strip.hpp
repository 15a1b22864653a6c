// SPDX-License-Identifier: Apache-2.0
// The strip form: the scores of a few rows over all their keys at once, for whole-row functions. Same source, score and mask
// policies as the online form; workspace O(rows x len_k).
#pragma once
#include "tile_engine.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr index_t kStripRows = kStreamRows;

struct StripMemory {
  float* queries;   // [kStripRows, padded dim_qk]
  float* staging;   // [padded dim_qk]
  float* scores;    // [kStripRows, kScoreStride]
  float* strip;     // [kStripRows, padded len_k]
};

inline StripMemory carve_strip(Bump& bump, index_t dim_qk, index_t len_k) {
  StripMemory memory{};
  memory.queries = bump.take<float>(kStripRows * padded(dim_qk, kLanes));
  memory.staging = bump.take<float>(padded(dim_qk, kLanes));
  memory.scores = bump.take<float>(kStripRows * kScoreStride);
  memory.strip = bump.take<float>(kStripRows * padded(len_k, kLanes));
  return memory;
}

// whole_row(row, scores) gets the scores of every key of the row's sequence, -inf where masked, padded with -inf to whole
// vectors. At most kStripRows rows of one sequence and kv head a call.
template <KvSource Source, ScoreMod Score, Mask MaskPolicy, class WholeRow>
void run_strip(const Plan& plan, const Queries& queries, const Source& source, const Score& score, const MaskPolicy& mask,
               std::span<const Row> rows, const StripMemory& memory, const WholeRow& whole_row) {
  const index_t dim = plan.request.dim_qk, query_stride = padded(dim, kLanes);
  const index_t len_k = plan.sequences[static_cast<std::size_t>(rows.front().sequence)].len_k,
                stride = padded(len_k, kLanes);
  FOVEA_ASSERT(static_cast<index_t>(rows.size()) <= kStripRows);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    copy_query(query_of(plan, queries, rows[r], memory.staging), dim, queries.scale,
               memory.queries + static_cast<index_t>(r) * query_stride);
    std::fill_n(memory.strip + static_cast<index_t>(r) * stride, stride, -std::numeric_limits<float>::infinity());
  }
  const KeyRange hull = mask.hull(rows);
  const index_t end = std::min(hull.end, len_k);
  for (index_t begin = std::max<index_t>(hull.begin, 0) / kMaxKeyTile * kMaxKeyTile; begin < end; begin += kMaxKeyTile) {
    const Tile tile{rows, std::max(begin, hull.begin), std::min(begin + kMaxKeyTile, end)};
    const Cover cover = mask.cover(tile);
    if (cover == Cover::skip) continue;
    const auto run_from = [&](index_t key) { return source.run(tile.rows.front(), key, tile.k_end); };
    stream_group_scores(run_from, tile, begin, memory.queries, query_stride, dim, memory.scores);
    modify_scores(score, mask, cover, tile, begin, nullptr, memory.scores);
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const float* const from = memory.scores + static_cast<index_t>(r) * kScoreStride;
      std::copy(from + (tile.k_begin - begin), from + (tile.k_end - begin),
                memory.strip + static_cast<index_t>(r) * stride + tile.k_begin);
    }
  }
  for (std::size_t r = 0; r < rows.size(); ++r)
    whole_row(rows[r], std::span<float>(memory.strip + static_cast<index_t>(r) * stride, static_cast<std::size_t>(stride)));
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
