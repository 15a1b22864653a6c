// SPDX-License-Identifier: Apache-2.0
// Rows of mechanisms that choose keys in a prefill: a planted prompt of 32768 tokens, the call with its selection, the selection
// alone, and the dense kernel on the same numbers.
#pragma once
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "fovea/attention.hpp"
#include "planted_prompt.hpp"
#include "sparse_row.hpp"

namespace fovea_bench {

using SelectingFormats = fovea::Formats<fovea::Format::f32>;

struct SelectingPrefill {
  std::shared_ptr<PlantedPrompt> prompt;
  fovea::Operand q;
  fovea::Kv kv;
  fovea::Result out;
  fovea::AttentionOptions options;

  explicit SelectingPrefill(const SparseMemory& memory) : prompt(LongPrompt::make(memory.inputs)) {
    using P = LongPrompt;
    const auto view = [](const float* data) { return fovea::bhsd(data, 1, P::kHeads, P::kLen, P::kDim); };
    q = view(prompt->q.data());
    kv = fovea::dense_kv(view(prompt->k.data()), view(memory.inputs.data() + 2 * P::kFloats));
    out = fovea::bhsd(memory.outputs.data(), 1, P::kHeads, P::kLen, P::kDim);
    options.causal = fovea::Causal::bottom_right;
    options.executor = memory.executor;
  }
};

// attend(SelectingPrefill) is the call, Lists::select the selection. With a share the flops of `fovea` are those of the keys that the
// lists name, the row refuses to run where the lists name another share, and its gflops over those of `dense` is the share of the
// possible gain that remains; without one all rows count the dense flops.
template <class Lists, class Rule, class Attend>
std::vector<Group> selecting_prefill_groups(int max_threads, const std::string& mechanism, const Rule& rule,
                                            std::optional<double> share, double select_flops, const Attend& attend) {
  using P = LongPrompt;
  const auto call = [=](const SparseMemory& memory) -> SparseWork {
    auto row = std::make_shared<SelectingPrefill>(memory);
    fovea::Status status;
    if (share) {
      Lists lists;
      status = lists.template select<SelectingFormats>(row->q, row->kv, rule, row->options);
      if (status.ok() && std::abs(lists.share() - *share) > 0.01 * *share)
        status = fovea::Status::error(fovea::Code::invalid_argument, "the share is %.4f, the row counts %.4f", lists.share(),
                                      *share);
    }
    return {[row, attend, status]() -> fovea::Status { return status.ok() ? attend(*row) : status; }};
  };
  const auto select = [=](const SparseMemory& memory) -> SparseWork {
    auto row = std::make_shared<SelectingPrefill>(memory);
    auto lists = std::make_shared<Lists>();
    return {[row, rule, lists] { return lists->template select<SelectingFormats>(row->q, row->kv, rule, row->options); }};
  };
  const auto dense = [](const SparseMemory& memory) -> SparseWork {
    auto row = std::make_shared<SelectingPrefill>(memory);
    return {[row] { return fovea::attention<SelectingFormats>(row->q, row->kv, row->out, row->options); }};
  };
  char problem[96];
  if (share) {
    std::snprintf(problem, sizeof problem, "%s/%s/share%.0f", mechanism.c_str(), P::kProblem, 100 * *share);
  } else {
    std::snprintf(problem, sizeof problem, "%s/%s", mechanism.c_str(), P::kProblem);
  }
  std::vector<Group> groups;
  for (const int threads : {1, 2}) {
    if (threads > max_threads) continue;
    Group group = sparse_group(problem, threads, 3 * P::kFloats, P::kFloats, false,
                               {{"fovea", P::kDenseFlops * share.value_or(1), 0, call},
                                {"select", select_flops, 0, select},
                                {"dense", P::kDenseFlops, 0, dense}});
    group.slow = true;
    groups.push_back(std::move(group));
  }
  return groups;
}

}   // namespace fovea_bench
