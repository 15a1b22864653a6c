// SPDX-License-Identifier: Apache-2.0
// A prompt of 32768 tokens, selection included, beside the dense kernel on the same numbers; every row counts the dense
// flops, so the ratio of two rates is that of their times. `select` is the selection alone.
#include "fovea/mechanisms/flex_prefill.hpp"

#include "fovea/attention.hpp"
#include "support/planted_prompt.hpp"
#include "support/sparse_row.hpp"

namespace fovea_bench {

namespace {

using Only = fovea::Formats<fovea::Format::f32>;
using Prompt = LongPrompt;

struct FlexPrefillRow {
  std::shared_ptr<PlantedPrompt> prompt;
  fovea::Operand q;
  fovea::Kv kv;
  fovea::Result out;
  fovea::AttentionOptions options;

  explicit FlexPrefillRow(const SparseMemory& memory) : prompt(Prompt::make(memory.inputs)) {
    const auto view = [](const float* data) { return fovea::bhsd(data, 1, Prompt::kHeads, Prompt::kLen, Prompt::kDim); };
    q = view(prompt->q.data());
    kv = fovea::dense_kv(view(prompt->k.data()), view(memory.inputs.data() + 2 * Prompt::kFloats));
    out = fovea::bhsd(memory.outputs.data(), 1, Prompt::kHeads, Prompt::kLen, Prompt::kDim);
    options.causal = fovea::Causal::bottom_right;
    options.executor = memory.executor;
  }
};

SparseWork sparse(const SparseMemory& memory, const fovea::FlexPrefill& rule) {
  auto row = std::make_shared<FlexPrefillRow>(memory);
  return {[row, rule] { return fovea::flex_prefill<Only>(row->q, row->kv, row->out, rule, row->options); }};
}

SparseWork select(const SparseMemory& memory, const fovea::FlexPrefill& rule) {
  auto row = std::make_shared<FlexPrefillRow>(memory);
  auto lists = std::make_shared<fovea::FlexPrefillLists>();
  return {[row, rule, lists] { return lists->select<Only>(row->q, row->kv, rule, row->options); }};
}

SparseWork dense(const SparseMemory& memory) {
  auto row = std::make_shared<FlexPrefillRow>(memory);
  return {[row] { return fovea::attention<Only>(row->q, row->kv, row->out, row->options); }};
}

}   // namespace

std::vector<Group> flex_prefill_groups(int max_threads) {
  std::vector<Group> groups;
  for (const int threads : {1, 2}) {
    if (threads > max_threads) continue;
    const fovea::FlexPrefill rule{};
    char problem[96];
    std::snprintf(problem, sizeof problem, "flex_prefill/%s", Prompt::kProblem);
    Group group = sparse_group(
        problem, threads, 3 * Prompt::kFloats, Prompt::kFloats, false,
        {{"fovea", Prompt::kDenseFlops, 0, [rule](const SparseMemory& memory) { return sparse(memory, rule); }},
         {"select", Prompt::kDenseFlops, 0, [rule](const SparseMemory& memory) { return select(memory, rule); }},
         {"dense", Prompt::kDenseFlops, 0, dense}});
    group.slow = true;
    groups.push_back(std::move(group));
  }
  return groups;
}

}   // namespace fovea_bench
