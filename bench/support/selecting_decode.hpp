// SPDX-License-Identifier: Apache-2.0
// One decode step over a long bf16 cache, dense and by a selector: the cache and what the selector keeps of it are made once
// for all rows of a group and go with the last of them.
#pragma once
#include <memory>
#include <utility>

#include "fovea/attention.hpp"
#include "fovea/core/kv.hpp"
#include "sparse_row.hpp"
#include "stored_cache.hpp"

namespace fovea_bench {

struct SelectingShape {
  index_t len_k = 32768, q_heads = 32, kv_heads = 32, dim = 128;

  double dense_bytes() const { return static_cast<double>(4 * len_k * kv_heads * dim); }
  double dense_flops() const { return static_cast<double>(4 * len_k * q_heads * dim); }
};

// Kept: made of (kv, the keys as an operand).
template <class Kept>
struct SelectingState {
  GroupBuffers buffers;
  StoredCache cache;
  Kept kept;

  explicit SelectingState(const SelectingShape& s)
      : cache({Format::bf16, Format::bf16, 1, s.kv_heads, s.dim, s.dim, s.len_k}, Memory::cached, buffers), kept(keys(s)) {}

  fovea::Kv kv() const { return cache.kv(0, 0, 1); }
  fovea::Operand keys(const SelectingShape& s) const {
    const fovea::Kv all = kv();
    fovea::Operand k;
    k.data = all.k.data;
    k.format = Format::bf16;
    k.extent = {1, s.kv_heads, s.len_k, s.dim};
    k.stride = {all.k.stride[0] / 2, all.k.stride[1] / 2, all.k.stride[2] / 2, 1};
    return k;
  }
};

// attend(q, kv, kept, out, options) is the selector's call; bytes and flops those it cannot avoid.
template <class Kept, class Attend>
Group selecting_group(const std::string& mechanism, const SelectingShape& s, int threads, double flops, double bytes,
                      const Attend& attend) {
  using State = SelectingState<Kept>;
  const auto shared = std::make_shared<std::weak_ptr<State>>();
  const auto make = [=](const auto& call) {
    return [=](const SparseMemory& memory) -> SparseWork {
      std::shared_ptr<State> state = shared->lock();
      if (!state) *shared = state = std::make_shared<State>(s);
      const auto q = fovea::bhsd<const float>(memory.inputs.data(), 1, s.q_heads, 1, s.dim);
      const auto out = fovea::bhsd<float>(memory.outputs.data(), 1, s.q_heads, 1, s.dim);
      fovea::AttentionOptions options;
      options.causal = fovea::Causal::bottom_right;
      options.executor = memory.executor;
      return {[=] { return call(q, *state, out, options); }};
    };
  };
  using Bf16 = fovea::Formats<Format::bf16>;
  const auto selected = [=](const auto& q, const State& state, const auto& out, const auto& options) {
    return attend(q, state.kv(), state.kept, out, options);
  };
  const auto dense = [](const auto& q, const State& state, const auto& out, const auto& options) {
    return fovea::attention<Bf16>(q, state.kv(), out, options);
  };
  const std::string problem = mechanism + "/decode/kv" + std::to_string(s.len_k) + "/h" + std::to_string(s.q_heads) + "x" +
                              std::to_string(s.kv_heads);
  const index_t numbers = s.q_heads * s.dim;
  return sparse_group(problem, threads, numbers, numbers, true,
                      {{"fovea", flops, bytes, make(selected)}, {"dense", s.dense_flops(), s.dense_bytes(), make(dense)}});
}

}   // namespace fovea_bench
