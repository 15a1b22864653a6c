// SPDX-License-Identifier: Apache-2.0
// Rows of mechanisms whose keys are a pattern of positions, beside dense attention over the same tensors. Every row counts the
// flops of its own pairs, so that the times compare, and the GFLOP/s say what a pattern costs beyond its share.
#pragma once
#include "fovea/attention.hpp"
#include "sparse_row.hpp"

namespace fovea_bench {

struct PatternShape {
  index_t len_q, len_k, q_heads, kv_heads, dim;

  index_t q_floats() const { return q_heads * len_q * dim; }
  index_t kv_floats() const { return kv_heads * len_k * dim; }
  index_t input_floats() const { return q_floats() + 2 * kv_floats() + 2 * kGap; }
  index_t output_floats() const { return q_floats() + q_heads * len_q; }   // with an LSE behind
  double flops(double pairs) const { return 4. * static_cast<double>(dim * q_heads) * pairs; }
  double kv_bytes(double keys) const { return 8. * static_cast<double>(dim * kv_heads) * keys; }
  double causal_pairs() const {
    const auto q = static_cast<double>(len_q), k = static_cast<double>(len_k);
    return q * (k - (q - 1) / 2);
  }

  static constexpr index_t kGap = 1040;   // lengths are powers of two, tensors are not to fight over the same cache sets
};

struct PatternTensors {
  fovea::Tensor<const float> q, k, v;
  fovea::Tensor<float> out;
  fovea::View<float, 3> lse;
  fovea::AttentionOptions options;   // the executor

  PatternTensors(const PatternShape& s, const SparseMemory& memory) {
    const float* const from = memory.inputs.data();
    float* const to = memory.outputs.data();
    q = fovea::bhsd(from, 1, s.q_heads, s.len_q, s.dim);
    k = fovea::bhsd(from + s.q_floats() + s.kGap, 1, s.kv_heads, s.len_k, s.dim);
    v = fovea::bhsd(from + s.q_floats() + s.kv_floats() + 2 * s.kGap, 1, s.kv_heads, s.len_k, s.dim);
    out = fovea::bhsd(to, 1, s.q_heads, s.len_q, s.dim);
    lse = {to + s.q_floats(), {1, s.q_heads, s.len_q}, {s.q_heads * s.len_q, s.len_q, 1}};
    options.executor = memory.executor;
  }
};

// make(PatternTensors) -> callable of one call.
template <class Make>
SparseImpl pattern_impl(const std::string& impl, const PatternShape& shape, double pairs, double keys, const Make& make) {
  return {impl, shape.flops(pairs), shape.kv_bytes(keys), [shape, make](const SparseMemory& memory) {
            SparseWork work;
            work.call = make(PatternTensors(shape, memory));
            return work;
          }};
}

inline SparseImpl dense_impl(const PatternShape& shape, fovea::Causal causal) {
  const double all = static_cast<double>(shape.len_q) * static_cast<double>(shape.len_k);
  return pattern_impl("dense", shape, causal == fovea::Causal::none ? all : shape.causal_pairs(),
                      static_cast<double>(shape.len_k), [causal](PatternTensors x) {
                        x.options.causal = causal;
                        return [x] { return fovea::attention(x.q, x.k, x.v, x.out, x.options); };
                      });
}

inline Group pattern_group(const std::string& problem, const PatternShape& shape, int threads, bool streamed,
                           const std::vector<SparseImpl>& impls) {
  return sparse_group(problem, threads, shape.input_floats(), shape.output_floats(), streamed, impls);
}

}   // namespace fovea_bench
