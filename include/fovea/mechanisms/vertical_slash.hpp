// SPDX-License-Identifier: Apache-2.0
// MInference's vertical-slash pattern (Jiang et al. 2024, arXiv 2407.02490): the weights of a prompt's last 64 queries say
// which columns (keys that everybody looks at) and which diagonals (distances that everybody looks back) a head needs; every
// other query attends to those only. The first 30 columns and the nearest 100 diagonals are always in.
#pragma once
#include <limits>

#include "../call/selection.hpp"
#include "../simd/select.hpp"

namespace fovea {
inline namespace v0 {

// How many columns and diagonals a head takes: the result of an offline search per head, 1000 and 6096 being typical. At
// least 30 columns and 50 diagonals are taken, at most all.
struct VerticalSlash {
  index_t verticals = 1000, slashes = 6096;
  std::span<const index_t> head_verticals = {};   // [q_head]  instead of the two above
  std::span<const index_t> head_slashes = {};     // [q_head]
};

inline namespace FOVEA_ARCH {

namespace vertical_slash {

inline constexpr index_t kLastQueries = 64, kBlock = 64;
inline constexpr index_t kForcedVerticals = 30, kForcedSlashes = 100, kLeastSlashes = 50;

// The diagonals from .. to, none of them farther than a block from the next: together they cover one run of keys.
struct Slashes {
  std::int32_t from, to;
};

// What the rows at positions m .. m + kBlock - 1 look at, before causality, in ascending order: range(begin, end) for what
// the diagonals cover, column(s) for the columns that they do not. Diagonal o covers the keys [e - kBlock, e), e = max(m +
// kBlock - o, kBlock), if o < m + kBlock. `groups` are sorted by distance.
template <class Range, class Column>
void walk_block(std::span<const std::int32_t> verticals, std::span<const Slashes> groups, index_t m, index_t len_k,
                const Range& range, const Column& column) {
  const index_t visible = std::min(m + kBlock, len_k);
  std::size_t v = 0;
  index_t begin = 0, end = 0;
  const auto close = [&] {
    for (; v < verticals.size() && verticals[v] < std::min(begin, visible); ++v) column(index_t{verticals[v]});
    while (v < verticals.size() && verticals[v] < end) ++v;
    if (begin < end) range(begin, end);
  };
  for (std::size_t n = groups.size(); n-- > 0;) {
    if (groups[n].from >= m + kBlock) continue;
    const index_t from = std::max<index_t>(m - groups[n].to, 0);
    const index_t to = std::min(std::max(m + kBlock - groups[n].from, kBlock), len_k);
    if (from >= to) break;
    if (from > end) {
      close();
      begin = from;
    }
    end = std::max(end, to);
  }
  close();
  for (; v < verticals.size() && verticals[v] < visible; ++v) column(index_t{verticals[v]});
}

// Sorted diagonals as groups; returns how many.
inline index_t group_slashes(std::span<const std::int32_t> slashes, Slashes* to) {
  index_t count = 0;
  for (const std::int32_t o : slashes) {
    if (count > 0 && o - to[count - 1].to <= kBlock) {
      to[count - 1].to = o;
    } else {
      to[count++] = {o, o};
    }
  }
  return count;
}

struct LaneMemory {
  float *query, *queries, *panels, *scores;
  float *vertical, *slash;   // [key], [diagonal]
  std::byte* top_k;
};

}   // namespace vertical_slash

// The lists of a call, and what they were made of. They stay valid until the next `select` and serve every call with the
// same lengths; the memory is kept.
class VerticalSlashLists {
 public:
  // Reads Q and K; of the options: lengths, positions, scale and the executor. They must be causal.
  template <class Compiled = AllFormats>
  Status select(const Operand& q, const Kv& kv, const VerticalSlash& rule = {}, const AttentionOptions& options = {});

  // Ranges and columns, one softmax over both: fovea::sparse_attention(q, kv, lists.lists(), out, options).
  std::span<const KeyLists> lists() const { return kinds_; }
  // Keys that the lists name / keys before the end of each block of queries.
  double share() const { return share_; }
  std::span<const std::int32_t> verticals(index_t sequence, index_t q_head) const {
    const Lines& lines = lines_[sequence * heads_ + q_head];
    return {lines.verticals, static_cast<std::size_t>(lines.vertical_count)};
  }
  std::span<const std::int32_t> slashes(index_t sequence, index_t q_head) const {
    const Lines& lines = lines_[sequence * heads_ + q_head];
    return {lines.slashes, static_cast<std::size_t>(lines.slash_count)};
  }

 private:
  struct Lines {
    std::int32_t *verticals, *slashes;
    vertical_slash::Slashes* groups;
    index_t vertical_count, slash_count, group_count;
  };

  void carve_lines(Bump& bump, const door::Selection& s, index_t verticals, index_t slashes);
  static vertical_slash::LaneMemory carve_lane(Bump& bump, const door::Selection& s);
  static void sum_lines(const door::Selection& s, index_t b, index_t head, float scale, const vertical_slash::LaneMemory& m);
  static index_t take(float* scores, index_t count, index_t wanted, index_t forced, std::int32_t* to, std::byte* scratch);
  template <class F>
  void for_each_block(const door::Selection& s, index_t task, const F& f) const;
  Status write_lists(const door::Selection& s, const Executor& executor);

  door::LocalBytes sequence_memory_, line_memory_, list_memory_, lane_memory_;
  Lines* lines_ = nullptr;    // [sequence, q_head]
  index_t* begins_[2] = {};   // [sequence, q_head, block] + 1, of ranges and of columns
  index_t heads_ = 0, blocks_ = 0;
  double share_ = 0;
  KeyLists kinds_[2];
};

// Lays out everything of which the size is known before the selection.
inline void VerticalSlashLists::carve_lines(Bump& bump, const door::Selection& s, index_t verticals, index_t slashes) {
  const index_t heads = s.sequences * s.shape.q_heads, lists = heads * blocks_;
  const index_t groups = std::min(slashes, s.last_pos / (vertical_slash::kBlock + 1) + 2);
  lines_ = bump.take<Lines>(heads);
  for (index_t*& begins : begins_) begins = bump.take<index_t>(lists + 1);
  auto* const vertical = bump.take<std::int32_t>(heads * verticals);
  auto* const slash = bump.take<std::int32_t>(heads * slashes);
  auto* const group = bump.take<vertical_slash::Slashes>(heads * groups);
  if (lines_ == nullptr) return;
  for (index_t n = 0; n < heads; ++n)
    new (lines_ + n) Lines{vertical + n * verticals, slash + n * slashes, group + n * groups, 0, 0, 0};
}

inline vertical_slash::LaneMemory VerticalSlashLists::carve_lane(Bump& bump, const door::Selection& s) {
  const index_t groups = (vertical_slash::kLastQueries + kTileRows - 1) / kTileRows, dim = s.shape.dim_qk;
  const index_t most = std::max(s.most_keys, s.last_pos + 1);
  return {bump.take<float>(kTileRows * dim),
          bump.take<float>(groups * F32Panels::query_size(dim)),
          bump.take<float>(F32Panels::key_size(dim, kMaxKeyTile)),
          bump.take<float>(kTileRows * kScoreStride),
          bump.take<float>(s.most_keys),
          bump.take<float>(s.last_pos + 1),
          bump.take<std::byte>(static_cast<index_t>(top_k_scratch_bytes(most, most)))};
}

// Column and diagonal sums of the weights of a sequence's last queries. Two passes over the keys, the row's maxima and sums
// first: 64 rows of scores of a long prompt do not fit a cache.
inline void VerticalSlashLists::sum_lines(const door::Selection& s, index_t b, index_t head, float scale,
                                          const vertical_slash::LaneMemory& m) {
  constexpr index_t kRows = vertical_slash::kLastQueries;
  const Sequence& sequence = s.sequence(b);
  const index_t dim = s.shape.dim_qk, rows = std::min(kRows, sequence.len_q), first = sequence.len_q - rows;
  const index_t last_pos = sequence.pos + sequence.len_q - 1, diagonals = std::max<index_t>(last_pos + 1, 0);
  const index_t keys = std::min(sequence.len_k, diagonals);
  std::fill_n(m.vertical, sequence.len_k, 0.f);
  std::fill_n(m.slash, diagonals, 0.f);
  for (index_t r = 0; r < rows; r += kTileRows) {
    const index_t here = std::min(kTileRows, rows - r);
    const float* pointers[kTileRows];
    for (index_t n = 0; n < here; ++n) {
      s.read_query(b, head, first + r + n, m.query + n * dim);
      pointers[n] = m.query + n * dim;
    }
    pack_queries(pointers, here, 1, dim, scale * kLog2e, m.queries + r / kTileRows * F32Panels::query_size(dim));
  }
  // f(row, its scores in units of ln 2, first key of the tile, how many of the keys it sees)
  const auto for_each_row = [&](const auto& f) {
    for (index_t key = 0; key < keys; key += kMaxKeyTile) {
      const index_t count = std::min(kMaxKeyTile, keys - key);
      s.pack_keys(b, head, key, 1, count, m.panels);
      for (index_t r = 0; r < rows; r += kTileRows) {
        const index_t here = std::min(kTileRows, rows - r);
        F32Panels::scores(here, 0, count, m.queries + r / kTileRows * F32Panels::query_size(dim), m.panels, dim, 1.f,
                          m.scores);
        for (index_t n = 0; n < here; ++n) {
          const index_t seen = std::min(count, sequence.pos + first + r + n + 1 - key);
          if (seen > 0) f(r + n, m.scores + n * kScoreStride, key, seen);
        }
      }
    }
  };
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  float top[kRows], sum[kRows];
  std::fill_n(top, kRows, kNothing);
  std::fill_n(sum, kRows, 0.f);
  for_each_row([&](index_t r, float* scores, index_t, index_t seen) {
    const index_t whole = padded(seen, kLanes);
    for (index_t j = seen; j < whole; ++j) scores[j] = kNothing;
    f32 best(top[r]);
    for (index_t j = 0; j < whole; j += kLanes) best = xsimd::max(best, load(scores + j));
    const float highest = reduce_max(best), base = highest == kNothing ? 0.f : highest;
    f32 weights(0.f);
    for (index_t j = 0; j < whole; j += kLanes) weights += exp2(load(scores + j) - f32(base));
    sum[r] = std::fma(sum[r], highest == top[r] ? 1.f : exp2(top[r] - base), reduce_add(weights));
    top[r] = highest;
  });
  // The diagonals of a row run against its keys; turned round while they are summed, so that both are added as vectors.
  for_each_row([&](index_t r, const float* scores, index_t key, index_t seen) {
    const f32 base(top[r]), share(sum[r] > 0.f ? 1.f / sum[r] : 0.f);
    float* const vertical = m.vertical + key;
    float* const slash = m.slash + (rows - 1 - r) + key;
    index_t j = 0;
    for (; j + kLanes <= seen; j += kLanes) {
      const f32 weight = exp2(load(scores + j) - base) * share;
      store(vertical + j, load(vertical + j) + weight);
      store(slash + j, load(slash + j) + weight);
    }
    if (j == seen) return;
    const f32 weight = exp2(load_some(scores + j, seen - j) - base) * share;
    store_some(vertical + j, load_some(vertical + j, seen - j) + weight, seen - j);
    store_some(slash + j, load_some(slash + j, seen - j) + weight, seen - j);
  });
  std::reverse(m.slash, m.slash + diagonals);
}

// The `wanted` best of the scores, the first `forced` of them before all others; their number.
inline index_t VerticalSlashLists::take(float* scores, index_t count, index_t wanted, index_t forced, std::int32_t* to,
                                        std::byte* scratch) {
  std::fill_n(scores, std::min(count, forced), std::numeric_limits<float>::infinity());
  const index_t k = std::min(wanted, count);
  return top_k({scores, static_cast<std::size_t>(count)}, k, to, {scratch, top_k_scratch_bytes(count, k)});
}

// f(list, its lines, position of the block's first query, queries in it, keys of the sequence) for the blocks of a head.
template <class F>
void VerticalSlashLists::for_each_block(const door::Selection& s, index_t task, const F& f) const {
  const Sequence& sequence = s.sequence(task / heads_);
  for (index_t block = 0; block * vertical_slash::kBlock < sequence.len_q; ++block) {
    const index_t first = block * vertical_slash::kBlock;
    f(task * blocks_ + block, lines_[task], sequence.pos + first, std::min(vertical_slash::kBlock, sequence.len_q - first),
      sequence.len_k);
  }
}

inline Status VerticalSlashLists::write_lists(const door::Selection& s, const Executor& executor) {
  const index_t tasks = s.sequences * heads_, lists = tasks * blocks_;
  using vertical_slash::walk_block;
  const auto lines_of = [](const Lines& lines, const auto& f) {
    f(std::span<const std::int32_t>(lines.verticals, static_cast<std::size_t>(lines.vertical_count)),
      std::span<const vertical_slash::Slashes>(lines.groups, static_cast<std::size_t>(lines.group_count)));
  };
  for (index_t* begins : begins_) std::fill_n(begins, lists + 1, index_t{0});
  deal(executor, executor.lanes(), tasks, [&](int, index_t task) {
    for_each_block(s, task, [&](index_t list, const Lines& lines, index_t m, index_t, index_t len_k) {
      lines_of(lines, [&](const auto& verticals, const auto& groups) {
        walk_block(
            verticals, groups, m, len_k, [&](index_t, index_t) { begins_[0][list] += 2; },
            [&](index_t) { ++begins_[1][list]; });
      });
    });
  });
  const index_t range_numbers = door::counts_to_begins(begins_[0], lists);
  const index_t columns = door::counts_to_begins(begins_[1], lists);
  std::int32_t* entries[2] = {};
  if (Status status = door::carve_local(list_memory_,
                                        [&](Bump& bump) {
                                          entries[0] = bump.take<std::int32_t>(range_numbers + 1);
                                          entries[1] = bump.take<std::int32_t>(columns + 1);
                                        });
      !status.ok())
    return status;
  deal(executor, executor.lanes(), tasks, [&](int, index_t task) {
    for_each_block(s, task, [&](index_t list, const Lines& lines, index_t m, index_t, index_t len_k) {
      std::int32_t *range = entries[0] + begins_[0][list], *column = entries[1] + begins_[1][list];
      lines_of(lines, [&](const auto& verticals, const auto& groups) {
        walk_block(
            verticals, groups, m, len_k,
            [&](index_t begin, index_t end) {
              *range++ = static_cast<std::int32_t>(begin);
              *range++ = static_cast<std::int32_t>(end);
            },
            [&](index_t key) { *column++ = static_cast<std::int32_t>(key); });
      });
    });
  });
  double named = 0, all = 0;
  for (index_t task = 0; task < tasks; ++task) {
    for_each_block(s, task, [&](index_t list, const Lines&, index_t m, index_t queries, index_t len_k) {
      const index_t visible = std::clamp<index_t>(m + queries, 0, len_k);
      index_t keys = begins_[1][list + 1] - begins_[1][list];
      for (index_t n = begins_[0][list]; n < begins_[0][list + 1]; n += 2)
        keys += std::max<index_t>(std::min<index_t>(entries[0][n + 1], visible) - entries[0][n], 0);
      named += static_cast<double>(std::min(keys, visible)) * static_cast<double>(queries);
      all += static_cast<double>(visible) * static_cast<double>(queries);
    });
  }
  share_ = all > 0 ? named / all : 0;
  for (int kind = 0; kind < 2; ++kind) {
    kinds_[kind] = {};
    kinds_[kind].entries = entries[kind];
    kinds_[kind].begin = {begins_[kind], static_cast<std::size_t>(lists) + 1};
    kinds_[kind].batch = s.sequences;
    kinds_[kind].heads = heads_;
    kinds_[kind].q_blocks = blocks_;
    kinds_[kind].q_block = vertical_slash::kBlock;
    kinds_[kind].ranges = kind == 0;
  }
  return {};
}

template <class Compiled>
Status VerticalSlashLists::select(const Operand& q, const Kv& kv, const VerticalSlash& rule,
                                  const AttentionOptions& options) {
  door::Selection s;
  if (Status status = door::open_selection<Compiled>(s, sequence_memory_, q, kv, options); !status.ok()) return status;
  if (options.causal == Causal::none)
    return door::invalid("fovea: vertical-slash needs causal options: its diagonals are distances to earlier keys");
  const auto heads = static_cast<std::size_t>(s.shape.q_heads);
  for (const std::span<const index_t> counts : {rule.head_verticals, rule.head_slashes}) {
    if (!counts.empty() && counts.size() != heads)
      return door::invalid("fovea: vertical-slash has counts for %zu heads, q has %zu", counts.size(), heads);
  }
  index_t most[2] = {0, 0};
  const auto count_of = [&](int kind, index_t head) {
    const std::span<const index_t> counts = kind == 0 ? rule.head_verticals : rule.head_slashes;
    const index_t wanted = !counts.empty() ? counts[static_cast<std::size_t>(head)]
                           : kind == 0     ? rule.verticals
                                           : rule.slashes;
    const index_t least = kind == 0 ? vertical_slash::kForcedVerticals : vertical_slash::kLeastSlashes;
    return std::clamp(wanted, std::min(least, kind == 0 ? s.most_keys : s.last_pos + 1),
                      kind == 0 ? s.most_keys : s.last_pos + 1);
  };
  for (index_t head = 0; head < s.shape.q_heads; ++head) {
    for (const int kind : {0, 1}) most[kind] = std::max(most[kind], count_of(kind, head));
  }
  heads_ = s.shape.q_heads;
  blocks_ = (s.longest + vertical_slash::kBlock - 1) / vertical_slash::kBlock;
  if (Status status = door::carve_local(line_memory_, [&](Bump& bump) { carve_lines(bump, s, most[0], most[1]); });
      !status.ok())
    return status;

  const index_t tasks = s.sequences * heads_;
  const float scale = scale_of(options, s.shape.dim_qk);
  const auto find_lines = [&](const vertical_slash::LaneMemory& memory, index_t task) {
    const index_t b = task / heads_, head = task % heads_;
    const Sequence& sequence = s.sequence(b);
    Lines& lines = lines_[task];
    if (sequence.len_q == 0) return;
    sum_lines(s, b, head, scale, memory);
    lines.vertical_count = take(memory.vertical, sequence.len_k, count_of(0, head), vertical_slash::kForcedVerticals,
                                lines.verticals, memory.top_k);
    lines.slash_count = take(memory.slash, std::max<index_t>(sequence.pos + sequence.len_q, 0), count_of(1, head),
                             vertical_slash::kForcedSlashes, lines.slashes, memory.top_k);
    lines.group_count =
        vertical_slash::group_slashes({lines.slashes, static_cast<std::size_t>(lines.slash_count)}, lines.groups);
  };
  const auto carve = [&](Bump& bump) { return carve_lane(bump, s); };
  if (Status status = door::deal_to_lanes(lane_memory_, options.executor, tasks, carve, find_lines); !status.ok())
    return status;
  return write_lists(s, options.executor);
}

namespace vertical_slash {

// Columns and diagonals as two calls, the results merged by their LSE. The ranges of the diagonals alone let the engine
// walk many lists at once (door::runs_together), which lists of single keys do not: 64 rows then pay for packing every
// key, 56 to 65 against 76 to 90 GFLOP/s. So a head's columns, 1000 of 32768 keys, are copied together, rows as they are
// stored; there the columns of a block are ranges too, between those that the diagonals cover, a quarter faster than a
// list of them. Copy and merge are 1 % of the time. The heads go in pieces, to bound the memory.
struct Apart : door::LocalBytes {
  struct Piece {
    index_t first, heads;
    index_t* begins[2];   // [sequence, head, block] + 1, of ranges and of runs of columns
    std::int32_t* entries[2];
    std::byte *k, *v;         // [sequence, head, column]
    float* channel_scale;     // [head, dim_qk]
    float *out[2], *lse[2];   // [batch, head, pos, dim_v], of columns and of diagonals
  };

  index_t most_bytes = index_t{64} << 20;   // of a piece, where one head is not more
  Plan plan;                                // its sequences only
  door::LocalBytes sequence_memory;
  door::Selection s;
  const VerticalSlashLists* lists = nullptr;
  index_t columns = 0;   // of the head that has most

  // Columns are moved, so nothing may ask where they stand. All of them lie before the block's queries, because the nearest
  // diagonal covers the block itself: causality asks nothing of them. What a mixed cache holds is stored in two ways.
  bool serves(const Operand& q, const Kv& kv, const AttentionOptions& options) {
    const KeyLists& ranges = lists->lists()[0];
    if (kv.exact != nullptr || !options.alibi_slopes.empty() || options.window.left >= 0 || options.window.right >= 0 ||
        options.bias || options.keep || !options.tree.empty() || lists->lists()[1].begin.back() == 0)
      return false;
    const AttentionShape shape = door::shape_of(q, kv, options);
    door::list_sequences(plan, shape, options);
    const PlanRequest request = door::request_of(door::listed_shape(shape, shape.q_heads), options);
    return door::runs_together({&ranges, 1}, request, kBlock, plan.sequences);
  }

  template <class Compiled>
  Status run(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options);

 private:
  // Heads of a piece: whole groups, or equal parts of one.
  index_t heads_of_piece(const Result& out) const;
  void carve(Bump& bump, Piece& p, const Result& out, const AttentionOptions& options) const;
  void count_entries(const Piece& p) const;
  void fill(const Piece& p, index_t b, index_t head) const;
  void merge_rows(const Piece& p, index_t b, index_t head, index_t block, const Result& out,
                  const View<float, 3>& lse) const;

  index_t k_row() const { return row_bytes(s.source.kv.k.format, s.shape.dim_qk); }
  index_t v_row() const { return row_bytes(s.source.kv.v.format, s.shape.dim_v); }
  index_t blocks() const { return lists->lists()[0].q_blocks; }
  index_t list_of(index_t b, index_t head) const { return (b * s.shape.q_heads + head) * blocks(); }
  KeyLists lists_of(const Piece& p, int kind) const {
    KeyLists made = lists->lists()[0];
    made.entries = p.entries[kind];
    made.begin = {p.begins[kind], static_cast<std::size_t>(s.sequences * p.heads * blocks()) + 1};
    made.heads = p.heads;
    return made;
  }
};

inline index_t Apart::heads_of_piece(const Result& out) const {
  const index_t rows = s.shape.batch * s.shape.len_q, results = out.format == Format::f32 ? 1 : 2;
  const index_t head = s.sequences * columns * (k_row() + v_row()) + results * rows * (s.shape.dim_v + 1) * 4;
  const index_t most = std::clamp<index_t>(most_bytes / std::max<index_t>(head, 1), 1, s.shape.q_heads);
  const index_t group = s.shape.q_heads / s.shape.kv_heads;
  if (most >= group) return most / group * group;
  index_t heads = most;
  while (group % heads != 0) --heads;
  return heads;
}

inline void Apart::carve(Bump& bump, Piece& p, const Result& out, const AttentionOptions& options) const {
  const index_t tasks = s.sequences * p.heads, rows = s.shape.batch * p.heads * s.shape.len_q;
  index_t numbers = 0;
  for (index_t b = 0; b < s.sequences; ++b) {
    const std::span<const index_t> begin = lists->lists()[0].begin;
    numbers += begin[static_cast<std::size_t>(list_of(b, p.first + p.heads))] -
               begin[static_cast<std::size_t>(list_of(b, p.first))];
  }
  // Between the ranges of a list, before and behind them: at most one run of columns more than there are ranges.
  const index_t entries[2] = {numbers, numbers + 2 * tasks * blocks()};
  for (const int kind : {0, 1}) {
    p.begins[kind] = bump.take<index_t>(tasks * blocks() + 1);
    p.entries[kind] = bump.take<std::int32_t>(entries[kind] + 1);
  }
  p.k = bump.take<std::byte>(tasks * columns * k_row());
  p.v = bump.take<std::byte>(tasks * columns * v_row());
  p.channel_scale = bump.take<float>(s.source.kv.k_channel_scale == nullptr ? 0 : p.heads * s.shape.dim_qk);
  p.out[0] = bump.take<float>(rows * s.shape.dim_v);
  p.lse[0] = bump.take<float>(rows);
  p.out[1] = bump.take<float>(out.format == Format::f32 ? 0 : rows * s.shape.dim_v);
  p.lse[1] = bump.take<float>(options.lse ? 0 : rows);
}

inline void Apart::count_entries(const Piece& p) const {
  const std::span<const index_t> begin = lists->lists()[0].begin;
  index_t list = 0, used = 0;
  const auto note = [&] {
    p.begins[0][list] = used;
    p.begins[1][list] = used + 2 * list;
  };
  for (index_t b = 0; b < s.sequences; ++b) {
    const auto first = static_cast<std::size_t>(list_of(b, p.first));
    for (std::size_t n = first; n < first + static_cast<std::size_t>(p.heads * blocks()); ++n, ++list) {
      note();
      used += begin[n + 1] - begin[n];
    }
  }
  note();
}

// The lists of a head, and its columns.
inline void Apart::fill(const Piece& p, index_t b, index_t head) const {
  const std::span<const std::int32_t> verticals = lists->verticals(b, p.first + head);
  const std::span<const KeyLists> all = lists->lists();
  for (index_t block = 0; block < blocks(); ++block) {
    const index_t list = (b * p.heads + head) * blocks() + block;
    const auto from = static_cast<std::size_t>(list_of(b, p.first + head) + block);
    std::copy(all[0].entries + all[0].begin[from], all[0].entries + all[0].begin[from + 1],
              p.entries[0] + p.begins[0][list]);
    std::int32_t* run = p.entries[1] + p.begins[1][list];
    std::int32_t at = 0, end = -1;   // place among the columns; behind the run at hand
    for (index_t n = all[1].begin[from]; n < all[1].begin[from + 1]; ++n, ++at) {
      while (verticals[static_cast<std::size_t>(at)] != all[1].entries[n]) ++at;
      if (at != end) {
        run += end < 0 ? 0 : 2;
        run[0] = at;
      }
      run[1] = end = at + 1;
    }
    std::fill(run + (end < 0 ? 0 : 2), p.entries[1] + p.begins[1][list + 1], -1);
  }
  const index_t kv_head = s.kv_head(p.first + head), first = (b * p.heads + head) * columns;
  const Row row{0, 0, static_cast<int>(b), static_cast<int>(p.first + head), static_cast<int>(kv_head)};
  for (std::size_t n = 0; n < verticals.size(); ++n) {
    const Run key = s.source.run(row, verticals[n], index_t{verticals[n]} + 1);
    const index_t to = first + static_cast<index_t>(n);
    std::memcpy(p.k + to * k_row(), key.k.data, static_cast<std::size_t>(k_row()));
    std::memcpy(p.v + to * v_row(), key.v.data, static_cast<std::size_t>(v_row()));
  }
  const float* const scale = s.source.kv.k_channel_scale;
  if (scale != nullptr && b == 0)
    std::copy_n(scale + kv_head * s.shape.dim_qk, s.shape.dim_qk, p.channel_scale + head * s.shape.dim_qk);
}

// `out` and `lse` hold the piece's heads only.
inline void Apart::merge_rows(const Piece& p, index_t b, index_t head, index_t block, const Result& out,
                              const View<float, 3>& lse) const {
  const Sequence& sequence = s.sequence(b);
  const index_t dim = s.shape.dim_v;
  for (index_t i = block * kBlock; i < std::min((block + 1) * kBlock, sequence.len_q); ++i) {
    const index_t pos = sequence.q_begin + i, row = (sequence.batch * p.heads + head) * s.shape.len_q + pos;
    const index_t at = sequence.batch * out.stride[0] + head * out.stride[1] + pos * out.stride[2];
    std::byte* const to = out.data + at * row_bytes(out.format, 1);
    float& row_lse = lse(sequence.batch, head, pos);
    if (out.format == Format::f32) {
      door::merge_row(reinterpret_cast<float*>(to), out.stride[3], row_lse, p.out[0] + row * dim, 1, p.lse[0][row], dim);
    } else {
      door::merge_row(p.out[1] + row * dim, 1, row_lse, p.out[0] + row * dim, 1, p.lse[0][row], dim);
      write_numbers(out.format, p.out[1] + row * dim, dim, to, out.stride[3]);
    }
  }
}

template <class Compiled>
Status Apart::run(const Operand& any_q, const Kv& any_kv, const Result& any_out, const AttentionOptions& options) {
  if (Status status = door::open_selection<Compiled>(s, sequence_memory, any_q, any_kv, options); !status.ok())
    return status;
  const Result all = door::tidy_operand(any_out);
  const index_t heads = s.shape.q_heads, group = heads / s.shape.kv_heads, dim = s.shape.dim_v;
  columns = 0;
  for (index_t task = 0; task < s.sequences * heads; ++task)
    columns = std::max(columns, static_cast<index_t>(lists->verticals(task / heads, task % heads).size()));
  const index_t step = heads_of_piece(all);
  for (index_t first = 0; first < heads; first += step) {
    Piece p{};
    p.first = first, p.heads = std::min(step, heads - first);
    if (Status status = door::carve_local(*this, [&](Bump& bump) { carve(bump, p, all, options); }); !status.ok())
      return status;
    const Executor& executor = options.executor;
    count_entries(p);
    deal(executor, executor.lanes(), s.sequences * p.heads, [&](int, index_t t) { fill(p, t / p.heads, t % p.heads); });

    Operand q = s.q;
    q.data += first * q.stride[1] * row_bytes(q.format, 1), q.extent[1] = p.heads;
    const auto partial = [&](float* numbers) { return Result(bhsd(numbers, s.shape.batch, p.heads, s.shape.len_q, dim)); };
    const auto lse_of = [&](float* numbers) {
      return View<float, 3>{numbers, {s.shape.batch, p.heads, s.shape.len_q}, {p.heads * s.shape.len_q, s.shape.len_q, 1}};
    };
    // Nothing of the caller's is written by this call: what the next would refuse, the workspace too, this one refuses.
    Kv kv;
    const auto stored = [&](const std::byte* rows, Format format, index_t row) {
      return Stored(rows, format, {p.heads * columns * row, columns * row, row});
    };
    kv.k = stored(p.k, s.source.kv.k.format, k_row());
    kv.v = stored(p.v, s.source.kv.v.format, v_row());
    kv.kv_heads = p.heads, kv.dim_qk = s.shape.dim_qk, kv.dim_v = dim;
    kv.batch = s.sequences, kv.len = columns;
    kv.k_channel_scale = s.source.kv.k_channel_scale == nullptr ? nullptr : p.channel_scale;
    AttentionOptions over = options;
    over.causal = Causal::none;
    over.q_offset = over.len_k = over.cu_len_k = {};
    over.sink = {};
    over.lse = lse_of(p.lse[0]);
    const KeyLists column_lists = lists_of(p, 1), range_lists = lists_of(p, 0);
    if (Status status = door::sparse<Compiled>(q, kv, {&column_lists, 1}, partial(p.out[0]), over); !status.ok())
      return status;

    Result out = all;
    out.data += first * out.stride[1] * row_bytes(out.format, 1), out.extent[1] = p.heads;
    kv = s.source.kv;
    kv.kv_heads = std::max<index_t>(p.heads / group, 1);
    kv.k.data += first / group * kv.k.stride[1];
    kv.v.data += first / group * kv.v.stride[1];
    if (kv.k_channel_scale != nullptr) kv.k_channel_scale += first / group * kv.dim_qk;
    over = options;
    if (!over.sink.empty())
      over.sink = over.sink.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(p.heads));
    if (over.lse) {
      over.lse.data += first * over.lse.stride[1], over.lse.extent[1] = p.heads;
    } else {
      over.lse = lse_of(p.lse[1]);
    }
    const Result to = out.format == Format::f32 ? out : partial(p.out[1]);
    if (Status status = door::sparse<Compiled>(q, kv, {&range_lists, 1}, to, over); !status.ok()) return status;
    const index_t lists_per_head = blocks();
    deal(executor, executor.lanes(), s.sequences * p.heads * lists_per_head, [&](int, index_t list) {
      const index_t task = list / lists_per_head;
      merge_rows(p, task / p.heads, task % p.heads, list % lists_per_head, out, over.lse);
    });
  }
  return {};
}

}   // namespace vertical_slash

// Attention of every query over its head's columns and diagonals. Softcap, ALiBi, sinks and masks of the options act in the
// attention, not in the selection; options.workspace serves the attention, the selection keeps memory of its own per thread,
// and so does a prompt whose columns and diagonals are two calls: up to 64 MiB, or one head's results if that is more.
template <class Compiled = AllFormats>
Status vertical_slash_attention(const Operand& q, const Kv& kv, const Result& out, const VerticalSlash& rule = {},
                                const AttentionOptions& options = {}) {
  struct Local : door::LocalBytes {
    VerticalSlashLists lists;
    vertical_slash::Apart apart;
  };
  return door::select_and_attend<Compiled, Local>(q, kv, out, rule, options, [&](Local& local) {
    local.apart.lists = &local.lists;
    if (local.apart.serves(q, kv, options)) return local.apart.template run<Compiled>(q, kv, out, options);
    return door::sparse<Compiled>(q, kv, local.lists.lists(), out, options);
  });
}
template <class TK, class TV>
Status vertical_slash_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                                const VerticalSlash& rule = {}, const AttentionOptions& options = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return vertical_slash_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, rule, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
