// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <complex>
#include <functional>
#include <string>

#include "catch_compat.hpp"
#include "fovea/reference/delta.hpp"
#include "fovea/reference/feature_maps.hpp"
#include "fovea/reference/gated_delta.hpp"
#include "fovea/reference/gla.hpp"
#include "fovea/reference/kda.hpp"
#include "fovea/reference/lightning.hpp"
#include "fovea/reference/linear.hpp"
#include "fovea/reference/log_linear.hpp"
#include "fovea/reference/lolcats.hpp"
#include "fovea/reference/mamba1.hpp"
#include "fovea/reference/mamba2.hpp"
#include "fovea/reference/mlstm.hpp"
#include "fovea/reference/retention.hpp"
#include "fovea/reference/rwkv4.hpp"
#include "fovea/reference/rwkv6.hpp"
#include "fovea/reference/rwkv7.hpp"
#include "fovea/reference/s4d.hpp"
#include "fovea/reference/short_conv.hpp"
#include "fovea/reference/simple_gla.hpp"
#include "reference/recurrent_golden.hpp"
#include "support/random.hpp"

using namespace fovea;
using reference::Vector;

namespace {

using In = Tensor<const double>;
using Out = Tensor<double>;

// Owned doubles of up to four axes.
struct Doubles {
  std::array<index_t, 4> extent{};
  std::vector<double> data;

  Doubles() = default;
  Doubles(index_t a, index_t b, index_t c, index_t d, double value = 0)
      : extent{a, b, c, d}, data(static_cast<std::size_t>(a * b * c * d), value) {}
  template <class F>
  static Doubles of(index_t a, index_t b, index_t c, index_t d, F&& f) {   // f(a, b, c, d)
    Doubles x(a, b, c, d);
    for (index_t i = 0; i < a; ++i) {
      for (index_t j = 0; j < b; ++j) {
        for (index_t k = 0; k < c; ++k) {
          for (index_t l = 0; l < d; ++l) x.view()(i, j, k, l) = f(i, j, k, l);
        }
      }
    }
    return x;
  }
  Out view() { return bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  In view() const { return bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  In c() const { return view(); }
  double squares() const {
    double sum = 0;
    for (const double x : data) sum += x * x;
    return sum;
  }
};

// Two orders of the same sum in double: up to 20 tokens with 10 roundings each, of numbers up to 10.
constexpr double kClose = 200 * 10 * 0x1p-53;

// The largest difference seen; a NaN is infinitely far.
struct Worst {
  double value = 0;
  void see(double a, double b) {
    const double error = std::abs(a - b);
    value = std::max(value, std::isnan(error) ? HUGE_VAL : error);
  }
  void see(const Doubles& a, const Doubles& b) {
    if (a.data.size() != b.data.size()) value = HUGE_VAL;
    for (std::size_t n = 0; n < std::min(a.data.size(), b.data.size()); ++n) see(a.data[n], b.data[n]);
  }
};

// The first axis away: [1, b, c, d] -> [b, c, d], and so on.
template <class T>
View<T, 3> rank3(Tensor<T> x) {
  return {x.data, {x.extent[1], x.extent[2], x.extent[3]}, {x.stride[1], x.stride[2], x.stride[3]}};
}
template <class T>
View<T, 2> rank2(Tensor<T> x) {
  return {x.data, {x.extent[2], x.extent[3]}, {x.stride[2], x.stride[3]}};
}
// [a * b, c, d, e] -> [a, b, c, d, e]
template <class T>
View<T, 5> rank5(Tensor<T> x, index_t a) {
  const index_t b = x.extent[0] / a;
  return {x.data,
          {a, b, x.extent[1], x.extent[2], x.extent[3]},
          {b * x.stride[0], x.stride[0], x.stride[1], x.stride[2], x.stride[3]}};
}

// ---------------------------------------------------------------------------------------------------- golden values

struct GoldenProblem {
  static constexpr index_t len = test::kGoldenLen, dim_k = test::kGoldenDimK, dim_v = test::kGoldenDimV;
  template <class F>
  static Doubles rows(index_t dim, F f) {
    return Doubles::of(1, 1, len, dim, [&](index_t, index_t, index_t t, index_t i) { return f(double(t), double(i)); });
  }
  Doubles q = rows(dim_k, test::golden_q), k = rows(dim_k, test::golden_k), raw_k = rows(dim_k, test::golden_raw_k);
  Doubles v = rows(dim_v, test::golden_v), gates = rows(dim_k, test::golden_gate), gate = rows(1, test::golden_gate);
  Doubles beta = rows(1, [](double t, double) { return test::golden_beta(t); });
  Doubles lambda = rows(5, test::golden_lambda);
  Doubles initial = Doubles::of(
      1, 1, dim_k, dim_v, [](index_t, index_t, index_t i, index_t j) { return test::golden_initial(double(i), double(j)); });
  Doubles out{1, 1, len, dim_v}, state{1, 1, dim_k, dim_v};

  RecurrentOptions<double> with(double scale) {
    return {.scale = scale, .initial_state = initial.c(), .final_state = state.view()};
  }
  RecurrentOptions<double> with_half() { return with(0.5); }

  void check(const char* name, double state_squares) const { check(name, out, state_squares); }
  static void check(const char* name, const Doubles& o, double state_squares) {
    INFO(name);
    const test::RecurrentGolden* golden = nullptr;
    for (const auto& each : test::kRecurrentGoldens) {
      if (std::string(each.name) == name) golden = &each;
    }
    REQUIRE(golden != nullptr);
    for (index_t j = 0; j < dim_v; ++j) {
      CHECK(std::abs(o.c()(0, 0, len - 1, j) - golden->last[static_cast<std::size_t>(j)]) <= test::kGoldenError);
    }
    CHECK(std::abs(o.squares() - golden->out_squares) <= test::kGoldenError);
    if (golden->state_squares >= 0) CHECK(std::abs(state_squares - golden->state_squares) <= test::kGoldenError);
  }
  void check(const char* name) const { check(name, out, state.squares()); }
};

}   // namespace

TEST_CASE("reference recurrent: the golden inputs") {
  const GoldenProblem x;
  CHECK(x.q.c()(0, 0, 12, 3) == Catch::Approx(-0.066321897).margin(test::kGoldenError));
  CHECK(x.k.c()(0, 0, 12, 3) == Catch::Approx(0.651449920).margin(test::kGoldenError));
  CHECK(x.v.c()(0, 0, 12, 2) == Catch::Approx(0.303118357).margin(test::kGoldenError));
  CHECK(x.beta.c()(0, 0, 12, 0) == Catch::Approx(0.817467146).margin(test::kGoldenError));
  CHECK(x.gate.c()(0, 0, 12, 0) == Catch::Approx(-0.173850983).margin(test::kGoldenError));
  CHECK(x.gates.c()(0, 0, 12, 3) == Catch::Approx(-0.068045636).margin(test::kGoldenError));
}

TEST_CASE("reference recurrent: golden values of the decay family") {
  GoldenProblem x;
  reference::linear(x.q.c(), x.k.c(), x.v.c(), x.out.view(), {.normalize = false}, x.with_half());
  x.check("linear");
  reference::simple_gla(x.q.c(), x.k.c(), x.v.c(), {x.gate.c()}, x.out.view(), x.with_half());
  x.check("simple_gla");
  reference::gla(x.q.c(), x.k.c(), x.v.c(), {x.gates.c()}, x.out.view(), x.with_half());
  x.check("gla");
  reference::linear(x.q.c(), x.k.c(), x.v.c(), x.out.view(), {}, {.final_state = x.state.view()}, reference::elu_features);
  x.check("elu");
  const double gamma[] = {31. / 32};
  reference::retention(x.q.c(), x.k.c(), x.v.c(), gamma, x.out.view(), x.with_half());
  x.check("retention");

  const double a[] = {-1.5};
  const Doubles d(1, 1, 1, 1, 0.7);
  reference::mamba2(x.v.c(), x.k.c(), x.q.c(), {x.beta.c(), a, rank2(d.c())}, x.out.view(), x.with(1));
  x.check("mamba2");

  const auto dt = GoldenProblem::rows(x.dim_v, [](double t, double j) { return test::golden_beta(t) * (1 + 0.1 * j); });
  const auto a1 = Doubles::of(1, 1, x.dim_v, x.dim_k, [](index_t, index_t, index_t, index_t n) { return -double(n + 1); });
  const Doubles d1(1, 1, 1, x.dim_v, 0.7);
  reference::mamba1(x.v.c(), x.k.c(), x.q.c(), {dt.c(), rank3(a1.c()), rank2(d1.c())}, x.out.view(), x.with(1));
  x.check("mamba1");
}

TEST_CASE("reference recurrent: golden values of the delta family") {
  GoldenProblem x;
  reference::delta(x.q.c(), x.k.c(), x.v.c(), x.beta.c(), x.out.view(), x.with_half());
  x.check("delta");
  reference::gated_delta(x.q.c(), x.k.c(), x.v.c(), {x.gate.c()}, x.beta.c(), x.out.view(), x.with_half());
  x.check("gated_delta");
  reference::kda(x.q.c(), x.k.c(), x.v.c(), {x.gates.c()}, x.beta.c(), x.out.view(), x.with_half());
  x.check("kda");
  Doubles doubled = x.beta;
  for (double& value : doubled.data) value *= 2;
  reference::kda(x.q.c(), x.k.c(), x.v.c(), {x.gates.c()}, doubled.c(), x.out.view(), x.with_half());
  x.check("kda, beta doubled");

  const auto scaled_k = GoldenProblem::rows(x.dim_k, [](double t, double i) { return 0.9 * test::golden_k(t, i); });
  const auto rate = GoldenProblem::rows(x.dim_k, [](double t, double i) { return 0.5 + 0.3 * std::sin(0.5 * t + i); });
  reference::rwkv7(x.q.c(), scaled_k.c(), x.v.c(), {x.gates.c()}, x.k.c(), rate.c(), x.out.view(), x.with(1));
  x.check("rwkv7");
}

TEST_CASE("reference recurrent: golden values of mechanisms that are other ones with other arguments") {
  GoldenProblem x;

  // Comba, S = alpha S + k (beta (v - S' p))' with p = 0.7 k, is RWKV-7's recurrence with kappa = p and kappa * a = beta k.
  const auto p = GoldenProblem::rows(x.dim_k, [](double t, double i) { return 0.7 * test::golden_k(t, i); });
  const auto rate = GoldenProblem::rows(x.dim_k, [](double t, double) { return test::golden_beta(t) / 0.7; });
  const auto beta_v =
      GoldenProblem::rows(x.dim_v, [](double t, double j) { return test::golden_beta(t) * test::golden_v(t, j); });
  reference::rwkv7(x.q.c(), x.k.c(), beta_v.c(), {x.gate.c()}, p.c(), rate.c(), x.out.view(), x.with_half());
  x.check("comba");

  // Gated DeltaProduct with two updates per token is Gated DeltaNet on twice as many tokens: the first of a pair decays, the
  // second reads.
  const index_t steps = 2 * x.len;
  const auto expanded = [&](index_t dim, auto first, auto second) {
    return Doubles::of(1, 1, steps, dim, [&](index_t, index_t, index_t n, index_t i) {
      return n % 2 == 0 ? first(double(n / 2), double(i)) : second(double(n / 2), double(i));
    });
  };
  const auto q2 = expanded(
      x.dim_k, [](double, double) { return 0.; }, test::golden_q);
  const auto k2 =
      expanded(x.dim_k, test::golden_k, [](double t, double i) { return test::golden_k(t, i == 3 ? 0 : i + 1); });
  const auto v2 = expanded(x.dim_v, test::golden_v, [](double t, double j) { return -test::golden_v(t, j) / 2; });
  const auto beta2 = expanded(
      1, [](double t, double) { return test::golden_beta(t); }, [](double t, double) { return test::golden_beta(t) / 2; });
  const auto g2 = expanded(1, test::golden_gate, [](double, double) { return 0.; });
  Doubles out2(1, 1, steps, x.dim_v);
  reference::gated_delta(q2.c(), k2.c(), v2.c(), {g2.c()}, beta2.c(), out2.view(), x.with_half());
  x.out = Doubles::of(1, 1, x.len, x.dim_v,
                      [&](index_t, index_t, index_t t, index_t j) { return out2.c()(0, 0, 2 * t + 1, j); });
  x.check("delta_product");

  // GDN-2, S = (I - k (b * k)') Diag(alpha) S + k (w * v)', is RWKV-7's with kappa = alpha * b * k and kappa * a = k.
  const auto b = [](double t, double i) { return 0.6 + 0.3 * std::sin(0.4 * t + i); };
  const auto erased = GoldenProblem::rows(
      x.dim_k, [&](double t, double i) { return std::exp(test::golden_gate(t, i)) * b(t, i) * test::golden_k(t, i); });
  const auto rate2 =
      GoldenProblem::rows(x.dim_k, [&](double t, double i) { return 1 / (std::exp(test::golden_gate(t, i)) * b(t, i)); });
  const auto written = GoldenProblem::rows(
      x.dim_v, [](double t, double j) { return (0.5 + 0.2 * std::cos(0.3 * t + j)) * test::golden_v(t, j); });
  reference::rwkv7(x.q.c(), x.k.c(), written.c(), {x.gates.c()}, erased.c(), rate2.c(), x.out.view(), x.with_half());
  x.check("gdn2");
}

TEST_CASE("reference recurrent: golden values of RWKV-4, RWKV-6, mLSTM and the convolution") {
  GoldenProblem x;
  const auto u = Doubles::of(1, 1, 1, x.dim_k, [](index_t, index_t, index_t, index_t i) { return 0.3 + 0.1 * double(i); });
  reference::rwkv6(x.q.c(), x.k.c(), x.v.c(), {x.gates.c()}, rank2(u.c()), x.out.view(), x.with(1));
  x.check("rwkv6");

  const auto w4 =
      Doubles::of(1, 1, 1, x.dim_v, [](index_t, index_t, index_t, index_t j) { return -(0.5 + 0.1 * double(j)); });
  const Doubles u4(1, 1, 1, x.dim_v, 0.2);
  const auto k4 = GoldenProblem::rows(x.dim_v, [](double t, double j) { return 3 * test::golden_raw_k(t, j); });
  reference::rwkv4(k4.c(), x.v.c(), {rank2(w4.c()), rank2(u4.c())}, x.out.view());
  x.check("rwkv4");

  const auto i = GoldenProblem::rows(1, [](double t, double) { return 2 * std::sin(t); });
  const auto f = GoldenProblem::rows(1, [](double t, double) { return 2 + std::cos(t); });
  Doubles m(1, 1, 1, 1);
  reference::mlstm(x.q.c(), x.raw_k.c(), x.v.c(), {.i = i.c(), .f = f.c(), .eps = 0, .final_m = rank2(m.view())},
                   x.out.view());
  x.check("mlstm");
  CHECK(std::abs(m.data[0] - test::kGoldenMlstmStabiliser) <= test::kGoldenError);

  const auto weight =
      Doubles::of(1, 1, x.dim_v, 4, [](index_t, index_t, index_t, index_t j) { return 0.1 * double(j + 1); });
  reference::short_conv(x.v.c(), {.weight = rank2(weight.c())}, x.out.view());
  x.check("short_conv");
}

TEST_CASE("reference recurrent: golden values of log-linear attention") {
  GoldenProblem x;
  Doubles levels(1, 5, x.dim_k, x.dim_v);
  const auto summed = [&] {
    Doubles sum(1, 1, x.dim_k, x.dim_v);
    for (std::size_t n = 0; n < levels.data.size(); ++n) sum.data[n % sum.data.size()] += levels.data[n];
    return sum.squares();
  };
  const LogLinearOptions<double> options{.level_weight = x.lambda.c(), .final_levels = rank5(levels.view(), 1)};
  reference::log_linear_simple_gla(x.q.c(), x.k.c(), x.v.c(), {x.gate.c()}, options, x.out.view());
  x.check("log_linear_mamba2", summed());
  reference::log_linear_gated_delta(x.q.c(), x.k.c(), x.v.c(), {x.gate.c()}, x.beta.c(), options, x.out.view());
  x.check("log_linear_gated_delta", summed());
}

// ------------------------------------------------------------------------- every mechanism over the same random problem

namespace {

// Inputs with one row per token first, then what a head has.
enum Input {
  kQ,
  kK,
  kV,
  kGate,
  kGates,
  kBeta,
  kBetas,
  kRate,
  kDt,
  kDts,
  kKeys,
  kI,
  kF,
  kLambda,
  kPerToken,
  kGamma = kPerToken,
  kSlope,
  kA,
  kD,
  kAs,
  kDs,
  kU,
  kW4,
  kU4,
  kInputs
};
constexpr index_t kDimK = 4, kDimV = 3, kLevels = 6;

struct Inputs {
  std::array<In, kInputs> all;

  const In& operator[](Input n) const { return all[n]; }
  index_t len() const { return all[kV].extent[2]; }
  // Axes: 0 batch, 1 head, 2 position.
  Inputs cut(std::size_t axis, index_t begin, index_t end) const {
    Inputs part = *this;
    for (int n = 0; n < (axis == 1 ? kInputs : kPerToken); ++n) {
      In& x = part.all[static_cast<std::size_t>(n)];
      x.data += begin * x.stride[axis];
      x.extent[axis] = end - begin;
    }
    return part;
  }
  std::vector<double> numbers(Input n) const {   // [head]
    std::vector<double> out;
    for (index_t h = 0; h < all[n].extent[1]; ++h) out.push_back(all[n](0, h, 0, 0));
    return out;
  }
  View<const double, 2> rows(Input n) const {   // [head, dim]
    const In& x = all[n];
    return {x.data, {x.extent[1], x.extent[3]}, {x.stride[1], x.stride[3]}};
  }
};

struct Heads {
  index_t q = 2, k = 2, v = 2;
  index_t states() const { return std::max(k, v); }
};

struct Problem {
  std::array<Doubles, kInputs> all;

  Problem(std::uint64_t seed, index_t batch, Heads heads, index_t len, bool resets = false) {
    test::Random random(seed);
    const auto normal = [&](auto...) { return static_cast<double>(random.normal()); };
    const auto uniform = [&](double low, double high) {
      return [&random, low, high](auto...) { return low + (high - low) * random.uniform(); };
    };
    // Decays of all sizes; with `resets` also none, a huge one and a complete one.
    const auto gate = [&](auto...) {
      const double g = -0.05 - random.uniform();
      if (!resets) return g;
      return random.pick({g, g, g, g, 0., -100., -HUGE_VAL});
    };
    const auto tokens = [&](Input n, index_t head_count, index_t dim, auto&& f) {
      all[n] = Doubles::of(batch, head_count, len, dim, f);
    };
    const index_t states = heads.states();
    tokens(kQ, heads.q, kDimK, normal);
    tokens(kK, heads.k, kDimK, normal);
    tokens(kV, heads.v, kDimV, normal);
    tokens(kGate, states, 1, gate);
    tokens(kGates, states, kDimK, gate);
    tokens(kBeta, states, 1, uniform(0, 2));
    tokens(kBetas, states, kDimV, uniform(0, 2));
    tokens(kRate, states, kDimK, uniform(0, 1));
    tokens(kDt, states, 1, uniform(0, 0.5));
    tokens(kDts, states, kDimV, uniform(0, 0.5));
    tokens(kKeys, states, kDimV, normal);
    tokens(kI, states, 1, normal);
    tokens(kF, states, 1, normal);
    tokens(kLambda, states, kLevels, uniform(0, 2));
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads.k; ++h) {
        for (index_t t = 0; t < len; ++t) {
          Vector k = reference::row(all[kK].c(), b, h, t);
          k /= std::sqrt(reference::dot(k, k));
          reference::put(all[kK].view(), b, h, t, k);
        }
      }
    }
    const auto head = [&](Input n, index_t rows, index_t dim, auto&& f) { all[n] = Doubles::of(1, states, rows, dim, f); };
    head(kGamma, 1, 1, uniform(0.5, 1));
    head(kSlope, 1, 1, uniform(0, 1));
    head(kA, 1, 1, uniform(-3, -1));
    head(kD, 1, 1, normal);
    head(kAs, kDimV, kDimK, uniform(-3, -1));
    head(kDs, 1, kDimV, normal);
    head(kU, 1, kDimK, normal);
    head(kW4, 1, kDimV, uniform(-2, -0.1));
    head(kU4, 1, kDimV, normal);
  }

  Inputs view() const {
    Inputs x;
    for (std::size_t n = 0; n < all.size(); ++n) x.all[n] = all[n].view();
    return x;
  }
};

// All that a mechanism may hand on. `v_first` is the layout of s and levels.
struct Carry {
  index_t sequences, heads;
  StateLayout layout;
  Doubles s, n, m, rwkv4, levels;

  Carry(index_t sequence_count, index_t head_count, StateLayout state_layout = StateLayout::k_first)
      : sequences(sequence_count),
        heads(head_count),
        layout(state_layout),
        n(1, sequences, heads, kDimK),
        m(1, 1, sequences, heads),
        rwkv4(sequences, heads, 3, kDimV) {
    const bool v_first = layout == StateLayout::v_first;
    s = Doubles(sequences, heads, v_first ? kDimV : kDimK, v_first ? kDimK : kDimV);
    levels = Doubles(sequences * heads, kLevels, v_first ? kDimV : kDimK, v_first ? kDimK : kDimV);
    for (index_t b = 0; b < sequences; ++b) {
      for (index_t h = 0; h < heads; ++h) reference::put(rwkv4.view(), b, h, 2, Vector(-1e38, kDimV));
    }
  }
  bool operator==(const Carry& o) const {
    return s.data == o.s.data && n.data == o.n.data && m.data == o.m.data && rwkv4.data == o.rwkv4.data &&
           levels.data == o.levels.data;
  }
};

struct Setup {
  const Carry& from;
  Carry& to;
  HeadMap head_map = HeadMap::blocks;
  std::vector<index_t> cu_len = {}, first_pos = {};

  RecurrentOptions<double> options() const {
    return {.head_map = head_map,
            .layout = from.layout,
            .initial_state = from.s.view(),
            .final_state = to.s.view(),
            .cu_len = cu_len};
  }
  LinearOptions<double> linear(bool normalize) const {
    return {.normalize = normalize, .initial_key_sum = rank3(from.n.view()), .final_key_sum = rank3(to.n.view())};
  }
  LogLinearOptions<double> levels(const Inputs& x) const {
    return {.level_weight = x[kLambda],
            .first_pos = first_pos,
            .initial_levels = rank5(from.levels.view(), from.sequences),
            .final_levels = rank5(to.levels.view(), to.sequences)};
  }
};

struct Mechanism {
  const char* name;
  std::function<void(const Inputs&, const Setup&, Out)> run;
};

const std::vector<Mechanism>& mechanisms() {
  static const std::vector<Mechanism> list = {
      {"linear", [](const Inputs& x, const Setup& s,
                    Out out) { reference::linear(x[kQ], x[kK], x[kV], out, s.linear(false), s.options()); }},
      {"elu",
       [](const Inputs& x, const Setup& s, Out out) {
         reference::linear(x[kQ], x[kK], x[kV], out, s.linear(true), s.options(), reference::elu_features);
       }},
      {"retention", [](const Inputs& x, const Setup& s,
                       Out out) { reference::retention(x[kQ], x[kK], x[kV], x.numbers(kGamma), out, s.options()); }},
      {"lightning", [](const Inputs& x, const Setup& s,
                       Out out) { reference::lightning(x[kQ], x[kK], x[kV], x.numbers(kSlope), out, s.options()); }},
      {"simple_gla", [](const Inputs& x, const Setup& s,
                        Out out) { reference::simple_gla(x[kQ], x[kK], x[kV], {x[kGate]}, out, s.options()); }},
      {"gla",
       [](const Inputs& x, const Setup& s, Out out) { reference::gla(x[kQ], x[kK], x[kV], {x[kGates]}, out, s.options()); }},
      {"mamba1",
       [](const Inputs& x, const Setup& s, Out out) {
         reference::mamba1(x[kV], x[kK], x[kQ], {x[kDts], rank3(x[kAs]), x.rows(kDs)}, out, s.options());
       }},
      {"mamba2",
       [](const Inputs& x, const Setup& s, Out out) {
         const std::vector<double> a = x.numbers(kA);
         reference::mamba2(x[kV], x[kK], x[kQ], {x[kDt], a, x.rows(kD)}, out, s.options());
       }},
      {"rwkv4",
       [](const Inputs& x, const Setup& s, Out out) {
         RecurrentOptions<double> options = s.options();
         options.layout = StateLayout::k_first;
         options.initial_state = s.from.rwkv4.view();
         options.final_state = s.to.rwkv4.view();
         reference::rwkv4(x[kKeys], x[kV], {x.rows(kW4), x.rows(kU4)}, out, options);
       }},
      {"rwkv6", [](const Inputs& x, const Setup& s,
                   Out out) { reference::rwkv6(x[kQ], x[kK], x[kV], {x[kGates]}, x.rows(kU), out, s.options()); }},
      {"rwkv7", [](const Inputs& x, const Setup& s,
                   Out out) { reference::rwkv7(x[kQ], x[kK], x[kV], {x[kGates]}, x[kK], x[kRate], out, s.options()); }},
      {"mlstm",
       [](const Inputs& x, const Setup& s, Out out) {
         const MlstmParameters<double> gates{.i = x[kI],
                                             .f = x[kF],
                                             .eps = 0,
                                             .initial_n = rank3(s.from.n.view()),
                                             .final_n = rank3(s.to.n.view()),
                                             .initial_m = rank2(s.from.m.view()),
                                             .final_m = rank2(s.to.m.view())};
         reference::mlstm(x[kQ], x[kK], x[kV], gates, out, s.options());
       }},
      {"delta",
       [](const Inputs& x, const Setup& s, Out out) { reference::delta(x[kQ], x[kK], x[kV], x[kBeta], out, s.options()); }},
      {"gated_delta", [](const Inputs& x, const Setup& s,
                         Out out) { reference::gated_delta(x[kQ], x[kK], x[kV], {x[kGate]}, x[kBeta], out, s.options()); }},
      {"kda", [](const Inputs& x, const Setup& s,
                 Out out) { reference::kda(x[kQ], x[kK], x[kV], {x[kGates]}, x[kBeta], out, s.options()); }},
      {"kda, beta per value channel",
       [](const Inputs& x, const Setup& s, Out out) {
         reference::kda(x[kQ], x[kK], x[kV], {x[kGates]}, x[kBetas], out, s.options());
       }},
      {"log_linear_simple_gla",
       [](const Inputs& x, const Setup& s, Out out) {
         reference::log_linear_simple_gla(x[kQ], x[kK], x[kV], {x[kGate]}, s.levels(x), out, s.options());
       }},
      {"log_linear_mamba2",
       [](const Inputs& x, const Setup& s, Out out) {
         const std::vector<double> a = x.numbers(kA);
         reference::log_linear_mamba2(x[kV], x[kK], x[kQ], {.dt = x[kDt], .a = a}, s.levels(x), out, s.options());
       }},
      {"log_linear_gated_delta",
       [](const Inputs& x, const Setup& s, Out out) {
         reference::log_linear_gated_delta(x[kQ], x[kK], x[kV], {x[kGate]}, x[kBeta], s.levels(x), out, s.options());
       }},
  };
  return list;
}

// A state worth carrying: what some tokens of another problem leave behind.
constexpr index_t kUsed = 5;
Carry used_state(const Mechanism& mechanism, index_t sequences, Heads heads, StateLayout layout = StateLayout::k_first) {
  const Problem before(77, sequences, heads, kUsed);
  const Carry empty(sequences, heads.states(), layout);
  Carry carry = empty;
  Doubles out(sequences, std::max(heads.q, heads.states()), kUsed, kDimV);
  mechanism.run(before.view(), {empty, carry}, out.view());
  return carry;
}

Doubles transposed(const Doubles& x) {
  return Doubles::of(x.extent[0], x.extent[1], x.extent[3], x.extent[2],
                     [&](index_t a, index_t b, index_t c, index_t d) { return x.c()(a, b, d, c); });
}
Doubles repeated(const Doubles& x, index_t heads, HeadMap map) {
  return Doubles::of(x.extent[0], heads, x.extent[2], x.extent[3], [&](index_t b, index_t h, index_t t, index_t d) {
    return x.c()(b, map == HeadMap::tiled ? h % x.extent[1] : h / (heads / x.extent[1]), t, d);
  });
}
Doubles slice(const Doubles& x, index_t batch, index_t begin, index_t end) {
  return Doubles::of(1, x.extent[1], end - begin, x.extent[3],
                     [&](index_t, index_t h, index_t t, index_t d) { return x.c()(batch, h, begin + t, d); });
}

}   // namespace

TEST_CASE("reference recurrent: a sequence split in two at any point is the whole one, bit for bit") {
  const Heads heads;
  const index_t len = 9;
  const Problem problem(1, 2, heads, len);
  const Inputs x = problem.view();
  for (const Mechanism& mechanism : mechanisms()) {
    INFO(mechanism.name);
    const Carry from = used_state(mechanism, 2, heads);
    Carry whole_end = from;
    Doubles whole(2, 2, len, kDimV);
    mechanism.run(x, {from, whole_end, {}, {}, {kUsed, kUsed}}, whole.view());
    for (index_t at = 0; at <= len; ++at) {
      INFO("split at " << at);
      Carry middle = from, end = from;
      Doubles first(2, 2, at, kDimV), second(2, 2, len - at, kDimV);
      mechanism.run(x.cut(2, 0, at), {from, middle, {}, {}, {kUsed, kUsed}}, first.view());
      mechanism.run(x.cut(2, at, len), {middle, end, {}, {}, {kUsed + at, kUsed + at}}, second.view());
      if (at == 0) CHECK(middle == from);
      CHECK(end == whole_end);
      for (index_t b = 0; b < 2; ++b) {
        CHECK(slice(whole, b, 0, at).data == slice(first, b, 0, at).data);
        CHECK(slice(whole, b, at, len).data == slice(second, b, 0, len - at).data);
      }
    }
  }
}

TEST_CASE("reference recurrent: initial and final state in the same memory") {
  const Problem problem(2, 1, {}, 6);
  for (const Mechanism& mechanism : mechanisms()) {
    INFO(mechanism.name);
    const Carry from = used_state(mechanism, 1, {});
    Carry to = from, both = from;
    Doubles out(1, 2, 6, kDimV), again = out;
    mechanism.run(problem.view(), {from, to, {}, {}, {kUsed}}, out.view());
    mechanism.run(problem.view(), {both, both, {}, {}, {kUsed}}, again.view());
    CHECK(out.data == again.data);
    CHECK(both == to);
  }
}

TEST_CASE("reference recurrent: sequences packed one after the other are the single ones, bit for bit") {
  const Heads heads;
  const std::vector<index_t> cu_len{0, 4, 4, 5, 11};   // one without tokens, one of a single token
  const auto sequences = static_cast<index_t>(cu_len.size()) - 1;
  const Problem problem(3, 1, heads, cu_len.back());
  const Inputs x = problem.view();
  for (const Mechanism& mechanism : mechanisms()) {
    INFO(mechanism.name);
    const Carry from = used_state(mechanism, sequences, heads);
    Carry packed = from;
    Doubles out(1, 2, cu_len.back(), kDimV);
    mechanism.run(x, {from, packed, {}, cu_len, std::vector<index_t>(4, kUsed)}, out.view());

    // Alone, a sequence has the n-th state at place 0.
    for (index_t n = 0; n < sequences; ++n) {
      INFO("sequence " << n);
      const auto only = [&](const Doubles& all, std::size_t axis, index_t group) {
        Doubles part = all;
        part.extent[axis] = group;
        const std::size_t size = all.data.size() / static_cast<std::size_t>(sequences);
        const auto begin = all.data.begin() + n * static_cast<std::ptrdiff_t>(size);
        part.data.assign(begin, begin + static_cast<std::ptrdiff_t>(size));
        return part;
      };
      const auto alone = [&](const Carry& all) {
        Carry part(1, heads.states());
        part.s = only(all.s, 0, 1);
        part.n = only(all.n, 1, 1);
        part.m = only(all.m, 2, 1);
        part.rwkv4 = only(all.rwkv4, 0, 1);
        part.levels = only(all.levels, 0, heads.states());
        return part;
      };
      const index_t begin = cu_len[static_cast<std::size_t>(n)], end = cu_len[static_cast<std::size_t>(n) + 1];
      const Carry single_from = alone(from);
      Carry single_to = single_from;
      Doubles single(1, 2, end - begin, kDimV);
      mechanism.run(x.cut(2, begin, end), {single_from, single_to, {}, {}, {kUsed}}, single.view());
      CHECK(single_to == alone(packed));
      CHECK(single.data == slice(out, 0, begin, end).data);
    }
  }
}

TEST_CASE("reference recurrent: a state with dim_v first is the other one transposed, bit for bit") {
  const Problem problem(4, 1, {}, 6);
  for (const Mechanism& mechanism : mechanisms()) {
    INFO(mechanism.name);
    const Carry k_first = used_state(mechanism, 1, {}), v_first = used_state(mechanism, 1, {}, StateLayout::v_first);
    CHECK(transposed(k_first.s).data == v_first.s.data);
    Carry k_first_end = k_first, v_first_end = v_first;
    Doubles out(1, 2, 6, kDimV), other = out;
    mechanism.run(problem.view(), {k_first, k_first_end, {}, {}, {kUsed}}, out.view());
    mechanism.run(problem.view(), {v_first, v_first_end, {}, {}, {kUsed}}, other.view());
    CHECK(out.data == other.data);
    CHECK(transposed(k_first_end.s).data == v_first_end.s.data);
    CHECK(transposed(k_first_end.levels).data == v_first_end.levels.data);
    CHECK(k_first_end.n.data == v_first_end.n.data);
  }
}

TEST_CASE("reference recurrent: shared heads are repeated heads, bit for bit") {
  for (const HeadMap map : {HeadMap::blocks, HeadMap::tiled}) {
    // Fewer keys than values (GVA), and more queries than keys and values.
    for (const Heads heads : {Heads{2, 2, 4}, Heads{4, 2, 2}, Heads{1, 1, 4}}) {
      const Problem problem(5, 1, heads, 6);
      Problem wide = problem;
      for (Doubles& each : wide.all) each = repeated(each, 4, map);
      for (const Mechanism& mechanism : mechanisms()) {
        if (std::string(mechanism.name) == "rwkv4" && heads.v == 2) continue;   // it has no queries
        INFO(mechanism.name << ", heads " << heads.q << " " << heads.k << " " << heads.v
                            << (map == HeadMap::tiled ? " tiled" : ""));
        const Carry empty(1, heads.states()), wide_empty(1, 4);
        Carry end = empty, wide_end = wide_empty;
        Doubles out(1, 4, 6, kDimV), wide_out = out;
        mechanism.run(problem.view(), {empty, end, map}, out.view());
        mechanism.run(wide.view(), {wide_empty, wide_end, map}, wide_out.view());
        CHECK(out.data == wide_out.data);
        CHECK(repeated(end.s, 4, map).data == wide_end.s.data);
      }
    }
  }
}

// ------------------------------------------------------------------- every mechanism against its pairs of tokens, no state

namespace {

using Square = std::vector<Vector>;   // dim_k x dim_k

Square diagonal(const Vector& x) {
  Square out(x.size(), Vector(x.size()));
  for (std::size_t i = 0; i < x.size(); ++i) out[i][i] = x[i];
  return out;
}
Square plus_outer(Square a, const Vector& x, const Vector& y) {   // a + x y'
  for (std::size_t i = 0; i < x.size(); ++i) a[i] += x[i] * y;
  return a;
}
Vector times(const Square& a, const Vector& x) {
  Vector out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) out[i] = reference::dot(a[i], x);
  return out;
}

// What token t does to value column j of the state of head h: column <- transition * column + key * value.
struct Step {
  Square transition;
  Vector key;
  double value;
};
struct Unrolled {
  const char* name;
  double scale;
  std::function<Step(const Inputs&, index_t b, index_t h, index_t t, index_t j)> step;
  bool exclusive = false, levels = false;
  std::function<double(const Inputs&, index_t b, index_t h, index_t t, index_t j)> skip = {};
};

Vector at(const In& x, index_t b, index_t h, index_t t) { return reference::row(x, b, h, t); }
Vector exponential(const Vector& x) { return std::exp(x); }

const std::vector<Unrolled>& unrolled() {
  const Vector one(1., kDimK);
  const auto additive = [=](auto alpha, auto value) {   // alpha(x, b, h, t, j): a vector; value: a number
    return [=](const Inputs& x, index_t b, index_t h, index_t t, index_t j) {
      return Step{diagonal(alpha(x, b, h, t, j) * one), at(x[kK], b, h, t), value(x, b, h, t, j)};
    };
  };
  const auto v = [](const Inputs& x, index_t b, index_t h, index_t t, index_t j) { return x[kV](b, h, t, j); };
  const auto dt_v = [](const Inputs& x, index_t b, index_t h, index_t t, index_t j) {
    return x[kDt](b, h, t, 0) * x[kV](b, h, t, j);
  };
  const auto gate = [](const Inputs& x, index_t b, index_t h, index_t t, index_t) {
    return Vector(std::exp(x[kGate](b, h, t, 0)), kDimK);
  };
  const auto gates = [](const Inputs& x, index_t b, index_t h, index_t t, index_t) {
    return exponential(at(x[kGates], b, h, t));
  };
  const auto dt_a = [](const Inputs& x, index_t b, index_t h, index_t t, index_t) {
    return Vector(std::exp(x[kDt](b, h, t, 0) * x[kA](0, h, 0, 0)), kDimK);
  };
  const auto ones = [=](const Inputs&, index_t, index_t, index_t, index_t) { return one; };
  // (I - beta k k') Diag(alpha), and beta k v'
  const auto erasing = [=](auto alpha, Input beta) {
    return [=](const Inputs& x, index_t b, index_t h, index_t t, index_t j) {
      const Vector k = at(x[kK], b, h, t), a = alpha(x, b, h, t, j) * one;
      const double beta_t = x[beta](b, h, t, x[beta].extent[3] == 1 ? 0 : j);
      return Step{plus_outer(diagonal(a), Vector(-beta_t * k), Vector(k * a)), k, beta_t * x[kV](b, h, t, j)};
    };
  };
  static const std::vector<Unrolled> list = {
      {"linear", 0.5, additive(ones, v)},
      {"retention", 0.5,
       additive([=](const Inputs& x, index_t, index_t h, index_t, index_t) { return Vector(x[kGamma](0, h, 0, 0), kDimK); },
                v)},
      {"lightning", 1,
       additive([=](const Inputs& x, index_t, index_t h, index_t,
                    index_t) { return Vector(std::exp(-x[kSlope](0, h, 0, 0)), kDimK); },
                v)},
      {"simple_gla", 0.5, additive(gate, v)},
      {"gla", 0.5, additive(gates, v)},
      {"mamba1", 1,
       additive(
           [](const Inputs& x, index_t b, index_t h, index_t t, index_t j) {
             Vector a(kDimK);
             for (index_t n = 0; n < kDimK; ++n) a[std::size_t(n)] = std::exp(x[kDts](b, h, t, j) * x[kAs](0, h, j, n));
             return a;
           },
           [](const Inputs& x, index_t b, index_t h, index_t t, index_t j) {
             return x[kDts](b, h, t, j) * x[kV](b, h, t, j);
           }),
       false, false,
       [](const Inputs& x, index_t b, index_t h, index_t t, index_t j) { return x[kDs](0, h, 0, j) * x[kV](b, h, t, j); }},
      {"mamba2", 1, additive(dt_a, dt_v), false, false,
       [](const Inputs& x, index_t b, index_t h, index_t t, index_t j) { return x[kD](0, h, 0, 0) * x[kV](b, h, t, j); }},
      {"rwkv6", 1, additive(gates, v), true, false,
       [](const Inputs& x, index_t b, index_t h, index_t t, index_t j) {
         double bonus = 0;
         for (index_t i = 0; i < kDimK; ++i) bonus += x[kQ](b, h, t, i) * x[kU](0, h, 0, i) * x[kK](b, h, t, i);
         return bonus * x[kV](b, h, t, j);
       }},
      {"rwkv7", 1,
       [=](const Inputs& x, index_t b, index_t h, index_t t, index_t j) {
         const Vector k = at(x[kK], b, h, t);
         return Step{plus_outer(diagonal(gates(x, b, h, t, j)), Vector(-k * at(x[kRate], b, h, t)), k), k,
                     x[kV](b, h, t, j)};
       }},
      {"delta", 0.5, erasing(ones, kBeta)},
      {"gated_delta", 0.5, erasing(gate, kBeta)},
      {"kda", 0.5, erasing(gates, kBeta)},
      {"kda, beta per value channel", 0.5, erasing(gates, kBetas)},
      {"log_linear_simple_gla", 1, additive(gate, v), false, true},
      {"log_linear_mamba2", 1, additive(dt_a, dt_v), false, true},
      {"log_linear_gated_delta", 1, erasing(gate, kBeta), false, true},
  };
  return list;
}

}   // namespace

// Token s reaches token t through the product of the transitions between them, so the output is a sum over pairs. Numbers
// of up to 100 (states that reflections do not shrink, times queries), 10 roundings in each of up to 17 + 5 steps.
TEST_CASE("reference recurrent: the recurrence is the sum over pairs of tokens") {
  for (const bool resets : {false, true}) {
    for (const index_t len : {1, 2, 7, 16, 17}) {
      const Problem problem(6 + static_cast<std::uint64_t>(len), 1, {}, len, resets);
      const Inputs x = problem.view();
      for (const Unrolled& expected : unrolled()) {
        INFO(expected.name << ", len " << len << (resets ? ", resets" : ""));
        const Mechanism* mechanism = nullptr;
        for (const Mechanism& each : mechanisms()) {
          if (std::string(each.name) == expected.name) mechanism = &each;
        }
        REQUIRE(mechanism != nullptr);
        const Carry from = expected.levels ? Carry(1, 2) : used_state(*mechanism, 1, {});
        Carry to = from;
        Doubles out(1, 2, len, kDimV);
        mechanism->run(x, {from, to}, out.view());

        Worst worst;
        for (index_t h = 0; h < 2; ++h) {
          for (index_t j = 0; j < kDimV; ++j) {
            std::vector<Vector> reaching(1, Vector(kDimK));   // the initial state, then each token
            for (index_t i = 0; i < kDimK; ++i) reaching[0][std::size_t(i)] = from.s.c()(0, h, i, j);
            const auto sum_at = [&](index_t t) {
              double sum = 0;
              const Vector q = at(x[kQ], 0, h, t);
              for (std::size_t n = 0; n < reaching.size(); ++n) {
                const index_t s = static_cast<index_t>(n) - 1;
                const double weight =
                    expected.levels && s >= 0 ? x[kLambda](0, h, t, std::bit_width(std::size_t(t ^ s))) : 1;
                sum += weight * reference::dot(q, reaching[n]);
              }
              return sum;
            };
            for (index_t t = 0; t < len; ++t) {
              const Step step = expected.step(x, 0, h, t, j);
              double o = expected.exclusive ? sum_at(t) : 0;
              for (Vector& each : reaching) each = times(step.transition, each);
              reaching.push_back(step.key * step.value);
              if (!expected.exclusive) o = sum_at(t);
              o = expected.scale * o + (expected.skip ? expected.skip(x, 0, h, t, j) : 0);
              worst.see(out.c()(0, h, t, j), o);
            }
            for (index_t i = 0; i < kDimK && !expected.levels; ++i) {
              double s = 0;
              for (const Vector& each : reaching) s += each[std::size_t(i)];
              worst.see(to.s.c()(0, h, i, j), s);
            }
          }
        }
        CHECK(worst.value <= 220 * 100 * 0x1p-53);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ one mechanism as another

namespace {

struct Outcome {
  Doubles out, state;
  double distance(const Outcome& other) const {
    Worst worst;
    worst.see(out, other.out);
    worst.see(state, other.state);
    return worst.value;
  }
  bool operator==(const Outcome& o) const { return out.data == o.out.data && state.data == o.state.data; }
};

constexpr index_t kLen = 11;

Doubles some_state() {
  test::Random random(99);
  return Doubles::of(1, 2, kDimK, kDimV, [&](auto...) { return double(random.normal()); });
}

// body(out, options) from `initial` and with scale 0.5, which is also 1/sqrt(dim_k).
template <class Body>
Outcome outcome(Body&& body, index_t len = kLen, const Doubles& initial = some_state()) {
  Outcome result{Doubles(1, 2, len, kDimV), Doubles(1, 2, kDimK, kDimV)};
  body(result.out.view(),
       RecurrentOptions<double>{.scale = 0.5, .initial_state = initial.c(), .final_state = result.state.view()});
  return result;
}
// The input with one value everywhere, or each from its place.
Doubles filled(const In& like, double value) {
  return {like.extent[0], like.extent[1], like.extent[2], like.extent[3], value};
}
template <class F>
Doubles made(const In& like, index_t dim, F&& f) {
  return Doubles::of(like.extent[0], like.extent[1], like.extent[2], dim, f);
}

}   // namespace

TEST_CASE("reference recurrent: gates of a special kind turn one mechanism into another") {
  const Problem problem(20, 1, {}, kLen);
  const Inputs x = problem.view();
  const auto spread = made(x[kGate], kDimK, [&](index_t b, index_t h, index_t t, index_t) { return x[kGate](b, h, t, 0); });
  const Doubles none = filled(x[kGate], 0), no_key_gate = filled(x[kGates], 0);
  using Options = RecurrentOptions<double>;
  const auto gdn =
      outcome([&](Out o, Options r) { reference::gated_delta(x[kQ], x[kK], x[kV], {x[kGate]}, x[kBeta], o, r); });
  const auto kda = [&](const Doubles& gates) {
    return outcome([&](Out o, Options r) { reference::kda(x[kQ], x[kK], x[kV], {gates.c()}, x[kBeta], o, r); });
  };
  const auto gla = [&](const Doubles& gates) {
    return outcome([&](Out o, Options r) { reference::gla(x[kQ], x[kK], x[kV], {gates.c()}, o, r); });
  };
  const auto simple = outcome([&](Out o, Options r) { reference::simple_gla(x[kQ], x[kK], x[kV], {x[kGate]}, o, r); });
  const auto delta = outcome([&](Out o, Options r) { reference::delta(x[kQ], x[kK], x[kV], x[kBeta], o, r); });
  const auto linear = outcome([&](Out o, Options r) { reference::linear(x[kQ], x[kK], x[kV], o, {.normalize = false}, r); });

  CHECK(kda(spread).distance(gdn) <= kClose);
  CHECK(kda(no_key_gate).distance(delta) <= kClose);
  CHECK(outcome([&](Out o, Options r) {
          reference::gated_delta(x[kQ], x[kK], x[kV], {none.c()}, x[kBeta], o, r);
        }).distance(delta) <= kClose);
  CHECK(gla(spread) == simple);
  CHECK(gla(no_key_gate) == linear);
  CHECK(outcome([&](Out o, Options r) { reference::simple_gla(x[kQ], x[kK], x[kV], {none.c()}, o, r); }) == linear);

  // One gate for KDA, shared along the axis, and alpha in place of its logarithm.
  const auto alphas =
      made(x[kGates], kDimK, [&](index_t b, index_t h, index_t t, index_t i) { return std::exp(x[kGates](b, h, t, i)); });
  CHECK(outcome([&](Out o, Options r) { reference::kda(x[kQ], x[kK], x[kV], {x[kGate]}, x[kBeta], o, r); }) == kda(spread));
  CHECK(outcome([&](Out o, Options r) {
          reference::kda(x[kQ], x[kK], x[kV], {alphas.c(), DecayForm::alpha}, x[kBeta], o, r);
        }) == outcome([&](Out o, Options r) { reference::kda(x[kQ], x[kK], x[kV], {x[kGates]}, x[kBeta], o, r); }));

  // Retention and lightning are simple GLA with a constant gate per head, Mamba-2 is simple GLA on dt x.
  const std::vector<double> gamma = x.numbers(kGamma);
  const auto constant = Doubles::of(1, 2, 1, 1, [&](index_t, index_t h, index_t, index_t) { return gamma[std::size_t(h)]; });
  const auto constant_gla = outcome([&](Out o, Options r) {
    reference::simple_gla(x[kQ], x[kK], x[kV], {constant.c(), DecayForm::alpha}, o, r);
  });
  CHECK(outcome([&](Out o, Options r) { reference::retention(x[kQ], x[kK], x[kV], gamma, o, r); }) == constant_gla);
  const std::vector<double> slopes{-std::log(gamma[0]), -std::log(gamma[1])};
  CHECK(outcome([&](Out o, Options r) { reference::lightning(x[kQ], x[kK], x[kV], slopes, o, r); }).distance(constant_gla) <=
        kClose);

  const std::vector<double> a = x.numbers(kA);
  const auto g =
      made(x[kDt], 1, [&](index_t b, index_t h, index_t t, index_t) { return x[kDt](b, h, t, 0) * a[std::size_t(h)]; });
  const auto dt_x =
      made(x[kV], kDimV, [&](index_t b, index_t h, index_t t, index_t j) { return x[kDt](b, h, t, 0) * x[kV](b, h, t, j); });
  CHECK(outcome([&](Out o, Options r) { reference::mamba2(x[kV], x[kK], x[kQ], {.dt = x[kDt], .a = a}, o, r); }) ==
        outcome([&](Out o, Options r) { reference::simple_gla(x[kQ], x[kK], dt_x.c(), {g.c()}, o, r); }));

  // Mamba-1 with one dt and A for all channels and modes is Mamba-2.
  const auto dts = made(x[kV], kDimV, [&](index_t b, index_t h, index_t t, index_t) { return x[kDt](b, h, t, 0); });
  const auto as = Doubles::of(1, 2, kDimV, kDimK, [&](index_t, index_t h, index_t, index_t) { return a[std::size_t(h)]; });
  CHECK(outcome([&](Out o, Options r) {
          reference::mamba1(x[kV], x[kK], x[kQ], {dts.c(), rank3(as.c())}, o, r);
        }).distance(outcome([&](Out o, Options r) {
    reference::mamba2(x[kV], x[kK], x[kQ], {.dt = x[kDt], .a = a}, o, r);
  })) <= kClose);

  // KDA as diagonal plus low rank: kappa = alpha * k, kappa * a = beta k, v -> beta v.
  const auto kappa = made(
      x[kK], kDimK, [&](index_t b, index_t h, index_t t, index_t i) { return alphas.c()(b, h, t, i) * x[kK](b, h, t, i); });
  const auto rate = made(x[kK], kDimK, [&](index_t b, index_t h, index_t t, index_t i) {
    return x[kBeta](b, h, t, 0) / alphas.c()(b, h, t, i);
  });
  const auto beta_v = made(
      x[kV], kDimV, [&](index_t b, index_t h, index_t t, index_t j) { return x[kBeta](b, h, t, 0) * x[kV](b, h, t, j); });
  CHECK(outcome([&](Out o, Options r) {
          reference::rwkv7(x[kQ], x[kK], beta_v.c(), {x[kGates]}, kappa.c(), rate.c(), o, r);
        }).distance(outcome([&](Out o, Options r) { reference::kda(x[kQ], x[kK], x[kV], {x[kGates]}, x[kBeta], o, r); })) <=
        kClose);
  const Doubles no_rate = filled(x[kRate], 0);
  CHECK(outcome([&](Out o, Options r) { reference::rwkv7(x[kQ], x[kK], x[kV], {x[kGates]}, x[kK], no_rate.c(), o, r); }) ==
        outcome([&](Out o, Options r) { reference::gla(x[kQ], x[kK], x[kV], {x[kGates]}, o, r); }));

  // The bonus of RWKV-6 is no part of its state; a bonus of 1 with decays of 1 is plain linear attention.
  const Doubles one_bonus(1, 1, 2, kDimK, 1);
  const auto rwkv6 = [&](const Doubles& w, View<const double, 2> u) {
    return outcome([&](Out o, Options r) { reference::rwkv6(x[kQ], x[kK], x[kV], {w.c()}, u, o, r); });
  };
  CHECK(rwkv6(spread, x.rows(kU)).state.data == simple.state.data);
  CHECK(rwkv6(no_key_gate, rank2(one_bonus.c())).distance(linear) <= kClose);

  // RWKV-5: one decay per head and channel, stated once or at every token.
  const auto w5 = Doubles::of(1, 2, 1, kDimK, [&](index_t, index_t h, index_t, index_t i) { return x[kGates](0, h, 0, i); });
  const auto w6 = made(x[kGates], kDimK, [&](index_t, index_t h, index_t, index_t i) { return x[kGates](0, h, 0, i); });
  CHECK(rwkv6(w5, x.rows(kU)) == rwkv6(w6, x.rows(kU)));

  // HGRN2: with k = 1 - alpha the state is a convex combination, so ones stay ones.
  const auto bounded = made(x[kGates], kDimK, [&](index_t b, index_t h, index_t t, index_t i) {
    return reference::hgrn2_alpha(x[kQ](b, h, t, i), 0.25);
  });
  const auto complement =
      made(x[kK], kDimK, [&](index_t b, index_t h, index_t t, index_t i) { return 1 - bounded.c()(b, h, t, i); });
  const Doubles ones = filled(x[kV], 1), state_of_ones(1, 2, kDimK, kDimV, 1);
  Doubles end = state_of_ones, out = ones;
  reference::gla(x[kQ], complement.c(), ones.c(), {bounded.c(), DecayForm::alpha}, out.view(),
                 {.initial_state = state_of_ones.c(), .final_state = end.view()});
  Worst worst;
  worst.see(end, state_of_ones);
  CHECK(worst.value <= kClose);
}

TEST_CASE("reference recurrent: erasing gates, empty steps and zero queries") {
  const Problem problem(21, 1, {}, kLen);
  const Inputs x = problem.view();
  using Options = RecurrentOptions<double>;
  const std::vector<double> a = x.numbers(kA);
  const auto last = [&](const Outcome& r, index_t h, index_t j) { return r.out.c()(0, h, kLen - 1, j); };
  Doubles reset = problem.all[kGate], reset_keys = problem.all[kGates];
  for (index_t h = 0; h < 2; ++h) {
    reset.view()(0, h, kLen - 1, 0) = -HUGE_VAL;
    for (index_t i = 0; i < kDimK; ++i) reset_keys.view()(0, h, kLen - 1, i) = -HUGE_VAL;
  }
  const auto simple = outcome([&](Out o, Options r) { reference::simple_gla(x[kQ], x[kK], x[kV], {reset.c()}, o, r); });
  const auto gla = outcome([&](Out o, Options r) { reference::gla(x[kQ], x[kK], x[kV], {reset_keys.c()}, o, r); });
  const auto gdn =
      outcome([&](Out o, Options r) { reference::gated_delta(x[kQ], x[kK], x[kV], {reset.c()}, x[kBeta], o, r); });
  const auto kda = outcome([&](Out o, Options r) { reference::kda(x[kQ], x[kK], x[kV], {reset_keys.c()}, x[kBeta], o, r); });
  const auto rwkv6 =
      outcome([&](Out o, Options r) { reference::rwkv6(x[kQ], x[kK], x[kV], {reset_keys.c()}, x.rows(kU), o, r); });
  const auto rwkv7 =
      outcome([&](Out o, Options r) { reference::rwkv7(x[kQ], x[kK], x[kV], {reset_keys.c()}, x[kK], x[kRate], o, r); });
  const Inputs before = x.cut(2, 0, kLen - 1);
  const auto rwkv6_before = outcome(
      [&](Out o, Options r) { reference::rwkv6(before[kQ], before[kK], before[kV], {before[kGates]}, x.rows(kU), o, r); },
      kLen - 1);
  const auto rwkv7_before = outcome(
      [&](Out o, Options r) {
        reference::rwkv7(before[kQ], before[kK], before[kV], {before[kGates]}, before[kK], before[kRate], o, r);
      },
      kLen - 1);
  Worst worst;
  for (index_t h = 0; h < 2; ++h) {
    const Vector q = at(x[kQ], 0, h, kLen - 1), k = at(x[kK], 0, h, kLen - 1), rate = at(x[kRate], 0, h, kLen - 1);
    for (index_t j = 0; j < kDimV; ++j) {
      const double v = x[kV](0, h, kLen - 1, j), beta = x[kBeta](0, h, kLen - 1, 0), qk = reference::dot(q, k);
      double removed = 0, read = 0, bonus = 0;
      for (index_t i = 0; i < kDimK; ++i) {
        removed += rwkv7_before.state.c()(0, h, i, j) * k[std::size_t(i)];
        read += rwkv6_before.state.c()(0, h, i, j) * q[std::size_t(i)];
        bonus += q[std::size_t(i)] * k[std::size_t(i)] * x[kU](0, h, 0, i);
      }
      worst.see(last(simple, h, j), 0.5 * qk * v);
      worst.see(last(gla, h, j), 0.5 * qk * v);
      worst.see(last(gdn, h, j), 0.5 * beta * qk * v);
      worst.see(last(kda, h, j), 0.5 * beta * qk * v);
      worst.see(last(rwkv6, h, j), 0.5 * (read + bonus * v));   // still sees the state before the reset
      for (index_t i = 0; i < kDimK; ++i) {
        const double k_i = k[std::size_t(i)];
        for (const Outcome* each : {&simple, &gla, &rwkv6}) worst.see(each->state.c()(0, h, i, j), k_i * v);
        for (const Outcome* each : {&gdn, &kda}) worst.see(each->state.c()(0, h, i, j), beta * k_i * v);
        worst.see(rwkv7.state.c()(0, h, i, j), k_i * (v - rate[std::size_t(i)] * removed));   // no reset
      }
    }
  }
  CHECK(worst.value <= kClose);

  // One channel erased: the other rows of the state are what they were.
  Doubles one_channel = problem.all[kGates];
  one_channel.view()(0, 0, kLen - 1, 2) = -HUGE_VAL;
  const auto partly = outcome([&](Out o, Options r) { reference::gla(x[kQ], x[kK], x[kV], {one_channel.c()}, o, r); });
  const auto whole = outcome([&](Out o, Options r) { reference::gla(x[kQ], x[kK], x[kV], {x[kGates]}, o, r); });
  for (index_t i = 0; i < kDimK; ++i) {
    for (index_t j = 0; j < kDimV; ++j) {
      const double cell = partly.state.c()(0, 0, i, j);
      if (i == 2) CHECK(cell == x[kK](0, 0, kLen - 1, i) * x[kV](0, 0, kLen - 1, j));
      if (i != 2) CHECK(cell == whole.state.c()(0, 0, i, j));
    }
  }

  // Keys, steps and queries of zero.
  const Doubles no_k = filled(x[kK], 0), no_q = filled(x[kQ], 0), no_dt = filled(x[kDt], 0), no_dts = filled(x[kDts], 0);
  const auto decayed = outcome([&](Out o, Options r) { reference::simple_gla(x[kQ], no_k.c(), x[kV], {x[kGate]}, o, r); });
  const auto idle2 = outcome([&](Out o, Options r) {
    reference::mamba2(x[kV], x[kK], x[kQ], {no_dt.c(), a, x.rows(kD)}, o, r);
  });
  const auto idle1 = outcome([&](Out o, Options r) {
    reference::mamba1(x[kV], x[kK], x[kQ], {no_dts.c(), rank3(x[kAs]), x.rows(kDs)}, o, r);
  });
  const auto silent = outcome([&](Out o, Options r) {
    reference::mamba2(x[kV], x[kK], no_q.c(), {x[kDt], a, x.rows(kD)}, o, r);
  });
  const Doubles initial = some_state();
  CHECK(idle2.state.data == initial.data);
  CHECK(idle1.state.data == initial.data);
  Worst other;
  for (index_t h = 0; h < 2; ++h) {
    double g = 0;
    for (index_t t = 0; t < kLen; ++t) g += x[kGate](0, h, t, 0);
    for (index_t j = 0; j < kDimV; ++j) {
      double read = 0;
      for (index_t i = 0; i < kDimK; ++i) {
        other.see(decayed.state.c()(0, h, i, j), std::exp(g) * initial.c()(0, h, i, j));
        read += 0.5 * x[kQ](0, h, kLen - 1, i) * initial.c()(0, h, i, j);
      }
      const double v = x[kV](0, h, kLen - 1, j);
      other.see(last(decayed, h, j), std::exp(g) * read);
      other.see(last(idle2, h, j), read + x[kD](0, h, 0, 0) * v);
      other.see(last(idle1, h, j), read + x[kDs](0, h, 0, j) * v);
      other.see(last(silent, h, j), x[kD](0, h, 0, 0) * v);
    }
  }
  CHECK(other.value <= kClose);
}

TEST_CASE("reference recurrent: beta 0, 1 and 2") {
  const Problem problem(22, 1, {}, kLen);
  const Inputs x = problem.view();
  using Options = RecurrentOptions<double>;

  // 0: nothing is written.
  const Doubles zero = filled(x[kBeta], 0), one = filled(x[kBeta], 1), two = filled(x[kBeta], 2);
  const Doubles no_k = filled(x[kK], 0), no_v = filled(x[kV], 0);
  CHECK(outcome([&](Out o, Options r) { reference::gated_delta(x[kQ], x[kK], x[kV], {x[kGate]}, zero.c(), o, r); }) ==
        outcome([&](Out o, Options r) { reference::simple_gla(x[kQ], no_k.c(), x[kV], {x[kGate]}, o, r); }));
  CHECK(outcome([&](Out o, Options r) { reference::kda(x[kQ], x[kK], x[kV], {x[kGates]}, zero.c(), o, r); }) ==
        outcome([&](Out o, Options r) { reference::gla(x[kQ], no_k.c(), x[kV], {x[kGates]}, o, r); }));
  CHECK(outcome([&](Out o, Options r) { reference::delta(x[kQ], x[kK], x[kV], zero.c(), o, r); }).state.data ==
        some_state().data);

  // 1: the key's value is overwritten, so a query that is the key reads the value.
  Worst worst;
  const auto as_scaled_v =
      made(x[kV], kDimV, [&](index_t b, index_t h, index_t t, index_t j) { return 0.5 * x[kV](b, h, t, j); });
  worst.see(outcome([&](Out o, Options r) { reference::delta(x[kK], x[kK], x[kV], one.c(), o, r); }).out, as_scaled_v);
  worst.see(outcome([&](Out o, Options r) { reference::gated_delta(x[kK], x[kK], x[kV], {x[kGate]}, one.c(), o, r); }).out,
            as_scaled_v);
  worst.see(outcome([&](Out o, Options r) { reference::kda(x[kK], x[kK], x[kV], {x[kGates]}, one.c(), o, r); }).out,
            as_scaled_v);
  CHECK(worst.value <= kClose);

  // 2 without values: reflections. The state keeps its size, and the same key twice restores it.
  const Doubles before = some_state();
  const auto reflected = outcome([&](Out o, Options r) { reference::delta(x[kQ], x[kK], no_v.c(), two.c(), o, r); });
  CHECK(reflected.state.squares() == Catch::Approx(before.squares()).epsilon(kClose));
  const auto twice = made(x[kK], kDimK, [&](index_t b, index_t h, index_t t, index_t i) { return x[kK](b, h, t / 2, i); });
  const index_t even = kLen - 1;
  const auto first = [&](const Doubles& all) { return slice(all, 0, 0, even); };
  const Doubles q = first(problem.all[kQ]), k = first(twice), v = first(no_v), beta = first(two);
  const auto restored = outcome([&](Out o, Options r) { reference::delta(q.c(), k.c(), v.c(), beta.c(), o, r); }, even);
  Worst moved;
  moved.see(restored.state, before);
  CHECK(moved.value <= kClose);
}

// -------------------------------------------------------------------------- linear attention, feature maps, LoLCATs

TEST_CASE("reference linear: normalised, causal or not, is a weighted mean of the values") {
  const Problem problem(30, 2, {2, 2, 2}, kLen);
  const Inputs x = problem.view();
  for (const bool causal : {true, false}) {
    for (const bool clamped : {false, true}) {
      const double eps = 0.01;
      Doubles out(2, 2, kLen, kDimV);
      reference::linear(x[kQ], x[kK], x[kV], out.view(), {.causal = causal, .eps = eps, .clamp_denominator = clamped}, {},
                        reference::elu_features);
      Worst worst;
      for (index_t b = 0; b < 2; ++b) {
        for (index_t h = 0; h < 2; ++h) {
          for (index_t t = 0; t < kLen; ++t) {
            double weights = 0, sums[kDimV] = {};
            for (index_t s = 0; s < (causal ? t + 1 : kLen); ++s) {
              double weight = 0;
              for (index_t i = 0; i < kDimK; ++i) {
                const double q = x[kQ](b, h, t, i), k = x[kK](b, h, s, i);
                weight += (q > 0 ? q + 1 : std::exp(q)) * (k > 0 ? k + 1 : std::exp(k));
              }
              weights += weight;
              for (index_t j = 0; j < kDimV; ++j) sums[j] += weight * x[kV](b, h, s, j);
            }
            for (index_t j = 0; j < kDimV; ++j) {
              worst.see(out.c()(b, h, t, j), sums[j] / (clamped ? std::max(weights, eps) : weights + eps));
            }
          }
        }
      }
      CHECK(worst.value <= kClose);
    }
  }
  // Values of one are returned, features of zero give zero.
  const Doubles ones = filled(x[kV], 1), minus = filled(x[kQ], -1);
  Doubles out(2, 2, kLen, kDimV), expected = ones;
  reference::linear(x[kQ], x[kK], ones.c(), out.view(), {.eps = 0}, {}, reference::elu_features);
  Worst worst;
  worst.see(out, expected);
  CHECK(worst.value <= kClose);
  reference::linear(minus.c(), x[kK], x[kV], out.view(), {}, {}, reference::relu_features);
  CHECK(out.squares() == 0);
}

TEST_CASE("reference feature maps: by hand") {
  using namespace reference;
  const auto is = [](const Vector& x, std::initializer_list<double> expected) {
    Worst worst;
    REQUIRE(x.size() == expected.size());
    for (std::size_t n = 0; n < x.size(); ++n) worst.see(x[n], expected.begin()[n]);
    CHECK(worst.value <= kClose);
  };
  const Vector x{1., -2.};
  is(elu_features(x), {2, std::exp(-2.)});
  is(relu_features(x), {1, 0});
  const double w_data[] = {1, 2, 3, 4, -1, -1}, b_data[] = {0.5, 0, 0};   // three features of two
  const MatrixView w{w_data, {3, 2}, {2, 1}}, square{w_data, {2, 2}, {2, 1}}, w_transposed{w_data, {2, 3}, {1, 2}};
  is(affine(w, x), {-3, -5, 1});
  is(t2r_features(x, w, b_data), {0, 0, 1});
  is(t2r_features(Vector{1., 1.}, w, b_data), {3.5, 7, 0});
  is(hadamard_features(x, square, square), {9, 25});
  is(dpfp_features(x, 2), {2, 0, 0, 0, 0, 0, 0, 0});                           // r = [1, 0, 0, 2]
  is(dpfp_features(x, 2, DpfpHalf::minus_relu), {0, 0, 0, 0, -1, 0, -1, 0});   // r = [1, 0, -1, 0]
  is(exponential_features(x), {1, std::exp(-3.), std::exp(-3.), 1});
  is(exponential_features(Vector{0., -100.}), {1, 1e-12, 1e-12, 1});
  is(favor_relu_features(Vector{4., -4.}, square), {1e-3, 1e-3});
  is(favor_relu_features(Vector{4., 4.}, square), {12 / std::pow(2., 0.25) + 1e-3, 28 / std::pow(2., 0.25) + 1e-3});

  // One softmax over y and -y with y = 2 (W x + b); two softmaxes over y and over -y with y = W x.
  const double half[] = {1, 0, 0, 1};
  const double e = std::exp(2.), sum = e + std::exp(-4.) + 1 / e + std::exp(4.);
  is(hedgehog_features(x, {half, {2, 2}, {2, 1}}), {e / sum, std::exp(-4.) / sum, 1 / e / sum, std::exp(4.) / sum});
  const Vector halves = lolcats_features(x, w_transposed);
  REQUIRE(halves.size() == 6);
  CHECK(halves[0] + halves[1] + halves[2] == Catch::Approx(1).epsilon(1e-14));
  CHECK(halves[3] + halves[4] + halves[5] == Catch::Approx(1).epsilon(1e-14));
  CHECK(halves[0] == Catch::Approx(1 / (1 + std::exp(-2.) + std::exp(4.))).epsilon(1e-14));   // x W = [-3, -5, 1]
}

TEST_CASE("reference feature maps: products of features are the kernels they stand for") {
  using namespace reference;
  test::Random random(31);
  const auto normal = [&](index_t dim) {
    Vector x(0., std::size_t(dim));
    for (double& value : x) value = double(random.normal());
    return x;
  };
  for (const index_t d : {1, 4, 16}) {
    const Vector q = normal(d), k = normal(d);
    const double u = dot(q, k) / std::sqrt(double(d));
    CHECK(taylor_features(q).size() == std::size_t(1 + d + d * (d + 1) / 2));
    CHECK(dot(taylor_features(q), taylor_features(k)) == Catch::Approx(1 + u + u * u / 2).epsilon(1e-14));

    const Vector gamma = normal(d), beta = normal(d);
    const auto normed = [&](const Vector& x) {
      double mean = 0, variance = 0;
      for (const double value : x) mean += value / double(d);
      for (const double value : x) variance += (value - mean) * (value - mean) / double(d);
      Vector y = x;
      for (std::size_t n = 0; n < y.size(); ++n) y[n] = gamma[n] * (x[n] - mean) / std::sqrt(variance + 1e-5) + beta[n];
      return y;
    };
    const double s = dot(normed(q), normed(k));
    CHECK(dot(rebased_features(q, gamma, beta), rebased_features(k, gamma, beta)) ==
          Catch::Approx(s * s / double(d)).epsilon(1e-12));

    for (const index_t i : {1, 3, 8}) {
      const double weight = dot(relu_features(q), relu_features(k)) * std::cos(std::acos(-1.) * double(i - 2) / (2 * 8.));
      CHECK(dot(cosformer_features(q, i, 8), cosformer_features(k, 2, 8)) ==
            Catch::Approx(weight).epsilon(1e-13).margin(1e-14));
    }
  }
}

TEST_CASE("reference feature maps: the mean over random projections is the softmax kernel") {
  using namespace reference;
  constexpr std::size_t d = 4, draws = 20000;
  test::Random random(32);
  const auto gauss = [&] {   // Box and Muller: the sum of uniforms of Random::normal has too light tails for this
    return std::sqrt(-2 * std::log(1 - random.uniform())) * std::cos(2 * std::acos(-1.) * random.uniform());
  };
  const Vector q{0.5, -0.3, 0.8, 0.1}, k{0.2, 0.4, 0.6, -0.7};
  const double expected = std::exp(dot(q, k) / 2);
  double sum = 0, squares = 0;
  for (std::size_t n = 0; n < draws; ++n) {
    // A block of orthonormal rows (Gram and Schmidt), each with the length of a Gaussian vector.
    std::vector<Vector> rows;
    std::vector<double> w;
    for (std::size_t r = 0; r < d; ++r) {
      Vector row(d);
      for (double& value : row) value = gauss();
      for (const Vector& other : rows) row -= Vector(dot(row, other) * other);
      row /= std::sqrt(dot(row, row));
      rows.push_back(row);
      double length = 0;
      for (std::size_t i = 0; i < d; ++i) {
        const double g = gauss();
        length += g * g;
      }
      for (const double value : row) w.push_back(value * std::sqrt(length));
    }
    const MatrixView projection{w.data(), {index_t(d), index_t(d)}, {index_t(d), 1}};
    const double product =
        dot(favor_features(favor_exponents(q, projection), 0, 0), favor_features(favor_exponents(k, projection), 0, 0));
    sum += product;
    squares += product * product;
  }
  const double mean = sum / draws, deviation = std::sqrt((squares / draws - mean * mean) / draws);
  CHECK(deviation <= 0.01 * expected);
  CHECK(std::abs(mean - expected) <= 4 * deviation);
}

TEST_CASE("reference feature maps: stabilisers of FAVOR+ cancel when normalised") {
  using namespace reference;
  const Problem problem(33, 1, {}, kLen);
  const Inputs x = problem.view();
  test::Random random(34);
  const auto w = Doubles::of(1, 1, 6, kDimK, [&](auto...) { return double(random.normal()); });
  const MatrixView projection = rank2(w.c());
  Doubles q(1, 2, kLen, 6), k = q, plain_q = q, plain_k = q;
  favor_key_features(x[kK], k.view(), projection, 0);
  for (index_t h = 0; h < 2; ++h) {
    double largest = 0;
    for (index_t t = 0; t < kLen; ++t) {
      put(q.view(), 0, h, t, favor_query_features(row(x[kQ], 0, h, t), projection, 0));
      put(plain_q.view(), 0, h, t, favor_features(favor_exponents(row(x[kQ], 0, h, t), projection), 0, 0));
      put(plain_k.view(), 0, h, t, favor_features(favor_exponents(row(x[kK], 0, h, t), projection), 0, 0));
      for (index_t f = 0; f < 6; ++f) largest = std::max(largest, k.c()(0, h, t, f));
    }
    CHECK(largest == Catch::Approx(1 / std::sqrt(6.)).epsilon(1e-14));   // the keys' largest exponent is 0
  }
  Doubles out(1, 2, kLen, kDimV), plain = out;
  reference::linear(q.c(), k.c(), x[kV], out.view(), {.eps = 0});
  reference::linear(plain_q.c(), plain_k.c(), x[kV], plain.view(), {.eps = 0});
  Worst worst;
  worst.see(out, plain);
  CHECK(worst.value <= kClose);
}

namespace {

struct LolcatsProblem {
  static constexpr index_t heads = 2, features = 3;
  Problem problem;
  Doubles query_map, key_map;
  std::vector<double> weight{0.1, 0.7};

  LolcatsProblem(index_t len, Heads h) : problem(40, 1, h, len) {
    test::Random random(41);
    const auto normal = [&](auto...) { return double(random.normal()); };
    query_map = Doubles::of(1, heads, kDimK, features, normal);
    key_map = Doubles::of(1, heads, kDimK, features, normal);
  }
  LolcatsOptions<double> options(index_t window, LolcatsWindow shape) const {
    return {.window = window,
            .shape = shape,
            .query_map = rank3(query_map.c()),
            .key_map = rank3(key_map.c()),
            .window_weight = weight,
            .linear_weight = 0.9};
  }
  // The quadratic form, with the window as a set: [first, t].
  double expected(index_t h, index_t kv_head, index_t t, index_t first, index_t j) const {
    const Inputs x = problem.view();
    const auto map_of = [&](const Doubles& maps) {
      return reference::MatrixView{&maps.c()(0, h, 0, 0), {kDimK, features}, {features, 1}};
    };
    const Vector q = at(x[kQ], 0, h, t), phi_q = reference::lolcats_features(q, map_of(query_map));
    double largest = -HUGE_VAL, sum = 0, weights = 0;
    for (index_t s = first; s <= t; ++s) largest = std::max(largest, 0.5 * reference::dot(q, at(x[kK], 0, kv_head, s)));
    for (index_t s = 0; s <= t; ++s) {
      const Vector k = at(x[kK], 0, kv_head, s);
      const double w = s >= first ? weight[std::size_t(h)] * std::exp(0.5 * reference::dot(q, k) - largest)
                                  : 0.9 * reference::dot(phi_q, reference::lolcats_features(k, map_of(key_map)));
      sum += w * x[kV](0, kv_head, s, j);
      weights += w;
    }
    return sum / weights;
  }
};

}   // namespace

TEST_CASE("reference lolcats: window and linear part against the quadratic form") {
  for (const index_t kv_heads : {2, 1}) {
    for (const index_t len : {0, 1, 3, 4, 5, 13}) {
      for (const auto shape : {LolcatsWindow::sliding, LolcatsWindow::terraced}) {
        const index_t window = 4;
        const LolcatsProblem p(len, {2, kv_heads, kv_heads});
        const Inputs x = p.problem.view();
        Doubles out(1, 2, len, kDimV);
        reference::lolcats(x[kQ], x[kK], x[kV], out.view(), p.options(window, shape));
        Worst worst;
        for (index_t h = 0; h < 2; ++h) {
          for (index_t t = 0; t < len; ++t) {
            const index_t first = shape == LolcatsWindow::sliding ? t - window + 1 : (t / window - 1) * window;
            for (index_t j = 0; j < kDimV; ++j) {
              worst.see(out.c()(0, h, t, j), p.expected(h, kv_heads == 2 ? h : 0, t, std::max<index_t>(first, 0), j));
            }
          }
        }
        CHECK(worst.value <= kClose);
      }
    }
  }
}

TEST_CASE("reference lolcats: a stream handed on is the whole one") {
  const index_t len = 13, window = 4, features = 2 * LolcatsProblem::features;
  const LolcatsProblem p(len, {});
  const Inputs x = p.problem.view();
  const auto run = [&](index_t begin, index_t end, LolcatsOptions<double> lolcats, RecurrentOptions<double> options) {
    const Inputs part = x.cut(2, begin, end);
    Doubles out(1, 2, end - begin, kDimV);
    reference::lolcats(part[kQ], part[kK], part[kV], out.view(), lolcats, options);
    return out;
  };
  for (const auto shape : {LolcatsWindow::sliding, LolcatsWindow::terraced}) {
    for (index_t split = 0; split <= len; ++split) {
      INFO("split at " << split);
      const index_t kept = std::min(split, window);
      Doubles s(1, 2, features, kDimV), z(1, 1, 2, features), window_k(1, 2, kept, kDimK), window_v(1, 2, kept, kDimV);
      LolcatsOptions<double> first = p.options(window, shape), second = p.options(window, LolcatsWindow::sliding);
      first.final_key_sum = rank3(z.view());
      first.final_window_k = window_k.view();
      first.final_window_v = window_v.view();
      second.initial_key_sum = rank3(z.c());
      second.initial_window_k = window_k.c();
      second.initial_window_v = window_v.c();
      run(0, split, first, {.final_state = s.view()});
      const Doubles after = run(split, len, second, {.initial_state = s.c()});
      CHECK(after.data == slice(run(0, len, p.options(window, LolcatsWindow::sliding), {}), 0, split, len).data);
    }
  }
}

// ------------------------------------------------------------------ RWKV-4, mLSTM, S4D, the convolution, model gates

TEST_CASE("reference rwkv4: the stable state is the direct quotient") {
  for (const double shift : {0., 600., -600.}) {   // e^600 is finite, its square is not
    Problem problem(50, 1, {}, kLen);
    for (double& key : problem.all[kKeys].data) key += shift;
    const Inputs x = problem.view();
    Doubles out(1, 2, kLen, kDimV);
    reference::rwkv4(x[kKeys], x[kV], {x.rows(kW4), x.rows(kU4)}, out.view());
    Worst worst;
    for (index_t h = 0; h < 2; ++h) {
      for (index_t c = 0; c < kDimV; ++c) {
        const double w = x[kW4](0, h, 0, c), u = x[kU4](0, h, 0, c);
        for (index_t t = 0; t < kLen; ++t) {
          double sum = 0, weights = 0;
          for (index_t s = 0; s <= t; ++s) {   // the shift is common to all terms and cancels
            const double weight = std::exp((s == t ? u : double(t - 1 - s) * w) + x[kKeys](0, h, s, c) - shift);
            sum += weight * x[kV](0, h, s, c);
            weights += weight;
          }
          worst.see(out.c()(0, h, t, c), sum / weights);
        }
        worst.see(out.c()(0, h, 0, c), x[kV](0, h, 0, c));
      }
    }
    CHECK(worst.value <=
          (shift == 0 ? kClose
                      : 4 * 2 * kLen * 600 * 0x1p-53));   // an exponent near 600, rounded twice per token; values up to 4
  }
}

TEST_CASE("reference mlstm: any stabiliser gives the same, which is the unstabilised sum") {
  const Problem problem(51, 1, {}, kLen);
  const Inputs x = problem.view();
  const Carry empty(1, 2);
  const auto run = [&](const Carry& from, double eps) {
    Doubles out(1, 2, kLen, kDimV);
    const MlstmParameters<double> gates{
        .i = x[kI], .f = x[kF], .eps = eps, .initial_n = rank3(from.n.view()), .initial_m = rank2(from.m.view())};
    reference::mlstm(x[kQ], x[kK], x[kV], gates, out.view(), {.initial_state = from.s.view()});
    return out;
  };
  const Doubles out = run(empty, 0);
  Worst worst;
  for (index_t h = 0; h < 2; ++h) {
    for (index_t t = 0; t < kLen; ++t) {
      double sums[kDimV] = {}, weights = 0;
      for (index_t s = 0; s <= t; ++s) {
        double log_weight = x[kI](0, h, s, 0);
        for (index_t r = s + 1; r <= t; ++r) log_weight -= std::log1p(std::exp(-x[kF](0, h, r, 0)));
        const double weight = std::exp(log_weight) * 0.5 * reference::dot(at(x[kQ], 0, h, t), at(x[kK], 0, h, s));
        weights += weight;
        for (index_t j = 0; j < kDimV; ++j) sums[j] += weight * x[kV](0, h, s, j);
      }
      for (index_t j = 0; j < kDimV; ++j) worst.see(out.c()(0, h, t, j), sums[j] / std::max(std::abs(weights), 1.));
    }
  }
  CHECK(worst.value <= kClose);

  // A state divided by e^3 more, with m greater by 3, is the same state.
  Carry used = used_state(mechanisms()[11], 1, {});
  REQUIRE(std::string(mechanisms()[11].name) == "mlstm");
  const Doubles from_used = run(used, 0);
  for (Doubles* each : {&used.s, &used.n}) {
    for (double& value : each->data) value *= std::exp(-3.);
  }
  for (double& m : used.m.data) m += 3;
  Worst moved;
  moved.see(run(used, 0), from_used);
  CHECK(moved.value <= kClose);
  Worst unlike;
  unlike.see(from_used, out);
  CHECK(unlike.value > 1e-3);
}

TEST_CASE("reference s4d: the recurrence is the convolution") {
  const index_t len = 12, channels = 3, modes = 2;
  test::Random random(52);
  const auto normal = [&](auto...) { return double(random.normal()); };
  const auto u = Doubles::of(2, 1, len, channels, normal);
  const auto log_a = Doubles::of(1, 1, channels, modes, normal), imag = Doubles::of(1, 1, channels, modes, normal);
  const auto c_real = Doubles::of(1, 1, channels, modes, normal), c_imag = Doubles::of(1, 1, channels, modes, normal);
  const std::vector<double> log_dt{-2, -1, -3}, d{0.5, -1, 2};
  S4dParameters<double> parameters{rank2(log_a.c()), rank2(imag.c()), rank2(c_real.c()), rank2(c_imag.c()), log_dt, d};
  Doubles out(2, 1, len, channels);
  reference::s4d(u.c(), parameters, out.view());
  Worst worst;
  for (index_t c = 0; c < channels; ++c) {
    std::vector<double> kernel;
    for (index_t l = 0; l < len; ++l) {
      std::complex<double> sum = 0;
      for (index_t n = 0; n < modes; ++n) {
        const std::complex<double> a(-std::exp(log_a.c()(0, 0, c, n)), imag.c()(0, 0, c, n)),
            dt_a = std::exp(log_dt[std::size_t(c)]) * a;
        sum += std::complex<double>(c_real.c()(0, 0, c, n), c_imag.c()(0, 0, c, n)) * (std::exp(dt_a) - 1.) / a *
               std::exp(dt_a * double(l));
      }
      kernel.push_back(2 * sum.real());
    }
    for (index_t b = 0; b < 2; ++b) {
      for (index_t t = 0; t < len; ++t) {
        double y = d[std::size_t(c)] * u.c()(b, 0, t, c);
        for (index_t l = 0; l <= t; ++l) y += kernel[std::size_t(l)] * u.c()(b, 0, t - l, c);
        worst.see(out.c()(b, 0, t, c), y);
      }
    }
  }
  CHECK(worst.value <= kClose);

  for (index_t split = 0; split <= len; ++split) {
    Doubles state(2, channels, modes, 2), end = state, first(2, 1, split, channels), second(2, 1, len - split, channels);
    const auto part = [&](index_t begin, index_t count) {
      In x = u.c();
      x.data += begin * x.stride[2];
      x.extent[2] = count;
      return x;
    };
    S4dParameters<double> before = parameters, after = parameters;
    before.final_state = state.view();
    after.initial_state = state.c();
    after.final_state = end.view();
    reference::s4d(part(0, split), before, first.view());
    reference::s4d(part(split, len - split), after, second.view());
    for (index_t b = 0; b < 2; ++b) {
      CHECK(slice(first, b, 0, split).data == slice(out, b, 0, split).data);
      CHECK(slice(second, b, 0, len - split).data == slice(out, b, split, len).data);
    }
    if (split == len) CHECK(end.data == state.data);
  }
}

TEST_CASE("reference short convolution: by hand, and split anywhere") {
  const index_t len = 9, channels = 2, width = 4;
  test::Random random(53);
  const auto normal = [&](auto...) { return double(random.normal()); };
  const auto x = Doubles::of(1, 1, len, channels, normal), weight = Doubles::of(1, 1, channels, width, normal);
  const std::vector<double> bias{0.5, -0.25};
  for (const bool silu : {false, true}) {
    Doubles out(1, 1, len, channels);
    ShortConvParameters<double> parameters{.weight = rank2(weight.c()), .bias = bias, .silu = silu};
    reference::short_conv(x.c(), parameters, out.view());
    Worst worst;
    for (index_t c = 0; c < channels; ++c) {
      for (index_t t = 0; t < len; ++t) {
        double y = bias[std::size_t(c)];
        for (index_t back = 0; back < width && back <= t; ++back) {
          y += weight.c()(0, 0, c, width - 1 - back) * x.c()(0, 0, t - back, c);
        }
        worst.see(out.c()(0, 0, t, c), silu ? y / (1 + std::exp(-y)) : y);
      }
    }
    CHECK(worst.value <= kClose);

    for (const index_t kept : {width - 1, width}) {   // both conventions of how many inputs are kept
      for (index_t split = 0; split <= len; ++split) {
        Doubles state(1, 1, channels, kept), first(1, 1, split, channels), second(1, 1, len - split, channels);
        ShortConvParameters<double> before = parameters, after = parameters;
        before.final_state = rank3(state.view());
        after.initial_state = rank3(state.c());
        In head = x.c(), tail = x.c();
        head.extent[2] = split;
        tail.data += split * tail.stride[2];
        tail.extent[2] = len - split;
        reference::short_conv(head, before, first.view());
        reference::short_conv(tail, after, second.view());
        CHECK(first.data == slice(out, 0, 0, split).data);
        CHECK(second.data == slice(out, 0, split, len).data);
      }
    }
  }
}

TEST_CASE("reference recurrent: gates and slopes of the models") {
  using namespace reference;
  const double ln2 = std::log(2.);
  CHECK(softplus(0) == Catch::Approx(ln2).epsilon(1e-14));
  CHECK(softplus(800) == 800);
  CHECK(softplus(-40) == Catch::Approx(std::exp(-40.)).epsilon(1e-14));   // where log(1 + e^x) without log1p is 0
  CHECK(log_sigmoid(-800) == -800);
  CHECK(log_sigmoid(1.5) == Catch::Approx(std::log(logistic(1.5))).epsilon(1e-14));
  CHECK(gla_gate(0) == Catch::Approx(-ln2 / 16).epsilon(1e-14));
  CHECK(gated_delta_gate(0.3, ln2, -0.3) == Catch::Approx(-2 * ln2).epsilon(1e-14));
  CHECK(kda_gate(0.3, ln2, -0.3) == Catch::Approx(-2 * ln2).epsilon(1e-14));
  CHECK(kda_bounded_gate(0.3, ln2, -0.3, -5) == Catch::Approx(-2.5).epsilon(1e-14));
  CHECK(kda_bounded_gate(1, ln2, 0, -5) == Catch::Approx(-5 / (1 + std::exp(-2.))).epsilon(1e-14));
  CHECK(kda_bounded_gate(1000, 0, 0, -5) == -5);
  CHECK(rwkv6_gate(0.5) == Catch::Approx(-std::exp(0.5)).epsilon(1e-14));
  CHECK(rwkv7_gate(0) == Catch::Approx(-0.303265329856317).epsilon(1e-14));
  CHECK(rwkv7_gate(1000) == Catch::Approx(-0.606530659712633).epsilon(1e-14));
  CHECK(rwkv7_bonus(Vector{1., 2.}, Vector{3., 4.}, Vector{0.5, 0.25}) == 3.5);
  CHECK(hgrn2_alpha(0, 0.2) == Catch::Approx(0.6).epsilon(1e-14));
  CHECK(retention_gamma(0) == 31. / 32);
  CHECK(retention_gamma(3) == 255. / 256);
  CHECK(minimax_slope(0, 8, 0, 80) == Catch::Approx(0.5 * (1 + 1e-5)).epsilon(1e-14));
  CHECK(minimax_slope(7, 8, 79, 80) == Catch::Approx((1 - 79 / (79 + 1e-5) + 1e-5) / 256).epsilon(1e-12));
  CHECK(transnormer_slope(0, 8, 3, 10) == 0);
  CHECK(transnormer_slope(4, 8, 5, 10) == Catch::Approx(2).epsilon(1e-14));

  // A rotated product depends on the distance only.
  const Vector q{0.3, -0.7, 0.2, 0.9, -0.4, 0.1}, k{0.5, 0.6, -0.3, 0.8, 0.7, -0.2};
  CHECK(dot(retention_rotated(q, 9), retention_rotated(k, 4)) ==
        Catch::Approx(dot(retention_rotated(q, 5), retention_rotated(k, 0))).epsilon(1e-13));
  CHECK(retention_rotated(Vector{1., 0.}, 1)[1] == Catch::Approx(std::sin(1.)).epsilon(1e-14));
  CHECK(retention_rotated(Vector{0., 0., 1., 0.}, 10000)[2] == Catch::Approx(std::cos(1.)).epsilon(1e-12));
}

// -------------------------------------------------------------------------------------------------- log-linear attention

TEST_CASE("reference log-linear: the buckets of a token are the runs of its binary digits") {
  using namespace reference;
  CHECK(levels_of(0) == 1);
  CHECK(levels_of(7) == 4);
  CHECK(levels_of(8) == 5);
  CHECK(levels_of(16383) == 15);
  for (index_t t = 0; t < 70; ++t) {
    index_t live = 0, covered = 0;
    for (index_t level = 0; level < 10; ++level) {
      index_t members = 0;
      for (index_t s = 0; s <= t; ++s) members += index_t(std::bit_width(std::size_t(t ^ s))) == level;
      CHECK(live_level(t, level) == (members > 0));
      if (level > 0 && members > 0) CHECK(members == index_t(1) << (level - 1));
      live += members > 0;
      covered += members;
    }
    CHECK(live == index_t(std::popcount(std::size_t(t))) + 1);
    CHECK(covered == t + 1);
  }
}

TEST_CASE("reference log-linear: weights of one are the mechanism itself, weights of zero leave the token") {
  const index_t len = 19;
  const Problem problem(60, 1, {}, len);
  const Inputs x = problem.view();
  using Options = RecurrentOptions<double>;
  const Doubles ones = filled(x[kLambda], 1);
  const auto own = made(x[kLambda], kLevels, [](index_t, index_t, index_t, index_t l) { return l == 0 ? 2. : 0.; });
  const Doubles zeros(1, 2, kDimK, kDimV);
  const auto base = [&](auto&& body) {
    const auto unscaled = [&](Out o, Options r) {
      r.scale = 1;
      body(o, r);
    };
    return outcome(unscaled, len, zeros);
  };
  const std::vector<double> a = x.numbers(kA);
  const auto run = [&](auto&& body, const Doubles& lambda) {
    Doubles levels(2, kLevels, kDimK, kDimV);
    Outcome result{Doubles(1, 2, len, kDimV), Doubles(1, 2, kDimK, kDimV)};
    body(LogLinearOptions<double>{.level_weight = lambda.c(), .final_levels = rank5(levels.view(), 1)}, result.out.view());
    for (index_t h = 0; h < 2; ++h) {
      for (index_t l = 0; l < kLevels; ++l) {
        for (index_t i = 0; i < kDimK; ++i) {
          for (index_t j = 0; j < kDimV; ++j) {
            result.state.view()(0, h, i, j) += levels.c()(h, l, i, j);
            if (!reference::live_level(len - 1, l)) CHECK(levels.c()(h, l, i, j) == 0);
          }
        }
      }
    }
    return result;
  };
  const auto gla = [&](const LogLinearOptions<double>& l, Out o) {
    reference::log_linear_simple_gla(x[kQ], x[kK], x[kV], {x[kGate]}, l, o);
  };
  const auto mamba2 = [&](const LogLinearOptions<double>& l, Out o) {
    reference::log_linear_mamba2(x[kV], x[kK], x[kQ], {x[kDt], a, x.rows(kD)}, l, o);
  };
  const auto gdn = [&](const LogLinearOptions<double>& l, Out o) {
    reference::log_linear_gated_delta(x[kQ], x[kK], x[kV], {x[kGate]}, x[kBeta], l, o);
  };
  const auto base_gla = base([&](Out o, Options r) { reference::simple_gla(x[kQ], x[kK], x[kV], {x[kGate]}, o, r); });
  const auto base_mamba2 = base([&](Out o, Options r) {
    reference::mamba2(x[kV], x[kK], x[kQ], {x[kDt], a, x.rows(kD)}, o, r);
  });
  const auto base_gdn =
      base([&](Out o, Options r) { reference::gated_delta(x[kQ], x[kK], x[kV], {x[kGate]}, x[kBeta], o, r); });
  CHECK(run(gla, ones).distance(base_gla) <= kClose);
  CHECK(run(mamba2, ones).distance(base_mamba2) <= kClose);
  CHECK(run(gdn, ones).distance(base_gdn) <= kClose);

  const Outcome alone = run(gla, own), alone_gdn = run(gdn, own);
  Worst worst;
  for (index_t h = 0; h < 2; ++h) {
    for (index_t t = 0; t < len; ++t) {
      const double qk = reference::dot(at(x[kQ], 0, h, t), at(x[kK], 0, h, t));
      for (index_t j = 0; j < kDimV; ++j) {
        worst.see(alone.out.c()(0, h, t, j), 2 * qk * x[kV](0, h, t, j));
        worst.see(alone_gdn.out.c()(0, h, t, j), 2 * qk * x[kBeta](0, h, t, 0) * x[kV](0, h, t, j));
      }
    }
  }
  CHECK(worst.value <= kClose);
}
