// SPDX-License-Identifier: Apache-2.0
// Validate, plan, run: the path of every call, whatever its policies. The thread-local plan and workspace are of local.hpp.
#pragma once
#include <cmath>

#include "local.hpp"
#include "merging.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

// What a call without a plan of its own plans and binds in.
struct Local : LocalBytes {
  Plan plan;
  AttentionRun run;
};
template <class F>
auto with_local(const F& f) {
  return with_memory<Local>(f);
}

inline int lanes_for(const Plan& plan, const AttentionOptions& options) {
  return static_cast<int>(
      std::min<index_t>(options.executor.lanes(), std::max<index_t>(static_cast<index_t>(plan.tasks.size()), 1)));
}

// What a variant's policies ask of the plan and of the options; the default is softmax with all options.
struct Needs {
  bool split_keys = true;   // partial rows can be merged, and nothing watches them
  bool strip = false;       // whole rows of scores at once
  Status (*check_options)(const AttentionOptions& options) = nullptr;   // null: every option is served
};

// One call, its strides tidied; `kernels` gives a bound run the kernels of the formats the call was compiled for.
struct Call {
  Operand q;
  Kv kv;
  Result out;
  const AttentionOptions& options;
  Status (*kernels)(AttentionRun& run);
  Needs needs{};
  const void* variant = nullptr;   // its policies, of the type `kernels` and `check_variant` know
  Status (*check_variant)(const void* variant, const AttentionShape& shape) = nullptr;
  const KeyRanges* lists = nullptr;   // of a sparse call
};

// Everything else has been checked.
inline Status execute(AttentionRun& run, std::span<std::byte> workspace, int slices, const Plan& plan, const Call& call) {
  if (Status status = check_workspace(workspace, plan.workspace_bytes(slices)); !status.ok()) return status;
  bind(run, plan, call.q, call.kv, call.out, call.options);
  run.variant = call.variant;
  run.lists = call.lists;
  if (Status status = call.kernels(run); !status.ok()) return status;
  open_workspace(run, workspace, slices);
  const int lanes = std::min(lanes_for(plan, call.options), slices);
  if (lanes == 1) {
    run.lane(run, 0);
  } else {
    const auto lane = [&run](int i) { run.lane(run, i); };
    call.options.executor.run(lanes, lane);
  }
  return {};
}

inline Status execute(Local& local, const Plan& plan, const Call& call) {
  const std::span<std::byte> workspace = call.options.workspace;
  if (!workspace.empty()) return execute(local.run, workspace, call.options.executor.lanes(), plan, call);
  const int lanes = lanes_for(plan, call.options);
  return execute(local.run, local.workspace(plan.workspace_bytes(lanes)), lanes, plan, call);
}

inline Status check_problem(const AttentionShape& shape, const AttentionOptions& options, const Needs& needs = {}) {
  if (needs.check_options != nullptr) {
    if (Status s = needs.check_options(options); !s.ok()) return s;
  }
  if (Status s = check_shape(shape); !s.ok()) return s;
  if (Status s = check_numbers(options); !s.ok()) return s;
  if (Status s = check_tables(shape, options); !s.ok()) return s;
  if (Status s = check_mask("bias", options.bias, shape, options); !s.ok()) return s;
  return check_mask("keep", options.keep, shape, options);
}

inline void list_sequences(Plan& plan, const AttentionShape& shape, const AttentionOptions& options) {
  plan.sequences.clear();
  for (index_t b = 0; b < count_sequences(shape, options); ++b) plan.sequences.push_back(sequence_of(shape, options, b));
}
inline PlanRequest request_of(const AttentionShape& shape, const AttentionOptions& options, const Needs& needs = {}) {
  return {shape.q_heads,  shape.kv_heads, shape.dim_qk,  shape.dim_v, reach_of(options), options.regime,
          options.panels, options.executor.lanes(), options.cpu, needs.split_keys, needs.strip};
}

inline Status check_problem(const AttentionShape& shape, const Call& call) {
  if (Status s = check_problem(shape, call.options, call.needs); !s.ok()) return s;
  return call.check_variant == nullptr ? Status{} : call.check_variant(call.variant, shape);
}

inline Status check_planned_call(const Plan& plan, const Call& call) {
  const AttentionShape shape = shape_of(call.q, call.kv, call.options);
  if (Status s = check_call(call.q, call.kv, call.out, call.options); !s.ok()) return s;
  if (Status s = check_problem(shape, call); !s.ok()) return s;
  if (Status s = check_home(call.kv, shape, call.options); !s.ok()) return s;
  if (plan.listed || plan.list_rows != PTRDIFF_MAX)
    return invalid("fovea: the plan is for lists of keys, the call has none; a SparsePlan goes to sparse_attention");
  return check_plan(plan, shape, call.options, call.needs.split_keys, call.needs.strip);
}

template <class Lanes, class Compiled>
Status kernels_of(AttentionRun& run) {
  return bind_kernels<Lanes>(run, Compiled{});
}
template <class Lanes, class Compiled>
Call call_of(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options) {
  return {tidy_operand(q), tidy_kv(kv), tidy_operand(out), options, &kernels_of<Lanes, Compiled>};
}
inline Kv kv_of(const Operand& k, const Operand& v) { return dense_kv(tidy_operand(k), tidy_operand(v)); }
template <class TK, class TV>
using FormatsOf = Formats<FormatOf<std::remove_const_t<TK>>::value, FormatOf<std::remove_const_t<TV>>::value>;

inline Status plan_call(Plan& plan, const AttentionShape& shape, const AttentionOptions& options, const Needs& needs) {
  if (Status s = check_problem(shape, options, needs); !s.ok()) return s;
  list_sequences(plan, shape, options);
  return plan.build(request_of(shape, options, needs));
}

inline Status run(const Call& call) {
  if (Status s = check_call(call.q, call.kv, call.out, call.options); !s.ok()) return s;
  return with_local([&](Local& local) {
    const AttentionShape shape = shape_of(call.q, call.kv, call.options);
    if (Status s = check_problem(shape, call); !s.ok()) return s;
    if (Status s = check_home(call.kv, shape, call.options); !s.ok()) return s;
    list_sequences(local.plan, shape, call.options);
    if (Status s = local.plan.build(request_of(shape, call.options, call.needs)); !s.ok()) return s;
    return execute(local, local.plan, call);
  });
}

inline Status run(const Plan& plan, const Call& call) {
  if (Status s = check_planned_call(plan, call); !s.ok()) return s;
  if (!call.options.workspace.empty()) {
    AttentionRun run;
    return execute(run, call.options.workspace, call.options.executor.lanes(), plan, call);
  }
  return with_local([&](Local& local) { return execute(local, plan, call); });
}

inline Status prepare(AttentionRun& run, const Plan& plan, const Call& call) {
  const std::span<std::byte> workspace = call.options.workspace;
  const int lanes = call.options.executor.lanes();
  if (Status s = check_planned_call(plan, call); !s.ok()) return s;
  if (Status s = check_workspace(workspace, plan.workspace_bytes(lanes)); !s.ok()) return s;
  bind(run, plan, call.q, call.kv, call.out, call.options);
  run.variant = call.variant;
  if (Status s = call.kernels(run); !s.ok()) return s;
  open_workspace(run, workspace, lanes);
  return {};
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
