// SPDX-License-Identifier: Apache-2.0
// Mamba-2, state space duality (Dao and Gu 2024, arXiv 2405.21060), one state of dim_state x head_dim per head:
//   h_t = e^{dt_t A} h_{t-1} + dt_t B_t x_t',   y_t = h_t' C_t + D x_t.
#pragma once
#include "../call/chunk_call.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// x, y [batch, head, pos, head_dim]; b, c [batch, group, pos, dim_state], B and C of Mamba in the places of k and q; dt after
// softplus and clamp (core/recurrent.hpp). Unscaled. Mamba stores its states v_first. Nothing is written before every check
// has passed; y must not overlap anything.
inline Status mamba2(const Operand& x, const Operand& b, const Operand& c, const Mamba2Parameters<float>& parameters,
                     const Result& y, const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(c, b, x, y, options, memory); !s.ok()) return s;
  RecurrentRun run = door::bind_recurrent(c, b, x, y, options, 1.f);
  if (Status s = door::check_gate("dt", parameters.dt, run.shape, run.shape.state_heads, 1, 1, memory); !s.ok()) return s;
  if (Status s = door::check_per_head("a", parameters.a, run.shape, memory); !s.ok()) return s;
  if (Status s = door::check_head_vectors("d", parameters.d, run.shape, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const ChunkSpec<StepSizeDecay, GainedAdditive, Inclusive, Skip> spec{
      {tidy(parameters.dt), parameters.a.data()}, {tidy(parameters.dt)}, {}, {tidy(parameters.d)}};
  return door::run_recurrent(run, spec, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
