// SPDX-License-Identifier: Apache-2.0
// Selection costs a pass over the scores. Where flops are a count of scores, gflops reads as scores per nanosecond.
#include "fovea/call/column_sums.hpp"
#include "fovea/engine/parts/select.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "support/sparse_row.hpp"

namespace fovea_bench {

namespace {

struct Selected {
  std::vector<std::int32_t> to;
  std::vector<std::byte> scratch;
  std::vector<std::pair<float, std::int32_t>> pairs;
  std::vector<float> weights;
  std::vector<std::uint16_t> distances;
};

std::span<const float> first_scores(const SparseMemory& memory, index_t n) {
  return memory.inputs.first(static_cast<std::size_t>(n));
}

SparseImpl top_k_impl(index_t n, index_t k, bool on_lanes) {
  return {"fovea", static_cast<double>(n), static_cast<double>(4 * n), [=](const SparseMemory& memory) {
            const auto own = std::make_shared<Selected>();
            own->to.resize(static_cast<std::size_t>(k));
            own->scratch.resize(fovea::top_k_lanes_scratch_bytes(n, k));
            const auto scores = first_scores(memory, n);
            const fovea::Executor executor = on_lanes ? memory.executor : fovea::Executor();
            return SparseWork{[=] {
              static_cast<void>(fovea::top_k(scores, k, own->to.data(), own->scratch, executor));
              return fovea::Status();
            }};
          }};
}

// What a library without a selection of its own does: pairs of score and index, in the same total order.
template <class Sort>
SparseImpl sorted_impl(const char* name, index_t n, const Sort& sort) {
  return {name, static_cast<double>(n), static_cast<double>(4 * n), [=](const SparseMemory& memory) {
            const auto own = std::make_shared<Selected>();
            own->pairs.resize(static_cast<std::size_t>(n));
            const auto scores = first_scores(memory, n);
            return SparseWork{[=] {
              for (std::size_t i = 0; i < own->pairs.size(); ++i) own->pairs[i] = {scores[i], static_cast<std::int32_t>(i)};
              sort(own->pairs, [](const auto& a, const auto& b) {
                return a.first > b.first || (a.first == b.first && a.second < b.second);
              });
              return fovea::Status();
            }};
          }};
}

Group top_k_group(index_t n, index_t k, int threads) {
  std::vector<SparseImpl> impls{top_k_impl(n, k, threads > 1)};
  if (threads == 1) {
    impls.push_back(sorted_impl("partial_sort", n, [k](auto& pairs, const auto& better) {
      std::partial_sort(pairs.begin(), pairs.begin() + k, pairs.end(), better);
    }));
    impls.push_back(sorted_impl("nth_element", n, [k](auto& pairs, const auto& better) {
      std::nth_element(pairs.begin(), pairs.begin() + k, pairs.end(), better);
    }));
  }
  return sparse_group("top_k/n" + std::to_string(n) + "/k" + std::to_string(k), threads, n, 1, false, impls);
}

Group top_p_group(index_t n) {
  return sparse_group("top_p/n" + std::to_string(n) + "/p85", 1, n, 1, false,
                      {{"fovea", static_cast<double>(n), static_cast<double>(4 * n), [=](const SparseMemory& memory) {
                          const auto own = std::make_shared<Selected>();
                          for (const float x : first_scores(memory, n)) own->weights.push_back(std::exp(4 * x));
                          own->to.resize(static_cast<std::size_t>(n));
                          own->scratch.resize(fovea::top_p_scratch_bytes());
                          return SparseWork{[=] {
                            static_cast<void>(fovea::top_p(own->weights, 0.85, own->to.data(), own->scratch));
                            return fovea::Status();
                          }};
                        }}});
}

Group smallest_group(index_t n, index_t k) {
  return sparse_group("smallest/n" + std::to_string(n) + "/k" + std::to_string(k), 1, n, 1, false,
                      {{"fovea", static_cast<double>(n), static_cast<double>(2 * n), [=](const SparseMemory& memory) {
                          const auto own = std::make_shared<Selected>();
                          for (const float x : first_scores(memory, n))
                            own->distances.push_back(static_cast<std::uint16_t>(64 + 20 * (x + 1)));
                          own->to.resize(static_cast<std::size_t>(k));
                          return SparseWork{[=] {
                            static_cast<void>(fovea::select_smallest(own->distances, k, 384, own->to.data()));
                            return fovea::Status();
                          }};
                        }}});
}

// Two passes of Q K'.
Group column_sums_group(index_t q_heads, index_t kv_heads, index_t len_q, index_t len_k, int threads) {
  const index_t dim = 128, q_floats = q_heads * len_q * dim, k_floats = kv_heads * len_k * dim;
  const double flops = 4. * static_cast<double>(q_heads * len_q) * static_cast<double>(len_k * dim);
  const std::string problem = "column_sums/q" + std::to_string(len_q) + "/kv" + std::to_string(len_k) + "/h" +
                              std::to_string(q_heads) + "x" + std::to_string(kv_heads);
  return sparse_group(
      problem, threads, q_floats + k_floats, 2 * kv_heads * len_k, false,
      {{"fovea", flops, static_cast<double>(4 * k_floats), [=](const SparseMemory& memory) {
          const auto q = fovea::bhsd(memory.inputs.data(), 1, q_heads, len_q, dim);
          const auto k = fovea::bhsd(memory.inputs.data() + q_floats, 1, kv_heads, len_k, dim);
          float* const sums = memory.outputs.data();
          const fovea::ColumnSums to{{sums, {1, kv_heads, len_k}, {0, len_k, 1}},
                                     {sums + kv_heads * len_k, {1, kv_heads, len_k}, {0, len_k, 1}},
                                     false};
          fovea::AttentionOptions options{.causal = fovea::Causal::bottom_right};
          options.executor = memory.executor;
          return SparseWork{
              [=] { return fovea::column_sums<fovea::Formats<fovea::Format::f32>>(q, fovea::dense_kv(k, k), to, options); }};
        }}});
}

}   // namespace

std::vector<Group> select_groups(int max_threads) {
  std::vector<Group> groups{top_k_group(131072, 2048, 1),
                            top_k_group(1048576, 2048, 1),
                            top_k_group(4096, 64, 1),
                            smallest_group(32768, 128),
                            top_p_group(8192),
                            column_sums_group(8, 2, 64, 32768, 1)};
  if (max_threads > 1) {
    groups.push_back(top_k_group(1048576, 2048, max_threads));
    groups.push_back(column_sums_group(8, 2, 64, 32768, max_threads));
  }
  return groups;
}

}   // namespace fovea_bench
