// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/replay.hpp"

#include "catch_compat.hpp"
#include "fovea/reference/delta.hpp"
#include "fovea/reference/gated_delta.hpp"
#include "fovea/reference/gla.hpp"
#include "fovea/reference/kda.hpp"
#include "fovea/reference/linear.hpp"
#include "fovea/reference/mamba2.hpp"
#include "fovea/reference/retention.hpp"
#include "fovea/reference/simple_gla.hpp"
#include "reference/recurrent_golden.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

using namespace test;
using fovea::Code;
using fovea::Decay;
using fovea::DecayForm;
using fovea::HeadMap;
using fovea::Operand;
using fovea::RecurrentOptions;
using fovea::ReplayRule;
using fovea::StateCache;
using fovea::StateCacheShape;
using fovea::StateLayout;
using fovea::Status;
using fovea::Tensor;
using fovea::View;

namespace {

enum class Mechanism { gated_delta, kda, delta, simple_gla, gla, linear, retention, mamba2 };

struct Kind {
  Mechanism mechanism;
  index_t q_heads, k_heads, v_heads, dim_k, dim_v;
  StateLayout layout = StateLayout::k_first;
  HeadMap map = HeadMap::blocks;
  DecayForm form = DecayForm::log;
  bool channel_beta = false;

  index_t states() const { return std::max(k_heads, v_heads); }
  index_t outs() const { return std::max(q_heads, states()); }
  bool by_channel() const { return mechanism == Mechanism::kda || mechanism == Mechanism::gla; }
  bool additive() const { return mechanism >= Mechanism::simple_gla; }
  bool decays() const { return mechanism != Mechanism::delta && mechanism != Mechanism::linear; }
  bool has_beta() const { return !additive() || mechanism == Mechanism::mamba2; }
  bool shares_gates() const { return mechanism == Mechanism::retention; }   // one per head
  index_t gates() const { return by_channel() ? dim_k : 1; }
  index_t betas() const { return channel_beta ? dim_v : 1; }
  ReplayRule rule() const { return additive() ? ReplayRule::additive : ReplayRule::delta; }
};

template <class T>
struct Owned {
  std::array<index_t, 4> extent{};
  std::vector<T> data;

  Owned() = default;
  Owned(index_t a, index_t b, index_t c, index_t d) : extent{a, b, c, d}, data(static_cast<std::size_t>(a * b * c * d)) {}
  Tensor<T> view() { return fovea::bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  Tensor<const T> view() const { return fovea::bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  Owned<double> doubles() const {
    Owned<double> x(extent[0], extent[1], extent[2], extent[3]);
    std::copy(data.begin(), data.end(), x.data.begin());
    return x;
  }
};

double rate_of(index_t head) { return -0.5 - static_cast<double>(head); }   // A of Mamba-2
double gamma_of(const Kind& kind, index_t head) {
  const double gamma = fovea::reference::retention_gamma(head);
  return kind.form == DecayForm::log ? std::log(gamma) : gamma;
}
double skip_of(index_t head, index_t channel) { return 0.5 + 0.25 * static_cast<double>(head - channel); }   // D of Mamba-2

// The inputs of `len` tokens of `batch` sequences.
struct Inputs {
  Owned<float> q, k, v, gate, beta;

  Inputs(const Kind& kind, index_t batch, index_t len)
      : q(batch, kind.q_heads, len, kind.dim_k),
        k(batch, kind.k_heads, len, kind.dim_k),
        v(batch, kind.v_heads, len, kind.dim_v),
        gate(kind.shares_gates() ? 1 : batch, kind.states(), kind.shares_gates() ? 1 : len, kind.gates()),
        beta(batch, kind.states(), len, kind.betas()) {}

  // Keys of length 1, gates with resets (a factor of 0), beta from 0 to 2.
  static Inputs random(const Kind& kind, index_t batch, index_t len, Random& random) {
    Inputs x(kind, batch, len);
    for (float& number : x.q.data) number = random.normal();
    for (float& number : x.k.data) number = random.normal();
    for (float& number : x.v.data) number = random.normal();
    for (std::size_t row = 0; row < x.k.data.size(); row += static_cast<std::size_t>(kind.dim_k)) {
      double squares = 0;
      for (index_t i = 0; i < kind.dim_k; ++i) squares += std::pow(x.k.data[row + static_cast<std::size_t>(i)], 2);
      for (index_t i = 0; i < kind.dim_k; ++i)
        x.k.data[row + static_cast<std::size_t>(i)] /= static_cast<float>(std::sqrt(squares));
    }
    for (float& number : x.gate.data) {
      number = random.one_in(10) ? -HUGE_VALF : random.one_in(10) ? -100.f : random.uniform(-1.f, 0.f);
      if (kind.form == DecayForm::alpha) number = random.one_in(10) ? 0.f : random.uniform(0.f, 1.f);
    }
    if (kind.shares_gates())   // gammas of the paper
      for (index_t h = 0; h < kind.states(); ++h) x.gate.view()(0, h, 0, 0) = static_cast<float>(gamma_of(kind, h));
    for (float& number : x.beta.data) number = random.one_in(8) ? random.pick({0.f, 1.f, 2.f}) : random.uniform(0.f, 1.f);
    if (kind.mechanism == Mechanism::mamba2)   // beta is dt, the gate dt A
      for (std::size_t n = 0; n < x.gate.data.size(); ++n)
        x.gate.data[n] = x.beta.data[n] * static_cast<float>(rate_of(static_cast<index_t>(n) / len % kind.states()));
    return x;
  }
  Decay<float> decay(const Kind& kind) const {
    return kind.decays() ? Decay<float>{gate.view(), kind.form} : Decay<float>{};
  }
  View<const float, 4> betas(const Kind& kind) const { return kind.has_beta() ? beta.view() : View<const float, 4>{}; }

  Inputs tokens(const Kind& kind, index_t begin, index_t end) const {
    Inputs part(kind, q.extent[0], end - begin);
    const auto cut = [&](const Owned<float>& from, Owned<float>& to) {
      const index_t first = from.extent[2] == q.extent[2] ? begin : 0;   // a gate of all tokens has extent 1
      for (index_t b = 0; b < to.extent[0]; ++b) {
        for (index_t h = 0; h < to.extent[1]; ++h) {
          for (index_t t = 0; t < to.extent[2]; ++t) {
            for (index_t d = 0; d < to.extent[3]; ++d) to.view()(b, h, t, d) = from.view()(b, h, first + t, d);
          }
        }
      }
    };
    cut(q, part.q), cut(k, part.k), cut(v, part.v), cut(gate, part.gate), cut(beta, part.beta);
    return part;
  }
};

Owned<double> zero_states(const Kind& kind, index_t batch) {
  return kind.layout == StateLayout::v_first ? Owned<double>(batch, kind.states(), kind.dim_v, kind.dim_k)
                                             : Owned<double>(batch, kind.states(), kind.dim_k, kind.dim_v);
}

// The outputs by the reference, and `state` moved on.
Owned<double> expected(const Kind& kind, const Inputs& x, Owned<double>& state) {
  const Owned<double> q = x.q.doubles(), k = x.k.doubles(), v = x.v.doubles(), gate = x.gate.doubles(),
                      beta = x.beta.doubles();
  Owned<double> out(q.extent[0], kind.outs(), q.extent[2], kind.dim_v), after = state;
  RecurrentOptions<double> options;
  options.head_map = kind.map;
  options.layout = kind.layout;
  options.initial_state = std::as_const(state).view();
  options.final_state = after.view();
  const Decay<double> decay{gate.view(), kind.form};
  switch (kind.mechanism) {
    case Mechanism::gated_delta:
      fovea::reference::gated_delta(q.view(), k.view(), v.view(), decay, beta.view(), out.view(), options);
      break;
    case Mechanism::kda:
      fovea::reference::kda(q.view(), k.view(), v.view(), decay, beta.view(), out.view(), options);
      break;
    case Mechanism::delta:
      fovea::reference::delta(q.view(), k.view(), v.view(), beta.view(), out.view(), options);
      break;
    case Mechanism::simple_gla:
      fovea::reference::simple_gla(q.view(), k.view(), v.view(), decay, out.view(), options);
      break;
    case Mechanism::gla:
      fovea::reference::gla(q.view(), k.view(), v.view(), decay, out.view(), options);
      break;
    case Mechanism::linear:
      fovea::reference::linear(q.view(), k.view(), v.view(), out.view(), {.normalize = false}, options);
      break;
    case Mechanism::retention: {
      std::vector<double> gammas;
      for (const double number : gate.data) gammas.push_back(kind.form == DecayForm::log ? std::exp(number) : number);
      fovea::reference::retention(q.view(), k.view(), v.view(), gammas, out.view(), options);
      break;
    }
    case Mechanism::mamba2: {
      std::vector<double> rates, skips;
      for (index_t h = 0; h < kind.states(); ++h) {
        rates.push_back(rate_of(h));
        for (index_t d = 0; d < kind.dim_v; ++d) skips.push_back(skip_of(h, d));
      }
      fovea::reference::mamba2(v.view(), k.view(), q.view(),
                               {beta.view(), rates, {skips.data(), {kind.states(), kind.dim_v}, {kind.dim_v, 1}}},
                               out.view(), options);
      break;
    }
  }
  state = after;
  return out;
}

RecurrentOptions<float> options_of(const Kind& kind) {
  RecurrentOptions<float> options;
  if (kind.mechanism == Mechanism::mamba2) options.scale = 1.f;
  options.head_map = kind.map;
  return options;
}

StateCacheShape shape_of(const Kind& kind, index_t replay, index_t max_draft) {
  StateCacheShape shape;
  shape.heads = kind.states();
  shape.dim_k = kind.dim_k;
  shape.dim_v = kind.dim_v;
  shape.layout = kind.layout;
  shape.replay = replay;
  shape.max_draft = max_draft;
  shape.channel_decay = kind.by_channel();
  shape.poison = true;
  return shape;
}

Status step(StateCache& cache, index_t layer, std::span<const index_t> sequences, const Kind& kind, const Inputs& x,
            Owned<float>& out, const RecurrentOptions<float>& options) {
  out = Owned<float>(x.q.extent[0], kind.outs(), x.q.extent[2], kind.dim_v);
  std::fill(out.data.begin(), out.data.end(), canary());
  const Status status = fovea::replay_step(cache, layer, sequences, kind.rule(), x.q.view(), x.k.view(), x.v.view(),
                                           x.decay(kind), x.betas(kind), out.view(), options);
  for (index_t h = 0; status.ok() && kind.mechanism == Mechanism::mamba2 && h < kind.outs(); ++h) {   // y += D x
    for (index_t t = 0; t < x.v.extent[2]; ++t) {
      for (index_t d = 0; d < kind.dim_v; ++d)
        out.view()(0, h, t, d) += static_cast<float>(skip_of(h, d)) * x.v.view()(0, h, t, d);
    }
  }
  return status;
}

// Sums of squares over everything compared: the specification's measure is the relative RMS.
struct Errors {
  double error = 0, size = 0;
  template <class A, class B>
  void see(const A& a, const B& b) {
    REQUIRE(a.size() == b.size());
    for (std::size_t n = 0; n < a.size(); ++n) {
      error += std::pow(static_cast<double>(a[n]) - static_cast<double>(b[n]), 2);
      size += std::pow(static_cast<double>(b[n]), 2);
    }
  }
  double relative() const { return std::sqrt(error / size); }
};

std::vector<float> state_of(const StateCache& cache, index_t layer, index_t sequence) {
  const View<float, 4> view = cache.state(layer, sequence);
  return {view.data, view.data + view.extent[1] * view.extent[2] * view.extent[3]};
}

std::vector<Kind> kinds() {
  const auto v_first = StateLayout::v_first;
  return {
      {Mechanism::gated_delta, 1, 1, 1, 4, 3},
      {Mechanism::gated_delta, 2, 2, 4, 20, 37, v_first, HeadMap::tiled},
      {Mechanism::gated_delta, 1, 1, 2, 33, 16, StateLayout::k_first, HeadMap::blocks, DecayForm::alpha, true},
      {Mechanism::kda, 2, 2, 2, 19, 21},
      {Mechanism::kda, 1, 1, 2, 18, 5, v_first, HeadMap::blocks, DecayForm::alpha},
      {Mechanism::delta, 2, 2, 2, 16, 16},
      {Mechanism::simple_gla, 4, 2, 2, 7, 18, StateLayout::k_first, HeadMap::tiled},
      {Mechanism::simple_gla, 1, 1, 3, 17, 9, v_first},
      {Mechanism::gla, 4, 2, 2, 6, 33, v_first, HeadMap::blocks, DecayForm::alpha},
      {Mechanism::gla, 2, 2, 2, 5, 2},
      {Mechanism::linear, 2, 1, 2, 12, 17, v_first},
      {Mechanism::retention, 2, 2, 2, 18, 5},
      {Mechanism::retention, 1, 1, 3, 7, 19, v_first, HeadMap::blocks, DecayForm::alpha},
      {Mechanism::mamba2, 1, 1, 4, 16, 20},   // one group
      {Mechanism::mamba2, 2, 2, 2, 5, 33, v_first},
  };
}

}   // namespace

TEST_CASE("replay_step is decode, whatever is drafted, accepted, folded and rolled back", "[cache][replay]") {
  Random random(31);
  for (const Kind& kind : kinds()) {
    CAPTURE(static_cast<int>(kind.mechanism), kind.dim_k, kind.dim_v);
    for (const auto& [replay, max_draft] : {std::pair<index_t, index_t>{1, 0}, {4, 3}, {16, 4}}) {
      CAPTURE(replay, max_draft);
      StateCache cache;
      REQUIRE(cache.create(shape_of(kind, replay, max_draft)).ok());
      index_t sequence = 0;
      REQUIRE(cache.open(&sequence).ok());
      std::vector<Owned<double>> states{zero_states(kind, 1)};   // [tokens so far]
      Errors out_errors, state_errors;
      Owned<float> out;
      index_t longest = 0, folded = 0;   // longest: before a call, whose fold leaves max_draft tokens of those
      for (int call = 0; call < 30; ++call) {
        const index_t drafts = random.between(1, replay), len = cache.len(sequence);
        const Inputs x = Inputs::random(kind, 1, drafts, random);
        REQUIRE(cache.begin_steps(sequence, drafts).ok());
        const index_t split = random.between(0, drafts);   // in one call or two
        for (const auto& [begin, end] : {std::pair{index_t{0}, split}, std::pair{split, drafts}}) {
          if (begin == end) continue;
          const Inputs part = x.tokens(kind, begin, end);
          REQUIRE(step(cache, 0, {&sequence, 1}, kind, part, out, options_of(kind)).ok());
          Owned<double> state = states.back();
          for (index_t t = begin; t < end; ++t) {
            const Inputs one = x.tokens(kind, t, t + 1);
            const Owned<double> wanted = expected(kind, one, state);
            states.push_back(state);
            std::vector<float> got;
            for (index_t h = 0; h < kind.outs(); ++h) {
              for (index_t d = 0; d < kind.dim_v; ++d) got.push_back(out.view()(0, h, t - begin, d));
            }
            out_errors.see(got, wanted.data);
          }
        }
        const index_t accepted = random.between(0, drafts);
        REQUIRE(cache.commit(sequence, accepted).ok());
        states.resize(static_cast<std::size_t>(len + accepted + 1));
        const index_t limit = cache.rollback_limit(sequence);
        longest = std::max(longest, len);
        REQUIRE(limit >= cache.len(sequence) - std::max(folded, longest - max_draft));
        if (random.one_in(3)) {
          const index_t back = random.between(0, limit);
          REQUIRE(cache.rollback(sequence, back).ok());
          states.resize(states.size() - static_cast<std::size_t>(back));
        }
        if (random.one_in(6)) {
          REQUIRE(replay_fold(cache, sequence).ok());
          folded = cache.len(sequence);
          state_errors.see(state_of(cache, 0, sequence), states.back().data);
        }
        const Status sound = cache.check();
        INFO(sound.message());
        REQUIRE(sound.ok());
      }
      CHECK(out_errors.relative() < 1e-5);
      CHECK(out_errors.size > 0);
      REQUIRE(replay_fold(cache, sequence).ok());
      state_errors.see(state_of(cache, 0, sequence), states.back().data);
      CHECK(std::sqrt(state_errors.error) < 1e-5 * std::max(1., std::sqrt(state_errors.size)));
    }
  }
}

TEST_CASE("replay_step gives the golden values", "[cache][replay]") {
  for (const char* name : {"gated_delta", "kda", "simple_gla", "gla", "delta", "linear"}) {
    CAPTURE(name);
    const std::string word = name;
    Kind kind{Mechanism::delta, 1, 1, 1, kGoldenDimK, kGoldenDimV};
    if (word == "gated_delta") kind.mechanism = Mechanism::gated_delta;
    if (word == "kda") kind.mechanism = Mechanism::kda;
    if (word == "simple_gla") kind.mechanism = Mechanism::simple_gla;
    if (word == "gla") kind.mechanism = Mechanism::gla;
    if (word == "linear") kind.mechanism = Mechanism::linear;
    const auto golden = std::find_if(std::begin(kRecurrentGoldens), std::end(kRecurrentGoldens),
                                     [&](const RecurrentGolden& each) { return word == each.name; });
    REQUIRE(golden != std::end(kRecurrentGoldens));
    Inputs x(kind, 1, kGoldenLen);
    for (index_t t = 0; t < kGoldenLen; ++t) {
      const auto at = static_cast<double>(t);
      for (index_t i = 0; i < kGoldenDimK; ++i) {
        x.q.view()(0, 0, t, i) = static_cast<float>(golden_q(at, static_cast<double>(i)));
        x.k.view()(0, 0, t, i) = static_cast<float>(golden_k(at, static_cast<double>(i)));
        if (i < kind.gates()) x.gate.view()(0, 0, t, i) = static_cast<float>(golden_gate(at, static_cast<double>(i)));
      }
      for (index_t j = 0; j < kGoldenDimV; ++j)
        x.v.view()(0, 0, t, j) = static_cast<float>(golden_v(at, static_cast<double>(j)));
      x.beta.view()(0, 0, t, 0) = static_cast<float>(golden_beta(at));
    }
    for (const index_t replay : {index_t{1}, index_t{4}, index_t{16}}) {
      StateCache cache;
      REQUIRE(cache.create(shape_of(kind, replay, 2)).ok());
      index_t sequence = 0;
      REQUIRE(cache.open(&sequence).ok());
      const View<float, 4> initial = cache.state(0, sequence);
      for (index_t i = 0; i < kGoldenDimK; ++i) {
        for (index_t j = 0; j < kGoldenDimV; ++j)
          initial(0, 0, i, j) = static_cast<float>(golden_initial(static_cast<double>(i), static_cast<double>(j)));
      }
      RecurrentOptions<float> options;
      options.scale = 0.5f;
      double squares = 0, state_squares = 0;
      Owned<float> out;
      for (index_t t = 0; t < kGoldenLen; ++t) {
        REQUIRE(cache.begin_steps(sequence, 1).ok());
        REQUIRE(step(cache, 0, {&sequence, 1}, kind, x.tokens(kind, t, t + 1), out, options).ok());
        REQUIRE(cache.commit(sequence, 1).ok());
        for (const float number : out.data) squares += double{number} * double{number};
      }
      for (std::size_t j = 0; j < 3; ++j) CHECK(double{out.data[j]} == Catch::Approx(golden->last[j]).epsilon(1e-5));
      CHECK(squares == Catch::Approx(golden->out_squares).epsilon(1e-5));
      REQUIRE(replay_fold(cache, sequence).ok());
      for (const float number : state_of(cache, 0, sequence)) state_squares += double{number} * double{number};
      CHECK(state_squares == Catch::Approx(golden->state_squares).epsilon(1e-5));
    }
  }
}

TEST_CASE("replay_step: edge cases of the delta rule and of decays", "[cache][replay]") {
  const Kind kind{Mechanism::kda, 1, 1, 1, 6, 5, StateLayout::k_first, HeadMap::blocks, DecayForm::log};
  Random random(5);
  StateCache cache;
  StateCacheShape shape = shape_of(kind, 8, 0);
  shape.snapshots = 1;
  REQUIRE(cache.create(shape).ok());
  index_t sequence = 0, before = 0;
  REQUIRE(cache.open(&sequence).ok());
  Owned<float> out;
  for (int t = 0; t < 5; ++t) {
    REQUIRE(cache.begin_steps(sequence, 1).ok());
    REQUIRE(step(cache, 0, {&sequence, 1}, kind, Inputs::random(kind, 1, 1, random), out, options_of(kind)).ok());
    REQUIRE(cache.commit(sequence, 1).ok());
  }
  REQUIRE(cache.take(sequence, &before).ok());
  const auto run = [&](const Inputs& x) {
    REQUIRE(cache.restore(before, sequence).ok());
    REQUIRE(cache.begin_steps(sequence, 1).ok());
    REQUIRE(step(cache, 0, {&sequence, 1}, kind, x, out, options_of(kind)).ok());
    REQUIRE(cache.commit(sequence, 1).ok());
    REQUIRE(replay_fold(cache, sequence).ok());
  };
  const float scale = 1 / std::sqrt(6.f);
  Inputs x = Inputs::random(kind, 1, 1, random);
  std::fill(x.gate.data.begin(), x.gate.data.end(), -0.25f);

  SECTION("beta 1 overwrites: reading with the key gives the value") {
    x.beta.data[0] = 1;
    x.q.data = x.k.data;
    run(x);
    for (index_t j = 0; j < 5; ++j)
      CHECK(out.view()(0, 0, 0, j) == Catch::Approx(scale * x.v.view()(0, 0, 0, j)).margin(1e-5));
  }
  SECTION("-inf in every channel erases, exactly") {
    std::fill(x.gate.data.begin(), x.gate.data.end(), -HUGE_VALF);
    x.beta.data[0] = 0.5f;
    run(x);
    const std::vector<float> state = state_of(cache, 0, sequence);
    for (std::size_t i = 0; i < 6; ++i) {
      for (std::size_t j = 0; j < 5; ++j) CHECK(state[i * 5 + j] == x.k.data[i] * (0.5f * x.v.data[j]));
    }
  }
  SECTION("-inf in one channel erases its row only, and beta 0 writes nothing") {
    REQUIRE(replay_fold(cache, sequence).ok());
    const std::vector<float> old = state_of(cache, 0, sequence);
    std::fill(x.gate.data.begin(), x.gate.data.end(), 0.f);
    x.gate.data[2] = -HUGE_VALF;
    x.beta.data[0] = 0;
    run(x);
    const std::vector<float> state = state_of(cache, 0, sequence);
    for (std::size_t i = 0; i < 6; ++i) {
      for (std::size_t j = 0; j < 5; ++j)
        CHECK(state[i * 5 + j] == Catch::Approx(i == 2 ? 0.f : old[i * 5 + j]).margin(1e-6));
    }
  }
  SECTION("a key of 0 is pure decay") {
    REQUIRE(replay_fold(cache, sequence).ok());
    const std::vector<float> old = state_of(cache, 0, sequence);
    std::fill(x.k.data.begin(), x.k.data.end(), 0.f);
    run(x);
    const std::vector<float> state = state_of(cache, 0, sequence);
    for (std::size_t n = 0; n < state.size(); ++n) CHECK(state[n] == Catch::Approx(old[n] * std::exp(-0.25f)).margin(1e-6));
  }
}

TEST_CASE("replay_step: ragged calls, several layers, lanes, storage and the caller's workspace", "[cache][replay]") {
  const Kind kind{Mechanism::gated_delta, 2, 2, 4, 18, 21};
  Random random(77);
  StateCacheShape shape = shape_of(kind, 4, 3);
  shape.layers = 2;
  shape.sequences = 4;
  StateCache cache, serial, alone;
  REQUIRE(cache.create(shape).ok());
  REQUIRE(serial.create(shape).ok());
  REQUIRE(alone.create(shape).ok());
  index_t n = 0;
  for (int i = 0; i < 4; ++i) {
    REQUIRE(cache.open(&n).ok());
    REQUIRE(serial.open(&n).ok());
    REQUIRE(alone.open(&n).ok());
  }
  const std::vector<index_t> sequences{2, 0, 3};
  Reversed pool;
  ThreadPerLane threads;
  for (int call = 0; call < 8; ++call) {
    const std::vector<index_t> cu{0, 2, 2, 5};   // two tokens, none, three
    for (const index_t sequence : {index_t{2}, index_t{3}}) {
      for (StateCache* each : {&cache, &serial, &alone}) REQUIRE(each->begin_steps(sequence, sequence == 2 ? 2 : 3).ok());
    }
    for (index_t layer = 0; layer < 2; ++layer) {
      const Inputs x = Inputs::random(kind, 1, 5, random);
      RecurrentOptions<float> options;
      options.cu_len = cu;
      Owned<float> one_lane, out, part;
      REQUIRE(step(serial, layer, sequences, kind, x, one_lane, options).ok());
      options.executor = call % 2 == 0 ? fovea::Executor(pool, 3) : fovea::Executor(threads, 3);
      PoisonedBytes workspace(fovea::replay_workspace_bytes(cache, kind.q_heads, 3, 3) + 64, 3);
      options.workspace = workspace.bytes();
      REQUIRE(step(cache, layer, sequences, kind, x, out, options).ok());
      CHECK(workspace.guards_intact());
      CHECK(out.data == one_lane.data);
      for (const auto& [sequence, begin, end] : {std::array<index_t, 3>{2, 0, 2}, {3, 2, 5}}) {
        const Inputs mine = x.tokens(kind, begin, end);
        REQUIRE(step(alone, layer, {&sequence, 1}, kind, mine, part, {}).ok());
        for (index_t h = 0; h < 4; ++h) {
          for (index_t t = begin; t < end; ++t) {
            for (index_t d = 0; d < 21; ++d) CHECK(part.view()(0, h, t - begin, d) == out.view()(0, h, t, d));
          }
        }
      }
    }
    for (const index_t sequence : {index_t{2}, index_t{3}}) {
      for (StateCache* each : {&cache, &serial, &alone}) REQUIRE(each->commit(sequence, 2).ok());
    }
  }
  CHECK(cache.len(0) == 0);
  CHECK(cache.check().ok());

  // bf16 in and out: the same numbers after rounding, and strides.
  Inputs x = Inputs::random(kind, 1, 1, random);
  std::vector<fovea::bf16> narrow(x.v.data.size() * 3), narrow_out(4 * 21);
  for (std::size_t i = 0; i < x.v.data.size(); ++i) {
    narrow[3 * i] = fovea::convert<fovea::bf16>(x.v.data[i]);
    x.v.data[i] = fovea::convert<float>(narrow[3 * i]);
  }
  const Tensor<fovea::bf16> v{narrow.data(), {1, 4, 1, 21}, {4 * 21 * 3, 21 * 3, 21 * 3, 3}};
  const Tensor<fovea::bf16> o = fovea::bshd(narrow_out.data(), 1, 1, 4, 21);
  Owned<float> out;
  const index_t sequence = 2;
  REQUIRE(serial.begin_steps(sequence, 1).ok());
  REQUIRE(cache.begin_steps(sequence, 1).ok());
  REQUIRE(step(serial, 0, {&sequence, 1}, kind, x, out, {}).ok());
  REQUIRE(fovea::replay_step(cache, 0, {&sequence, 1}, ReplayRule::delta, x.q.view(), x.k.view(), v, x.decay(kind),
                             x.betas(kind), o)
              .ok());
  for (index_t h = 0; h < 4; ++h) {
    for (index_t d = 0; d < 21; ++d) CHECK(o(0, h, 0, d).bits == fovea::convert<fovea::bf16>(out.view()(0, h, 0, d)).bits);
  }
}

TEST_CASE("replay: a prefill into the checkpoint, then steps, equals steps alone", "[cache][replay]") {
  const Kind kind{Mechanism::kda, 2, 2, 2, 8, 10, StateLayout::v_first};
  Random random(9);
  StateCache cache;
  REQUIRE(cache.create(shape_of(kind, 3, 2)).ok());
  index_t sequence = 0;
  REQUIRE(cache.open(&sequence).ok());
  const Inputs x = Inputs::random(kind, 1, 12, random);
  Owned<double> state = zero_states(kind, 1);
  Owned<float> out;
  const auto decode = [&](index_t begin, index_t end) {
    Errors errors;
    for (index_t t = begin; t < end; ++t) {
      const Inputs one = x.tokens(kind, t, t + 1);
      REQUIRE(cache.begin_steps(sequence, 1).ok());
      REQUIRE(step(cache, 0, {&sequence, 1}, kind, one, out, {}).ok());
      REQUIRE(cache.commit(sequence, 1).ok());
      errors.see(out.data, expected(kind, one, state).data);
    }
    CHECK(errors.relative() < 1e-5);
  };
  decode(0, 2);
  CHECK(cache.begin_call(sequence, 4).code() == Code::invalid_argument);   // two tokens are not in the checkpoint
  REQUIRE(replay_fold(cache, sequence).ok());
  REQUIRE(cache.begin_call(sequence, 4).ok());
  fovea::StateViews views;
  REQUIRE(cache.views(0, sequence, &views).ok());
  expected(kind, x.tokens(kind, 2, 6), state);
  for (std::size_t i = 0; i < state.data.size(); ++i) views.final_state.data[i] = static_cast<float>(state.data[i]);
  CHECK(cache.commit(sequence, 0).code() == Code::invalid_argument);   // the checkpoint was overwritten
  REQUIRE(cache.commit(sequence, 4).ok());
  CHECK(cache.len(sequence) == 6);
  decode(6, 12);
}

TEST_CASE("replay_fold without lanes is refused and folds nothing", "[cache][replay]") {
  const Kind kind{Mechanism::gated_delta, 2, 2, 2, 4, 3};
  Random random(6);
  StateCache cache;
  REQUIRE(cache.create(shape_of(kind, 4, 2)).ok());
  index_t sequence = 0;
  REQUIRE(cache.open(&sequence).ok());
  Owned<float> out;
  for (int t = 0; t < 3; ++t) {
    REQUIRE(cache.begin_steps(sequence, 1).ok());
    REQUIRE(step(cache, 0, {&sequence, 1}, kind, Inputs::random(kind, 1, 1, random), out, {}).ok());
    REQUIRE(cache.commit(sequence, 1).ok());
  }
  const std::vector<float> state = state_of(cache, 0, sequence);
  const index_t folded = cache.folded(0, sequence);
  REQUIRE(folded < 3);
  Reversed pool;
  PoisonedBytes memory(fovea::replay_workspace_bytes(cache, kind.q_heads, 0, 0));
  CHECK(replay_fold(cache, sequence, fovea::Executor(pool, 0), memory.bytes()).code() == Code::invalid_argument);
  CHECK(memory.guards_intact());
  CHECK(cache.folded(0, sequence) == folded);
  CHECK(state_of(cache, 0, sequence) == state);
  CHECK(cache.check().ok());
  REQUIRE(replay_fold(cache, sequence).ok());
  CHECK(cache.folded(0, sequence) == 3);
}

TEST_CASE("replay refuses with the numbers and leaves everything as it was", "[cache][replay]") {
  const Kind kind{Mechanism::gated_delta, 2, 2, 2, 4, 3};
  Random random(4);
  StateCacheShape shape = shape_of(kind, 4, 2);
  shape.layers = 2;
  shape.sequences = 2;
  StateCache cache, slots;
  REQUIRE(cache.create(shape).ok());
  shape.replay = 0;
  REQUIRE(slots.create(shape).ok());
  index_t sequence = 0;
  REQUIRE(cache.open(&sequence).ok());
  const Inputs x = Inputs::random(kind, 1, 2, random);
  Owned<float> out;
  const auto refused = [&](const Status& status, Code code, const char* words) {
    CHECK(status.code() == code);
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
    CHECK(cache.done(0, sequence) == cache.len(sequence));
    CHECK(cache.check().ok());
  };
  const std::span<const index_t> named(&sequence, 1);
  refused(step(cache, 0, named, kind, x, out, {}), Code::invalid_argument,
          "2 tokens for sequence 0, which has begun steps for 0");
  refused(step(slots, 0, named, kind, x, out, {}), Code::invalid_argument, "does not replay");
  refused(replay_fold(slots, 0), Code::invalid_argument, "does not replay");
  refused(cache.begin_steps(sequence, 5), Code::invalid_argument, "at most 4");
  REQUIRE(cache.begin_steps(sequence, 2).ok());
  refused(step(cache, 2, named, kind, x, out, {}), Code::invalid_argument, "layer 2 of 2");
  refused(step(cache, 0, {}, kind, x, out, {}), Code::invalid_argument, "0 sequences are named, the tensors have 1");
  const index_t closed = 1, twice[] = {0, 0};
  refused(step(cache, 0, {&closed, 1}, kind, x, out, {}), Code::invalid_argument, "sequence 1 of 2 is not open");
  refused(step(cache, 0, twice, kind, Inputs::random(kind, 2, 1, random), out, {}), Code::invalid_argument, "named twice");
  const Kind larger{Mechanism::gated_delta, 2, 2, 2, 5, 3}, channels{Mechanism::kda, 2, 2, 2, 4, 3};
  refused(step(cache, 0, named, larger, Inputs::random(larger, 1, 1, random), out, {}), Code::invalid_argument,
          "2 states of 5 x 3, the cache has 2 of 4 x 3");
  refused(step(cache, 0, named, channels, Inputs::random(channels, 1, 1, random), out, {}), Code::invalid_argument,
          "4 numbers a token");
  RecurrentOptions<float> options;
  std::vector<float> state(24);
  options.final_state = {state.data(), {1, 2, 4, 3}, {24, 12, 3, 1}};
  refused(step(cache, 0, named, kind, x, out, options), Code::invalid_argument, "must be null");
  options = {};
  std::vector<std::byte> small(128);
  options.workspace = small;
  refused(step(cache, 0, named, kind, x, out, options), Code::workspace_too_small, "the plan needs");
  refused(fovea::replay_step(cache, 0, named, ReplayRule::delta, x.q.view(), x.k.view(), x.v.view(), x.decay(kind),
                             x.betas(kind), fovea::bhsd(const_cast<float*>(x.v.data.data()), 1, 2, 2, 3)),
          Code::invalid_argument, "overlaps");
  refused(replay_fold(cache, sequence), Code::invalid_argument, "has begun 2");
  refused(cache.commit(sequence, 1), Code::invalid_argument, "was given 0 of them");
  CHECK(cache.commit(sequence, 0).ok());
}

// Additive, decays of 0, 1/2 and 1 and small whole numbers: every sum is exact, so the cache must agree to the last bit with
// a model that keeps the state after every token.
TEST_CASE("replay does what a list of states does, 40000 random operations", "[cache][replay]") {
  const Kind kind{Mechanism::gla, 1, 1, 1, 2, 2, StateLayout::k_first, HeadMap::blocks, DecayForm::alpha};
  using State = std::array<float, 4>;
  struct Model {
    bool open = false;
    index_t begun = 0;
    std::vector<State> states;   // [tokens so far]
  };
  StateCacheShape shape = shape_of(kind, 3, 2);
  shape.sequences = 3;
  shape.snapshots = 2;
  StateCache cache;
  REQUIRE(cache.create(shape).ok());
  std::vector<Model> sequences(3), snapshots(2);
  Random random(123);
  Owned<float> out;
  Inputs x(kind, 1, 1);
  int folds = 0, rolled_back = 0, restored = 0;
  for (int operation = 0; operation < 40000; ++operation) {
    const index_t n = random.below(3), s = random.below(2);
    Model& mine = sequences[static_cast<std::size_t>(n)];
    Model& saved = snapshots[static_cast<std::size_t>(s)];
    const index_t len = static_cast<index_t>(mine.states.size()) - 1;
    bool wanted = mine.open && mine.begun == 0;
    Status status;
    switch (random.below(12)) {
      case 0: {
        index_t fresh = -1;
        wanted = std::any_of(sequences.begin(), sequences.end(), [](const Model& each) { return !each.open; });
        status = cache.open(&fresh);
        if (!wanted) break;
        if (sequences[static_cast<std::size_t>(fresh)].open) FAIL("sequence " << fresh << " was handed out twice");
        sequences[static_cast<std::size_t>(fresh)] = {true, 0, {State{}}};
        break;
      }
      case 1:
        if (!random.one_in(6)) continue;
        wanted = mine.open;
        status = cache.close(n);
        mine = {};
        break;
      case 2: {
        index_t taken = -1;
        wanted = wanted && std::any_of(snapshots.begin(), snapshots.end(), [](const Model& each) { return !each.open; });
        status = cache.take(n, &taken);
        if (!wanted) break;
        if (snapshots[static_cast<std::size_t>(taken)].open) FAIL("snapshot " << taken << " was handed out twice");
        snapshots[static_cast<std::size_t>(taken)] = mine;
        break;
      }
      case 3:
        wanted = mine.open && saved.open;
        status = cache.restore(s, n);
        if (wanted) mine = saved, ++restored;
        break;
      case 4:
        wanted = saved.open;
        status = cache.drop(s);
        saved = {};
        break;
      case 5:
        status = replay_fold(cache, n);
        if (wanted) ++folds;
        break;
      case 6:
      case 7: {
        const index_t limit = wanted ? cache.rollback_limit(n) : 0, back = random.between(0, 3);
        wanted = wanted && back <= limit;
        status = cache.rollback(n, back);
        if (wanted) mine.states.resize(static_cast<std::size_t>(len + 1 - back)), rolled_back += back > 0 ? 1 : 0;
        break;
      }
      default: {
        if (mine.open && len > 60) {   // so that halves stay exact
          status = cache.close(n);
          wanted = true;
          mine = {};
          break;
        }
        const index_t drafts = random.between(1, 3);
        status = cache.begin_steps(n, drafts);
        if (!wanted || !status.ok()) break;
        std::vector<State> ahead{mine.states.back()};
        for (index_t t = 0; t < drafts; ++t) {
          for (float& number : x.q.data) number = static_cast<float>(random.between(-2, 2));
          for (float& number : x.k.data) number = static_cast<float>(random.between(-2, 2));
          for (float& number : x.v.data) number = static_cast<float>(random.between(-2, 2));
          for (float& number : x.gate.data) number = random.one_in(8) ? random.pick({0.f, 0.5f}) : 1.f;
          if (!step(cache, 0, {&n, 1}, kind, x, out, {.scale = 1.f}).ok()) FAIL("a step that was begun");
          State state = ahead.back();
          for (std::size_t i = 0; i < 4; ++i) state[i] = x.gate.data[i / 2] * state[i] + x.k.data[i / 2] * x.v.data[i % 2];
          ahead.push_back(state);
          for (std::size_t j = 0; j < 2; ++j) {
            if (out.data[j] != x.q.data[0] * state[j] + x.q.data[1] * state[2 + j])
              FAIL("an output, operation " << operation);
          }
        }
        const index_t accepted = random.between(0, drafts);
        if (random.one_in(20)) {
          mine.begun = drafts;   // left hanging: only a restored snapshot or a closed sequence ends it
          break;
        }
        status = cache.commit(n, accepted);
        mine.states.insert(mine.states.end(), ahead.begin() + 1, ahead.begin() + 1 + accepted);
        break;
      }
    }
    INFO(operation << ": " << status.message());
    if (status.ok() != wanted) FAIL("refused or not, against the model");
    if (!random.one_in(8)) continue;
    const Status sound = cache.check();
    INFO(sound.message());
    if (!sound.ok()) FAIL("unsound");
    for (index_t m = 0; m < 3; ++m) {
      const Model& each = sequences[static_cast<std::size_t>(m)];
      if (each.open != cache.is_open(m)) FAIL("open or not: " << m);
      if (each.open && cache.len(m) != static_cast<index_t>(each.states.size()) - 1) FAIL("the length of " << m);
      if (!each.open || each.begun > 0) continue;
      const View<float, 4> state = cache.state(0, m);
      const State& kept = each.states[static_cast<std::size_t>(cache.folded(0, m))];
      if (!std::equal(kept.begin(), kept.end(), state.data)) FAIL("the checkpoint of " << m);
    }
  }
  CHECK(folds > 1000);
  CHECK(rolled_back > 1000);
  CHECK(restored > 500);
}
