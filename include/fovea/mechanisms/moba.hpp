// SPDX-License-Identifier: Apache-2.0
// MoBA (Lu et al. 2025, arXiv 2502.13189): every query of every q head attends to its own block of keys, causally, and to
// the k - 1 earlier blocks whose mean key (after rotation) has the largest dot product with it: gate_tj = q_t . mean_j,
// without a scale, own block counted in k, blocks behind it never. The mean of the own block is not used, so nothing of the
// future is.
//
// Few queries (decode, drafts) are lists of blocks for the sparse engine. Many are turned around, block by block as
// FlashMoBA does: the queries of a head that chose a history block are gathered and attend to it densely, in one ragged call
// whose sequences are the blocks; a second one does the own blocks; the k parts of a row are merged by their LSE. K and V of
// a block are then packed once for up to 1024 queries instead of once per query.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "../call/query_lists.hpp"
#include "../call/sparse_call.hpp"
#include "../engine/parts/pooling.hpp"
#include "../simd/numbers.hpp"
#include "../simd/project.hpp"

namespace fovea {
inline namespace v0 {

// Published: 512 and 3 for 8 K tokens, 2048 and 3 for 32 K, 4096 and 12 for 1 M.
struct MobaOptions {
  index_t block = 2048;              // keys of a block
  index_t k = 3;                     // blocks of a query, its own counted
  View<const float, 4> means = {};   // [sequence, kv_head, block, dim_qk] of moba_means; absent: made anew from all keys
};

inline namespace FOVEA_ARCH {

namespace moba_parts {

inline constexpr index_t kGroupedQueries = 64;      // of a sequence: from here on its queries are grouped by block
inline constexpr index_t kGatheredRows = 1 << 16;   // queries times history blocks in flight
inline constexpr index_t kMergedRows = 64;          // in one task

constexpr index_t blocks_of(index_t keys, index_t block) { return (keys + block - 1) / block; }

inline bool is_grouped(const AttentionOptions& options, const Sequence& s) {
  if (s.pos < 0 || s.len_q == 0) return false;
  return options.regime == Regime::prefill || (options.regime == Regime::automatic && s.len_q >= kGroupedQueries);
}
// What the two dense calls can say: the home as pages of whole blocks, no score that depends on the place of a key.
inline bool can_group(const Kv& kv, const AttentionOptions& o) {
  return kv.home == Home::contiguous && kv.exact == nullptr && o.softcap == 0.f && o.alibi_slopes.empty() && !o.bias &&
         !o.keep && o.tree.empty() && o.window.left < 0 && o.window.right < 0;
}

// What is known of a call.
struct Problem {
  Operand q;
  Kv kv;
  Result out;
  AttentionShape shape;
  AttentionOptions options;
  MobaOptions moba;
  index_t most_blocks = 0;   // of any sequence

  index_t group() const { return shape.q_heads / shape.kv_heads; }
  index_t sequences() const { return door::count_sequences(shape, options); }
  Sequence sequence(index_t b) const { return door::sequence_of(shape, options, b); }
  bool any_grouped() const {
    if (!can_group(kv, options)) return false;
    for (index_t b = 0; b < sequences(); ++b) {
      if (is_grouped(options, sequence(b))) return true;
    }
    return false;
  }
};

// Gates and choice of up to kProjectRows queries of one head.
struct GateMemory {
  ProjectMemory project;
  float* gates;               // [row, block]
  float* best;                // [k]
  std::int32_t* best_block;   // [k]
};
inline GateMemory carve_gates(Bump& bump, index_t rows, index_t blocks, index_t k) {
  const index_t held = std::min(rows, kProjectRows);
  GateMemory memory{carve_project(bump, held), nullptr, nullptr, nullptr};
  memory.gates = bump.take<float>(held * blocks);
  memory.best = bump.take<float>(k);
  memory.best_block = bump.take<std::int32_t>(k);
  return memory;
}

// to [k]: the k - 1 blocks of the largest gates, ties to the lower block, ascending, then `own` where it has keys, then -1.
// As in every selection NaN and -inf are never taken.
inline void choose(const float* gates, index_t history, index_t own, bool own_has_keys, index_t k, const GateMemory& memory,
                   std::int32_t* to) {
  const index_t wanted = k - 1;
  index_t taken = 0;
  if (history <= wanted) {
    for (; taken < history; ++taken) to[taken] = static_cast<std::int32_t>(taken);
  } else if (wanted > 0) {
    for (index_t j = 0; j < history; ++j) {
      const float gate = gates[j];
      if (!(gate > (taken < wanted ? -std::numeric_limits<float>::infinity() : memory.best[wanted - 1]))) continue;
      index_t at = taken < wanted ? taken++ : wanted - 1;
      for (; at > 0 && memory.best[at - 1] < gate; --at) {
        memory.best[at] = memory.best[at - 1];
        memory.best_block[at] = memory.best_block[at - 1];
      }
      memory.best[at] = gate;
      memory.best_block[at] = static_cast<std::int32_t>(j);
    }
    std::copy_n(memory.best_block, taken, to);
    std::sort(to, to + taken);
  }
  if (own_has_keys) to[taken++] = static_cast<std::int32_t>(own);
  std::fill(to + taken, to + k, -1);
}

// The lists of queries [begin, end) of one head, at most kProjectRows of them: to [query, k].
inline void choose_blocks(const Problem& p, const Sequence& s, index_t b, index_t q_head, index_t begin, index_t end,
                          const GateMemory& memory, std::int32_t* to) {
  const index_t rows = end - begin, size = p.moba.block, k = p.moba.k, dim = p.shape.dim_qk;
  const index_t used = blocks_of(s.len_k, size), last = s.pos + end - 1;
  const index_t columns = last < 0 || k == 1 ? 0 : std::min(last / size, used);
  if (columns > k - 1) {
    const View<const float, 4>& m = p.moba.means;
    const StoredMatrix means{reinterpret_cast<const std::byte*>(m.data + b * m.stride[0] + q_head / p.group() * m.stride[1]),
                             Format::f32, columns, dim, columns == 1 ? dim : m.stride[2]};
    const index_t number = row_bytes(p.q.format, 1);
    for (index_t task = 0; task < project_tasks(rows, columns); ++task) {
      project_task(
          task, rows, means, Weights::by_output, memory.project,
          [&](index_t row, index_t d, index_t count, float* numbers) {
            const index_t at = s.batch * p.q.stride[0] + q_head * p.q.stride[1] + (s.q_begin + begin + row) * p.q.stride[2] +
                               d * p.q.stride[3];
            read_strided(p.q.format, p.q.data + at * number, p.q.stride[3], count, numbers);
          },
          [&](index_t row, index_t block, index_t count, const float* gates) {
            std::copy_n(gates, count, memory.gates + row * columns + block);
          });
    }
  }
  for (index_t row = 0; row < rows; ++row) {
    const index_t pos = s.pos + begin + row, own = pos < 0 ? 0 : pos / size;
    choose(memory.gates + row * columns, pos < 0 ? 0 : std::min(own, used), own, pos >= 0 && own < used, k, memory,
           to + row * k);
  }
}

inline Status check(const Operand& q, const AttentionShape& shape, const AttentionOptions& options,
                    const MobaOptions& moba) {
  if (moba.block < 1 || moba.block > door::kMaxLength || moba.k < 1 || moba.k > door::kMaxLength)
    return door::invalid("fovea: moba: block %td, k %td: both must be positive", moba.block, moba.k);
  if (options.causal == Causal::none)
    return door::invalid("fovea: moba: a query's own block is the one of its position, so the call must be causal");
  const index_t blocks = blocks_of(door::longest_keys(shape, options), moba.block);
  if (!moba.means)
    return door::check_kept("means", {door::count_sequences(shape, options), shape.kv_heads, blocks, q.extent[3]}, shape,
                            options, blocks, q.extent[3]);
  door::Bytes ignored;
  if (Status s = door::check_data("means", moba.means, ignored); !s.ok()) return s;
  if (moba.means.stride[3] != 1 && moba.means.extent[3] > 1)
    return door::unsupported("fovea: means have innermost stride %td, must be 1", moba.means.stride[3]);
  return door::check_kept("means", moba.means.extent, shape, options, blocks, q.extent[3]);
}

// Means of the blocks [first, end of the keys in use) of every sequence.
template <class Compiled>
Status make_means(const KeyRows& rows, const Problem& p, const Sequence* sequences, index_t first, const View<float, 4>& to,
                  float* scratch, index_t scratch_stride) {
  const index_t size = p.moba.block, blocks = p.most_blocks - first;
  deal(p.options.executor, p.options.executor.lanes(), p.sequences() * p.shape.kv_heads * blocks,
       [&](int lane, index_t task) {
         const index_t block = first + task % blocks, head = task / blocks % p.shape.kv_heads,
                       b = task / blocks / p.shape.kv_heads;
         const index_t begin = block * size, end = std::min(begin + size, sequences[b].len_k);
         if (begin >= end) return;
         const auto each = [&](index_t from, index_t until, const auto& f) {
           rows.each(b, head, from, until, scratch + lane * scratch_stride, f);
         };
         pool_mean(each, begin, end, size, p.shape.dim_qk,
                   to.data + b * to.stride[0] + head * to.stride[1] + block * to.stride[2]);
       });
  return {};
}

struct GroupedMemory {
  std::int32_t* lists;   // [head of the group, query, k]
  std::int32_t* row;     // [head of the group, query, k - 1]  where a choice stands among the gathered rows
  float* q;              // [gathered row, dim_qk]
  float* out;            // [gathered row, dim_v]
  float* lse;            // [gathered row]
  float* own;            // [head of the group, query, dim_v]
  float* own_lse;        // [head of the group, query]
  index_t* cu;           // [block + 1]
  index_t* next;         // [block]
  index_t* len_k;        // [block]
  index_t* q_offset;     // [block]
  std::int32_t* pages;   // [block]
};

struct Memory {
  Sequence* sequences;   // [sequence]
  float* means;          // [sequence, kv_head, block, dim_qk]  where none are given
  float* key;            // [lane, padded dim_qk]
  std::byte* gates;      // [lane]
  std::int32_t* lists;   // [sequence, q_head, query, k]  where no sequence is grouped; else of one sequence
  GroupedMemory grouped;
};

inline index_t queries_at_once(const Problem& p) {
  const index_t rows = p.group() * std::max<index_t>(p.moba.k - 1, 1);
  return std::clamp<index_t>(kGatheredRows / rows, 1, std::max<index_t>(door::longest_queries(p.shape, p.options), 1));
}
inline std::size_t gate_bytes(const Problem& p) {
  Bump bump;
  carve_gates(bump, std::max<index_t>(door::longest_queries(p.shape, p.options), 1), p.most_blocks, p.moba.k);
  return bump.used();
}

inline Memory carve(Bump& bump, const Problem& p) {
  const index_t lanes = p.options.executor.lanes(), k = p.moba.k, dim = p.shape.dim_qk;
  const bool grouped = p.any_grouped();
  Memory m{};
  m.sequences = bump.take<Sequence>(p.sequences());
  m.means = bump.take<float>(p.moba.means ? 0 : p.sequences() * p.shape.kv_heads * p.most_blocks * dim);
  m.key = bump.take<float>(lanes * padded(dim, kLanes));
  m.gates = bump.take<std::byte>(lanes * static_cast<index_t>(gate_bytes(p)));
  m.lists = bump.take<std::int32_t>(grouped ? p.shape.q_heads *
                                                  std::min(kGroupedQueries, door::longest_queries(p.shape, p.options)) * k
                                            : door::query_lists(p.shape, p.options) * k);
  if (!grouped) return m;
  const index_t queries = p.group() * queries_at_once(p), rows = queries * (k - 1), blocks = p.most_blocks + 1;
  GroupedMemory& g = m.grouped;
  g.lists = bump.take<std::int32_t>(queries * k);
  g.row = bump.take<std::int32_t>(rows);
  g.q = bump.take<float>(rows * dim);
  g.out = bump.take<float>(rows * p.shape.dim_v);
  g.lse = bump.take<float>(rows);
  g.own = bump.take<float>(queries * p.shape.dim_v);
  g.own_lse = bump.take<float>(queries);
  g.cu = bump.take<index_t>(blocks + 1);
  g.next = bump.take<index_t>(blocks);
  g.len_k = bump.take<index_t>(blocks);
  g.q_offset = bump.take<index_t>(blocks);
  g.pages = bump.take<std::int32_t>(blocks);
  return m;
}

// The blocks of one kv head of a sequence as the pages of a pool.
inline Kv paged_blocks(const Problem& p, const Sequence& s, index_t kv_head) {
  Kv kv = p.kv;
  const auto cut = [&](Stored& stored) {
    stored.data += s.kv_batch * stored.stride[0] + kv_head * stored.stride[1];
    stored.stride = {p.moba.block * stored.stride[2], 0, stored.stride[2]};
  };
  cut(kv.k);
  cut(kv.v);
  if (kv.k_channel_scale != nullptr) kv.k_channel_scale += kv_head * kv.dim_qk;
  kv.kv_heads = 1;
  kv.batch = blocks_of(s.len_k, p.moba.block);
  kv.len = p.moba.block;
  kv.home = Home::paged;
  return kv;
}

// A dense call over blocks. Everything has been checked, and its memory been taken.
template <class Compiled>
Status attend_blocks(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options) {
  const auto plain = variant();
  const door::Call call = door::call_of_variant<Compiled>(q, kv, out, options, plain);
  return door::with_local([&](door::Local& local) -> Status {
    const AttentionShape shape = door::shape_of(call.q, call.kv, options);
    door::list_sequences(local.plan, shape, options);
    if (Status s = local.plan.build(door::request_of(shape, options, call.needs)); !s.ok()) return s;
    return door::execute(local, local.plan, call);
  });
}

inline AttentionOptions block_options(const Problem& p, std::span<std::byte> workspace) {
  AttentionOptions o;
  o.scale = p.options.scale;
  o.regime = Regime::prefill;
  o.panels = p.options.panels;
  o.executor = p.options.executor;
  o.cpu = p.options.cpu;
  o.workspace = workspace;
  return o;
}

// Workspace of any of these calls: the largest blocks of rows that a plan makes.
inline Status largest_call(const Problem& p, std::size_t& bytes) {
  return door::with_local([&](door::Local& local) -> Status {
    for (const index_t heads : {index_t{1}, p.group()}) {
      AttentionShape shape = p.shape;
      shape.q_heads = heads;
      shape.kv_heads = 1;
      AttentionOptions options = block_options(p, {});
      options.executor = {};
      local.plan.sequences.assign(1, Sequence{0, index_t{1} << 20, 0, p.moba.block, 0, 0, 0});
      if (Status s = local.plan.build(door::request_of(shape, options)); !s.ok()) return s;
      bytes = std::max(bytes, local.plan.workspace_bytes(p.options.executor.lanes()));
    }
    if (!p.options.workspace.empty()) return {};
    return door::check_workspace(local.workspace(bytes), bytes);   // still there when the calls want it
  });
}

// Queries [begin, end) of all heads of one kv head.
template <class Compiled>
class GroupedChunk {
 public:
  GroupedChunk(const Problem& p, const Sequence& s, index_t b, index_t kv_head, index_t begin, index_t end,
               const Memory& memory, std::size_t lane_bytes, std::span<std::byte> workspace)
      : p_(p),
        s_(s),
        b_(b),
        kv_head_(kv_head),
        begin_(begin),
        count_(end - begin),
        memory_(memory),
        m_(memory.grouped),
        lane_bytes_(lane_bytes),
        workspace_(workspace),
        blocks_(blocks_of(s.len_k, p.moba.block)) {}

  Status run() {
    choose_all();
    gather();
    if (Status status = attend_history(); !status.ok()) return status;
    if (Status status = attend_own(); !status.ok()) return status;
    merge_all();
    return {};
  }

 private:
  index_t queries() const { return p_.group() * count_; }
  index_t history() const { return p_.moba.k - 1; }
  template <class F>
  void each(index_t tasks, const F& f) const {
    deal(p_.options.executor, p_.options.executor.lanes(), tasks, f);
  }
  // Entries of a query's list that are history blocks: the own one is behind them.
  index_t chosen(index_t query, index_t choice) const {
    const std::int32_t block = m_.lists[query * p_.moba.k + choice];
    const index_t pos = s_.pos + begin_ + query % count_;
    return block < 0 || block >= pos / p_.moba.block ? -1 : block;
  }

  void choose_all() const {
    const index_t runs = (count_ + kProjectRows - 1) / kProjectRows;
    each(p_.group() * runs, [&](int lane, index_t task) {
      const index_t head = task / runs, first = task % runs * kProjectRows, end = std::min(first + kProjectRows, count_);
      Bump bump(memory_.gates + static_cast<std::size_t>(lane) * lane_bytes_);
      const GateMemory gates = carve_gates(bump, door::longest_queries(p_.shape, p_.options), p_.most_blocks, p_.moba.k);
      choose_blocks(p_, s_, b_, kv_head_ * p_.group() + head, begin_ + first, begin_ + end, gates,
                    m_.lists + (head * count_ + first) * p_.moba.k);
    });
  }

  // Counting sort of (query, history block) by block, then the rows of q.
  void gather() const {
    std::fill_n(m_.cu, blocks_ + 1, index_t{0});
    for (index_t query = 0; query < queries(); ++query) {
      for (index_t n = 0; n < history(); ++n) {
        const index_t block = chosen(query, n);
        if (block >= 0) ++m_.cu[block + 1];
      }
    }
    for (index_t block = 0; block < blocks_; ++block) {
      m_.cu[block + 1] += m_.cu[block];
      m_.next[block] = m_.cu[block];
      m_.len_k[block] = std::min(p_.moba.block, s_.len_k - block * p_.moba.block);
      m_.pages[block] = static_cast<std::int32_t>(block);
    }
    for (index_t query = 0; query < queries(); ++query) {
      for (index_t n = 0; n < history(); ++n) {
        const index_t block = chosen(query, n);
        m_.row[query * history() + n] = block < 0 ? -1 : static_cast<std::int32_t>(m_.next[block]++);
      }
    }
    const index_t dim = p_.shape.dim_qk, number = row_bytes(p_.q.format, 1);
    each((queries() + kMergedRows - 1) / kMergedRows, [&](int, index_t task) {
      for (index_t query = task * kMergedRows; query < std::min((task + 1) * kMergedRows, queries()); ++query) {
        const index_t at = s_.batch * p_.q.stride[0] + (kv_head_ * p_.group() + query / count_) * p_.q.stride[1] +
                           (s_.q_begin + begin_ + query % count_) * p_.q.stride[2];
        const float* copied = nullptr;
        for (index_t n = 0; n < history(); ++n) {
          const std::int32_t row = m_.row[query * history() + n];
          if (row < 0) continue;
          float* const to = m_.q + row * dim;
          if (copied == nullptr) {
            read_numbers(p_.q.format, p_.q.data + at * number, p_.q.stride[3], dim, to);
          } else {
            std::copy_n(copied, dim, to);
          }
          copied = to;
        }
      }
    });
  }

  // One call: sequence j is the queries that chose block j, and its keys.
  Status attend_history() const {
    const index_t rows = m_.cu[blocks_];
    if (rows == 0) return {};
    AttentionOptions options = block_options(p_, workspace_);
    const auto blocks = static_cast<std::size_t>(blocks_);
    options.cu_len_q = {m_.cu, blocks + 1};
    options.len_k = {m_.len_k, blocks};
    options.lse = {m_.lse, {1, 1, rows}, {rows, rows, 1}};
    Kv kv = paged_blocks(p_, s_, kv_head_);
    kv.block_table = {m_.pages, {blocks_, 1}, {1, 1}};
    return attend_blocks<Compiled>(bhsd<const float>(m_.q, 1, 1, rows, p_.shape.dim_qk), kv,
                                   bhsd(m_.out, 1, 1, rows, p_.shape.dim_v), options);
  }

  // One call: a sequence is the chunk's queries of one block, and the block's keys.
  Status attend_own() const {
    const index_t size = p_.moba.block, first = (s_.pos + begin_) / size, last = (s_.pos + begin_ + count_ - 1) / size;
    // Queries that stand behind the blocks with keys have no own block, and only a sink's share of the row.
    const index_t sequences = std::max<index_t>(std::min(last + 1, blocks_) - first, 0);
    m_.cu[0] = 0;
    for (index_t n = 0; n < sequences; ++n) {
      const index_t begin = (first + n) * size;
      m_.cu[n + 1] = std::min(begin + size - s_.pos - begin_, count_);
      m_.len_k[n] = std::min(size, s_.len_k - begin);
      m_.q_offset[n] = s_.pos + begin_ + m_.cu[n] - begin;
      m_.pages[n] = static_cast<std::int32_t>(first + n);
    }
    const index_t with_keys = m_.cu[sequences];
    AttentionOptions options = block_options(p_, workspace_);
    const auto all = static_cast<std::size_t>(sequences);
    const auto head = static_cast<std::size_t>(kv_head_ * p_.group()), group = static_cast<std::size_t>(p_.group());
    options.causal = Causal::top_left;
    options.cu_len_q = {m_.cu, all + 1};
    options.len_k = {m_.len_k, all};
    options.q_offset = {m_.q_offset, all};
    options.lse = {m_.own_lse, {1, p_.group(), with_keys}, {queries(), count_, 1}};
    if (!p_.options.sink.empty()) options.sink = p_.options.sink.subspan(head, group);
    Operand q = p_.q;
    q.data += (s_.batch * q.stride[0] + kv_head_ * p_.group() * q.stride[1] + (s_.q_begin + begin_) * q.stride[2]) *
              row_bytes(q.format, 1);
    q.extent = {1, p_.group(), with_keys, p_.shape.dim_qk};
    const index_t dim = p_.shape.dim_v;
    const Tensor<float> own{m_.own, {1, p_.group(), with_keys, dim}, {queries() * dim, count_ * dim, dim, 1}};
    for (index_t query = 0; query < queries(); ++query) {
      if (query % count_ < with_keys) continue;
      m_.own_lse[query] = p_.options.sink.empty() ? -std::numeric_limits<float>::infinity()
                                                  : p_.options.sink[head + static_cast<std::size_t>(query / count_)];
      std::fill_n(m_.own + query * dim, dim, 0.f);
    }
    if (sequences == 0) return {};
    Kv kv = paged_blocks(p_, s_, kv_head_);
    kv.block_table = {m_.pages, {sequences, 1}, {1, 1}};
    return attend_blocks<Compiled>(q, kv, own, options);
  }

  // The parts of every row, own block first, in fp32 with weights made in double.
  void merge_all() const {
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    const index_t dim = p_.shape.dim_v, number = row_bytes(p_.out.format, 1);
    each((queries() + kMergedRows - 1) / kMergedRows, [&](int, index_t task) {
      for (index_t query = task * kMergedRows; query < std::min((task + 1) * kMergedRows, queries()); ++query) {
        const std::int32_t* const rows = m_.row + query * history();
        float* const sum = m_.own + query * dim;
        float top = m_.own_lse[query];
        for (index_t n = 0; n < history(); ++n) top = rows[n] >= 0 && m_.lse[rows[n]] > top ? m_.lse[rows[n]] : top;
        const auto weight = [&](float lse) {
          // Equal references make infinite logits equal; a NaN passes.
          return lse == top ? 1. : std::exp(static_cast<double>(lse) - static_cast<double>(top));
        };
        float lse = kNothing;
        if (top != kNothing) {
          double total = weight(m_.own_lse[query]);
          for (index_t n = 0; n < history(); ++n) total += rows[n] < 0 ? 0. : weight(m_.lse[rows[n]]);
          add(nullptr, static_cast<float>(weight(m_.own_lse[query]) / total), dim, sum);
          for (index_t n = 0; n < history(); ++n) {
            if (rows[n] >= 0) add(m_.out + rows[n] * dim, static_cast<float>(weight(m_.lse[rows[n]]) / total), dim, sum);
          }
          lse = static_cast<float>(static_cast<double>(top) + std::log(total));
        }
        const index_t head = kv_head_ * p_.group() + query / count_, pos = s_.q_begin + begin_ + query % count_;
        const Result& out = p_.out;
        write_numbers(out.format, sum, dim,
                      out.data + (s_.batch * out.stride[0] + head * out.stride[1] + pos * out.stride[2]) * number,
                      out.stride[3]);
        const View<float, 3>& lses = p_.options.lse;
        if (lses) lses.data[s_.batch * lses.stride[0] + head * lses.stride[1] + pos * lses.stride[2]] = lse;
      }
    });
  }

  // sum = sum * share without a part, sum += part * share with one.
  FOVEA_INLINE static void add(const float* part, float share, index_t dim, float* sum) {
    for (index_t d = 0; d < dim; d += kLanes) {
      const index_t width = std::min(kLanes, dim - d);
      const f32 before = width == kLanes ? load(sum + d) : load_some(sum + d, width);
      f32 after = before * f32(share);
      if (part != nullptr) after = fma(width == kLanes ? load(part + d) : load_some(part + d, width), f32(share), before);
      if (width == kLanes) {
        store(sum + d, after);
      } else {
        store_some(sum + d, after, width);
      }
    }
  }

  const Problem& p_;
  const Sequence& s_;
  index_t b_, kv_head_, begin_, count_;
  const Memory& memory_;
  const GroupedMemory& m_;
  std::size_t lane_bytes_;
  std::span<std::byte> workspace_;
  index_t blocks_;
};

// Lists of all queries of the sequences [first, first + count) and the sparse call over them; `call` has these sequences.
template <class Compiled>
Status attend_lists(const Problem& p, const Problem& call, index_t first, index_t count, const Memory& memory,
                    std::size_t lane_bytes, std::span<std::byte> workspace) {
  const index_t longest = door::longest_queries(call.shape, call.options), k = p.moba.k;
  const index_t runs = (longest + kProjectRows - 1) / kProjectRows, heads = p.shape.q_heads;
  deal(p.options.executor, p.options.executor.lanes(), count * heads * runs, [&](int lane, index_t task) {
    const index_t begin = task % runs * kProjectRows, head = task / runs % heads, b = task / runs / heads;
    const Sequence& s = memory.sequences[first + b];
    const index_t end = std::min(begin + kProjectRows, s.len_q), list_end = std::min(begin + kProjectRows, longest);
    std::int32_t* const to = memory.lists + ((b * heads + head) * longest + begin) * k;
    Bump bump(memory.gates + static_cast<std::size_t>(lane) * lane_bytes);
    const GateMemory gates = carve_gates(bump, door::longest_queries(p.shape, p.options), p.most_blocks, k);
    if (begin < end) choose_blocks(p, s, first + b, head, begin, end, gates, to);
    const index_t made = std::max<index_t>(end - begin, 0);
    std::fill(to + made * k, to + (list_end - begin) * k, -1);
  });
  KeyLists lists;
  lists.entries = memory.lists;
  lists.capacity = k;
  lists.batch = count;
  lists.heads = heads;
  lists.q_blocks = longest;
  lists.k_block = p.moba.block;
  AttentionOptions attend = call.options;
  attend.workspace = workspace;
  return door::sparse<Compiled>(call.q, call.kv, {&lists, 1}, call.out, attend);
}

// One sequence of a contiguous call as a call of its own. pos and len_k live as long as it.
inline Problem one_sequence(const Problem& p, const Sequence& s, const index_t& pos, const index_t& len_k) {
  Problem one = p;
  one.q.data += (s.batch * p.q.stride[0] + s.q_begin * p.q.stride[2]) * row_bytes(p.q.format, 1);
  one.out.data += (s.batch * p.out.stride[0] + s.q_begin * p.out.stride[2]) * row_bytes(p.out.format, 1);
  one.q.extent[0] = one.out.extent[0] = 1;
  one.q.extent[2] = one.out.extent[2] = s.len_q;
  one.kv.k.data += s.kv_batch * p.kv.k.stride[0];
  one.kv.v.data += s.kv_batch * p.kv.v.stride[0];
  one.kv.batch = 1;
  one.shape.batch = 1;
  one.shape.len_q = s.len_q;
  one.options.cu_len_q = {};
  one.options.len_k = {&len_k, 1};
  one.options.q_offset = {&pos, 1};
  View<float, 3>& lse = one.options.lse;
  if (lse) {
    lse.data += s.batch * lse.stride[0] + s.q_begin * lse.stride[2];
    lse.extent = {1, lse.extent[1], s.len_q};
  }
  return one;
}

template <class Compiled>
Status run(Problem& p, const Memory& memory, std::span<std::byte> workspace) {
  for (index_t b = 0; b < p.sequences(); ++b) memory.sequences[b] = p.sequence(b);
  const std::size_t lane_bytes = gate_bytes(p);
  if (!p.moba.means) {
    KeyRows rows;
    StoredSource source{};
    source.kv = p.kv;
    source.sequences = memory.sequences;
    if (Status s = KeyRows::open(source, Compiled{}, rows); !s.ok()) return s;
    const Tensor<float> means = bhsd(memory.means, p.sequences(), p.shape.kv_heads, p.most_blocks, p.shape.dim_qk);
    if (Status s = make_means<Compiled>(rows, p, memory.sequences, 0, means, memory.key, padded(p.shape.dim_qk, kLanes));
        !s.ok())
      return s;
    p.moba.means = means;
  }
  if (!p.any_grouped()) return attend_lists<Compiled>(p, p, 0, p.sequences(), memory, lane_bytes, workspace);
  const index_t at_once = queries_at_once(p);
  // Those with lists first: their calls may find the workspace too small, and nothing has been written yet.
  for (index_t turn = 0; turn < 2 * p.sequences(); ++turn) {
    const index_t b = turn % p.sequences();
    const Sequence s = memory.sequences[b];
    if (is_grouped(p.options, s) != (turn >= p.sequences())) continue;
    if (!is_grouped(p.options, s)) {
      if (s.len_q == 0) continue;
      // Its lists have room for kGroupedQueries, which only a sequence that starts before key 0 exceeds.
      for (index_t first = 0; first < s.len_q; first += kGroupedQueries) {
        Sequence part = s;
        part.q_begin += first;
        part.pos += first;
        part.len_q = std::min(kGroupedQueries, s.len_q - first);
        memory.sequences[b] = part;
        const Problem one = one_sequence(p, part, part.pos, part.len_k);
        if (Status status = attend_lists<Compiled>(p, one, b, 1, memory, lane_bytes, workspace); !status.ok()) return status;
        memory.sequences[b] = s;
      }
      continue;
    }
    for (index_t kv_head = 0; kv_head < p.shape.kv_heads; ++kv_head) {
      for (index_t begin = 0; begin < s.len_q; begin += at_once) {
        GroupedChunk<Compiled> chunk(p, s, b, kv_head, begin, std::min(begin + at_once, s.len_q), memory, lane_bytes,
                                     workspace);
        if (Status status = chunk.run(); !status.ok()) return status;
      }
    }
  }
  return {};
}

struct Workspace : door::LocalBytes {};

}   // namespace moba_parts

// Mean keys of the blocks [first_block, end of the keys in use): means [sequence, kv_head, block, dim_qk], the last block
// over the keys it has. K in any format and home. A block's mean is wanted when its last key is there, so decode calls this
// once per block. options: len_k and the executor.
template <class Compiled = AllFormats>
Status moba_means(const Kv& kv_any, const View<float, 4>& means_any, const AttentionOptions& options = {},
                  const MobaOptions& moba = {}, index_t first_block = 0) {
  const View<float, 4> means = tidy(means_any);
  moba_parts::Problem p;
  p.kv = door::tidy_kv(kv_any);
  p.options = options;
  p.moba = moba;
  Operand nobody;
  nobody.extent = {kv_any.home == Home::paged ? static_cast<index_t>(options.len_k.size()) : kv_any.batch, kv_any.kv_heads,
                   0, kv_any.dim_qk};
  p.shape = door::shape_of(nobody, p.kv, options);
  door::Bytes k_bytes, mean_bytes;
  if (moba.block < 1 || first_block < 0)
    return door::invalid("fovea: moba: block %td, first block %td", moba.block, first_block);
  if (Status s = door::check_stored("k", p.kv, p.kv.k, p.kv.dim_qk, k_bytes); !s.ok()) return s;
  if (p.kv.exact != nullptr) {
    door::Bytes ignored;
    if (Status s = door::check_stored("the exact k", *p.kv.exact, p.kv.exact->k, p.kv.dim_qk, ignored); !s.ok()) return s;
  }
  if (Status s = door::check_problem(p.shape, options); !s.ok()) return s;
  if (Status s = door::check_home(p.kv, p.shape, options); !s.ok()) return s;
  p.most_blocks = moba_parts::blocks_of(door::longest_keys(p.shape, options), moba.block);
  if (Status s = door::check_data("means", means, mean_bytes); !s.ok()) return s;
  if (Status s = door::check_kept("means", means.extent, p.shape, options, p.most_blocks, p.kv.dim_qk); !s.ok()) return s;
  if (means.stride[3] != 1 && means.extent[3] > 1)
    return door::unsupported("fovea: means have innermost stride %td, must be 1", means.stride[3]);
  if (!door::writes_apart(means)) return door::invalid("fovea: means overlap themselves");
  if (Status s = door::check_apart({"means", mean_bytes}, "k", k_bytes); !s.ok()) return s;
  if (first_block >= p.most_blocks) return {};
  const index_t stride = padded(p.kv.dim_qk, kLanes);
  const auto take = [&](Bump& bump) {
    Sequence* const sequences = bump.take<Sequence>(p.sequences());
    return std::pair(sequences, bump.take<float>(options.executor.lanes() * stride));
  };
  Bump size;
  static_cast<void>(take(size));
  return door::with_memory<moba_parts::Workspace>([&](moba_parts::Workspace& memory) -> Status {
    const std::size_t wanted = size.used() + kAlignment;
    const std::span<std::byte> bytes = memory.workspace(wanted);
    if (Status s = door::check_workspace(bytes, wanted); !s.ok()) return s;
    Bump bump(aligned(bytes).data());
    const auto [sequences, scratch] = take(bump);
    for (index_t b = 0; b < p.sequences(); ++b) sequences[b] = p.sequence(b);
    StoredSource source{};
    source.kv = p.kv;
    source.sequences = sequences;
    KeyRows rows;
    if (Status s = KeyRows::open(source, Compiled{}, rows); !s.ok()) return s;
    return moba_parts::make_means<Compiled>(rows, p, sequences, first_block, means, scratch, stride);
  });
}

namespace moba_parts {

inline Status open(Problem& p, const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options,
                   const MobaOptions& moba) {
  if (Status s = door::check_selecting_call(q, kv, out, options); !s.ok()) return s;
  p.q = door::tidy_operand(q);
  p.kv = door::tidy_kv(kv);
  p.out = door::tidy_operand(out);
  p.shape = door::shape_of(p.q, p.kv, options);
  p.options = options;
  p.options.lse = tidy(options.lse);
  p.moba = moba;
  p.moba.means = tidy(moba.means);
  if (Status s = check(p.q, p.shape, options, p.moba); !s.ok()) return s;
  p.most_blocks = blocks_of(door::longest_keys(p.shape, options), moba.block);
  p.moba.k = std::min(p.moba.k, p.most_blocks + 1);
  return {};
}

}   // namespace moba_parts

// The blocks of every query: lists [sequence, q_head, query, k], ascending, -1 behind the last one; a KeyLists of k_block =
// moba.block. moba.means are required; options must be causal, len_k and q_offset say where queries stand.
inline Status moba_select(const Operand& q_any, const View<std::int32_t, 4>& lists_any, const AttentionOptions& options,
                          const MobaOptions& moba) {
  moba_parts::Problem p;
  p.q = door::tidy_operand(q_any);
  p.options = options;
  p.moba = moba;
  p.moba.means = tidy(moba.means);
  const View<std::int32_t, 4> lists = tidy(lists_any);
  door::Bytes ignored;
  if (Status s = door::check_plain("q", p.q.format); !s.ok()) return s;
  if (Status s = door::check_data("q", p.q, ignored); !s.ok()) return s;
  if (!moba.means) return door::invalid("fovea: moba: means are missing; moba_means makes them");
  if (moba.block < 1 || moba.block > door::kMaxLength) return door::invalid("fovea: moba: block is %td", moba.block);
  const index_t len_k = options.len_k.empty() ? moba.means.extent[2] * moba.block : door::longest_keys({}, options);
  p.shape = {p.q.extent[0], p.q.extent[1], moba.means.extent[1], p.q.extent[2], len_k, p.q.extent[3], p.q.extent[3]};
  if (Status s = door::check_problem(p.shape, options); !s.ok()) return s;
  if (Status s = moba_parts::check(p.q, p.shape, options, p.moba); !s.ok()) return s;
  if (Status s = door::check_list_view(lists, p.shape, options, moba.k); !s.ok()) return s;
  p.most_blocks = moba_parts::blocks_of(len_k, moba.block);
  const index_t longest = door::longest_queries(p.shape, options), runs = (longest + kProjectRows - 1) / kProjectRows;
  const index_t heads = p.shape.q_heads;
  const std::size_t lane_bytes = moba_parts::gate_bytes(p);
  const index_t held = std::min(longest, kProjectRows) * moba.k;   // a run of lists, before it goes where the view says
  const auto use = [&](const door::QueryListMemory& memory, std::span<std::byte>) -> Status {
    deal(options.executor, options.executor.lanes(), p.sequences() * heads * runs, [&](int lane, index_t task) {
      const index_t begin = task % runs * kProjectRows, head = task / runs % heads, b = task / runs / heads;
      const Sequence s = p.sequence(b);
      const index_t end = std::min(begin + kProjectRows, s.len_q);
      Bump bump(memory.scratch + static_cast<std::size_t>(lane) * lane_bytes);
      const auto gates = moba_parts::carve_gates(bump, longest, p.most_blocks, moba.k);
      std::int32_t* const run = memory.entries + lane * held;
      if (begin < end) moba_parts::choose_blocks(p, s, b, head, begin, end, gates, run);
      for (index_t i = begin; i < std::min(begin + kProjectRows, longest); ++i) {
        std::int32_t* const to = lists.data + b * lists.stride[0] + head * lists.stride[1] + i * lists.stride[2];
        if (i < end) {
          std::copy_n(run + (i - begin) * moba.k, moba.k, to);
        } else {
          std::fill_n(to, moba.k, -1);
        }
      }
    });
    return {};
  };
  return door::with_list_memory(options, options.executor.lanes(), held, lane_bytes, use);
}

// Attention over the chosen blocks; the rest is fovea::attention's, the LSE counts the chosen blocks alone. kv in any home
// and format. Many queries of a sequence (64, or Regime::prefill) are grouped by block where K and V are contiguous and
// neither window, softcap, ALiBi, bias, keep nor trees are asked for; otherwise every query has its list. Of a given
// options.workspace the mechanism takes moba_workspace_bytes; where queries are listed, the sparse call takes the rest.
template <class Compiled = AllFormats>
Status moba_attention(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options,
                      const MobaOptions& moba = {}) {
  moba_parts::Problem p;
  if (Status s = moba_parts::open(p, q, kv, out, options, moba); !s.ok()) return s;
  if (p.moba.means) {
    door::Bytes bytes;
    if (Status s = door::check_data("means", p.moba.means, bytes); !s.ok()) return s;
    if (Status s = door::check_learned("means", bytes, out, options); !s.ok()) return s;
  }
  std::size_t dense_bytes = 0;
  if (p.any_grouped()) {
    if (Status s = moba_parts::largest_call(p, dense_bytes); !s.ok()) return s;
  }
  Bump size;
  moba_parts::carve(size, p);
  const std::size_t own = size.used() + kAlignment;
  const auto run = [&](std::span<std::byte> bytes, std::span<std::byte> left) -> Status {
    Bump bump(aligned(bytes).data());
    return moba_parts::run<Compiled>(p, moba_parts::carve(bump, p), left);
  };
  if (!options.workspace.empty()) {
    if (Status s = door::check_workspace(options.workspace, own + dense_bytes); !s.ok()) return s;
    return run(options.workspace, options.workspace.subspan(own));
  }
  return door::with_memory<moba_parts::Workspace>([&](moba_parts::Workspace& memory) -> Status {
    const std::span<std::byte> bytes = memory.workspace(own);
    if (Status s = door::check_workspace(bytes, own); !s.ok()) return s;
    return run(bytes, {});
  });
}
template <class TK, class TV>
Status moba_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                      const AttentionOptions& options, const MobaOptions& moba = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return moba_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, options, moba);
}

// What a call takes of a workspace beside what the sparse call takes; 0 where the call would be refused.
inline std::size_t moba_workspace_bytes(const Operand& q, const Kv& kv, const Result& out, AttentionOptions options,
                                        const MobaOptions& moba = {}) {
  options.workspace = {};
  moba_parts::Problem p;
  if (!moba_parts::open(p, q, kv, out, options, moba).ok()) return 0;
  std::size_t dense_bytes = 0;
  if (p.any_grouped() && !moba_parts::largest_call(p, dense_bytes).ok()) return 0;
  Bump size;
  moba_parts::carve(size, p);
  return size.used() + kAlignment + dense_bytes;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
