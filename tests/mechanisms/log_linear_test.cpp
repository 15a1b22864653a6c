// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/log_linear.hpp"

#include "fovea/reference/gated_delta.hpp"
#include "fovea/reference/log_linear.hpp"
#include "fovea/reference/mamba2.hpp"
#include "fovea/reference/simple_gla.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
using fovea::LogLinearOptions;
using test::Random;
namespace reference = fovea::reference;

namespace {

enum class Kind { simple_gla, mamba2, gated_delta };
constexpr Kind kKinds[] = {Kind::simple_gla, Kind::mamba2, Kind::gated_delta};

const char* name_of(Kind kind) {
  return kind == Kind::simple_gla ? "simple GLA" : kind == Kind::mamba2 ? "Mamba-2" : "Gated DeltaNet";
}

index_t levels_of(index_t tokens) { return tokens == 0 ? 0 : reference::levels_of(tokens - 1); }

// [sequence, head * level, row, column] as [sequence, head, level, row, column].
template <class T>
View<T, 5> by_level(const View<T, 4>& x, index_t levels) {
  return {x.data,
          {x.extent[0], x.extent[1] / levels, levels, x.extent[2], x.extent[3]},
          {x.stride[0], x.stride[1] * levels, x.stride[1], x.stride[2], x.stride[3]}};
}

// What a log-linear call has besides what every recurrent one has.
struct LevelCase {
  Kind kind = Kind::gated_delta;
  std::vector<index_t> first{};   // one per sequence, or none
  index_t spare_levels = 0;       // more than the tokens need
  bool shared_lambda = false;     // one for all heads
};

struct LevelAnswer {
  Numbers out, levels;
  bool operator==(const LevelAnswer& other) const {
    return out.bytes() == other.out.bytes() && levels.bytes() == other.levels.bytes();
  }
};

Mechanism shell(Kind kind) {   // what Problem asks about a mechanism
  Mechanism mechanism{name_of(kind), {}, {}, Gates::token, kind == Kind::gated_delta};
  mechanism.per_head = [](index_t head) { return -0.5 - static_cast<double>(head); };
  return mechanism;
}

class LevelProblem {
 public:
  LevelCase at_level;
  Problem base;
  index_t levels = 1;
  Numbers lambda, initial;   // dead levels stay poison

  LevelProblem(const LevelCase& level_case, const Case& c) : at_level(level_case), base(shell(level_case.kind), c) {
    for (index_t s = 0; s < base.c.sequences(); ++s) levels = std::max(levels, levels_of(first(s) + len(s)));
    levels += at_level.spare_levels;
    Random random(base.c.seed + 77);
    const index_t heads = at_level.shared_lambda ? 1 : base.c.heads.states();
    lambda = Numbers({base.c.batch, heads, base.c.len, levels}, Format::f32, base.c.gate_placement);
    lambda.each([&](index_t b, index_t h, index_t t, index_t l) {
      const double value = random.uniform(-0.5f, 1.f);
      if (t < base.owned()) lambda.put(b, h, t, l, value);
    });
    initial = like_levels();
    initial.each([&](index_t s, index_t hl, index_t i, index_t j) {
      const double value = random.normal();
      if (live(first(s), hl % levels)) initial.put(s, hl, i, j, value);
    });
  }

  index_t first(index_t s) const { return at_level.first.empty() ? 0 : at_level.first[at(s)]; }
  index_t len(index_t s) const { return base.cu_len.empty() ? base.c.len : base.cu_len[at(s) + 1] - base.cu_len[at(s)]; }
  static bool live(index_t tokens, index_t l) { return l < levels_of(tokens) && reference::live_level(tokens - 1, l); }
  Numbers like_levels() const {
    const std::array<index_t, 4> one = base.like_state().extent();
    return Numbers({one[0], one[1] * levels, one[2], one[3]}, Format::f32, base.c.state_placement);
  }
  LevelAnswer answer() const { return {base.answer(shell(at_level.kind)).out, like_levels()}; }

  // f(arguments, levels) may change anything; then the call.
  template <class F>
  Status run(LevelAnswer& a, const How& how, const F& f) const {
    Mechanism mechanism = shell(at_level.kind);
    Answer with{a.out, base.like_state(), {}, {}};
    Arguments<float> x = base.arguments(mechanism, with);
    x.out = a.out.result();
    x.options.initial_state = {};
    x.options.final_state = {};
    LogLinearOptions<float> options{lambda.floats(), at_level.first, {}, by_level(a.levels.writable(), levels)};
    if (base.c.initial) options.initial_levels = by_level(initial.floats(), levels);
    f(x, options);
    mechanism.run = [&](const Arguments<float>& y) {
      if (at_level.kind == Kind::simple_gla)
        return fovea::log_linear_simple_gla(y.q, y.k, y.v, y.decay, options, y.out, y.options);
      if (at_level.kind == Kind::mamba2)
        return fovea::log_linear_mamba2(y.v, y.k, y.q, {y.dt, y.per_head, y.skip}, options, y.out, y.options);
      return fovea::log_linear_gated_delta(y.q, y.k, y.v, y.decay, y.beta, options, y.out, y.options);
    };
    return call(mechanism, x, how);
  }
  LevelAnswer run(const How& how) const {
    LevelAnswer a = answer();
    const Status status = run(a, how, [](auto&, auto&) {});
    INFO(status.message());
    REQUIRE(status.ok());
    return a;
  }

  struct Expected {
    Exact out, levels;
  };
  Expected expected() const {
    Mechanism mechanism = shell(at_level.kind);
    const Exact exact_lambda(lambda);
    Exact exact_initial(initial);
    for (double& x : exact_initial.data()) x = std::isnan(x) ? 0 : x;
    Exact finals(like_levels().extent());
    LogLinearOptions<double> options{exact_lambda.view(), at_level.first, {}, by_level(finals.writable(), levels)};
    if (base.c.initial) options.initial_levels = by_level(exact_initial.view(), levels);
    mechanism.reference = [&](const Arguments<double>& y) {
      if (at_level.kind == Kind::simple_gla)
        return reference::log_linear_simple_gla(y.q, y.k, y.v, y.decay, options, y.out, y.options);
      if (at_level.kind == Kind::mamba2)
        return reference::log_linear_mamba2(y.v, y.k, y.q, {y.dt, y.per_head, y.skip}, options, y.out, y.options);
      reference::log_linear_gated_delta(y.q, y.k, y.v, y.decay, y.beta, options, y.out, y.options);
    };
    return {base.expected(mechanism).out, finals};
  }
};

// Root mean square of the difference within a sequence and head, over all its levels; dead ones are zeros.
double level_distance(const Numbers& got, const Exact& expected, index_t levels) {
  double worst = 0;
  const auto& e = got.extent();
  for (index_t s = 0; s < e[0]; ++s) {
    for (index_t h = 0; h < e[1]; h += levels) {
      Distance head;
      for (index_t l = h; l < h + levels; ++l) {
        for (index_t i = 0; i < e[2]; ++i) {
          for (index_t j = 0; j < e[3]; ++j) head.see(got.get(s, l, i, j), expected(s, l, i, j));
        }
      }
      worst = std::max(worst, head.value());
    }
  }
  return worst;
}

std::string describe(const LevelProblem& x, const How& how) {
  std::string text = std::string(name_of(x.at_level.kind)) + ": " + test::recurrent::describe(x.base.c) + ", levels " +
                     std::to_string(x.levels) + ", first";
  for (const index_t n : x.at_level.first) text += " " + std::to_string(n);
  return text + ", " + test::recurrent::describe(how);
}

LevelAnswer check(const LevelProblem& x, const LevelProblem::Expected& expected, const How& how,
                  double allowed = kRelativeError) {
  const LevelAnswer a = x.run(how);
  const double out = distance(a.out, expected.out, x.base.owned()),
               state = level_distance(a.levels, expected.levels, x.levels);
  bool dead_are_zero = true;
  a.levels.each([&](index_t s, index_t hl, index_t i, index_t j) {
    const bool live = LevelProblem::live(x.first(s) + x.len(s), hl % x.levels);
    dead_are_zero = dead_are_zero && (live || a.levels.get(s, hl, i, j) == 0);
  });
  INFO(describe(x, how));
  CHECK(out <= allowed + unit_of(x.base.c.out_format));
  CHECK(state <= std::max(allowed, kRelativeError));
  CHECK(dead_are_zero);
  CHECK(a.out.gaps_intact());
  CHECK(a.levels.gaps_intact());
  return a;
}

const std::vector<How>& level_forms() {
  using enum RecurrentForm;
  static const std::vector<How> list = {{automatic},   {step},        {fused},        {chunked},
                                        {chunked, 1},  {chunked, 2},  {chunked, 8},   {chunked, 16},
                                        {chunked, 32}, {chunked, 64}, {chunked, 128}, {chunked, 256}};
  return list;
}

// The tokens [begin, end) of a problem with one sequence, from the levels that the tokens before left. grows: the views show
// no more levels than the tokens so far need.
LevelAnswer part_of(const LevelProblem& x, index_t begin, index_t end, const LevelAnswer* before, bool in_place,
                    const How& how, bool grows = false) {
  LevelProblem part = x;
  const auto cut = [&](Numbers& all) {
    if (all.extent()[2] != x.base.c.len) return;
    std::array<index_t, 4> extent = all.extent();
    extent[2] = end - begin;
    Numbers some(extent, all.format());
    some.each([&](index_t a, index_t b, index_t t, index_t d) { some.put(a, b, t, d, all.get(a, b, begin + t, d)); });
    all = some;
  };
  for (Numbers* all :
       {&part.base.q, &part.base.k, &part.base.v, &part.base.gate, &part.base.beta, &part.base.dt, &part.lambda})
    cut(*all);
  part.base.c.len = end - begin;
  part.at_level.first.assign(at(x.base.c.sequences()), x.first(0) + begin);
  if (before != nullptr) part.initial = before->levels;
  LevelAnswer a = part.answer();
  if (in_place) a.levels = part.initial;
  const Status status = part.run(a, how, [&](auto&, auto& options) {
    if (in_place) options.initial_levels = options.final_levels;
    if (grows) options.initial_levels.extent[2] = std::max<index_t>(levels_of(x.first(0) + begin), 1);
    if (grows) options.final_levels.extent[2] = levels_of(x.first(0) + end);
  });
  INFO(status.message());
  REQUIRE(status.ok());
  return a;
}

}   // namespace

TEST_CASE("log-linear: golden values") {
  using namespace test;
  for (const Kind kind : {Kind::simple_gla, Kind::gated_delta}) {
    LevelProblem x({.kind = kind}, {.len = kGoldenLen, .dim_k = kGoldenDimK, .dim_v = kGoldenDimV, .initial = false});
    const auto rows = [](Numbers& to, auto f) {
      to.fill([&](index_t, index_t, index_t t, index_t i) { return f(static_cast<double>(t), static_cast<double>(i)); });
    };
    rows(x.base.q, golden_q);
    rows(x.base.k, golden_k);
    rows(x.base.v, golden_v);
    rows(x.base.gate, golden_gate);
    rows(x.base.beta, [](double t, double) { return golden_beta(t); });
    rows(x.lambda, golden_lambda);
    const std::string name = kind == Kind::gated_delta ? "log_linear_gated_delta" : "log_linear_mamba2";
    const auto golden = std::find_if(std::begin(kRecurrentGoldens), std::end(kRecurrentGoldens),
                                     [&](const RecurrentGolden& g) { return g.name == name; });
    REQUIRE(golden != std::end(kRecurrentGoldens));
    for (const How& how : level_forms()) {
      INFO(name << ", " << test::recurrent::describe(how));
      const LevelAnswer a = x.run(how);
      double out_squares = 0, state_squares = 0;
      for (const double o : a.out.values()) out_squares += o * o;
      for (index_t i = 0; i < kGoldenDimK; ++i) {
        for (index_t j = 0; j < kGoldenDimV; ++j) {
          double sum = 0;
          for (index_t l = 0; l < x.levels; ++l) sum += a.levels.get(0, l, i, j);
          state_squares += sum * sum;
        }
      }
      for (index_t j = 0; j < kGoldenDimV; ++j)
        CHECK(a.out.get(0, 0, kGoldenLen - 1, j) == Catch::Approx(golden->last[at(j)]).epsilon(kRelativeError));
      CHECK(out_squares == Catch::Approx(golden->out_squares).epsilon(kRelativeError));
      CHECK(state_squares == Catch::Approx(golden->state_squares).epsilon(kRelativeError));
    }
  }
}

TEST_CASE("log-linear: lengths and starts around every chunk, in every form") {
  for (const Kind kind : kKinds) {
    for (const index_t len : {1, 2, 3, 15, 16, 17, 45, 63, 64, 65, 129, 199, 300}) {
      for (const index_t first : {0, 1, 16, 37, 64, 1000}) {
        if (len > 130 && first > 16) continue;
        const LevelProblem x({.kind = kind, .first = {first}}, {.seed = 10 + static_cast<std::uint64_t>(len),
                                                                .len = len,
                                                                .initial = first % 2 == 0,
                                                                .betas = len % 2 == 0 ? Betas::two : Betas::unit});
        const LevelProblem::Expected expected = x.expected();
        for (const How& how : level_forms()) check(x, expected, how);
      }
    }
  }
}

// Two whole chunks of the longest lengths merge, and what they leave is read.
TEST_CASE("log-linear: lengths around chunks of 128 and 256") {
  for (const Kind kind : kKinds) {
    for (const index_t len : {127, 128, 255, 256, 257, 391, 775}) {
      const LevelProblem x({.kind = kind, .first = {0}}, {.seed = 20 + static_cast<std::uint64_t>(len), .len = len, .betas = Betas::unit});
      const LevelProblem::Expected expected = x.expected();
      for (const index_t chunk : {128, 256}) check(x, expected, {RecurrentForm::chunked, chunk});
    }
  }
}

// Dims with part of a panel, whole ones and both; levels passed over by one product (small dim_k) and by two.
TEST_CASE("log-linear: every option with every other", "[grid]") {
  const GridRange range{.dims = {{4, 3}, {16, 16}, {33, 17}, {1, 1}, {64, 64}, {20, 72}, {100, 7}},
                        .lens = {1, 7, 16, 33, 64, 79, 130},
                        .batches = {1, 1, 2},
                        .large = 300,
                        .len_of_large = 40};
  for (const std::size_t n : chosen_cases(60)) {
    Random random(9000 + n);
    LevelCase level_case{.kind = kKinds[n % 3]};
    Case c = random_case(random, 9500 + n, range, false);
    // by_level() cuts levels out of the heads, so these have a stride that memory has, and not a negative one.
    c.state_placement = random.pick({Placement::bhsd, Placement::bshd, Placement::padded, Placement::inner2});
    c.wide_beta = false;
    for (index_t s = 0; s < c.sequences() && random.one_in(2); ++s) {
      level_case.first.assign(at(c.sequences()), 0);
      for (index_t& first : level_case.first) first = random.pick({0, 1, 31, 48, 64, 96, 1000});
    }
    level_case.spare_levels = random.below(3);
    level_case.shared_lambda = random.one_in(3);
    const LevelProblem x(level_case, c);
    const LevelProblem::Expected expected = x.expected();
    const std::vector<How>& forms = level_forms();
    const std::size_t first = at(random.below(static_cast<index_t>(forms.size())));
    for (std::size_t i = 0; i < 4; ++i) {
      How how = forms[(first + 5 * i) % forms.size()];
      how.lanes = random.pick({1, 1, 2, 3});
      how.pool = random.pick({Pool::serial, Pool::threads, Pool::reversed});
      check(x, expected, how);
    }
  }
}

TEST_CASE("log-linear: a sequence split anywhere is the whole one") {
  for (const Kind kind : kKinds) {
    const index_t len = 83;
    const LevelProblem x({.kind = kind}, {.seed = 30, .len = len, .heads = {2, 1, 2}, .dim_k = 12, .dim_v = 20});
    const LevelProblem::Expected expected = x.expected();
    for (const How& how : {How{RecurrentForm::automatic}, How{RecurrentForm::chunked, 16}, How{RecurrentForm::chunked, 8}}) {
      for (const index_t split : {1, 7, 8, 9, 16, 24, 31, 32, 33, 48, 63, 64, 65, 82, 83}) {
        const LevelAnswer head = part_of(x, 0, split, nullptr, false, how), tail = part_of(x, split, len, &head, false, how);
        LevelAnswer joined = x.answer();
        joined.out.fill([&](index_t b, index_t h, index_t t, index_t d) {
          return t < split ? head.out.get(b, h, t, d) : tail.out.get(b, h, t - split, d);
        });
        INFO(describe(x, how) << ", split at " << split);
        CHECK(distance(joined.out, expected.out, len) <= kRelativeError);
        CHECK(level_distance(tail.levels, expected.levels, x.levels) <= kRelativeError);
      }
    }
  }
}

TEST_CASE("log-linear: decode in place, token after token, in both layouts") {
  for (const Kind kind : kKinds) {
    for (const StateLayout layout : {StateLayout::k_first, StateLayout::v_first}) {
      for (const index_t dim_v : {20, 64}) {
        const index_t len = 40;
        const LevelProblem x(
            {.kind = kind},
            {.seed = 40, .batch = 2, .len = len, .heads = {4, 2, 2}, .dim_k = 17, .dim_v = dim_v, .layout = layout});
        const LevelProblem::Expected expected = x.expected();
        for (const RecurrentForm form :
             {RecurrentForm::automatic, RecurrentForm::step, RecurrentForm::fused, RecurrentForm::chunked}) {
          INFO(name_of(kind) << ", " << fovea::name_of(form));
          LevelAnswer all = x.answer(), before;
          for (index_t t = 0; t < len; ++t) {
            const LevelAnswer one = part_of(x, t, t + 1, t > 0 ? &before : nullptr, true, {form});
            one.out.each(
                [&](index_t b, index_t h, index_t, index_t d) { all.out.put(b, h, t, d, one.out.get(b, h, 0, d)); });
            before = one;
          }
          all.levels = before.levels;
          CHECK(distance(all.out, expected.out, len) <= kRelativeError);
          CHECK(level_distance(all.levels, expected.levels, x.levels) <= kRelativeError);
        }
      }
    }
  }
}

TEST_CASE("log-linear: decode in one buffer with room for the levels to come") {
  for (const Kind kind : kKinds) {
    const LevelProblem x({.kind = kind}, {.seed = 45, .batch = 2, .len = 6, .heads = {2, 2, 4}, .dim_k = 17, .dim_v = 20});
    for (const RecurrentForm form :
         {RecurrentForm::automatic, RecurrentForm::step, RecurrentForm::fused, RecurrentForm::chunked}) {
      LevelAnswer grown, apart;
      for (index_t t = 0; t < 6; ++t) {
        INFO(name_of(kind) << ", " << fovea::name_of(form) << ", token " << t);
        grown = part_of(x, t, t + 1, t > 0 ? &grown : nullptr, true, {form}, true);
        apart = part_of(x, t, t + 1, t > 0 ? &apart : nullptr, false, {form});
        bool same = grown.out.bytes() == apart.out.bytes();
        apart.levels.each([&](index_t s, index_t hl, index_t i, index_t j) {
          if (!LevelProblem::live(t + 1, hl % x.levels)) return;
          same = same && grown.levels.get(s, hl, i, j) == apart.levels.get(s, hl, i, j);
        });
        CHECK(same);
      }
    }
  }
}

// Weights of 1: the buckets together are the plain recurrence, and so is the sum of the states.
TEST_CASE("log-linear: with all weights 1 it is Mamba-2 or Gated DeltaNet") {
  for (const Kind kind : kKinds) {
    LevelProblem x({.kind = kind}, {.seed = 50, .len = 150, .heads = {2, 1, 2}, .dim_k = 12, .dim_v = 20, .initial = false});
    x.lambda.fill([](auto...) { return 1; });
    Mechanism plain = shell(kind);
    plain.reference = [&](const Arguments<double>& y) {
      RecurrentOptions<double> options = y.options;
      options.scale = 1;
      if (kind == Kind::simple_gla) return reference::simple_gla(y.q, y.k, y.v, y.decay, y.out, options);
      if (kind == Kind::mamba2) return reference::mamba2(y.v, y.k, y.q, {y.dt, y.per_head, y.skip}, y.out, options);
      reference::gated_delta(y.q, y.k, y.v, y.decay, y.beta, y.out, options);
    };
    const Expected expected = x.base.expected(plain);
    for (const How& how : level_forms()) {
      INFO(describe(x, how));
      const LevelAnswer a = x.run(how);
      Numbers sum = x.base.like_state();
      sum.fill([&](index_t s, index_t h, index_t i, index_t j) {
        double total = 0;
        for (index_t l = 0; l < x.levels; ++l) total += a.levels.get(s, h * x.levels + l, i, j);
        return total;
      });
      CHECK(distance(a.out, expected.out, 150) <= kRelativeError);
      CHECK(distance(sum, expected.state, 12) <= kRelativeError);
    }
  }
}

// Token t sees token s through the factors between them, weighed by the level of the pair, which is bit_width(t ^ s):
// the parallel form, which knows neither buckets nor merges. It covers 5.6: lambda of level 0 alone is the token itself, of
// another level alone its bucket.
TEST_CASE("log-linear: the sum over pairs of tokens, by all levels and by one at a time") {
  constexpr index_t kLen = 300, kDimK = 5, kDimV = 6;
  LevelProblem x({.kind = Kind::simple_gla}, {.seed = 60, .len = kLen, .dim_k = kDimK, .dim_v = kDimV, .initial = false});
  for (const index_t only : {-1, 0, 1, 4, 7, 9}) {
    if (only >= 0)
      x.lambda.fill(
          [&](index_t, index_t, index_t t, index_t l) { return l == only ? 0.5 + 0.001 * static_cast<double>(t) : 0; });
    Exact out({1, 1, kLen, kDimV});
    for (index_t t = 0; t < kLen; ++t) {
      double between = 1;
      for (index_t s = t; s >= 0; --s) {
        double score = 0;
        for (index_t i = 0; i < kDimK; ++i) score += x.base.q.get(0, 0, t, i) * x.base.k.get(0, 0, s, i);
        const index_t level = static_cast<index_t>(std::bit_width(static_cast<unsigned>(t ^ s)));
        const double weight = score * between * x.lambda.get(0, 0, t, level);
        for (index_t j = 0; j < kDimV; ++j) out.data()[at(t * kDimV + j)] += weight * x.base.v.get(0, 0, s, j);
        between *= std::exp(x.base.gate.get(0, 0, s, 0));
      }
    }
    for (const How& how : {How{RecurrentForm::fused}, How{RecurrentForm::chunked, 16}, How{RecurrentForm::chunked, 64}}) {
      INFO("level " << only << ", " << test::recurrent::describe(how));
      CHECK(distance(x.run(how).out, out, kLen) <= kRelativeError);
    }
  }
}

TEST_CASE("log-linear: popcount(t) + 1 levels are live after token t") {
  for (const index_t len : {1, 2, 3, 16, 17, 33, 64, 65, 96, 100, 129}) {
    const LevelProblem x({}, {.seed = 70, .len = len, .initial = false});
    for (const How& how : level_forms()) {
      INFO(describe(x, how));
      const LevelAnswer a = x.run(how);
      index_t live = 0;
      for (index_t l = 0; l < x.levels; ++l) {
        double squares = 0;
        for (index_t i = 0; i < 4; ++i) {
          for (index_t j = 0; j < 3; ++j) squares += a.levels.get(0, l, i, j) * a.levels.get(0, l, i, j);
        }
        const bool due = l == 0 || (((len - 1) >> (l - 1)) & 1) == 1;
        CHECK((squares > 0) == due);
        live += squares > 0 ? 1 : 0;
      }
      CHECK(live == std::popcount(static_cast<unsigned>(len - 1)) + 1);
    }
  }
}

// Many merges, and in the second case the carry of all bits at once.
TEST_CASE("log-linear: long sequences") {
  for (const Kind kind : kKinds) {
    for (const index_t first : {index_t{0}, (index_t{1} << 20) - 700}) {
      const LevelProblem x({.kind = kind, .first = {first}}, {.seed = 80,
                                                              .len = 2500,
                                                              .dim_k = 16,
                                                              .dim_v = 8,
                                                              .initial = false,
                                                              .gating = Gating::slow,
                                                              .betas = Betas::unit});
      const LevelProblem::Expected expected = x.expected();
      for (const How& how : {How{RecurrentForm::automatic}, How{RecurrentForm::chunked, 16}, How{RecurrentForm::fused}})
        check(x, expected, how);
    }
  }
}

// Gates that forget none of 5000 tokens, in every form; buckets are decayed as they are merged, so there is no more to round
// than in one state.
TEST_CASE("log-linear: 5000 tokens, all of them remembered") {
  for (const Kind kind : kKinds) {
    LevelProblem x({.kind = kind},
                   {.seed = 81,
                    .len = 5000,
                    .dim_k = 8,
                    .dim_v = 4,
                    .layout = kind == Kind::simple_gla ? StateLayout::v_first : StateLayout::k_first,
                    .initial = false});
    Random random(82);
    x.base.gate.fill([&](auto...) { return -kFaint * random.uniform(); });
    x.base.dt.fill([&](auto...) { return 2 * kFaint * random.uniform(); });   // A is -1/2
    x.base.beta.fill([&](auto...) { return 0.02 * random.uniform(); });
    const LevelProblem::Expected expected = x.expected();
    for (const How& how : {How{RecurrentForm::step}, How{RecurrentForm::fused}, How{RecurrentForm::chunked, 64}})
      check(x, expected, how, drift_of(5000, how));
  }
}

TEST_CASE("log-linear: the number of lanes changes no bit") {
  for (const Kind kind : kKinds) {
    for (const Case& c : {Case{.seed = 90, .len = 100, .heads = {1, 1, 1}, .dim_k = 20, .dim_v = 100},
                          Case{.seed = 91, .batch = 2, .len = 70, .heads = {2, 2, 4}, .dim_k = 16, .dim_v = 40},
                          Case{.seed = 92, .len = 1, .heads = {4, 2, 2}, .dim_k = 16, .dim_v = 70}}) {
      const LevelProblem x({.kind = kind}, c);
      for (const How& form : {How{RecurrentForm::automatic}, How{RecurrentForm::step}, How{RecurrentForm::fused},
                              How{RecurrentForm::chunked, 16}, How{RecurrentForm::chunked, 32}}) {
        const LevelAnswer one = x.run(form);
        for (const auto& [lanes, pool] :
             {std::pair{2, Pool::threads}, std::pair{3, Pool::threads}, std::pair{3, Pool::reversed},
              std::pair{8, Pool::threads}, std::pair{200, Pool::serial}}) {
          const How how{form.form, form.chunk, lanes, pool};
          INFO(describe(x, how));
          CHECK(x.run(how) == one);
        }
      }
    }
  }
}

// A workspace of exactly the size that the refusal names, full of NaN: the same bits, and nothing behind it written.
TEST_CASE("log-linear: the caller's workspace") {
  for (const Kind kind : kKinds) {
    const LevelProblem x({.kind = kind, .first = {5}},
                         {.seed = 100, .len = 70, .heads = {2, 1, 2}, .dim_k = 33, .dim_v = 17});
    for (const How& form : level_forms()) {
      const LevelAnswer one = x.run(form);
      for (const int lanes : {1, 3}) {
        const How how{form.form, form.chunk, lanes};
        INFO(describe(x, how));
        std::byte too_small[1];
        LevelAnswer a = x.answer();
        const Status status = x.run(a, how, [&](auto& y, auto&) { y.options.workspace = too_small; });
        CHECK(status.code() == fovea::Code::workspace_too_small);
        CHECK((a.out.untouched() && a.levels.untouched()));
        const std::string message = status.message(), words = "needs ";
        REQUIRE(message.find(words) != std::string::npos);
        const auto wanted = std::strtoul(message.c_str() + message.find(words) + words.size(), nullptr, 10);
        for (const std::size_t misalign : {std::size_t{0}, std::size_t{36}}) {
          test::PoisonedBytes bytes(wanted, misalign);
          a = x.answer();
          REQUIRE(x.run(a, how, [&](auto& y, auto&) { y.options.workspace = bytes.bytes(); }).ok());
          CHECK(a == one);
          CHECK(bytes.guards_intact());
        }
      }
    }
  }
}

// Sequences packed one after the other, with empty ones and single tokens among them, from positions of their own.
TEST_CASE("log-linear: packed sequences are the single calls, bit for bit") {
  for (const Kind kind : kKinds) {
    Case c{.seed = 140, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20};
    c.lengths = {0, 5, 0, 1, 70, 33, 0};
    c.unowned = 2;
    const LevelProblem x({.kind = kind, .first = {3, 0, 0, 16, 37, 64, 100}}, c);
    const LevelProblem::Expected expected = x.expected();
    using enum RecurrentForm;
    for (const How& how : {How{step}, How{fused}, How{chunked, 8}, How{chunked, 32, 3, Pool::threads}}) {
      const LevelAnswer together = check(x, expected, how);
      for (index_t s = 0; s < x.base.c.sequences(); ++s) {
        const index_t begin = x.base.cu_len[at(s)], end = x.base.cu_len[at(s) + 1];
        LevelProblem single = x;
        single.base.c.lengths.clear();
        single.base.cu_len.clear();
        single.initial = slice_of(x.initial, 0, s);
        single.at_level.first = {x.first(s) - begin};   // of the packed tensor's first token
        const LevelAnswer alone = part_of(single, begin, end, nullptr, false, how);
        bool same = alone.levels.bytes() == slice_of(together.levels, 0, s).bytes();
        alone.out.each([&](index_t b, index_t h, index_t t, index_t d) {
          same = same && alone.out.get(b, h, t, d) == together.out.get(b, h, begin + t, d);
        });
        INFO(describe(x, how) << ", sequence " << s);
        CHECK(same);
      }
    }
  }
}

// The spoiled head is the last one of its task: chunks of 5 tokens follow on rows that it had.
TEST_CASE("log-linear: NaN and infinities stay in their sequence and head") {
  constexpr index_t kEnd = 37, kHead = 1;
  for (const Kind kind : kKinds) {
    Case c{.seed = 150, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .placement = Placement::bshd};
    c.lengths = {kEnd, 5, 1, 17};
    const LevelProblem clean({.kind = kind, .first = {37, 0, 3, 64}}, c);
    for (const How& how : {How{RecurrentForm::step}, How{RecurrentForm::fused}, How{RecurrentForm::chunked, 16}}) {
      const LevelAnswer good = clean.run(how);
      for (int n = 0; n < 8; ++n) {
        for (const double wrong : {std::nan(""), HUGE_VAL}) {
          LevelProblem bad = clean;
          Problem& base = bad.base;
          Numbers* const spoils[] = {&base.q, &base.k, &base.v, &base.gate, &base.beta, &base.dt, &bad.lambda, &bad.initial};
          for (const index_t t : {6, 22, 31}) spoils[n]->put(0, n == 7 ? kHead * clean.levels : kHead, n == 7 ? 0 : t, 0, wrong);
          const LevelAnswer a = bad.run(how);
          const auto differs = [](double x, double y) {
            return std::bit_cast<std::uint64_t>(x) != std::bit_cast<std::uint64_t>(y);
          };
          bool same = true, reached = false;
          a.out.each([&](index_t b, index_t h, index_t t, index_t d) {
            const double got = a.out.get(b, h, t, d);
            if (h == kHead && t < kEnd) {
              reached = reached || (t == 22 && !std::isfinite(got));
            } else {
              same = same && !differs(got, good.out.get(b, h, t, d));
            }
          });
          a.levels.each([&](index_t s, index_t hl, index_t i, index_t j) {
            const bool spoiled = s == 0 && hl / clean.levels == kHead;
            same = same && (spoiled || !differs(a.levels.get(s, hl, i, j), good.levels.get(s, hl, i, j)));
          });
          INFO(describe(clean, how) << ", " << wrong << " in tensor " << n);
          CHECK(same);
          if (n < 3) CHECK(reached);   // q, k and v
        }
      }
    }
  }
}

TEST_CASE("log-linear: the thread's floating-point mode is what it was") {
  const LevelProblem x({}, {.seed = 160, .len = 40, .heads = {2, 2, 2}});
  for (const RecurrentForm form : {RecurrentForm::step, RecurrentForm::fused, RecurrentForm::chunked}) {
    LevelAnswer a = x.answer();
    const Status status = x.run(a, {form}, [&](const auto& y, const auto& levels) {
      RecurrentOptions<float> options = y.options;
      options.form = form;
      test::check_float_mode([&](const fovea::Executor& executor) {
        options.executor = executor;
        return fovea::log_linear_gated_delta(y.q, y.k, y.v, y.decay, y.beta, levels, y.out, options);
      });
    });
    CHECK(status.ok());
  }
}

// dt from nothing to a reset, between merges and within chunks.
TEST_CASE("log-linear: Mamba-2 with steps of all sizes in one sequence") {
  for (const index_t first : {0, 37}) {
    LevelProblem x({.kind = Kind::mamba2, .first = {first}},
                   {.seed = 170, .len = 130, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20});
    Random random(171);
    x.base.per_head.assign(4, -1.f);
    x.base.dt.fill([&](auto...) { return random.pick({0., 1e-7, 0.1, 0.1, 30., 100.}); });
    const LevelProblem::Expected expected = x.expected();
    for (const How& how : level_forms()) check(x, expected, how);
  }
}

TEST_CASE("log-linear: sequences without tokens hand their levels on") {
  for (const How& how : level_forms()) {
    for (const bool initial : {false, true}) {
      for (const bool ragged : {false, true}) {
        Case c{.seed = 110, .batch = 2, .len = 0, .heads = {2, 2, 4}, .initial = initial};
        if (ragged) c.lengths = {0, 0};
        const LevelProblem x({.first = {13, 0}}, c);
        INFO(describe(x, how));
        const LevelAnswer a = x.run(how);
        bool same = true;
        a.levels.each([&](index_t s, index_t hl, index_t i, index_t j) {
          const bool live = initial && LevelProblem::live(x.first(s), hl % x.levels);
          same = same && a.levels.get(s, hl, i, j) == (live ? x.initial.get(s, hl, i, j) : 0);
        });
        CHECK(same);
      }
    }
  }
}

TEST_CASE("log-linear: unwanted levels change no output") {
  for (const Kind kind : kKinds) {
    const LevelProblem x({.kind = kind, .first = {3}},
                         {.seed = 120, .len = 90, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
    for (const How& how : level_forms()) {
      if (how.form == RecurrentForm::automatic || how.form == RecurrentForm::step) continue;   // another form, then
      INFO(describe(x, how));
      LevelAnswer without = x.answer();
      REQUIRE(x.run(without, how, [](auto&, auto& options) { options.final_levels = {}; }).ok());
      CHECK(without.out.bytes() == x.run(how).out.bytes());
      CHECK(without.levels.untouched());
    }
  }
}

TEST_CASE("log-linear: refused calls leave everything as it was") {
  const LevelProblem x({.first = {9, 2}}, {.seed = 130, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6, .dim_v = 7});
  const auto refused = [&](const char* words, const auto& change, index_t chunk = 0) {
    LevelAnswer a = x.answer();
    const Status status = x.run(a, {RecurrentForm::automatic, chunk}, change);
    INFO(words << ": " << status.message());
    CHECK(!status.ok());
    CHECK(std::string(status.message()).find(words) != std::string::npos);
    CHECK((a.out.untouched() && a.levels.untouched()));
  };
  const std::vector<index_t> one{9}, negative{9, -1}, huge{9, PTRDIFF_MAX}, late{9, 1000};
  Numbers state = x.base.like_state();
  refused("single state", [&](auto& y, auto&) { y.options.initial_state = x.base.initial.floats(); });
  refused("single state", [&](auto& y, auto&) { y.options.final_state = state.writable(); });
  refused(
      "power of two", [](auto&, auto&) {}, 24);
  refused(
      "512", [](auto&, auto&) {}, 512);
  refused("1 entries for 2", [&](auto&, auto& o) { o.first_pos = one; });
  refused("-1", [&](auto&, auto& o) { o.first_pos = negative; });
  refused("first_pos[1]", [&](auto&, auto& o) { o.first_pos = huge; });
  refused("1000 tokens of sequence 1", [&](auto&, auto& o) { o.first_pos = late; });
  refused("initial_levels has 4", [](auto&, auto& o) { o.initial_levels.extent[2] = 4; });
  refused("final_levels has 4", [](auto&, auto& o) { o.final_levels.extent[2] = 4; });
  refused("level_weight has 4", [](auto&, auto& o) { o.level_weight.extent[3] = 4; });
  refused("level_weight", [](auto&, auto& o) { o.level_weight.extent[1] = 3; });
  refused("level_weight has null data", [](auto&, auto& o) { o.level_weight.data = nullptr; });
  refused("final_levels has extent 5", [](auto&, auto& o) { o.final_levels.extent[3] = 5; });
  refused("final_levels overlaps itself", [](auto&, auto& o) { o.final_levels.stride[2] = 1; });
  refused("different strides", [](auto&, auto& o) {
    o.initial_levels = o.final_levels;
    std::swap(o.initial_levels.stride[0], o.initial_levels.stride[1]);
  });
  refused("overlaps", [](auto&, auto& o) {
    o.initial_levels.data = o.final_levels.data + 1;
    o.initial_levels.stride = o.final_levels.stride;
  });
  refused("overlaps", [](auto& y, auto& o) { o.level_weight.data = reinterpret_cast<const float*>(y.out.data); });
  refused("beta", [](auto& y, auto&) { y.beta.extent[3] = 7; });
  refused("null", [](auto& y, auto&) { y.decay.gate.data = nullptr; });
}
