// SPDX-License-Identifier: Apache-2.0
// A row of softmax attention: its shape, its name, its work, and how each implementation is called.
#pragma once
#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "baselines/eigen_attention.hpp"
#include "baselines/scalar_attention.hpp"
#include "fovea/attention.hpp"
#include "fovea/core/workspace.hpp"
#include "fovea/reference/softmax.hpp"
#include "rows.hpp"

namespace fovea_bench {

using fovea::index_t;

enum class Impl { fovea, eigen, scalar };
enum class Extra { none, softcap, alibi, sink, bias };   // what is added to the bare kernel

struct AttentionRow {
  std::string regime = "prefill";   // prefill, decode: fovea's plan and workspace made once; call: the front door, all in
  index_t dim_qk = 128, dim_v = 128;
  index_t len_q = 1, len_k = 1;
  index_t q_heads = 8, kv_heads = 8;
  bool causal = false;
  index_t window_keys = 0;   // 0 = no window, else keys a query sees, itself included
  Extra extra = Extra::none;
  Memory memory = Memory::cached;
  int threads = 1;
  Impl impl = Impl::fovea;
};

inline std::string mask_name(const AttentionRow& row) {
  std::string mask = row.window_keys > 0 ? "window" + std::to_string(row.window_keys) : row.causal ? "causal" : "full";
  switch (row.extra) {
    case Extra::none:
      break;
    case Extra::softcap:
      mask += "_softcap";
      break;
    case Extra::alibi:
      mask += "_alibi";
      break;
    case Extra::sink:
      mask += "_sink";
      break;
    case Extra::bias:
      mask += "_bias";
      break;
  }
  return mask;
}

// Everything but threads and implementation.
inline std::string problem_name(const AttentionRow& row) {
  std::string name = "attention/" + row.regime + "/f32/d" + std::to_string(row.dim_qk);
  if (row.dim_v != row.dim_qk) name += "_" + std::to_string(row.dim_v);
  return name + "/q" + std::to_string(row.len_q) + "/kv" + std::to_string(row.len_k) + "/h" + std::to_string(row.q_heads) +
         "x" + std::to_string(row.kv_heads) + "/" + mask_name(row);
}

inline std::string row_name(const AttentionRow& row) {
  const char* const impl = row.impl == Impl::fovea ? "fovea" : row.impl == Impl::eigen ? "eigen" : "scalar";
  return problem_name(row) + "/t" + std::to_string(row.threads) + "/" + impl;
}

inline fovea::AttentionOptions plain_options(const AttentionRow& row) {
  fovea::AttentionOptions options;
  if (row.causal || row.window_keys > 0) options.causal = fovea::Causal::bottom_right;
  if (row.window_keys > 0) options.window = {row.window_keys - 1, 0};
  return options;
}

// 2 (dim_qk + dim_v) per visible pair of query and key: 4 S S D H, exactly halved for a causal mask.
inline double attention_flops(const AttentionRow& row) {
  const fovea_baselines::VisibleKeys visible(plain_options(row), 0, row.len_q, row.len_k);
  double pairs = 0;
  for (index_t query = 0; query < row.len_q; ++query) {
    const fovea_baselines::KeyRange keys = visible.of(query);
    pairs += static_cast<double>(keys.end - keys.begin);
  }
  return 2. * static_cast<double>(row.dim_qk + row.dim_v) * pairs * static_cast<double>(row.q_heads);
}

// Where the tensors of a row lie in the common input, in floats. Streamed rows walk over so many copies of K and V that no
// cache holds them: 512 MiB in all, against last-level caches of 32 and 105 MiB on the machines measured.
struct AttentionLayout {
  static constexpr index_t kStreamedBytes = index_t{512} << 20;
  index_t q = 0, bias = 0, kv = 0;         // first float of each
  index_t k_floats = 0, copy_floats = 0;   // K alone; K and V of one copy
  index_t copies = 1;

  explicit AttentionLayout(const AttentionRow& row) {
    bias = spaced(row.q_heads * row.len_q * row.dim_qk);
    kv = bias + (row.extra == Extra::bias ? spaced(row.len_q * row.len_k) : 0);
    k_floats = spaced(row.kv_heads * row.len_k * row.dim_qk);
    copy_floats = k_floats + spaced(row.kv_heads * row.len_k * row.dim_v);
    if (row.memory == Memory::streamed) copies = (kStreamedBytes / 4 + copy_floats - 1) / copy_floats;
  }
  index_t total() const { return kv + copies * copy_floats; }

 private:
  // A few cache lines between tensors: their lengths are powers of two, and equal offsets in all of them would make every
  // implementation fight over the same cache sets.
  static index_t spaced(index_t floats) { return (floats + 15) / 16 * 16 + 1040; }
};

// The right answer for up to 64 rows, spread evenly over heads and queries.
struct SampledRows {
  std::vector<std::pair<index_t, index_t>> places;   // q_head, query
  std::vector<double> values;                        // [place, dim_v]
};

class PreparedAttention final : public PreparedRow {
 public:
  PreparedAttention(const AttentionRow& row, const RowMemory& memory)
      : row_(row), layout_(row), options_(plain_options(row)) {
    const float* const inputs = memory.inputs.data();
    q_ = fovea::bhsd(inputs + layout_.q, 1, row.q_heads, row.len_q, row.dim_qk);
    out_ = fovea::bhsd(memory.outputs.data(), 1, row.q_heads, row.len_q, row.dim_v);
    first_kv_ = inputs + layout_.kv;
    for (index_t head = 0; head < row.q_heads; ++head) {
      const auto place = static_cast<float>(head + 1) / static_cast<float>(row.q_heads);
      per_head_.push_back(row.extra == Extra::alibi ? std::exp2(-8.f * place) : place);
    }
    if (row.extra == Extra::softcap) options_.softcap = 30.f;
    if (row.extra == Extra::alibi) options_.alibi_slopes = per_head_;
    if (row.extra == Extra::sink) options_.sink = per_head_;
    if (row.extra == Extra::bias) {
      options_.bias = {inputs + layout_.bias, {1, 1, row.len_q, row.len_k}, {0, 0, row.len_k, 1}};
    }
    options_.executor = fovea::Executor(*memory.pool, row.threads);
    if (row.impl == Impl::fovea && row.regime != "call") {
      const fovea::AttentionShape shape{1, row.q_heads, row.kv_heads, row.len_q, row.len_k, row.dim_qk, row.dim_v};
      status_ = fovea::make_plan(plan_, shape, options_);
      if (!status_.ok()) return;
      workspace_.resize(fovea::workspace_bytes(plan_, row.threads) + fovea::kAlignment);
      options_.workspace = fovea::aligned(workspace_);
    }
  }

  void call() override {
    copy_ = copy_ + 1 == layout_.copies ? 0 : copy_ + 1;
    const auto [k, v] = kv();
    switch (row_.impl) {
      case Impl::fovea:
        if (row_.regime == "call") {
          status_ = fovea::attention(q_, k, v, out_, options_);
        } else if (status_.ok()) {
          status_ = fovea::attention(plan_, q_, k, v, out_, options_);
        }
        break;
      case Impl::eigen:
        fovea_baselines::eigen_attention(q_, k, v, out_, options_);
        break;
      case Impl::scalar:
        fovea_baselines::scalar_attention(q_, k, v, out_, options_);
        break;
    }
  }

  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

  double max_error() override {
    const SampledRows& right = reference();
    double worst = 0;
    for (std::size_t at = 0; at < right.places.size(); ++at) {
      const auto [head, query] = right.places[at];
      for (index_t d = 0; d < row_.dim_v; ++d) {
        const double expected = right.values[at * static_cast<std::size_t>(row_.dim_v) + static_cast<std::size_t>(d)];
        const double error = std::abs(double{out_(0, head, query, d)} - expected);
        if (!(error <= worst)) worst = error;   // a NaN stays
      }
    }
    return worst;
  }

 private:
  std::pair<fovea::Tensor<const float>, fovea::Tensor<const float>> kv() const {
    const float* const k = first_kv_ + copy_ * layout_.copy_floats;
    return {fovea::bhsd(k, 1, row_.kv_heads, row_.len_k, row_.dim_qk),
            fovea::bhsd(k + layout_.k_floats, 1, row_.kv_heads, row_.len_k, row_.dim_v)};
  }

  // Implementations and thread counts of one problem share the answer; it depends on the copy, and first calls use the same.
  const SampledRows& reference() const {
    static std::map<std::string, SampledRows> known;
    const auto [place, is_new] = known.try_emplace(problem_name(row_) + "/" + std::to_string(copy_));
    if (is_new) compute(place->second);
    return place->second;
  }

  // One row at a time: its own slice of every tensor, its position as an offset.
  void compute(SampledRows& rows) const {
    const auto [k, v] = kv();
    const fovea_baselines::VisibleKeys visible(options_, 0, row_.len_q, row_.len_k);
    const index_t all = row_.q_heads * row_.len_q, samples = std::min<index_t>(64, all);
    rows.values.resize(static_cast<std::size_t>(samples * row_.dim_v));
    for (index_t sample = 0; sample < samples; ++sample) {
      // The middle of the sample-th of equal parts; the last sample is the last row, which sees most keys.
      const index_t at = sample + 1 == samples ? all - 1 : (2 * sample + 1) * all / (2 * samples);
      const index_t head = at / row_.len_q, query = at % row_.len_q, kv_head = head / (row_.q_heads / row_.kv_heads);
      const index_t pos = visible.position(query);
      fovea::AttentionOptions one = options_;
      if (!one.alibi_slopes.empty()) one.alibi_slopes = one.alibi_slopes.subspan(static_cast<std::size_t>(head), 1);
      if (!one.sink.empty()) one.sink = one.sink.subspan(static_cast<std::size_t>(head), 1);
      if (one.bias) one.bias = {&one.bias(0, 0, query, 0), {1, 1, 1, row_.len_k}, one.bias.stride};
      one.q_offset = {&pos, 1};
      const auto slice = [](fovea::Tensor<const float> tensor, index_t from, index_t first, index_t count) {
        tensor.data += from * tensor.stride[1] + first * tensor.stride[2];
        tensor.extent[1] = 1;
        tensor.extent[2] = count;
        return tensor;
      };
      const auto value = fovea::bhsd(rows.values.data() + sample * row_.dim_v, 1, 1, 1, row_.dim_v);
      fovea::reference::softmax(slice(q_, head, query, 1), slice(k, kv_head, 0, row_.len_k),
                                slice(v, kv_head, 0, row_.len_k), value, one);
      rows.places.emplace_back(head, query);
    }
  }

  AttentionRow row_;
  AttentionLayout layout_;
  fovea::AttentionOptions options_;
  fovea::Tensor<const float> q_;
  fovea::Tensor<float> out_;
  const float* first_kv_ = nullptr;
  index_t copy_ = -1;
  std::vector<float> per_head_;
  fovea::Plan plan_;
  std::vector<std::byte> workspace_;
  fovea::Status status_;
};

inline Row make_row(const AttentionRow& attention) {
  Row row;
  row.name = row_name(attention);
  row.threads = attention.threads;
  row.flops = attention_flops(attention);
  row.bytes = 4. * static_cast<double>(attention.kv_heads * attention.len_k * (attention.dim_qk + attention.dim_v));
  row.memory = attention.memory;
  row.input_floats = static_cast<std::size_t>(AttentionLayout(attention).total());
  row.output_floats = static_cast<std::size_t>(attention.q_heads * attention.len_q * attention.dim_v);
  row.prepare = [attention](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
    return std::make_unique<PreparedAttention>(attention, memory);
  };
  return row;
}

}  // namespace fovea_bench
