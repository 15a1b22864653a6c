// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/rwkv4.hpp"

#include "fovea/reference/rwkv4.hpp"
#include "reference/recurrent_golden.hpp"
#include "scan_identities.hpp"

using namespace test;
using fovea::HeadMap;
using fovea::Rwkv4Parameters;
using fovea::StateLayout;

namespace {

struct Sizes {
  index_t batch = 1, k_heads = 1, v_heads = 1, len = 40, channels = 20, sequences = 1;
  StateLayout layout = StateLayout::k_first;
  HeadMap map = HeadMap::blocks;
  float key = 3, least_w = -2, most_w = -0.01f;
};
enum { kK, kV };

template <class Real>
Rwkv4Parameters<Real> parameters(const Axes4<Real>& w, const Axes4<Real>& u) {
  const index_t heads = w.extent[2], channels = w.extent[3];
  return {{w.data.data(), {heads, channels}, {channels, 1}}, {u.data.data(), {heads, channels}, {channels, 1}}};
}

ScanProblem problem(std::uint64_t seed, const Sizes& s) {
  Random random(seed);
  const index_t heads = std::max(s.k_heads, s.v_heads);
  ScanProblem p;
  p.inputs = {normal_numbers(random, {s.batch, s.k_heads, s.len, s.channels}),
              normal_numbers(random, {s.batch, s.v_heads, s.len, s.channels})};
  for (float& key : p.inputs[kK].data) key *= s.key;
  p.out_heads = heads;
  p.channels = s.channels;
  // Numerator, denominator and epsilon of a few tokens.
  const bool v_first = s.layout == StateLayout::v_first;
  const index_t sequences = std::max(s.sequences, s.batch);
  p.initial = Floats(v_first ? std::array<index_t, 4>{sequences, heads, s.channels, 3}
                             : std::array<index_t, 4>{sequences, heads, 3, s.channels});
  for (index_t n = 0; n < sequences; ++n) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t c = 0; c < s.channels; ++c) {
        const float state[] = {random.normal(), random.uniform(1, 3), random.normal()};
        for (index_t r = 0; r < 3; ++r) (v_first ? p.initial.view()(n, h, c, r) : p.initial.view()(n, h, r, c)) = state[r];
      }
    }
  }
  const Floats w = uniform_numbers(random, {1, 1, heads, s.channels}, s.least_w, s.most_w),
               u = normal_numbers(random, {1, 1, heads, s.channels});
  p.run = [=](const ScanCall& call) {
    RecurrentOptions<float> options = call.options;
    options.layout = s.layout;
    options.head_map = s.map;
    options.initial_state = call.initial;
    options.final_state = call.final;
    return fovea::rwkv4(call.inputs[kK].any, call.inputs[kV].any, parameters(w, u), call.out, options);
  };
  p.reference = [=](const ScanReference& call) {
    const Doubles wide_w = widened(w), wide_u = widened(u);
    RecurrentOptions<double> options = call.options;
    options.layout = s.layout;
    options.head_map = s.map;
    options.initial_state = call.initial;
    options.final_state = call.final;
    fovea::reference::rwkv4(call.inputs[kK], call.inputs[kV], parameters(wide_w, wide_u), call.out, options);
  };
  return p;
}

}   // namespace

TEST_CASE("rwkv4: the golden values", "[rwkv4]") {
  constexpr index_t len = kGoldenLen, dim_v = kGoldenDimV;
  const auto rows = [](auto f) {
    return Floats::of({1, 1, len, dim_v}, [&](index_t, index_t, index_t t, index_t i) { return f(double(t), double(i)); });
  };
  const Floats k = rows([](double t, double j) { return 3 * golden_raw_k(t, j); }), v = rows(golden_v);
  const Floats w =
      Floats::of({1, 1, 1, dim_v}, [](index_t, index_t, index_t, index_t j) { return -(0.5 + 0.1 * double(j)); });
  const Floats u({1, 1, 1, dim_v}, 0.2f);
  Floats out({1, 1, len, dim_v});
  REQUIRE(fovea::rwkv4(k.view(), v.view(), parameters(w, u), out.view()).ok());
  const auto* const golden = std::find_if(std::begin(kRecurrentGoldens), std::end(kRecurrentGoldens),
                                          [](const auto& each) { return std::string(each.name) == "rwkv4"; });
  double squares = 0;
  for (const float each : out.data) squares += double{each} * double{each};
  for (index_t j = 0; j < dim_v; ++j)
    CHECK(out.view()(0, 0, len - 1, j) == Catch::Approx(golden->last[static_cast<std::size_t>(j)]).epsilon(0).margin(1e-5));
  CHECK(squares == Catch::Approx(golden->out_squares).epsilon(1e-5));
}

TEST_CASE("rwkv4: against the reference", "[rwkv4]") {
  for (const index_t len : {0, 1, 31, 32, 33, 75}) {
    for (const index_t channels : {1, 5, 16, 150}) {
      INFO("len " << len << ", channels " << channels);
      check_against_reference(problem(1, {.batch = 2, .len = len, .channels = channels}));
      check_against_reference(problem(2, {.len = len, .channels = channels, .layout = StateLayout::v_first}));
    }
  }
  for (const HeadMap map : {HeadMap::blocks, HeadMap::tiled}) {
    check_against_reference(problem(3, {.batch = 2, .k_heads = 2, .v_heads = 4, .len = 9, .map = map}));
    check_against_reference(problem(4, {.k_heads = 6, .v_heads = 2, .len = 9, .map = map}));
  }
}

TEST_CASE("rwkv4: sums over all tokens, without a state", "[rwkv4]") {
  // The definition: no running maximum, no numerator that is carried on.
  constexpr index_t len = 21, channels = 19;
  Random random(5);
  const Floats k = normal_numbers(random, {1, 1, len, channels}), v = normal_numbers(random, {1, 1, len, channels}),
               w = uniform_numbers(random, {1, 1, 1, channels}, -1, -0.1f), u = normal_numbers(random, {1, 1, 1, channels});
  Floats out({1, 1, len, channels});
  REQUIRE(fovea::rwkv4(k.view(), v.view(), parameters(w, u), out.view()).ok());
  for (index_t c = 0; c < channels; ++c) {
    for (index_t t = 0; t < len; ++t) {
      double sum = 0, weights = 0;
      for (index_t s = 0; s <= t; ++s) {
        const double decay = w.view()(0, 0, 0, c), bonus = u.view()(0, 0, 0, c), key = k.view()(0, 0, s, c);
        const double weight = std::exp((s == t ? bonus : double(t - 1 - s) * decay) + key);
        sum += weight * double{v.view()(0, 0, s, c)};
        weights += weight;
      }
      CHECK(out.view()(0, 0, t, c) == Catch::Approx(sum / weights).epsilon(1e-5).margin(1e-6));
    }
    CHECK(out.view()(0, 0, 0, c) == Catch::Approx(v.view()(0, 0, 0, c)).epsilon(1e-6));   // one token: o = v
  }
}

TEST_CASE("rwkv4: splits, packed sequences and lanes change no bit", "[rwkv4][bits]") {
  check_splits(problem(6, {.len = 70}));
  check_splits(problem(7, {.len = 33, .channels = 3, .layout = StateLayout::v_first}));
  check_ragged(problem(8, {.len = 80, .sequences = 5}), {0, 33, 33, 34, 70, 78});
  check_lanes(problem(9, {.channels = 300}));   // a tile for each lane
  check_lanes(problem(9, {.batch = 2, .k_heads = 2, .v_heads = 2, .channels = 30}));
}

TEST_CASE("rwkv4: an absent state is one with epsilon of -1e38", "[rwkv4][bits]") {
  ScanProblem p = problem(10, {.len = 7});
  for (index_t c = 0; c < p.channels; ++c) {
    for (index_t r = 0; r < 3; ++r) p.initial.view()(0, 0, r, c) = r == 2 ? -1e38f : 0.f;
  }
  const ScanOutcome given = run_scan_problem(p);
  const auto run = p.run;
  p.run = [run](const ScanCall& call) {
    ScanCall without = call;
    without.initial = {};
    return run(without);
  };
  CHECK(run_scan_problem(p) == given);
  // Not a token: what there was is handed on.
  ScanProblem empty = problem(10, {.len = 0});
  empty.run = p.run;
  const ScanOutcome nothing = run_scan_problem(empty);
  for (index_t c = 0; c < p.channels; ++c) CHECK(nothing.final.view()(0, 0, 2, c) == -1e38f);
}

TEST_CASE("rwkv4: storage, strides and foreign memory", "[rwkv4]") {
  const ScanProblem p = problem(11, {.batch = 2, .k_heads = 2, .v_heads = 2, .len = 36, .channels = 21});
  check_workspace_bytes(p, [](int lanes) { return fovea::rwkv4_workspace_bytes(lanes); });
  check_strides(p, 1);
  check_strides(p, 2);
  check_poisoned_channel(p, kK, 7);
  check_poisoned_channel(p, kV, 20);
}

TEMPLATE_TEST_CASE("rwkv4: inputs and outputs of every plain type", "[rwkv4]", fovea::bf16, fovea::f16, double) {
  check_storage<TestType>(problem(12, {.len = 34, .channels = 21}));
}

TEST_CASE("rwkv4: keys of 100 and decays of 100, and 4096 tokens with a long memory", "[rwkv4]") {
  check_against_reference(problem(13, {.len = 60, .key = 40}));
  check_against_reference(problem(14, {.len = 60, .key = 40, .least_w = -100, .most_w = -50}));
  check_against_reference(problem(15, {.len = 4096, .channels = 4, .key = 1, .least_w = -2e-3f, .most_w = -1e-4f}));
  // A token of weight 0.
  ScanProblem p = problem(16, {.len = 5});
  for (index_t c = 0; c < p.channels; ++c) p.inputs[kK].view()(0, 0, 2, c) = -HUGE_VALF;
  check_against_reference(p);
}

TEST_CASE("rwkv4: what is refused", "[rwkv4][errors]") {
  const ScanProblem p = problem(17, {.batch = 2, .len = 5});
  check_refused(p, "k is", [](ScanCall& call) { call.inputs[kK].any.extent[2] = 4; });
  check_refused(p, "out is", [](ScanCall& call) { call.out.extent[3] = 1; });
  check_refused(p, "do not divide", [](ScanCall& call) {
    call.inputs[kK].any.extent[1] = 2;
    call.inputs[kV].any.extent[1] = 3;
  });
  check_refused(p, "v has null data", [](ScanCall& call) { call.inputs[kV].any.data = nullptr; });
  check_refused(p, "v has format", [](ScanCall& call) { call.inputs[kV].any.format = fovea::Format::i8_token; });
  check_refused(p, "overlaps", [](ScanCall& call) { call.inputs[kV].any.data = call.out.data; });
  check_refused(p, "w has", [](ScanCall& call) {
    for (ScanInput& each : call.inputs) each.any.extent[3] = 7;
    call.out.extent[3] = 7;
  });
  check_refused(p, "final_state has", [](ScanCall& call) { call.final.extent[2] = 2; });
  check_refused(p, "different strides", [](ScanCall& call) {
    call.initial = call.final;
    call.initial.stride[0] += 1;
  });
}
