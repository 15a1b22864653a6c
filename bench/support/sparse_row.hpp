// SPDX-License-Identifier: Apache-2.0
// Rows of the suite `sparse`: several ways to one answer on the same numbers in turns, so that a mechanism is held against the
// dense kernel of the same minute. What a row needs beside the shared numbers (caches, lists, codes) it makes once, unmeasured.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fovea/core/executor.hpp"
#include "fovea/core/status.hpp"
#include "fovea/core/view.hpp"
#include "rows.hpp"

namespace fovea_bench {

using fovea::index_t;

struct SparseMemory {
  std::span<const float> inputs;   // random numbers in [-1, 1), the same for all rows of a group
  std::span<float> outputs;        // the same memory for all of them
  fovea::Executor executor;
};

struct SparseWork {
  std::function<fovea::Status()> call;
  std::function<double()> error = {};   // of the last call; empty: the tests compare
};

struct SparseImpl {
  std::string impl;              // last part of the row's name: fovea, dense, copy, partial_sort ...
  double flops = 0, bytes = 0;   // of one call; a rate where one of them is a count of something else
  std::function<SparseWork(const SparseMemory&)> make;
};

class PreparedSparse final : public PreparedRow {
 public:
  PreparedSparse(const SparseImpl& impl, int threads, const RowMemory& memory)
      : work_(impl.make({memory.inputs, memory.outputs, fovea::Executor(*memory.pool, threads)})) {}
  void call() override { status_ = work_.call(); }
  double max_error() override { return work_.error ? work_.error() : 0; }
  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

 private:
  SparseWork work_;
  fovea::Status status_;
};

// Rows sparse/<problem>/t<threads>/<impl>. `streamed`: the problem does not fit the caches, rates are held against DRAM.
inline Group sparse_group(const std::string& problem, int threads, index_t input_floats, index_t output_floats,
                          bool streamed, const std::vector<SparseImpl>& impls) {
  Group group;
  group.title = "sparse/" + problem;
  for (const SparseImpl& impl : impls) {
    Row row;
    row.name = "sparse/" + problem + "/t" + std::to_string(threads) + "/" + impl.impl;
    row.suites = kSparse;
    row.threads = threads;
    row.flops = impl.flops;
    row.bytes = impl.bytes;
    row.memory = streamed ? Memory::streamed : Memory::cached;
    row.input_floats = static_cast<std::size_t>(input_floats);
    row.output_floats = static_cast<std::size_t>(output_floats);
    row.prepare = [impl, threads](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
      return std::make_unique<PreparedSparse>(impl, threads, memory);
    };
    group.rows.push_back(std::move(row));
  }
  return group;
}

}   // namespace fovea_bench
