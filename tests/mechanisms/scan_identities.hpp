// SPDX-License-Identifier: Apache-2.0
// What holds for every elementwise scan, whatever its cells are: the double reference, splits, packed sequences, lanes,
// storage, strides, memory that is not theirs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/core/convert.hpp"
#include "fovea/core/kv.hpp"
#include "fovea/core/recurrent.hpp"
#include "fovea/core/status.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace test {

using fovea::Operand;
using fovea::RecurrentOptions;
using fovea::Result;
using fovea::Status;
using fovea::Tensor;
using fovea::View;

// Owned numbers of four axes.
template <class T>
struct Axes4 {
  std::array<index_t, 4> extent{};
  std::vector<T> data;

  Axes4() = default;
  explicit Axes4(std::array<index_t, 4> shape, T value = T())
      : extent(shape), data(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]), value) {}
  template <class F>
  static Axes4 of(std::array<index_t, 4> shape, F&& f) {   // f(a, b, c, d)
    Axes4 x(shape);
    for (index_t a = 0; a < shape[0]; ++a) {
      for (index_t b = 0; b < shape[1]; ++b) {
        for (index_t c = 0; c < shape[2]; ++c) {
          for (index_t d = 0; d < shape[3]; ++d) x.view()(a, b, c, d) = static_cast<T>(f(a, b, c, d));
        }
      }
    }
    return x;
  }
  Tensor<T> view() { return fovea::bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  Tensor<const T> view() const { return fovea::bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  bool operator==(const Axes4& o) const {   // bit for bit, NaN included
    return extent == o.extent && (data.empty() || std::memcmp(data.data(), o.data.data(), data.size() * sizeof(T)) == 0);
  }
};
using Floats = Axes4<float>;
using Doubles = Axes4<double>;

inline Doubles widened(const Floats& x) {
  Doubles wide(x.extent);
  std::copy(x.data.begin(), x.data.end(), wide.data.begin());
  return wide;
}
inline Floats normal_numbers(Random& random, std::array<index_t, 4> shape) {
  return Floats::of(shape, [&](auto...) { return random.normal(); });
}
inline Floats uniform_numbers(Random& random, std::array<index_t, 4> shape, float low, float high) {
  return Floats::of(shape, [&](auto...) { return random.uniform(low, high); });
}
// Positions [begin, end) of batch entry b.
inline Floats cut(const Floats& x, index_t b, index_t begin, index_t end) {
  return Floats::of({1, x.extent[1], end - begin, x.extent[3]},
                    [&](index_t, index_t h, index_t t, index_t d) { return x.view()(b, h, begin + t, d); });
}
inline Floats entry(const Floats& x, index_t n) {   // of the first axis
  return Floats::of({1, x.extent[1], x.extent[2], x.extent[3]},
                    [&](index_t, index_t a, index_t b, index_t c) { return x.view()(n, a, b, c); });
}

// sqrt(sum of squared differences / sum of squares); a NaN on one side only is infinitely far.
inline double relative_rms(const Floats& got, const Doubles& want) {
  double difference = 0, size = 0;
  if (got.extent != want.extent) return HUGE_VAL;
  for (std::size_t n = 0; n < want.data.size(); ++n) {
    const double error = double{got.data[n]} - want.data[n];
    if (std::isnan(error)) return HUGE_VAL;
    difference += error * error;
    size += want.data[n] * want.data[n];
  }
  return difference == 0 ? 0 : std::sqrt(difference / size);
}
inline constexpr double kRecurrentError = 1e-5;   // of fp32 against double, relative RMS

// A tensor of a token as a call takes it: of any format, and as floats where only floats are taken.
struct ScanInput {
  Operand any;
  Tensor<const float> floats;
};
struct ScanCall {
  std::vector<ScanInput> inputs;
  Result out;
  View<const float, 4> initial;
  View<float, 4> final;
  RecurrentOptions<float> options;   // without states
};
struct ScanReference {
  std::vector<Tensor<const double>> inputs;
  Tensor<double> out;
  View<const double, 4> initial;
  View<double, 4> final;
  RecurrentOptions<double> options;
};

struct ScanProblem {
  std::vector<Floats> inputs;   // [batch, head, pos, dim]
  index_t out_heads = 1, channels = 1;
  Floats initial;   // [sequence, ..]
  std::function<Status(const ScanCall&)> run;
  std::function<void(const ScanReference&)> reference;

  index_t batch() const { return inputs[0].extent[0]; }
  index_t len() const { return inputs[0].extent[2]; }
  Floats blank_out() const { return Floats({batch(), out_heads, len(), channels}, canary()); }
};

struct ScanOutcome {
  Floats out, final;
  bool operator==(const ScanOutcome&) const = default;
};

inline std::vector<ScanInput> views_of(const std::vector<Floats>& inputs) {
  std::vector<ScanInput> views;
  for (const Floats& x : inputs) views.push_back({x.view(), x.view()});
  return views;
}

inline ScanOutcome run_scan_problem(const ScanProblem& x, const RecurrentOptions<float>& options = {}) {
  ScanOutcome outcome{x.blank_out(), Floats(x.initial.extent, canary())};
  const Status status = x.run({views_of(x.inputs), outcome.out.view(), x.initial.view(), outcome.final.view(), options});
  INFO(status.message());
  REQUIRE(status.ok());
  return outcome;
}

inline void check_against_reference(const ScanProblem& x) {
  const ScanOutcome got = run_scan_problem(x);
  std::vector<Doubles> inputs;
  for (const Floats& each : x.inputs) inputs.push_back(widened(each));
  const Doubles initial = widened(x.initial);
  Doubles out(got.out.extent), final(got.final.extent);
  ScanReference reference{{}, out.view(), initial.view(), final.view(), {}};
  for (const Doubles& each : inputs) reference.inputs.push_back(each.view());
  x.reference(reference);
  CHECK(relative_rms(got.out, out) <= kRecurrentError);
  CHECK(relative_rms(got.final, final) <= kRecurrentError);
}

// From and to one memory, and a sequence split in two at any point: the bits of the whole.
inline void check_splits(const ScanProblem& x) {
  const ScanOutcome whole = run_scan_problem(x);
  const index_t len = x.len();
  for (const index_t at : {index_t{0}, index_t{1}, len / 2, len - 1, len}) {
    INFO("split at " << at << " of " << len);
    ScanProblem part = x;
    Floats state = x.initial;
    std::vector<Floats> outs;
    for (const auto& [begin, end] : {std::pair{index_t{0}, at}, std::pair{at, len}}) {
      for (std::size_t n = 0; n < x.inputs.size(); ++n) part.inputs[n] = cut(x.inputs[n], 0, begin, end);
      outs.push_back(part.blank_out());
      const Status status = part.run({views_of(part.inputs), outs.back().view(), state.view(), state.view(), {}});
      INFO(status.message());
      REQUIRE(status.ok());
    }
    CHECK(outs[0] == cut(whole.out, 0, 0, at));
    CHECK(outs[1] == cut(whole.out, 0, at, len));
    CHECK(state == whole.final);
  }
}

// `x` has batch 1 and as many initial states as there are sequences.
inline void check_ragged(const ScanProblem& x, const std::vector<index_t>& cu_len) {
  const ScanOutcome packed = run_scan_problem(x, {.cu_len = cu_len});
  for (std::size_t n = 0; n + 1 < cu_len.size(); ++n) {
    INFO("sequence " << n);
    ScanProblem alone = x;
    for (Floats& each : alone.inputs) each = cut(each, 0, cu_len[n], cu_len[n + 1]);
    alone.initial = entry(x.initial, static_cast<index_t>(n));
    const ScanOutcome single = run_scan_problem(alone);
    CHECK(single.out == cut(packed.out, 0, cu_len[n], cu_len[n + 1]));
    CHECK(single.final == entry(packed.final, static_cast<index_t>(n)));
    if (cu_len[n] == cu_len[n + 1]) CHECK(single.final == alone.initial);
  }
  for (index_t h = 0; h < x.out_heads; ++h) {
    for (index_t t = cu_len.back(); t < x.len(); ++t) CHECK(is_canary(packed.out.view()(0, h, t, 0)));
  }
}

inline void check_lanes(const ScanProblem& x) {
  const ScanOutcome serial = run_scan_problem(x);
  ThreadPerLane threads;
  Reversed reversed;
  CHECK(run_scan_problem(x, {.executor = {threads, 3}}) == serial);
  CHECK(run_scan_problem(x, {.executor = {reversed, 3}}) == serial);
}

// A workspace of exactly the bytes, poisoned and with guards, badly aligned; one byte less is refused.
inline void check_workspace_bytes(const ScanProblem& x, const std::function<std::size_t(int)>& bytes) {
  const ScanOutcome own = run_scan_problem(x);
  InOrder pool;
  for (const int lanes : {1, 3}) {
    PoisonedBytes workspace(bytes(lanes), 7);
    CHECK(run_scan_problem(x, {.executor = {pool, lanes}, .workspace = workspace.bytes()}) == own);
    CHECK(workspace.guards_intact());
    Floats out = x.blank_out(), final(x.initial.extent, canary());
    const Floats out_before = out, final_before = final;
    const Status status = x.run({views_of(x.inputs),
                                 out.view(),
                                 x.initial.view(),
                                 final.view(),
                                 {.executor = {pool, lanes}, .workspace = workspace.bytes().first(bytes(lanes) - 1)}});
    CHECK(status.code() == fovea::Code::workspace_too_small);
    CHECK(out == out_before);
    CHECK(final == final_before);
  }
}

// Inputs and output of a storage type give what their floats give, rounded. Of two formats each.
template <class Stored>
void check_storage(const ScanProblem& x) {
  const auto narrow = [](float number) {
    if constexpr (std::is_same_v<Stored, double>) {
      return double{number};
    } else {
      return fovea::convert<Stored>(number);
    }
  };
  const auto wide = [](Stored number) {
    if constexpr (std::is_same_v<Stored, double>) {
      return static_cast<float>(number);
    } else {
      return fovea::convert<float>(number);
    }
  };
  ScanProblem rounded = x;
  std::vector<Axes4<Stored>> stored;
  for (Floats& each : rounded.inputs) {
    Axes4<Stored> narrowed(each.extent);
    for (std::size_t n = 0; n < each.data.size(); ++n) narrowed.data[n] = narrow(each.data[n]);
    stored.push_back(std::move(narrowed));
  }
  ScanCall call{views_of(rounded.inputs), {}, x.initial.view(), {}, {}};
  for (std::size_t n = 0; n < stored.size(); ++n) {
    call.inputs[n].any = std::as_const(stored[n]).view();
    if (call.inputs[n].floats.data != nullptr)
      for (std::size_t i = 0; i < stored[n].data.size(); ++i) rounded.inputs[n].data[i] = wide(stored[n].data[i]);
  }
  const ScanOutcome want = run_scan_problem(rounded);
  Axes4<Stored> out(want.out.extent);
  Floats final(want.final.extent, canary());
  call.out = out.view();
  call.final = final.view();
  const Status status = x.run(call);
  INFO(status.message());
  REQUIRE(status.ok());
  CHECK(final == want.final);
  Axes4<Stored> want_out(want.out.extent);
  for (std::size_t n = 0; n < want_out.data.size(); ++n) want_out.data[n] = narrow(want.out.data[n]);
  CHECK(out == want_out);
}

// Every number of every tensor `step` apart in poisoned memory, rows with room behind them.
inline void check_strides(const ScanProblem& x, index_t step) {
  const ScanOutcome want = run_scan_problem(x);
  const auto place = [&](const Floats& from, Poisoned& memory) {
    const auto& e = from.extent;
    const index_t row = (e[3] + 3) * step;
    memory = Poisoned(e[0] * e[1] * e[2] * row);
    // Token-major, heads inside.
    const Tensor<float> view{memory.data(), e, {e[2] * e[1] * row, row, e[1] * row, step}};
    for (index_t a = 0; a < e[0]; ++a) {
      for (index_t b = 0; b < e[1]; ++b) {
        for (index_t c = 0; c < e[2]; ++c) {
          for (index_t d = 0; d < e[3]; ++d) view(a, b, c, d) = from.view()(a, b, c, d);
        }
      }
    }
    return view;
  };
  std::vector<Poisoned> memories(x.inputs.size());
  ScanCall call{};
  for (std::size_t n = 0; n < x.inputs.size(); ++n) {
    const Tensor<const float> view = place(x.inputs[n], memories[n]);
    call.inputs.push_back({view, view});
  }
  Poisoned out_memory, initial_memory, final_memory;
  const Tensor<float> out = place(x.blank_out(), out_memory), initial = place(x.initial, initial_memory),
                      final = place(Floats(x.initial.extent, canary()), final_memory);
  call.out = out;
  call.initial = initial;
  call.final = final;
  const Status status = x.run(call);
  INFO(status.message());
  REQUIRE(status.ok());
  const auto gathered = [](const Tensor<float>& view) {
    return Floats::of(view.extent, [&](auto... at) { return view(at...); });
  };
  CHECK(gathered(out) == want.out);
  CHECK(gathered(final) == want.final);
  CHECK(first_overwritten(out_memory, {out}) == -1);
  CHECK(first_overwritten(final_memory, {final}) == -1);
}

// A NaN or an infinity in one channel of one sequence stays there.
inline void check_poisoned_channel(const ScanProblem& x, std::size_t input, index_t channel) {
  const ScanOutcome clean = run_scan_problem(x);
  for (const float poison : {canary(), std::numeric_limits<float>::infinity()}) {
    ScanProblem bad = x;
    bad.inputs[input].view()(0, 0, x.len() / 2, channel) = poison;
    const ScanOutcome got = run_scan_problem(bad);
    bool spread = false;
    for (index_t b = 0; b < x.batch(); ++b) {
      for (index_t h = 0; h < x.out_heads; ++h) {
        for (index_t t = 0; t < x.len(); ++t) {
          for (index_t c = 0; c < x.channels; ++c) {
            if (b == 0 && h == 0 && c == channel && t >= x.len() / 2) continue;
            spread = spread || got.out.view()(b, h, t, c) != clean.out.view()(b, h, t, c);
          }
        }
      }
    }
    CHECK_FALSE(spread);
  }
}

// A call that is refused says why and leaves its outputs as they are.
inline void check_refused(const ScanProblem& x, const char* word, const std::function<void(ScanCall&)>& spoil) {
  Floats out = x.blank_out(), final(x.initial.extent, canary());
  const Floats out_before = out, final_before = final;
  ScanCall call{views_of(x.inputs), out.view(), x.initial.view(), final.view(), {}};
  spoil(call);
  const Status status = x.run(call);
  INFO(word << ": " << status.message());
  CHECK_FALSE(status.ok());
  CHECK(std::string(status.message()).find(word) != std::string::npos);
  CHECK(out == out_before);
  CHECK(final == final_before);
}

}   // namespace test
