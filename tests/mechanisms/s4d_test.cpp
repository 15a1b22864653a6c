// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/s4d.hpp"

#include <complex>

#include "fovea/reference/s4d.hpp"
#include "scan_identities.hpp"

using namespace test;
using fovea::S4dParameters;

namespace {

struct Sizes {
  index_t batch = 1, len = 40, channels = 20, modes = 8, sequences = 1;
  float least_log_dt = -7, most_log_dt = -2;   // dt of 0.001 to 0.1, as S4D begins
};

// [channel, mode] numbers of every kind, and [channel] ones.
template <class Real>
struct Numbers {
  Axes4<Real> log_a_real, a_imag, c_real, c_imag, log_dt, d;

  S4dParameters<Real> parameters() const {
    const auto rows = [](const Axes4<Real>& x) {
      return View<const Real, 2>{x.data.data(), {x.extent[2], x.extent[3]}, {x.extent[3], 1}};
    };
    return {rows(log_a_real), rows(a_imag), rows(c_real), rows(c_imag), log_dt.data, d.data};
  }
};
Numbers<double> widened(const Numbers<float>& x) {
  using test::widened;
  return {widened(x.log_a_real), widened(x.a_imag), widened(x.c_real), widened(x.c_imag), widened(x.log_dt), widened(x.d)};
}

Numbers<float> numbers(Random& random, const Sizes& s) {
  const std::array<index_t, 4> modes{1, 1, s.channels, s.modes}, channels{1, 1, 1, s.channels};
  return {uniform_numbers(random, modes, -1.5f, 0),
          Floats::of(modes, [](index_t, index_t, index_t, index_t n) { return 3.14159265 * double(n); }),
          normal_numbers(random, modes),
          normal_numbers(random, modes),
          uniform_numbers(random, channels, s.least_log_dt, s.most_log_dt),
          normal_numbers(random, channels)};
}

ScanProblem problem(std::uint64_t seed, const Sizes& s) {
  Random random(seed);
  ScanProblem p;
  p.inputs = {normal_numbers(random, {s.batch, 1, s.len, s.channels})};
  p.channels = s.channels;
  p.initial = normal_numbers(random, {std::max(s.sequences, s.batch), s.channels, s.modes, 2});
  const Numbers<float> narrow = numbers(random, s);
  p.run = [=](const ScanCall& call) {
    S4dParameters<float> parameters = narrow.parameters();
    parameters.initial_state = call.initial;
    parameters.final_state = call.final;
    return fovea::s4d(call.inputs[0].any, parameters, call.out, call.options);
  };
  p.reference = [=](const ScanReference& call) {
    const Numbers<double> wide = widened(narrow);
    S4dParameters<double> parameters = wide.parameters();
    parameters.initial_state = call.initial;
    parameters.final_state = call.final;
    fovea::reference::s4d(call.inputs[0], parameters, call.out, call.options);
  };
  return p;
}

}   // namespace

TEST_CASE("s4d: against the reference", "[s4d]") {
  for (const index_t len : {0, 1, 31, 32, 33, 75}) {
    for (const index_t channels : {1, 5, 16, 150}) {
      INFO("len " << len << ", channels " << channels);
      check_against_reference(problem(1, {.batch = 2, .len = len, .channels = channels, .modes = 3}));
    }
  }
  for (const index_t modes : {1, 2, 4, 5, 32}) {
    INFO("modes " << modes);
    check_against_reference(problem(2, {.len = 35, .modes = modes}));
  }
}

TEST_CASE("s4d: the convolution with its kernel", "[s4d]") {
  // y = K * u + D u with K_l = 2 Re sum_n C_n (e^{dt A_n} - 1) / A_n e^{dt A_n l}, from an empty state.
  constexpr index_t len = 40, channels = 18, modes = 6;
  Random random(3);
  const Floats u = normal_numbers(random, {1, 1, len, channels});
  const Numbers<float> x = numbers(random, {.channels = channels, .modes = modes});
  Floats y({1, 1, len, channels});
  REQUIRE(fovea::s4d(u.view(), x.parameters(), y.view()).ok());
  Doubles want(y.extent);
  for (index_t c = 0; c < channels; ++c) {
    std::vector<double> kernel(static_cast<std::size_t>(len));
    const double dt = std::exp(double{x.log_dt.view()(0, 0, 0, c)});
    for (index_t n = 0; n < modes; ++n) {
      const std::complex<double> a(-std::exp(double{x.log_a_real.view()(0, 0, c, n)}), x.a_imag.view()(0, 0, c, n)),
          read(x.c_real.view()(0, 0, c, n), x.c_imag.view()(0, 0, c, n));
      for (index_t l = 0; l < len; ++l)
        kernel[static_cast<std::size_t>(l)] +=
            2 * (read * (std::exp(dt * a) - 1.) / a * std::exp(dt * a * double(l))).real();
    }
    for (index_t t = 0; t < len; ++t) {
      double sum = double{x.d.view()(0, 0, 0, c)} * double{u.view()(0, 0, t, c)};
      for (index_t s = 0; s <= t; ++s) sum += kernel[static_cast<std::size_t>(t - s)] * double{u.view()(0, 0, s, c)};
      want.view()(0, 0, t, c) = sum;
    }
  }
  CHECK(relative_rms(y, want) <= kRecurrentError);
}

TEST_CASE("s4d: splits, packed sequences and lanes change no bit", "[s4d][bits]") {
  check_splits(problem(4, {.len = 70}));
  check_splits(problem(5, {.len = 33, .channels = 3, .modes = 5}));
  check_ragged(problem(6, {.len = 80, .sequences = 5}), {0, 33, 33, 34, 70, 78});
  check_lanes(problem(7, {.channels = 300, .modes = 3}));   // a tile for each lane
}

TEST_CASE("s4d: storage, strides and foreign memory", "[s4d]") {
  const ScanProblem p = problem(8, {.batch = 2, .len = 36, .channels = 21, .modes = 5});
  check_workspace_bytes(p, [](int lanes) { return fovea::s4d_workspace_bytes(5, lanes); });
  CHECK(fovea::s4d_workspace_bytes(0) > 0);
  check_strides(p, 1);
  check_strides(p, 2);
  check_poisoned_channel(p, 0, 7);
}

TEMPLATE_TEST_CASE("s4d: inputs and outputs of every plain type", "[s4d]", fovea::bf16, fovea::f16, double) {
  check_storage<TestType>(problem(9, {.len = 34, .channels = 21}));
}

TEST_CASE("s4d: 4096 tokens with memories of thousands", "[s4d]") {
  check_against_reference(problem(10, {.len = 4096, .channels = 4, .modes = 4, .least_log_dt = -8, .most_log_dt = -7}));
}

TEST_CASE("s4d: modes that forget at once", "[s4d]") {
  // dt of 55 to 150: nothing is left of a state after a token.
  check_against_reference(problem(11, {.len = 10, .least_log_dt = 4, .most_log_dt = 5}));
}

TEST_CASE("s4d: what is refused", "[s4d][errors]") {
  const ScanProblem p = problem(12, {.batch = 2, .len = 5});
  check_refused(p, "y is", [](ScanCall& call) { call.out.extent[2] = 4; });
  check_refused(p, "u is", [](ScanCall& call) { call.inputs[0].any.extent[1] = 2; });
  check_refused(p, "u has null data", [](ScanCall& call) { call.inputs[0].any.data = nullptr; });
  check_refused(p, "overlaps", [](ScanCall& call) { call.inputs[0].any.data = call.out.data; });
  check_refused(p, "log_a_real has", [](ScanCall& call) {
    call.inputs[0].any.extent[3] = 7;
    call.out.extent[3] = 7;
  });
  check_refused(p, "initial_state has", [](ScanCall& call) { call.initial.extent[3] = 1; });
  check_refused(p, "not in the options", [](ScanCall& call) { call.options.initial_state = call.initial; });
  check_refused(p, "states are supported", [](ScanCall& call) {
    call.inputs[0].any.extent[0] = call.out.extent[0] = index_t{1} << 40;
    call.inputs[0].any.extent[2] = call.out.extent[2] = 0;
    call.initial = {}, call.final = {};
  });
}
