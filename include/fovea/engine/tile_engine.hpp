// SPDX-License-Identifier: Apache-2.0
// run_lane: THE exact loop. For a block of query rows that share a kv head:
//   1. list the rows, pack their queries (scale folded in), clear accumulators and states
//   2. for every key tile in reach:
//        pack K and V of the tile, once for all rows            (prefill; decode reads them in place)
//        for every group of rows that sees some of it:
//          S = Q K'                                             12 x 32 micro-tiles, or 4 rows x 4 keys
//          scores modified, masked on partial tiles only
//          per row: weights in place, the old sum shrinks by `rescale`
//          acc = rescale * acc + weights V
//   3. close the rows, or leave them as partials; the last task of a split block adds the partials up in key order
// The loop knows concepts, never a mechanism, an option, a storage type or a thread.
#pragma once
#include <atomic>
#include <cstring>
#include <limits>

#include "../core/kv.hpp"
#include "../simd/numbers.hpp"
#include "plan.hpp"
#include "policies.hpp"
#include "tile_merge.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct Queries {
  Operand q;   // [batch, q_head, pos, dim]
  float scale;
  const float* channel_scale;   // [kv_head, dim], of keys stored as bare codes; null without: s = (q * channel_scale) . codes
};

// The rows of a block, in order, without a division per row.
inline void list_rows(const Plan& plan, const Block& block, Row* rows) {
  const Sequence& sequence = plan.sequences[static_cast<std::size_t>(block.sequence)];
  const index_t group = plan.group();
  index_t q_index = block.row_begin / group, member = block.row_begin % group;
  for (index_t r = 0; r < block.row_count; ++r) {
    rows[r] = {sequence.pos + q_index, q_index, block.sequence, static_cast<int>(block.kv_head * group + member),
               block.kv_head};
    if (++member == group) {
      member = 0;
      ++q_index;
    }
  }
}

// A query as floats: in place where it is stored so, else in `staging`.
struct QueryRow {
  const float* data;
  index_t element_stride;
};
FOVEA_INLINE QueryRow query_of(const Plan& plan, const Queries& queries, const Row& row, float* staging) {   // [dim]
  const Sequence& sequence = plan.sequences[static_cast<std::size_t>(row.sequence)];
  const Operand& q = queries.q;
  const index_t at =
      sequence.batch * q.stride[0] + row.q_head * q.stride[1] + (sequence.q_begin + row.q_index) * q.stride[2];
  const index_t dim = plan.request.dim_qk;
  if (q.format == Format::f32 && queries.channel_scale == nullptr)
    return {reinterpret_cast<const float*>(q.data) + at, q.stride[3]};
  read_numbers(q.format, q.data + at * row_bytes(q.format, 1), q.stride[3], dim, staging);
  if (queries.channel_scale != nullptr) {
    const float* const scale = queries.channel_scale + row.kv_head * dim;
    for (index_t d = 0; d < dim; ++d) staging[d] *= scale[d];
  }
  return {staging, 1};
}

// Decode keeps whole rows, padded with zeros to whole vectors.
inline void copy_query(const QueryRow& from, index_t dim, float scale, float* to) {
  for (index_t d = 0; d < dim; ++d) to[d] = from.data[d * from.element_stride] * scale;
  for (index_t d = dim; d < padded(dim, kLanes); ++d) to[d] = 0.f;
}

// Scores of one row group against the keys [begin, end) of a key tile, straight from storage. Column 0 is key tile_begin.
template <class Source>
FOVEA_INLINE void stream_group_scores(const Source& source, const Tile& tile, index_t tile_begin, const float* queries,
                                      index_t query_stride, index_t dim, float* scores) {
  for (index_t key = tile.k_begin; key < tile.k_end;) {
    const Run run = source.run(tile.rows.front(), key, tile.k_end);
    run.kernels->k.scores(static_cast<index_t>(tile.rows.size()), queries, query_stride, run.k, dim,
                          scores + (key - tile_begin));
    key += run.k.count;
  }
}

// Score modification and mask, lane by lane, over whole vectors. -inf fills up the run before
// begin and the vector behind end.
template <class Score, class MaskPolicy>
FOVEA_INLINE void modify_scores(const Score& score, const MaskPolicy& mask, Cover cover, const Tile& tile,
                                index_t tile_begin, float* scores) {
  constexpr bool kModified = !std::is_same_v<Score, Identity>;
  const f32 masked(-std::numeric_limits<float>::infinity());
  const index_t begin = tile.k_begin - tile_begin, end = tile.k_end - tile_begin;
  const index_t first = begin / kLanes * kLanes, last = padded(end, kLanes);
  const i32 numbers = lane_numbers();
  for (std::size_t r = 0; r < tile.rows.size(); ++r) {
    float* const s = scores + static_cast<index_t>(r) * kScoreStride;
    if (kModified || cover == Cover::partial) {
      const auto lane_score = score.at(tile.rows[r]);
      const auto lane_keep = mask.at(tile.rows[r]);
      for (index_t j = first; j < last; j += kLanes) {
        const i32 pos = numbers + i32(static_cast<std::int32_t>(tile_begin + j));
        f32 value = lane_score(load(s + j), pos);
        if (cover == Cover::partial) value = select(lane_keep(pos), value, masked);
        store(s + j, value);
      }
    }
    std::fill(s + begin / kScoreRun * kScoreRun, s + begin, -std::numeric_limits<float>::infinity());
    std::fill(s + end, s + padded(end, kLanes), -std::numeric_limits<float>::infinity());
  }
}

template <class Spec, class PanelType>
class TileRun {
 public:
  using Element = typename PanelType::Element;
  using State = typename decltype(Spec::norm)::State;
  static_assert(check_policies<Spec>());
  static_assert(sizeof(State) <= kStateBytes && std::is_trivially_copyable_v<State>);

  TileRun(const Plan& plan, const Queries& queries, const Spec& spec, const LaneMemory& memory, const SharedMemory& shared)
      : plan_(plan),
        queries_(queries),
        spec_(spec),
        memory_(memory),
        shared_(shared),
        states_(reinterpret_cast<State*>(memory.states)) {}

  void run(const Task& task) {
    [[maybe_unused]] constexpr bool kTapped = !std::is_same_v<decltype(Spec::tap), NoTap>;
    block_ = &plan_.blocks[static_cast<std::size_t>(task.block)];
    group_rows_ = plan_.group_rows(block_->regime);
    FOVEA_ASSERT(!kTapped || block_->splits == 1);
    open_rows(task);
    visit_tiles();
    if (block_->splits == 1) {
      close_rows(memory_.rows, memory_.acc, states_);
    } else {
      leave_partials(task);
    }
  }

 private:
  const Plan& plan_;
  const Queries& queries_;
  const Spec& spec_;
  const LaneMemory& memory_;
  const SharedMemory& shared_;
  State* const states_;
  const Block* block_ = nullptr;
  index_t group_rows_ = 0;
  KeyRange reach_{};   // keys some row of the block may see in this task
  bool values_finite_ = true;

  index_t dim_qk() const { return plan_.request.dim_qk; }
  index_t dim_v() const { return plan_.request.dim_v; }
  index_t groups() const { return (block_->row_count + group_rows_ - 1) / group_rows_; }
  bool packed() const { return block_->regime != Regime::decode; }
  std::span<const Row> rows_of(index_t g) const {
    const index_t first = g * group_rows_;
    return {memory_.rows + first, static_cast<std::size_t>(std::min(group_rows_, block_->row_count - first))};
  }
  float* stored_queries(index_t g) const { return memory_.queries + g * group_rows_ * query_stride(plan_); }
  Element* packed_queries(index_t g) const {
    return reinterpret_cast<Element*>(memory_.queries) + g * PanelType::query_size(dim_qk());
  }
  Element* keys() const { return reinterpret_cast<Element*>(memory_.keys); }
  Element* values() const { return reinterpret_cast<Element*>(memory_.values); }
  index_t value_panel() const { return plan_.key_tile_size * kPanel; }

  void open_rows(const Task& task) {
    list_rows(plan_, *block_, memory_.rows);
    for (index_t r = 0; r < block_->row_count; ++r) states_[r] = spec_.norm.begin(memory_.rows[r], false);
    // Packed kernels round the last group's rows up; the others touch the rows they are given, and one row is the usual case.
    const index_t cleared = packed() ? padded(block_->row_count, group_rows_) : block_->row_count;
    std::memset(memory_.acc, 0, static_cast<std::size_t>(cleared * acc_stride(plan_)) * sizeof(float));
    reach_ = {task.k_end, task.k_begin};
    for (index_t g = 0; g < groups(); ++g) {
      const std::span<const Row> rows = rows_of(g);
      const KeyRange hull = spec_.mask.hull(rows);
      memory_.hulls[2 * g] = std::max(hull.begin, task.k_begin);
      memory_.hulls[2 * g + 1] = std::min(hull.end, task.k_end);
      if (memory_.hulls[2 * g] >= memory_.hulls[2 * g + 1]) continue;
      reach_ = {std::min(reach_.begin, memory_.hulls[2 * g]), std::max(reach_.end, memory_.hulls[2 * g + 1])};
      if (packed()) {
        if (g + 1 < groups()) fetch_queries(rows_of(g + 1));
        const float* from[kTileRows] = {};
        index_t element_stride = 1;
        for (std::size_t r = 0; r < rows.size(); ++r) {
          const QueryRow row =
              query_of(plan_, queries_, rows[r], memory_.staging + static_cast<index_t>(r) * query_stride(plan_));
          from[r] = row.data;
          element_stride = row.element_stride;
        }
        PanelType::pack_queries(from, static_cast<index_t>(rows.size()), element_stride, dim_qk(), queries_.scale,
                                packed_queries(g));
      } else {
        for (std::size_t r = 0; r < rows.size(); ++r)
          copy_query(query_of(plan_, queries_, rows[r], memory_.staging), dim_qk(), queries_.scale,
                     stored_queries(g) + static_cast<index_t>(r) * query_stride(plan_));
      }
    }
  }

  // Rows of queries are short runs far apart: the hardware does not foresee the next one.
  void fetch_queries(std::span<const Row> rows) const {
    const Operand& q = queries_.q;
    const index_t number = row_bytes(q.format, 1);
    for (const Row& row : rows) {
      const Sequence& sequence = plan_.sequences[static_cast<std::size_t>(row.sequence)];
      const std::byte* const from = q.data + number * (sequence.batch * q.stride[0] + row.q_head * q.stride[1] +
                                                       (sequence.q_begin + row.q_index) * q.stride[2]);
      for (index_t at = 0; at < dim_qk() * number; at += 64) prefetch(from, at);
    }
  }

  void visit_tiles() {
    const index_t size = plan_.key_tile_size;
    for (index_t begin = reach_.begin / size * size; begin < reach_.end; begin += size) {
      bool loaded = !packed();
      for (index_t g = 0; g < groups(); ++g) {
        const Tile tile{rows_of(g), std::max(begin, memory_.hulls[2 * g]), std::min(begin + size, memory_.hulls[2 * g + 1])};
        if (tile.k_begin >= tile.k_end) continue;
        const Cover cover = spec_.mask.cover(tile);
        if (cover == Cover::skip) continue;
        if (!loaded) {
          pack_tile(Tile{tile.rows, std::max(begin, reach_.begin), std::min(begin + size, reach_.end)}, begin);
          loaded = true;
        }
        visit(g, tile, begin, cover);
      }
    }
  }

  // K transposed into panels, V copied into panels, once for all rows of the block.
  void pack_tile(const Tile& tile, index_t tile_begin) {
    const index_t begin = tile.k_begin - tile_begin, end = tile.k_end - tile_begin;
    PanelType::clear_keys(keys(), dim_qk(), begin / kPanel * kPanel, begin);
    PanelType::clear_keys(keys(), dim_qk(), end, padded(end, kPanel));
    values_finite_ = true;
    for (index_t key = tile.k_begin; key < tile.k_end;) {
      const Run run = spec_.source.run(tile.rows.front(), key, tile.k_end);
      const index_t column = key - tile_begin;
      run.kernels->k.pack(run.k, dim_qk(), column, keys());
      const bool finite = run.kernels->v.pack(run.v, dim_v(), column, values(), value_panel());
      values_finite_ = values_finite_ && finite;
      key += run.k.count;
    }
  }

  void visit(index_t g, const Tile& tile, index_t tile_begin, Cover cover) {
    const index_t rows = static_cast<index_t>(tile.rows.size());
    const index_t begin = tile.k_begin - tile_begin, end = tile.k_end - tile_begin;
    if (packed()) {
      PanelType::scores(rows, begin, end, packed_queries(g), keys(), dim_qk(), queries_.scale, memory_.scores);
    } else {
      stream_group_scores(spec_.source, tile, tile_begin, stored_queries(g), query_stride(plan_), dim_qk(), memory_.scores);
    }
    modify_scores(spec_.score, spec_.mask, cover, tile, tile_begin, memory_.scores);

    const bool some_masked = cover == Cover::partial && !finite_values(tile);
    if (some_masked) note_live(tile, tile_begin);
    const index_t first = begin / kScoreRun * kScoreRun;
    const ScoreRows scores{memory_.scores + first, rows, padded(end, kLanes) - first};
    spec_.norm.absorb(states_ + g * group_rows_, scores, memory_.rescale);
    if constexpr (!std::is_same_v<decltype(Spec::tap), NoTap>) {
      for (index_t r = 0; r < rows; ++r)
        spec_.tap.absorb(tile.rows[static_cast<std::size_t>(r)], tile_begin + first, scores.row(r), memory_.rescale[r]);
    }

    if (some_masked) {
      weigh_live(g, tile, tile_begin);
    } else if (packed()) {
      weigh_packed(g, rows, begin, end);
    } else {
      weigh_stored(g * group_rows_, rows, tile, memory_.scores + begin, memory_.rescale);
    }
  }

  void weigh_packed(index_t g, index_t rows, index_t begin, index_t end) {
    std::fill(memory_.rescale + rows, memory_.rescale + group_rows_, 1.f);   // the kernels round rows up
    PanelType::weigh(rows, begin, end, memory_.scores, values(), value_panel(), dim_v(), memory_.rescale,
                     memory_.acc + g * group_rows_ * acc_stride(plan_), acc_stride(plan_));
  }

  void weigh_stored(index_t first_row, index_t rows, const Tile& tile, const float* weights, const float* rescale) {
    const float keep[kGroupRows] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f};
    for (index_t key = tile.k_begin; key < tile.k_end;) {
      const Run run = spec_.source.run(tile.rows.front(), key, tile.k_end);
      run.kernels->v.weigh(rows, weights, run.v, dim_v(), rescale, memory_.acc + first_row * acc_stride(plan_),
                           acc_stride(plan_));
      key += run.v.count;
      weights += run.v.count;
      rescale = keep;
    }
  }

  // A weight of 0 times NaN or Inf is NaN, so where a partial tile holds such a V, masked keys are stepped over instead of
  // multiplied. The sums run in the same order, so finite rows keep their bits.
  bool finite_values(const Tile& tile) const {
    if (packed()) return values_finite_;
    bool finite = true;
    for (index_t key = tile.k_begin; key < tile.k_end && finite;) {
      const Run run = spec_.source.run(tile.rows.front(), key, tile.k_end);
      finite = run.kernels->v.finite(run.v, dim_v());
      key += run.v.count;
    }
    return finite;
  }
  // Asks the mask, not the scores: a visible key may have a score of -inf.
  void note_live(const Tile& tile, index_t tile_begin) {
    for (std::size_t r = 0; r < tile.rows.size(); ++r) {
      const auto keep = spec_.mask.at(tile.rows[r]);
      std::uint8_t* const live = memory_.live + static_cast<index_t>(r) * kMaxKeyTile;
      for (index_t j = tile.k_begin; j < tile.k_end; ++j) {
        alignas(f32) float lanes[kLanes];
        store(lanes, select(keep(lane_numbers() + i32(static_cast<std::int32_t>(j))), f32(1.f), f32(0.f)));
        live[j - tile_begin] = lanes[0] != 0.f;
      }
    }
  }
  void weigh_live(index_t g, const Tile& tile, index_t tile_begin) {
    const float keep = 1.f;
    for (index_t r = 0; r < static_cast<index_t>(tile.rows.size()); ++r) {
      const std::uint8_t* const live = memory_.live + r * kMaxKeyTile;
      const float* rescale = memory_.rescale + r;
      if (packed()) {
        PanelType::weigh_live(tile.k_begin - tile_begin, tile.k_end - tile_begin, live,
                              memory_.scores + r * kScoreStride, values(), value_panel(), dim_v(), *rescale,
                              memory_.acc + (g * group_rows_ + r) * acc_stride(plan_));
        continue;
      }
      for (index_t j = tile.k_begin; j < tile.k_end;) {
        if (!live[j - tile_begin]) {
          ++j;
          continue;
        }
        index_t end = j;
        while (end < tile.k_end && live[end - tile_begin]) ++end;
        weigh_stored(g * group_rows_ + r, 1, Tile{tile.rows, j, end}, memory_.scores + r * kScoreStride + (j - tile_begin),
                     rescale);
        rescale = &keep;
        j = end;
      }
    }
  }

  // A sink enters here, once per row, in the same arithmetic for split and unsplit rows.
  void close_rows(const Row* rows, float* acc, const State* states) {
    const index_t dim = dim_v();
    for (index_t r = 0; r < block_->row_count; ++r, acc += acc_stride(plan_)) {
      State whole = spec_.norm.begin(rows[r], true);
      const float factor = spec_.norm.merge(whole, states[r])[1];
      if (factor != 1.f) {
        for (index_t d = 0; d < dim; d += kLanes) store(acc + d, load(acc + d) * f32(factor));
      }
      const Final end = spec_.norm.finish(whole);
      spec_.tap.finish(rows[r], end);
      spec_.epilogue.store(rows[r], {acc, static_cast<std::size_t>(dim)}, end);
    }
  }

  void leave_partials(const Task& task) {
    const index_t rows = block_->row_count, stride = acc_stride(plan_);
    const index_t first = block_->first_partial + task.split * rows;
    std::memcpy(shared_.acc + first * stride, memory_.acc, static_cast<std::size_t>(rows * stride) * sizeof(float));
    std::memcpy(shared_.states + first * kStateBytes, states_, static_cast<std::size_t>(rows) * sizeof(State));
    std::atomic_ref<std::int32_t> open(shared_.open[task.block]);
    if (open.fetch_sub(1, std::memory_order_acq_rel) != 1) return;

    // This lane finished last and still holds the block's rows: add the partials up in key order, which no thread decides.
    std::memcpy(memory_.acc, shared_.acc + block_->first_partial * stride,
                static_cast<std::size_t>(rows * stride) * sizeof(float));
    std::memcpy(states_, shared_.states + block_->first_partial * kStateBytes,
                static_cast<std::size_t>(rows) * sizeof(State));
    for (index_t split = 1; split < block_->splits; ++split) {
      const index_t at = block_->first_partial + split * rows;
      const State* const others = reinterpret_cast<const State*>(shared_.states + at * kStateBytes);
      for (index_t r = 0; r < rows; ++r) {
        merge_row(spec_.norm, states_[r], memory_.acc + r * stride, others[r], shared_.acc + (at + r) * stride, dim_v());
      }
    }
    close_rows(memory_.rows, memory_.acc, states_);
  }
};

// Draws tasks until none is left. Every lane of a run calls it once.
template <class PanelType, class Spec>
void run_tiles(const Plan& plan, const Queries& queries, const Spec& spec, const LaneMemory& memory,
               const SharedMemory& shared, std::atomic<index_t>& next) {
  TileRun<Spec, PanelType> run(plan, queries, spec, memory, shared);
  const auto count = static_cast<index_t>(plan.tasks.size());
  for (index_t task = next.fetch_add(1, std::memory_order_relaxed); task < count;
       task = next.fetch_add(1, std::memory_order_relaxed))
    run.run(plan.tasks[static_cast<std::size_t>(task)]);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
