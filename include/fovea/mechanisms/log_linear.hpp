// SPDX-License-Identifier: Apache-2.0
// Log-linear attention (Guo et al. 2025, arXiv 2506.04761): a state per dyadic bucket of the past, weighed by the reader,
//   o_t = scale sum_l lambda_t^(l) S^(l)' q_t,
// in O(T log T) for T tokens and O(log T) for the next one. What a token does to a state is that of simple GLA, Mamba-2 or
// Gated DeltaNet; it writes only to level 0, which is the token itself.
#pragma once
#include "../call/chunk_call.hpp"
#include "../engine/chunk_levels.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

// Levels, weights and positions; sets run.levels.
inline Status check_levels(const LogLinearOptions<float>& levels, const RecurrentOptions<float>& options, LevelRun& run,
                           Memory& memory) {
  const RecurrentShape& s = run.shape;
  if (options.initial_state || options.final_state)
    return invalid(
        "fovea: the states of log-linear attention are initial_levels and final_levels; a single state was given");
  if ((options.chunk & (options.chunk - 1)) != 0)
    return invalid("fovea: chunk is %td, must be a power of two: buckets are", options.chunk);
  if (Status status = check_first_pos(levels.first_pos, s, options.cu_len, kMaxTokens); !status.ok()) return status;
  run.first_pos = levels.first_pos;
  const index_t initial = levels.initial_levels ? levels.initial_levels.extent[2] : kMaxLevels;
  const index_t final = levels.final_levels ? levels.final_levels.extent[2] : kMaxLevels;
  run.levels = 1;
  for (index_t n = 0; n < s.sequences; ++n) {
    const SequenceRun tokens = sequence_run(s, options.cu_len, n);
    const index_t first = run.first_of(n), len = tokens.end - tokens.begin;
    const index_t before = levels_for(first), after = levels_for(first + len);
    if (before > initial)
      return invalid("fovea: initial_levels has %td levels, %td tokens of sequence %td have %td", initial, first, n, before);
    if (after > final)
      return invalid("fovea: final_levels has %td levels, %td tokens of sequence %td have %td", final, first + len, n,
                     after);
    if (len > 0 && after > levels.level_weight.extent[3])
      return invalid("fovea: level_weight has %td levels, %td tokens of sequence %td have %td",
                     levels.level_weight.extent[3], first + len, n, after);
    run.levels = std::max(run.levels, after);
  }
  const index_t width = levels.level_weight.extent[3];
  if (Status status = check_gate("level_weight", levels.level_weight, s, s.state_heads, width, width, memory); !status.ok())
    return status;
  const bool v_first = options.layout == StateLayout::v_first;
  const auto like = [&](const auto& view) {
    return std::array<index_t, 5>{s.sequences, s.state_heads, view.extent[2], v_first ? s.dim_v : s.dim_k,
                                  v_first ? s.dim_k : s.dim_v};
  };
  if (Status status = check_like("initial_levels", levels.initial_levels, like(levels.initial_levels), memory); !status.ok())
    return status;
  if (Status status = check_like("final_levels", levels.final_levels, like(levels.final_levels), memory); !status.ok())
    return status;
  memory.may_be("final_levels", "initial_levels");
  if (Status status = check_in_place("initial_levels", levels.initial_levels, "final_levels", levels.final_levels); !status.ok())
    return status;
  run.level_weight = tidy(levels.level_weight);
  run.initial_levels = levels.initial_levels;
  run.final_levels = levels.final_levels;
  return {};
}

inline LevelRun bind_levels(const Operand& q, const Operand& k, const Operand& v, const Result& out,
                            const RecurrentOptions<float>& options) {
  LevelRun run;
  static_cast<RecurrentRun&>(run) = bind_recurrent(q, k, v, out, options, 1.f);
  return run;
}

template <class Spec>
Status run_levels(LevelRun& run, const Spec& spec, const RecurrentOptions<float>& options) {
  run.plan = plan_levels(run, options, kind_of<Spec>());
  return run_tasks<LevelTask<Spec>>(run, spec, options);
}

}   // namespace door

// The core of log-linear Mamba-2 (C = q, B = k, dt x = v). q [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k],
// v [batch, v_head, pos, dim_v], out [batch, out_head, pos, dim_v] (core/recurrent.hpp); decay.gate [batch | 1,
// state_head | 1, pos | 1, 1]; levels.level_weight may share axes in the same way. Unscaled. options.initial_state and
// final_state stay null: states are levels.initial_levels and final_levels, which may be the same memory. Levels that are
// dead are not read; where both are the same they stay or become zeros. Nothing is written before every check has passed; out must
// not overlap anything.
inline Status log_linear_simple_gla(const Operand& q, const Operand& k, const Operand& v, const Decay<float>& decay,
                                    const LogLinearOptions<float>& levels, const Result& out,
                                    const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(q, k, v, out, options, memory); !s.ok()) return s;
  LevelRun run = door::bind_levels(q, k, v, out, options);
  if (Status s = door::check_decay(decay, run.shape, 1, memory); !s.ok()) return s;
  if (Status s = door::check_levels(levels, options, run, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const LevelSpec<GateDecay<Decayed::token>, Additive, Plain> spec{{tidy(decay.gate), decay.form, run.shape.dim_k}, {}, {}};
  return door::run_levels(run, spec, options);
}

// Log-linear Mamba-2: x, y [batch, head, pos, head_dim]; b, c [batch, group, pos, dim_state] in the places of k and q; the
// skip d x is added to the output. Otherwise as above.
inline Status log_linear_mamba2(const Operand& x, const Operand& b, const Operand& c,
                                const Mamba2Parameters<float>& parameters, const LogLinearOptions<float>& levels,
                                const Result& y, const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(c, b, x, y, options, memory); !s.ok()) return s;
  LevelRun run = door::bind_levels(c, b, x, y, options);
  if (Status s = door::check_gate("dt", parameters.dt, run.shape, run.shape.state_heads, 1, 1, memory); !s.ok()) return s;
  if (Status s = door::check_per_head("a", parameters.a, run.shape, memory); !s.ok()) return s;
  if (Status s = door::check_head_vectors("d", parameters.d, run.shape, memory); !s.ok()) return s;
  if (Status s = door::check_levels(levels, options, run, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const LevelSpec<StepSizeDecay, GainedAdditive, Skip> spec{
      {tidy(parameters.dt), parameters.a.data()}, {tidy(parameters.dt)}, {tidy(parameters.d)}};
  return door::run_levels(run, spec, options);
}

// Log-linear Gated DeltaNet: decay.gate and beta [batch | 1, state_head | 1, pos | 1, 1]. Keys are normalised by the caller;
// unscaled (the models put 1/sqrt(dim_k) on q and divide lambda by it). Otherwise as above.
inline Status log_linear_gated_delta(const Operand& q, const Operand& k, const Operand& v, const Decay<float>& decay,
                                     const View<const float, 4>& beta, const LogLinearOptions<float>& levels,
                                     const Result& out, const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(q, k, v, out, options, memory); !s.ok()) return s;
  LevelRun run = door::bind_levels(q, k, v, out, options);
  if (Status s = door::check_decay(decay, run.shape, 1, memory); !s.ok()) return s;
  if (Status s = door::check_gate("beta", beta, run.shape, run.shape.state_heads, 1, 1, memory); !s.ok()) return s;
  if (Status s = door::check_levels(levels, options, run, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const LevelSpec<GateDecay<Decayed::token>, Delta, Plain> spec{
      {tidy(decay.gate), decay.form, run.shape.dim_k}, {tidy(beta)}, {}};
  return door::run_levels(run, spec, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
