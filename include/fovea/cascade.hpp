// SPDX-License-Identifier: Apache-2.0
// FRONT DOOR: attention over shared prefixes (cascade inference). Requests that begin with the same tokens read those keys once,
// all their queries together; each request's own keys are one more level, and the levels are merged by their LSE (Juravsky et
// al. 2024, Hydragen, arXiv 2402.05099; multi-level as in FlashInfer).
//
//   const fovea::CascadeLevel levels[] = {{prefix_kv, all_requests, prefix_lengths}, {own_kv, each_request, own_lengths}};
//   fovea::Status status = fovea::cascade_attention(q, levels, out, {.cu_len_q = cu_len_q});
#pragma once
#include <memory>
#include <new>
#include <vector>

#include "attention.hpp"

namespace fovea {
inline namespace v0 {

// The keys of one level: one sequence of `kv` per group of neighbouring requests.
struct CascadeLevel {
  Kv kv;
  std::span<const index_t> group_begin;   // [group + 1]  group g is the requests group_begin[g] .. group_begin[g + 1] - 1
  std::span<const index_t> len_k;         // [group]      keys in use
};

inline namespace FOVEA_ARCH {

// out_i = attention of query i over the keys of all levels, in the order of the levels. Equal to the same attention over
// concatenated keys up to rounding (not bit for bit).
// Shapes     q [1, q_head, total_len_q, dim_qk] and out likewise with dim_v; options.cu_len_q [request + 1] says whose queries
//            are whose; every group's sequence of the level's kv has kv_heads and dims of the call.
// Masks      options.causal and options.tree act on the last level, whose keys end with the request's own tokens; earlier levels
//            are seen whole. A sink is counted once. Windows, ALiBi, bias and keep are refused: they need the distance to keys of
//            other levels, which differs within a group.
// Allocates  two fp32 copies of out, kept per thread; the runs themselves use options.workspace where it is given.
// Errors     as fovea::attention; on error nothing has been written.
template <class Compiled = AllFormats>
Status cascade_attention(const Operand& q, std::span<const CascadeLevel> levels, const Result& out,
                         const AttentionOptions& options);

namespace door {

struct CascadeMemory {
  std::unique_ptr<float[]> numbers;
  std::size_t size = 0;
  std::vector<index_t> cu_len_q;

  float* floats(std::size_t wanted) {
    if (size < wanted) {
      numbers.reset();
      numbers.reset(new (std::nothrow) float[wanted]);
      size = numbers ? wanted : 0;
    }
    return numbers.get();
  }
};
inline CascadeMemory& cascade_memory() {
  thread_local CascadeMemory memory;
  return memory;
}

inline Status check_cascade(const Operand& q, std::span<const CascadeLevel> levels, const Result& out,
                            const AttentionOptions& o) {
  if (levels.empty()) return invalid("fovea: a cascade needs at least one level");
  if (q.extent[0] != 1 || o.cu_len_q.size() < 2)
    return invalid("fovea: a cascade has ragged queries: batch 1 (got %td) and cu_len_q (got %zu entries)", q.extent[0],
                   o.cu_len_q.size());
  if (Status s = check_cumulative("cu_len_q", o.cu_len_q, q.extent[2]); !s.ok()) return s;
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
  if (!o.tree.empty() && static_cast<index_t>(o.tree.size()) != q.extent[2])
    return invalid("fovea: tree has %zu words for %td queries", o.tree.size(), q.extent[2]);
  // The levels run into memory of the door's own, so their checks do not see out and lse.
  AttentionOptions outputs;
  outputs.lse = o.lse;
  for (const CascadeLevel& level : levels) {
    if (Status s = check_call(tidy_operand(q), tidy_kv(level.kv), tidy_operand(out), outputs); !s.ok()) return s;
  }
  return {};
}

}   // namespace door

template <class Compiled>
Status cascade_attention(const Operand& all_q, std::span<const CascadeLevel> levels, const Result& out,
                         const AttentionOptions& options) {
  if (Status s = door::check_cascade(all_q, levels, out, options); !s.ok()) return s;
  Operand q = all_q;
  q.extent[2] = options.cu_len_q.back();   // queries behind the last request belong to nobody
  const index_t heads = q.extent[1], total = q.extent[2], dim = out.extent[3], rows = heads * total;
  door::CascadeMemory& memory = door::cascade_memory();
  float* const numbers = memory.floats(static_cast<std::size_t>(2 * rows * (dim + 1) + 1));
  if (numbers == nullptr)
    return Status::error(Code::workspace_too_small, "fovea: no memory for %td partial rows of a cascade", 2 * rows);
  const Tensor<float> so_far = bhsd(numbers, 1, heads, total, dim), next = bhsd(numbers + rows * dim, 1, heads, total, dim);
  const auto lse_at = [&](index_t copy) {
    return View<float, 3>{numbers + 2 * rows * dim + copy * rows, {1, heads, total}, {rows, total, 1}};
  };
  for (std::size_t l = 0; l < levels.size(); ++l) {
    const CascadeLevel& level = levels[l];
    const bool last = l + 1 == levels.size();
    memory.cu_len_q.clear();
    for (const index_t request : level.group_begin)
      memory.cu_len_q.push_back(options.cu_len_q[static_cast<std::size_t>(request)]);
    AttentionOptions step = options;
    step.cu_len_q = memory.cu_len_q;
    step.len_k = level.len_k;
    step.lse = lse_at(l == 0 ? 0 : 1);
    if (!step.tree.empty()) step.tree = step.tree.first(static_cast<std::size_t>(total));
    if (!last) {
      step.causal = Causal::none;
      step.tree = {};
      step.sink = {};
    }
    if (Status s = attention<Compiled>(q, level.kv, l == 0 ? so_far : next, step); !s.ok()) return s;
    if (l == 0) continue;
    if (Status s = merge(so_far, lse_at(0), next, lse_at(1)); !s.ok()) return s;
  }
  for (index_t h = 0; h < heads; ++h) {
    for (index_t i = 0; i < total; ++i) {
      write_numbers(out.format, so_far.data + (h * total + i) * dim, dim,
                    out.data + (h * out.stride[1] + i * out.stride[2]) * row_bytes(out.format, 1), out.stride[3]);
      if (options.lse) options.lse(0, h, i) = lse_at(0)(0, h, i);
    }
  }
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
