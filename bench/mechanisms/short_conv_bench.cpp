// SPDX-License-Identifier: Apache-2.0
// The convolution of Qwen3-Next's Gated DeltaNet layers (8192 channels, width 4) over a prompt and for one token, and rows
// that are copied in its place: it reads and writes every number once.
#include "fovea/mechanisms/short_conv.hpp"

#include <cmath>
#include <cstring>

#include "fovea/core/convert.hpp"
#include "fovea/reference/short_conv.hpp"
#include "support/rows.hpp"

namespace fovea_bench {

namespace {

using fovea::index_t;

struct ConvShape {
  index_t len = 4096, channels = 8192, width = 4;
  bool brain = false;   // bf16
  bool copy = false;    // the probe
  int threads = 1;

  index_t numbers() const { return len * channels; }
  std::size_t bytes() const { return static_cast<std::size_t>(numbers() * (brain ? 2 : 4)); }
};

class PreparedConv final : public PreparedRow {
 public:
  PreparedConv(const ConvShape& shape, const RowMemory& memory) : shape_(shape), pool_(*memory.pool) {
    const float* const numbers = memory.inputs.data();
    const index_t state_numbers = shape.channels * (shape.width - 1);
    parameters_.weight = {numbers, {shape.channels, shape.width}, {shape.width, 1}};
    state_.assign(numbers, numbers + state_numbers);
    parameters_.initial_state = {state_.data(), {1, shape.channels, shape.width - 1}, {state_numbers, 1, shape.channels}};
    if (shape.len == 1)
      parameters_.final_state = {state_.data(), parameters_.initial_state.extent, parameters_.initial_state.stride};
    x_ = numbers + shape.channels * shape.width;
    y_ = memory.outputs.data();
    if (shape.brain) {
      stored_.resize(static_cast<std::size_t>(shape.numbers()));
      for (std::size_t n = 0; n < stored_.size(); ++n) stored_[n] = fovea::convert<fovea::bf16>(x_[n]);
    }
    options_.executor = fovea::Executor(pool_, shape.threads);
  }
  void call() override {
    if (shape_.copy) return copy();
    status_ = shape_.brain ? run(stored_.data(), reinterpret_cast<fovea::bf16*>(y_)) : run(x_, y_);
  }
  // Of the first channels of a prompt; a state that is updated in place has moved on.
  double max_error() override {
    if (shape_.copy || shape_.len == 1) return 0;
    constexpr index_t kChannels = 4;
    const auto of = [](const auto& from, index_t count) { return std::vector<double>(from, from + count); };
    const std::vector<double> taps = of(parameters_.weight.data, kChannels * shape_.width);
    std::vector<double> state, x, y(static_cast<std::size_t>(shape_.len * kChannels));
    for (index_t c = 0; c < kChannels; ++c) {
      for (index_t n = 0; n + 1 < shape_.width; ++n) state.push_back(double{parameters_.initial_state(0, c, n)});
    }
    const auto number = [&](const auto* rows, index_t t, index_t c) {
      return double{fovea::convert<float>(rows[t * shape_.channels + c])};
    };
    for (index_t t = 0; t < shape_.len; ++t) {
      for (index_t c = 0; c < kChannels; ++c) x.push_back(shape_.brain ? number(stored_.data(), t, c) : number(x_, t, c));
    }
    fovea::reference::short_conv(
        fovea::bhsd<const double>(x.data(), 1, 1, shape_.len, kChannels),
        {.weight = {taps.data(), {kChannels, shape_.width}, {shape_.width, 1}},
         .initial_state = {state.data(), {1, kChannels, shape_.width - 1}, {0, shape_.width - 1, 1}}},
        fovea::bhsd(y.data(), 1, 1, shape_.len, kChannels));
    double worst = 0;
    for (index_t t = 0; t < shape_.len; ++t) {
      for (index_t c = 0; c < kChannels; ++c) {
        const double got = shape_.brain ? number(reinterpret_cast<const fovea::bf16*>(y_), t, c) : number(y_, t, c);
        worst = std::max(worst, std::abs(got - y[static_cast<std::size_t>(t * kChannels + c)]));
      }
    }
    return worst;
  }
  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

 private:
  template <class T>
  fovea::Status run(const T* x, T* y) {
    return fovea::short_conv(fovea::bhsd(x, 1, 1, shape_.len, shape_.channels), parameters_,
                             fovea::bhsd(y, 1, 1, shape_.len, shape_.channels), options_);
  }
  void copy() {
    const std::size_t share = shape_.bytes() / static_cast<std::size_t>(shape_.threads);
    auto lane = [&](int index) {
      const std::size_t begin = share * static_cast<std::size_t>(index);
      const void* const from = shape_.brain ? static_cast<const void*>(stored_.data()) : x_;
      std::memcpy(reinterpret_cast<std::byte*>(y_) + begin, static_cast<const std::byte*>(from) + begin, share);
    };
    pool_.run(shape_.threads, fovea::LaneFunction(lane));
  }

  ConvShape shape_;
  PinnedPool& pool_;
  fovea::ShortConvParameters<float> parameters_;
  fovea::RecurrentOptions<float> options_;
  std::vector<float> state_;
  std::vector<fovea::bf16> stored_;
  const float* x_ = nullptr;
  float* y_ = nullptr;
  fovea::Status status_;
};

Row conv_row(const ConvShape& shape) {
  Row row;
  row.name = std::string("recurrent/short_conv/") + (shape.len == 1 ? "decode" : "prefill") +
             (shape.brain ? "/bf16" : "/f32") + "/w" + std::to_string(shape.width) + "/c" + std::to_string(shape.channels) +
             "/t" + std::to_string(shape.len) + "/t" + std::to_string(shape.threads) + (shape.copy ? "/copy" : "/fovea");
  row.suites = kRecurrent;
  row.threads = shape.threads;
  row.bytes = 2. * static_cast<double>(shape.bytes());
  row.memory = shape.len == 1 ? Memory::cached : Memory::streamed;
  row.input_floats = static_cast<std::size_t>(shape.numbers() + shape.channels * shape.width);
  row.output_floats = static_cast<std::size_t>(shape.numbers());
  row.prepare = [shape](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
    return std::make_unique<PreparedConv>(shape, memory);
  };
  return row;
}

}   // namespace

std::vector<Group> short_conv_groups(int max_threads) {
  std::vector<Group> groups;
  for (const bool brain : {false, true}) {
    for (const index_t len : {index_t{4096}, index_t{1}}) {
      Group group;
      for (const bool copy : {false, true}) {
        for (int threads = 1; threads <= std::min(len == 1 ? 1 : 2, max_threads); ++threads)
          group.rows.push_back(conv_row({.len = len, .brain = brain, .copy = copy, .threads = threads}));
      }
      group.title = group.rows.front().name.substr(0, group.rows.front().name.rfind("/t"));
      groups.push_back(std::move(group));
    }
  }
  return groups;
}

}   // namespace fovea_bench
