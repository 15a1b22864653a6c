// SPDX-License-Identifier: Apache-2.0
// Chunks that multiply in tiles of bf16: every kind of decay and update against the double references, and what must not
// change a bit.
#include "fovea/engine/chunk_tiles.hpp"

#include "fovea/engine/parts/feature_maps.hpp"
#include "fovea/mechanisms/delta.hpp"
#include "fovea/mechanisms/gated_delta.hpp"
#include "fovea/mechanisms/gla.hpp"
#include "fovea/mechanisms/kda.hpp"
#include "fovea/mechanisms/linear.hpp"
#include "fovea/mechanisms/mamba2.hpp"
#include "fovea/mechanisms/retention.hpp"
#include "fovea/reference/delta.hpp"
#include "fovea/reference/gated_delta.hpp"
#include "fovea/reference/gla.hpp"
#include "fovea/reference/kda.hpp"
#include "fovea/reference/mamba2.hpp"
#include "fovea/reference/retention.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;
using fovea::Panels;

namespace {

RecurrentOptions<float> in_bf16(RecurrentOptions<float> options) {
  options.panels = Panels::bf16;
  return options;
}

const Mechanism& gated_delta() {
  static const Mechanism mechanism{
      .name = "Gated DeltaNet",
      .run =
          [](const Arguments<float>& x) {
            return fovea::gated_delta_net(x.q, x.k, x.v, x.decay, x.beta, x.out, in_bf16(x.options));
          },
      .reference =
          [](const Arguments<double>& x) { reference::gated_delta(x.q, x.k, x.v, x.decay, x.beta, x.out, x.options); },
      .gates = Gates::token,
      .unit_keys = true};
  return mechanism;
}

#if FOVEA_HAS_TILE_PRODUCTS
const Mechanism& kda() {
  static const Mechanism mechanism{
      .name = "KDA",
      .run = [](const Arguments<float>& x) { return fovea::kda(x.q, x.k, x.v, x.decay, x.beta, x.out, in_bf16(x.options)); },
      .reference = [](const Arguments<double>& x) { reference::kda(x.q, x.k, x.v, x.decay, x.beta, x.out, x.options); },
      .gates = Gates::channel,
      .unit_keys = true};
  return mechanism;
}

// No decay; token, key and head decays without a delta rule; gains and a skip.
const std::vector<Mechanism>& others() {
  static const std::vector<Mechanism> list{
      {.name = "DeltaNet",
       .run = [](const Arguments<float>& x) { return fovea::delta_net(x.q, x.k, x.v, x.beta, x.out, in_bf16(x.options)); },
       .reference = [](const Arguments<double>& x) { reference::delta(x.q, x.k, x.v, x.beta, x.out, x.options); },
       .unit_keys = true},
      {.name = "GLA",
       .run = [](const Arguments<float>& x) { return fovea::gla(x.q, x.k, x.v, x.decay, x.out, in_bf16(x.options)); },
       .reference = [](const Arguments<double>& x) { reference::gla(x.q, x.k, x.v, x.decay, x.out, x.options); },
       .gates = Gates::channel},
      {.name = "retention",
       .run =
           [](const Arguments<float>& x) { return fovea::retention(x.q, x.k, x.v, x.per_head, x.out, in_bf16(x.options)); },
       .reference = [](const Arguments<double>& x) { reference::retention(x.q, x.k, x.v, x.per_head, x.out, x.options); },
       .per_head = [](index_t head) { return reference::retention_gamma(head); }},
      {.name = "Mamba-2",
       .run =
           [](const Arguments<float>& x) {
             return fovea::mamba2(x.v, x.k, x.q, {.dt = x.dt, .a = x.per_head, .d = x.skip}, x.out, in_bf16(x.options));
           },
       .reference =
           [](const Arguments<double>& x) {
             reference::mamba2(x.v, x.k, x.q, {.dt = x.dt, .a = x.per_head, .d = x.skip}, x.out, x.options);
           },
       .per_head = [](index_t head) { return -1 - 0.7 * static_cast<double>(head); }}};
  return list;
}
#endif

}   // namespace

TEST_CASE("bf16 panels of recurrences are refused where nothing multiplies bf16") {
  const Problem problem(gated_delta(), {.len = 40});
  Answer a = problem.answer(gated_delta());
  const Status status = call(gated_delta(), problem.arguments(gated_delta(), a), {});
  CHECK(status.ok() == fovea::tile_products_allowed());
  if (status.ok()) return;
  CHECK(status.code() == fovea::Code::unsupported);
  CHECK(std::string(status.message()).find("AMX") != std::string::npos);
  CHECK(a.untouched());
}

#if FOVEA_HAS_TILE_PRODUCTS

// Of rounded queries, keys, weights, pseudo-values and a copy of the state: 8 bits each.
constexpr double kAllowed = 5e-3;

TEST_CASE("bf16 tiles: 4096 tokens of a head of the models' size") {
  if (!fovea::tile_products_allowed()) return;
  for (const Mechanism* mechanism : {&gated_delta(), &kda()}) {
    for (const Gating gating : {Gating::mild, Gating::slow}) {
      Case c{.seed = 1, .len = 4096, .dim_k = 128, .dim_v = 128, .format = Format::bf16, .initial = false, .gating = gating};
      c.betas = Betas::unit;
      const Problem problem(*mechanism, c);
      const Expected expected = problem.expected(*mechanism);
      for (const index_t chunk : {0, 32, 128})
        check(*mechanism, problem, expected, {RecurrentForm::chunked, chunk}, kAllowed);
    }
  }
}

TEST_CASE("bf16 tiles: lengths around tiles and chunks, grouped heads, both layouts") {
  if (!fovea::tile_products_allowed()) return;
  std::vector<Mechanism> all = others();
  all.push_back(gated_delta());
  all.push_back(kda());
  for (const Mechanism& mechanism : all) {
    for (const index_t len : {6, 31, 32, 33, 63, 64, 65, 100, 129}) {
      Case c{.seed = static_cast<std::uint64_t>(len), .len = len, .dim_k = 33, .dim_v = 40, .format = Format::bf16};
      c.heads = len % 2 == 0 ? Heads{2, 2, 4} : Heads{4, 2, 2};
      c.map = len % 3 == 0 ? HeadMap::tiled : HeadMap::blocks;
      c.layout = len % 5 == 0 ? StateLayout::v_first : StateLayout::k_first;
      c.out_format = len % 2 == 0 ? Format::bf16 : Format::f32;
      c.placement = len % 3 == 0 ? Placement::padded : Placement::bshd;
      c.betas = Betas::unit;
      const Problem problem(mechanism, c);
      const Expected expected = problem.expected(mechanism);
      for (const index_t chunk : {0, 5, 32, 48, 256}) {
        check(mechanism, problem, expected, {RecurrentForm::chunked, chunk, 1 + static_cast<int>(len % 3)}, kAllowed);
      }
    }
  }
}

// Whatever is asked for together: layouts in memory, formats (fp32 is rounded), strong gates, betas up to 2, ragged batches.
// Few numbers that cancel, and reflections with beta 2 that undo each other, keep less of the 8 bits.
TEST_CASE("bf16 tiles: every option with every other", "[grid]") {
  if (!fovea::tile_products_allowed()) return;
  std::vector<Mechanism> all = others();
  all.push_back(gated_delta());
  all.push_back(kda());
  const GridRange range{.dims = {{4, 3}, {16, 16}, {33, 17}, {64, 64}, {40, 72}, {128, 32}},
                        .lens = {7, 31, 33, 63, 64, 65, 79, 103, 130},
                        .batches = {1, 1, 2},
                        .large = 2000,
                        .len_of_large = 130};
  for (const Mechanism& mechanism : all) {
    for (const std::size_t n : chosen_cases(60)) {
      test::Random random(17000 + n);
      const Case c = random_case(random, 18000 + n, range, false);
      const Problem problem(mechanism, c);
      const How how{RecurrentForm::chunked, random.pick({0, 1, 16, 32, 40, 64, 128, 256}), random.pick({1, 2, 3}),
                    random.pick({Pool::serial, Pool::threads, Pool::reversed})};
      check(mechanism, problem, problem.expected(mechanism), how, 8 * kAllowed);
    }
  }
}

// No mechanism has both. Whole panels of f32 values are read where they lie, here a row apart from the next head's.
TEST_CASE("bf16 tiles: a delta rule with a skip, values read in place") {
  constexpr index_t len = 64, heads = 2, dim = 32;
  test::Random random(31);
  const auto made = [&](index_t width, float low, float high) {
    std::vector<float> numbers(at(len * heads * width));
    for (float& x : numbers) x = random.uniform(low, high);
    return numbers;
  };
  const std::vector<float> q = made(dim, -1, 1), k = made(dim, -0.3f, 0.3f), v = made(dim, -1, 1), beta = made(1, 0, 1),
                           gate = made(1, -0.2f, 0), skips{1.f, 2.f};
  const auto run = [&](Panels panels) {
    std::vector<float> out(at(len * heads * dim));
    const auto view = [&](auto* data, index_t width) { return fovea::bshd(data, 1, len, heads, width); };
    RecurrentOptions<float> options;
    options.panels = panels;
    options.form = RecurrentForm::chunked;
    options.chunk = 32;
    fovea::RecurrentRun bound = fovea::door::bind_recurrent(view(q.data(), dim), view(k.data(), dim), view(v.data(), dim),
                                                            view(out.data(), dim), options, 1.f);
    const fovea::ChunkSpec<fovea::GateDecay<fovea::Decayed::token>, fovea::Delta, fovea::Inclusive, fovea::Skip> spec{
        {view(gate.data(), 1), fovea::DecayForm::log, dim}, {view(beta.data(), 1)}, {}, {{skips.data(), {heads, 1}, {1, 1}}}};
    REQUIRE(fovea::door::run_recurrent(bound, spec, options).ok());
    return out;
  };
  const std::vector<float> exact = run(Panels::f32), rounded = run(Panels::bf16);
  for (std::size_t i = 0; i < exact.size(); ++i) CHECK(std::abs(exact[i] - rounded[i]) <= 0.05f);
}

TEST_CASE("bf16 tiles: lanes, workspaces and states in place change no bit") {
  if (!fovea::tile_products_allowed()) return;
  for (const Mechanism* mechanism : {&gated_delta(), &kda()}) {
    check_lanes(*mechanism);
    check_workspace(*mechanism);
    check_in_place(*mechanism);
    check_batch(*mechanism);
    check_heads_and_layouts(*mechanism);
    check_not_numbers(*mechanism);
    check_mode(*mechanism);
  }
}

// Behind another sequence, so that positions in the batch entry are not those in the sequence.
TEST_CASE("bf16 tiles: a sequence packed behind another one is the sequence alone") {
  if (!fovea::tile_products_allowed()) return;
  Mechanism cosformer = others()[0];
  cosformer.name = "cosFormer";
  cosformer.features = [](index_t dim) { return 2 * dim; };
  cosformer.run = [](const Arguments<float>& x) {
    return fovea::linear_attention(x.q, x.k, x.v, x.out, {.normalize = false}, in_bf16(x.options),
                                   fovea::CosformerMap{x.k.extent[3], 200});
  };
  for (const Mechanism* mechanism : {&gated_delta(), &kda(), &std::as_const(cosformer)}) {
    Case c{.seed = 10, .heads = {2, 2, 4}, .dim_k = 32, .dim_v = 64, .format = Format::bf16};
    c.lengths = {9, 70};
    const Problem packed(*mechanism, c);
    Problem single = packed;
    single.c.lengths.clear();
    single.cu_len.clear();
    single.initial = slice_of(packed.initial, 0, 1);
    const How how{RecurrentForm::chunked};
    const Answer together = answer_of(*mechanism, packed, how), alone = part_of(*mechanism, single, 9, 79, nullptr, how);
    INFO(mechanism->name);
    bool same = alone.state.bytes() == slice_of(together.state, 0, 1).bytes();
    alone.out.each([&](index_t b, index_t h, index_t t, index_t d) {
      same = same && alone.out.get(b, h, t, d) == together.out.get(b, h, 9 + t, d);
    });
    CHECK(same);
  }
}

TEST_CASE("bf16 tiles: a sequence alone, in a batch or ragged, is the same bits") {
  if (!fovea::tile_products_allowed()) return;
  for (const Mechanism* mechanism : {&gated_delta(), &kda()}) {
    Case c{.seed = 7, .len = 70, .heads = {2, 2, 4}, .dim_k = 32, .dim_v = 64, .format = Format::bf16, .initial = false};
    const Problem alone(*mechanism, c);
    Problem ragged = alone;
    ragged.c.lengths = {0, 70, 0};
    ragged.cu_len = {0, 0, 70, 70};
    const How how{RecurrentForm::chunked};
    CHECK(answer_of(*mechanism, alone, how).out.bytes() == answer_of(*mechanism, ragged, how).out.bytes());
  }
}

// Keys that decay by more than 2^-60 within half a chunk take the fp32 form, of that chunk alone.
TEST_CASE("bf16 tiles: channels that decay too much") {
  if (!fovea::tile_products_allowed()) return;
  for (const Gating gating : {Gating::resets, Gating::strong}) {
    Case c{.seed = 8, .len = 130, .heads = {2, 2, 2}, .dim_k = 64, .dim_v = 32, .format = Format::bf16, .gating = gating};
    c.betas = Betas::unit;
    Problem problem(kda(), c);
    problem.gate.each([&](index_t b, index_t h, index_t t, index_t d) {   // chunks of either kind
      if (t >= 32 && t < 96) problem.gate.put(b, h, t, d, -0.01);
    });
    check(kda(), problem, problem.expected(kda()), {RecurrentForm::chunked}, kAllowed);
  }
}

TEST_CASE("bf16 tiles: Mamba-2 with steps of all sizes") {
  if (!fovea::tile_products_allowed()) return;
  const Mechanism& mamba2 = others().back();
  Problem problem(mamba2, {.seed = 11, .len = 130, .heads = {2, 2, 4}, .dim_k = 32, .dim_v = 64, .format = Format::bf16});
  test::Random random(12);
  problem.per_head.assign(4, -1.f);
  problem.dt.fill([&](auto...) { return random.pick({0., 1e-7, 0.1, 0.1, 30., 100.}); });
  const Expected expected = problem.expected(mamba2);
  for (const index_t chunk : {0, 32}) check(mamba2, problem, expected, {RecurrentForm::chunked, chunk}, kAllowed);
}

// Forms token by token, and mechanisms without tiles, keep their fp32 products.
TEST_CASE("bf16 tiles: what has no tiles keeps its bits") {
  if (!fovea::tile_products_allowed()) return;
  Mechanism fp32 = gated_delta();
  fp32.run = [](const Arguments<float>& x) {
    return fovea::gated_delta_net(x.q, x.k, x.v, x.decay, x.beta, x.out, x.options);
  };
  const Problem problem(gated_delta(), {.seed = 9, .len = 40, .dim_k = 16, .dim_v = 20});
  for (const RecurrentForm form : {RecurrentForm::step, RecurrentForm::fused})
    CHECK(answer_of(gated_delta(), problem, {form}) == answer_of(fp32, problem, {form}));
  CHECK_FALSE(answer_of(gated_delta(), problem, {RecurrentForm::chunked}) ==
              answer_of(fp32, problem, {RecurrentForm::chunked}));
  Mechanism linear = gated_delta(), linear_fp32 = fp32;
  linear.run = [](const Arguments<float>& x) {
    return fovea::linear_attention(x.q, x.k, x.v, x.out, {}, in_bf16(x.options));
  };
  linear_fp32.run = [](const Arguments<float>& x) { return fovea::linear_attention(x.q, x.k, x.v, x.out, {}, x.options); };
  CHECK(answer_of(linear, problem, {RecurrentForm::chunked}) == answer_of(linear_fp32, problem, {RecurrentForm::chunked}));
}

#endif
