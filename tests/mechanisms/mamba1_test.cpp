// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/mamba1.hpp"

#include "fovea/reference/mamba1.hpp"
#include "reference/recurrent_golden.hpp"
#include "scan_identities.hpp"

using namespace test;
using fovea::HeadMap;
using fovea::index_t;
using fovea::Mamba1Parameters;
using fovea::StateLayout;

namespace {

struct Sizes {
  index_t batch = 1, x_groups = 1, b_groups = 1, c_groups = 1, len = 40, channels = 20, dim_state = 16, sequences = 1;
  StateLayout layout = StateLayout::k_first;
  HeadMap map = HeadMap::blocks;
  float least_dt = 0.001f, most_dt = 0.2f;
};
enum { kX, kDt, kB, kC };

template <class Real>
Mamba1Parameters<Real> parameters(const Tensor<const Real>& dt, const Axes4<Real>& a, const Axes4<Real>& d) {
  const auto &e = a.extent, &f = d.extent;
  return {dt, {a.data.data(), {e[1], e[2], e[3]}, {e[2] * e[3], e[3], 1}}, {d.data.data(), {f[2], f[3]}, {f[3], 1}}};
}

ScanProblem problem(std::uint64_t seed, const Sizes& s) {
  Random random(seed);
  ScanProblem p;
  const index_t groups = std::max(s.x_groups, s.b_groups);
  p.inputs = {normal_numbers(random, {s.batch, s.x_groups, s.len, s.channels}),
              uniform_numbers(random, {s.batch, groups, s.len, s.channels}, s.least_dt, s.most_dt),
              normal_numbers(random, {s.batch, s.b_groups, s.len, s.dim_state}),
              normal_numbers(random, {s.batch, s.c_groups, s.len, s.dim_state})};
  p.out_heads = std::max(s.c_groups, groups);
  p.channels = s.channels;
  const bool v_first = s.layout == StateLayout::v_first;
  p.initial = normal_numbers(random, {std::max(s.sequences, s.batch), groups, v_first ? s.channels : s.dim_state,
                                      v_first ? s.dim_state : s.channels});
  const Floats a = Floats::of({1, groups, s.channels, s.dim_state}, [&](index_t, index_t, index_t, index_t n) {
    return -static_cast<float>(n + 1) * random.uniform(0.8f, 1.2f);
  });
  const Floats d = normal_numbers(random, {1, 1, groups, s.channels});
  p.run = [=](const ScanCall& call) {
    RecurrentOptions<float> options = call.options;
    options.layout = s.layout;
    options.head_map = s.map;
    options.initial_state = call.initial;
    options.final_state = call.final;
    return fovea::mamba1(call.inputs[kX].any, call.inputs[kB].any, call.inputs[kC].any,
                         parameters(call.inputs[kDt].floats, a, d), call.out, options);
  };
  p.reference = [=](const ScanReference& call) {
    const Doubles wide_a = widened(a), wide_d = widened(d);
    RecurrentOptions<double> options = call.options;
    options.layout = s.layout;
    options.head_map = s.map;
    options.initial_state = call.initial;
    options.final_state = call.final;
    fovea::reference::mamba1(call.inputs[kX], call.inputs[kB], call.inputs[kC], parameters(call.inputs[kDt], wide_a, wide_d),
                             call.out, options);
  };
  return p;
}

Floats transposed(const Floats& x) {
  return Floats::of({x.extent[0], x.extent[1], x.extent[3], x.extent[2]},
                    [&](index_t a, index_t b, index_t c, index_t d) { return x.view()(a, b, d, c); });
}

}   // namespace

TEST_CASE("mamba1: the golden values", "[mamba1]") {
  constexpr index_t len = kGoldenLen, dim_k = kGoldenDimK, dim_v = kGoldenDimV;
  const auto rows = [](index_t dim, auto f) {
    return Floats::of({1, 1, len, dim}, [&](index_t, index_t, index_t t, index_t i) { return f(double(t), double(i)); });
  };
  const Floats x = rows(dim_v, golden_v), b = rows(dim_k, golden_k), c = rows(dim_k, golden_q);
  const Floats dt = rows(dim_v, [](double t, double j) { return golden_beta(t) * (1 + 0.1 * j); });
  const Floats a = Floats::of({1, 1, dim_v, dim_k}, [](index_t, index_t, index_t, index_t n) { return -double(n + 1); });
  const Floats d({1, 1, 1, dim_v}, 0.7f);
  const Floats initial = Floats::of(
      {1, 1, dim_k, dim_v}, [](index_t, index_t, index_t i, index_t j) { return golden_initial(double(i), double(j)); });
  Floats y({1, 1, len, dim_v}), final({1, 1, dim_k, dim_v});
  const Status status = fovea::mamba1(x.view(), b.view(), c.view(), parameters(dt.view(), a, d), y.view(),
                                      {.initial_state = initial.view(), .final_state = final.view()});
  REQUIRE(status.ok());
  const auto* const golden = std::find_if(std::begin(kRecurrentGoldens), std::end(kRecurrentGoldens),
                                          [](const auto& each) { return std::string(each.name) == "mamba1"; });
  const auto squares = [](const Floats& all) {
    double sum = 0;
    for (const float each : all.data) sum += double{each} * double{each};
    return sum;
  };
  for (index_t j = 0; j < dim_v; ++j)
    CHECK(y.view()(0, 0, len - 1, j) == Catch::Approx(golden->last[static_cast<std::size_t>(j)]).epsilon(0).margin(1e-5));
  CHECK(squares(y) == Catch::Approx(golden->out_squares).epsilon(1e-5));
  CHECK(squares(final) == Catch::Approx(golden->state_squares).epsilon(1e-5));
}

TEST_CASE("mamba1: against the reference", "[mamba1]") {
  for (const index_t len : {0, 1, 31, 32, 33, 75}) {
    for (const index_t channels : {1, 5, 16, 150}) {
      INFO("len " << len << ", channels " << channels);
      check_against_reference(problem(1, {.batch = 2, .len = len, .channels = channels}));
    }
  }
  check_against_reference(problem(1, {.len = 20, .channels = 1050, .dim_state = 2}));   // more than a tile
  for (const index_t dim_state : {1, 3, 4, 8, 15, 17, 40}) {
    for (const StateLayout layout : {StateLayout::k_first, StateLayout::v_first}) {
      INFO("dim_state " << dim_state);
      check_against_reference(problem(2, {.len = 35, .dim_state = dim_state, .layout = layout}));
    }
  }
}

TEST_CASE("mamba1: groups that share B, C or x, and several C that read one state", "[mamba1]") {
  for (const HeadMap map : {HeadMap::blocks, HeadMap::tiled}) {
    for (const auto& [x, b, c] : std::vector<std::array<index_t, 3>>{{4, 2, 1}, {2, 4, 4}, {2, 1, 4}, {1, 1, 3}}) {
      INFO("groups " << x << " " << b << " " << c);
      const ScanProblem p = problem(
          3,
          {.batch = 2, .x_groups = x, .b_groups = b, .c_groups = c, .len = 34, .channels = 9, .dim_state = 5, .map = map});
      check_against_reference(p);
      check_splits(problem(4, {.x_groups = x, .b_groups = b, .c_groups = c, .len = 34, .channels = 9, .map = map}));
    }
  }
}

TEST_CASE("mamba1: splits, packed sequences and lanes change no bit", "[mamba1][bits]") {
  check_splits(problem(5, {.len = 70}));
  check_splits(problem(6, {.len = 33, .channels = 3, .dim_state = 21, .layout = StateLayout::v_first}));
  check_ragged(problem(7, {.len = 80, .sequences = 5}), {0, 33, 33, 34, 70, 78});
  check_lanes(problem(8, {.channels = 300, .dim_state = 4}));   // a tile for each lane
  check_lanes(problem(8, {.batch = 2, .x_groups = 2, .c_groups = 2, .channels = 30, .dim_state = 4}));
}

TEST_CASE("mamba1: a state with channels first is the other one transposed", "[mamba1][bits]") {
  for (const index_t dim_state : {1, 16, 19}) {
    const ScanProblem k_first = problem(9, {.batch = 2, .dim_state = dim_state});
    ScanProblem v_first = problem(9, {.batch = 2, .dim_state = dim_state, .layout = StateLayout::v_first});
    v_first.initial = transposed(k_first.initial);
    const ScanOutcome one = run_scan_problem(k_first), two = run_scan_problem(v_first);
    CHECK(one.out == two.out);
    CHECK(transposed(one.final) == two.final);
  }
}

TEST_CASE("mamba1: storage types, strides and foreign memory", "[mamba1]") {
  const ScanProblem p = problem(10, {.batch = 2, .x_groups = 2, .b_groups = 1, .c_groups = 2, .len = 36, .channels = 21});
  check_workspace_bytes(p, [](int lanes) { return fovea::mamba1_workspace_bytes(16, lanes); });
  CHECK(fovea::mamba1_workspace_bytes(0) > 0);
  check_strides(p, 1);
  check_strides(p, 2);
  check_poisoned_channel(p, kX, 7);
  check_poisoned_channel(p, kDt, 20);
}

TEMPLATE_TEST_CASE("mamba1: inputs and outputs of every plain type", "[mamba1]", fovea::bf16, fovea::f16, double) {
  ScanProblem p = problem(11, {.len = 34, .channels = 21});
  // dt stays a float.
  const auto run = p.run;
  const Floats dt = p.inputs[kDt];
  p.run = [=](const ScanCall& call) {
    ScanCall with_dt = call;
    with_dt.inputs[kDt].floats = dt.view();
    return run(with_dt);
  };
  check_storage<TestType>(p);
}

TEST_CASE("mamba1: dt of 0 is an identity step", "[mamba1]") {
  ScanProblem p = problem(12, {.len = 3, .least_dt = 0, .most_dt = 0});
  const ScanOutcome got = run_scan_problem(p);
  CHECK(got.final == p.initial);
  check_against_reference(p);
}

TEST_CASE("mamba1: a dt that leaves nothing of the state", "[mamba1]") {
  // -dt A log2(e) is at least 230: nothing of the first state can be in the last.
  ScanProblem p = problem(13, {.len = 2, .least_dt = 200, .most_dt = 300});
  const ScanOutcome got = run_scan_problem(p);
  p.initial = Floats(p.initial.extent, 0.f);
  const ScanOutcome from_nothing = run_scan_problem(p);
  CHECK(got == from_nothing);
  check_against_reference(p);
}

TEST_CASE("mamba1: exponents up to 100 of either kind", "[mamba1]") {
  check_against_reference(problem(14, {.len = 50, .least_dt = 0, .most_dt = 6.f}));
  check_against_reference(problem(15, {.len = 400, .channels = 3, .least_dt = 1e-5f, .most_dt = 1e-3f}));
}

TEST_CASE("mamba1: 4096 tokens with memories of thousands", "[mamba1]") {
  check_against_reference(problem(16, {.len = 4096, .channels = 4, .dim_state = 2, .least_dt = 1e-4f, .most_dt = 2e-3f}));
}

// A million in calls of 2^14 that hand their states on. dt A is 10^-4 and more, so a state remembers 10^4 tokens at most;
// a token rounds it and its factor once each, by 2^-24 at most: a walk of 2^-24 sqrt(2 * 10^4 / 2).
TEST_CASE("mamba1: a million tokens", "[mamba1]") {
  Floats state;
  Doubles exact;
  for (std::uint64_t call = 0; call < 64; ++call) {
    ScanProblem p = problem(100 + call, {.len = 1 << 14,
                                         .channels = 4,
                                         .dim_state = 2,
                                         .layout = StateLayout::v_first,
                                         .least_dt = 1e-4f,
                                         .most_dt = 1.5e-4f});
    if (call == 0) state = Floats(p.initial.extent), exact = widened(state);
    p.initial = state;
    const ScanOutcome got = run_scan_problem(p);
    std::vector<Doubles> inputs;
    for (const Floats& x : p.inputs) inputs.push_back(widened(x));
    Doubles out(got.out.extent), final(state.extent);
    std::vector<Tensor<const double>> views;
    for (const Doubles& x : inputs) views.push_back(x.view());
    p.reference({views, out.view(), std::as_const(exact).view(), final.view(), {}});
    exact = final, state = got.final;
    INFO("call " << call);
    CHECK(relative_rms(got.out, out) <= 0x1p-24 * 100);
    CHECK(relative_rms(state, exact) <= 0x1p-24 * 100);
  }
}

TEST_CASE("mamba1: shared dt, no skip, scale", "[mamba1]") {
  // dt of one position and one batch entry for all; C times 2 is a scale of 2 without the skip.
  Random random(17);
  const Floats x = normal_numbers(random, {2, 1, 34, 6}), b = normal_numbers(random, {2, 1, 34, 4}),
               c = normal_numbers(random, {2, 1, 34, 4}), dt = uniform_numbers(random, {1, 1, 1, 6}, 0.1f, 0.5f),
               a = uniform_numbers(random, {1, 1, 6, 4}, -2, -1);
  const Floats wide_dt =
      Floats::of({2, 1, 34, 6}, [&](index_t, index_t, index_t, index_t d) { return dt.view()(0, 0, 0, d); });
  Floats twice_c = c;
  for (float& each : twice_c.data) each *= 2;
  Floats one({2, 1, 34, 6}), two(one);
  Mamba1Parameters<float> p = parameters(dt.view(), a, Floats({1, 1, 1, 6}));
  p.d = {};
  REQUIRE(fovea::mamba1(x.view(), b.view(), c.view(), p, one.view(), {.scale = 2.f}).ok());
  p.dt = wide_dt.view();
  REQUIRE(fovea::mamba1(x.view(), b.view(), twice_c.view(), p, two.view()).ok());
  CHECK(one == two);
}

TEST_CASE("mamba1: what is refused", "[mamba1][errors]") {
  const ScanProblem p = problem(18, {.batch = 2, .len = 5});
  check_refused(p, "c is", [](ScanCall& call) { call.inputs[kC].any.extent[2] = 4; });
  check_refused(p, "b is", [](ScanCall& call) { call.inputs[kB].any.extent[2] = 4; });
  check_refused(p, "y is", [](ScanCall& call) { call.out.extent[0] = 1; });
  check_refused(p, "dt has null data", [](ScanCall& call) { call.inputs[kDt].floats.data = nullptr; });
  check_refused(p, "dt has", [](ScanCall& call) { call.inputs[kDt].floats.extent[3] = 1; });
  check_refused(p, "x has null data", [](ScanCall& call) { call.inputs[kX].any.data = nullptr; });
  check_refused(p, "x has format", [](ScanCall& call) { call.inputs[kX].any.format = fovea::Format::i8_token; });
  check_refused(p, "overlaps", [](ScanCall& call) { call.inputs[kX].any.data = call.out.data; });
  check_refused(p, "initial_state has", [](ScanCall& call) { call.initial.extent[2] = 3; });
  check_refused(p, "batch 1", [](ScanCall& call) {
    static const std::vector<index_t> cu_len{0, 5};
    call.options.cu_len = cu_len;
  });
  check_refused(p, "scale", [](ScanCall& call) { call.options.scale = NAN; });
  check_refused(p, "states are supported", [](ScanCall& call) {
    for (const int n : {kX, kB, kC}) {
      call.inputs[static_cast<std::size_t>(n)].any.extent[0] = index_t{1} << 40;
      call.inputs[static_cast<std::size_t>(n)].any.extent[2] = 0;
    }
    call.inputs[kDt].floats.extent[0] = call.inputs[kDt].floats.extent[2] = 1;
    call.out.extent[0] = index_t{1} << 40;
    call.out.extent[2] = 0;
    call.initial = {}, call.final = {};
  });
}
