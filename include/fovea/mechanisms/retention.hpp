// SPDX-License-Identifier: Apache-2.0
// Retention (Sun et al. 2023, arXiv 2307.08621):  S_t = gamma_h S_{t-1} + k_t v_t',  o_t = scale S_t' q_t.
#pragma once
#include "../call/chunk_call.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// The paper's gamma_h = 1 - 2^{-5 - h}.
inline float retention_gamma(index_t head) { return 1.f - std::ldexp(1.f, -5 - static_cast<int>(head)); }

// q [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k], v [batch, v_head, pos, dim_v], out [batch, out_head, pos,
// dim_v] (core/recurrent.hpp: heads, states, ragged batches). Nothing is written before every check has passed; out must not
// overlap anything.
// gamma [state_head], 0 to 1. Scale is 1/sqrt(dim_k), which the paper puts on k: the state holds unscaled keys.
inline Status retention(const Operand& q, const Operand& k, const Operand& v, std::span<const float> gamma, const Result& out,
                        const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(q, k, v, out, options, memory); !s.ok()) return s;
  RecurrentRun run = door::bind_recurrent(q, k, v, out, options, door::inverse_root(k.extent[3]));
  if (Status s = door::check_per_head("gamma", gamma, run.shape, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const ChunkSpec<HeadDecay, Additive, Inclusive, Plain> spec{{gamma.data(), DecayForm::alpha}, {}, {}, {}};
  return door::run_recurrent(run, spec, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
