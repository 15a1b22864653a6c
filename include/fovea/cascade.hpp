// SPDX-License-Identifier: Apache-2.0
// FRONT DOOR: attention over shared prefixes (cascade inference). Requests that begin with the same tokens read those keys once,
// all their queries together; each request's own keys are one more level, and the levels are merged by their LSE (Juravsky et
// al. 2024, Hydragen, arXiv 2402.05099; multi-level as in FlashInfer).
//
//   const fovea::CascadeLevel levels[] = {{prefix_kv, all_requests, prefix_lengths}, {own_kv, each_request, own_lengths}};
//   fovea::Status status = fovea::cascade_attention(q, levels, out, {.cu_len_q = cu_len_q});
//
// cache/paged_cache.hpp lists the pages behind a shared prefix (PageLists): the two levels of one pool.
#pragma once
#include <algorithm>
#include <vector>

#include "attention.hpp"
#include "call/local.hpp"
#include "engine/deal.hpp"

namespace fovea {
inline namespace v0 {

// The keys of one level: one sequence of `kv` per group of neighbouring requests.
struct CascadeLevel {
  Kv kv;
  std::span<const index_t> group_begin;   // [group + 1]  group g is the requests group_begin[g] .. group_begin[g + 1] - 1
  std::span<const index_t> len_k;         // [group]      keys in use
};

inline namespace FOVEA_ARCH {

// What to do, as data: a plan per level, for every layer of a step. Made by make_plan.
struct CascadePlan {
  struct Level {
    std::vector<index_t> cu_len_q;   // [group + 1]  whose queries are whose, by group
    Plan plan;
  };
  std::vector<Level> levels;
};

// out_i = attention of query i over the keys of all levels, in the order of the levels. Equal to the same attention over
// concatenated keys up to rounding (not bit for bit).
// Shapes     q [1, q_head, total_len_q, dim_qk] and out likewise with dim_v; options.cu_len_q [request + 1] says whose queries
//            are whose; every group's sequence of the level's kv has kv_heads and dims of the call.
// Masks      options.causal and options.tree act on the last level, whose keys end with the request's own tokens; earlier levels
//            are seen whole. A sink is counted once. Windows, ALiBi, bias and keep are refused: they need the distance to keys of
//            other levels, which differs within a group.
// Memory     an fp32 copy of out and its LSE, two with more than one level, and what the largest level's run needs: of
//            options.workspace, else kept per thread.
// Allocates  nothing on a warm call with as many levels as the last, nothing at all with a plan and a workspace.
// Errors     as fovea::attention; on error nothing has been written.
template <class Compiled = AllFormats>
Status cascade_attention(const Operand& q, std::span<const CascadeLevel> levels, const Result& out,
                         const AttentionOptions& options);

// Fills `plan` for every call of this shape, these levels and these options. Of a level only the groups and lengths are read;
// shape.len_k is not used. Pure; a reused plan keeps its memory.
Status make_plan(CascadePlan& plan, const AttentionShape& shape, std::span<const CascadeLevel> levels,
                 const AttentionOptions& options);

std::size_t workspace_bytes(const CascadePlan& plan, int lanes = 1);

// Runs a plan made from the same shape, groups, lengths and options.
template <class Compiled = AllFormats>
Status cascade_attention(const CascadePlan& plan, const Operand& q, std::span<const CascadeLevel> levels, const Result& out,
                         const AttentionOptions& options);

namespace door {

struct CascadeLocal : LocalBytes {
  CascadePlan plan;
};

// What can be said without the tensors.
inline Status check_levels(const AttentionShape& shape, std::span<const CascadeLevel> levels, const AttentionOptions& o) {
  if (levels.empty()) return invalid("fovea: a cascade needs at least one level");
  if (shape.batch != 1 || o.cu_len_q.size() < 2)
    return invalid("fovea: a cascade has ragged queries: batch 1 (got %td) and cu_len_q (got %zu entries)", shape.batch,
                   o.cu_len_q.size());
  if (Status s = check_cumulative("cu_len_q", o.cu_len_q, shape.len_q); !s.ok()) return s;
  if (!o.cu_len_k.empty() || !o.len_k.empty() || !o.q_offset.empty())
    return invalid("fovea: the levels of a cascade carry the lengths of keys; cu_len_k, len_k and q_offset must be empty");
  if (o.window.left >= 0 || o.window.right >= 0 || !o.alibi_slopes.empty() || o.bias || o.keep)
    return unsupported("fovea: window, alibi_slopes, bias and keep are not defined over the levels of a cascade");
  if (o.causal == Causal::top_left) return unsupported("fovea: causal top_left is not defined over the levels of a cascade");
  const auto requests = static_cast<index_t>(o.cu_len_q.size()) - 1;
  for (std::size_t l = 0; l < levels.size(); ++l) {
    const CascadeLevel& level = levels[l];
    if (level.group_begin.size() < 2 || level.group_begin.size() != level.len_k.size() + 1)
      return invalid("fovea: level %zu has %zu group borders and %zu lengths", l, level.group_begin.size(), level.len_k.size());
    if (Status s = check_cumulative("group_begin", level.group_begin, requests); !s.ok()) return s;
    if (level.group_begin.back() != requests)
      return invalid("fovea: the groups of level %zu end at request %td of %td", l, level.group_begin.back(), requests);
  }
  if ((o.causal != Causal::none || !o.tree.empty()) && static_cast<index_t>(levels.back().len_k.size()) != requests)
    return invalid("fovea: with causal or tree the last level has one group per request, it has %zu for %td",
                   levels.back().len_k.size(), requests);
  for (index_t r = 0; (o.causal != Causal::none || !o.tree.empty()) && r <= requests; ++r) {
    const index_t begin = levels.back().group_begin[static_cast<std::size_t>(r)];
    if (begin != r)
      return invalid("fovea: with causal or tree group %td of the last level is request %td, it starts at %td", r, r, begin);
  }
  if (!o.tree.empty() && static_cast<index_t>(o.tree.size()) != shape.len_q)
    return invalid("fovea: tree has %zu words for %td queries", o.tree.size(), shape.len_q);
  return {};
}

// Its len_k belongs to a level.
inline AttentionShape cascade_shape(const Operand& q, std::span<const CascadeLevel> levels, const Result& out) {
  return {q.extent[0], q.extent[1], levels.empty() ? 0 : levels[0].kv.kv_heads, q.extent[2], 0, q.extent[3], out.extent[3]};
}

inline Status check_cascade(const Operand& q, std::span<const CascadeLevel> levels, const Result& out,
                            const AttentionOptions& o) {
  const AttentionShape shape = cascade_shape(q, levels, out);
  if (Status s = check_levels(shape, levels, o); !s.ok()) return s;
  // The levels run into memory of the door's own, so their checks do not see out, lse and the whole workspace.
  AttentionOptions outputs;
  outputs.lse = o.lse;
  outputs.workspace = o.workspace;
  outputs.sink = o.sink;
  outputs.tree = o.tree;
  for (std::size_t l = 0; l < levels.size(); ++l) {
    const Kv& kv = levels[l].kv;
    if (Status s = check_call(tidy_operand(q), tidy_kv(kv), tidy_operand(out), outputs); !s.ok()) return s;
    if (kv.kv_heads != shape.kv_heads)
      return invalid("fovea: level %zu of the cascade has %td kv heads, level 0 has %td", l, kv.kv_heads, shape.kv_heads);
  }
  return {};
}

// The call of level l; lse and workspace are still missing.
inline AttentionOptions level_options(const CascadePlan& plan, std::size_t l, const CascadeLevel& level,
                                      const AttentionOptions& options) {
  AttentionOptions o = options;
  o.cu_len_q = plan.levels[l].cu_len_q;
  o.len_k = level.len_k;
  o.lse = {};
  o.workspace = {};
  if (l + 1 != plan.levels.size()) {
    o.causal = Causal::none;
    o.tree = {};
    o.sink = {};
  } else if (!o.tree.empty()) {   // it may have words for queries behind the last request
    o.tree = o.tree.first(static_cast<std::size_t>(o.cu_len_q.back()));
  }
  return o;
}

// check_levels has been passed.
inline Status plan_levels(CascadePlan& plan, AttentionShape shape, std::span<const CascadeLevel> levels,
                          const AttentionOptions& options) {
  plan.levels.resize(levels.size());
  shape.len_q = options.cu_len_q.back();   // queries behind the last request belong to nobody
  for (std::size_t l = 0; l < levels.size(); ++l) {
    CascadePlan::Level& level = plan.levels[l];
    level.cu_len_q.clear();
    for (const index_t request : levels[l].group_begin)
      level.cu_len_q.push_back(options.cu_len_q[static_cast<std::size_t>(request)]);
    shape.len_k = *std::max_element(levels[l].len_k.begin(), levels[l].len_k.end());
    if (Status s = make_plan(level.plan, shape, level_options(plan, l, levels[l], options)); !s.ok()) return s;
  }
  return {};
}

inline Status check_cascade_plan(const CascadePlan& plan, const Operand& q, std::span<const CascadeLevel> levels,
                                 const Result& out, const AttentionOptions& options) {
  if (plan.levels.size() != levels.size())
    return invalid("fovea: the plan is for %zu levels of a cascade, the call has %zu", plan.levels.size(), levels.size());
  for (std::size_t l = 0; l < levels.size(); ++l) {
    const CascadePlan::Level& planned = plan.levels[l];
    const std::span<const index_t> groups = levels[l].group_begin;
    if (planned.cu_len_q.size() != groups.size())
      return invalid("fovea: level %zu of the cascade is planned for %zu groups, the call has %zu", l,
                     planned.cu_len_q.size() - 1, groups.size() - 1);
    for (std::size_t g = 0; g < groups.size(); ++g) {
      const index_t called = options.cu_len_q[static_cast<std::size_t>(groups[g])];
      if (planned.cu_len_q[g] != called)
        return invalid("fovea: group %zu of level %zu is planned from query %td on, in the call it starts at %td", g, l,
                       planned.cu_len_q[g], called);
    }
    const AttentionOptions o = level_options(plan, l, levels[l], options);
    const AttentionShape shape = cascade_shape(q, levels, out);
    if (Status s = check_plan(planned.plan, shape, o, true, false); !s.ok()) return s;
  }
  return {};
}

struct CascadeMemory {
  float *so_far, *next;       // [head, query, dim_v]  the levels up to one, and that one
  float *lse, *next_lse;      // [head, query]
  std::byte* attention;
  std::size_t attention_bytes;
};
inline CascadeMemory carve(Bump& bump, const CascadePlan& plan, int lanes) {
  const Plan& first = plan.levels.front().plan;
  const index_t rows = first.request.q_heads * plan.levels.front().cu_len_q.back(), dim = first.request.dim_v;
  const index_t second = plan.levels.size() > 1 ? rows : 0;
  CascadeMemory memory{};
  memory.so_far = bump.take<float>(rows * dim);
  memory.next = bump.take<float>(second * dim);
  memory.lse = bump.take<float>(rows);
  memory.next_lse = bump.take<float>(second);
  for (const CascadePlan::Level& level : plan.levels)
    memory.attention_bytes = std::max(memory.attention_bytes, level.plan.workspace_bytes(lanes));
  memory.attention = bump.take<std::byte>(static_cast<index_t>(memory.attention_bytes));
  return memory;
}

inline constexpr index_t kMergedRows = 64;   // of one head: what a lane merges and writes at a time

// Everything but the levels' own problems has been checked.
template <class Compiled>
Status run_cascade(const CascadePlan& plan, const Operand& all_q, std::span<const CascadeLevel> levels, const Result& out,
                   const AttentionOptions& options, std::span<std::byte> workspace) {
  const int lanes = options.executor.lanes();
  if (Status s = check_workspace(workspace, workspace_bytes(plan, lanes)); !s.ok()) return s;
  Bump bump(aligned(workspace).data());
  const CascadeMemory memory = carve(bump, plan, lanes);
  Operand q = all_q;
  q.extent[2] = options.cu_len_q.back();
  const index_t heads = q.extent[1], total = q.extent[2], dim = out.extent[3];
  for (std::size_t l = 0; l < levels.size(); ++l) {
    const bool first = l == 0, last = l + 1 == levels.size();
    AttentionOptions step = level_options(plan, l, levels[l], options);
    step.lse = {first ? memory.lse : memory.next_lse, {1, heads, total}, {heads * total, total, 1}};
    step.workspace = {memory.attention, memory.attention_bytes};
    const Tensor<float> to = bhsd(first ? memory.so_far : memory.next, 1, heads, total, dim);
    if (Status s = attention<Compiled>(plan.levels[l].plan, q, levels[l].kv, to, step); !s.ok()) return s;
    if (first && !last) continue;
    const index_t runs = (total + kMergedRows - 1) / kMergedRows;
    deal(options.executor, lanes, heads * runs, [&](int, index_t task) {
      const index_t h = task / runs, begin = task % runs * kMergedRows;
      for (index_t i = begin; i < std::min(begin + kMergedRows, total); ++i) {
        const index_t row = h * total + i;
        float* const so_far = memory.so_far + row * dim;
        if (!first) merge_row(so_far, 1, memory.lse[row], memory.next + row * dim, 1, memory.next_lse[row], dim);
        if (!last) continue;
        write_numbers(out.format, so_far, dim,
                      out.data + (h * out.stride[1] + i * out.stride[2]) * row_bytes(out.format, 1), out.stride[3]);
        if (options.lse) options.lse(0, h, i) = memory.lse[row];
      }
    });
  }
  return {};
}

}   // namespace door

inline Status make_plan(CascadePlan& plan, const AttentionShape& shape, std::span<const CascadeLevel> levels,
                        const AttentionOptions& options) {
  if (Status s = door::check_levels(shape, levels, options); !s.ok()) return s;
  return door::plan_levels(plan, shape, levels, options);
}

inline std::size_t workspace_bytes(const CascadePlan& plan, int lanes) {
  if (plan.levels.empty()) return 0;
  Bump bump;
  door::carve(bump, plan, lanes);
  return bump.used() + kAlignment;
}

template <class Compiled>
Status cascade_attention(const Operand& q, std::span<const CascadeLevel> levels, const Result& out,
                         const AttentionOptions& options) {
  if (Status s = door::check_cascade(q, levels, out, options); !s.ok()) return s;
  return door::with_memory<door::CascadeLocal>([&](door::CascadeLocal& local) -> Status {
    if (Status s = door::plan_levels(local.plan, door::cascade_shape(q, levels, out), levels, options); !s.ok()) return s;
    const std::span<std::byte> workspace =
        !options.workspace.empty() ? options.workspace
                                   : local.workspace(workspace_bytes(local.plan, options.executor.lanes()));
    return door::run_cascade<Compiled>(local.plan, q, levels, out, options, workspace);
  });
}

template <class Compiled>
Status cascade_attention(const CascadePlan& plan, const Operand& q, std::span<const CascadeLevel> levels, const Result& out,
                         const AttentionOptions& options) {
  if (Status s = door::check_cascade(q, levels, out, options); !s.ok()) return s;
  if (Status s = door::check_cascade_plan(plan, q, levels, out, options); !s.ok()) return s;
  if (!options.workspace.empty()) return door::run_cascade<Compiled>(plan, q, levels, out, options, options.workspace);
  return door::with_memory<door::CascadeLocal>([&](door::CascadeLocal& local) {
    return door::run_cascade<Compiled>(plan, q, levels, out, options,
                                       local.workspace(workspace_bytes(plan, options.executor.lanes())));
  });
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
