// SPDX-License-Identifier: Apache-2.0
// The path of a recurrent call whose checks are done: plan, workspace, lanes.
#pragma once
#include "../engine/chunk_engine.hpp"
#include "../engine/chunk_step.hpp"
#include "../engine/chunk_tiles.hpp"
#include "../engine/recurrent_plan.hpp"
#include "../simd/denormals.hpp"
#include "in_memory.hpp"
#include "recurrent_call.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

inline RecurrentRun bind_recurrent(const Operand& q, const Operand& k, const Operand& v, const Result& out,
                                   const RecurrentOptions<float>& options, float own_scale) {
  RecurrentRun run;
  run.shape = recurrent_shape(q, k, v, options);
  run.q = tidy_operand(q);
  run.k = tidy_operand(k);
  run.v = tidy_operand(v);
  run.out = tidy_operand(out);
  run.scale = options.scale ? *options.scale : own_scale;
  run.head_map = options.head_map;
  run.layout = options.layout;
  run.initial_state = tidy(options.initial_state);
  run.final_state = tidy(options.final_state);
  run.cu_len = options.cu_len;
  return run;
}

inline float inverse_root(index_t dim) { return static_cast<float>(1 / std::sqrt(static_cast<double>(dim))); }

template <class Map>
RowMap row_map(const Map& map) {
  return {&map, [](const void* object, index_t head, index_t pos, const float* row, float* features) {
            (*static_cast<const Map*>(object))(head, pos, row, features);
          }};
}

template <class Task, class Run, class Spec>
Status run_tasks(const Run& run, const Spec& spec, const RecurrentOptions<float>& options) {
  if (options.plan != nullptr) *options.plan = run.plan;
  const int lanes = static_cast<int>(std::min<index_t>(options.executor.lanes(), std::max<index_t>(run.plan.tasks, 1)));
  Bump count;
  Task::carve(count, run);
  const auto work = [&](Bump bump, index_t task) {
    const auto memory = Task::carve(bump, run);
    const FlushDenormals flush;
    Task(run, spec, memory)(task);
  };
  return deal_in_memory<LocalBytes>(options.executor, lanes, run.plan.tasks, options.workspace, count.used(), work);
}

// Plans the call and gives the task that its plan says: f.operator()<Task>().
template <class Spec, class F>
auto with_task(RecurrentRun& run, const RecurrentOptions<float>& options, const F& f) {
  run.plan = plan_recurrent(run, options, kind_of<Spec>(), 1, options.panels == Panels::bf16 ? tile_chunk<Spec>() : 0);
#if FOVEA_HAS_TILE_PRODUCTS
  if constexpr (tile_chunk<Spec>() > 0) {
    if (run.plan.panels == Panels::bf16) return f.template operator()<TileChunkTask<Spec>>();
  }
#endif
  if (run.plan.form == RecurrentForm::chunked) return f.template operator()<ChunkTask<Spec>>();
  return f.template operator()<StepTask<Spec>>();
}

template <class Spec>
Status run_recurrent(RecurrentRun& run, const Spec& spec, const RecurrentOptions<float>& options) {
  static_assert(check_chunk_spec<Spec>());
  return with_task<Spec>(run, options, [&]<class Task>() { return run_tasks<Task>(run, spec, options); });
}

// Bytes for options.workspace, whatever the form.
template <class Spec>
std::size_t recurrent_workspace_bytes(RecurrentRun run, const RecurrentOptions<float>& options) {
  Bump count;
  with_task<Spec>(run, options, [&]<class Task>() { Task::carve(count, run); });
  return count.used() * static_cast<std::size_t>(options.executor.lanes()) + kAlignment;
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
