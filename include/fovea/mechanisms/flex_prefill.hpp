// SPDX-License-Identifier: Apache-2.0
// FlexPrefill (Lai et al. 2025, arXiv 2502.20766): each head decides for itself, by how well pooled keys foresee the weights
// of the last block of queries, whether blocks are chosen by pooled queries and keys or as columns and diagonals; both take
// the smallest set of a given mass. docs/adding-a-sparse-mechanism.md builds this file from its parts.
#pragma once
#include "../call/column_sums.hpp"
#include "../engine/parts/pooling.hpp"
#include "../engine/parts/select.hpp"

namespace fovea {
inline namespace v0 {

struct FlexPrefill {
  index_t block = 128;
  float gamma = 0.9f;       // mass to reach; 1 and more: all causal blocks
  float tau = 0.1f;         // distance below which the pooled estimate is trusted; 0: columns and diagonals for every head
  index_t min_blocks = 1;   // of columns and of diagonals, at least
};

inline namespace FOVEA_ARCH {

namespace flex {

// sqrt of the Jensen-Shannon divergence of two distributions, natural logarithm: 0 to 0.83. Adds in the order of the blocks.
inline double distance(std::span<const float> a, std::span<const float> b) {
  double divergence = 0;
  for (std::size_t n = 0; n < a.size(); ++n) {
    const double p = double{a[n]}, q = double{b[n]}, middle = (p + q) / 2;
    if (p > 0) divergence += p / 2 * std::log(p / middle);
    if (q > 0) divergence += q / 2 * std::log(q / middle);
  }
  return std::sqrt(std::max(divergence, 0.));
}

struct LaneMemory {
  float *row, *q_means, *k_means;   // [dim], [q block + 1, dim], [k block, dim]
  float* map;                       // [q block, k block]
  float *seen, *foreseen;           // [k block]
  std::int32_t* taken;
  std::uint8_t *columns, *diagonals;   // [k block]
  std::byte* scratch;
};

}   // namespace flex

// The lists of a call: valid until the next `select`, for every call with the same lengths; the memory is kept.
class FlexPrefillLists {
 public:
  // Reads Q and K; of the options: lengths, positions, scale and the executor. They must be causal, not ragged, and the
  // first query of a sequence starts a block.
  template <class Compiled = AllFormats>
  Status select(const Operand& q, const Kv& kv, const FlexPrefill& rule = {}, const AttentionOptions& options = {});

  const KeyLists& lists() const { return lists_; }
  double share() const { return share_; }   // of the causal blocks
  bool is_query_aware(index_t sequence, index_t q_head) const { return query_aware_[sequence * heads_ + q_head] != 0; }

 private:
  flex::LaneMemory carve_lane(Bump& bump, const door::Selection& s) const;
  template <class Keys>
  void choose(const door::Selection& s, const Keys& keys, const FlexPrefill& rule, float scale, index_t b, index_t head,
              const flex::LaneMemory& m) const;

  door::LocalBytes sequence_memory_, memory_, lane_memory_;
  View<float, 3> keys_, distances_;
  std::int32_t *entries_ = nullptr, *counts_ = nullptr;   // [list, k block], [list]
  std::uint8_t* query_aware_ = nullptr;
  index_t heads_ = 0, q_blocks_ = 0, k_blocks_ = 0;
  double share_ = 0;
  KeyLists lists_;
};

inline flex::LaneMemory FlexPrefillLists::carve_lane(Bump& bump, const door::Selection& s) const {
  const index_t dim = s.shape.dim_qk, most = std::max({s.most_keys, s.last_pos + 1, q_blocks_ * k_blocks_});
  const std::size_t scratch = std::max(top_p_scratch_bytes(), top_k_scratch_bytes(k_blocks_, k_blocks_));
  return {bump.take<float>(dim),
          bump.take<float>((q_blocks_ + 1) * dim),
          bump.take<float>(k_blocks_ * dim),
          bump.take<float>(q_blocks_ * k_blocks_),
          bump.take<float>(k_blocks_),
          bump.take<float>(k_blocks_),
          bump.take<std::int32_t>(most),
          bump.take<std::uint8_t>(k_blocks_),
          bump.take<std::uint8_t>(k_blocks_),
          bump.take<std::byte>(static_cast<index_t>(scratch))};
}

template <class Keys>
void FlexPrefillLists::choose(const door::Selection& s, const Keys& keys, const FlexPrefill& rule, float scale, index_t b,
                              index_t head, const flex::LaneMemory& m) const {
  const Sequence& sequence = s.sequence(b);
  const index_t dim = s.shape.dim_qk, block = rule.block, first_own = sequence.pos / block;
  const index_t q_blocks = (sequence.len_q + block - 1) / block, k_blocks = (sequence.len_k + block - 1) / block;
  if (q_blocks == 0 || k_blocks == 0) return;
  const std::span<std::byte> scratch{m.scratch, std::max(top_p_scratch_bytes(), top_k_scratch_bytes(k_blocks_, k_blocks_))};
  const auto visible = [&](index_t i) { return std::min(first_own + i + 1, k_blocks); };
  const auto floats = [](float* data, index_t count) { return std::span<float>(data, static_cast<std::size_t>(count)); };

  door::Selection bare = s;   // KeyRows has the scales per channel
  bare.source.kv.k_channel_scale = nullptr;
  const auto queries = [&](index_t begin, index_t end, const auto& f) {
    for (index_t i = begin; i < end; ++i) {
      bare.read_query(b, head, i, m.row);
      f(i, static_cast<const float*>(m.row));
    }
  };
  const auto all_keys = [&](index_t begin, index_t end, const auto& f) {
    keys.each(b, s.kv_head(head), begin, end, m.row, f);
  };
  float* const last_mean = m.q_means + q_blocks * dim;
  pool_mean(queries, 0, sequence.len_q, block, dim, m.q_means);
  pool_mean(queries, std::max<index_t>(sequence.len_q - block, 0), sequence.len_q, block, dim, last_mean);
  pool_mean(all_keys, 0, sequence.len_k, block, dim, m.k_means);
  const auto estimate = [&](const float* query, index_t count, float* to) {
    for (index_t j = 0; j < count; ++j) {
      f32 sum(0.f);
      for (index_t d = 0; d < dim; d += kLanes) {
        const index_t width = std::min(kLanes, dim - d);
        sum = fma(load_some(query + d, width), load_some(m.k_means + j * dim + d, width), sum);
      }
      to[j] = scale * reduce_add(sum);
    }
    softmax_row(floats(to, count));
  };

  const index_t last = visible(q_blocks - 1), rows = std::min(block, sequence.len_q);
  const std::span<float> columns = floats(&keys_(b, head, 0), sequence.len_k);
  const std::span<float> diagonals = floats(&distances_(b, head, 0), sequence.pos + sequence.len_q);
  block_sums(columns, block, m.seen);
  for (index_t j = 0; j < last; ++j) m.seen[j] /= static_cast<float>(rows);
  estimate(last_mean, last, m.foreseen);
  const bool query_aware = flex::distance(floats(m.seen, last), floats(m.foreseen, last)) < double{rule.tau};
  query_aware_[b * heads_ + head] = query_aware ? 1 : 0;

  const double gamma = double{rule.gamma};
  std::fill_n(m.map, q_blocks * k_blocks, 0.f);
  if (query_aware) {
    for (index_t i = 0; i < q_blocks; ++i) estimate(m.q_means + i * dim, visible(i), m.map + i * k_blocks);
    const index_t taken = top_p(floats(m.map, q_blocks * k_blocks), gamma, m.taken, scratch);
    std::fill_n(m.map, q_blocks * k_blocks, 0.f);
    for (index_t n = 0; n < taken; ++n) m.map[m.taken[n]] = 1.f;
  } else {
    // As many blocks as hold the lines that are needed, and of the blocks the heaviest.
    const auto mark = [&](std::span<float> lines, std::uint8_t* marks) {
      const index_t needed = (top_p(lines, gamma, m.taken, scratch) + block - 1) / block;
      const index_t count = (static_cast<index_t>(lines.size()) + block - 1) / block;
      block_sums(lines, block, m.foreseen);
      std::fill_n(marks, k_blocks, std::uint8_t{0});
      const index_t taken =
          top_k(floats(m.foreseen, count), std::clamp(needed, std::min(rule.min_blocks, count), count), m.taken, scratch);
      for (index_t n = 0; n < taken; ++n) marks[m.taken[n]] = 1;
    };
    mark(columns, m.columns);
    mark(diagonals.first(std::min(diagonals.size(), static_cast<std::size_t>(k_blocks * block))), m.diagonals);
    for (index_t i = 0; i < q_blocks; ++i) {
      for (index_t j = 0; j < visible(i); ++j) {
        const index_t back = first_own + i - j;
        if (m.columns[j] != 0 || (back < k_blocks && m.diagonals[back] != 0)) m.map[i * k_blocks + j] = 1.f;
      }
    }
  }
  for (index_t i = 0; i < q_blocks; ++i) {
    const index_t list = (b * heads_ + head) * q_blocks_ + i;
    std::int32_t* to = entries_ + list * k_blocks_;
    for (index_t j = 0; j < visible(i); ++j) {
      if (j == 0 || j == first_own + i || m.map[i * k_blocks + j] != 0.f) *to++ = static_cast<std::int32_t>(j);
    }
    counts_[list] = static_cast<std::int32_t>(to - (entries_ + list * k_blocks_));
  }
}

template <class Compiled>
Status FlexPrefillLists::select(const Operand& q, const Kv& kv, const FlexPrefill& rule, const AttentionOptions& options) {
  door::Selection s;
  KeyRows keys;
  if (Status status = door::open_selection<Compiled>(s, sequence_memory_, q, kv, options); !status.ok()) return status;
  if (Status status = KeyRows::open(s.source, Compiled{}, keys); !status.ok()) return status;
  if (options.causal == Causal::none)
    return door::invalid("fovea: FlexPrefill needs causal options: a row's own block ends it");
  if (!options.cu_len_q.empty())
    return door::unsupported("fovea: FlexPrefill takes no ragged batch; call it once per sequence");
  if (rule.block < 1 || rule.block > door::kMaxLength || !(rule.gamma >= 0.f) || !(rule.tau >= 0.f) || rule.min_blocks < 0)
    return door::invalid(
        "fovea: FlexPrefill has block %td, gamma %g, tau %g, min_blocks %td: none may be negative, block not 0", rule.block,
        static_cast<double>(rule.gamma), static_cast<double>(rule.tau), rule.min_blocks);
  for (index_t b = 0; b < s.sequences; ++b) {
    if (s.sequence(b).pos < 0 || s.sequence(b).pos % rule.block != 0)
      return door::invalid("fovea: FlexPrefill's queries start with a block of %td; those of sequence %td start at %td",
                           rule.block, b, s.sequence(b).pos);
  }
  heads_ = s.shape.q_heads;
  q_blocks_ = (s.longest + rule.block - 1) / rule.block;
  k_blocks_ = (s.most_keys + rule.block - 1) / rule.block;
  const index_t heads = s.sequences * heads_, lists = heads * q_blocks_, distances = s.last_pos + 1;
  index_t *first = nullptr, *lengths = nullptr;
  const auto carve = [&](Bump& bump) {
    const auto table = [&](index_t count) {
      return View<float, 3>{bump.take<float>(heads * count), {s.sequences, heads_, count}, {heads_ * count, count, 1}};
    };
    keys_ = table(s.most_keys);
    distances_ = table(distances);
    entries_ = bump.take<std::int32_t>(lists * k_blocks_);
    counts_ = bump.take<std::int32_t>(lists);
    query_aware_ = bump.take<std::uint8_t>(heads);
    first = bump.take<index_t>(s.sequences);
    lengths = bump.take<index_t>(s.sequences);
  };
  if (Status status = door::carve_local(memory_, carve); !status.ok()) return status;
  std::fill_n(counts_, lists, 0);
  std::fill_n(query_aware_, heads, std::uint8_t{0});

  // The weights of the last block of queries, which keep their positions.
  const Operand last = last_queries(s.q, rule.block);
  for (index_t b = 0; b < s.sequences; ++b) {
    first[b] = s.sequence(b).pos + s.longest - last.extent[2];
    lengths[b] = s.sequence(b).len_k;
  }
  AttentionOptions of_sums;
  of_sums.scale = options.scale;
  of_sums.causal = Causal::top_left;
  of_sums.q_offset = {first, static_cast<std::size_t>(s.sequences)};
  of_sums.len_k = {lengths, static_cast<std::size_t>(s.sequences)};
  of_sums.executor = options.executor;
  if (s.longest > 0 && s.most_keys > 0) {
    if (Status status = column_sums<Compiled>(last, kv, {keys_, distances_}, of_sums); !status.ok()) return status;
  }

  const auto carve_own = [&](Bump& bump) { return carve_lane(bump, s); };
  const auto choose_head = [&](const auto& memory, index_t task) {
    choose(s, keys, rule, scale_of(options, s.shape.dim_qk), task / heads_, task % heads_, memory);
  };
  if (Status status = door::deal_to_lanes(lane_memory_, options.executor, heads, carve_own, choose_head); !status.ok())
    return status;

  double named = 0, all = 0;
  for (index_t list = 0; list < lists; ++list) {
    const Sequence& sequence = s.sequence(list / (heads_ * q_blocks_));
    named += counts_[list];
    if (list % q_blocks_ * rule.block < sequence.len_q)
      all += static_cast<double>(
          std::min(sequence.pos / rule.block + list % q_blocks_ + 1, (sequence.len_k + rule.block - 1) / rule.block));
  }
  share_ = all > 0 ? named / all : 0;
  lists_ = {};
  lists_.entries = entries_;
  lists_.capacity = k_blocks_;
  lists_.count = {counts_, static_cast<std::size_t>(lists)};
  lists_.batch = s.sequences;
  lists_.heads = heads_;
  lists_.q_blocks = q_blocks_;
  lists_.q_block = lists_.k_block = rule.block;
  return {};
}

// Attention of every block of queries over its head's chosen blocks of keys. Softcap, ALiBi, sinks and masks of the options
// act in the attention, not in the selection; options.workspace serves the attention, the selection keeps memory of its own
// per thread.
template <class Compiled = AllFormats>
Status flex_prefill(const Operand& q, const Kv& kv, const Result& out, const FlexPrefill& rule = {},
                    const AttentionOptions& options = {}) {
  return door::attend_to_selected<Compiled, FlexPrefillLists>(q, kv, out, rule, options);
}
template <class TK, class TV>
Status flex_prefill(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                    const FlexPrefill& rule = {}, const AttentionOptions& options = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return flex_prefill<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, rule, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
