// SPDX-License-Identifier: Apache-2.0
// Rows of the suite `recurrent` for the elementwise scans: one sequence, channels next to each other, final states wanted.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fovea/core/executor.hpp"
#include "fovea/core/status.hpp"
#include "fovea/core/view.hpp"
#include "recurrent_probes.hpp"
#include "rows.hpp"

namespace fovea_bench {

using fovea::index_t;

struct ScanShape {
  index_t len = 4096, channels = 1024, modes = 16;
  int threads = 1;
};

// What a call works on: random numbers in [-1, 1), more than enough, and the output.
struct ScanTensors {
  std::span<const float> inputs;
  fovea::Tensor<float> out;   // [1, 1, pos, channel]
  fovea::Executor executor;
};
// Made once per row, outside of what is measured.
struct ScanWork {
  std::function<fovea::Status()> call;
  std::function<void()> scalar;                           // the same as plain loops, on one thread
  std::function<void(fovea::Tensor<double>)> reference;   // the first kScanSampled channels
};
inline constexpr index_t kScanSampled = 5;

struct ScanMechanism {
  std::string name;
  index_t inputs_per_token_channel = 1, exponentials = 0;   // per token and channel
  std::function<ScanWork(const ScanShape&, const ScanTensors&)> make;
};

class PreparedScan final : public PreparedRow {
 public:
  PreparedScan(const ScanMechanism& mechanism, const ScanShape& shape, bool scalar, const RowMemory& memory)
      : scalar_(scalar),
        out_(fovea::bhsd(memory.outputs.data(), 1, 1, shape.len, shape.channels)),
        work_(mechanism.make(shape, {memory.inputs, out_, fovea::Executor(*memory.pool, shape.threads)})) {}

  void call() override {
    if (scalar_) return work_.scalar();
    status_ = work_.call();
  }
  double max_error() override {
    const index_t len = out_.extent[2], channels = std::min(kScanSampled, out_.extent[3]);
    std::vector<double> want(static_cast<std::size_t>(len * channels));
    const fovea::Tensor<double> view = fovea::bhsd(want.data(), 1, 1, len, channels);
    work_.reference(view);
    double worst = 0;
    for (index_t t = 0; t < len; ++t) {
      for (index_t c = 0; c < channels; ++c) worst = std::max(worst, std::abs(double{out_(0, 0, t, c)} - view(0, 0, t, c)));
    }
    return worst;
  }
  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

 private:
  bool scalar_;
  fovea::Tensor<float> out_;
  ScanWork work_;
  fovea::Status status_;
};

// recurrent/<mechanism>/prefill/f32/n<modes>/c<channels>/t<len>/t<threads>/fovea, and where exponentials bind, the time of
// as many of them at best: .../exp2; on one thread also .../scalar.
inline Group scan_group(const ScanMechanism& mechanism, const ScanShape& shape) {
  const std::string problem = "recurrent/" + mechanism.name + (shape.len == 1 ? "/decode" : "/prefill") + "/f32/n" +
                              std::to_string(shape.modes) + "/c" + std::to_string(shape.channels) + "/t" +
                              std::to_string(shape.len) + "/t" + std::to_string(shape.threads);
  const auto numbers = static_cast<double>(shape.len * shape.channels);
  Row row;
  row.name = problem + "/fovea";
  row.suites = kRecurrent;
  row.threads = shape.threads;
  row.bytes = 4. * numbers * static_cast<double>(mechanism.inputs_per_token_channel + 1);
  row.memory = shape.len == 1 ? Memory::cached : Memory::streamed;
  // Rows, then parameters of any kind: at most a dozen numbers for every mode of a channel, two rows of modes a token.
  row.input_floats = static_cast<std::size_t>(shape.len * shape.channels * mechanism.inputs_per_token_channel +
                                              2 * shape.len * shape.modes + 12 * shape.channels * (shape.modes + 1));
  row.output_floats = static_cast<std::size_t>(shape.len * shape.channels);
  const auto prepare = [&](bool scalar) {
    return [mechanism, shape, scalar](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
      return std::make_unique<PreparedScan>(mechanism, shape, scalar, memory);
    };
  };
  row.prepare = prepare(false);
  Group group;
  group.title = problem;
  group.rows.push_back(row);
  if (shape.threads == 1) {
    row.name = problem + "/scalar";
    row.prepare = prepare(true);
    group.rows.push_back(std::move(row));
  }
  if (mechanism.exponentials > 0)
    group.rows.push_back(
        exp2_probe_row(problem + "/exp2", kRecurrent, numbers * static_cast<double>(mechanism.exponentials), shape.threads));
  return group;
}

inline std::vector<Group> scan_groups(const ScanMechanism& mechanism, index_t modes, int max_threads) {
  std::vector<Group> groups;
  for (int threads = 1; threads <= std::min(2, max_threads); ++threads) {
    for (const index_t channels : {1024, 2048}) groups.push_back(scan_group(mechanism, {4096, channels, modes, threads}));
  }
  groups.push_back(scan_group(mechanism, {1, 1024, modes, 1}));
  return groups;
}

// Numbers that a row owns, f(i).
template <class F>
std::shared_ptr<std::vector<float>> made_floats(index_t count, F&& f) {
  auto numbers = std::make_shared<std::vector<float>>(static_cast<std::size_t>(count));
  for (index_t i = 0; i < count; ++i) (*numbers)[static_cast<std::size_t>(i)] = f(i);
  return numbers;
}
// [pos, channel]: the first kScanSampled channels in double.
inline std::vector<double> sampled(const float* rows, index_t len, index_t channels) {
  std::vector<double> wide;
  for (index_t t = 0; t < len; ++t) {
    for (index_t c = 0; c < std::min(kScanSampled, channels); ++c) wide.push_back(double{rows[t * channels + c]});
  }
  return wide;
}

}   // namespace fovea_bench
