// SPDX-License-Identifier: Apache-2.0
// Log-linear attention (Guo et al. 2025, arXiv 2506.04761) as plain loops in double. Token t sees the past in dyadic
// buckets, each with a state of its own, and weighs them:  o_t = scale * sum_l lambda_t^(l) S^(l)' q_t. Before token t the
// buckets up to z = countr_zero(t) merge into bucket z + 1, then every state takes the token's transition and bucket 0
// becomes the token.
#pragma once
#include <bit>

#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// Is bucket `level` of token t one that holds tokens? Level 0 is t itself, level b + 1 the 2^b tokens of bit b.
inline bool live_level(index_t t, index_t level) { return level == 0 || ((t >> (level - 1)) & 1) != 0; }
inline index_t levels_of(index_t t) { return static_cast<index_t>(std::bit_width(static_cast<std::size_t>(t))) + 1; }

// transition(state, run, t) on every level, then write(level 0, run, t). scale is 1.
template <class Transition, class Write>
void log_linear_with(const Tensor<const double>& q, const Tensor<const double>& k, const Tensor<const double>& v,
                     const LogLinearOptions<double>& levels, const Tensor<double>& out,
                     const RecurrentOptions<double>& options, Transition&& transition, Write&& write) {
  const RecurrentShape shape = recurrent_shape(k, v, out);
  const double scale = scale_or(options, 1);
  const bool v_first = options.layout == StateLayout::v_first;
  const auto each_cell = [&](const auto& view, const HeadRun& run, std::vector<StateMatrix>& s, auto&& f) {
    for (index_t l = 0; view && l < view.extent[2]; ++l) {
      for (index_t i = 0; i < shape.dim_k; ++i) {
        for (index_t j = 0; j < shape.dim_v; ++j) {
          f(v_first ? view(run.sequence, run.head, l, j, i) : view(run.sequence, run.head, l, i, j),
            s[size_of(l)].rows[size_of(i)][size_of(j)]);
        }
      }
    }
  };
  each_head(shape, {.head_map = options.head_map, .cu_len = options.cu_len}, [&](StateMatrix& empty, const HeadRun& run) {
    const index_t first = levels.first_pos.empty() ? 0 : levels.first_pos[size_of(run.sequence)];
    const index_t stored = std::max(levels.initial_levels.extent[2], levels.final_levels.extent[2]);
    std::vector<StateMatrix> s(size_of(std::max(stored, levels_of(first + run.end - run.begin))), empty);
    each_cell(levels.initial_levels, run, s, [](double value, double& cell) { cell = value; });
    for (index_t pos = run.begin; pos < run.end; ++pos) {
      const index_t t = first + pos - run.begin;
      if (t > 0) {
        const auto z = static_cast<std::size_t>(std::countr_zero(static_cast<std::size_t>(t)));
        for (std::size_t l = 0; l <= z; ++l) {
          s[z + 1].add(s[l]);
          s[l] = empty;
        }
      }
      for (StateMatrix& state : s) transition(state, run, pos);
      write(s[0], run, pos);
      const Vector lambda = run.row(levels.level_weight, pos);
      run.write_out(q, out, pos, [&](const Vector& q_t) {
        Vector o(size_of(shape.dim_v));
        for (index_t l = 0; l < levels_of(t); ++l) {
          if (live_level(t, l)) o += scale * lambda[size_of(l)] * s[size_of(l)].read(q_t);
        }
        return o;
      });
    }
    each_cell(levels.final_levels, run, s, [](double& value, double cell) { value = cell; });
  });
}

// The core of log-linear Mamba-2 (C = q, B = k, dt x = v): decay.gate [batch, state_head, pos, 1].
inline void log_linear_simple_gla(const Tensor<const double>& q, const Tensor<const double>& k,
                                  const Tensor<const double>& v, const Decay<double>& decay,
                                  const LogLinearOptions<double>& levels, const Tensor<double>& out,
                                  const RecurrentOptions<double>& options = {}) {
  log_linear_with(
      q, k, v, levels, out, options,
      [&](StateMatrix& s, const HeadRun& run, index_t t) { s.decay(run.alpha(decay, t, k.extent[3])); },
      [&](StateMatrix& s, const HeadRun& run, index_t t) { s.add(run.row(k, t), run.row(v, t)); });
}

// Log-linear Mamba-2: dt and A as in mamba2.hpp, the skip added to the output.
inline void log_linear_mamba2(const Tensor<const double>& x, const Tensor<const double>& b, const Tensor<const double>& c,
                              const Mamba2Parameters<double>& parameters, const LogLinearOptions<double>& levels,
                              const Tensor<double>& y, const RecurrentOptions<double>& options = {}) {
  log_linear_with(
      c, b, x, levels, y, options,
      [&](StateMatrix& h, const HeadRun& run, index_t t) {
        const double dt = run.number(parameters.dt, t);
        h.decay(Vector(std::exp(dt * parameters.a[size_of(run.head)]), size_of(b.extent[3])));
      },
      [&](StateMatrix& h, const HeadRun& run, index_t t) {
        h.add(run.row(b, t), run.number(parameters.dt, t) * run.row(x, t));
      });
  if (!parameters.d) return;
  const RecurrentShape shape = recurrent_shape(b, x, y);
  each_head(shape, {.head_map = options.head_map, .cu_len = options.cu_len}, [&](StateMatrix&, const HeadRun& run) {
    for (index_t t = run.begin; t < run.end; ++t) {
      Vector skip = run.row(x, t);
      for (std::size_t p = 0; p < skip.size(); ++p)
        skip[p] *= parameters.d(run.head, parameters.d.extent[1] == 1 ? 0 : static_cast<index_t>(p));
      for (index_t h = 0; h < run.out_heads; ++h) {
        if (shared_head(h, run.out_heads, run.state_heads, run.map) != run.head) continue;
        put(y, run.batch, h, t, reference::row(y, run.batch, h, t) + skip);
      }
    }
  });
}

// Log-linear Gated DeltaNet: decay.gate and beta [batch, state_head, pos, 1].
inline void log_linear_gated_delta(const Tensor<const double>& q, const Tensor<const double>& k,
                                   const Tensor<const double>& v, const Decay<double>& decay,
                                   const Tensor<const double>& beta, const LogLinearOptions<double>& levels,
                                   const Tensor<double>& out, const RecurrentOptions<double>& options = {}) {
  log_linear_with(
      q, k, v, levels, out, options,
      [&](StateMatrix& s, const HeadRun& run, index_t t) {
        const Vector k_t = run.row(k, t);
        s.add(-k_t, run.number(beta, t) * s.read(k_t));
        s.decay(run.alpha(decay, t, k.extent[3]));
      },
      [&](StateMatrix& s, const HeadRun& run, index_t t) { s.add(run.row(k, t), run.number(beta, t) * run.row(v, t)); });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
