// SPDX-License-Identifier: Apache-2.0
// Hydra attention (Bolya et al. 2022, arXiv 2209.07484): linear attention with as many heads as features and the cosine
// kernel,
//   out_i = phi(q_i) * sum_j phi(k_j) * v_j   (elementwise),   phi(x) = x / |x|,
// O(len dim) instead of O(len^2 dim). No scores and so no tiles: one pass over K and V into a state of dim numbers, one over
// the queries. Causal, the sums are prefix sums and the state carries them from call to call: a recurrent layer.
#pragma once
#include "../call/checks.hpp"
#include "../engine/deal.hpp"

namespace fovea {
inline namespace v0 {

struct HydraOptions {
  bool causal = false;                   // query i sees the keys 0 .. i of this call, and what the state held before it
  std::span<const index_t> len_k = {};   // [batch]  keys in use; not with causal
  float eps = 1e-12f;                    // phi(x) = x / max(|x|, eps): a zero vector stays zero
  Executor executor = {};                // (batch, head) pairs are dealt to its lanes
};

inline namespace FOVEA_ARCH {

// 1 / max(|x|, eps). Squares are summed in four chains; |x| beyond 1e19 overflows.
FOVEA_INLINE float inverse_norm(const float* x, index_t dim, float eps) {
  f32 sum[4] = {f32(0.f), f32(0.f), f32(0.f), f32(0.f)};
  for (index_t d = 0; d < dim; d += kLanes) {
    const f32 part = load_strided(x + d, 1, dim - d);
    f32& chain = sum[d / kLanes % 4];
    chain = fma(part, part, chain);
  }
  const float norm = std::sqrt(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])));
  return 1.f / (norm < eps ? eps : norm);   // NaN stays NaN
}

// state += phi(k) * v.
FOVEA_INLINE void hydra_add(const float* k, const float* v, index_t dim, float eps, float* state) {
  const f32 inverse(inverse_norm(k, dim, eps));
  index_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(state + d, fma(load(k + d) * inverse, load(v + d), load(state + d)));
  if (d < dim) {
    const index_t rest = dim - d;
    store_some(state + d, fma(load_some(k + d, rest) * inverse, load_some(v + d, rest), load_some(state + d, rest)), rest);
  }
}

// out = phi(q) * state.
FOVEA_INLINE void hydra_read(const float* q, const float* state, index_t dim, float eps, float* out) {
  const f32 inverse(inverse_norm(q, dim, eps));
  index_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(q + d) * inverse * load(state + d));
  if (d < dim) store_some(out + d, load_some(q + d, dim - d) * inverse * load_some(state + d, dim - d), dim - d);
}

// q [batch, head, len_q, dim], k and v [batch, head, len_k, dim], out as q; all f32 with innermost stride 1. The paper has
// one head that is as wide as the model; with more, each is normalised by itself. state [batch, head, dim], innermost stride
// 1, holds sum_j phi(k_j) * v_j: keys are added to what stands in it (zeros at the start of a sequence), in their order, so
// that any chunking of a causal sequence gives the same bits. Causal calls have len_q = len_k. On error nothing has been
// written.
inline Status hydra_attention(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out,
                              View<float, 3> state, const HydraOptions& options = {}) {
  using namespace door;
  q = tidy(q), k = tidy(k), v = tidy(v), out = tidy(out), state = tidy(state);
  const index_t batch = q.extent[0], heads = q.extent[1], len_q = q.extent[2], len_k = k.extent[2], dim = q.extent[3];
  Bytes q_bytes, k_bytes, v_bytes, out_bytes, state_bytes;
  if (Status s = check_data("q", q, q_bytes); !s.ok()) return s;
  if (Status s = check_data("k", k, k_bytes); !s.ok()) return s;
  if (Status s = check_data("v", v, v_bytes); !s.ok()) return s;
  if (Status s = check_data("out", out, out_bytes); !s.ok()) return s;
  if (Status s = check_data("state", state, state_bytes); !s.ok()) return s;
  if (Status s = check_extents("k", k, {batch, heads, len_k, dim}, "q"); !s.ok()) return s;
  if (Status s = check_extents("v", v, k.extent, "k: a feature of V for each of K"); !s.ok()) return s;
  if (Status s = check_extents("out", out, q.extent, "q"); !s.ok()) return s;
  if (state.extent != std::array<index_t, 3>{batch, heads, dim})
    return invalid("fovea: state is [%td, %td, %td], must be [%td, %td, %td]", state.extent[0], state.extent[1],
                   state.extent[2], batch, heads, dim);
  for (const index_t stride : {q.stride[3], k.stride[3], v.stride[3], out.stride[3], state.stride[2]}) {
    if (dim > 1 && stride != 1) return unsupported("fovea: hydra attention needs innermost strides of 1, got %td", stride);
  }
  if (options.causal && len_q != len_k)
    return invalid("fovea: causal hydra attention adds one key per query: len_q %td, len_k %td", len_q, len_k);
  if (!options.len_k.empty() && (options.causal || static_cast<index_t>(options.len_k.size()) != batch))
    return invalid("fovea: len_k has %zu entries for %td sequences%s", options.len_k.size(), batch,
                   options.causal ? "; a causal call has as many keys as queries" : "");
  for (std::size_t b = 0; b < options.len_k.size(); ++b) {
    if (options.len_k[b] < 0 || options.len_k[b] > len_k)
      return invalid("fovea: len_k[%zu] = %td is outside 0 .. %td, the keys stored", b, options.len_k[b], len_k);
  }
  if (!(options.eps > 0.f)) return invalid("fovea: eps %g must be positive", static_cast<double>(options.eps));
  if (!writes_apart(out) || !writes_apart(state)) return invalid("fovea: out or state overlaps itself");
  for (const auto& [name, bytes] : {std::pair{"q", q_bytes}, std::pair{"k", k_bytes}, std::pair{"v", v_bytes}}) {
    if (Status s = check_apart({"out", out_bytes}, name, bytes); !s.ok()) return s;
    if (Status s = check_apart({"state", state_bytes}, name, bytes); !s.ok()) return s;
  }
  if (Status s = check_apart({"out", out_bytes}, "state", state_bytes); !s.ok()) return s;

  const auto one_head = [&](int, index_t task) {
    const index_t b = task / heads, h = task % heads;
    const auto row = [&](const auto& view, index_t i) {
      return view.data + b * view.stride[0] + h * view.stride[1] + i * view.stride[2];
    };
    float* const sums = state.data + b * state.stride[0] + h * state.stride[1];
    const index_t keys = options.len_k.empty() ? len_k : options.len_k[static_cast<std::size_t>(b)];
    if (!options.causal) {
      for (index_t j = 0; j < keys; ++j) hydra_add(row(k, j), row(v, j), dim, options.eps, sums);
    }
    for (index_t i = 0; i < len_q; ++i) {
      if (options.causal) hydra_add(row(k, i), row(v, i), dim, options.eps, sums);
      hydra_read(row(q, i), sums, dim, options.eps, row(out, i));
    }
  };
  deal(options.executor, options.executor.lanes(), batch * heads, one_head);
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
