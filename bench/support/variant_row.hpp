// SPDX-License-Identifier: Apache-2.0
// Rows of the suite `variants`: calls on the same tensors in turns, so that each is held against the bare softmax kernel of the
// same minute. They go through the front door, planning included.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fovea/attention.hpp"
#include "rows.hpp"

namespace fovea_bench {

using fovea::index_t;

struct VariantShape {
  index_t len = 4096, dim = 128, q_heads = 8, kv_heads = 8;
  bool causal = true;
  int threads = 1;
};

// What a call works on. `extra` holds random numbers in [-1, 1), `options` causality, executor and nothing else.
struct VariantTensors {
  fovea::Tensor<const float> q, k, v;   // [1, head, len, dim]
  fovea::Tensor<float> out;
  std::span<const float> extra;         // [extra_floats]
  fovea::AttentionOptions options;
};

struct VariantCall {
  std::string impl;   // last part of the row's name; "softmax" is the bare kernel of the group
  // Made once per row, outside of what is measured: the state of the call, and the call itself.
  std::function<std::function<fovea::Status()>(const VariantTensors&)> make;
  index_t extra_floats = 0;
  double flops_share = 1;   // of the flops of the bare kernel
};

inline VariantCall bare_softmax() {
  return {"softmax", [](const VariantTensors& x) {
            return [x] { return fovea::attention(x.q, x.k, x.v, x.out, x.options); };
          }};
}

class PreparedVariant final : public PreparedRow {
 public:
  PreparedVariant(const VariantShape& shape, const VariantCall& call, const RowMemory& memory) {
    const float* const in = memory.inputs.data();
    const index_t q_floats = shape.q_heads * shape.len * shape.dim, kv_floats = shape.kv_heads * shape.len * shape.dim;
    VariantTensors x;
    x.q = fovea::bhsd(in, 1, shape.q_heads, shape.len, shape.dim);
    x.k = fovea::bhsd(in + q_floats, 1, shape.kv_heads, shape.len, shape.dim);
    x.v = fovea::bhsd(in + q_floats + kv_floats, 1, shape.kv_heads, shape.len, shape.dim);
    x.out = fovea::bhsd(memory.outputs.data(), 1, shape.q_heads, shape.len, shape.dim);
    x.extra = memory.inputs.subspan(static_cast<std::size_t>(q_floats + 2 * kv_floats));
    if (shape.causal) x.options.causal = fovea::Causal::bottom_right;
    x.options.executor = fovea::Executor(*memory.pool, shape.threads);
    call_ = call.make(x);
  }
  void call() override { status_ = call_(); }
  double max_error() override { return 0; }   // the tests compare with the references
  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

 private:
  std::function<fovea::Status()> call_;
  fovea::Status status_;
};

// One group: rows variants/<mechanism>/f32/d<dim>/q<len>/kv<len>/h<q>x<kv>/<mask>/t<threads>/<impl>, one for each call.
inline Group variant_group(const std::string& mechanism, const std::vector<VariantCall>& calls, const VariantShape& shape = {}) {
  const auto number = [](index_t n) { return std::to_string(n); };
  const std::string problem = "variants/" + mechanism + "/f32/d" + number(shape.dim) + "/q" + number(shape.len) + "/kv" +
                              number(shape.len) + "/h" + number(shape.q_heads) + "x" + number(shape.kv_heads) +
                              (shape.causal ? "/causal" : "/full");
  const auto len = static_cast<double>(shape.len);
  const double pairs = shape.causal ? len * (len + 1) / 2 : len * len;
  Group group;
  group.title = problem;
  for (const VariantCall& call : calls) {
    Row row;
    row.name = problem + "/t" + std::to_string(shape.threads) + "/" + call.impl;
    row.suites = kVariants;
    row.threads = shape.threads;
    row.flops = 4. * static_cast<double>(shape.dim * shape.q_heads) * pairs * call.flops_share;
    const index_t floats = (shape.q_heads + 2 * shape.kv_heads) * shape.len * shape.dim + call.extra_floats;
    row.input_floats = static_cast<std::size_t>(floats);
    row.output_floats = static_cast<std::size_t>(shape.q_heads * shape.len * shape.dim);
    row.prepare = [shape, call](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
      return std::make_unique<PreparedVariant>(shape, call, memory);
    };
    group.rows.push_back(std::move(row));
  }
  return group;
}

}  // namespace fovea_bench
