// SPDX-License-Identifier: Apache-2.0
// A call whose keys are listed: what the front door of sparse attention and every sparse mechanism run.
#pragma once
#include "variant.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// The plan of a sparse step: its lists as runs of keys, and tasks over their slots. Serves every layer that has these lists.
class SparsePlan {
 public:
  std::size_t workspace_bytes(int lanes) const { return plan.workspace_bytes(lanes); }
  std::string describe() const {
    char text[256];
    std::snprintf(text, sizeof text,
                  "lists       %td keys listed, shared by %td queries each, %td heads with lists\n"
                  "order       %s\n",
                  lists.total_slots(), lists.q_block(), lists.heads(),
                  together ? "key tile by key tile, many lists at once" : "list by list");
    return plan.describe() + text;
  }

  Plan plan;
  KeyRanges lists;
  bool together = false;   // blocks hold many lists; keys are positions
};

namespace door {

struct SparseLocal : LocalBytes {
  SparsePlan sparse;
  AttentionRun run;
};

inline SharedHeads shared_heads(const AttentionRun& run) {
  return {run.source, run.plan->request.kv_heads / run.source.kv.kv_heads};
}
inline ListSource list_source(const AttentionRun& run) {
  return {run.source, run.lists, run.plan->request.kv_heads / run.source.kv.kv_heads};
}

// Softmax with the options; the lanes of a call without a variant.
struct ListSoftmaxLanes {
  template <class PanelType>
  static void lane(AttentionRun& run, int lane) {
    const auto over = [&](const auto& source, const auto& masked) {
      if (run.modified()) {
        tile_lane<PanelType>(run, lane, TileSpec{source, run.score, masked(run.mask), run.norm, NoTap{}, run.epilogue});
      } else {
        tile_lane<PanelType>(run, lane,
                             TileSpec{source, Identity{}, masked(run.mask.first), run.norm, NoTap{}, run.epilogue});
      }
    };
    if (run.plan->listed) {
      over(list_source(run), [](const auto& mask) { return mask; });
    } else {
      over(shared_heads(run), [&](const auto& mask) { return InLists<std::decay_t<decltype(mask)>>{mask, run.lists}; });
    }
  }
};
template <class V>
struct ListVariantLanes {
  template <class PanelType>
  static void lane(AttentionRun& run, int lane) {
    if (run.plan->listed) {
      tile_lane<PanelType>(run, lane, VariantTraits<V>::spec_of(run, list_source(run)));
    } else if constexpr (VariantTraits<V>::needs().split_keys) {
      const auto spec = VariantTraits<V>::spec_of(run, shared_heads(run));
      const InLists<decltype(spec.mask)> mask{spec.mask, run.lists};
      tile_lane<PanelType>(run, lane, TileSpec{spec.source, spec.score, mask, spec.norm, spec.tap, spec.epilogue});
    }
  }
};

inline index_t list_heads(std::span<const KeyLists> kinds) {
  index_t heads = 1;
  for (const KeyLists& kind : kinds) heads = std::max(heads, kind.heads);
  return heads;
}

inline Status check_list(const KeyLists& kind, std::size_t n, const AttentionShape& shape, index_t sequences,
                         index_t longest) {
  if (kind.batch != 1 && kind.batch != sequences)
    return invalid("fovea: lists[%zu] are for %td sequences, must be 1 or %td", n, kind.batch, sequences);
  if (kind.heads != 1 && kind.heads != shape.kv_heads && kind.heads != shape.q_heads)
    return invalid("fovea: lists[%zu] are for %td heads, must be 1, %td (kv heads) or %td (q heads)", n, kind.heads,
                   shape.kv_heads, shape.q_heads);
  if (kind.q_block < 1 || kind.q_block > kMaxLength || kind.k_block < 1 || kind.k_block > kMaxLength || kind.q_blocks < 0 ||
      kind.q_blocks > kMaxLength || kind.capacity < 0 || kind.capacity > kMaxLength)
    return invalid("fovea: lists[%zu] have q_block %td, k_block %td, q_blocks %td, capacity %td: blocks must be positive", n,
                   kind.q_block, kind.k_block, kind.q_blocks, kind.capacity);
  if (kind.q_blocks < (longest + kind.q_block - 1) / kind.q_block)
    return invalid("fovea: lists[%zu] hold %td blocks of %td queries, the longest sequence has %td queries", n,
                   kind.q_blocks, kind.q_block, longest);
  index_t lists = 0;
  if (__builtin_mul_overflow(kind.batch * kind.heads, kind.q_blocks, &lists))
    return unsupported("fovea: lists[%zu] are too many: %td x %td x %td", n, kind.batch, kind.heads, kind.q_blocks);
  index_t numbers = 0;
  if (!kind.begin.empty()) {
    if (static_cast<index_t>(kind.begin.size()) != lists + 1)
      return invalid("fovea: lists[%zu].begin has %zu entries for %td lists, must have one more", n, kind.begin.size(),
                     lists);
    if (Status s = check_cumulative("begin", kind.begin, PTRDIFF_MAX); !s.ok()) return s;
    numbers = kind.begin.back();
  } else {
    if (!kind.count.empty() && static_cast<index_t>(kind.count.size()) != lists)
      return invalid("fovea: lists[%zu].count has %zu entries for %td lists", n, kind.count.size(), lists);
    for (std::size_t i = 0; i < kind.count.size(); ++i) {
      if (kind.count[i] < 0 || kind.count[i] > kind.capacity)
        return invalid("fovea: lists[%zu].count[%zu] is %d, must be 0 .. %td", n, i, static_cast<int>(kind.count[i]),
                       kind.capacity);
    }
    if (__builtin_mul_overflow(lists, kind.capacity, &numbers))
      return unsupported("fovea: lists[%zu] are too large: %td of %td numbers", n, lists, kind.capacity);
  }
  if (kind.entries == nullptr && numbers > 0) return invalid("fovea: lists[%zu] have null entries", n);
  return {};
}

inline Status check_lists(std::span<const KeyLists> kinds, const AttentionShape& shape, const AttentionOptions& options) {
  if (kinds.empty()) return invalid("fovea: sparse attention needs lists of keys, got none");
  const index_t sequences = count_sequences(shape, options);
  index_t longest = options.cu_len_q.empty() ? shape.len_q : 0;
  for (std::size_t b = 1; b < options.cu_len_q.size(); ++b)
    longest = std::max(longest, options.cu_len_q[b] - options.cu_len_q[b - 1]);
  for (std::size_t n = 0; n < kinds.size(); ++n) {
    if (Status s = check_list(kinds[n], n, shape, sequences, longest); !s.ok()) return s;
    if (kinds[n].q_block != kinds[0].q_block)
      return invalid("fovea: lists[%zu] are shared by %td queries, lists[0] by %td: must be the same", n, kinds[n].q_block,
                     kinds[0].q_block);
  }
  return {};
}
inline Bytes bytes_of_list(const KeyLists& kind) {
  const index_t numbers = kind.begin.empty() ? kind.batch * kind.heads * kind.q_blocks * kind.capacity : kind.begin.back();
  const auto base = reinterpret_cast<std::uintptr_t>(kind.entries);
  return {base, base + static_cast<std::uintptr_t>(numbers) * sizeof(std::int32_t)};
}

// The heads that have lists, or keys, of their own are the plan's kv heads.
inline AttentionShape listed_shape(AttentionShape shape, index_t heads) {
  shape.kv_heads = std::max(heads, shape.kv_heads);
  return shape;
}

// Whether prefill walks the keys of many lists at once: K and V are then packed once for all of them, which pays where a list has
// few rows and its keys stand together. Decided without a look at the lists, so that a row's bits do not hang on its neighbours'
// lists (a list of the call that names a key twice is the exception), nor, in a forced regime, on the batch.
inline bool runs_together(std::span<const KeyLists> kinds, const PlanRequest& request, index_t list_rows,
                          const std::vector<Sequence>& sequences) {
  constexpr index_t kMostRows = 255, kLeastBlock = 32;
  if (request.strip || !request.split_keys || list_rows > kMostRows) return false;
  if (list_rows < packed_rows(request.panels) / 2) return false;   // kernels would run mostly empty
  for (const KeyLists& kind : kinds) {
    if (!kind.ranges && kind.k_block < kLeastBlock) return false;
  }
  if (request.regime != Regime::automatic) return request.regime == Regime::prefill;
  index_t rows = 0;
  for (const Sequence& sequence : sequences) rows = std::max(rows, sequence.len_q * (request.q_heads / request.kv_heads));
  return automatic_regime(rows, request.panels) == Regime::prefill;
}

inline Status plan_sparse(SparsePlan& sparse, const AttentionShape& shape, std::span<const KeyLists> kinds,
                          const AttentionOptions& options, const Needs& needs) {
  if (Status s = check_problem(shape, options, needs); !s.ok()) return s;
  if (Status s = check_lists(kinds, shape, options); !s.ok()) return s;
  const auto build = [&]() -> Status {
    list_sequences(sparse.plan, shape, options);
    const index_t heads = list_heads(kinds);
    if (Status s = sparse.lists.build(kinds, sparse.plan.sequences, heads, reach_of(options)); !s.ok()) return s;
    const PlanRequest request = request_of(listed_shape(shape, heads), options, needs);
    const index_t list_rows = kinds.front().q_block * (request.q_heads / request.kv_heads);
    sparse.together = runs_together(kinds, request, list_rows, sparse.plan.sequences) && sparse.lists.as_sets();
    return sparse.together ? sparse.plan.build_together(request, list_rows) : sparse.plan.build(request, sparse.lists);
  };
  Status status = build();
  if (!status.ok()) sparse.plan.sequences.clear();   // half a plan fits no call
  return status;
}

inline Status run_sparse(Call call, std::span<const KeyLists> kinds) {
  const AttentionOptions& options = call.options;
  if (Status s = check_call(call.q, call.kv, call.out, options); !s.ok()) return s;
  return with_memory<SparseLocal>([&](SparseLocal& local) {
    const AttentionShape shape = shape_of(call.q, call.kv, options);
    if (Status s = check_problem(shape, call); !s.ok()) return s;
    if (Status s = check_home(call.kv, shape, options); !s.ok()) return s;
    if (Status s = plan_sparse(local.sparse, shape, kinds, options, call.needs); !s.ok()) return s;
    for (const KeyLists& kind : kinds) {
      if (Status s = check_learned("lists", bytes_of_list(kind), call.out, options); !s.ok()) return s;
    }
    call.lists = &local.sparse.lists;
    const Plan& plan = local.sparse.plan;
    if (!options.workspace.empty()) return execute(local.run, options.workspace, options.executor.lanes(), plan, call);
    const int lanes = lanes_for(plan, options);
    return execute(local.run, local.workspace(plan.workspace_bytes(lanes)), lanes, plan, call);
  });
}

inline Status run_sparse(Call call, const SparsePlan& sparse) {
  const AttentionOptions& options = call.options;
  if (Status s = check_call(call.q, call.kv, call.out, options); !s.ok()) return s;
  const AttentionShape shape = shape_of(call.q, call.kv, options);
  if (Status s = check_problem(shape, call); !s.ok()) return s;
  if (Status s = check_home(call.kv, shape, options); !s.ok()) return s;
  if (Status s = check_plan(sparse.plan, listed_shape(shape, sparse.lists.heads()), options, call.needs.split_keys,
                            call.needs.strip);
      !s.ok())
    return s;
  call.lists = &sparse.lists;
  return with_memory<SparseLocal>([&](SparseLocal& local) {
    if (!options.workspace.empty())
      return execute(local.run, options.workspace, options.executor.lanes(), sparse.plan, call);
    const int lanes = lanes_for(sparse.plan, options);
    return execute(local.run, local.workspace(sparse.plan.workspace_bytes(lanes)), lanes, sparse.plan, call);
  });
}

// Exact softmax attention over the listed keys; what mechanisms call with the lists that they have made.
template <class Compiled>
Status sparse(const Operand& q, const Kv& kv, std::span<const KeyLists> lists, const Result& out,
              const AttentionOptions& options) {
  return run_sparse(call_of<ListSoftmaxLanes, Compiled>(q, kv, out, options), lists);
}
template <class Compiled, class V>
Status sparse(const Operand& q, const Kv& kv, std::span<const KeyLists> lists, const Result& out,
              const AttentionOptions& options, const V& variant) {
  Call call = call_of_variant<Compiled>(q, kv, out, options, variant);
  call.kernels = &kernels_of<ListVariantLanes<V>, Compiled>;
  return run_sparse(call, lists);
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
