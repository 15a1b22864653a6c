// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/short_conv.hpp"

#include <cmath>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/reference/short_conv.hpp"
#include "reference/recurrent_golden.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"
#include "support/tolerance.hpp"

namespace {

using fovea::index_t;
using fovea::RecurrentOptions;
using fovea::ShortConvParameters;
using fovea::Tensor;
using fovea::View;

std::vector<double> doubles_of(const std::vector<float>& x) { return {x.begin(), x.end()}; }

struct Problem {
  index_t batch, len, channels, width;
  std::vector<float> x, weight, bias;

  Problem(index_t batch_, index_t len_, index_t channels_, index_t width_, std::uint64_t seed)
      : batch(batch_), len(len_), channels(channels_), width(width_) {
    test::Random random(seed);
    const auto fill = [&](std::vector<float>& to, index_t count, float size) {
      for (index_t n = 0; n < count; ++n) to.push_back(random.uniform(-size, size));
    };
    fill(x, batch * len * channels, 2);
    fill(weight, channels * width, 1);
    fill(bias, channels, 1);
  }
  template <class T>
  Tensor<T> rows(T* data) const {
    return fovea::bhsd(data, batch, 1, len, channels);
  }
  template <class T>
  View<T, 2> taps(T* data) const {
    return {data, {channels, width}, {width, 1}};
  }
  ShortConvParameters<float> parameters(bool silu = true) const {
    return {.weight = taps(weight.data()), .bias = bias, .silu = silu};
  }
};

template <class T>
View<T, 3> state_view(T* data, index_t sequences, index_t channels, index_t kept) {
  return {data, {sequences, channels, kept}, {channels * kept, kept, 1}};
}

// The error of an output: the sum of width products, whose size is at most `magnitude`, is off by width + 2 roundings; SiLU
// has a slope of at most 1.1 and a relative error of (12 + 2 |y|) of its own.
double budget(double sum, double magnitude, double width, bool silu) {
  const double of_sum = (width + 2) * test::kUnit * magnitude;
  return silu ? 1.1 * of_sum + (12 + 2 * std::abs(sum)) * test::kUnit * std::abs(sum) : of_sum;
}

// Worst error of y in budgets, against the reference; `rounded` is the relative error of how y is stored.
double worst_error(const Problem& p, const std::vector<double>& x, const std::vector<float>& initial, index_t kept,
                   const std::vector<index_t>& cu, bool silu, bool with_bias, const std::vector<double>& y,
                   double rounded = 0) {
  const std::vector<double> weight = doubles_of(p.weight), bias = doubles_of(p.bias), state = doubles_of(initial);
  const index_t sequences = cu.empty() ? p.batch : static_cast<index_t>(cu.size()) - 1;
  std::vector<double> exact(y.size(), 0.), sums(exact), sizes(exact), absolute(x), absolute_weight(weight),
      absolute_bias(bias), absolute_state(state);
  for (std::vector<double>* numbers : {&absolute, &absolute_weight, &absolute_bias, &absolute_state}) {
    for (double& number : *numbers) number = std::abs(number);
  }
  const auto run = [&](const std::vector<double>& inputs, const std::vector<double>& taps, const std::vector<double>& shift,
                       const std::vector<double>& before, bool activate, std::vector<double>& to) {
    ShortConvParameters<double> parameters{.weight = p.taps(taps.data()), .silu = activate};
    if (with_bias) parameters.bias = shift;
    if (!before.empty()) parameters.initial_state = state_view(before.data(), sequences, p.channels, kept);
    fovea::reference::short_conv(p.rows(inputs.data()), parameters, p.rows(to.data()), {.cu_len = cu});
  };
  run(x, weight, bias, state, silu, exact);
  run(x, weight, bias, state, false, sums);
  run(absolute, absolute_weight, absolute_bias, absolute_state, false, sizes);
  double worst = 0;
  for (std::size_t n = 0; n < y.size(); ++n) {
    const double allowed =
        budget(sums[n], sizes[n], static_cast<double>(p.width), silu) + rounded * std::abs(exact[n]) + 1e-30;
    worst = std::max(worst, test::in_budgets(y[n], exact[n], allowed));
  }
  return worst;
}

std::vector<float> convolve(const Problem& p, const ShortConvParameters<float>& parameters,
                            const RecurrentOptions<float>& options = {}) {
  std::vector<float> y(p.x.size(), test::canary());
  const fovea::Status status = fovea::short_conv(p.rows(p.x.data()), parameters, p.rows(y.data()), options);
  INFO(status.message());
  REQUIRE(status.ok());
  return y;
}

}   // namespace

TEST_CASE("short_conv against the reference: widths, channels, lengths, bias, activation", "[recurrent][short_conv]") {
  std::uint64_t seed = 1;
  for (const index_t width : {1, 2, 3, 4, 5, 9}) {
    for (const auto& [batch, len, channels] :
         {std::array<index_t, 3>{1, 1, 3}, {2, 7, 17}, {1, 21, 64}, {1, 9, 300}, {3, 8, 1}, {1, 2, 513}}) {
      const Problem p(batch, len, channels, width, seed++);
      for (const bool silu : {false, true}) {
        for (const bool with_bias : {false, true}) {
          ShortConvParameters<float> parameters = p.parameters(silu);
          if (!with_bias) parameters.bias = {};
          const std::vector<float> y = convolve(p, parameters);
          CAPTURE(width, batch, len, channels, silu, with_bias);
          CHECK(worst_error(p, doubles_of(p.x), {}, 0, {}, silu, with_bias, doubles_of(y)) <= 1);
        }
      }
    }
  }
}

TEST_CASE("short_conv meets the golden values", "[recurrent][short_conv]") {
  const index_t len = test::kGoldenLen, channels = test::kGoldenDimV;
  std::vector<float> x, y(static_cast<std::size_t>(len * channels));
  for (index_t t = 0; t < len; ++t) {
    for (index_t j = 0; j < channels; ++j) x.push_back(static_cast<float>(test::golden_v(double(t), double(j))));
  }
  const float taps[] = {0.1f, 0.2f, 0.3f, 0.4f};
  const ShortConvParameters<float> parameters{.weight = {taps, {channels, 4}, {0, 1}}};   // one kernel for all channels
  REQUIRE(fovea::short_conv(fovea::bhsd<const float>(x.data(), 1, 1, len, channels), parameters,
                            fovea::bhsd(y.data(), 1, 1, len, channels))
              .ok());
  const auto& golden = test::kRecurrentGoldens[std::size(test::kRecurrentGoldens) - 1];
  REQUIRE(golden.name == std::string("short_conv"));
  double squares = 0;
  for (const float value : y) squares += double{value} * double{value};
  CHECK(squares == Catch::Approx(golden.out_squares).epsilon(1e-5));
  for (std::size_t j = 0; j < 3; ++j)
    CHECK(y[static_cast<std::size_t>((len - 1) * channels) + j] == Catch::Approx(golden.last[j]).epsilon(1e-5));
}

TEST_CASE("short_conv is linear and shift invariant without its activation", "[recurrent][short_conv]") {
  // An impulse gives the kernel back, newest tap first; powers of two keep every product exact.
  const index_t len = 9, channels = 21, width = 4;
  const Problem p(1, len, channels, width, 77);
  std::vector<float> x(static_cast<std::size_t>(len * channels), 0.f), y(x);
  for (index_t c = 0; c < channels; ++c) x[static_cast<std::size_t>(2 * channels + c)] = 2.f;
  ShortConvParameters<float> parameters = p.parameters(false);
  parameters.bias = {};
  REQUIRE(fovea::short_conv(p.rows<const float>(x.data()), parameters, p.rows(y.data())).ok());
  for (index_t t = 0; t < len; ++t) {
    for (index_t c = 0; c < channels; ++c) {
      const index_t tap = width - 1 - (t - 2);
      const float wanted = tap >= 0 && tap < width ? 2 * parameters.weight(c, tap) : 0.f;
      CHECK(y[static_cast<std::size_t>(t * channels + c)] == wanted);
    }
  }
}

TEST_CASE("short_conv: a split anywhere, token by token, more inputs kept than needed: the same bits",
          "[recurrent][short_conv]") {
  for (const index_t width : {1, 2, 4, 7}) {
    const Problem p(2, 11, 37, width, 5);
    const std::vector<float> whole = convolve(p, p.parameters());
    for (const index_t kept : {width - 1, width, width + 3}) {
      if (kept == 0) continue;
      for (const index_t step : {1, 2, 3, 5, 11}) {
        std::vector<float> state(static_cast<std::size_t>(2 * p.channels * kept), 0.f), y(p.x.size(), test::canary());
        ShortConvParameters<float> parameters = p.parameters();
        parameters.final_state = state_view(state.data(), 2, p.channels, kept);
        parameters.initial_state = parameters.final_state;   // in place
        for (index_t t = 0; t < p.len; t += step) {
          Tensor<const float> x = p.rows(p.x.data());
          Tensor<float> out = p.rows(y.data());
          x.data += t * p.channels;
          out.data += t * p.channels;
          x.extent[2] = out.extent[2] = std::min(step, p.len - t);
          REQUIRE(fovea::short_conv(x, parameters, out).ok());
        }
        CAPTURE(width, kept, step);
        CHECK(y == whole);
        bool newest = true;
        for (index_t b = 0; b < 2; ++b) {
          for (index_t c = 0; c < p.channels; ++c) {
            for (index_t n = 0; n < kept; ++n) {
              const index_t t = p.len - kept + n;
              const float input = t < 0 ? 0.f : p.rows(p.x.data())(b, 0, t, c);
              newest = newest && parameters.final_state(b, c, n) == input;
            }
          }
        }
        CHECK(newest);
      }
    }
  }
}

TEST_CASE("short_conv: ragged members are separate calls, empty ones hand their state on", "[recurrent][short_conv]") {
  const index_t width = 4, kept = 4;
  const Problem p(1, 15, 40, width, 6);
  const std::vector<index_t> cu{0, 0, 6, 7, 7, 14};   // the last token belongs to nobody
  const index_t members = 5;
  test::Random random(8);
  std::vector<float> initial, final(static_cast<std::size_t>(members * p.channels * kept), test::canary());
  for (std::size_t n = 0; n < final.size(); ++n) initial.push_back(random.uniform(-1, 1));
  ShortConvParameters<float> parameters = p.parameters();
  parameters.initial_state = state_view<const float>(initial.data(), members, p.channels, kept);
  parameters.final_state = state_view(final.data(), members, p.channels, kept);
  const std::vector<float> y = convolve(p, parameters, {.cu_len = cu});
  const std::size_t owned = static_cast<std::size_t>(14 * p.channels);
  for (std::size_t n = owned; n < y.size(); ++n) CHECK(test::is_canary(y[n]));

  for (index_t n = 0; n < members; ++n) {
    const index_t begin = cu[static_cast<std::size_t>(n)], count = cu[static_cast<std::size_t>(n) + 1] - begin;
    std::vector<float> alone(static_cast<std::size_t>(count * p.channels)),
        state(static_cast<std::size_t>(p.channels * kept));
    ShortConvParameters<float> one = p.parameters();
    one.initial_state = state_view<const float>(initial.data() + n * p.channels * kept, 1, p.channels, kept);
    one.final_state = state_view(state.data(), 1, p.channels, kept);
    const Tensor<const float> x = fovea::bhsd(p.x.data() + begin * p.channels, 1, 1, count, p.channels);
    REQUIRE(fovea::short_conv(x, one, fovea::bhsd(alone.data(), 1, 1, count, p.channels)).ok());
    CHECK(std::equal(alone.begin(), alone.end(), y.begin() + begin * p.channels));
    CHECK(std::equal(state.begin(), state.end(), final.begin() + n * p.channels * kept));
    if (count == 0) CHECK(std::equal(state.begin(), state.end(), initial.begin() + n * p.channels * kept));
  }
  Problem exact = p;
  exact.len = 14;
  exact.x.resize(owned);
  const std::vector<float> written(y.begin(), y.begin() + static_cast<std::ptrdiff_t>(owned));
  CHECK(worst_error(exact, doubles_of(exact.x), initial, kept, cu, true, true, doubles_of(written)) <= 1);
}

TEST_CASE("short_conv: lanes, in place, strides and workspace leave the bits alone", "[recurrent][short_conv]") {
  const Problem p(2, 19, 1100, 4, 9);   // two blocks of channels on three lanes
  const std::vector<float> plain = convolve(p, p.parameters());
  test::ThreadPerLane pool;
  CHECK(convolve(p, p.parameters(), {.executor = fovea::Executor(pool, 3)}) == plain);

  std::vector<float> both = p.x;
  REQUIRE(fovea::short_conv(p.rows<const float>(both.data()), p.parameters(), p.rows(both.data())).ok());
  CHECK(both == plain);

  test::PoisonedBytes workspace(fovea::short_conv_bytes(p.channels, 4, 3), 5);
  CHECK(convolve(p, p.parameters(), {.executor = fovea::Executor(pool, 3), .workspace = workspace.bytes()}) == plain);
  CHECK(workspace.guards_intact());

  // Channels not next to each other, taps and states with their channels next to each other, NaN between the rows.
  const index_t room = 2 * p.channels + 3;
  test::Poisoned x_rows(p.batch * p.len * room), y_rows(p.batch * p.len * room);
  const Tensor<float> x{x_rows.data(), {p.batch, 1, p.len, p.channels}, {p.len * room, 0, room, 2}};
  const Tensor<float> y{y_rows.data(), x.extent, x.stride};
  for (index_t b = 0; b < p.batch; ++b) {
    for (index_t t = 0; t < p.len; ++t) {
      for (index_t c = 0; c < p.channels; ++c) x(b, 0, t, c) = p.rows(p.x.data())(b, 0, t, c);
    }
  }
  std::vector<float> taps(p.weight.size()), state(static_cast<std::size_t>(2 * 3 * p.channels), test::canary());
  for (index_t c = 0; c < p.channels; ++c) {
    for (index_t j = 0; j < 4; ++j) taps[static_cast<std::size_t>(j * p.channels + c)] = p.taps(p.weight.data())(c, j);
  }
  ShortConvParameters<float> parameters = p.parameters();
  parameters.weight = {taps.data(), {p.channels, 4}, {1, p.channels}};
  parameters.final_state = {state.data(), {2, p.channels, 3}, {3 * p.channels, 1, p.channels}};
  REQUIRE(fovea::short_conv(x, parameters, y).ok());
  CHECK(test::first_overwritten<4>(y_rows, {y}) == -1);
  bool same = true;
  for (index_t b = 0; b < p.batch; ++b) {
    for (index_t t = 0; t < p.len; ++t) {
      for (index_t c = 0; c < p.channels; ++c) same = same && y(b, 0, t, c) == p.rows(plain.data())(b, 0, t, c);
    }
    for (index_t n = 0; n < 3; ++n) {
      for (index_t c = 0; c < p.channels; ++c)
        same = same && parameters.final_state(b, c, n) == p.rows(p.x.data())(b, 0, p.len - 3 + n, c);
    }
  }
  CHECK(same);
}

TEMPLATE_TEST_CASE("short_conv: stored types", "[recurrent][short_conv]", fovea::bf16, fovea::f16, double) {
  const Problem p(2, 10, 75, 4, 10);
  std::vector<TestType> stored, y(p.x.size());
  std::vector<double> exact, got;
  for (const float x : p.x) {
    if constexpr (std::is_same_v<TestType, double>) {
      stored.push_back(double{x});
      exact.push_back(double{x});
    } else {
      stored.push_back(fovea::convert<TestType>(x));
      exact.push_back(double{fovea::convert<float>(stored.back())});
    }
  }
  REQUIRE(fovea::short_conv(p.rows<const TestType>(stored.data()), p.parameters(), p.rows(y.data())).ok());
  for (const TestType number : y) {
    if constexpr (std::is_same_v<TestType, double>) {
      got.push_back(number);
    } else {
      got.push_back(double{fovea::convert<float>(number)});
    }
  }
  // Half a unit in the last place of 8 or 11 bits; f16's denormals below 6e-5 are at most 3e-8 off.
  const double rounded = std::is_same_v<TestType, fovea::bf16> ? 0x1p-8 : std::is_same_v<TestType, fovea::f16> ? 0x1p-10 : 0;
  CHECK(worst_error(p, exact, {}, 0, {}, true, true, got, rounded) <= 1);
}

TEST_CASE("short_conv: refusals name their numbers and write nothing", "[recurrent][short_conv][errors]") {
  using Catch::Matchers::ContainsSubstring;
  const Problem p(1, 6, 8, 4, 11);
  std::vector<float> y(p.x.size(), test::canary()), state(static_cast<std::size_t>(3 * p.channels), test::canary());
  const auto refused = [&](const auto& change) {
    Tensor<const float> x = p.rows(p.x.data());
    Tensor<float> out = p.rows(y.data());
    ShortConvParameters<float> parameters = p.parameters();
    parameters.final_state = state_view(state.data(), 1, p.channels, 3);
    RecurrentOptions<float> options;
    change(x, parameters, out, options);
    const fovea::Status status = fovea::short_conv(x, parameters, out, options);
    CHECK(!status.ok());
    for (const float number : y) CHECK(test::is_canary(number));
    for (const float number : state) CHECK(test::is_canary(number));
    return std::string(status.message());
  };
  CHECK_THAT(refused([](auto& x, auto&, auto&, auto&) { x.extent[1] = 2; }), ContainsSubstring("x is [1, 2, 6, 8]"));
  CHECK_THAT(refused([](auto& x, auto&, auto&, auto&) { x.data = nullptr; }), ContainsSubstring("x has null data"));
  CHECK_THAT(refused([](auto&, auto&, auto& y_, auto&) { y_.extent[2] = 5; }), ContainsSubstring("y is [1, 1, 5, 8]"));
  CHECK_THAT(refused([](auto& x, auto& p_, auto& y_, auto&) {
               x.extent[0] = y_.extent[0] = index_t{1} << 40;
               x.extent[2] = y_.extent[2] = 0;
               p_.final_state = {};
             }),
             ContainsSubstring("states are supported"));
  CHECK_THAT(refused([](auto&, auto& p_, auto&, auto&) { p_.weight.extent[0] = 7; }), ContainsSubstring("weight is [7, 4]"));
  CHECK_THAT(refused([](auto&, auto& p_, auto&, auto&) { p_.weight.extent[1] = 0; }), ContainsSubstring("weight is [8, 0]"));
  CHECK_THAT(refused([](auto&, auto& p_, auto&, auto&) { p_.bias = p_.bias.first(5); }),
             ContainsSubstring("bias has 5 numbers"));
  CHECK_THAT(refused([](auto&, auto& p_, auto&, auto&) { p_.final_state.extent[2] = 2; }),
             ContainsSubstring("final_state keeps 2 inputs, a width of 4 needs 3"));
  CHECK_THAT(refused([](auto&, auto& p_, auto&, auto&) { p_.final_state.extent[1] = 7; }),
             ContainsSubstring("final_state has extent 7 on axis 1, must be 8"));
  CHECK_THAT(refused([](auto& x, auto&, auto& y_, auto&) { x.data = y_.data + 1; }), ContainsSubstring("y [0x"));
  CHECK_THAT(refused([](auto&, auto& p_, auto& y_, auto&) { p_.final_state.data = y_.data; }),
             ContainsSubstring("overlaps"));
  CHECK_THAT(refused([](auto&, auto& p_, auto&, auto&) {
               p_.initial_state = p_.final_state;
               p_.initial_state.stride = {24, 1, 8};
             }),
             ContainsSubstring("final_state [0x"));
  CHECK_THAT(refused([](auto&, auto& p_, auto&, auto& options) {
               static const float other[4] = {};
               options.initial_state = {other, {1, 1, 2, 2}, {4, 4, 2, 1}};
               static_cast<void>(p_);
             }),
             ContainsSubstring("ShortConvParameters"));
  static const index_t cu[] = {0, 7};
  CHECK_THAT(refused([](auto&, auto&, auto&, auto& options) { options.cu_len = cu; }),
             ContainsSubstring("cu_len ends at 7, the tensor has 6"));
  std::vector<std::byte> small(16);
  CHECK_THAT(refused([&](auto&, auto&, auto&, auto& options) { options.workspace = small; }),
             ContainsSubstring("workspace has 16 bytes"));
}

TEST_CASE("short_conv: a closed activation is 0, a NaN stays in its channel and its reach", "[recurrent][short_conv]") {
  const index_t len = 8, channels = 19;
  Problem p(1, len, channels, 4, 12);
  const std::vector<float> clean = convolve(p, p.parameters());
  p.x[static_cast<std::size_t>(2 * channels + 5)] = test::canary();
  const std::vector<float> y = convolve(p, p.parameters());
  for (index_t t = 0; t < len; ++t) {
    for (index_t c = 0; c < channels; ++c) {
      const auto n = static_cast<std::size_t>(t * channels + c);
      if (c == 5 && t >= 2 && t <= 5) {
        CHECK(std::isnan(y[n]));
      } else {
        CHECK(y[n] == clean[n]);
      }
    }
  }
  const float x[] = {-200.f, 200.f, 0.f}, one[] = {1.f};
  float out[3];
  const ShortConvParameters<float> copy{.weight = {one, {3, 1}, {0, 0}}};
  REQUIRE(fovea::short_conv(fovea::bhsd<const float>(x, 1, 1, 1, 3), copy, fovea::bhsd<float>(out, 1, 1, 1, 3)).ok());
  CHECK(out[0] == 0.f);
  CHECK(out[1] == 200.f);
  CHECK(out[2] == 0.f);
}

TEST_CASE("short_conv without tokens: the state goes on, or zeros", "[recurrent][short_conv]") {
  const index_t channels = 5;
  const float taps[4] = {};
  float state[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, from[15];
  std::copy_n(state, 15, from);
  ShortConvParameters<float> parameters{.weight = {taps, {channels, 4}, {0, 1}}};
  parameters.final_state = state_view(state, 1, channels, 3);
  const Tensor<const float> x{nullptr, {1, 1, 0, channels}, {0, 0, channels, 1}};
  const Tensor<float> y{nullptr, {1, 1, 0, channels}, {0, 0, channels, 1}};
  parameters.initial_state = parameters.final_state;
  REQUIRE(fovea::short_conv(x, parameters, y).ok());
  CHECK(std::equal(state, state + 15, from));
  parameters.initial_state = {};
  REQUIRE(fovea::short_conv(x, parameters, y).ok());
  for (const float number : state) CHECK(number == 0.f);
}
