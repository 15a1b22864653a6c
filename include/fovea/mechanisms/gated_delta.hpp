// SPDX-License-Identifier: Apache-2.0
// Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): decay first, then the delta rule on the decayed state,
//   S~ = alpha_t S_{t-1},   S_t = S~ + k_t (beta_t (v_t - S~' k_t))',   o_t = scale S_t' q_t.
#pragma once
#include "../call/chunk_call.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// q [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k], v [batch, v_head, pos, dim_v], out [batch, out_head, pos,
// dim_v] (core/recurrent.hpp: heads, states, ragged batches); decay.gate [batch | 1, state_head | 1, pos | 1, 1]; beta the
// same, or with dim_v numbers a token. Keys are normalised by the caller; scale is 1/sqrt(dim_k). Nothing is written before
// every check has passed; out must not overlap anything.
inline Status gated_delta_net(const Operand& q, const Operand& k, const Operand& v, const Decay<float>& decay,
                              const View<const float, 4>& beta, const Result& out,
                              const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(q, k, v, out, options, memory); !s.ok()) return s;
  RecurrentRun run = door::bind_recurrent(q, k, v, out, options, door::inverse_root(k.extent[3]));
  if (Status s = door::check_decay(decay, run.shape, 1, memory); !s.ok()) return s;
  if (Status s = door::check_gate("beta", beta, run.shape, run.shape.state_heads, 1, run.shape.dim_v, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const ChunkSpec<GateDecay<Decayed::token>, Delta, Inclusive, Plain> spec{
      {tidy(decay.gate), decay.form, run.shape.dim_k}, {tidy(beta)}, {}, {}};
  return door::run_recurrent(run, spec, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
