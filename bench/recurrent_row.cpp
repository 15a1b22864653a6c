// SPDX-License-Identifier: Apache-2.0
// How a row of the suite `recurrent` is prepared, called and compared; the same for all mechanisms, so it is compiled once.
#include "support/recurrent_row.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <memory>

#include "fovea/core/convert.hpp"
#include "fovea/simd/tiles.hpp"
#include "support/recurrent_probes.hpp"

namespace fovea_bench {
namespace {

double prefill_flops(Work work, index_t dim_k, index_t dim_v) {
  constexpr double kChunk = 32;
  const auto product = static_cast<double>(dim_k * dim_v), sum = static_cast<double>(dim_k + dim_v);
  if (work == Work::decay) return 4 * product + kChunk * sum;
  return work == Work::delta ? 6 * product + 2 * kChunk * sum : 8 * product + 4 * kChunk * sum;
}
double decode_flops(Work work, index_t dim_k, index_t dim_v) {
  return (work == Work::decay ? 5. : 7.) * static_cast<double>(dim_k * dim_v);
}

// Everything but threads and implementation.
std::string problem_name(const std::string& mechanism, const RecurrentRow& row) {
  const auto number = [](const char* letter, index_t value) { return letter + std::to_string(value); };
  std::string name = "recurrent/" + mechanism + (row.decode ? "/decode/" : "/prefill/") + fovea::name_of(row.format);
  if (row.token_major) name += "/token_major";
  name += number("/d", row.dim_k);
  if (row.dim_v != row.dim_k) name += number("_", row.dim_v);
  name += number("/t", row.len) + number("/h", row.qk_heads);
  if (row.heads != row.qk_heads) name += number("x", row.heads);
  return name;
}

std::string impl_name(const RecurrentRow& row) {
  if (row.scalar) return "scalar";
  std::string name = row.panels == fovea::Panels::bf16 ? "fovea_bf16" : "fovea";
  if (row.layout == fovea::StateLayout::v_first) name += "_v_first";
  if (row.form == fovea::RecurrentForm::step) name += "_step";
  if (row.form == fovea::RecurrentForm::fused) name += "_fused";
  if (row.form == fovea::RecurrentForm::chunked) name += "_chunked";
  if (row.chunk > 0) name += std::to_string(row.chunk);
  return name;
}

// The states of all heads, one set after the other; behind the states of a set its key sums and exponents.
struct StateBlocks {
  index_t state_floats, sum_floats, max_floats, block_floats;

  StateBlocks(const RecurrentMechanism& mechanism, const RecurrentRow& row)
      : state_floats(row.heads * row.dim_k * row.dim_v),
        sum_floats(mechanism.keeps_sum ? row.heads * row.dim_k : 0),
        max_floats(mechanism.keeps_sum ? row.heads : 0),
        block_floats((state_floats + sum_floats + max_floats + 15) / 16 * 16) {}
};

// Relative RMS of the difference, the worst of several comparisons. A NaN stays.
class RelativeError {
 public:
  template <class Actual>   // actual(i) against expected[i]
  void compare(std::span<const double> expected, const Actual& actual) {
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double error = actual(static_cast<index_t>(i)) - expected[i];
      difference += error * error;
      size += expected[i] * expected[i];
    }
    const double relative = std::sqrt(difference / size);
    if (!(relative <= worst_)) worst_ = relative;
  }
  double worst() const { return worst_; }

 private:
  double worst_ = 0;
};

class PreparedRecurrent final : public PreparedRow {
 public:
  static index_t input_floats(const RecurrentRow& row) {
    return 2 * spaced(row.qk_heads * row.len * row.dim_k) + spaced(row.heads * row.len * row.dim_v);
  }

  PreparedRecurrent(const RecurrentMechanism& mechanism, const RecurrentRow& row, const RowMemory& memory)
      : mechanism_(mechanism), row_(row), blocks_(mechanism, row) {
    place_tensors(memory);
    place_states(*memory.buffers);
    call_.options.layout = row.layout;
    call_.options.form = row.form;
    call_.options.chunk = row.chunk;
    call_.options.panels = row.panels;
    call_.options.executor = fovea::Executor(*memory.pool, row.threads);
    if (row.decode) {   // what the first call finds is gone when its result is compared
      for (const index_t head : sampled_heads()) initial_.push_back(head_states(head));
    }
  }

  void call() override {
    ++at_;
    if (at_ == copies_) at_ = 0;
    point_to(states_.data() + at_ * blocks_.block_floats);
    if (row_.scalar) {
      run_scalar();
    } else {
      status_ = mechanism_.call(call_);
    }
  }

  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

  // Outputs, and where the reference walks to the end the states too, of the first and the last head.
  double max_error() override {
    RelativeError error;
    const std::vector<index_t> heads = sampled_heads();
    for (std::size_t at = 0; at < heads.size(); ++at) {
      const Answer& answer = reference(heads[at], row_.decode ? &initial_[at] : nullptr);
      error.compare(answer.out, [&](index_t i) { return number_of(call_.out, heads[at], i / row_.dim_v, i % row_.dim_v); });
      if (answer.states.state.empty()) continue;
      const HeadStates actual = head_states(heads[at]);
      error.compare(answer.states.state, [&](index_t i) { return actual.state[static_cast<std::size_t>(i)]; });
    }
    return error.worst();
  }

 private:
  // State [dim_k, dim_v], key sum and exponent of one head.
  struct HeadStates {
    std::vector<double> state, sum;
    double max = 0;
  };
  struct Answer {
    std::vector<double> out;   // [pos, dim_v]
    HeadStates states;         // empty where the reference stopped early
  };

  // A few cache lines between tensors, as in AttentionLayout.
  static index_t spaced(index_t floats) { return (floats + 15) / 16 * 16 + 1040; }

  // The reference is some 25 us per token and head.
  static constexpr index_t kComparedTokens = 4096;

  std::vector<index_t> sampled_heads() const {
    return row_.heads == 1 ? std::vector<index_t>{0} : std::vector<index_t>{0, row_.heads - 1};
  }
  index_t qk_head(index_t head) const { return head / (row_.heads / row_.qk_heads); }

  void place_tensors(const RowMemory& memory) {
    const index_t k_at = spaced(row_.qk_heads * row_.len * row_.dim_k), v_at = 2 * k_at;
    const auto tensor = [&](auto* data, index_t heads, index_t len, index_t dim) {
      return row_.token_major ? fovea::bshd(data, 1, len, heads, dim) : fovea::bhsd(data, 1, heads, len, dim);
    };
    const auto place = [&](const auto* numbers, auto* out) {
      call_.q = tensor(numbers, row_.qk_heads, row_.len, row_.dim_k);
      call_.k = tensor(numbers + k_at, row_.qk_heads, row_.len, row_.dim_k);
      call_.v = tensor(numbers + v_at, row_.heads, row_.len, row_.dim_v);
      call_.out = tensor(out, row_.heads, row_.len, row_.dim_v);
    };
    if (row_.format == Format::f32) {
      place(memory.inputs.data(), memory.outputs.data());
    } else {
      const auto count = static_cast<std::size_t>(input_floats(row_));
      const auto narrow = [&](std::span<std::byte> bytes) {
        auto* const to = reinterpret_cast<fovea::bf16*>(bytes.data());
        for (std::size_t i = 0; i < count; ++i) to[i] = fovea::convert<fovea::bf16>(memory.inputs[i]);
      };
      const std::span<std::byte> bytes = memory.buffers->get("bf16/" + std::to_string(count), 2 * count, narrow);
      place(reinterpret_cast<const fovea::bf16*>(bytes.data()), reinterpret_cast<fovea::bf16*>(memory.outputs.data()));
    }
    for (std::size_t which = 0; which < mechanism_.extra.size(); ++which) {
      const ExtraInput& extra = mechanism_.extra[which];
      const index_t width = extra.width == ExtraInput::kDimK ? row_.dim_k : extra.width;
      const index_t len = extra.per_token ? row_.len : 1;
      const auto count = static_cast<std::size_t>(row_.heads * len * width);
      const auto fill = [&](std::span<std::byte> bytes) {
        const std::span<float> numbers{reinterpret_cast<float*>(bytes.data()), count};
        fill_random(numbers);
        for (float& number : numbers) number = extra.low + (extra.high - extra.low) * (0.5f * number + 0.5f);
      };
      const std::string name = "extra/" + std::to_string(which) + "/" + std::to_string(count);
      const std::span<std::byte> bytes = memory.buffers->get(name, 4 * count, fill);
      call_.extra.push_back(tensor(reinterpret_cast<const float*>(bytes.data()), row_.heads, len, width));
    }
  }

  void place_states(GroupBuffers& buffers) {
    if (row_.streamed) {
      states_ = rotated_floats(buffers, "states");
    } else {
      const auto count = static_cast<std::size_t>(blocks_.block_floats);
      const std::span<std::byte> bytes =
          buffers.get("states/" + std::to_string(count), 4 * count, [](std::span<std::byte> all) {
            fill_random({reinterpret_cast<float*>(all.data()), all.size() / sizeof(float)});
          });
      states_ = {reinterpret_cast<float*>(bytes.data()), count};
    }
    copies_ = static_cast<index_t>(states_.size()) / blocks_.block_floats;
    // A key sum is a denominator: not near zero.
    for (index_t copy = 0; copy < copies_; ++copy) {
      float* const sum = states_.data() + copy * blocks_.block_floats + blocks_.state_floats;
      for (index_t i = 0; i < blocks_.sum_floats; ++i) sum[i] = 1.f + std::abs(sum[i]);
    }
    at_ = copies_ - 1;
    point_to(states_.data());   // what the first call takes
  }

  void point_to(float* block) {
    const index_t heads = row_.heads, rows = row_.dim_k, columns = row_.dim_v;
    const bool v_first = row_.layout == fovea::StateLayout::v_first;
    const auto states = fovea::bhsd(block, 1, heads, v_first ? columns : rows, v_first ? rows : columns);
    call_.options.final_state = states;
    if (row_.decode) call_.options.initial_state = states;
    if (!mechanism_.keeps_sum) return;
    float* const sum = block + blocks_.state_floats;
    call_.final_sum = {sum, {1, heads, rows}, {heads * rows, rows, 1}};
    call_.final_max = {sum + blocks_.sum_floats, {1, heads}, {heads, 1}};
    if (!row_.decode) return;
    call_.initial_sum = call_.final_sum;
    call_.initial_max = call_.final_max;
  }

  HeadStates head_states(index_t head) const {
    HeadStates found;
    const fovea::Tensor<float>& states = call_.options.final_state;
    const bool v_first = row_.layout == fovea::StateLayout::v_first;
    for (index_t i = 0; i < row_.dim_k; ++i) {
      for (index_t j = 0; j < row_.dim_v; ++j)
        found.state.push_back(double{v_first ? states(0, head, j, i) : states(0, head, i, j)});
    }
    if (!mechanism_.keeps_sum) return found;
    for (index_t i = 0; i < row_.dim_k; ++i) found.sum.push_back(double{call_.final_sum(0, head, i)});
    found.max = double{call_.final_max(0, head)};
    return found;
  }

  template <class Stored>   // Operand or Result
  static double number_of(const Stored& x, index_t head, index_t pos, index_t dim) {
    const index_t at = head * x.stride[1] + pos * x.stride[2] + dim * x.stride[3];
    if (x.format == Format::f32) return double{reinterpret_cast<const float*>(x.data)[at]};
    return double{fovea::convert<float>(reinterpret_cast<const fovea::bf16*>(x.data)[at])};
  }

  // Threads, layouts and forms of one problem share the answer, except where states are changed in place.
  const Answer& reference(index_t head, const HeadStates* initial) {
    if (initial != nullptr) return own_answer_ = compute(head, initial);
    static std::map<std::string, Answer> known;
    const auto [place, is_new] = known.try_emplace(problem_name(mechanism_.name, row_) + "/" + std::to_string(head));
    if (is_new) place->second = compute(head, nullptr);
    return place->second;
  }

  Answer compute(index_t head, const HeadStates* initial) const {
    const index_t len = std::min(row_.len, kComparedTokens), dim_k = row_.dim_k, dim_v = row_.dim_v;
    Answer answer;
    std::vector<std::vector<double>> owned;
    owned.reserve(3 + call_.extra.size());
    const auto slice = [&](index_t tokens, index_t dim, const auto& number) {
      std::vector<double>& numbers = owned.emplace_back();
      for (index_t t = 0; t < tokens; ++t) {
        for (index_t d = 0; d < dim; ++d) numbers.push_back(number(t, d));
      }
      return fovea::bhsd(static_cast<const double*>(numbers.data()), 1, 1, tokens, dim);
    };
    const auto operand = [&](const fovea::Operand& x, index_t of, index_t dim) {
      return slice(len, dim, [&](index_t t, index_t d) { return number_of(x, of, t, d); });
    };
    RecurrentCall<double> call;
    call.q = operand(call_.q, qk_head(head), dim_k);
    call.k = operand(call_.k, qk_head(head), dim_k);
    call.v = operand(call_.v, head, dim_v);
    for (const fovea::Tensor<const float>& extra : call_.extra) {
      const index_t tokens = std::min(len, extra.extent[2]);
      call.extra.push_back(
          slice(tokens, extra.extent[3], [&](index_t t, index_t d) { return double{extra(0, head, t, d)}; }));
    }
    answer.out.resize(static_cast<std::size_t>(len * dim_v));
    call.out = fovea::bhsd(answer.out.data(), 1, 1, len, dim_v);
    HeadStates& states = answer.states;
    states.state.resize(static_cast<std::size_t>(dim_k * dim_v));
    states.sum.resize(static_cast<std::size_t>(dim_k));
    if (initial != nullptr) states = *initial;
    call.options.final_state = fovea::bhsd(states.state.data(), 1, 1, dim_k, dim_v);
    if (initial != nullptr) call.options.initial_state = call.options.final_state;
    if (mechanism_.keeps_sum) {
      call.final_sum = {states.sum.data(), {1, 1, dim_k}, {dim_k, dim_k, 1}};
      call.final_max = {&states.max, {1, 1}, {1, 1}};
      if (initial != nullptr) call.initial_sum = call.final_sum;
      if (initial != nullptr) call.initial_max = call.final_max;
    }
    mechanism_.reference(call);
    if (len < row_.len) states = {};
    return answer;
  }

  // Head by head; q, k, v and out are fp32, the states K-first.
  void run_scalar() {
    const index_t dim_k = row_.dim_k, dim_v = row_.dim_v;
    const fovea::Tensor<float>& states = call_.options.final_state;
    std::array<float, ScalarToken::kMostDim> factor, scratch;
    for (index_t head = 0; head < row_.heads; ++head) {
      ScalarToken token{};
      token.dim_k = dim_k;
      token.dim_v = dim_v;
      token.state = &states(0, head, 0, 0);
      token.sum = mechanism_.keeps_sum ? &call_.final_sum(0, head, 0) : nullptr;
      token.max = mechanism_.keeps_sum ? &call_.final_max(0, head) : nullptr;
      token.factor = factor.data();
      token.scratch = scratch.data();
      if (!row_.decode) {
        std::fill_n(token.state, dim_k * dim_v, 0.f);
        if (mechanism_.keeps_sum) std::fill_n(token.sum, dim_k, 0.f);
        if (mechanism_.keeps_sum) *token.max = 0.f;
      }
      const auto at = [](const auto& x, index_t of, index_t t) { return x.data + 4 * (of * x.stride[1] + t * x.stride[2]); };
      for (index_t t = 0; t < row_.len; ++t) {
        token.q = reinterpret_cast<const float*>(at(call_.q, qk_head(head), t));
        token.k = reinterpret_cast<const float*>(at(call_.k, qk_head(head), t));
        token.v = reinterpret_cast<const float*>(at(call_.v, head, t));
        token.out = reinterpret_cast<float*>(at(call_.out, head, t));
        for (std::size_t which = 0; which < call_.extra.size(); ++which) {
          const fovea::Tensor<const float>& extra = call_.extra[which];
          token.extra[which] = &extra(0, head, extra.extent[2] == 1 ? 0 : t, 0);
        }
        mechanism_.scalar(token);
      }
    }
  }

  RecurrentMechanism mechanism_;
  RecurrentRow row_;
  StateBlocks blocks_;
  RecurrentCall<float> call_;
  std::span<float> states_;
  index_t copies_ = 1, at_ = 0;
  std::vector<HeadStates> initial_;
  Answer own_answer_;
  fovea::Status status_;
};

}   // namespace

Row make_row(const RecurrentMechanism& mechanism, const RecurrentRow& recurrent) {
  Row row;
  row.name = problem_name(mechanism.name, recurrent) + "/t" + std::to_string(recurrent.threads) + "/" + impl_name(recurrent);
  row.suites = kRecurrent;
  row.threads = recurrent.threads;
  const index_t dim_k = recurrent.dim_k, dim_v = recurrent.dim_v, heads = recurrent.heads, tokens = recurrent.len;
  const auto flops_of_token = recurrent.decode ? decode_flops : prefill_flops;
  row.flops = flops_of_token(mechanism.work, dim_k, dim_v) * static_cast<double>(tokens * heads);
  if (recurrent.decode) {
    row.bytes = 8. * static_cast<double>(StateBlocks(mechanism, recurrent).block_floats);
  } else {
    index_t extra_bytes = 0;
    for (const ExtraInput& extra : mechanism.extra) {
      if (extra.per_token) extra_bytes += 4 * heads * (extra.width == ExtraInput::kDimK ? dim_k : extra.width);
    }
    const index_t number = fovea::row_bytes(recurrent.format, 1);
    row.bytes = static_cast<double>(tokens * (number * (2 * recurrent.qk_heads * dim_k + 2 * heads * dim_v) + extra_bytes));
  }
  row.memory = recurrent.streamed ? Memory::streamed : Memory::cached;
  row.bf16_limit = recurrent.format == Format::bf16;
  row.input_floats = static_cast<std::size_t>(PreparedRecurrent::input_floats(recurrent));
  row.output_floats = static_cast<std::size_t>(heads * tokens * dim_v * fovea::row_bytes(recurrent.format, 1) + 3) / 4;
  row.prepare = [mechanism, recurrent](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
    return std::make_unique<PreparedRecurrent>(mechanism, recurrent, memory);
  };
  return row;
}

RecurrentTable::RecurrentTable(const RecurrentMechanism& mechanism, const RecurrentShapes& shapes, int max_threads)
    : mechanism_(mechanism), shapes_(shapes), most_threads_(std::min(2, max_threads)) {}

void RecurrentTable::add_prefill() {
  RecurrentRow row = with_heads(shapes_.qk_heads, shapes_.heads);
  Group& group = add_group(row);
  add_threads(group, row, most_threads_);
  row.format = Format::bf16;
  add_threads(group, row, shapes_.bf16_on_two_threads ? most_threads_ : 1);
  row.panels = fovea::Panels::bf16;
  if (shapes_.bf16_on_two_threads && fovea::tile_products_allowed()) add_threads(group, row, most_threads_);
  row.panels = fovea::Panels::f32;
  row.format = Format::f32;
  row.token_major = true;
  if (shapes_.token_major) add_threads(group, row, 1);
}

void RecurrentTable::add_streamed_decode() {
  RecurrentRow row = with_heads(shapes_.qk_heads, shapes_.heads);
  row.decode = row.streamed = true;
  row.len = 1;
  Group& group = add_group(row);
  group.window = 0.03;
  const auto floats = static_cast<std::size_t>(StateBlocks(mechanism_, row).block_floats);
  for (int threads = 1; threads <= most_threads_; ++threads) {
    const std::string name = problem_name(mechanism_.name, row) + "/t" + std::to_string(threads) + "/probe";
    group.rows.push_back(update_probe_row(name, kRecurrent, floats, threads));
  }
  for (const fovea::StateLayout layout : layouts()) {
    row.layout = layout;
    add_threads(group, row, most_threads_);
  }
}

void RecurrentTable::add_cached_decode() {
  for (const index_t heads : {1, 4}) {
    RecurrentRow row = with_heads(heads, heads);
    row.decode = true;
    row.len = 1;
    Group& group = add_group(row);
    group.window = 0.005;
    for (const fovea::StateLayout layout : layouts()) {
      row.layout = layout;
      add_threads(group, row, 1);
    }
    if (heads == 1) add_scalar(group, row);
  }
}

void RecurrentTable::add_short() {
  for (const index_t len : {2, 3, 4, 6, 8, 12, 16, 64, 1024}) {
    RecurrentRow row = with_heads(1, 1);
    row.decode = len < 1024;
    row.len = len;
    Group& group = add_group(row);
    group.window = 0.005;
    add_threads(group, row, 1);
    add_scalar(group, row);
    if (len == 1024 && shapes_.longest) add_longest(group, row);
    if (!shapes_.forms) continue;
    for (const fovea::RecurrentForm form : {fovea::RecurrentForm::step, fovea::RecurrentForm::fused}) {
      row.form = form;
      add_threads(group, row, 1);
    }
    row.form = fovea::RecurrentForm::chunked;
    for (const index_t chunk : {16, 32, 64, 128}) {
      row.chunk = chunk;
      if (chunk <= std::max<index_t>(len, 16)) add_threads(group, row, 1);
    }
  }
}

RecurrentRow RecurrentTable::with_heads(index_t qk_heads, index_t heads) const {
  RecurrentRow row;
  row.dim_k = shapes_.dim_k;
  row.dim_v = shapes_.dim_v;
  row.qk_heads = qk_heads;
  row.heads = heads;
  return row;
}

std::vector<fovea::StateLayout> RecurrentTable::layouts() const {
  if (!shapes_.v_first) return {fovea::StateLayout::k_first};
  return {fovea::StateLayout::k_first, fovea::StateLayout::v_first};
}

Group& RecurrentTable::add_group(const RecurrentRow& row) {
  groups_.emplace_back();
  groups_.back().title = problem_name(mechanism_.name, row);
  return groups_.back();
}

void RecurrentTable::add_threads(Group& group, RecurrentRow row, int most) const {
  for (int threads = 1; threads <= most; ++threads) {
    row.threads = threads;
    group.rows.push_back(make_row(mechanism_, row));
  }
}

void RecurrentTable::add_scalar(Group& group, RecurrentRow row) const {
  row.layout = fovea::StateLayout::k_first;
  row.scalar = true;
  group.rows.push_back(make_row(mechanism_, row));
}

void RecurrentTable::add_longest(Group& group, RecurrentRow row) const {
  group.slow = true;
  for (const index_t len : {1 << 14, 1 << 18, 1 << 20}) {
    row.len = len;
    add_threads(group, row, 1);
  }
}

std::vector<Group> recurrent_groups(const RecurrentMechanism& mechanism, const RecurrentShapes& shapes, int max_threads) {
  RecurrentTable table(mechanism, shapes, max_threads);
  table.add_prefill();
  table.add_streamed_decode();
  table.add_cached_decode();
  table.add_short();
  return table.take();
}

}   // namespace fovea_bench
