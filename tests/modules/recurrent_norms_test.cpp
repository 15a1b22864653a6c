// SPDX-License-Identifier: Apache-2.0
#include "fovea/modules/recurrent_norms.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/reference/gated_delta.hpp"
#include "fovea/reference/kda.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"
#include "support/tolerance.hpp"

namespace {

using fovea::f32;
using fovea::GatedRmsNorm;
using fovea::index_t;
using fovea::NormOrder;
using fovea::Operand;
using fovea::OutputGate;
using fovea::Tensor;
using test::kUnit;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> numbers(index_t count, float low, float high, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<float> x;
  for (index_t n = 0; n < count; ++n) x.push_back(random.uniform(low, high));
  return x;
}

float lane0(f32 x) { return fovea::first_lane(x); }

// |x| that no gate of a model reaches, in steps that are no round numbers.
std::vector<float> arguments() {
  std::vector<float> x;
  for (float at = -86; at < 90; at += 0.0731f) x.push_back(at);
  for (const float small : {0.f, 1e-30f, -1e-30f, 1e-7f, -1e-7f, 1e-3f, -1e-3f}) x.push_back(small);
  return x;
}

double act(OutputGate gate, double z) {
  const double s = fovea::reference::logistic(z);
  return gate == OutputGate::silu ? z * s : gate == OutputGate::sigmoid ? s : 1;
}

}   // namespace

TEST_CASE("softplus against double, within its bound", "[recurrent][norms]") {
  double worst = 0;
  for (const float x : arguments()) {
    const double exact = double{x}, wanted = fovea::reference::softplus(exact), units = 16 + 2 * std::max(-exact, 0.);
    worst = std::max(worst, std::abs(lane0(fovea::gates::softplus(f32(x))) - wanted) / (units * kUnit * wanted));
  }
  CHECK(worst <= 1);
  CHECK(worst > 0.02);   // it was measured at all
}

TEST_CASE("softplus at the edges", "[recurrent][norms]") {
  using fovea::gates::softplus;
  CHECK(lane0(softplus(f32(kInfinity))) == kInfinity);
  CHECK(lane0(softplus(f32(-kInfinity))) == 0.f);
  CHECK(lane0(softplus(f32(1e30f))) == 1e30f);
  CHECK(lane0(softplus(f32(-40.f))) == Catch::Approx(std::exp(-40.)).epsilon(1e-5));   // log(1 + e^x) in fp32 is 0 here
  CHECK(std::isnan(lane0(softplus(f32(test::canary())))));
}

TEST_CASE("l2_norm against double, both floors, rows of zeros", "[recurrent][norms]") {
  for (const index_t dim : {1, 3, 16, 64, 65, 128, 200}) {
    const index_t batch = 2, heads = 3, len = 4;
    std::vector<float> x = numbers(batch * heads * len * dim, -2, 2, 3), y(x.size(), test::canary());
    std::fill_n(x.begin() + dim, dim, 0.f);
    const Tensor<const float> in = fovea::bshd<const float>(x.data(), batch, len, heads, dim);
    const Tensor<float> out = fovea::bshd(y.data(), batch, len, heads, dim);
    for (const fovea::L2Floor floor : {fovea::L2Floor::added, fovea::L2Floor::at_least}) {
      const float eps = floor == fovea::L2Floor::added ? 1e-6f : 1e-12f;
      REQUIRE(fovea::l2_norm(in, out, {}, eps, floor).ok());
      double worst = 0;
      for (std::size_t row = 0; row < x.size(); row += static_cast<std::size_t>(dim)) {
        double squares = 0;
        for (std::size_t d = row; d < row + static_cast<std::size_t>(dim); ++d) squares += double{x[d]} * double{x[d]};
        const double norm =
            floor == fovea::L2Floor::added ? std::sqrt(squares + double{eps}) : std::max(std::sqrt(squares), double{eps});
        // dim roundings in a sum of positive terms, halved by the root; root, division and product.
        const double allowed = (static_cast<double>(dim) / 2 + 4) * kUnit;
        for (std::size_t d = row; d < row + static_cast<std::size_t>(dim); ++d)
          worst =
              std::max(worst, test::in_budgets(y[d], double{x[d]} / norm, allowed * std::abs(double{x[d]} / norm) + 1e-30));
      }
      CAPTURE(dim, static_cast<int>(floor));
      CHECK(worst <= 1);
      CHECK(y[static_cast<std::size_t>(dim)] == 0.f);
    }
  }
}

TEST_CASE("gated_rms_norm against double: order, activation, groups, gain", "[recurrent][norms]") {
  const index_t batch = 2, heads = 2, len = 3;
  for (const auto& [dim, group] : {std::pair<index_t, index_t>{5, 0}, {96, 0}, {96, 32}, {130, 65}, {12, 3}, {1, 0}}) {
    const index_t count = batch * heads * len * dim;
    const std::vector<float> x = numbers(count, -2, 2, 4), z = numbers(count, -6, 6, 5),
                             gain = numbers(heads * dim, 0.5f, 1.5f, 6);
    std::vector<float> y(x.size());
    const Tensor<const float> in = fovea::bhsd<const float>(x.data(), batch, heads, len, dim);
    const Tensor<const float> gate = fovea::bhsd<const float>(z.data(), batch, heads, len, dim);
    const Tensor<float> out = fovea::bhsd(y.data(), batch, heads, len, dim);
    for (const NormOrder order : {NormOrder::norm_first, NormOrder::gate_first}) {
      for (const OutputGate activation : {OutputGate::none, OutputGate::sigmoid, OutputGate::silu}) {
        for (const int gains : {0, 1, 2}) {   // none, one row for all heads, one per head
          const Operand grown =
              gains == 0 ? Operand() : Operand(fovea::bhsd<const float>(gain.data(), 1, gains == 1 ? 1 : heads, 1, dim));
          const GatedRmsNorm norm{.eps = 1e-5f, .activation = activation, .order = order, .group = group};
          REQUIRE(
              fovea::gated_rms_norm(in, activation == OutputGate::none ? Operand() : Operand(gate), grown, out, norm).ok());
          double worst = 0;
          const index_t shared = group == 0 ? dim : group;
          for (index_t b = 0; b < batch; ++b) {
            for (index_t h = 0; h < heads; ++h) {
              for (index_t t = 0; t < len; ++t) {
                for (index_t first = 0; first < dim; first += shared) {
                  const auto open = [&](index_t d) { return act(activation, double{gate(b, h, t, d)}); };
                  const auto value = [&](index_t d) {
                    return double{in(b, h, t, d)} * (order == NormOrder::gate_first ? open(d) : 1);
                  };
                  double squares = 0;
                  for (index_t d = first; d < first + shared; ++d) squares += value(d) * value(d);
                  const double factor = 1 / std::sqrt(squares / static_cast<double>(shared) + double{1e-5f});
                  for (index_t d = first; d < first + shared; ++d) {
                    double wanted = value(d) * factor * (order == NormOrder::norm_first ? open(d) : 1);
                    if (gains > 0) wanted *= double{gain[static_cast<std::size_t>((gains == 2 ? h * dim : 0) + d)]};
                    // The sum's roundings; twice the gate's 13 + 2 |z| (its own, and the mean's); six products.
                    const double units = static_cast<double>(shared) / 2 + 2 * (13 + 12) + 6;
                    worst =
                        std::max(worst, test::in_budgets(out(b, h, t, d), wanted, units * kUnit * std::abs(wanted) + 1e-30));
                  }
                }
              }
            }
          }
          CAPTURE(dim, group, static_cast<int>(order), static_cast<int>(activation), gains);
          CHECK(worst <= 1);
        }
      }
    }
  }
}

TEST_CASE("the two orders of gated_rms_norm agree where the gate is one number a row", "[recurrent][norms]") {
  // A common factor passes through the norm: gate_first forgets it (eps aside), norm_first multiplies by it.
  const index_t len = 5, dim = 48;
  const std::vector<float> x = numbers(len * dim, 1, 2, 7), z = numbers(len, 1, 4, 8);
  std::vector<float> first(x.size()), last(x.size()), bare(x.size());
  const auto in = fovea::bhsd<const float>(x.data(), 1, 1, len, dim);
  const auto gate = fovea::bhsd<const float>(z.data(), 1, 1, len, 1);
  const auto run = [&](std::vector<float>& to, const GatedRmsNorm& norm) {
    REQUIRE(fovea::gated_rms_norm(in, gate, {}, fovea::bhsd(to.data(), 1, 1, len, dim), norm).ok());
  };
  run(first, {.eps = 0, .order = NormOrder::gate_first});
  run(last, {.eps = 0, .order = NormOrder::norm_first});
  run(bare, {.eps = 0, .activation = OutputGate::none});
  for (std::size_t n = 0; n < x.size(); ++n) {
    CHECK(first[n] == Catch::Approx(bare[n]).epsilon(1e-5));
    const double open = act(OutputGate::silu, double{z[n / static_cast<std::size_t>(dim)]});
    CHECK(last[n] == Catch::Approx(double{bare[n]} * open).epsilon(1e-5));
  }
}

TEST_CASE("log_decay_gate and beta_gate against the references", "[recurrent][norms]") {
  const index_t batch = 2, heads = 3, len = 5;
  for (const index_t dim : {1, 7, 128}) {
    const std::vector<float> x = numbers(batch * heads * len * dim, -12, 12, 9), a_log = numbers(heads, -1, 2.7f, 10);
    const std::vector<float> dt_bias = numbers(heads * dim, -3, 3, 11);
    std::vector<float> g(x.size());
    const auto in = fovea::bshd<const float>(x.data(), batch, len, heads, dim);
    const auto out = fovea::bshd(g.data(), batch, len, heads, dim);
    for (const bool per_channel : {false, true}) {
      for (const bool bounded : {false, true}) {
        fovea::LogDecayGate gate{.a_log = a_log};
        const index_t width = per_channel ? dim : 1;
        gate.dt_bias = {dt_bias.data(), {heads, width}, {width, 1}};
        if (bounded) gate.lower_bound = -5.f;
        REQUIRE(fovea::log_decay_gate(in, gate, out).ok());
        double worst = 0;
        for (index_t b = 0; b < batch; ++b) {
          for (index_t h = 0; h < heads; ++h) {
            for (index_t t = 0; t < len; ++t) {
              for (index_t d = 0; d < dim; ++d) {
                const double f = double{in(b, h, t, d)}, a = double{a_log[static_cast<std::size_t>(h)]};
                const double shift = double{gate.dt_bias(h, per_channel ? d : 0)}, z = f + shift;
                const double wanted =
                    bounded ? fovea::reference::kda_bounded_gate(f, a, shift, -5) : fovea::reference::kda_gate(f, a, shift);
                if (!bounded) CHECK(wanted == fovea::reference::gated_delta_gate(f, a, shift));
                // An error of the argument is at most an equal relative error of either function; 2 units of e^a_log.
                const double argument = std::abs(z) * (bounded ? std::exp(a) : 1);
                const double units = bounded ? 14 + 6 * argument : 20 + 3 * argument;
                const double smallest = 125 * std::log(2.) - argument < 1 ? 1e-36 : 0;   // where a sigmoid is closed
                worst =
                    std::max(worst, test::in_budgets(out(b, h, t, d), wanted, units * kUnit * std::abs(wanted) + smallest));
              }
            }
          }
        }
        CAPTURE(dim, per_channel, bounded);
        CHECK(worst <= 1);
      }
    }
    for (const bool negative : {false, true}) {
      REQUIRE(fovea::beta_gate(in, out, negative).ok());
      double worst = 0;
      for (std::size_t n = 0; n < x.size(); ++n) {
        const double wanted = (negative ? 2 : 1) * fovea::reference::logistic(double{x[n]});
        worst = std::max(worst, test::in_budgets(g[n], wanted, (12 + 2 * 12) * kUnit * wanted));
      }
      CHECK(worst <= 1);
    }
  }
  // Without parameters: softplus alone, and a sigmoid times the bound.
  const float x[] = {0.f};
  float g[1];
  const Tensor<float> out = fovea::bhsd(g, 1, 1, 1, 1);
  REQUIRE(fovea::log_decay_gate(fovea::bhsd(x, 1, 1, 1, 1), {}, out).ok());
  CHECK(g[0] == Catch::Approx(-std::log(2.)).epsilon(1e-6));
  REQUIRE(fovea::log_decay_gate(fovea::bhsd(x, 1, 1, 1, 1), {.lower_bound = -5.f}, out).ok());
  CHECK(g[0] == -2.5f);
}

TEST_CASE("norms and gates: lanes, in place, strides and stored types", "[recurrent][norms]") {
  const index_t batch = 2, heads = 3, len = 6, dim = 70, count = batch * heads * len * dim;
  const std::vector<float> x = numbers(count, -2, 2, 12), z = numbers(count, -2, 2, 13), gain = numbers(dim, 0.5f, 1.5f, 14);
  const Operand grown = fovea::bhsd<const float>(gain.data(), 1, 1, 1, dim);
  const auto tensor = [&](auto* data) { return fovea::bhsd(data, batch, heads, len, dim); };
  using Call =
      fovea::Status (*)(const Operand&, const Operand&, const Operand&, const Tensor<float>&, const fovea::Executor&);
  const Call calls[] = {
      [](const Operand& x_, const Operand&, const Operand&, const Tensor<float>& y, const fovea::Executor& e) {
        return fovea::l2_norm(x_, y, e);
      },
      [](const Operand& x_, const Operand& z_, const Operand& g, const Tensor<float>& y, const fovea::Executor& e) {
        return fovea::gated_rms_norm(x_, z_, g, y, {}, e);
      },
      [](const Operand& x_, const Operand& z_, const Operand& g, const Tensor<float>& y, const fovea::Executor& e) {
        return fovea::gated_rms_norm(x_, z_, g, y, {.order = NormOrder::gate_first, .group = 35}, e);
      },
      [](const Operand& x_, const Operand&, const Operand&, const Tensor<float>& y, const fovea::Executor& e) {
        return fovea::log_decay_gate(x_, {}, y, e);
      },
      [](const Operand& x_, const Operand&, const Operand&, const Tensor<float>& y, const fovea::Executor& e) {
        return fovea::beta_gate(x_, y, true, e);
      }};
  test::ThreadPerLane pool;
  for (const Call call : calls) {
    std::vector<float> plain(x.size()), lanes(x.size()), both = x;
    REQUIRE(call(tensor(x.data()), tensor(z.data()), grown, tensor(plain.data()), {}).ok());
    REQUIRE(call(tensor(x.data()), tensor(z.data()), grown, tensor(lanes.data()), fovea::Executor(pool, 3)).ok());
    CHECK(lanes == plain);
    REQUIRE(call(tensor(both.data()), tensor(z.data()), grown, tensor(both.data()), {}).ok());
    CHECK(both == plain);

    // The innermost stride is 2, rows and tokens have NaN around them, heads are innermost but one.
    const index_t room = 2 * dim + 1;
    test::Poisoned in(batch * len * heads * room), to(batch * len * heads * room);
    const Tensor<float> wide{in.data(), {batch, heads, len, dim}, {len * heads * room, room, heads * room, 2}};
    const Tensor<float> wide_out{to.data(), wide.extent, wide.stride};
    const auto each = [&](const auto& f) {
      for (index_t b = 0; b < batch; ++b) {
        for (index_t h = 0; h < heads; ++h) {
          for (index_t t = 0; t < len; ++t) {
            for (index_t d = 0; d < dim; ++d) f(b, h, t, d);
          }
        }
      }
    };
    each([&](index_t b, index_t h, index_t t, index_t d) { wide(b, h, t, d) = tensor(x.data())(b, h, t, d); });
    REQUIRE(call(wide, tensor(z.data()), grown, wide_out, {}).ok());
    CHECK(test::first_overwritten<4>(to, {wide_out}) == -1);
    bool same = true;
    each([&](index_t b, index_t h, index_t t, index_t d) {
      same = same && wide_out(b, h, t, d) == tensor(plain.data())(b, h, t, d);
    });
    CHECK(same);
  }

  // Of bf16 rows the same as of their numbers in fp32, rounded once at the end.
  std::vector<fovea::bf16> stored, out(x.size());
  std::vector<float> rounded, exact(x.size());
  for (const float number : x) {
    stored.push_back(fovea::convert<fovea::bf16>(number));
    rounded.push_back(fovea::convert<float>(stored.back()));
  }
  REQUIRE(fovea::gated_rms_norm(tensor(stored.data()), tensor(z.data()), grown, tensor(out.data())).ok());
  REQUIRE(fovea::gated_rms_norm(tensor(rounded.data()), tensor(z.data()), grown, tensor(exact.data())).ok());
  for (std::size_t n = 0; n < x.size(); ++n) CHECK(out[n].bits == fovea::convert<fovea::bf16>(exact[n]).bits);
  REQUIRE(fovea::l2_norm(tensor(stored.data()), tensor(out.data())).ok());
  REQUIRE(fovea::l2_norm(tensor(rounded.data()), tensor(exact.data())).ok());
  for (std::size_t n = 0; n < x.size(); ++n) CHECK(out[n].bits == fovea::convert<fovea::bf16>(exact[n]).bits);
}

TEST_CASE("norms and gates: tensors without heads are done at once, however many rows they would have", "[recurrent][norms]") {
  float memory[1] = {test::canary()};
  for (const index_t batch : {index_t{1}, index_t{1} << 40}) {   // the second has more rows than an index_t counts
    const auto in = fovea::bhsd<const float>(memory, batch, 0, index_t{1} << 40, 8);
    const auto out = fovea::bhsd(memory, batch, 0, index_t{1} << 40, 8);
    CHECK(fovea::l2_norm(in, out).ok());
    CHECK(fovea::gated_rms_norm(in, in, {}, out).ok());
    CHECK(fovea::beta_gate(in, out).ok());
  }
  CHECK(test::is_canary(memory[0]));
}

TEST_CASE("norms and gates: refusals name their numbers and write nothing", "[recurrent][norms][errors]") {
  using Catch::Matchers::ContainsSubstring;
  const std::vector<float> x = numbers(24, -1, 1, 15);
  std::vector<float> y(24, test::canary());
  const auto in = fovea::bhsd<const float>(x.data(), 1, 2, 3, 4);
  const auto out = fovea::bhsd(y.data(), 1, 2, 3, 4);
  const auto refused = [&](const fovea::Status& status) {
    CHECK(!status.ok());
    for (const float number : y) CHECK(test::is_canary(number));
    return std::string(status.message());
  };
  const auto other = fovea::bhsd<const float>(x.data(), 1, 2, 2, 4);
  const auto shifted = fovea::bhsd<const float>(y.data() + 1, 1, 2, 2, 4);
  const auto shifted_out = fovea::bhsd(y.data(), 1, 2, 2, 4);
  CHECK_THAT(refused(fovea::l2_norm(other, out)), ContainsSubstring("y is [1, 2, 3, 4], must be [1, 2, 2, 4]"));
  CHECK_THAT(refused(fovea::l2_norm(shifted, shifted_out)), ContainsSubstring("overlaps"));
  CHECK_THAT(refused(fovea::l2_norm(in, out, {}, -1.f)), ContainsSubstring("eps -1"));
  CHECK_THAT(refused(fovea::gated_rms_norm(in, other, {}, out)), ContainsSubstring("gate is [1, 2, 2, 4]"));
  CHECK_THAT(refused(fovea::gated_rms_norm(in, in, other, out)), ContainsSubstring("gain is [1, 2, 2, 4]"));
  CHECK_THAT(refused(fovea::gated_rms_norm(in, in, {}, out, {.group = 3})), ContainsSubstring("groups of 3"));
  const float one[1] = {};
  CHECK_THAT(refused(fovea::log_decay_gate(in, {.a_log = one}, out)), ContainsSubstring("a_log has 1 numbers for 2 heads"));
  CHECK_THAT(refused(fovea::log_decay_gate(in, {.dt_bias = {x.data(), {2, 3}, {3, 1}}}, out)),
             ContainsSubstring("dt_bias is [2, 3], must be [2, 1 | 4]"));
  CHECK_THAT(refused(fovea::log_decay_gate(in, {.lower_bound = 1.f}, out)), ContainsSubstring("lower_bound 1"));
  CHECK_THAT(refused(fovea::beta_gate(other, out)), ContainsSubstring("y is [1, 2, 3, 4]"));
}
