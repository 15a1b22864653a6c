// SPDX-License-Identifier: Apache-2.0
// RWKV-6 (Peng et al. 2024, arXiv 2404.05892): read before the write, with a bonus for the current token,
//   o_t = S_{t-1}' r_t + (r_t . (u * k_t)) v_t,   S_t = Diag(w_t) S_{t-1} + k_t v_t'.
// RWKV-5 has one w per head and channel: a gate whose axis of positions has extent 1.
#pragma once
#include "../call/chunk_call.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// r [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k], v [batch, v_head, pos, dim_v], out [batch, out_head, pos,
// dim_v] (core/recurrent.hpp: heads, states, ragged batches). Nothing is written before every check has passed; out must not
// overlap anything.
// w.gate [batch | 1, state_head | 1, pos | 1, 1 | dim_k]; u [state_head, dim_k]. Unscaled.
inline Status rwkv6(const Operand& r, const Operand& k, const Operand& v, const Decay<float>& w, const View<const float, 2>& u,
                    const Result& out, const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(r, k, v, out, options, memory); !s.ok()) return s;
  RecurrentRun run = door::bind_recurrent(r, k, v, out, options, 1.f);
  if (Status s = door::check_decay(w, run.shape, run.shape.dim_k, memory); !s.ok()) return s;
  if (Status s = door::check_like("u", u, std::array{run.shape.state_heads, run.shape.dim_k}, memory); !s.ok()) return s;
  if (!u) return door::invalid("fovea: u has null data");
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const ChunkSpec<GateDecay<Decayed::key>, Additive, ExclusiveWithBonus, Plain> spec{
      {tidy(w.gate), w.form, run.shape.dim_k}, {}, {tidy(u)}, {}};
  return door::run_recurrent(run, spec, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
