// SPDX-License-Identifier: Apache-2.0
// Gated linear attention with one factor per head and token:  S_t = alpha_t S_{t-1} + k_t v_t',  o_t = scale S_t' q_t.
// The core of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), gated RetNet and YOCO (Sun et al. 2024, arXiv 2405.05254).
#pragma once
#include "../call/chunk_call.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// q [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k], v [batch, v_head, pos, dim_v], out [batch, out_head, pos,
// dim_v] (core/recurrent.hpp: heads, states, ragged batches). Nothing is written before every check has passed; out must not
// overlap anything.
// decay.gate [batch | 1, state_head | 1, pos | 1, 1]; scale is 1/sqrt(dim_k).
inline Status simple_gla(const Operand& q, const Operand& k, const Operand& v, const Decay<float>& decay, const Result& out,
                         const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(q, k, v, out, options, memory); !s.ok()) return s;
  RecurrentRun run = door::bind_recurrent(q, k, v, out, options, door::inverse_root(k.extent[3]));
  if (Status s = door::check_decay(decay, run.shape, 1, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const ChunkSpec<GateDecay<Decayed::token>, Additive, Inclusive, Plain> spec{
      {tidy(decay.gate), decay.form, run.shape.dim_k}, {}, {}, {}};
  return door::run_recurrent(run, spec, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
