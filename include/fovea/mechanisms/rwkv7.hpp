// SPDX-License-Identifier: Apache-2.0
// RWKV-7 (Peng et al. 2025, arXiv 2503.14456), in this library's S of dim_k x dim_v:
//   S_t = Diag(w_t) S_{t-1} - (kappa_t * a_t) (S_{t-1}' kappa_t)' + k_t v_t',   o_t = S_t' r_t,
// and the generalised delta rule it is a case of. The removal reads the state before its decay.
#pragma once
#include "../call/chunk_call.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// S_t = Diag(alpha_t) S_{t-1} + b_t (S_{t-1}' a_t)' + k_t v_t',  o_t = scale S_t' q_t: diagonal plus low rank (DPLR). a and b
// [batch | 1, state_head | 1, pos | 1, dim_k]; scale is 1/sqrt(dim_k). It is stable where b is a negative multiple of a, up
// to normalisation. Comba is a = p, b = -beta k, v -> beta v; GDN-2 a = alpha * b * k, b = -k, v -> w * v.
inline Status generalized_delta(const Operand& q, const Operand& k, const Operand& v, const Decay<float>& decay,
                                const View<const float, 4>& a, const View<const float, 4>& b, const Result& out,
                                const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(q, k, v, out, options, memory); !s.ok()) return s;
  RecurrentRun run = door::bind_recurrent(q, k, v, out, options, door::inverse_root(k.extent[3]));
  if (Status s = door::check_decay(decay, run.shape, run.shape.dim_k, memory); !s.ok()) return s;
  const index_t heads = run.shape.state_heads, dim = run.shape.dim_k;
  if (Status s = door::check_gate("a", a, run.shape, heads, dim, dim, memory); !s.ok()) return s;
  if (Status s = door::check_gate("b", b, run.shape, heads, dim, dim, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const ChunkSpec<GateDecay<Decayed::key>, LowRank, Inclusive, Plain> spec{
      {tidy(decay.gate), decay.form, dim}, {tidy(a), tidy(b)}, {}, {}};
  return door::run_recurrent(run, spec, options);
}

// r [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k], v [batch, v_head, pos, dim_v], out [batch, out_head, pos,
// dim_v] (core/recurrent.hpp: heads, states, ragged batches). Nothing is written before every check has passed; out must not
// overlap anything.
// w.gate [batch | 1, state_head | 1, pos | 1, 1 | dim_k]; kappa and a [batch | 1, state_head | 1, pos | 1, dim_k], kappa
// normalised by the caller, a the rate, 0 to 1. Unscaled. The model's bonus after the group norm is not part of it.
inline Status rwkv7(const Operand& r, const Operand& k, const Operand& v, const Decay<float>& w,
                    const View<const float, 4>& kappa, const View<const float, 4>& a, const Result& out,
                    const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(r, k, v, out, options, memory); !s.ok()) return s;
  RecurrentRun run = door::bind_recurrent(r, k, v, out, options, 1.f);
  if (Status s = door::check_decay(w, run.shape, run.shape.dim_k, memory); !s.ok()) return s;
  const index_t heads = run.shape.state_heads, dim = run.shape.dim_k;
  if (Status s = door::check_gate("kappa", kappa, run.shape, heads, dim, dim, memory); !s.ok()) return s;
  if (Status s = door::check_gate("a", a, run.shape, heads, dim, dim, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const ChunkSpec<GateDecay<Decayed::key>, RatedRemoval, Inclusive, Plain> spec{
      {tidy(w.gate), w.form, dim}, {tidy(kappa), tidy(a)}, {}, {}};
  return door::run_recurrent(run, spec, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
