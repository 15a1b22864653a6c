// SPDX-License-Identifier: Apache-2.0
// DeepSeek Sparse Attention (DeepSeek-V3.2, eq. 1; also GLM-5): a lightning indexer scores every key for a query token,
//   I[t, s] = sum_h w[t, h] * max(q_I[t, h] . k_I[s], 0),   s <= t,
// the top-k of them (k = 2048) are the token's list, and absorbed MLA attends to the listed latents; all heads share the
// list. Steps of their own, because a list may outlive its layer (GLM-5's IndexShare): dsa_index_rows makes the indexer's
// queries and keys, dsa_select the lists, dsa_attention the output.
#pragma once
#include <cmath>
#include <limits>
#include <optional>

#include "../call/sparse_call.hpp"
#include "../engine/deal.hpp"
#include "../engine/parts/rope.hpp"
#include "../simd/hadamard.hpp"
#include "../simd/index_scores.hpp"
#include "../simd/select.hpp"

namespace fovea {
inline namespace v0 {

// The indexer's queries [batch, index head, pos, dim]: plain numbers, or e4m3 codes with a scale per vector. Without `scale`
// the scales are in the weights already, as in DeepGEMM's fp8_mqa_logits.
struct IndexQueries {
  Operand numbers;
  View<const fp8_e4m3, 4> codes{};
  View<const float, 3> scale{};   // [batch, index head, pos]

  FOVEA_DATA_INLINE IndexQueries(const Operand& plain) : numbers(plain) {}
  template <class T>
  FOVEA_DATA_INLINE IndexQueries(const View<T, 4>& plain) : numbers(plain) {}
  FOVEA_DATA_INLINE IndexQueries(const View<const fp8_e4m3, 4>& quantised, const View<const float, 3>& scales = {})
      : codes(quantised), scale(scales) {}
};

struct DsaRule {
  IndexRounding round_queries =
      IndexRounding::none;                  // plain queries through e4m3 first, as the published model does (ue8m0)
  std::optional<float> weight_scale = {};   // multiplies the head weights; 1 / sqrt(index heads * dim) if absent
};

// How a projected row becomes an index query or key. Keys are normalised, queries are not.
struct DsaIndexRows {
  std::span<const float> norm_weight = {}, norm_bias = {};   // [dim]  LayerNorm; empty: none
  float norm_eps = 1e-6f;
  const RopeTable* rope = nullptr;   // turns the first 2 * pairs numbers (64 of 128); MLA turns the last ones
  RopePositions positions = {};
  RopeLayout layout = RopeLayout::half_split;   // the first release turned interleaved pairs here: wrong for its weights
  bool hadamard = true;                         // GLM-5: false
};

// Token lists [batch, pos, k], innermost stride 1 and dense, as the lists of a call.
FOVEA_DATA_INLINE KeyLists dsa_key_lists(const View<const std::int32_t, 3>& lists) {
  KeyLists of;
  of.entries = lists.data;
  of.batch = lists.extent[0];
  of.q_blocks = lists.extent[1];
  of.capacity = lists.extent[2];
  return of;
}

inline namespace FOVEA_ARCH {

namespace dsa {

inline constexpr index_t kSpan = 1024;                     // keys of one task; whole panels
inline constexpr index_t kTileQueries = 8;                 // queries that share a panel of keys ...
inline constexpr index_t kScoreBytes = index_t{1} << 20;   // ... as long as their rows of scores stay in L2
static_assert(kSpan % kPanel == 0);

// What a call is, apart from its data.
struct Shape {
  AttentionShape attention;           // one kv head, dims of the indexer
  index_t tile, units, spans, wave;   // queries of a unit, units, tasks of a unit, units that are worked on at once
  index_t score_stride;               // floats of a row of scores
  index_t query_floats;               // a packed query
  index_t top_k_bytes;                // scratch of a lane
  int lanes;
};

inline index_t units_of_sequence(const Shape& shape) { return (shape.attention.len_q + shape.tile - 1) / shape.tile; }

inline Shape shape_of(const AttentionShape& a, const AttentionOptions& options) {
  Shape s{};
  s.attention = a;
  s.score_stride = (a.len_k + kPanel - 1) / kPanel * kPanel;
  const index_t held = kScoreBytes / static_cast<index_t>(sizeof(float)) / std::max<index_t>(s.score_stride, 1);
  s.tile = std::clamp<index_t>(std::min(held, a.len_q), 1, kTileQueries);
  s.units = a.batch * units_of_sequence(s);
  s.spans = (a.len_k + kSpan - 1) / kSpan;
  const index_t tasks = s.units * std::max(s.spans, s.tile);
  s.lanes = static_cast<int>(std::clamp<index_t>(tasks, 1, options.executor.lanes()));
  s.wave = std::min<index_t>(s.lanes, s.units);
  s.query_floats = index_tiles(a.q_heads) * kTileRows * a.dim_qk;
  return s;
}

inline index_t padded(index_t numbers) { return (numbers + kLanes - 1) / kLanes * kLanes; }

// One lane's part of the workspace.
struct LaneMemory {
  float* rows;    // [heads, padded dim]  a query's numbers
  float* panel;   // [dim, kPanel]
  float* scale;   // [kPanel]
  std::byte* codes;
  TopKScratch top_k;
};
struct Memory {
  float* queries;   // [unit of the wave, query, tile, dim, kTileRows]
  float* weights;   // [unit of the wave, query, index head]
  float* scores;    // [unit of the wave, query, key]
};

inline Memory carve(Bump& bump, const Shape& s) {
  const index_t queries = s.wave * s.tile;
  return {bump.take<float>(queries * s.query_floats), bump.take<float>(queries * s.attention.q_heads),
          bump.take<float>(queries * s.score_stride)};
}
inline LaneMemory carve_lane(Bump& bump, const Shape& s) {
  const index_t dim = s.attention.dim_qk;
  return {bump.take<float>(s.attention.q_heads * padded(dim)),
          bump.take<float>(dim * kPanel),
          bump.take<float>(kPanel),
          bump.take<std::byte>(padded(dim)),
          {bump.take<std::byte>(s.top_k_bytes), static_cast<std::size_t>(s.top_k_bytes)}};
}

struct Inputs {
  const IndexQueries& q;
  const View<const float, 3>& weights;
  const IndexKeys& keys;
  const AttentionOptions& options;
  const DsaRule& rule;
};

// The queries of a unit, and which keys each of them may see.
struct Unit {
  index_t sequence, first, count;
};
inline Unit unit_of(const Shape& s, index_t unit) {
  const index_t own = units_of_sequence(s), sequence = unit / own, first = (unit - sequence * own) * s.tile;
  return {sequence, first, std::min(s.tile, s.attention.len_q - first)};
}
struct Visible {
  index_t begin, end;
};
inline Visible visible_to(const Shape& s, const Inputs& in, index_t sequence, index_t query) {
  const Sequence of = door::sequence_of(s.attention, in.options, sequence);
  const Reach reach = reach_of(in.options);
  const index_t pos = of.pos + query;
  const index_t end = std::clamp<index_t>(pos + reach.right + 1, 0, of.len_k);
  return {std::clamp<index_t>(pos - reach.left, 0, end), end};
}

// The scratch of the row that wants most of it: not always the longest one.
inline index_t top_k_bytes(const Shape& s, const Inputs& in, index_t k) {
  std::size_t most = 0;
  for (index_t b = 0; b < s.attention.batch; ++b) {
    for (index_t i = 0; i < s.attention.len_q; ++i) {
      const Visible seen = visible_to(s, in, b, i);
      most = std::max(most, top_k_scratch_bytes(seen.end - seen.begin, k));
    }
  }
  return static_cast<index_t>(most);
}

// Query `query` of a unit into the shape of the kernel: numbers, packed; weights with every factor that is not the key's.
inline void pack_query(const Shape& s, const Inputs& in, const LaneMemory& lane, const Unit& unit, index_t query, float* to,
                       float* weights) {
  const index_t heads = s.attention.q_heads, dim = s.attention.dim_qk, stride = padded(dim), i = unit.first + query;
  const float factor =
      in.rule.weight_scale ? *in.rule.weight_scale : static_cast<float>(1 / std::sqrt(static_cast<double>(heads * dim)));
  for (index_t h = 0; h < heads; ++h) {
    float* const row = lane.rows + h * stride;
    float scale = 1;
    if (in.q.codes) {
      const auto& codes = in.q.codes;
      const fp8_e4m3* const from = codes.data + unit.sequence * codes.stride[0] + h * codes.stride[1] + i * codes.stride[2];
      for (index_t d = 0; d < dim; ++d) lane.codes[d] = static_cast<std::byte>(from[d * codes.stride[3]].bits);
      read_codes(lane.codes, dim, row);
      if (in.q.scale) scale = in.q.scale(unit.sequence, h, i);
    } else {
      const Operand& q = in.q.numbers;
      const index_t at = unit.sequence * q.stride[0] + h * q.stride[1] + i * q.stride[2];
      read_numbers(q.format, q.data + at * row_bytes(q.format, 1), q.stride[3], dim, row);
      if (in.rule.round_queries != IndexRounding::none) {
        scale = quantise_index_row(row, dim, in.rule.round_queries, lane.codes);
        read_codes(lane.codes, dim, row);
      }
    }
    weights[h] = in.weights(unit.sequence, h, i) * factor * scale;
  }
  pack_index_query(lane.rows, stride, heads, dim, to);
}

// Scores of the keys of a span for all queries of a unit that see any of them.
inline void score_span(const Shape& s, const Inputs& in, const LaneMemory& lane, const Unit& unit, index_t span,
                       const float* queries, const float* weights, float* scores) {
  Visible seen[kTileQueries];
  index_t begin = s.attention.len_k, end = 0;
  for (index_t i = 0; i < unit.count; ++i) {
    seen[i] = visible_to(s, in, unit.sequence, unit.first + i);
    if (seen[i].begin == seen[i].end) continue;
    begin = std::min(begin, seen[i].begin);
    end = std::max(end, seen[i].end);
  }
  const index_t span_end = std::min(end, (span + 1) * kSpan);
  for (index_t key = std::max(span * kSpan, begin / kPanel * kPanel); key < span_end; key += kPanel) {
    pack_index_panel(in.keys, unit.sequence, key, std::min(kPanel, end - key), lane.panel, lane.scale);
    for (index_t i = 0; i < unit.count; ++i) {
      if (seen[i].begin >= key + kPanel || seen[i].end <= key) continue;
      score_index_panel(queries + i * s.query_floats, s.attention.q_heads, weights + i * s.attention.q_heads, lane.panel,
                        lane.scale, s.attention.dim_qk, scores + i * s.score_stride + key);
    }
  }
}

// finish(lane, sequence, query, visible, scores) for every query, its visible scores in place.
template <class Finish>
void for_each_row(const Shape& s, const Inputs& in, const Memory& memory, const LaneMemory* lanes, const Finish& finish) {
  const Executor& executor = in.options.executor;
  for (index_t first = 0; first < s.units; first += s.wave) {
    const index_t count = std::min(s.wave, s.units - first), heads = s.attention.q_heads;
    const auto queries_of = [&](index_t unit) { return memory.queries + unit * s.tile * s.query_floats; };
    const auto weights_of = [&](index_t unit) { return memory.weights + unit * s.tile * heads; };
    const auto scores_of = [&](index_t unit) { return memory.scores + unit * s.tile * s.score_stride; };
    deal(executor, s.lanes, count * s.tile, [&](int lane, index_t task) {
      const index_t unit = task / s.tile, query = task - unit * s.tile;
      const Unit of = unit_of(s, first + unit);
      if (query < of.count)
        pack_query(s, in, lanes[lane], of, query, queries_of(unit) + query * s.query_floats,
                   weights_of(unit) + query * heads);
    });
    deal(executor, s.lanes, count * s.spans, [&](int lane, index_t task) {
      const index_t unit = task / s.spans, span = task - unit * s.spans;
      score_span(s, in, lanes[lane], unit_of(s, first + unit), span, queries_of(unit), weights_of(unit), scores_of(unit));
    });
    deal(executor, s.lanes, count * s.tile, [&](int lane, index_t task) {
      const index_t unit = task / s.tile, query = task - unit * s.tile;
      const Unit of = unit_of(s, first + unit);
      if (query >= of.count) return;
      const Visible seen = visible_to(s, in, of.sequence, of.first + query);
      finish(lanes[lane], of.sequence, of.first + query, seen, scores_of(unit) + query * s.score_stride);
    });
  }
}

struct Local : door::LocalBytes {};

template <class Finish>
Status run(const Shape& s, const Inputs& in, const Finish& finish) {
  const auto carve_all = [&](Bump& bump, Memory& memory) {
    memory = carve(bump, s);
    return bump.take<LaneMemory>(s.lanes);
  };
  Bump counting;
  Memory memory{};
  static_cast<void>(carve_all(counting, memory));
  for (int lane = 0; lane < s.lanes; ++lane) static_cast<void>(carve_lane(counting, s));
  const auto work = [&](std::span<std::byte> workspace) {
    const std::span<std::byte> bytes = aligned(workspace);
    if (Status status = door::check_workspace(bytes, counting.used()); !status.ok()) return status;
    Bump bump(bytes.data());
    LaneMemory* const lanes = carve_all(bump, memory);
    for (int lane = 0; lane < s.lanes; ++lane) lanes[lane] = carve_lane(bump, s);
    for_each_row(s, in, memory, lanes, finish);
    return Status{};
  };
  if (!in.options.workspace.empty()) return work(in.options.workspace);
  return door::with_memory<Local>([&](Local& local) { return work(local.workspace(counting.used() + kAlignment)); });
}

inline Status check_keys(const IndexKeys& keys) {
  if (keys.format != Format::e4m3 && !is_plain(keys.format))
    return door::unsupported("fovea: index keys are e4m3, f32, f64, bf16 or f16, not %s", name_of(keys.format));
  if (keys.sequences < 0 || keys.len < 0 || keys.page_size < 1 || keys.pages < 0)
    return door::invalid("fovea: index keys of %td sequences of %td in %td pages of %td", keys.sequences, keys.len,
                         keys.pages, keys.page_size);
  if (keys.len > door::kMaxLength)
    return door::unsupported("fovea: up to %td index keys are supported, got %td", door::kMaxLength, keys.len);
  const index_t own = (keys.len + keys.page_size - 1) / keys.page_size;
  if (keys.codes == nullptr && keys.sequences > 0 && keys.len > 0) return door::invalid("fovea: index keys have null data");
  if (!keys.block_table) {
    if (keys.pages < keys.sequences * own)
      return door::invalid("fovea: %td sequences of %td index keys need %td pages of %td, the pool has %td", keys.sequences,
                           keys.len, keys.sequences * own, keys.page_size, keys.pages);
    return {};
  }
  if (keys.block_table.extent[0] != keys.sequences)
    return door::invalid("fovea: block_table has %td rows for %td sequences of index keys", keys.block_table.extent[0],
                         keys.sequences);
  return {};
}

// Only the pages of keys in use are read.
inline Status check_pages(const IndexKeys& keys, const AttentionShape& shape, const AttentionOptions& options) {
  if (!keys.block_table) return {};
  for (index_t b = 0; b < keys.sequences; ++b) {
    const index_t used = (door::sequence_of(shape, options, b).len_k + keys.page_size - 1) / keys.page_size;
    if (used > keys.block_table.extent[1])
      return door::invalid("fovea: sequence %td uses %td pages of index keys, block_table has %td", b, used,
                           keys.block_table.extent[1]);
    for (index_t page = 0; page < used; ++page) {
      const std::int32_t at = keys.block_table(b, page);
      if (at < 0 || at >= keys.pages)
        return door::invalid("fovea: page %td of sequence %td is %d, the pool of index keys has %td", page, b,
                             static_cast<int>(at), keys.pages);
    }
  }
  return {};
}

inline door::Bytes bytes_of_keys(const std::byte* data, const IndexKeys& keys, index_t page, index_t key, index_t bytes) {
  door::Bytes range;
  static_cast<void>(door::bytes_of<2>(data, {keys.pages, keys.page_size}, {page, key}, 1, bytes, range));
  return range;
}

// `name` is what the call writes.
template <class T>
Status check(const char* name, const View<T, 3>& to, const Inputs& in, AttentionShape& shape) {
  const bool coded = static_cast<bool>(in.q.codes);
  const auto& extent = coded ? in.q.codes.extent : in.q.numbers.extent;
  door::Bytes q_bytes, scale_bytes, weight_bytes, to_bytes, table_bytes;
  if (coded) {
    if (Status s = door::check_data("the index queries", in.q.codes, q_bytes); !s.ok()) return s;
  } else {
    if (Status s = door::check_plain("the index queries", in.q.numbers.format); !s.ok()) return s;
    if (Status s = door::check_data("the index queries", in.q.numbers, q_bytes); !s.ok()) return s;
  }
  if (Status s = check_keys(in.keys); !s.ok()) return s;
  shape = {extent[0], extent[1], 1, extent[2], in.keys.len, extent[3], 1};
  if (in.keys.sequences != shape.batch || in.keys.dim != shape.dim_qk)
    return door::invalid("fovea: index queries are for %td sequences and dim %td, index keys for %td and %td", shape.batch,
                         shape.dim_qk, in.keys.sequences, in.keys.dim);
  const AttentionOptions& o = in.options;
  if (!o.cu_len_q.empty() || !o.cu_len_k.empty() || o.keep || !o.tree.empty())
    return door::unsupported("fovea: the indexer takes causal, window, q_offset and len_k; no ragged batch, keep or tree");
  if (Status s = door::check_problem(shape, o); !s.ok()) return s;
  if (Status s = check_pages(in.keys, shape, o); !s.ok()) return s;
  const std::array<index_t, 3> per_query{shape.batch, shape.q_heads, shape.len_q};
  if (in.weights.extent != per_query)
    return door::invalid("fovea: the head weights are [%td, %td, %td], must be [%td, %td, %td]", in.weights.extent[0],
                         in.weights.extent[1], in.weights.extent[2], per_query[0], per_query[1], per_query[2]);
  if (in.q.scale && in.q.scale.extent != per_query)
    return door::invalid("fovea: the scales of index queries are [%td, %td, %td], must be [%td, %td, %td]",
                         in.q.scale.extent[0], in.q.scale.extent[1], in.q.scale.extent[2], per_query[0], per_query[1],
                         per_query[2]);
  if (in.rule.round_queries > IndexRounding::ue8m0)
    return door::invalid("fovea: round_queries is %d, no value of the enum", static_cast<int>(in.rule.round_queries));
  if (coded && in.rule.round_queries != IndexRounding::none)
    return door::invalid("fovea: the index queries are e4m3 already, round_queries is for plain ones");
  if (Status s = door::check_data("the head weights", in.weights, weight_bytes); !s.ok()) return s;
  if (Status s = door::check_data("the scales of index queries", in.q.scale, scale_bytes); in.q.scale && !s.ok()) return s;
  if (Status s = door::check_data("block_table", in.keys.block_table, table_bytes); in.keys.block_table && !s.ok()) return s;
  if (Status s = door::check_data(name, to, to_bytes); !s.ok()) return s;
  if (!door::writes_apart(to)) return door::invalid("fovea: %s overlap themselves", name);
  const index_t code_bytes = in.keys.dim * (in.keys.format == Format::e4m3 ? 1 : row_bytes(in.keys.format, 1));
  const std::pair<const char*, door::Bytes> inputs[] = {
      {"the index queries", q_bytes},
      {"their scales", scale_bytes},
      {"the head weights", weight_bytes},
      {"block_table", table_bytes},
      {"the index keys", bytes_of_keys(in.keys.codes, in.keys, in.keys.code_page, in.keys.code_key, code_bytes)},
      {"their scales", bytes_of_keys(in.keys.scales, in.keys, in.keys.scale_page, in.keys.scale_key, 4)}};
  const door::OutputBytes workspace{"workspace", door::span_bytes(o.workspace)};
  for (const auto& [input, bytes] : inputs) {
    if (Status s = door::check_apart({name, to_bytes}, input, bytes); !s.ok()) return s;
    if (Status s = door::check_apart(workspace, input, bytes); !s.ok()) return s;
  }
  return door::check_apart(workspace, name, to_bytes);
}

// row = (row - mean) / sqrt(variance + eps) * weight + bias, the variance in a second pass.
inline void layer_norm(float* row, index_t dim, const DsaIndexRows& how) {
  const float each = 1.f / static_cast<float>(dim);
  f32 sum(0.f), squares(0.f);
  for (index_t d = 0; d < dim; d += kLanes) sum = sum + load_strided(row + d, 1, dim - d);
  const f32 mean(reduce_add(sum) * each);
  for (index_t d = 0; d < dim; d += kLanes) {
    const f32 apart = load_strided(row + d, 1, dim - d) - mean;
    store_some(row + d, apart, std::min(kLanes, dim - d));
    const f32 inside = load_strided(row + d, 1, dim - d);
    squares = fma(inside, inside, squares);
  }
  const f32 factor(1.f / std::sqrt(reduce_add(squares) * each + how.norm_eps));
  for (index_t d = 0; d < dim; d += kLanes) {
    const index_t count = std::min(kLanes, dim - d);
    const f32 weight = load_strided(how.norm_weight.data() + d, 1, count);
    const f32 bias = how.norm_bias.empty() ? f32(0.f) : load_strided(how.norm_bias.data() + d, 1, count);
    store_some(row + d, fma(load_strided(row + d, 1, count) * factor, weight, bias), count);
  }
}

}   // namespace dsa

// lists[b, i] = the extent[2] keys with the highest I[i, s] among those query i may see, by index ascending, -1 behind them
// where there are fewer. Equal scores: the lower index. Scores of NaN and -inf are never taken.
// weights [batch, index head, pos], fp32, as projected. Read of the options: causal, window, q_offset, len_k, executor,
// workspace. lists: innermost stride 1.
inline Status dsa_select(const IndexQueries& q, const View<const float, 3>& weights, const IndexKeys& keys,
                         const View<std::int32_t, 3>& lists, const AttentionOptions& options = {},
                         const DsaRule& rule = {}) {
  const dsa::Inputs in{q, weights, keys, options, rule};
  AttentionShape shape;
  if (Status s = dsa::check("the lists", lists, in, shape); !s.ok()) return s;
  if (lists.extent[0] != shape.batch || lists.extent[1] != shape.len_q)
    return door::invalid("fovea: the lists are [%td, %td, %td], must be [%td, %td, k]", lists.extent[0], lists.extent[1],
                         lists.extent[2], shape.batch, shape.len_q);
  if (lists.extent[2] > 1 && lists.stride[2] != 1)
    return door::unsupported("fovea: the lists have innermost stride %td, must be 1", lists.stride[2]);
  if (door::is_empty(lists)) return {};
  const index_t k = lists.extent[2];
  dsa::Shape call = dsa::shape_of(shape, options);
  call.top_k_bytes = dsa::top_k_bytes(call, in, k);
  return dsa::run(call, in,
                  [&](const dsa::LaneMemory& lane, index_t b, index_t i, const dsa::Visible& seen, const float* scores) {
                    std::int32_t* const to = &lists(b, i, 0);
                    const std::span<const float> row(scores + seen.begin, static_cast<std::size_t>(seen.end - seen.begin));
                    const index_t taken = top_k(row, k, to, lane.top_k);
                    for (index_t n = 0; n < taken; ++n) to[n] += static_cast<std::int32_t>(seen.begin);
                  });
}

// scores[b, i, s] = I[i, s], -inf where query i may not see key s; s < extent[2], at least the keys in use. The indexer
// alone, as DeepGEMM's fp8_mqa_logits.
inline Status dsa_scores(const IndexQueries& q, const View<const float, 3>& weights, const IndexKeys& keys,
                         const View<float, 3>& scores, const AttentionOptions& options = {}, const DsaRule& rule = {}) {
  const dsa::Inputs in{q, weights, keys, options, rule};
  AttentionShape shape;
  if (Status s = dsa::check("the scores", scores, in, shape); !s.ok()) return s;
  if (scores.extent[0] != shape.batch || scores.extent[1] != shape.len_q || scores.extent[2] != shape.len_k)
    return door::invalid("fovea: the scores are [%td, %td, %td], must be [%td, %td, %td]", scores.extent[0],
                         scores.extent[1], scores.extent[2], shape.batch, shape.len_q, shape.len_k);
  if (door::is_empty(scores)) return {};
  return dsa::run(dsa::shape_of(shape, options), in,
                  [&](const dsa::LaneMemory&, index_t b, index_t i, const dsa::Visible& seen, const float* row) {
                    for (index_t j = 0; j < shape.len_k; ++j) {
                      const bool sees = j >= seen.begin && j < seen.end;
                      scores(b, i, j) = sees ? row[j] : -std::numeric_limits<float>::infinity();
                    }
                  });
}

// Absorbed MLA over the listed latents: q [batch, head, pos, latent + rope] = [W_UK' q_nope | q_pe], latents one kv head
// whose values lie in its keys (latent_kv), out [batch, head, pos, latent]. The scale must be given: it belongs to the
// expanded head (mla_scale), not to the latent row. Everything else is fovea::sparse_attention.
template <class Compiled = AllFormats>
Status dsa_attention(const Operand& q, const Kv& latents, const KeyLists& lists, const Result& out,
                     const AttentionOptions& options) {
  if (!options.scale)
    return door::invalid(
        "fovea: dsa_attention needs a scale (mla_scale): 1 / sqrt(%td) of the latent row is not the model's",
        latents.dim_qk);
  if (latents.kv_heads != 1 || lists.heads != 1)
    return door::invalid("fovea: all heads share the latents and their list: kv heads %td, heads of the lists %td",
                         latents.kv_heads, lists.heads);
  return door::sparse<Compiled>(q, latents, {&lists, 1}, out, options);
}

// Projected rows x [batch, head, pos, dim] to index queries or keys: LayerNorm, rotation of the FIRST numbers, Hadamard, in
// fp32. `to` may be x.
inline Status dsa_index_rows(const Operand& x_any, const Result& to_any, const DsaIndexRows& how) {
  const Operand x = door::tidy_operand(x_any);
  const Result to = door::tidy_operand(to_any);
  const index_t dim = x.extent[3];
  door::Bytes x_bytes, to_bytes;
  if (Status s = door::check_plain("x", x.format); !s.ok()) return s;
  if (Status s = door::check_plain("to", to.format); !s.ok()) return s;
  if (Status s = door::check_data("x", x, x_bytes); !s.ok()) return s;
  if (Status s = door::check_data("to", to, to_bytes); !s.ok()) return s;
  if (Status s = door::check_extents("to", to, x.extent, "x"); !s.ok()) return s;
  if (dim < 1 || dim > door::kMaxDim)
    return door::unsupported("fovea: index rows have 1 to %td numbers, not %td", door::kMaxDim, dim);
  if (!door::writes_apart(to)) return door::invalid("fovea: to overlaps itself");
  if (to.data != x.data || to.stride != x.stride || to.format != x.format) {
    if (Status s = door::check_apart({"to", to_bytes}, "x", x_bytes); !s.ok()) return s;
  }
  const bool norm = !how.norm_weight.empty();
  for (const auto& [name, numbers] : {std::pair{"norm_weight", how.norm_weight}, {"norm_bias", how.norm_bias}}) {
    if (!numbers.empty() && static_cast<index_t>(numbers.size()) != dim)
      return door::invalid("fovea: %s has %zu numbers, rows have %td", name, numbers.size(), dim);
    if (Status s = door::check_apart({"to", to_bytes}, name, door::span_bytes(numbers)); !s.ok()) return s;
  }
  if (!norm && !how.norm_bias.empty()) return door::invalid("fovea: norm_bias without norm_weight");
  if (how.hadamard && !is_hadamard_size(dim))
    return door::unsupported("fovea: a Hadamard transform of %td numbers; powers of two up to %td have one", dim,
                             kMaxHadamard);
  if (how.layout > RopeLayout::interleaved)
    return door::invalid("fovea: layout is %d, no value of the enum", static_cast<int>(how.layout));
  const RopeTable* const table = how.rope;
  if (table != nullptr && 2 * table->pairs > dim)
    return door::invalid("fovea: the RoPE table turns %td numbers, index rows have %td", 2 * table->pairs, dim);
  if (door::is_empty(x)) return {};
  if (table != nullptr) {
    if (Status s = rope::check_positions(how.positions, *table, x.extent[0], x.extent[2]); !s.ok()) return s;
  }
  alignas(f32) float row[door::kMaxDim + kLanes] = {};
  for (index_t b = 0; b < x.extent[0]; ++b) {
    for (index_t h = 0; h < x.extent[1]; ++h) {
      for (index_t i = 0; i < x.extent[2]; ++i) {
        const auto row_of = [&](const auto& view) { return b * view.stride[0] + h * view.stride[1] + i * view.stride[2]; };
        read_numbers(x.format, x.data + row_of(x) * row_bytes(x.format, 1), x.stride[3], dim, row);
        if (norm) dsa::layer_norm(row, dim, how);
        if (table != nullptr) {
          const auto& ids = how.positions.ids;
          const index_t pos = ids ? ids(ids.extent[0] == 1 ? 0 : b, i) : how.positions.start + i * how.positions.step;
          rotate_rows(how.layout, row, dim, row, dim, 1, table->cos_at(pos), table->sin_at(pos), table->stride, table->pairs,
                      dim);
        }
        if (how.hadamard) hadamard(row, dim);
        write_numbers(to.format, row, dim, to.data + row_of(to) * row_bytes(to.format, 1), to.stride[3]);
      }
    }
  }
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
