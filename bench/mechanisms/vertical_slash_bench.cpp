// SPDX-License-Identifier: Apache-2.0
// A prompt of 32768 tokens, selection included, beside the dense kernel on the same numbers. The flops of `fovea` are those
// of the keys that its lists name, so its gflops over those of `dense` is the share of the possible gain that remains.
// `select` is the selection alone; its flops are those of the last 64 queries' scores, twice.
#include "fovea/mechanisms/vertical_slash.hpp"

#include <cmath>

#include "fovea/attention.hpp"
#include "support/planted_prompt.hpp"
#include "support/sparse_row.hpp"

namespace fovea_bench {

namespace {

using Only = fovea::Formats<fovea::Format::f32>;
using Prompt = LongPrompt;

constexpr double kShare = 0.2526;   // of the causal keys, at the published 1000 columns and 6096 diagonals

struct VerticalSlashRow {
  std::shared_ptr<PlantedPrompt> prompt;
  fovea::Operand q;
  fovea::Kv kv;
  fovea::Result out;
  fovea::AttentionOptions options;

  explicit VerticalSlashRow(const SparseMemory& memory) : prompt(Prompt::make(memory.inputs)) {
    const auto view = [](const float* data) { return fovea::bhsd(data, 1, Prompt::kHeads, Prompt::kLen, Prompt::kDim); };
    q = view(prompt->q.data());
    kv = fovea::dense_kv(view(prompt->k.data()), view(memory.inputs.data() + 2 * Prompt::kFloats));
    out = fovea::bhsd(memory.outputs.data(), 1, Prompt::kHeads, Prompt::kLen, Prompt::kDim);
    options.causal = fovea::Causal::bottom_right;
    options.executor = memory.executor;
  }
};

SparseWork sparse(const SparseMemory& memory, const fovea::VerticalSlash& rule) {
  auto row = std::make_shared<VerticalSlashRow>(memory);
  fovea::VerticalSlashLists lists;
  fovea::Status status = lists.select<Only>(row->q, row->kv, rule, row->options);
  if (status.ok() && std::abs(lists.share() - kShare) > 0.01 * kShare)
    status =
        fovea::Status::error(fovea::Code::invalid_argument, "the share is %.4f, the row counts %.4f", lists.share(), kShare);
  return {[row, rule, status]() -> fovea::Status {
    if (!status.ok()) return status;
    return fovea::vertical_slash_attention<Only>(row->q, row->kv, row->out, rule, row->options);
  }};
}

SparseWork select(const SparseMemory& memory, const fovea::VerticalSlash& rule) {
  auto row = std::make_shared<VerticalSlashRow>(memory);
  auto lists = std::make_shared<fovea::VerticalSlashLists>();
  return {[row, rule, lists] { return lists->select<Only>(row->q, row->kv, rule, row->options); }};
}

SparseWork dense(const SparseMemory& memory) {
  auto row = std::make_shared<VerticalSlashRow>(memory);
  return {[row] { return fovea::attention<Only>(row->q, row->kv, row->out, row->options); }};
}

}   // namespace

std::vector<Group> vertical_slash_groups(int max_threads) {
  std::vector<Group> groups;
  for (const int threads : {1, 2}) {
    if (threads > max_threads) continue;
    const fovea::VerticalSlash rule{};
    char problem[96];
    std::snprintf(problem, sizeof problem, "vertical_slash/%s/share%.0f", Prompt::kProblem, 100 * kShare);
    Group group = sparse_group(
        problem, threads, 3 * Prompt::kFloats, Prompt::kFloats, false,
        {{"fovea", Prompt::kDenseFlops * kShare, 0, [rule](const SparseMemory& memory) { return sparse(memory, rule); }},
         {"select", 4. * Prompt::kHeads * Prompt::kDim * Prompt::kLen * 64, 0,
          [rule](const SparseMemory& memory) { return select(memory, rule); }},
         {"dense", Prompt::kDenseFlops, 0, dense}});
    group.slow = true;
    groups.push_back(std::move(group));
  }
  return groups;
}

}   // namespace fovea_bench
