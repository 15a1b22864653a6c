// SPDX-License-Identifier: Apache-2.0
// What the tests of the recurrent layers share: weights as bf16 for the layer and as doubles for the recipe, tokens, states,
// and the recipe's steps as plain loops in double.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/cache/replay.hpp"
#include "fovea/modules/recurrent_layer.hpp"
#include "fovea/reference/recurrence.hpp"
#include "fovea/reference/short_conv.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace test::layer {

using fovea::ConvState;
using fovea::index_t;
using fovea::Operand;
using fovea::RecurrentOptions;
using fovea::Result;
using fovea::StateLayout;
using fovea::Status;
using fovea::Tensor;
using fovea::View;

inline std::size_t at(index_t n) { return static_cast<std::size_t>(n); }

struct Matrix {
  index_t rows = 0, columns = 0;
  std::vector<fovea::bf16> stored;
  std::vector<double> exact;

  Matrix() = default;
  Matrix(index_t rows_, index_t columns_, test::Random& random, float low, float high) : rows(rows_), columns(columns_) {
    for (index_t n = 0; n < rows * columns; ++n) {
      stored.push_back(fovea::convert<fovea::bf16>(random.uniform(low, high)));
      exact.push_back(double{fovea::convert<float>(stored.back())});
    }
  }
  // Of random signs and a size that keeps the sums near those of the inputs.
  static Matrix weights(index_t rows, index_t columns, test::Random& random) {
    const float size = 1.7f / std::sqrt(static_cast<float>(columns));
    return {rows, columns, random, -size, size};
  }
  Operand view() const {
    if (stored.empty()) return {};
    return fovea::bhsd<const fovea::bf16>(stored.data(), 1, 1, rows, columns);
  }
  double operator()(index_t row, index_t column) const { return exact[at(row * columns + column)]; }
};

// Rows of numbers, all in double.
struct Table {
  index_t rows = 0, columns = 0;
  std::vector<double> data;

  Table(index_t rows_, index_t columns_) : rows(rows_), columns(columns_), data(at(rows_ * columns_)) {}
  double& operator()(index_t row, index_t column) { return data[at(row * columns + column)]; }
  double operator()(index_t row, index_t column) const { return data[at(row * columns + column)]; }
  Tensor<double> heads(index_t first, index_t count, index_t dim) {   // [1, head, row, dim]
    return {data.data() + first, {1, count, rows, dim}, {0, dim, columns, 1}};
  }
};

inline Table product(const Table& x, const Matrix& w) {
  Table y(x.rows, w.rows);
  for (index_t t = 0; t < x.rows; ++t) {
    for (index_t n = 0; n < w.rows; ++n) {
      for (index_t d = 0; d < w.columns; ++d) y(t, n) += w(n, d) * x(t, d);
    }
  }
  return y;
}

// Runs of `dim` numbers, each over its length.
inline void normalise(Table& x, index_t first, index_t end, index_t dim) {
  for (index_t t = 0; t < x.rows; ++t) {
    for (index_t from = first; from < end; from += dim) {
      double squares = 1e-6;
      for (index_t d = from; d < from + dim; ++d) squares += x(t, d) * x(t, d);
      for (index_t d = from; d < from + dim; ++d) x(t, d) /= std::sqrt(squares);
    }
  }
}

// RMSNorm of runs of `dim` numbers times their gate.
template <class Gate>
void close(Table& o, const Table& z, const Matrix& gain, index_t dim, double eps, const Gate& gate) {
  for (index_t t = 0; t < o.rows; ++t) {
    for (index_t from = 0; from < o.columns; from += dim) {
      double squares = 0;
      for (index_t d = from; d < from + dim; ++d) squares += o(t, d) * o(t, d);
      const double factor = 1 / std::sqrt(squares / static_cast<double>(dim) + eps);
      for (index_t d = from; d < from + dim; ++d) o(t, d) *= factor * gain(0, d - from) * gate(z(t, d));
    }
  }
}

// The states of some sequences, numbers of Real in place.
template <class Real>
struct States {
  index_t sequences, heads, dim_k, dim_v, channels, kept;
  StateLayout layout;
  std::vector<Real> s, conv;

  States(index_t sequences_, index_t heads_, index_t dim_k_, index_t dim_v_, index_t channels_, index_t kept_,
         StateLayout layout_ = StateLayout::k_first)
      : sequences(sequences_),
        heads(heads_),
        dim_k(dim_k_),
        dim_v(dim_v_),
        channels(channels_),
        kept(kept_),
        layout(layout_),
        s(at(sequences * heads * dim_k * dim_v)),
        conv(at(sequences * channels * kept)) {}
  template <class Other>
  explicit States(const States<Other>& o) : States(o.sequences, o.heads, o.dim_k, o.dim_v, o.channels, o.kept, o.layout) {
    std::copy(o.s.begin(), o.s.end(), s.begin());
    std::copy(o.conv.begin(), o.conv.end(), conv.begin());
  }
  void randomise(std::uint64_t seed) {
    test::Random random(seed);
    for (Real& x : s) x = Real(random.uniform(-0.3f, 0.3f));
    for (Real& x : conv) x = Real(random.uniform(-1, 1));
  }
  View<Real, 4> state_view() {
    const bool v_first = layout == StateLayout::v_first;
    return fovea::bhsd(s.data(), sequences, heads, v_first ? dim_v : dim_k, v_first ? dim_k : dim_v);
  }
  View<Real, 3> conv_view() { return {conv.data(), {sequences, channels, kept}, {channels * kept, kept, 1}}; }
  // Sequence n alone.
  States one(index_t n) const {
    States part(1, heads, dim_k, dim_v, channels, kept, layout);
    std::copy_n(s.begin() + n * static_cast<index_t>(part.s.size()), part.s.size(), part.s.begin());
    std::copy_n(conv.begin() + n * static_cast<index_t>(part.conv.size()), part.conv.size(), part.conv.begin());
    return part;
  }
};

inline std::vector<float> tokens(index_t count, index_t model, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<float> x;
  for (index_t n = 0; n < count * model; ++n) x.push_back(random.uniform(-1.7f, 1.7f));
  return x;
}

inline Table table_of(const std::vector<float>& x, index_t model) {
  Table table(static_cast<index_t>(x.size()) / model, model);
  std::copy(x.begin(), x.end(), table.data.begin());
  return table;
}

// sqrt(sum of squared differences / sum of squares); a NaN is infinitely far.
template <class A, class B>
double distance(const A& got, const B& wanted) {
  REQUIRE(got.size() == wanted.size());
  double difference = 0, size = 0;
  for (std::size_t n = 0; n < got.size(); ++n) {
    const double d = double(got[n]) - double(wanted[n]);
    difference += d * d;
    size += double(wanted[n]) * double(wanted[n]);
  }
  const double relative = difference == 0 ? 0 : std::sqrt(difference / size);
  return std::isnan(relative) ? HUGE_VAL : relative;
}

// The relative RMS error that an fp32 engine may have.
inline constexpr double kClose = 1e-5;

inline std::vector<index_t> cumulative(const std::vector<index_t>& lengths) {
  std::vector<index_t> cu{0};
  for (const index_t len : lengths) cu.push_back(cu.back() + len);
  return cu;
}

inline std::vector<float> part(const std::vector<float>& x, index_t model, index_t begin, index_t end) {
  return {x.begin() + begin * model, x.begin() + end * model};
}

// A Layer below has block, its Block; states(sequences, kept, layout); recipe(x, cu, states); and call(...) and bytes(...),
// the module's functions.

// One call on tokens of sequences that lie one after the other; states are updated in place.
template <class Layer>
Status step(const Layer& layer, const std::vector<float>& x, const std::vector<index_t>& cu, States<float>& states,
            std::vector<float>& y, RecurrentOptions<float> options = {}) {
  const index_t model = layer.block.model, count = static_cast<index_t>(x.size()) / model;
  y.assign(x.size(), test::canary());
  options.layout = states.layout;
  options.initial_state = options.final_state = states.state_view();
  options.cu_len = cu;
  test::PoisonedBytes workspace(Layer::bytes(layer.block, count, states.sequences, options.executor.lanes(), states.kept), 7);
  const Status status = Layer::call(layer.block, fovea::bhsd<const float>(x.data(), 1, 1, count, model),
                                    ConvState{states.conv_view(), states.conv_view()},
                                    fovea::bhsd(y.data(), 1, 1, count, model), options, workspace.bytes());
  CHECK(workspace.guards_intact());
  return status;
}

// A ragged call from random states against the recipe in double.
template <class Layer>
void check_recipe(const Layer& layer, index_t kept, StateLayout layout) {
  const std::vector<index_t> cu = cumulative({5, 0, 1, 13});
  const std::vector<float> x = tokens(cu.back(), layer.block.model, 2);
  States<float> states = layer.states(4, kept, layout);
  states.randomise(3);
  States<double> exact(states);
  std::vector<float> y;
  const Status status = step(layer, x, cu, states, y);
  INFO(status.message());
  REQUIRE(status.ok());
  const Table wanted = layer.recipe(table_of(x, layer.block.model), cu, exact);
  CHECK(distance(y, wanted.data) < kClose);
  CHECK(distance(states.s, exact.s) < kClose);
  CHECK(distance(states.conv, exact.conv) < kClose);
}

// Prefill in parts and by tokens is the prefill in one.
template <class Layer>
void check_parts(const Layer& layer) {
  const index_t len = 37, model = layer.block.model;
  const std::vector<float> x = tokens(len, model, 4);
  States<float> whole_states = layer.states(1, 3);
  std::vector<float> whole;
  REQUIRE(step(layer, x, {0, len}, whole_states, whole).ok());
  for (const std::vector<index_t>& cuts :
       {std::vector<index_t>{len - 1, len}, {1, len}, {20, len}, {7, 8, 9, 33, len}, {0, 5, 5, len}}) {
    States<float> states = layer.states(1, 3);
    std::vector<float> y, here;
    index_t begin = 0;
    for (const index_t end : cuts) {
      REQUIRE(step(layer, part(x, model, begin, end), {0, end - begin}, states, here).ok());
      y.insert(y.end(), here.begin(), here.end());
      begin = end;
    }
    CHECK(distance(y, whole) < kClose);
    CHECK(distance(states.s, whole_states.s) < kClose);
    CHECK(states.conv == whole_states.conv);   // projections do not depend on how many tokens share a call
  }
}

// The members of a ragged call, 6, 0 and 6 tokens of x from `before`, are the sequences alone. Returns its y.
template <class Layer>
std::vector<float> check_members(const Layer& layer, const std::vector<float>& x, const States<float>& before) {
  const index_t model = layer.block.model;
  const std::vector<index_t> cu = cumulative({6, 0, 6});
  States<float> ragged = before;
  std::vector<float> y;
  REQUIRE(step(layer, x, cu, ragged, y).ok());
  for (index_t n = 0; n < 3; ++n) {
    const index_t begin = cu[at(n)], end = cu[at(n) + 1];
    States<float> alone = before.one(n);
    std::vector<float> own;
    REQUIRE(step(layer, part(x, model, begin, end), {0, end - begin}, alone, own).ok());
    CHECK(distance(part(y, model, begin, end), own) < kClose);
    CHECK(distance(ragged.one(n).s, alone.s) < kClose);
    CHECK(ragged.one(n).conv == alone.conv);
  }
  CHECK(ragged.one(1).s == before.one(1).s);   // no tokens: handed on
  CHECK(ragged.one(1).conv == before.one(1).conv);
  return y;
}

// One lane and three: the same bits.
template <class Layer>
void check_lanes(const Layer& layer) {
  const std::vector<index_t> cu = cumulative({19, 1, 0, 40});
  const std::vector<float> x = tokens(cu.back(), layer.block.model, 7);
  States<float> one = layer.states(4, 3), three = layer.states(4, 3);
  std::vector<float> y_one, y_three;
  REQUIRE(step(layer, x, cu, one, y_one).ok());
  test::ThreadPerLane pool;
  REQUIRE(step(layer, x, cu, three, y_three, {.executor = fovea::Executor(pool, 3)}).ok());
  CHECK(y_one == y_three);
  CHECK(one.s == three.s);
  CHECK(one.conv == three.conv);
}

// Two of the layer, one behind the other, with their states in a cache.
template <class Layer>
struct CachedStack {
  const Layer& layer;
  fovea::StateCache cache;
  index_t sequence = 0;

  CachedStack(const Layer& layer_, const fovea::StateCacheShape& shape) : layer(layer_) {
    REQUIRE(cache.create(shape).ok());
    REQUIRE(cache.open(&sequence).ok());
  }
  // What was begun, or its token `at_step`.
  std::vector<float> run(std::vector<float> x, index_t at_step = 0) {
    const index_t model = layer.block.model, count = static_cast<index_t>(x.size()) / model;
    const fovea::StateCacheShape& shape = cache.shape();
    const index_t channels = shape.conv_channels, ring = shape.conv_width - 1 + shape.max_draft;
    for (index_t n = 0; n < shape.layers; ++n) {
      fovea::StateViews views;
      REQUIRE(cache.views(n, sequence, &views, at_step).ok());
      std::vector<float> y(x.size(), test::canary()), inputs(at(ring * channels), test::canary());
      const ConvState conv{views.conv_initial, {inputs.data(), {1, channels, ring}, {ring * channels, 1, channels}}};
      RecurrentOptions<float> options;
      options.layout = shape.layout;
      options.initial_state = views.initial_state;
      options.final_state = views.final_state;
      test::PoisonedBytes workspace(Layer::bytes(layer.block, count, 1, 1, ring), 7);
      const auto in = fovea::bhsd<const float>(x.data(), 1, 1, count, model);
      const auto out = fovea::bhsd(y.data(), 1, 1, count, model);
      const auto replayed = [&](const Operand& q, const Operand& k, const Operand& v, const fovea::Decay<float>& decay,
                                const View<const float, 4>& beta, const Result& o, const RecurrentOptions<float>& how) {
        return fovea::replay_step(cache, n, {&sequence, 1}, fovea::ReplayRule::delta, q, k, v, decay, beta, o, how);
      };
      const Status status = cache.replays() && cache.steps_begun(sequence)
                                ? Layer::call(layer.block, in, conv, out, options, workspace.bytes(), replayed)
                                : Layer::call(layer.block, in, conv, out, options, workspace.bytes());
      INFO(status.message());
      REQUIRE(status.ok());
      CHECK(workspace.guards_intact());
      const index_t kept = std::min(count, ring);
      REQUIRE(cache.keep_inputs(n, sequence, fovea::bhsd(inputs.data() + (ring - kept) * channels, 1, 1, kept, channels)).ok());
      x = y;
    }
    return x;
  }
  std::vector<float> call(const std::vector<float>& x) {
    const index_t count = static_cast<index_t>(x.size()) / layer.block.model;
    REQUIRE(cache.begin_call(sequence, count).ok());
    std::vector<float> y = run(x);
    REQUIRE(cache.commit(sequence, count).ok());
    return y;
  }
  // The outputs of all drafts, of which the first `accepted` stay.
  std::vector<float> drafts(const std::vector<float>& x, index_t accepted) {
    const index_t model = layer.block.model, count = static_cast<index_t>(x.size()) / model;
    REQUIRE(cache.begin_steps(sequence, count).ok());
    std::vector<float> y;
    if (cache.replays()) {
      y = run(x);
    } else {
      for (index_t t = 0; t < count; ++t) {
        const std::vector<float> one = run(part(x, model, t, t + 1), t);
        y.insert(y.end(), one.begin(), one.end());
      }
    }
    REQUIRE(cache.commit(sequence, accepted).ok());
    return y;
  }
};

// A prompt longer than all inputs that the cache keeps, four drafts of which two are right, one token taken back, and on by
// other tokens and a second, short prompt: the outputs and states of a stack that has seen nothing else. A ring of states goes
// through the same calls, so its bits are the same; replay has the error of fp32.
template <class Layer>
void check_cache(const Layer& layer, StateLayout layout, bool channel_decay) {
  const index_t model = layer.block.model, prompt = 13;
  const States<float> empty = layer.states(1, 3, layout);
  const std::vector<float> text = tokens(prompt + 9 + 2, model, 20), wrong = tokens(4, model, 21);
  const auto of_text = [&](index_t begin, index_t end) { return part(text, model, begin, end); };
  std::vector<States<float>> states{empty, empty};
  const auto straight = [&](std::vector<float> x) {
    for (States<float>& each : states) {
      std::vector<float> y;
      REQUIRE(step(layer, x, {0, static_cast<index_t>(x.size()) / model}, each, y).ok());
      x = y;
    }
    return x;
  };
  for (const index_t replay : {0, 4}) {
    CAPTURE(replay);
    const auto same = [&](const auto& a, const auto& b) { CHECK((replay == 0 ? a == b : distance(a, b) < kClose)); };
    fovea::StateCacheShape shape;
    shape.layers = 2;
    shape.heads = empty.heads, shape.dim_k = empty.dim_k, shape.dim_v = empty.dim_v, shape.layout = layout;
    shape.conv_channels = empty.channels;
    shape.max_draft = 4, shape.replay = replay;
    shape.channel_decay = channel_decay;
    shape.poison = true;
    CachedStack<Layer> cached(layer, shape);
    states = {empty, empty};
    CHECK(cached.call(of_text(0, prompt)) == straight(of_text(0, prompt)));

    std::vector<float> right = of_text(prompt, prompt + 2);
    right.insert(right.end(), wrong.begin(), wrong.begin() + 2 * model);
    const std::vector<float> drafted = cached.drafts(right, 2);
    REQUIRE(cached.cache.rollback(cached.sequence, 1).ok());
    same(part(drafted, model, 0, 1), straight(of_text(prompt, prompt + 1)));
    for (index_t t = prompt + 1; t < prompt + 9; ++t) {   // the buffer has room for 8 tokens, so replay folds once
      std::vector<float> two = of_text(t, t + 1);
      two.insert(two.end(), wrong.begin() + 2 * model, wrong.begin() + 3 * model);
      same(part(cached.drafts(two, 1), model, 0, 1), straight(of_text(t, t + 1)));
    }
    CHECK(cached.cache.checkpoint(cached.sequence) == (replay > 0 ? prompt + 3 : 0));
    if (replay > 0) REQUIRE(fovea::replay_fold(cached.cache, cached.sequence).ok());
    same(cached.call(of_text(prompt + 9, prompt + 11)), straight(of_text(prompt + 9, prompt + 11)));
    CHECK(cached.cache.len(cached.sequence) == prompt + 11);
    CHECK(cached.cache.check().ok());
    for (index_t n = 0; n < 2; ++n) {
      const View<float, 4> state = cached.cache.state(n, cached.sequence);
      const std::vector<float>& wanted = states[at(n)].s;
      same(std::vector<float>(state.data, state.data + wanted.size()), wanted);
    }
  }
}

// What a test of refusals may change.
template <class Block>
struct LayerCall {
  Block block;
  Operand x;
  Result y;
  ConvState conv;
  RecurrentOptions<float> options;
  std::vector<std::byte> workspace;
};

// The words in which a call on 3 tokens, changed, is refused; y and the states are left alone.
template <class Layer, class F>
std::string refused(const Layer& sound, const F& change) {
  const index_t model = sound.block.model;
  const std::vector<float> x = tokens(3, model, 9);
  States<float> states = sound.states(1, 3);
  states.randomise(10);
  const States<float> before = states;
  std::vector<float> y(x.size(), test::canary());
  LayerCall<decltype(sound.block)> call{sound.block,
                                        fovea::bhsd<const float>(x.data(), 1, 1, 3, model),
                                        fovea::bhsd(y.data(), 1, 1, 3, model),
                                        {states.conv_view(), states.conv_view()},
                                        {},
                                        std::vector<std::byte>(Layer::bytes(sound.block, 3))};
  call.options.initial_state = call.options.final_state = states.state_view();
  change(call);
  const Status status = Layer::call(call.block, call.x, call.conv, call.y, call.options, call.workspace);
  CHECK(!status.ok());
  for (const float number : y) CHECK(test::is_canary(number));
  CHECK(states.s == before.s);
  CHECK(states.conv == before.conv);
  return std::string(status.message());
}

}   // namespace test::layer
