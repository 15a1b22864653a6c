// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/gated.hpp"

#include "around_softmax.hpp"
#include "fovea/reference/gated.hpp"

namespace {

using namespace test;
using fovea::GateForm;
using fovea::GateFunction;
using fovea::Operand;

double gate_of(GateFunction function, double x) {
  return function == GateFunction::sigmoid ? fovea::reference::gate_sigmoid(x) : fovea::reference::gate_silu(x);
}
// Exponent rounded once and its constant once, exp2 at 6 units, sum, reciprocal (2 units), SiLU's product.
double gate_units(double x) { return 12 + 2 * std::max(-x, 0.); }

struct Kind {
  GateFunction function;
  index_t batch, heads, dim;   // 0: that of out
  GateForm form = GateForm::multiply;
};

Values gates(const Dense& x, const Kind& kind) {
  Values gate = random_values(91, kind.batch == 0 ? x.q.batch : kind.batch, kind.heads == 0 ? x.q.heads : kind.heads,
                              x.q.len, kind.dim == 0 ? x.v.dim : kind.dim);
  for (float& g : gate.data) g *= 3;
  return gate;
}

Run run_with(const Kind& kind) {
  return [kind](const Dense& x, const AttentionOptions& options) {
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions with_lse = options;
    with_lse.lse = r.lse_view();
    const Values gate = gates(x, kind);
    const fovea::Status status = fovea::gated_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), gate.view(),
                                                        with_lse, kind.function, kind.form);
    INFO(status.message());
    REQUIRE(status.ok());
    return r;
  };
}

Ask ask_with(const Kind& kind) {
  return [kind](const Dense& x, const AttentionOptions& options) {
    const Values gate = gates(x, kind);
    Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
    std::vector<double> want(e.out.size());
    const Tensor<double> out = fovea::bhsd(want.data(), x.q.batch, x.q.heads, x.q.len, x.v.dim);
    const bool add = kind.form == GateForm::add;
    fovea::reference::gated(
        x.q.view(), x.k.view(), x.v.view(), out, gate.view(), options, [&](double g) { return gate_of(kind.function, g); },
        add);
    std::size_t n = 0;
    for (index_t b = 0; b < x.q.batch; ++b) {
      for (index_t h = 0; h < x.q.heads; ++h) {
        for (index_t i = 0; i < x.q.len; ++i) {
          for (index_t d = 0; d < x.v.dim; ++d, ++n) {
            const double g = double{gate.view()(kind.batch == 1 ? 0 : b, kind.heads == 1 ? 0 : h, i, kind.dim == 1 ? 0 : d)};
            const double f = std::abs(gate_of(kind.function, g));
            // The gate's error reaches y as it is, and the sum rounds once; or it is a share of y, and the product rounds.
            e.out_error[n] = add ? e.out_error[n] + kUnit * (f * (gate_units(g) + 1) + std::abs(want[n])) + 1e-37
                                 : f * e.out_error[n] + std::abs(want[n]) * kUnit * (gate_units(g) + 2) + 1e-37;
          }
        }
      }
    }
    e.out = want;
    return e;
  };
}

}   // namespace

TEST_CASE("gated: against the reference", "[gated]") {
  for (const Kind kind : {Kind{GateFunction::sigmoid, 0, 0, 0}, Kind{GateFunction::silu, 1, 0, 1},
                          Kind{GateFunction::silu, 0, 0, 0, GateForm::add}})
    check_around_softmax(run_with(kind), ask_with(kind), {{4, 2}, {1, 1}, {6, 2}});
}

TEST_CASE("gated: gates shared by heads, and one per head", "[gated]") {
  for (const Kind kind : {Kind{GateFunction::silu, 0, 1, 0}, Kind{GateFunction::sigmoid, 0, 0, 1},
                          Kind{GateFunction::silu, 1, 0, 1, GateForm::add}})
    check_case(run_with(kind), ask_with(kind), Dense(92, 2, 4, 2, 17, 40, 16, 20), {});
}

TEST_CASE("gated: open, half open and closed gates", "[gated]") {
  const Dense x(93, 1, 4, 2, 37, 60, 16, 20);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    options.regime = regime;
    const Result plain = attend(x, options);
    for (const index_t dim : {index_t{1}, x.v.dim}) {
      for (const auto& [logit, factor] :
           {std::pair{kInfinity, 1.f}, {100.f, 1.f}, {0.f, 0.5f}, {-kInfinity, 0.f}, {-100.f, 0.f}}) {
        const Values gate(1, 4, x.q.len, dim, logit);
        Result r = unwritten(x.q.view(), x.v.view());
        options.lse = r.lse_view();
        REQUIRE(fovea::attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, fovea::gated(gate.view())).ok());
        Result want = plain;
        for (float& value : want.out.data) value = factor * value + 0.f;
        INFO("gate " << logit << ", regime " << name(regime));
        bool equal = same_bits(r.lse, want.lse);
        for (std::size_t n = 0; n < want.out.data.size(); ++n) equal = equal && r.out.data[n] == want.out.data[n];
        CHECK(equal);
      }
    }
  }
}

TEST_CASE("gated: gates that add nothing, and rows that see nothing", "[gated]") {
  const Dense x(93, 1, 4, 2, 37, 60, 16, 20);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    options.regime = regime;
    for (const index_t dim : {index_t{1}, x.v.dim}) {
      const auto added = [&](float logit, const Dense& y) {
        const Values gate(1, 4, y.q.len, dim, logit);
        Result r = unwritten(y.q.view(), y.v.view());
        options.lse = r.lse_view();
        REQUIRE(fovea::attention(y.q.view(), y.k.view(), y.v.view(), r.out.view(), options,
                                 fovea::gated(gate.view(), GateFunction::silu, GateForm::add))
                    .ok());
        return r;
      };
      INFO("regime " << name(regime) << ", " << dim << " gates a row");
      options.causal = Causal::bottom_right;
      options.lse = {};
      const Result plain = attend(x, options);
      REQUIRE(std::all_of(plain.out.data.begin(), plain.out.data.end(), [](float value) { return value != 0.f; }));
      for (const float logit : {0.f, -0.f, -kInfinity, -100.f}) {
        INFO("gate " << logit);
        CHECK(same_bits(added(logit, x), plain));
      }
      // An output of -0 stays one where a gate of -0 is added, else it is 0.
      Dense zeros = x;
      std::fill(zeros.v.data.begin(), zeros.v.data.end(), -0.f);
      options.lse = {};
      const std::vector<float> bare = attend(zeros, options).out.data;
      CHECK(same_bits(added(-0.f, zeros).out.data, bare));
      CHECK(same_bits(added(-kInfinity, zeros).out.data, std::vector<float>(bare.size(), 0.f)));
      // More queries than keys: the first 23 rows are the gate alone.
      const Result r = added(2.f, Dense(102, 1, 4, 2, 60, 37, 16, 20));
      alignas(64) float lanes[fovea::kLanes];
      fovea::store(lanes, fovea::gate_factor(GateFunction::silu, fovea::f32(2.f)));
      bool alone = true;
      for (index_t h = 0; h < 4; ++h) {
        for (index_t i = 0; i < 23; ++i) {
          alone = alone && r.lse_at(0, h, i) == -kInfinity;
          for (index_t d = 0; d < 20; ++d) alone = alone && r.at(0, h, i, d) == lanes[0];
        }
      }
      CHECK(alone);
    }
  }
}

TEST_CASE("gated: the gate's function", "[gated]") {
  alignas(64) float lanes[fovea::kLanes];
  Random random(94);
  for (const GateFunction function : {GateFunction::sigmoid, GateFunction::silu}) {
    double worst = 0;
    for (int n = 0; n < 4000; ++n) {
      const float x = random.uniform(-86.f, 60.f) * (n % 3 == 0 ? 0.05f : 1.f);
      fovea::store(lanes, fovea::gate_factor(function, fovea::f32(x)));
      const double want = gate_of(function, double{x});
      worst = std::max(worst, std::abs(double{lanes[0]} - want) / (std::abs(want) * kUnit * gate_units(double{x})));
    }
    INFO(worst << " of the stated error");
    CHECK(worst <= 1);
    for (const auto& [x, want] : {std::pair{-kInfinity, 0.f}, {-1e30f, 0.f}, {-87.f, 0.f}}) {
      fovea::store(lanes, fovea::gate_factor(function, fovea::f32(x)));
      CHECK(lanes[0] == want);
    }
    fovea::store(lanes, fovea::gate_factor(function, fovea::f32(kNan)));
    CHECK(std::isnan(lanes[0]));
  }
}

TEST_CASE("gated: gates, queries and outputs of other formats", "[gated]") {
  const Dense x(95, 1, 2, 1, 19, 33, 16, 70);
  Values gate = gates(x, {GateFunction::sigmoid, 0, 0, 0});
  std::vector<fovea::bf16> small(gate.data.size());
  for (std::size_t n = 0; n < small.size(); ++n) {
    small[n] = fovea::convert<fovea::bf16>(gate.data[n]);
    gate.data[n] = fovea::convert<float>(small[n]);
  }
  std::vector<double> wide(gate.data.begin(), gate.data.end());
  // A strided gate, the features of two heads interleaved.
  std::vector<float> mixed(gate.data.size());
  const Tensor<float> strided{mixed.data(), {1, 2, 19, 70}, {2 * 19 * 70, 1, 140, 2}};
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 19; ++i) {
      for (index_t d = 0; d < 70; ++d) strided(0, h, i, d) = gate.view()(0, h, i, d);
    }
  }
  for (const auto& [function, form] :
       {std::pair{GateFunction::sigmoid, GateForm::multiply}, std::pair{GateFunction::silu, GateForm::add}}) {
    const auto with = [&, f = function, how = form](const Operand& logits) {
      Result r = unwritten(x.q.view(), x.v.view());
      REQUIRE(fovea::gated_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), logits, {}, f, how).ok());
      return r.out.data;
    };
    const std::vector<float> want = with(gate.view());
    CHECK(same_bits(want, with(fovea::bhsd(small.data(), 1, 2, 19, 70))));
    CHECK(same_bits(want, with(fovea::bhsd(wide.data(), 1, 2, 19, 70))));
    CHECK(same_bits(want, with(strided)));
  }
}

TEST_CASE("gated: rows gated before the call", "[gated]") {
  Dense x(96, 2, 4, 2, 9, 30, 12, 20);
  // One gate for all tokens of a head commutes with the weighted sum over them.
  Values per_token(2, 2, 30, 1), per_row(2, 4, 9, 1);
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 4; ++h) {
      const float logit = 0.7f * static_cast<float>(2 * b + h / 2) - 1.f;
      for (index_t j = 0; j < 30; ++j) per_token.view()(b, h / 2, j, 0) = logit;
      for (index_t i = 0; i < 9; ++i) per_row.view()(b, h, i, 0) = logit;
    }
  }
  const Run behind = [&](const Dense& y, const AttentionOptions&) {
    Result r = unwritten(y.q.view(), y.v.view());
    REQUIRE(fovea::gated_attention(y.q.view(), y.k.view(), y.v.view(), r.out.view(), per_row.view()).ok());
    return r;
  };
  const Result after = behind(x, {});
  const Expected bare = expect_rows(x, {});
  Values gated_v = x.v;
  REQUIRE(fovea::gate_rows(x.v.view(), per_token.view(), gated_v.view()).ok());
  x.v = gated_v;
  const Result before = attend(x);
  for (std::size_t n = 0; n < bare.out.size(); ++n)
    CHECK(std::abs(double{after.out.data[n]} - double{before.out.data[n]}) <= 2 * bare.out_error[n]);

  // In place, to another place and in 16 bits; SiLU per feature.
  const Values gate = random_values(97, 2, 2, 30, 20), rows = random_values(98, 2, 2, 30, 20);
  Values in_place = rows, elsewhere(2, 2, 30, 20);
  std::vector<fovea::bf16> narrow(rows.data.size());
  REQUIRE(fovea::gate_rows(in_place.view(), gate.view(), in_place.view(), GateFunction::silu).ok());
  REQUIRE(fovea::gate_rows(rows.view(), gate.view(), elsewhere.view(), GateFunction::silu).ok());
  REQUIRE(fovea::gate_rows(rows.view(), gate.view(), fovea::bhsd(narrow.data(), 2, 2, 30, 20), GateFunction::silu).ok());
  CHECK(same_bits(in_place.data, elsewhere.data));
  std::vector<double> want(rows.data.begin(), rows.data.end());
  fovea::reference::gate_rows(fovea::bhsd(want.data(), 2, 2, 30, 20), gate.view(), fovea::reference::gate_silu);
  for (std::size_t n = 0; n < want.size(); ++n) {
    CHECK(std::abs(double{in_place.data[n]} - want[n]) <=
          kUnit * (gate_units(double{gate.data[n]}) + 1) * std::abs(want[n]));
    CHECK(narrow[n].bits == fovea::convert<fovea::bf16>(in_place.data[n]).bits);
  }

  // Added: the gate's error and one rounding of the sum.
  Values sums = rows;
  REQUIRE(fovea::gate_rows(sums.view(), gate.view(), sums.view(), GateFunction::silu, GateForm::add).ok());
  want.assign(rows.data.begin(), rows.data.end());
  fovea::reference::gate_rows(fovea::bhsd(want.data(), 2, 2, 30, 20), gate.view(), fovea::reference::gate_silu, true);
  for (std::size_t n = 0; n < want.size(); ++n) {
    const double g = double{gate.data[n]}, f = std::abs(gate_of(GateFunction::silu, g));
    CHECK(std::abs(double{sums.data[n]} - want[n]) <= kUnit * ((gate_units(g) + 1) * f + std::abs(want[n])));
  }
}

TEST_CASE("gated: the two published layouts of the fused projection", "[gated]") {
  constexpr index_t kHeads = 4, kKvHeads = 2, kGroup = 2, kLen = 21, kDim = 16;
  const Dense x(99, 1, kHeads, kKvHeads, kLen, kLen, kDim, kDim);
  for (const index_t gate_dim : {index_t{1}, kDim}) {
    const Values gate = random_values(100, 1, kHeads, kLen, gate_dim);
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    options.regime = Regime::prefill;
    Result want = unwritten(x.q.view(), x.v.view());
    REQUIRE(fovea::gated_attention(x.q.view(), x.k.view(), x.v.view(), want.out.view(), gate.view(), options).ok());

    std::vector<float> per_group(static_cast<std::size_t>(kLen * kHeads * (kDim + gate_dim)));
    std::vector<float> per_head(static_cast<std::size_t>(kLen * kHeads * 2 * kDim));
    for (index_t s = 0; s < kLen; ++s) {
      for (index_t h = 0; h < kHeads; ++h) {
        float* const group = per_group.data() + (s * kKvHeads + h / kGroup) * kGroup * (kDim + gate_dim);
        float* const head = per_head.data() + (s * kHeads + h) * 2 * kDim;
        for (index_t d = 0; d < kDim; ++d) {
          group[h % kGroup * kDim + d] = head[d] = x.q.view()(0, h, s, d);
          if (gate_dim == kDim) head[kDim + d] = gate.view()(0, h, s, d);
        }
        for (index_t d = 0; d < gate_dim; ++d) group[kGroup * kDim + h % kGroup * gate_dim + d] = gate.view()(0, h, s, d);
      }
    }
    const auto grouped =
        fovea::query_gate_per_group(std::as_const(per_group).data(), kLen, kKvHeads, kGroup, kDim, gate_dim);
    Result a = unwritten(x.q.view(), x.v.view());
    REQUIRE(fovea::gated_attention(grouped.q, fovea::heads_as_batch(x.k.view(), kKvHeads),
                                   fovea::heads_as_batch(x.v.view(), kKvHeads),
                                   fovea::heads_as_batch(a.out.view(), kKvHeads), grouped.gate, options)
                .ok());
    CHECK(same_bits(a.out.data, want.out.data));
    if (gate_dim != kDim) continue;
    const auto fused = fovea::query_gate_per_head(std::as_const(per_head).data(), 1, kLen, kHeads, kDim);
    Result b = unwritten(x.q.view(), x.v.view());
    REQUIRE(fovea::gated_attention(fused.q, x.k.view(), x.v.view(), b.out.view(), fused.gate, options).ok());
    CHECK(same_bits(b.out.data, want.out.data));
  }
}

TEST_CASE("gated: refusals write nothing", "[gated][errors]") {
  const Dense x(101, 2, 4, 2, 5, 8, 8, 8);
  Values gate(2, 4, 5, 8), out(2, 4, 5, 8, canary());
  const auto refused = [&](const Operand& g, const char* words, const AttentionOptions& options = {}) {
    const fovea::Status status = fovea::gated_attention(x.q.view(), x.k.view(), x.v.view(), out.view(), g, options);
    INFO(status.message());
    CHECK(!status.ok());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  refused(fovea::bhsd(gate.data.data(), 2, 3, 5, 8), "gate is [2, 3, 5, 8], must be [2 | 1, 4 | 1, 5, 8 | 1]");
  refused(fovea::bhsd(gate.data.data(), 2, 4, 1, 8), "gate is [2, 4, 1, 8]");
  refused(fovea::bhsd<float>(nullptr, 2, 4, 5, 8), "gate has null data");
  refused(out.view(), "overlaps gate");
  AttentionOptions shared;
  shared.workspace = std::as_writable_bytes(std::span(gate.data));
  refused(gate.view(), "workspace", shared);
  const auto nowhere = fovea::gated(fovea::bhsd<float>(nullptr, 2, 4, 5, 8));
  CHECK(fovea::attention(x.q.view(), x.k.view(), x.v.view(), out.view(), {}, nowhere).code() == fovea::Code::invalid_argument);
  AttentionOptions capped;
  capped.softcap = 20.f;
  refused(gate.view(), "softcap", capped);
  AttentionOptions lse;
  lse.lse = {gate.data.data(), {2, 4, 5}, {20, 5, 1}};
  refused(gate.view(), "lse [", lse);
  const fovea::Status rows = fovea::gate_rows(x.v.view(), fovea::bhsd(gate.data.data(), 2, 2, 5, 8), out.view());
  CHECK(!rows.ok());
  Values shifted(1, 1, 2, 40);
  CHECK(!fovea::gate_rows(cut(shifted.view(), 3, 0, 39), shifted.view(), cut(shifted.view(), 3, 1, 39)).ok());
}
