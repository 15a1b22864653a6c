// SPDX-License-Identifier: Apache-2.0
// XAttention (Xu et al. 2025, arXiv 2503.16428): blocks of keys chosen by the sums of antidiagonals. Every S x S tile of the
// score matrix is represented by one antidiagonal, which meets each of its rows and columns once; a softmax over those
// numbers, summed over blocks, estimates the mass of a block for 1 / S of the cost of the scores.
#pragma once
#include <limits>

#include "../call/selection.hpp"
#include "../engine/parts/select.hpp"

namespace fovea {
inline namespace v0 {

struct XAttention {
  index_t block = 128;      // queries and keys of a block
  index_t stride = 16;      // S; 8 and 16 are published, the cost of the selection is 1 / S of Q K'. Divides block
  float threshold = 0.9f;   // share of a row of blocks' mass to reach; 1 and more: all causal blocks
  std::span<const float> head_thresholds = {};   // [q_head]  instead, from a search per head
};

inline namespace FOVEA_ARCH {

namespace xattention_parts {

// Strided rows of a task: packed once, then they meet every strided column that they see. More rows amortise the packing of
// keys better (0.3 cycles a number, 192 rows of FMAs take 6); fewer leave more tasks to lanes. Packed, they are read panel
// after panel, 4 bytes a cycle, so they may lie in L3.
inline constexpr index_t kRows = 192;
inline constexpr index_t kRowFloats = index_t{1} << 19;
inline constexpr index_t kColumns = kMaxKeyTile;

// Strided rows [first, first + rows) of a head; row r sees the strided columns 0 .. base + r.
struct Rows {
  index_t sequence, head, first, rows, base;
};

struct LaneMemory {
  float* staging;   // [kTileRows, dim]
  float* rows;      // [row / kTileRows, S, dim, kTileRows]
  float* panel;     // [S, dim, kPanel]
  float* scores;    // [row, kScoreStride]
  float* sums;      // [row, block of keys]: of exp2(score - top)
  float *top, *z;   // [row]
  float* mass;      // [block of keys]
  std::int32_t* taken;
  std::byte* scratch;
};

inline constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Adds the columns [column, column + count) of one row to its block sums; those behind the row's last column count nothing.
inline void absorb(float* scores, index_t count, index_t column, index_t columns_per_block, float scale, float& top,
                   float& z, float* sums) {
  const index_t whole = padded(count, kLanes);
  for (index_t j = 0; j < whole; j += kLanes) store(scores + j, load(scores + j) * f32(scale));
  std::fill(scores + count, scores + whole, kNothing);
  f32 best(top);
  for (index_t j = 0; j < whole; j += kLanes) best = xsimd::max(best, load(scores + j));
  const float highest = reduce_max(best);
  if (highest == kNothing) return;
  if (highest > top) {
    const float factor = top == kNothing ? 0.f : exp2(top - highest);
    z *= factor;
    for (index_t b = 0; b * columns_per_block < column; ++b) sums[b] *= factor;
    top = highest;
  }
  f32 sum(0.f);
  for (index_t j = 0; j < whole; j += kLanes) {
    const f32 weight = exp2(load(scores + j) - f32(highest));
    store(scores + j, weight);
    sum += weight;
  }
  z += reduce_add(sum);
  for (index_t j = 0; j < count;) {
    const index_t block = (column + j) / columns_per_block;
    const index_t end = std::min(count, (block + 1) * columns_per_block - column);
    float part = 0.f;
    for (; j < end; ++j) part += scores[j];
    sums[block] += part;
  }
}

// Block 0 and the blocks from first_own on, and of the others the smallest set that brings the mass of all that is kept to
// `threshold` of the total: keep(block) for each. `mass` is used up, `to` has room for as many.
template <class Keep>
void choose(std::span<float> mass, index_t first_own, float threshold, std::int32_t* to, std::span<std::byte> scratch,
            const Keep& keep) {
  const auto visible = static_cast<index_t>(mass.size());
  double total = 0, forced = 0;
  for (index_t b = 0; b < visible; ++b) {
    float& here = mass[static_cast<std::size_t>(b)];
    total += double{here};
    if (b != 0 && b < first_own && threshold < 1.f) continue;
    keep(b);
    forced += double{here};
    here = 0.f;
  }
  const double missing = double{threshold} * total - forced;
  if (threshold >= 1.f || !(missing > 0)) return;
  const index_t taken = top_mass(mass, missing, to, scratch);
  for (index_t n = 0; n < taken; ++n) keep(index_t{to[n]});
}

}   // namespace xattention_parts

// The lists of a call: valid until the next `select`, for every call with the same lengths; the memory is kept.
class XAttentionLists {
 public:
  // Reads Q and K; of the options: lengths, positions, scale and the executor. They must be causal.
  template <class Compiled = AllFormats>
  Status select(const Operand& q, const Kv& kv, const XAttention& rule = {}, const AttentionOptions& options = {});

  // Blocks of keys: fovea::sparse_attention(q, kv, lists.lists(), out, options).
  const KeyLists& lists() const { return lists_; }
  // Blocks that the lists name / causal blocks.
  double share() const { return share_; }

 private:
  static constexpr index_t kWord = 64;

  void lay_out(const XAttention& rule, const door::Selection& s);
  xattention_parts::LaneMemory carve_lane(Bump& bump, const door::Selection& s) const;
  void pack_rows(const door::Selection& s, const xattention_parts::Rows& rows, const xattention_parts::LaneMemory& m) const;
  void score_rows(const door::Selection& s, const xattention_parts::Rows& rows, float scale, const xattention_parts::LaneMemory& m) const;
  void choose_blocks(const door::Selection& s, const xattention_parts::Rows& rows, float threshold,
                     const xattention_parts::LaneMemory& m) const;
  index_t visible_blocks(const Sequence& s, index_t q_block) const {
    const index_t last = s.pos + std::min((q_block + 1) * block_, s.len_q) - 1;
    return last < 0 ? 0 : std::min(last / block_ + 1, (s.len_k + block_ - 1) / block_);
  }
  Status write_lists(const door::Selection& s, const Executor& executor);

  door::LocalBytes sequence_memory_, bit_memory_, list_memory_, lane_memory_;
  std::uint64_t* bits_ = nullptr;   // [list, word]: which blocks
  index_t* begins_ = nullptr;       // [list + 1]
  index_t block_ = 1, stride_ = 1, heads_ = 0, q_blocks_ = 0, k_blocks_ = 0, words_ = 0;
  index_t task_blocks_ = 1, task_rows_ = 1, head_tasks_ = 0;
  double share_ = 0;
  KeyLists lists_;
};

inline void XAttentionLists::lay_out(const XAttention& rule, const door::Selection& s) {
  block_ = rule.block;
  stride_ = rule.stride;
  heads_ = s.shape.q_heads;
  q_blocks_ = (s.longest + block_ - 1) / block_;
  k_blocks_ = (s.most_keys + block_ - 1) / block_;
  words_ = (k_blocks_ + kWord - 1) / kWord;
  const index_t rows = std::min(xattention_parts::kRows, xattention_parts::kRowFloats / (stride_ * s.shape.dim_qk));
  task_blocks_ = std::max<index_t>(rows / (block_ / stride_), 1);
  task_rows_ = padded(task_blocks_ * (block_ / stride_), kTileRows);
  head_tasks_ = (q_blocks_ + task_blocks_ - 1) / task_blocks_;
}

inline xattention_parts::LaneMemory XAttentionLists::carve_lane(Bump& bump, const door::Selection& s) const {
  const index_t dim = s.shape.dim_qk;
  return {bump.take<float>(kTileRows * dim),
          bump.take<float>(task_rows_ * stride_ * dim),
          bump.take<float>(stride_ * dim * kPanel),
          bump.take<float>(task_rows_ * kScoreStride),
          bump.take<float>(task_rows_ * k_blocks_),
          bump.take<float>(task_rows_),
          bump.take<float>(task_rows_),
          bump.take<float>(k_blocks_),
          bump.take<std::int32_t>(k_blocks_),
          bump.take<std::byte>(static_cast<index_t>(top_p_scratch_bytes()))};
}

// Strided row r is the queries S r + S - 1, ..., S r, strided column c the keys S c, ..., S c + S - 1, one behind the other:
// their product is the sum of an antidiagonal.
inline void XAttentionLists::pack_rows(const door::Selection& s, const xattention_parts::Rows& rows,
                                       const xattention_parts::LaneMemory& m) const {
  const index_t dim = s.shape.dim_qk, len_q = s.sequence(rows.sequence).len_q;
  float* to = m.rows;
  for (index_t r = 0; r < rows.rows; r += kTileRows) {
    const index_t here = std::min(kTileRows, rows.rows - r);
    for (index_t j = 0; j < stride_; ++j, to += dim * kTileRows) {
      const float* pointers[kTileRows];
      for (index_t n = 0; n < here; ++n) {
        float* const query = m.staging + n * dim;
        const index_t i = (rows.first + r + n) * stride_ + stride_ - 1 - j;
        pointers[n] = query;
        if (i < len_q) {
          s.read_query(rows.sequence, rows.head, i, query);
        } else {
          std::fill_n(query, dim, 0.f);
        }
      }
      pack_queries(pointers, here, 1, dim, 1.f, to);
    }
  }
}

inline void XAttentionLists::score_rows(const door::Selection& s, const xattention_parts::Rows& rows, float scale,
                                        const xattention_parts::LaneMemory& m) const {
  using xattention_parts::kColumns;
  const Sequence& sequence = s.sequence(rows.sequence);
  const index_t dim = s.shape.dim_qk, depth = stride_ * dim;
  const index_t columns =
      std::min((sequence.len_k + stride_ - 1) / stride_, std::max<index_t>(rows.base + rows.first + rows.rows, 0));
  std::fill_n(m.sums, rows.rows * k_blocks_, 0.f);
  std::fill_n(m.top, rows.rows, xattention_parts::kNothing);
  std::fill_n(m.z, rows.rows, 0.f);
  pack_rows(s, rows, m);
  for (index_t column = 0; column < columns; column += kColumns) {
    const index_t count = std::min(kColumns, columns - column);
    for (index_t n = 0; n < count; n += kPanel) {
      const index_t wide = std::min(kPanel, count - n);
      for (index_t j = 0; j < stride_; ++j) {
        // The last column may end before its key j.
        const index_t whole = std::min(wide, (sequence.len_k - j + stride_ - 1) / stride_ - column - n);
        float* const to = m.panel + j * dim * kPanel;
        if (whole > 0) s.pack_keys(rows.sequence, rows.head, (column + n) * stride_ + j, stride_, whole, to);
        if (whole <= 0) clear_columns(to, dim, 0, kPanel);
      }
      // Rows before the first that sees the panel are left out.
      const index_t first = std::max<index_t>(column + n - rows.base - rows.first, 0) / kTileRows * kTileRows;
      for (index_t r = first; r < rows.rows; r += kTileRows) {
        const index_t here = std::min(kTileRows, rows.rows - r);
        float* const to = m.scores + r * kScoreStride + n;
        if (wide > kLanes) {
          gemm_nt<kPanelVectors>(here, m.rows + r * depth, m.panel, depth, to);
        } else {
          gemm_nt<1>(here, m.rows + r * depth, m.panel, depth, to);
        }
      }
    }
    for (index_t r = 0; r < rows.rows; ++r) {
      const index_t seen = std::min(count, rows.base + rows.first + r + 1 - column);
      if (seen <= 0) continue;
      xattention_parts::absorb(m.scores + r * kScoreStride, seen, column, block_ / stride_, scale, m.top[r], m.z[r],
                               m.sums + r * k_blocks_);
    }
  }
}

inline void XAttentionLists::choose_blocks(const door::Selection& s, const xattention_parts::Rows& rows, float threshold,
                                           const xattention_parts::LaneMemory& m) const {
  const Sequence& sequence = s.sequence(rows.sequence);
  const index_t rows_per_block = block_ / stride_;
  for (index_t r = 0; r < rows.rows; r += rows_per_block) {
    const index_t q_block = (rows.first + r) / rows_per_block;
    const index_t visible = visible_blocks(sequence, q_block);
    const index_t first_own = std::max<index_t>(sequence.pos + q_block * block_, 0) / block_;
    std::fill_n(m.mass, visible, 0.f);
    for (index_t n = r; n < std::min(r + rows_per_block, rows.rows); ++n) {
      if (m.z[n] == 0.f) continue;
      const float share = 1.f / m.z[n];
      const float* const sums = m.sums + n * k_blocks_;
      for (index_t b = 0; b < visible; ++b) m.mass[b] = std::fma(sums[b], share, m.mass[b]);
    }
    const index_t list = (rows.sequence * heads_ + rows.head) * q_blocks_ + q_block;
    std::uint64_t* const words = bits_ + list * words_;
    std::fill_n(words, words_, std::uint64_t{0});
    index_t kept = 0;
    xattention_parts::choose({m.mass, static_cast<std::size_t>(visible)}, first_own, threshold, m.taken,
                             {m.scratch, top_p_scratch_bytes()}, [&](index_t b) {
                               words[b / kWord] |= std::uint64_t{1} << (b % kWord);
                               ++kept;
                             });
    begins_[list] = kept;
  }
}

inline Status XAttentionLists::write_lists(const door::Selection& s, const Executor& executor) {
  const index_t tasks = s.sequences * heads_, lists = tasks * q_blocks_;
  const index_t blocks = door::counts_to_begins(begins_, lists);
  std::int32_t* entries = nullptr;
  if (Status status = door::carve_local(list_memory_, [&](Bump& bump) { entries = bump.take<std::int32_t>(blocks + 1); });
      !status.ok())
    return status;
  deal(executor, executor.lanes(), lists, [&](int, index_t list) {
    std::int32_t* to = entries + begins_[list];
    if (begins_[list] == begins_[list + 1]) return;
    for (index_t word = 0; word < words_; ++word) {
      for (std::uint64_t left = bits_[list * words_ + word]; left != 0; left &= left - 1)
        *to++ = static_cast<std::int32_t>(word * kWord + __builtin_ctzll(left));
    }
  });
  double all = 0;
  for (index_t b = 0; b < s.sequences; ++b) {
    for (index_t block = 0; block * block_ < s.sequence(b).len_q; ++block)
      all += static_cast<double>(heads_ * visible_blocks(s.sequence(b), block));
  }
  share_ = all > 0 ? static_cast<double>(blocks) / all : 0;
  lists_ = {};
  lists_.entries = entries;
  lists_.begin = {begins_, static_cast<std::size_t>(lists) + 1};
  lists_.batch = s.sequences;
  lists_.heads = heads_;
  lists_.q_blocks = q_blocks_;
  lists_.q_block = lists_.k_block = block_;
  return {};
}

template <class Compiled>
Status XAttentionLists::select(const Operand& q, const Kv& kv, const XAttention& rule, const AttentionOptions& options) {
  door::Selection s;
  if (Status status = door::open_selection<Compiled>(s, sequence_memory_, q, kv, options); !status.ok()) return status;
  if (options.causal == Causal::none)
    return door::invalid("fovea: XAttention needs causal options: a row's own block ends it");
  if (rule.stride < 1 || rule.block < 1 || rule.block > door::kMaxLength || rule.block % rule.stride != 0)
    return door::invalid("fovea: XAttention's stride %td must divide its block %td", rule.stride, rule.block);
  if (!rule.head_thresholds.empty() && static_cast<index_t>(rule.head_thresholds.size()) != s.shape.q_heads)
    return door::invalid("fovea: XAttention has thresholds for %zu heads, q has %td", rule.head_thresholds.size(),
                         s.shape.q_heads);
  const auto threshold_of = [&](index_t head) {
    return rule.head_thresholds.empty() ? rule.threshold : rule.head_thresholds[static_cast<std::size_t>(head)];
  };
  for (index_t head = 0; head < s.shape.q_heads; ++head) {
    if (!(threshold_of(head) >= 0.f))
      return door::invalid("fovea: XAttention's threshold of head %td is %g, must be 0 or more", head,
                           static_cast<double>(threshold_of(head)));
  }
  lay_out(rule, s);
  const index_t lists = s.sequences * heads_ * q_blocks_;
  const auto carve_bits = [&](Bump& bump) {
    bits_ = bump.take<std::uint64_t>(lists * words_);
    begins_ = bump.take<index_t>(lists + 1);
  };
  if (Status status = door::carve_local(bit_memory_, carve_bits); !status.ok()) return status;
  std::fill_n(begins_, lists + 1, index_t{0});

  const index_t tasks = s.sequences * heads_ * head_tasks_;
  const float scale = scale_of(options, s.shape.dim_qk) / static_cast<float>(stride_) * kLog2e;
  // The last rows of a head see the most columns: they come first, so that no lane is left alone with them.
  const auto choose_part = [&](const xattention_parts::LaneMemory& memory, index_t task) {
    const index_t of_head = head_tasks_ - 1 - task / (s.sequences * heads_), which = task % (s.sequences * heads_);
    const index_t b = which / heads_, head = which % heads_;
    const Sequence& sequence = s.sequence(b);
    const index_t first = of_head * task_blocks_ * (block_ / stride_);
    const index_t rows = std::min(task_blocks_ * (block_ / stride_), (sequence.len_q + stride_ - 1) / stride_ - first);
    if (rows <= 0) return;
    const index_t base = sequence.pos / stride_ - (sequence.pos % stride_ < 0 ? 1 : 0);
    const xattention_parts::Rows part{b, head, first, rows, base};
    score_rows(s, part, scale, memory);
    choose_blocks(s, part, threshold_of(head), memory);
  };
  const auto carve = [&](Bump& bump) { return carve_lane(bump, s); };
  if (Status status = door::deal_to_lanes(lane_memory_, options.executor, tasks, carve, choose_part); !status.ok())
    return status;
  return write_lists(s, options.executor);
}

// Attention of every block of queries over its head's chosen blocks of keys. Softcap, ALiBi, sinks and masks of the options
// act in the attention, not in the selection; options.workspace serves the attention, the selection keeps memory of its own
// per thread.
template <class Compiled = AllFormats>
Status xattention(const Operand& q, const Kv& kv, const Result& out, const XAttention& rule = {},
                  const AttentionOptions& options = {}) {
  return door::attend_to_selected<Compiled, XAttentionLists>(q, kv, out, rule, options);
}
template <class TK, class TV>
Status xattention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                  const XAttention& rule = {}, const AttentionOptions& options = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return xattention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, rule, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
