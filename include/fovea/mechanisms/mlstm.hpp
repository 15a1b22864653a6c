// SPDX-License-Identifier: Apache-2.0
// xLSTM's matrix memory, mLSTM (Beck et al. 2024, arXiv 2405.04517):
//   m_t = max(log f_t + m_{t-1}, i~_t),  f' = e^{log f_t + m_{t-1} - m_t},  i' = e^{i~_t - m_t},  log f = logsigmoid(f~),
//   C_t = f' C_{t-1} + i' k_t v_t',  n_t = f' n_{t-1} + i' k_t,  h_t = C_t' q_t / (max(|n_t . q_t|, e^{-m_t}) + eps).
// m is a scalar per head and token: a pass over the gates before the recurrence, which then has a factor f', a gain i' and a
// key sum n.
#pragma once
#include "../call/chunk_call.hpp"
#include "../call/in_memory.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

namespace door {

// f', i' and e^-m of every head and token, [batch, head, pos], and the last m of each state.
struct MlstmGates {
  float *forget, *input, *least, *m;
};
inline MlstmGates carve_mlstm(Bump& bump, const RecurrentShape& shape) {
  const index_t tokens = shape.batch * shape.state_heads * shape.len;
  MlstmGates gates{};
  for (float** at : {&gates.forget, &gates.input, &gates.least}) *at = bump.take<float>(tokens);
  gates.m = bump.take<float>(shape.sequences * shape.state_heads);
  return gates;
}

inline float log_sigmoid(float x) { return x < 0.f ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }

inline void fill_mlstm(const MlstmGates& gates, const RecurrentRun& run, const MlstmParameters<float>& parameters) {
  const View<const float, 4> i = tidy(parameters.i), f = tidy(parameters.f);
  for (index_t n = 0; n < run.shape.sequences; ++n) {
    const SequenceRun tokens = sequence_run(run.shape, run.cu_len, n);
    for (index_t h = 0; h < run.shape.state_heads; ++h) {
      float m = parameters.initial_m ? parameters.initial_m(n, h) : 0.f;
      for (index_t t = tokens.begin; t < tokens.end; ++t) {
        const index_t at = (tokens.batch * run.shape.state_heads + h) * run.shape.len + t;
        const float log_f = log_sigmoid(*row_at(f, tokens.batch, h, t));
        const float input = *row_at(i, tokens.batch, h, t), before = m;
        m = std::max(log_f + before, input);
        gates.forget[at] = std::exp(log_f + before - m);
        gates.input[at] = std::exp(input - m) * run.scale;
        gates.least[at] = std::exp(-m);
      }
      gates.m[n * run.shape.state_heads + h] = m;
    }
  }
}

}   // namespace door

// q [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k], v [batch, v_head, pos, dim_v], out [batch, out_head, pos,
// dim_v] (core/recurrent.hpp: heads, states, ragged batches). Nothing is written before every check has passed; out must not
// overlap anything.
// parameters.i, .f [batch | 1, head | 1, pos | 1, 1]; n and m [sequence, head, ..] travel with the states. Scale is of k,
// 1/sqrt(dim_k), and so is in C and n. The workspace also holds three floats per head and token.
inline Status mlstm(const Operand& q, const Operand& k, const Operand& v, const MlstmParameters<float>& parameters,
                    const Result& out, const RecurrentOptions<float>& options = {}) {
  door::Memory memory;
  if (Status s = door::check_recurrent(q, k, v, out, options, memory); !s.ok()) return s;
  RecurrentRun run = door::bind_recurrent(q, k, v, out, options, door::inverse_root(k.extent[3]));
  const RecurrentShape& shape = run.shape;
  if (Status s = door::check_gate("i", parameters.i, shape, shape.state_heads, 1, 1, memory); !s.ok()) return s;
  if (Status s = door::check_gate("f", parameters.f, shape, shape.state_heads, 1, 1, memory); !s.ok()) return s;
  const std::array<index_t, 3> sums{shape.sequences, shape.state_heads, shape.dim_k};
  const std::array<index_t, 2> states{shape.sequences, shape.state_heads};
  if (Status s = door::check_like("initial_n", parameters.initial_n, sums, memory); !s.ok()) return s;
  if (Status s = door::check_like("final_n", parameters.final_n, sums, memory); !s.ok()) return s;
  if (Status s = door::check_like("initial_m", parameters.initial_m, states, memory); !s.ok()) return s;
  if (Status s = door::check_like("final_m", parameters.final_m, states, memory); !s.ok()) return s;
  memory.may_be("final_n", "initial_n");
  memory.may_be("final_m", "initial_m");
  if (Status s = memory.check_apart(); !s.ok()) return s;
  run.initial_key_sum = parameters.initial_n;
  run.final_key_sum = parameters.final_n;

  Bump count;
  door::carve_mlstm(count, shape);
  const std::size_t own = count.used();
  using Spec = ChunkSpec<GateDecay<Decayed::token>, GainedAdditive, Inclusive, Stabilized>;
  const std::size_t wanted = own + door::recurrent_workspace_bytes<Spec>(run, options) + kAlignment;
  return door::in_memory<door::LocalBytes>(options.workspace, wanted, [&](std::span<std::byte> bytes) -> Status {
    Bump bump(bytes.data());
    const door::MlstmGates gates = door::carve_mlstm(bump, shape);
    door::fill_mlstm(gates, run, parameters);
    const auto view = [&](const float* numbers) {
      return bhsd(numbers, shape.batch, shape.state_heads, shape.len, 1);
    };
    const Spec spec{{tidy(view(gates.forget)), DecayForm::alpha, shape.dim_k},
                    {tidy(view(gates.input))},
                    {},
                    {tidy(view(gates.least)), parameters.eps}};
    RecurrentOptions<float> inner = options;
    inner.workspace = bytes.subspan(own);
    run.scale = 1.f;
    if (Status s = door::run_recurrent(run, spec, inner); !s.ok()) return s;
    for (index_t n = 0; parameters.final_m && n < shape.sequences; ++n) {
      for (index_t h = 0; h < shape.state_heads; ++h) parameters.final_m(n, h) = gates.m[n * shape.state_heads + h];
    }
    return {};
  });
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
