// SPDX-License-Identifier: Apache-2.0
// run_lane: THE exact loop. For a block of query rows that share a kv head:
//   1. list the rows, pack their queries (scale folded in), clear accumulators and states
//   2. for every key tile in reach:
//        pack K and V of the tile, once for all rows            (prefill; decode reads them in place)
//        for every group of rows that sees some of it:
//          S = Q K'                                             12 x 32 micro-tiles, 32 x 32 in AMX, or 4 rows x 4 keys
//          scores modified, masked on partial tiles only
//          per row: weights in place, the old sum shrinks by `rescale`
//          acc = rescale * acc + weights V
//   3. close the rows, or leave them as partials; the last task of a split block adds the partials up in key order
// Where a row's weights need all of its scores (sparsemax, entmax), step 2 runs twice: scores into a strip of whole rows, the
// strip's rows turned into weights, weights times V.
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
  const float*
      channel_scale;   // [kv_head, dim], of keys stored as bare codes; null without: s = (q * channel_scale) . codes
  index_t heads_per_scale = 1;   // q heads of a kv head
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
    const float* const scale = queries.channel_scale + row.q_head / queries.heads_per_scale * dim;
    for (index_t d = 0; d < dim; ++d) staging[d] *= scale[d];
  }
  return {staging, 1};
}

// Decode keeps whole rows, padded with zeros to whole vectors.
inline void copy_query(const QueryRow& from, index_t dim, float scale, float* to) {
  for (index_t d = 0; d < dim; d += kLanes) {
    const f32 part = from.element_stride == 1 && dim - d >= kLanes
                         ? load(from.data + d)
                         : load_strided(from.data + d * from.element_stride, from.element_stride, dim - d);
    store(to + d, part * f32(scale));
  }
}

// Scores of one row group against the keys of a tile, straight from storage, run_from(key) by run. Column 0 is key tile_begin.
template <class RunFrom>
FOVEA_INLINE void stream_group_scores(const RunFrom& run_from, const Tile& tile, index_t tile_begin, const float* queries,
                                      index_t query_stride, index_t dim, float* scores) {
  for (index_t key = tile.k_begin; key < tile.k_end;) {
    const Run run = run_from(key);
    run.kernels->k.scores(static_cast<index_t>(tile.rows.size()), queries, query_stride, run.k, dim,
                          scores + (key - tile_begin));
    key += run.k.count;
  }
}

// f(positions) where lanes stand next to each other, as most policies expect; else lane by lane, each at the start of a vector of
// neighbours.
template <class F>
FOVEA_INLINE f32 at_positions(const std::int32_t* positions, const F& f) {
  const i32 pos = i32::load_unaligned(positions);
  const i32 neighbours = lane_numbers() + i32(positions[0]);
  if (xsimd::all(pos == neighbours)) return f(neighbours, 0);
  alignas(f32) float each[kLanes];
  for (index_t n = 0; n < kLanes; ++n) {
    alignas(f32) float lanes[kLanes];
    store(lanes, f(lane_numbers() + i32(positions[n]), n));
    each[n] = lanes[0];
  }
  return load(each);
}

// Score modification and mask, lane by lane, over whole vectors; Everything: the tile is full. -inf fills up the run before begin
// and the vector behind end. `positions` are those of the tile's slots from tile_begin on, null where slots are positions.
template <class Score, class MaskPolicy>
void modify_lanes(const Score& score, const MaskPolicy& mask, const Tile& tile, index_t tile_begin,
                  const std::int32_t* positions, float* scores) {
  constexpr bool kModified = !std::is_same_v<Score, Identity>, kMasked = !std::is_same_v<MaskPolicy, Everything>;
  const f32 masked(-std::numeric_limits<float>::infinity());
  const index_t begin = tile.k_begin - tile_begin, end = tile.k_end - tile_begin;
  const index_t first = begin / kLanes * kLanes, last = padded(end, kLanes);
  const i32 numbers = lane_numbers() + i32(static_cast<std::int32_t>(tile_begin));
  for (std::size_t r = 0; r < tile.rows.size(); ++r) {
    float* const s = scores + static_cast<index_t>(r) * kScoreStride;
    if constexpr (kModified || kMasked) {
      const auto lane_score = score.at(tile.rows[r]);
      const auto lane_keep = mask.at(tile.rows[r]);
      const auto modify = [&](f32 value, i32 pos) {
        value = lane_score(value, pos);
        if constexpr (kMasked) value = select(lane_keep(pos), value, masked);
        return value;
      };
      if (positions == nullptr) {
        for (index_t j = first; j < last; j += kLanes)
          store(s + j, modify(load(s + j), numbers + i32(static_cast<std::int32_t>(j))));
      } else {
        for (index_t j = first; j < last; j += kLanes) {
          if constexpr (kTakesAnyPositions<decltype(lane_score)> && kTakesAnyPositions<decltype(lane_keep)>) {
            store(s + j, modify(load(s + j), i32::load_unaligned(positions + j)));
          } else {
            store(s + j, at_positions(positions + j, [&](i32 pos, index_t lane) {
                    return modify(lane == 0 ? load(s + j) : f32(s[j + lane]), pos);
                  }));
          }
        }
      }
    }
    std::fill(s + begin / kScoreRun * kScoreRun, s + begin, -std::numeric_limits<float>::infinity());
    std::fill(s + end, s + padded(end, kLanes), -std::numeric_limits<float>::infinity());
  }
}

template <class Score, class MaskPolicy>
FOVEA_INLINE void modify_scores(const Score& score, const MaskPolicy& mask, Cover cover, const Tile& tile,
                                index_t tile_begin, const std::int32_t* positions, float* scores) {
  visit_simplest(score, [&](const auto& simple_score) {
    if (cover == Cover::full) {
      modify_lanes(simple_score, Everything{}, tile, tile_begin, positions, scores);
    } else {
      visit_simplest(mask, [&](const auto& simple_mask) {
        modify_lanes(simple_score, simple_mask, tile, tile_begin, positions, scores);
      });
    }
  });
}

template <class Spec, class PanelType>
class TileRun {
 public:
  using Element = typename PanelType::Element;
  using State = typename RowState<decltype(Spec::norm)>::type;
  static constexpr bool kListed = ListedSource<decltype(Spec::source)>;
  static constexpr bool kOnline = Normalizer<decltype(Spec::norm)>;
  static_assert(check_policies<Spec>());
  static_assert(kGroupRows <= kMostGroupRows);
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
    list_rows_ = std::min(plan_.list_rows, block_->row_count);
    list_groups_ = (list_rows_ + group_rows_ - 1) / group_rows_;
    FOVEA_ASSERT((kOnline && !kTapped) || block_->splits == 1);
    FOVEA_ASSERT(list_rows_ == block_->row_count || (kOnline && packed() && block_->splits == 1));
    open_rows(task);
    if constexpr (kOnline) {
      visit_tiles([this](index_t g, const Tile& tile, index_t begin, Cover cover) { visit(g, tile, begin, cover); });
    } else {
      keep_scores();
      weigh_strip();
    }
    if (block_->splits == 1) {
      for (index_t g = 0; g < groups(); ++g)
        close_rows(rows_of(g), memory_.acc + g * group_rows_ * acc_stride(plan_), states_ + g * group_rows_);
    } else if constexpr (kOnline) {
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
  index_t list_rows_ = 0, list_groups_ = 0;            // a group never holds rows of two lists
  KeyRange reach_{};                                   // keys some row of the block may see in this task
  bool keys_packed_ = false, values_packed_ = false;   // of the key tile at hand
  bool values_finite_ = true;

  index_t dim_qk() const { return plan_.request.dim_qk; }
  index_t dim_v() const { return plan_.request.dim_v; }
  index_t groups() const {
    const index_t lists = block_->row_count / list_rows_, rest = block_->row_count - lists * list_rows_;
    return lists * list_groups_ + (rest + group_rows_ - 1) / group_rows_;
  }
  bool packed() const { return block_->regime != Regime::decode; }
  std::span<const Row> rows_of(index_t g) const {
    const index_t list = g / list_groups_, first = list * list_rows_ + (g - list * list_groups_) * group_rows_;
    const index_t end = std::min((list + 1) * list_rows_, block_->row_count);
    return {memory_.rows + first, static_cast<std::size_t>(std::min(group_rows_, end - first))};
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
    if constexpr (kOnline) {
      for (index_t g = 0; g < groups(); ++g) {
        const std::span<const Row> rows = rows_of(g);
        for (std::size_t r = 0; r < rows.size(); ++r)
          states_[g * group_rows_ + static_cast<index_t>(r)] = spec_.norm.begin(rows[r], false);
      }
    }
    // Packed kernels round the last group's rows up; the others touch the rows they are given, and one row is the usual case.
    const index_t cleared = packed() ? groups() * group_rows_ : block_->row_count;
    std::memset(memory_.acc, 0, static_cast<std::size_t>(cleared * acc_stride(plan_)) * sizeof(float));
    reach_ = {task.k_end, task.k_begin};
    for (index_t g = 0; g < groups(); ++g) {
      const std::span<const Row> rows = rows_of(g);
      const KeyRange hull = kListed ? KeyRange{task.k_begin, task.k_end} : spec_.mask.hull(rows);
      memory_.hulls[2 * g] = std::max(hull.begin, task.k_begin);
      memory_.hulls[2 * g + 1] = std::min(hull.end, task.k_end);
      if (memory_.hulls[2 * g] >= memory_.hulls[2 * g + 1]) continue;
      reach_ = {std::min(reach_.begin, memory_.hulls[2 * g]), std::max(reach_.end, memory_.hulls[2 * g + 1])};
      if (packed()) {
        if (g + 1 < groups()) fetch_queries(rows_of(g + 1));
        const float* from[kGroupRows] = {};
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

  // f(g, tile, tile_begin, cover) for every group of rows and the part of every key tile it may see, key tile by key tile.
  template <class F>
  FOVEA_INLINE void visit_tiles(const F& f) {
    const index_t size = plan_.key_tile_size;
    for (index_t begin = reach_.begin / size * size; begin < reach_.end; begin += size) {
      keys_packed_ = values_packed_ = !packed();
      KeyRange hull{0, 0};
      if constexpr (kListed) hull = find_positions(begin, std::min(begin + size, reach_.end));
      for (index_t g = 0; g < groups(); ++g) {
        const Tile tile{rows_of(g), std::max(begin, memory_.hulls[2 * g]), std::min(begin + size, memory_.hulls[2 * g + 1])};
        if (tile.k_begin >= tile.k_end) continue;
        if constexpr (RunMask<decltype(Spec::mask)>) {
          spec_.mask.visible(tile.rows, tile.k_begin, tile.k_end, [&](index_t from, index_t to) {
            const Tile run{tile.rows, from, to};
            const Cover cover = spec_.mask.cover(run);
            if (cover != Cover::skip) f(g, run, begin, cover);
          });
        } else {
          const Cover cover = spec_.mask.cover(kListed ? Tile{tile.rows, hull.begin, hull.end} : tile);
          if (cover != Cover::skip) f(g, tile, begin, cover);
        }
      }
    }
  }
  // Positions of the slots of a key tile, and the hull that masks are asked about.
  KeyRange find_positions(index_t begin, index_t end) const {
    spec_.source.positions(memory_.rows[0], begin, end, memory_.positions);
    std::int32_t low = memory_.positions[0], high = low;
    for (index_t n = 1; n < end - begin; ++n) {
      low = std::min(low, memory_.positions[n]);
      high = std::max(high, memory_.positions[n]);
    }
    return {low, index_t{high} + 1};
  }
  const std::int32_t* positions() const { return kListed ? memory_.positions : nullptr; }
  index_t position_of(index_t slot, index_t tile_begin) const {
    return kListed ? memory_.positions[slot - tile_begin] : slot;
  }
  FOVEA_INLINE Run run_from(const Tile& tile, index_t tile_begin, index_t key, Want want) const {
    if constexpr (kListed) {
      return spec_.source.run(tile.rows.front(), memory_.positions + (key - tile_begin), tile.k_end - key, want,
                              memory_.gathered);
    } else {
      return spec_.source.run(tile.rows.front(), key, tile.k_end);
    }
  }
  // All keys of the block in the key tile.
  Tile whole_tile(const Tile& tile, index_t tile_begin) const {
    return {tile.rows, std::max(tile_begin, reach_.begin), std::min(tile_begin + plan_.key_tile_size, reach_.end)};
  }

  // K transposed into panels, V copied into panels, once for all rows of the block.
  void pack_tile(const Tile& tile, index_t tile_begin, bool with_keys, bool with_values) {
    const index_t begin = tile.k_begin - tile_begin, end = tile.k_end - tile_begin;
    if (with_keys) {
      PanelType::clear_keys(keys(), dim_qk(), begin / kPanel * kPanel, begin);
      PanelType::clear_keys(keys(), dim_qk(), end, padded(end, kPanel));
    }
    if (with_values) {
      values_finite_ = true;
      PanelType::clear_values(values(), begin, end, dim_v(), value_panel());
    }
    for (index_t key = tile.k_begin; key < tile.k_end;) {
      const Run run = run_from(tile, tile_begin, key, !with_values ? Want::keys : with_keys ? Want::both : Want::values);
      const index_t column = key - tile_begin;
      if (with_keys) run.kernels->k.pack(run.k, dim_qk(), column, keys());
      if (with_values) {
        const bool finite = run.kernels->v.pack(run.v, dim_v(), column, values(), value_panel());
        values_finite_ = values_finite_ && finite;
      }
      key += run.k.count;
    }
    keys_packed_ = keys_packed_ || with_keys;
    values_packed_ = values_packed_ || with_values;
  }

  // The group's modified scores of the tile, in memory_.scores.
  void make_scores(index_t g, const Tile& tile, index_t tile_begin, Cover cover) {
    const index_t begin = tile.k_begin - tile_begin, end = tile.k_end - tile_begin;
    if (packed()) {
      PanelType::scores(static_cast<index_t>(tile.rows.size()), begin, end, packed_queries(g), keys(), dim_qk(),
                        queries_.scale, memory_.scores);
    } else {
      stream_group_scores([&](index_t key) { return run_from(tile, tile_begin, key, Want::keys); }, tile, tile_begin,
                          stored_queries(g), query_stride(plan_), dim_qk(), memory_.scores);
    }
    modify_scores(spec_.score, spec_.mask, cover, tile, tile_begin, positions(), memory_.scores);
  }

  // acc = rescale * acc + weights V, with the weights in memory_.scores.
  void weigh(index_t g, const Tile& tile, index_t tile_begin, Cover cover) {
    const bool apart = !packed() || PanelType::keeps_apart(tile.k_begin - tile_begin, tile.k_end - tile_begin);
    if ((!kOnline || cover == Cover::partial || !apart) && !finite_values(tile, tile_begin)) {
      if constexpr (kOnline) {
        note_live(tile, tile_begin, cover);
      } else {
        note_weighed(tile, tile_begin);
      }
      weigh_live(g, tile, tile_begin);
    } else if (packed()) {
      weigh_packed(g, static_cast<index_t>(tile.rows.size()), tile.k_begin - tile_begin, tile.k_end - tile_begin);
    } else {
      weigh_stored(g * group_rows_, static_cast<index_t>(tile.rows.size()), tile, tile_begin,
                   memory_.scores + (tile.k_begin - tile_begin), memory_.rescale);
    }
  }

  void watch(const Tile& tile, index_t tile_begin, const ScoreRows& weights, index_t first) {
    if constexpr (!std::is_same_v<decltype(Spec::tap), NoTap>) {
      for (index_t r = 0; r < weights.rows; ++r)
        spec_.tap.absorb(tile.rows[static_cast<std::size_t>(r)], tile_begin + first, weights.row(r), memory_.rescale[r]);
    }
  }

  void visit(index_t g, const Tile& tile, index_t tile_begin, Cover cover) {
    if (!keys_packed_) pack_tile(whole_tile(tile, tile_begin), tile_begin, true, true);
    make_scores(g, tile, tile_begin, cover);
    const index_t begin = tile.k_begin - tile_begin, end = tile.k_end - tile_begin, first = begin / kScoreRun * kScoreRun;
    const ScoreRows scores{memory_.scores + first, static_cast<index_t>(tile.rows.size()), padded(end, kLanes) - first};
    spec_.norm.absorb(states_ + g * group_rows_, scores, memory_.rescale);
    watch(tile, tile_begin, scores, first);
    weigh(g, tile, tile_begin, cover);
  }

  // The strip form. Row r of the strip holds the scores of the keys from the first key tile on, then the weights.
  index_t strip_begin() const { return reach_.begin / plan_.key_tile_size * plan_.key_tile_size; }
  index_t strip_count() const { return std::max<index_t>(padded(reach_.end, plan_.key_tile_size) - strip_begin(), 0); }
  float* strip_row(index_t r) const { return memory_.strip + r * plan_.strip_keys; }

  void keep_scores() {
    for (index_t r = 0; r < block_->row_count; ++r)
      std::fill_n(strip_row(r), strip_count(), -std::numeric_limits<float>::infinity());
    visit_tiles([this](index_t g, const Tile& tile, index_t tile_begin, Cover cover) {
      if (!keys_packed_) pack_tile(whole_tile(tile, tile_begin), tile_begin, true, false);
      make_scores(g, tile, tile_begin, cover);
      const index_t begin = tile.k_begin - tile_begin, end = tile.k_end - tile_begin;
      for (index_t r = 0; r < static_cast<index_t>(tile.rows.size()); ++r)
        std::copy(memory_.scores + r * kScoreStride + begin, memory_.scores + r * kScoreStride + end,
                  strip_row(g * group_rows_ + r) + (tile.k_begin - strip_begin()));
    });
    const auto count = static_cast<std::size_t>(strip_count());
    float* const scratch = strip_row(plan_.max_rows);
    for (index_t r = 0; r < block_->row_count; ++r)
      states_[r] = spec_.norm.weigh_row(memory_.rows[r], {strip_row(r), count}, {scratch, count});
  }

  // Key tiles that no row of a group gives weight are passed over without reading their values.
  void weigh_strip() {
    std::fill_n(memory_.rescale, group_rows_, 1.f);
    visit_tiles([this](index_t g, const Tile& tile, index_t tile_begin, Cover cover) {
      const index_t begin = tile.k_begin - tile_begin, end = tile.k_end - tile_begin, first = begin / kScoreRun * kScoreRun;
      const ScoreRows weights{memory_.scores + first, static_cast<index_t>(tile.rows.size()), padded(end, kLanes) - first};
      f32 sum(0.f);
      for (index_t r = 0; r < weights.rows; ++r) {
        const float* const from = strip_row(g * group_rows_ + r) + (tile_begin - strip_begin()) + first;
        for (index_t j = 0; j < weights.count; j += kLanes) {
          const f32 w = load(from + j);
          store(weights.data + r * kScoreStride + j, w);
          sum = sum + abs(w);
        }
      }
      if (reduce_add(sum) == 0.f) return;
      if (!values_packed_) pack_tile(whole_tile(tile, tile_begin), tile_begin, false, true);
      watch(tile, tile_begin, weights, first);
      weigh(g, tile, tile_begin, cover);
    });
  }

  void weigh_packed(index_t g, index_t rows, index_t begin, index_t end) {
    std::fill(memory_.rescale + rows, memory_.rescale + group_rows_, 1.f);   // the kernels round rows up
    PanelType::weigh(rows, begin, end, memory_.scores, values(), value_panel(), dim_v(), memory_.rescale,
                     memory_.acc + g * group_rows_ * acc_stride(plan_), acc_stride(plan_));
  }

  void weigh_stored(index_t first_row, index_t rows, const Tile& tile, index_t tile_begin, const float* weights,
                    const float* rescale) {
    float keep[kDecodeRows];
    std::fill_n(keep, kDecodeRows, 1.f);
    for (index_t key = tile.k_begin; key < tile.k_end;) {
      const Run run = run_from(tile, tile_begin, key, Want::values);
      run.kernels->v.weigh(rows, weights, run.v, dim_v(), rescale, memory_.acc + first_row * acc_stride(plan_),
                           acc_stride(plan_));
      key += run.v.count;
      weights += run.v.count;
      rescale = keep;
    }
  }

  // A weight of 0 times NaN or Inf is NaN, so where a partial tile holds such a V, or one whose ends the kernels round, masked keys
  // are stepped over instead of multiplied. The sums run in the same order, so finite rows keep their bits.
  bool finite_values(const Tile& tile, index_t tile_begin) const {
    if (packed()) return values_finite_;
    bool finite = true;
    for (index_t key = tile.k_begin; key < tile.k_end && finite;) {
      const Run run = run_from(tile, tile_begin, key, Want::values);
      finite = run.kernels->v.finite(run.v, dim_v());
      key += run.v.count;
    }
    return finite;
  }
  // Asks the mask, not the scores: a visible key may have a score of -inf.
  void note_live(const Tile& tile, index_t tile_begin, Cover cover) {
    for (std::size_t r = 0; r < tile.rows.size(); ++r) {
      if (cover == Cover::full) {
        std::fill_n(memory_.live + static_cast<index_t>(r) * kMaxKeyTile + (tile.k_begin - tile_begin),
                    tile.k_end - tile.k_begin, std::uint8_t{1});
        continue;
      }
      const auto keep = spec_.mask.at(tile.rows[r]);
      std::uint8_t* const live = memory_.live + static_cast<index_t>(r) * kMaxKeyTile;
      for (index_t j = tile.k_begin; j < tile.k_end; ++j) {
        alignas(f32) float lanes[kLanes];
        const i32 pos = lane_numbers() + i32(static_cast<std::int32_t>(position_of(j, tile_begin)));
        store(lanes, select(keep(pos), f32(1.f), f32(0.f)));
        live[j - tile_begin] = lanes[0] != 0.f;
      }
    }
  }
  // In the strip form a key without weight leaves no trace either: whether its tile is passed over depends on the row's neighbours.
  void note_weighed(const Tile& tile, index_t tile_begin) {
    for (std::size_t r = 0; r < tile.rows.size(); ++r) {
      const index_t row = static_cast<index_t>(r);
      for (index_t j = tile.k_begin - tile_begin; j < tile.k_end - tile_begin; ++j)
        memory_.live[row * kMaxKeyTile + j] = memory_.scores[row * kScoreStride + j] != 0.f;
    }
  }
  void weigh_live(index_t g, const Tile& tile, index_t tile_begin) {
    const float keep = 1.f;
    for (index_t r = 0; r < static_cast<index_t>(tile.rows.size()); ++r) {
      const std::uint8_t* const live = memory_.live + r * kMaxKeyTile;
      const float* rescale = memory_.rescale + r;
      if (packed()) {
        PanelType::weigh_live(tile.k_begin - tile_begin, tile.k_end - tile_begin, live, memory_.scores + r * kScoreStride,
                              values(), value_panel(), dim_v(), *rescale,
                              memory_.acc + (g * group_rows_ + r) * acc_stride(plan_));
        continue;
      }
      if (std::find(live + (tile.k_begin - tile_begin), live + (tile.k_end - tile_begin), 1) ==
          live + (tile.k_end - tile_begin)) {
        float* const acc = memory_.acc + (g * group_rows_ + r) * acc_stride(plan_);
        for (index_t d = 0; d < acc_stride(plan_) && *rescale != 1.f; d += kLanes)
          store(acc + d, load(acc + d) * f32(*rescale));
        continue;
      }
      for (index_t j = tile.k_begin; j < tile.k_end;) {
        if (!live[j - tile_begin]) {
          ++j;
          continue;
        }
        index_t end = j;
        while (end < tile.k_end && live[end - tile_begin]) ++end;
        weigh_stored(g * group_rows_ + r, 1, Tile{tile.rows, j, end}, tile_begin,
                     memory_.scores + r * kScoreStride + (j - tile_begin), rescale);
        rescale = &keep;
        j = end;
      }
    }
  }

  // A sink enters here, once per row, in the same arithmetic for split and unsplit rows.
  void close_rows(std::span<const Row> rows, float* acc, const State* states) {
    const index_t dim = dim_v();
    for (std::size_t r = 0; r < rows.size(); ++r, acc += acc_stride(plan_)) {
      Final end;
      if constexpr (kOnline) {
        State whole = spec_.norm.begin(rows[r], true);
        const float factor = spec_.norm.merge(whole, states[r])[1];
        if (factor != 1.f) {
          spec_.tap.absorb(rows[r], 0, {}, factor);
          for (index_t d = 0; d < dim; d += kLanes) store(acc + d, load(acc + d) * f32(factor));
        }
        end = spec_.norm.finish(whole);
      } else {
        end = states[r];
      }
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
    close_rows({memory_.rows, static_cast<std::size_t>(rows)}, memory_.acc, states_);
  }
};

// Draws tasks until none is left. Every lane of a run calls it once.
template <class PanelType, class Spec>
void run_tiles(const Plan& plan, const Queries& queries, const Spec& spec, const LaneMemory& memory,
               const SharedMemory& shared, std::atomic<index_t>& next) {
  [[maybe_unused]] const typename PanelType::Session session(plan.has_packed);
  TileRun<Spec, PanelType> run(plan, queries, spec, memory, shared);
  const auto count = static_cast<index_t>(plan.tasks.size());
  for (index_t task = next.fetch_add(1, std::memory_order_relaxed); task < count;
       task = next.fetch_add(1, std::memory_order_relaxed))
    run.run(plan.tasks[static_cast<std::size_t>(task)]);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
