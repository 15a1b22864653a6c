// SPDX-License-Identifier: Apache-2.0
// Column statistics of the softmax weights: how much a few queries look at each key, and how far back they look. What H2O
// sums over time, SnapKV's observation window votes with and MInference finds its vertical and slash lines by.
//
// Two passes over the keys, both in chunks that are packed once for all queries of a kv head: the first leaves the LSE of
// every row, the second makes the weights again and adds them up. No more of the weights ever exists than one tile. A sum is
// made in the order of the queries and of the heads of a group, chunk by chunk at fixed places, so it does not depend on
// lanes, nor on what else is in the call.
#pragma once
#include "selection.hpp"

namespace fovea {
inline namespace v0 {

// What is written; either may be absent. With kv_heads along the head axis the q heads of a group are added up. Keys behind
// a sequence's last one get 0; distances beyond the extent, and those of keys behind their query, are counted nowhere.
struct ColumnSums {
  View<float, 3> keys = {};        // [sequence, q_head | kv_head, key]        sum over the queries of the weight of a key
  View<float, 3> distances = {};   // [sequence, q_head | kv_head, distance]   sum of the weights of the keys pos - distance
  bool add = false;                // to what stands there: H2O's running sums
};

inline namespace FOVEA_ARCH {

// The last `count` queries of every batch entry; with Causal::bottom_right they keep their positions.
inline Operand last_queries(Operand q, index_t count) {
  const index_t skipped = std::max<index_t>(q.extent[2] - count, 0);
  if (q.data != nullptr) q.data += skipped * q.stride[2] * row_bytes(q.format, 1);
  q.extent[2] -= skipped;
  return q;
}

// Sums over all queries of q. The options mean what they mean to fovea::attention, sinks included (their share of the weight
// falls on no key); LSE and bf16 panels are refused. Values are not read. Memory is the library's own, per thread: a chunk
// of packed keys per lane, and for the heads at work 8 bytes per row and chunk.
template <class Compiled = AllFormats>
Status column_sums(const Operand& q, const Kv& kv, const ColumnSums& sums, const AttentionOptions& options = {});

namespace columns {

inline constexpr index_t kChunk = 1024;   // keys that a task packs
static_assert(kChunk % kMaxKeyTile == 0);
inline constexpr std::size_t kWaveBytes = std::size_t{8} << 20;   // of partial results, for as many heads as that serves

struct ChunkMemory {
  float* keys;      // [panel, dim, kPanel] of a chunk
  float* queries;   // [dim, kTileRows]
  float* staging;   // [kTileRows, dim]
  float* scores;    // [kTileRows, kScoreStride]
  float* sums;      // [group, kChunk]
};
inline ChunkMemory carve_chunk(Bump& bump, index_t dim, index_t group) {
  return {bump.take<float>(dim * kChunk), bump.take<float>(dim * kTileRows), bump.take<float>(dim * kTileRows),
          bump.take<float>(kTileRows * kScoreStride), bump.take<float>(group * kChunk)};
}

// Of one kv head of one sequence, a unit.
struct UnitMemory {
  Softmax::State* states;   // [chunk, row]
  float* lse;               // [row]
  float* distances;         // [chunk, slot, reach]
};

class Summation {
 public:
  door::Selection call{};
  OptionScore score{};
  OptionMask mask{};
  Softmax norm{};
  ColumnSums sums{};
  float scale = 1.f;
  index_t chunks = 0, units = 0;   // of the longest sequence; in all
  std::byte* unit_memory = nullptr;
  std::size_t unit_bytes = 0;

  index_t group() const { return call.shape.q_heads / call.shape.kv_heads; }
  // A group's rows are one output or one each.
  bool per_q_head(const View<float, 3>& view) const { return view.extent[1] == call.shape.q_heads; }
  index_t slots(const View<float, 3>& view) const { return per_q_head(view) ? group() : 1; }
  index_t reach() const { return kChunk + call.longest - 1 + kLanes; }   // of the diagonals that cross a chunk

  UnitMemory carve_unit(Bump& bump) const {
    return {bump.take<Softmax::State>(chunks * group() * call.longest), bump.take<float>(group() * call.longest),
            sums.distances ? bump.take<float>(chunks * slots(sums.distances) * reach()) : nullptr};
  }

  // unit_in_wave: whose memory it has.
  void leave_states(const ChunkMemory& lane, index_t unit_in_wave, index_t unit, index_t chunk) const {
    const UnitMemory memory = memory_of(unit_in_wave);
    const index_t rows = rows_of(unit);
    Softmax::State* const states = memory.states + chunk * rows;
    for (index_t r = 0; r < rows; ++r) states[r] = norm.begin(Row{}, false);
    visit(lane, unit, chunk, [&](std::span<const Row>, index_t first_row, const ScoreRows& scores, index_t) {
      float rescale[kTileRows];
      norm.absorb(states + first_row, scores, rescale);
    });
  }

  void close_rows(index_t unit_in_wave, index_t unit) const {
    const UnitMemory memory = memory_of(unit_in_wave);
    const index_t rows = rows_of(unit);
    for (index_t r = 0; r < rows; ++r) {
      Softmax::State state = norm.begin(row_of(unit, r), true);
      for (index_t chunk = 0; chunk < chunks_of(unit); ++chunk)
        static_cast<void>(norm.merge(state, memory.states[chunk * rows + r]));
      memory.lse[r] = norm.finish(state).lse;
    }
    if (!sums.keys || sums.add) return;
    each_slot(unit, sums.keys, [&](index_t, index_t b, index_t head) {
      for (index_t key = sequence_of(unit).len_k; key < sums.keys.extent[2]; ++key) sums.keys(b, head, key) = 0.f;
    });
  }

  void add_weights(const ChunkMemory& lane, index_t unit_in_wave, index_t unit, index_t chunk) const {
    const UnitMemory memory = memory_of(unit_in_wave);
    const Sequence& sequence = sequence_of(unit);
    const index_t begin = chunk * kChunk, end = std::min(begin + kChunk, sequence.len_k);
    if (begin >= end) return;
    float* const diagonals = sums.distances ? memory.distances + chunk * slots(sums.distances) * reach() : nullptr;
    std::fill_n(lane.sums, group() * kChunk, 0.f);
    if (diagonals != nullptr) std::fill_n(diagonals, slots(sums.distances) * reach(), 0.f);
    const index_t first_head = kv_head_of(unit) * group();
    visit(lane, unit, chunk, [&](std::span<const Row> rows, index_t first_row, const ScoreRows& scores, index_t column) {
      for (std::size_t r = 0; r < rows.size(); ++r) {
        const float lse = memory.lse[first_row + static_cast<index_t>(r)];
        if (lse == -std::numeric_limits<float>::infinity()) continue;   // sees nothing
        const index_t member = rows[r].q_head - first_head;
        float* const by_key = lane.sums + (per_q_head(sums.keys) ? member : 0) * kChunk + column;
        float* const by_distance = diagonals == nullptr ? nullptr
                                                        : diagonals + (per_q_head(sums.distances) ? member : 0) * reach() +
                                                              column + sequence.len_q - 1 - rows[r].q_index;
        const float* const s = scores.row(static_cast<index_t>(r)).data();
        for (index_t j = 0; j < scores.count; j += kLanes) {
          const f32 weights = GivenLse::weight(load(s + j), f32(lse));
          store(by_key + j, load(by_key + j) + weights);
          if (by_distance != nullptr) store(by_distance + j, load(by_distance + j) + weights);
        }
      }
    });
    if (!sums.keys) return;
    each_slot(unit, sums.keys, [&](index_t slot, index_t b, index_t head) {
      for (index_t key = begin; key < end; ++key) {
        float& to = sums.keys(b, head, key);
        to = (sums.add ? to : 0.f) + lane.sums[slot * kChunk + key - begin];
      }
    });
  }

  // Number a of a chunk's diagonals is the distance of the last query to the chunk's first key, less a.
  void add_diagonals(index_t unit_in_wave, index_t unit) const {
    const UnitMemory memory = memory_of(unit_in_wave);
    const Sequence& sequence = sequence_of(unit);
    each_slot(unit, sums.distances, [&](index_t slot, index_t b, index_t head) {
      const auto to = [&](index_t distance) -> float& { return sums.distances(b, head, distance); };
      for (index_t distance = 0; !sums.add && distance < sums.distances.extent[2]; ++distance) to(distance) = 0.f;
      if (sequence.len_q == 0) return;
      for (index_t chunk = 0; chunk < chunks_of(unit); ++chunk) {
        const float* const from = memory.distances + (chunk * slots(sums.distances) + slot) * reach();
        const index_t keys = std::min(kChunk, sequence.len_k - chunk * kChunk);
        const index_t farthest = sequence.pos + sequence.len_q - 1 - chunk * kChunk;
        for (index_t a = 0; a < keys + sequence.len_q - 1; ++a) {
          if (const index_t distance = farthest - a; distance >= 0 && distance < sums.distances.extent[2])
            to(distance) += from[a];
        }
      }
    });
  }

  index_t chunks_of(index_t unit) const { return (sequence_of(unit).len_k + kChunk - 1) / kChunk; }

 private:
  index_t kv_head_of(index_t unit) const { return unit % call.shape.kv_heads; }
  const Sequence& sequence_of(index_t unit) const { return call.sequence(unit / call.shape.kv_heads); }
  index_t rows_of(index_t unit) const { return group() * sequence_of(unit).len_q; }
  UnitMemory memory_of(index_t unit_in_wave) const {
    Bump bump(unit_memory + unit_bytes * static_cast<std::size_t>(unit_in_wave));
    return carve_unit(bump);
  }
  // The heads of a group stand next to each other: they see the same keys.
  Row row_of(index_t unit, index_t r) const {
    const index_t q_index = r / group();
    return {sequence_of(unit).pos + q_index, q_index, static_cast<int>(unit / call.shape.kv_heads),
            static_cast<int>(kv_head_of(unit) * group() + r % group()), static_cast<int>(kv_head_of(unit))};
  }
  // f(slot, sequence, head of the view).
  template <class F>
  void each_slot(index_t unit, const View<float, 3>& view, const F& f) const {
    const index_t count = slots(view);
    for (index_t slot = 0; slot < count; ++slot) f(slot, unit / call.shape.kv_heads, kv_head_of(unit) * count + slot);
  }

  // f(rows, first row, masked scores, column of the chunk that they start at) for every group of rows and the keys it may
  // see.
  template <class F>
  void visit(const ChunkMemory& lane, index_t unit, index_t chunk, const F& f) const {
    const index_t dim = call.shape.dim_qk, rows = rows_of(unit), b = unit / call.shape.kv_heads;
    const index_t begin = chunk * kChunk, end = std::min(begin + kChunk, sequence_of(unit).len_k);
    bool packed = false;
    for (index_t first = 0; first < rows; first += kTileRows) {
      Row listed[kTileRows];
      const index_t count = std::min(kTileRows, rows - first);
      for (index_t r = 0; r < count; ++r) listed[r] = row_of(unit, first + r);
      const std::span<const Row> group_rows(listed, static_cast<std::size_t>(count));
      const KeyRange hull = mask.hull(group_rows);
      const KeyRange seen{std::max(hull.begin, begin), std::min(hull.end, end)};
      if (seen.begin >= seen.end) continue;
      if (!packed) call.pack_keys(b, kv_head_of(unit) * group(), begin, 1, end - begin, lane.keys);
      packed = true;
      pack_rows(lane, group_rows);
      for (index_t tile_begin = seen.begin / kMaxKeyTile * kMaxKeyTile; tile_begin < seen.end; tile_begin += kMaxKeyTile) {
        const Tile tile{group_rows, std::max(seen.begin, tile_begin), std::min(seen.end, tile_begin + kMaxKeyTile)};
        const Cover cover = mask.cover(tile);
        if (cover == Cover::skip) continue;
        const index_t from = tile.k_begin - tile_begin, to = tile.k_end - tile_begin;
        F32Panels::scores(count, from, to, lane.queries, lane.keys + (tile_begin - begin) * dim, dim, 1.f, lane.scores);
        modify_scores(score, mask, cover, tile, tile_begin, nullptr, lane.scores);
        const index_t run = from / kScoreRun * kScoreRun;
        f(group_rows, first, ScoreRows{lane.scores + run, count, padded(to, kLanes) - run}, tile_begin - begin + run);
      }
    }
  }
  void pack_rows(const ChunkMemory& lane, std::span<const Row> rows) const {
    const index_t dim = call.shape.dim_qk;
    const float* from[kTileRows] = {};
    for (std::size_t r = 0; r < rows.size(); ++r) {
      float* const to = lane.staging + static_cast<index_t>(r) * dim;
      call.read_query(rows[r].sequence, rows[r].q_head, rows[r].q_index, to);
      from[r] = to;
    }
    F32Panels::pack_queries(from, static_cast<index_t>(rows.size()), 1, dim, scale, lane.queries);
  }
};

inline Status check_sums(const char* name, const View<float, 3>& view, const door::Selection& call, index_t least,
                         door::Bytes& bytes) {
  bytes = {};
  if (!view) return {};
  if (Status s = door::check_data(name, view, bytes); !s.ok()) return s;
  const bool heads = view.extent[1] == call.shape.q_heads || view.extent[1] == call.shape.kv_heads;
  if (view.extent[0] != call.sequences || !heads || view.extent[2] < least)
    return door::invalid("fovea: %s is [%td, %td, %td], must be [%td, %td | %td, at least %td]", name, view.extent[0],
                         view.extent[1], view.extent[2], call.sequences, call.shape.q_heads, call.shape.kv_heads, least);
  if (!door::writes_apart(view)) return door::invalid("fovea: %s overlaps itself", name);
  return {};
}

inline Status check(const door::Selection& call, const ColumnSums& sums, const AttentionOptions& o) {
  using door::Bytes;
  if (o.lse || o.panels != Panels::f32)
    return door::unsupported("fovea: column sums come without an LSE (%s), from f32 panels (%s)",
                             o.lse ? "asked for" : "not asked for", o.panels == Panels::f32 ? "f32" : "bf16 asked for");
  Bytes key_bytes, distance_bytes, q_bytes, k_bytes;
  if (Status s = check_sums("keys", sums.keys, call, call.most_keys, key_bytes); !s.ok()) return s;
  if (Status s = check_sums("distances", sums.distances, call, 0, distance_bytes); !s.ok()) return s;
  if (Status s = door::check_data("q", call.q, q_bytes); !s.ok()) return s;
  const Kv& kv = call.source.kv;
  if (Status s = door::check_stored("k", kv, kv.k, kv.dim_qk, k_bytes); !s.ok()) return s;
  std::array<door::NamedBytes, 5> of_options;
  if (Status s = door::option_inputs(o, of_options); !s.ok()) return s;
  if (Status s = door::check_apart({"keys", key_bytes}, "distances", distance_bytes); !s.ok()) return s;
  for (const door::OutputBytes& output :
       {door::OutputBytes{"keys", key_bytes}, door::OutputBytes{"distances", distance_bytes}}) {
    if (Status s = door::check_apart(output, "q", q_bytes); !s.ok()) return s;
    if (Status s = door::check_apart(output, "k", k_bytes); !s.ok()) return s;
    for (const auto& [name, bytes] : of_options) {
      if (Status s = door::check_apart(output, name, bytes); !s.ok()) return s;
    }
  }
  return {};
}

struct Local : door::LocalBytes {
  door::LocalBytes sequences;
};

}   // namespace columns

template <class Compiled>
Status column_sums(const Operand& q, const Kv& kv, const ColumnSums& sums, const AttentionOptions& options) {
  using namespace columns;
  return door::with_memory<Local>([&](Local& local) -> Status {
    Summation work;
    if (Status s = door::open_selection<Compiled>(work.call, local.sequences, q, kv, options); !s.ok()) return s;
    work.sums = {tidy(sums.keys), tidy(sums.distances), sums.add};
    if (Status s = check(work.call, work.sums, options); !s.ok()) return s;
    const AttentionShape& shape = work.call.shape;
    const Sequence* const sequences = work.call.source.sequences;
    work.score = {{{options.softcap}, {options.alibi_slopes.empty() ? nullptr : options.alibi_slopes.data()}},
                  {tidy(options.bias)}};
    work.mask = {
        {reach_of(options)},
        {{options.tree.empty() ? nullptr : options.tree.data(), sequences}, {tidy(options.keep), tidy(options.bias)}}};
    work.norm = {options.sink.empty() ? nullptr : options.sink.data(), true};
    work.scale = scale_of(options, shape.dim_qk);
    work.chunks = (work.call.most_keys + kChunk - 1) / kChunk;
    work.units = work.call.sequences * shape.kv_heads;
    if (work.units == 0) return {};

    Bump unit, lane;
    work.carve_unit(unit);
    carve_chunk(lane, shape.dim_qk, work.group());
    work.unit_bytes = unit.used();
    const index_t wave =
        std::clamp<index_t>(static_cast<index_t>(kWaveBytes / std::max(unit.used(), std::size_t{1})), 1, work.units);
    const int lanes = static_cast<int>(std::clamp<index_t>(wave * work.chunks, 1, options.executor.lanes()));
    const std::size_t wanted =
        work.unit_bytes * static_cast<std::size_t>(wave) + lane.used() * static_cast<std::size_t>(lanes) + kAlignment;
    const std::span<std::byte> bytes = local.workspace(wanted);
    if (Status s = door::check_workspace(bytes, wanted); !s.ok()) return s;
    work.unit_memory = aligned(bytes).data();
    std::byte* const lane_memory = work.unit_memory + work.unit_bytes * static_cast<std::size_t>(wave);
    const auto memory_of = [&](int of) {
      Bump bump(lane_memory + lane.used() * static_cast<std::size_t>(of));
      return carve_chunk(bump, shape.dim_qk, work.group());
    };
    for (index_t first = 0; first < work.units; first += wave) {
      const index_t here = std::min(wave, work.units - first), tasks = here * work.chunks;
      const auto each_unit = [&](const auto& f) {
        deal(options.executor, lanes, here, [&](int, index_t n) { f(n, first + n); });
      };
      const auto each_chunk = [&](const auto& f) {
        deal(options.executor, lanes, tasks, [&](int of, index_t task) {
          const index_t n = task / work.chunks, chunk = task % work.chunks;
          if (chunk < work.chunks_of(first + n)) f(memory_of(of), n, first + n, chunk);
        });
      };
      each_chunk([&](const columns::ChunkMemory& m, index_t n, index_t of, index_t chunk) { work.leave_states(m, n, of, chunk); });
      each_unit([&](index_t n, index_t of) { work.close_rows(n, of); });
      each_chunk([&](const columns::ChunkMemory& m, index_t n, index_t of, index_t chunk) { work.add_weights(m, n, of, chunk); });
      if (work.sums.distances) each_unit([&](index_t n, index_t of) { work.add_diagonals(n, of); });
    }
    return {};
  });
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
