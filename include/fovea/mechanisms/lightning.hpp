// SPDX-License-Identifier: Apache-2.0
// Lightning attention (Qin et al. 2024, arXiv 2401.04658), MiniMax-01 and TransNormerLLM:  S_t = e^{-s_h} S_{t-1} + k_t v_t',
// o_t = S_t' q_t, unscaled.
#pragma once
#include "../call/chunk_call.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// MiniMax-01: 2^{-8 (h + 1) / heads} (1 - layer / (layers - 1 + 1e-5) + 1e-5); heads a power of two.
inline float minimax_slope(index_t head, index_t heads, index_t layer, index_t layers) {
  const double place = static_cast<double>(head + 1) / static_cast<double>(heads);
  const double depth = static_cast<double>(layer) / (static_cast<double>(layers - 1) + 1e-5);
  return static_cast<float>(std::exp2(-8 * place) * (1 - depth + 1e-5));
}

// TransNormerLLM (Qin et al. 2023, arXiv 2307.14995) and flash-linear-attention: (8 h / heads) (1 - layer / layers).
inline float transnormer_slope(index_t head, index_t heads, index_t layer, index_t layers) {
  return static_cast<float>(8 * static_cast<double>(head) / static_cast<double>(heads) *
                            (1 - static_cast<double>(layer) / static_cast<double>(layers)));
}

// q [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k], v [batch, v_head, pos, dim_v], out [batch, out_head, pos,
// dim_v] (core/recurrent.hpp: heads, states, ragged batches). Nothing is written before every check has passed; out must not
// overlap anything.
// slopes [state_head], s_h >= 0; the two published tables above differ.
inline Status lightning(const Operand& q, const Operand& k, const Operand& v, std::span<const float> slopes, const Result& out,
                        const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(q, k, v, out, options, memory); !s.ok()) return s;
  RecurrentRun run = door::bind_recurrent(q, k, v, out, options, 1.f);
  if (Status s = door::check_per_head("slopes", slopes, run.shape, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const ChunkSpec<HeadDecay, Additive, Inclusive, Plain> spec{{slopes.data(), DecayForm::log}, {}, {}, {}};
  return door::run_recurrent(run, spec, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
