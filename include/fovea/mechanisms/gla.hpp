// SPDX-License-Identifier: Apache-2.0
// Gated linear attention (Yang et al. 2023, arXiv 2312.06635): a factor per token and key channel,
//   S_t = Diag(alpha_t) S_{t-1} + k_t v_t',   o_t = scale S_t' q_t.
// HGRN2 (Qin et al. 2024, arXiv 2404.07904) is this with k = 1 - alpha.
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
// decay.gate [batch | 1, state_head | 1, pos | 1, 1 | dim_k]; scale is 1/sqrt(dim_k).
inline Status gla(const Operand& q, const Operand& k, const Operand& v, const Decay<float>& decay, const Result& out,
                  const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(q, k, v, out, options, memory); !s.ok()) return s;
  RecurrentRun run = door::bind_recurrent(q, k, v, out, options, door::inverse_root(k.extent[3]));
  if (Status s = door::check_decay(decay, run.shape, run.shape.dim_k, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const ChunkSpec<GateDecay<Decayed::key>, Additive, Inclusive, Plain> spec{
      {tidy(decay.gate), decay.form, run.shape.dim_k}, {}, {}, {}};
  return door::run_recurrent(run, spec, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
