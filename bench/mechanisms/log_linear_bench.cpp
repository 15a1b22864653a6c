// SPDX-License-Identifier: Apache-2.0
// Log-linear Mamba-2 and Gated DeltaNet beside causal softmax of the same dims, from lengths around the crossing to 64k; and
// one token in place on the levels of a context.
#include "fovea/mechanisms/log_linear.hpp"

#include <cmath>

#include "fovea/reference/log_linear.hpp"
#include "support/attention_row.hpp"
#include "support/rows.hpp"

namespace fovea_bench {
namespace {

struct LevelRow {
  bool delta = false;
  index_t dim_v = 64, len = 1;
  index_t before = 0;   // tokens that the levels have seen; 0: a prompt, its levels wanted

  index_t levels() const { return static_cast<index_t>(std::bit_width(static_cast<std::size_t>(before + len - 1))) + 1; }
};
constexpr index_t kDimK = 128;

std::string problem_name(const LevelRow& row) {
  const auto number = [](const char* letter, index_t value) { return letter + std::to_string(value); };
  std::string name = std::string("recurrent/log_linear_") + (row.delta ? "gated_delta" : "mamba2") +
                     (row.before > 0 ? "/decode/f32" : "/prefill/f32") + number("/d", kDimK);
  if (row.dim_v != kDimK) name += number("_", row.dim_v);
  return name + (row.before > 0 ? number("/after", row.before) : number("/t", row.len)) + "/h1/t1/";
}

// Chunks of 64, whatever a kernel takes: C (dk + dv) + 2 dk dv + 2 dk dv n, or C (4 dk + 2 dv) + C^2 + 2 dk dv + 6 dk dv n,
// for n levels of whole chunks, half of those there are. A single token: what it reads and changes.
double flops_of(const LevelRow& row) {
  constexpr double kChunk = 64, kDim = kDimK;
  const auto dim_v = static_cast<double>(row.dim_v), product = kDim * dim_v;
  if (row.before > 0) return (row.delta ? 7 : 3) * product * (std::popcount(static_cast<std::size_t>(row.before)) + 1);
  const double levels = std::log2(static_cast<double>(row.len) / kChunk) / 2;
  const double token = row.delta ? kChunk * (4 * kDim + 2 * dim_v) + kChunk * kChunk + 2 * product + 6 * product * levels
                                 : kChunk * (kDim + dim_v) + 2 * product + 2 * product * levels;
  return token * static_cast<double>(row.len);
}

class PreparedLevels final : public PreparedRow {
 public:
  static index_t input_floats(const LevelRow& row) { return row.len * (2 * kDimK + row.dim_v); }

  PreparedLevels(const LevelRow& row, const RowMemory& memory) : row_(row), out_(memory.outputs) {
    const index_t len = row.len;
    q_ = memory.inputs.data();
    k_ = q_ + len * kDimK;
    v_ = k_ + len * kDimK;
    const auto uniform = [&](const char* name, index_t count, float low, float high) {
      const auto fill = [&](std::span<std::byte> bytes) {
        const std::span<float> numbers{reinterpret_cast<float*>(bytes.data()), static_cast<std::size_t>(count)};
        fill_random(numbers);
        for (float& number : numbers) number = low + (high - low) * (0.5f * number + 0.5f);
      };
      const std::string key = std::string(name) + "/" + std::to_string(count);
      return reinterpret_cast<float*>(memory.buffers->get(key, 4 * static_cast<std::size_t>(count), fill).data());
    };
    // |k|^2 is near 43, so beta |k|^2 is in [0, 0.67).
    gate_ = row.delta ? uniform("gate", len, -0.1f, 0.f) : uniform("dt", len, 0.001f, 0.1f);
    beta_ = uniform("beta", len, 0.f, 1.f / 64);
    lambda_ = uniform("lambda", len * row.levels(), 0.f, 1.f);
    levels_ = uniform("levels", row.levels() * kDimK * row.dim_v, -1.f, 1.f);
    options_.executor = fovea::Executor(*memory.pool, 1);
    // Mamba-2 keeps its states with dim_v first.
    options_.layout = row.delta ? fovea::StateLayout::k_first : fovea::StateLayout::v_first;
    if (row.before > 0) kept_.assign(levels_, levels_ + row.levels() * kDimK * row.dim_v);
  }

  void call() override {
    const auto final = level_view(levels_);
    fovea::LogLinearOptions<float> levels{tensor(lambda_, row_.len, row_.levels()), {&row_.before, 1}, {}, final};
    if (row_.before > 0) levels.initial_levels = final;
    const auto x = [&](const float* data, index_t dim) { return tensor(data, row_.len, dim); };
    const fovea::Result out = fovea::bhsd(out_.data(), 1, 1, row_.len, row_.dim_v);
    status_ = row_.delta ? fovea::log_linear_gated_delta(x(q_, kDimK), x(k_, kDimK), x(v_, row_.dim_v), {x(gate_, 1)},
                                                         x(beta_, 1), levels, out, options_)
                         : fovea::log_linear_mamba2(x(v_, row_.dim_v), x(k_, kDimK), x(q_, kDimK), {x(gate_, 1), kA}, levels,
                                                    out, options_);
  }

  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

  // A prompt's first tokens, or the single one from the levels that the first call found.
  double max_error() override {
    constexpr index_t kComparedTokens = 1024;
    const index_t len = std::min(row_.len, kComparedTokens);
    std::vector<std::vector<double>> owned;
    const auto widened = [&](const float* from, index_t dim) {
      const std::vector<double>& numbers = owned.emplace_back(from, from + len * dim);
      return tensor(numbers.data(), len, dim);
    };
    owned.reserve(8);
    const std::vector<double> a{kA.begin(), kA.end()}, initial{kept_.begin(), kept_.end()};
    std::vector<double> expected(static_cast<std::size_t>(len * row_.dim_v));
    fovea::LogLinearOptions<double> levels{widened(lambda_, row_.levels()), {&row_.before, 1}, {}, {}};
    std::vector<double> live = initial;
    for (index_t l = 0; l < row_.levels() && row_.before > 0; ++l) {
      const auto begin = live.begin() + l * kDimK * row_.dim_v;
      if (!fovea::reference::live_level(row_.before - 1, l) || l >= fovea::reference::levels_of(row_.before - 1))
        std::fill_n(begin, kDimK * row_.dim_v, 0.);
    }
    if (row_.before > 0) levels.initial_levels = level_view(static_cast<const double*>(live.data()));
    fovea::RecurrentOptions<double> options;
    options.layout = options_.layout;
    const auto q = widened(q_, kDimK), k = widened(k_, kDimK), v = widened(v_, row_.dim_v), gate = widened(gate_, 1),
               beta = widened(beta_, 1);
    const auto out = fovea::bhsd(expected.data(), 1, 1, len, row_.dim_v);
    if (row_.before > 0) rewind();
    if (row_.delta) {
      fovea::reference::log_linear_gated_delta(q, k, v, {gate}, beta, levels, out, options);
    } else {
      fovea::reference::log_linear_mamba2(v, k, q, {gate, a}, levels, out, options);
    }
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double error = double{out_[i]} - expected[i];
      difference += error * error;
      size += expected[i] * expected[i];
    }
    return std::sqrt(difference / size);
  }

 private:
  template <class T>
  static fovea::Tensor<const T> tensor(const T* data, index_t len, index_t dim) {
    return fovea::bhsd(data, 1, 1, len, dim);
  }
  template <class T>
  fovea::View<T, 5> level_view(T* data) const {
    const index_t size = kDimK * row_.dim_v, inner = row_.delta ? row_.dim_v : kDimK;
    return {data, {1, 1, row_.levels(), size / inner, inner}, {row_.levels() * size, row_.levels() * size, size, inner, 1}};
  }
  // Repeated calls walk on in place: the compared one starts from what the first found.
  void rewind() {
    std::copy(kept_.begin(), kept_.end(), levels_);
    call();
  }

  static constexpr std::array<float, 1> kA{-4.f};

  LevelRow row_;
  std::span<float> out_;
  const float *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *gate_ = nullptr, *beta_ = nullptr, *lambda_ = nullptr;
  float* levels_ = nullptr;
  std::vector<float> kept_;
  fovea::RecurrentOptions<float> options_;
  fovea::Status status_;
};

Row make_row(const LevelRow& levels) {
  Row row;
  row.name = problem_name(levels) + "fovea";
  row.suites = kRecurrent;
  row.flops = flops_of(levels);
  row.bytes =
      levels.before > 0
          ? 8. * static_cast<double>(kDimK * levels.dim_v * (std::popcount(static_cast<std::size_t>(levels.before)) + 1))
          : 4. * static_cast<double>(levels.len * (2 * kDimK + 2 * levels.dim_v + levels.levels()));
  row.input_floats = static_cast<std::size_t>(PreparedLevels::input_floats(levels));
  row.output_floats = static_cast<std::size_t>(levels.len * levels.dim_v);
  row.prepare = [levels](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
    return std::make_unique<PreparedLevels>(levels, memory);
  };
  return row;
}

// Heads of Mamba-2's 64 or of Gated DeltaNet's 128 numbers, as attention has them.
Row softmax_row(const LevelRow& levels) {
  AttentionRow attention;
  attention.dim_qk = attention.dim_v = levels.dim_v;
  attention.len_q = attention.len_k = levels.len;
  attention.q_heads = attention.kv_heads = 1;
  attention.causal = true;
  Row row = make_row(attention);
  row.name = problem_name(levels) + "softmax";
  row.suites = kRecurrent;
  return row;
}

}   // namespace

std::vector<Group> log_linear_groups(int) {
  std::vector<Group> groups;
  for (const bool delta : {false, true}) {
    LevelRow row{.delta = delta, .dim_v = delta ? 128 : 64};
    for (const index_t len : {1024, 2048}) {
      row.len = len;
      Group& group = groups.emplace_back();
      group.title = problem_name(row);
      group.rows = {make_row(row), softmax_row(row)};
    }
    Group& growth = groups.emplace_back();   // in turns, so that rates of different lengths compare
    growth.slow = true;
    for (const index_t len : {4096, 8192, 32768, 65536}) {
      row.len = len;
      growth.title = problem_name(row);
      growth.rows.push_back(make_row(row));
      growth.rows.push_back(softmax_row(row));
    }
    row.len = 1;
    for (const index_t before : {4095, 65535}) {   // all levels live
      row.before = before;
      Group& group = groups.emplace_back();
      group.title = problem_name(row);
      group.window = 0.005;
      group.rows = {make_row(row)};
    }
  }
  return groups;
}

}   // namespace fovea_bench
