// SPDX-License-Identifier: Apache-2.0
// The attention layer of SwitchHead (Csordas et al. 2023, arXiv 2312.07987), weights as views: few heads, and values and
// outputs that are mixtures of the `active` experts of E that a token chose per head,
//
//   q_h = W_Q,h x    k_h = W_K,h x                        dense
//   v[s, h] = sum_e s_e x_s W_V[h, e]                     s_e = sigmoid(W_S x_s)[h, e], e the largest `active`
//   y_t     = sum_h sum_e d_e (A v)[t, h] W_O[h, e]       d_e = sigmoid(W_D x_t)[h, e], e the largest `active`
//
// with the bare attention A at 1 / sqrt(dim) between them: a cache holds the mixed v. What computes it is an argument, so the
// layer knows no mechanism, no cache and no positions. Owns no memory: workspace and weights are the caller's.
//
// expert_mixture is the sum on either side. A token's rows are read where they lie and the weights of an expert only by the
// tokens that chose it, so a token costs `active` of E products; it serves the experts of MoA too.
#pragma once
#include <algorithm>
#include <span>

#include "../core/attention_options.hpp"
#include "../core/workspace.hpp"
#include "../mechanisms/head_mixtures.hpp"
#include "projection.hpp"

namespace fovea {
inline namespace v0 {

// Which experts a token chose for a head, and their weights, both [batch, head, pos, slot]. A weight of 0 leaves its expert
// out: no product, and nothing of it is read.
struct ExpertRoutes {
  View<const index_t, 4> experts;
  View<const float, 4> weights;
};

// As the published code has them: f32, bf16 or f16, innermost stride 1.
struct SwitchHeadWeights {
  Operand q, k;                 // [1, 1, head * dim_qk, model]  W_Q, W_K
  Operand v_router, o_router;   // [1, 1, head * expert, model]  W_S, W_D
  Operand v;                    // [head, expert, model, dim_v]  W_V
  Operand o;                    // [head, expert, dim_v, model]  W_O
};

struct SwitchHeadBlock {
  index_t model = 0, heads = 0, experts = 0, active = 0;   // active experts per token and head, of values and of outputs
  index_t dim_qk = 0, dim_v = 0;
  SwitchHeadWeights weights;
};

inline namespace FOVEA_ARCH {

namespace switch_head_parts {

// One lane's memory for calls of up to `tokens` tokens.
struct MixMemory {
  ProjectMemory project;
  float* sums;       // [token of a block, kProjectColumns]
  index_t* chosen;   // [token of a block]  rows of the block that chose an expert, and its weight in each
  float* weight;
};
inline MixMemory carve_mix(Bump& bump, index_t tokens) {
  const index_t rows = std::min(tokens, kProjectRows);
  const ProjectMemory project = carve_project(bump, tokens);
  return {project, bump.take<float>(rows * kProjectColumns), bump.take<index_t>(rows), bump.take<float>(rows)};
}
inline std::size_t mix_lane_bytes(index_t tokens) {
  Bump lane;
  carve_mix(lane, tokens);
  return lane.used();
}

// A sum of experts; tasks are blocks of out: a head (or the sum of all), up to kProjectRows tokens, some columns.
struct Mixture {
  Operand a, weights;
  ExpertRoutes routes;
  Result out;
  index_t columns;   // of a task; fewer for more lanes, no bit depends on it

  Mixture(const Operand& a_, const Operand& weights_, const ExpertRoutes& routes_, const Result& out_, int lanes)
      : a(a_), weights(weights_), routes(routes_), out(out_) {
    const index_t wide = (all() + kProjectColumns - 1) / kProjectColumns, narrow = (all() + kPanel - 1) / kPanel;
    const index_t per_lane = (lanes + out.extent[1] * blocks() - 1) / std::max<index_t>(out.extent[1] * blocks(), 1);
    const index_t cuts = std::max({wide, std::min(narrow, per_lane), index_t{1}});
    columns = std::max(((all() + cuts - 1) / cuts + kPanel - 1) / kPanel, index_t{1}) * kPanel;
  }
  index_t all() const { return weights.extent[3]; }
  index_t tokens() const { return out.extent[0] * out.extent[2]; }
  index_t blocks() const { return (tokens() + kProjectRows - 1) / kProjectRows; }
  index_t pieces() const { return (all() + columns - 1) / columns; }
  index_t tasks() const { return out.extent[1] * blocks() * pieces(); }

  // The weight of an expert for a token; a slot more of the same one adds to it.
  float weight_of(index_t expert, index_t head, index_t token) const {
    const index_t b = token / out.extent[2], i = token % out.extent[2];
    float sum = 0.f;
    for (index_t slot = 0; slot < routes.experts.extent[3]; ++slot) {
      if (routes.experts(b, head, i, slot) == expert) sum += routes.weights(b, head, i, slot);
    }
    return sum;
  }
  template <class Any>
  index_t row_at(const Any& tensor, index_t head, index_t token) const {
    return token / out.extent[2] * tensor.stride[0] + (tensor.extent[1] == 1 ? 0 : head) * tensor.stride[1] +
           token % out.extent[2] * tensor.stride[2];
  }

  void run(index_t task, const MixMemory& memory) const {
    const index_t heads = routes.experts.extent[1], n = task % pieces() * columns, count = std::min(columns, all() - n);
    const index_t block = task / pieces() % blocks(), to_head = task / pieces() / blocks();
    const index_t first = block * kProjectRows, rows = std::min(kProjectRows, tokens() - first);
    const bool summed = out.extent[1] == 1;
    std::fill_n(memory.sums, rows * kProjectColumns, 0.f);
    for (index_t head = summed ? 0 : to_head; head < (summed ? heads : to_head + 1); ++head) {
      for (index_t expert = 0; expert < weights.extent[1]; ++expert) {
        index_t chosen = 0;
        for (index_t row = 0; row < rows; ++row) {
          const float weight = weight_of(expert, head, first + row);
          if (weight == 0.f) continue;
          memory.chosen[chosen] = row;
          memory.weight[chosen++] = weight;
        }
        if (chosen == 0) continue;
        const index_t at = (weights.extent[0] == 1 ? 0 : head) * weights.stride[0] + expert * weights.stride[1] + n;
        const StoredMatrix matrix{weights.data + at * row_bytes(weights.format, 1), weights.format, weights.extent[2], count,
                                  weights.stride[2]};
        const auto read = [&](index_t row, index_t d, index_t numbers, float* to) {
          const index_t from = row_at(a, head, first + memory.chosen[row]) + d * a.stride[3];
          read_strided(a.format, a.data + from * row_bytes(a.format, 1), a.stride[3], numbers, to);
        };
        const auto add = [&](index_t row, index_t, index_t numbers, const float* from) {   // rows are whole panels
          float* const sums = memory.sums + memory.chosen[row] * kProjectColumns;
          const f32 weight(memory.weight[row]);
          for (index_t d = 0; d < numbers; d += kLanes) store(sums + d, fma(load(from + d), weight, load(sums + d)));
        };
        project_task(0, chosen, matrix, Weights::by_input, memory.project, read, add);
      }
    }
    for (index_t row = 0; row < rows; ++row) {
      const index_t to = row_at(out, to_head, first + row) + n * out.stride[3];
      write_strided(out.format, memory.sums + row * kProjectColumns, count, out.data + to * row_bytes(out.format, 1),
                    out.stride[3]);
    }
  }
};

inline void mix(const Operand& a, const Operand& weights, const ExpertRoutes& routes, const Result& out,
                const Executor& executor, std::byte* memory, std::size_t lane_bytes) {
  const int lanes = executor.lanes();
  const Mixture mixture(a, weights, routes, out, lanes);
  deal(executor, lanes, mixture.tasks(), [&](int lane, index_t task) {
    Bump bump(memory + lane_bytes * static_cast<std::size_t>(lane));
    mixture.run(task, carve_mix(bump, mixture.tokens()));
  });
}

inline Status check_weights(const char* name, const Operand& w, const std::array<index_t, 4>& want, door::Bytes& bytes) {
  if (w.data == nullptr || w.extent != want)
    return door::invalid("fovea: switch_head_block: %s is [%td, %td, %td, %td]%s, must be [%td, %td, %td, %td]", name,
                         w.extent[0], w.extent[1], w.extent[2], w.extent[3], w.data == nullptr ? " without data" : "",
                         want[0], want[1], want[2], want[3]);
  return door::check_data(name, w, bytes);
}

}   // namespace switch_head_parts

// For up to `tokens` = batch * pos tokens in a call.
inline std::size_t expert_mixture_bytes(index_t tokens, int lanes = 1) {
  return switch_head_parts::mix_lane_bytes(tokens) * static_cast<std::size_t>(lanes) + kAlignment;
}

// out[b, h, i] = sum over the slots of [b, h, i] of weight * a[b, h, i] W[h, expert], in fp32, in the order of the experts.
//   a         [batch, head | 1, pos, input]    any plain format, any strides
//   weights   [head | 1, expert, input, output]   f32, bf16 or f16, innermost stride 1
//   out       [batch, head, pos, output], or [batch, 1, pos, output]: the sum over the heads
// SwitchHead's values are a mixture of x ([batch, 1, pos, model]), its outputs one of the attention's rows into one head. In
// MoA a head is one of the k slots with one expert each and the weights are those of all slots: queries are a mixture of x
// with a weight of 1, outputs one of the rows that are weighed already.
// Bits of a token depend on its own rows, experts and weights, not on who shares the call or on lanes. On error nothing has
// been written.
inline Status expert_mixture(const Operand& a_any, const Operand& weights_any, const ExpertRoutes& routes,
                             const Result& out_any, std::span<std::byte> workspace, const Executor& executor = {}) {
  using namespace switch_head_parts;
  const Operand a = door::tidy_operand(a_any), weights = door::tidy_operand(weights_any);
  const Result out = door::tidy_operand(out_any);
  const ExpertRoutes tidied{tidy(routes.experts), tidy(routes.weights)};
  const index_t batch = out.extent[0], len = out.extent[2], heads = routes.experts.extent[1];
  const index_t slots = routes.experts.extent[3], experts = weights.extent[1];
  door::Bytes a_bytes, weight_bytes, expert_bytes, route_bytes, out_bytes;
  if (Status s = door::check_plain("a", a.format); !s.ok()) return s;
  if (Status s = door::check_plain("out", out.format); !s.ok()) return s;
  if (Status s = check_weight_format("expert_mixture", "weights", weights); !s.ok()) return s;
  if (Status s = door::check_data("a", a, a_bytes); !s.ok()) return s;
  if (Status s = door::check_data("weights", weights, weight_bytes); !s.ok()) return s;
  if (Status s = door::check_data("routes.experts", tidied.experts, expert_bytes); !s.ok()) return s;
  if (Status s = door::check_data("routes.weights", tidied.weights, route_bytes); !s.ok()) return s;
  if (Status s = door::check_data("out", out, out_bytes); !s.ok()) return s;
  const std::array<index_t, 4> routed{batch, heads, len, slots};
  if (routes.experts.extent != routed || routes.weights.extent != routed)
    return door::invalid(
        "fovea: expert_mixture: experts are [%td, %td, %td, %td] and their weights [%td, %td, %td, %td] for out [%td, %td, "
        "%td, %td]",
        routes.experts.extent[0], heads, routes.experts.extent[2], slots, routes.weights.extent[0], routes.weights.extent[1],
        routes.weights.extent[2], routes.weights.extent[3], batch, out.extent[1], len, out.extent[3]);
  const auto fits = [&](index_t extent) { return extent == heads || extent == 1; };
  if (!fits(a.extent[1]) || !fits(weights.extent[0]) || !fits(out.extent[1]) || a.extent[0] != batch || a.extent[2] != len ||
      a.extent[3] != weights.extent[2] || out.extent[3] != weights.extent[3] || heads < 1 || experts < 1)
    return door::invalid(
        "fovea: expert_mixture: a is [%td, %td, %td, %td], weights [%td, %td, %td, %td] and out [%td, %td, %td, %td] for "
        "%td "
        "routed heads",
        a.extent[0], a.extent[1], a.extent[2], a.extent[3], weights.extent[0], experts, weights.extent[2], weights.extent[3],
        batch, out.extent[1], len, out.extent[3], heads);
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < len; ++i) {
        for (index_t slot = 0; slot < slots; ++slot) {
          const index_t expert = tidied.experts(b, h, i, slot);
          if (expert < 0 || expert >= experts)
            return door::invalid("fovea: expert_mixture: experts[%td, %td, %td, %td] = %td is outside 0 .. %td", b, h, i,
                                 slot, expert, experts - 1);
        }
      }
    }
  }
  if (!door::writes_apart(out)) return door::invalid("fovea: out overlaps itself");
  for (const auto& [name, bytes] : {std::pair{"a", a_bytes}, std::pair{"weights", weight_bytes},
                                    std::pair{"routes.experts", expert_bytes}, std::pair{"routes.weights", route_bytes}}) {
    if (Status s = door::check_apart({"out", out_bytes}, name, bytes); !s.ok()) return s;
  }
  const index_t tokens = batch * len;
  if (Status s = check_lanes(executor); !s.ok()) return s;
  if (Status s = door::check_workspace(workspace, expert_mixture_bytes(tokens, executor.lanes())); !s.ok()) return s;
  mix(a, weights, tidied, out, executor, aligned(workspace).data(), mix_lane_bytes(tokens));
  return {};
}

namespace switch_head_parts {

struct Memory {
  float *q, *k, *v, *o;             // [token, head, dim]
  float* logits;                    // [token, head, expert]
  index_t *v_experts, *o_experts;   // [token, head, slot]
  float *v_weights, *o_weights;
  std::byte* scratch;   // [lane]
  std::size_t lane_bytes;
};
inline Memory carve(Bump& bump, const SwitchHeadBlock& block, index_t tokens, int lanes) {
  const index_t slots = tokens * block.heads * block.active;
  Memory memory{};
  memory.q = bump.take<float>(tokens * block.heads * block.dim_qk);
  memory.k = bump.take<float>(tokens * block.heads * block.dim_qk);
  memory.v = bump.take<float>(tokens * block.heads * block.dim_v);
  memory.o = bump.take<float>(tokens * block.heads * block.dim_v);
  memory.logits = bump.take<float>(tokens * block.heads * block.experts);
  memory.v_experts = bump.take<index_t>(slots);
  memory.o_experts = bump.take<index_t>(slots);
  memory.v_weights = bump.take<float>(slots);
  memory.o_weights = bump.take<float>(slots);
  memory.lane_bytes = mix_lane_bytes(tokens);
  memory.scratch = bump.take<std::byte>(static_cast<index_t>(memory.lane_bytes) * lanes);
  return memory;
}

}   // namespace switch_head_parts

// For up to `tokens` = batch * pos tokens in a call.
inline std::size_t switch_head_block_bytes(const SwitchHeadBlock& block, index_t tokens, int lanes = 1) {
  Bump bump;
  switch_head_parts::carve(bump, block, tokens, lanes);
  return bump.used() + kAlignment;
}

// One step of the layer.
//   x, y      [batch, 1, pos, model], any plain format, any strides; y may be x
//   attend    Status(q, k, v, out, options): Tensor<float> of [batch, head, pos, dim] in the workspace. q and k may be rotated
//             in place, k and v appended to a cache; out is all the layer goes on with
//   options   for attend, as they are; their executor runs the projections too, options.workspace is attend's own
// Logits of the routers are fp32: where two experts are that close, rounding chooses. On error y has not changed.
template <class Attend>
Status switch_head_block(const SwitchHeadBlock& block, const Operand& x_any, const Attend& attend, const Result& y_any,
                         const AttentionOptions& options, std::span<std::byte> workspace) {
  using namespace switch_head_parts;
  const Operand x = door::tidy_operand(x_any);
  const Result y = door::tidy_operand(y_any);
  const index_t batch = x.extent[0], len = x.extent[2], tokens = batch * len, heads = block.heads;
  if (block.model < 1 || heads < 1 || block.experts < 1 || block.active < 1 || block.active > block.experts ||
      block.dim_qk < 1 || block.dim_v < 1)
    return door::invalid("fovea: switch_head_block: model %td, %td heads of %td and %td, %td of %td experts", block.model,
                         heads, block.dim_qk, block.dim_v, block.active, block.experts);
  door::Bytes x_bytes, y_bytes;
  if (Status s = door::check_plain("x", x.format); !s.ok()) return s;
  if (Status s = door::check_plain("y", y.format); !s.ok()) return s;
  if (Status s = door::check_data("x", x, x_bytes); !s.ok()) return s;
  if (Status s = door::check_data("y", y, y_bytes); !s.ok()) return s;
  if (x.extent[1] != 1 || x.extent[3] != block.model)
    return door::invalid("fovea: switch_head_block: x is [%td, %td, %td, %td], must be [batch, 1, pos, %td]", batch,
                         x.extent[1], len, x.extent[3], block.model);
  if (Status s = door::check_extents("y", y, x.extent, "x"); !s.ok()) return s;
  if (!door::writes_apart(y)) return door::invalid("fovea: y overlaps itself");
  if (y.data != x.data || y.stride != x.stride || y.format != x.format) {
    if (Status s = door::check_apart({"y", y_bytes}, "x", x_bytes); !s.ok()) return s;
  }
  struct Weight {
    const char* name;
    const Operand& tensor;
    std::array<index_t, 4> extent;
  };
  const SwitchHeadWeights& w = block.weights;
  for (const Weight& weight : {Weight{"q", w.q, {1, 1, heads * block.dim_qk, block.model}},
                               Weight{"k", w.k, {1, 1, heads * block.dim_qk, block.model}},
                               Weight{"v_router", w.v_router, {1, 1, heads * block.experts, block.model}},
                               Weight{"o_router", w.o_router, {1, 1, heads * block.experts, block.model}},
                               Weight{"v", w.v, {heads, block.experts, block.model, block.dim_v}},
                               Weight{"o", w.o, {heads, block.experts, block.dim_v, block.model}}}) {
    door::Bytes bytes;
    if (Status s = check_weights(weight.name, weight.tensor, weight.extent, bytes); !s.ok()) return s;
    if (Status s = check_weight_format("switch_head_block", weight.name, weight.tensor); !s.ok()) return s;
    if (Status s = door::check_apart({"y", y_bytes}, weight.name, bytes); !s.ok()) return s;
  }
  const Executor& executor = options.executor;
  if (Status s = check_lanes(executor); !s.ok()) return s;
  if (Status s = door::check_workspace(workspace, switch_head_block_bytes(block, tokens, executor.lanes())); !s.ok())
    return s;
  Bump bump(aligned(workspace).data());
  const Memory memory = carve(bump, block, tokens, executor.lanes());

  const auto per_head = [&](auto* rows, index_t width) {
    return Tensor<std::remove_pointer_t<decltype(rows)>>{
        rows, {batch, heads, len, width}, {len * heads * width, width, heads * width, 1}};
  };
  const auto project = [&](const Operand& matrix, float* rows) {   // rows [token, output] = x W'
    const index_t width = matrix.extent[2];
    project_tokens(executor, memory, tokens, matrix, read_tokens(x, len),
                   [=](index_t token, index_t n, index_t count, const float* from) {
                     std::copy_n(from, count, rows + token * width + n);
                   });
  };
  const auto route = [&](const Operand& router, index_t* experts, float* weights) -> Status {
    project(router, memory.logits);
    for (index_t row = 0; row < tokens * heads; ++row) {
      const auto slots = static_cast<std::size_t>(block.active);
      const std::span<const float> logits(memory.logits + row * block.experts, static_cast<std::size_t>(block.experts));
      if (Status s = switch_head_route(logits, {experts + row * block.active, slots}, {weights + row * block.active, slots});
          !s.ok())
        return s;
    }
    return {};
  };
  const auto routes_of = [&](const index_t* experts, const float* weights) {
    return ExpertRoutes{per_head(experts, block.active), per_head(weights, block.active)};
  };
  const Tensor<float> q = per_head(memory.q, block.dim_qk), k = per_head(memory.k, block.dim_qk);
  const Tensor<float> v = per_head(memory.v, block.dim_v), o = per_head(memory.o, block.dim_v);
  project(w.q, memory.q);
  project(w.k, memory.k);
  if (Status s = route(w.v_router, memory.v_experts, memory.v_weights); !s.ok()) return s;
  if (Status s = route(w.o_router, memory.o_experts, memory.o_weights); !s.ok()) return s;
  mix(x, w.v, routes_of(memory.v_experts, memory.v_weights), v, executor, memory.scratch, memory.lane_bytes);
  if (Status s = attend(q, k, v, o, options); !s.ok()) return s;
  mix(o, w.o, routes_of(memory.o_experts, memory.o_weights), y, executor, memory.scratch, memory.lane_bytes);
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
