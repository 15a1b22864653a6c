// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/state_cache.hpp"

#include "catch_compat.hpp"
#include "fovea/mechanisms/gated_delta.hpp"
#include "fovea/mechanisms/mlstm.hpp"
#include "fovea/reference/kda.hpp"
#include "fovea/reference/short_conv.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

using namespace test;
using fovea::Code;
using fovea::StateCache;
using fovea::StateCacheShape;
using fovea::StateLayout;
using fovea::StateViews;
using fovea::Status;
using fovea::Tensor;
using fovea::View;

namespace {

// 24 bits of a hash: every float holds them exactly.
float number_of(std::uint64_t hash, index_t layer, index_t cell) {
  if (hash == 0) return 0;
  return static_cast<float>(Random(hash + static_cast<std::uint64_t>(layer * 1009 + cell)).bits() >> 40);
}
std::uint64_t hash_of(std::uint64_t before, std::uint64_t token) { return Random(before * 31 + token).bits() | 1; }

// A sequence as a list: its tokens, a hash of each prefix (0 for none), which states are kept and from which input on.
struct Model {
  bool open = false;
  std::vector<std::uint64_t> tokens, prefix{0};   // [token], [token + 1]
  std::vector<std::uint64_t> begun;
  bool steps = false;
  std::vector<index_t> states;   // the positions whose state is kept, rising
  index_t oldest_input = 0;

  index_t len() const { return static_cast<index_t>(tokens.size()); }
};

struct Harness {
  StateCacheShape shape;
  StateCache cache;
  std::vector<Model> sequences, snapshots;

  explicit Harness(const StateCacheShape& wanted)
      : shape(wanted),
        sequences(static_cast<std::size_t>(wanted.sequences)),
        snapshots(static_cast<std::size_t>(wanted.snapshots)) {
    REQUIRE(cache.create(shape).ok());
  }

  index_t history() const { return shape.conv_width - 1; }
  std::size_t slots() const { return static_cast<std::size_t>(shape.max_draft + 1); }
  bool available(const Model& m, index_t pos) const {
    return std::find(m.states.begin(), m.states.end(), pos) != m.states.end() &&
           (shape.conv_channels == 0 || pos - history() >= m.oldest_input);
  }
  void begin(Model& m, index_t count, bool steps, std::uint64_t first_id) const {
    m.steps = steps;
    for (index_t t = 0; t < count; ++t) m.begun.push_back(first_id + static_cast<std::uint64_t>(t));
    if (steps) {
      for (index_t t = 1; t <= count; ++t) m.states.push_back(m.len() + t);
    } else {
      m.states.push_back(m.len() + count);
    }
    while (m.states.size() > slots()) m.states.erase(m.states.begin());
    m.oldest_input = std::max(m.oldest_input, m.len() + count - history() - shape.max_draft);
  }
  void stand_at(Model& m, index_t pos) const {
    for (const std::uint64_t token : m.begun) {
      m.prefix.push_back(hash_of(m.prefix.back(), token));
      m.tokens.push_back(token);
    }
    m.begun.clear();
    m.tokens.resize(static_cast<std::size_t>(pos));
    m.prefix.resize(static_cast<std::size_t>(pos + 1));
    while (m.states.back() > pos) m.states.pop_back();
  }

  float input(const Model& m, index_t layer, index_t t, index_t channel) const {
    if (t < 0) return 0;
    const auto at = static_cast<std::size_t>(t);
    const std::uint64_t token = at < m.tokens.size() ? m.tokens[at] : m.begun[at - m.tokens.size()];
    return number_of(token, layer, 500 + channel);
  }
  std::uint64_t prefix(const Model& m, index_t pos) const {
    std::uint64_t hash = m.prefix.back();
    if (pos <= m.len()) return m.prefix[static_cast<std::size_t>(pos)];
    for (index_t t = m.len(); t < pos; ++t) hash = hash_of(hash, m.begun[static_cast<std::size_t>(t - m.len())]);
    return hash;
  }

  template <class T>
  void each_number(const View<T, 4>& state, const View<T, 3>& extra, index_t sequence, auto&& f) const {
    index_t cell = 0;
    for (index_t h = 0; h < shape.heads; ++h) {
      for (index_t i = 0; i < state.extent[2]; ++i) {
        for (index_t j = 0; j < state.extent[3]; ++j) f(state(sequence, h, i, j), cell++);
      }
      for (index_t e = 0; e < shape.extra; ++e) f(extra(sequence, h, e), cell++);
    }
  }
  template <class T>
  bool holds(const View<T, 4>& state, const View<T, 3>& extra, std::uint64_t hash, index_t layer) const {
    bool same = true;
    each_number(state, extra, 0, [&](T& number, index_t cell) { same = same && number == number_of(hash, layer, cell); });
    return same;
  }

  // What a model does between begin and commit, with what it reads compared.
  void run_layers(index_t n) {
    const Model& m = sequences[static_cast<std::size_t>(n)];
    const auto count = static_cast<index_t>(m.begun.size());
    for (index_t layer = 0; layer < shape.layers; ++layer) {
      for (index_t step = 0; step < (m.steps ? count : 1); ++step) {
        StateViews views;
        if (!cache.views(layer, n, &views, step).ok()) FAIL("views of what was begun");
        if (!holds(views.initial_state, views.initial_extra, prefix(m, m.len() + step), layer)) FAIL("the state before");
        const index_t after = m.len() + (m.steps ? step + 1 : count);
        each_number(views.final_state, views.final_extra, 0,
                    [&](float& number, index_t cell) { number = number_of(prefix(m, after), layer, cell); });
        if (shape.conv_channels == 0) continue;
        const index_t now = m.len() + step, end = m.steps ? now + 1 : after;
        for (index_t c = 0; c < shape.conv_channels; ++c) {
          for (index_t i = 0; i < history(); ++i) {
            if (views.conv_initial(0, c, i) != input(m, layer, now - history() + i, c)) FAIL("the inputs before");
          }
        }
        if ((views.conv_final.data != nullptr) != (shape.max_draft == 0)) FAIL("inputs kept in place or not");
        for (index_t c = 0; views.conv_final && c < shape.conv_channels; ++c) {
          for (index_t i = 0; i < history(); ++i) views.conv_final(0, c, i) = input(m, layer, end - history() + i, c);
        }
        if (views.conv_final) continue;
        // Of a call, by turns as many of the newest as the cache keeps, one more, or all.
        const bool all = m.steps || end % 3 == 2;
        const index_t first = all ? now : std::max(now, end - history() - shape.max_draft - end % 3);
        std::vector<float> x;
        for (index_t t = first; t < end; ++t) {
          for (index_t c = 0; c < shape.conv_channels; ++c) x.push_back(input(m, layer, t, c));
        }
        if (!cache.keep_inputs(layer, n, fovea::bhsd(x.data(), 1, 1, end - first, shape.conv_channels)).ok())
          FAIL("keep_inputs");
      }
    }
  }

  void compare_all() {
    const Status sound = cache.check();
    INFO(sound.message());
    if (!sound.ok()) FAIL("unsound");
    for (index_t n = 0; n < shape.sequences; ++n) {
      const Model& m = sequences[static_cast<std::size_t>(n)];
      if (m.open != cache.is_open(n)) FAIL("open or not: " << n);
      if (!m.open) continue;
      if (m.len() != cache.len(n) || static_cast<index_t>(m.begun.size()) != cache.begun(n)) FAIL("the length of " << n);
      if (!m.begun.empty()) continue;
      for (index_t layer = 0; layer < shape.layers; ++layer) {
        if (!holds(cache.state(layer, n), cache.extra(layer, n), m.prefix.back(), layer)) FAIL("the state of " << n);
      }
      index_t limit = 0;
      for (index_t back = 0; back <= m.len(); ++back) limit = available(m, m.len() - back) ? back : limit;
      if (limit != cache.rollback_limit(n)) FAIL("the rollback limit of " << n);
    }
  }

  // Everything a refused call could have changed.
  std::vector<float> everything() const {
    std::vector<float> all;
    for (index_t n = 0; n < shape.sequences; ++n) {
      all.push_back(cache.is_open(n) ? 1.f : 0.f);
      if (!cache.is_open(n)) continue;
      all.push_back(static_cast<float>(cache.len(n)));
      all.push_back(static_cast<float>(cache.begun(n)));
      all.push_back(static_cast<float>(cache.rollback_limit(n)));
    }
    for (index_t n = 0; n < shape.snapshots; ++n) all.push_back(cache.is_taken(n) ? 1.f : 0.f);
    return all;
  }
};

template <class Models>
bool has_free(const Models& models) {
  return std::any_of(models.begin(), models.end(), [](const Model& each) { return !each.open; });
}

void random_operations(const StateCacheShape& shape, int operations, std::uint64_t seed) {
  Harness h(shape);
  Random random(seed);
  std::uint64_t next_id = 1;
  int refused_rollbacks = 0, rollbacks = 0, restores = 0, partly = 0;
  for (int operation = 0; operation < operations; ++operation) {
    const index_t n = random.one_in(40) ? random.between(-1, shape.sequences) : random.below(shape.sequences);
    const index_t s = random.one_in(40) ? random.between(-1, shape.snapshots) : random.below(shape.snapshots);
    Model nobody, *const m = n >= 0 && n < shape.sequences ? &h.sequences[static_cast<std::size_t>(n)] : &nobody;
    Model* const saved = s >= 0 && s < shape.snapshots ? &h.snapshots[static_cast<std::size_t>(s)] : &nobody;
    const bool compared = random.one_in(4);
    const std::vector<float> before = compared ? h.everything() : std::vector<float>{};
    bool wanted = m->open && m->begun.empty();
    Status status;
    const bool hangs = m->open && !m->begun.empty() && random.one_in(2);
    switch (hangs ? 8 : random.below(18)) {
      case 0: {
        index_t fresh = -1;
        wanted = has_free(h.sequences);
        status = h.cache.open(&fresh);
        if (!wanted) break;
        if (h.sequences[static_cast<std::size_t>(fresh)].open) FAIL("sequence " << fresh << " was handed out twice");
        Model opened;
        opened.open = true;
        opened.states = {0};
        opened.oldest_input = -h.history();
        h.sequences[static_cast<std::size_t>(fresh)] = opened;
        break;
      }
      case 1:
        if (!random.one_in(5)) continue;
        wanted = m->open;
        status = h.cache.close(n);
        *m = Model{};
        break;
      case 2: {
        index_t taken = -1;
        wanted = wanted && has_free(h.snapshots);
        status = h.cache.take(n, &taken);
        if (!wanted) break;
        if (h.snapshots[static_cast<std::size_t>(taken)].open) FAIL("snapshot " << taken << " was handed out twice");
        h.snapshots[static_cast<std::size_t>(taken)] = *m;
        break;
      }
      case 3:
        wanted = m->open && saved->open;
        status = h.cache.restore(s, n);
        if (!wanted) break;
        *m = *saved;
        m->states = {m->len()};
        m->oldest_input = m->len() - h.history();
        ++restores;
        break;
      case 4:
        wanted = saved->open;
        status = h.cache.drop(s);
        *saved = Model{};
        break;
      case 5:
      case 6:
      case 7: {
        const index_t back = random.one_in(4) ? random.between(-1, shape.max_draft + 1) : 1;
        const bool possible = wanted && back >= 0 && back <= m->len();
        wanted = possible && h.available(*m, m->len() - back);
        status = h.cache.rollback(n, back);
        if (possible && !wanted) ++refused_rollbacks;
        if (wanted) h.stand_at(*m, m->len() - back), rollbacks += back > 0 ? 1 : 0;
        break;
      }
      case 8:
      case 9: {
        const auto begun = static_cast<index_t>(m->begun.size());
        const index_t tokens = random.between(-1, begun + 1);
        wanted = m->open && begun > 0 && tokens >= 0 && tokens <= begun && h.available(*m, m->len() + tokens);
        status = h.cache.commit(n, tokens);
        if (wanted) h.stand_at(*m, m->len() + tokens), partly += tokens < begun ? 1 : 0;
        break;
      }
      default: {
        const bool steps = random.one_in(2);
        const index_t most = steps ? std::max(shape.max_draft, index_t{1}) : 9,
                      count = random.between(0, most + (steps ? 1 : 0));
        wanted = wanted && count > 0 && count <= most;
        status = steps ? h.cache.begin_steps(n, count) : h.cache.begin_call(n, count);
        if (!wanted || !status.ok()) break;
        h.begin(*m, count, steps, next_id);
        next_id += static_cast<std::uint64_t>(count);
        h.run_layers(n);
        if (random.one_in(2)) {
          status = h.cache.commit(n, count);
          h.stand_at(*m, m->len() + count);
        }
        break;
      }
    }
    INFO(operation << ": " << status.message());
    if (status.ok() != wanted) FAIL("refused or not, against the model");
    if (!wanted && compared && h.everything() != before) FAIL("a refused call changed the cache");
    if (random.one_in(8)) h.compare_all();
  }
  h.compare_all();
  CHECK(restores > operations / 100);
  CHECK(refused_rollbacks > operations / 100);
  if (shape.max_draft > 0) CHECK(rollbacks > operations / 200);
  if (shape.max_draft > 0) CHECK(partly > operations / 200);
}

}   // namespace

TEST_CASE("StateCache does what lists of tokens do, 100000 random operations", "[cache][state]") {
  StateCacheShape shape;
  shape.layers = 2;
  shape.sequences = 3;
  shape.snapshots = 2;
  shape.heads = 2;
  shape.dim_k = 2;
  shape.dim_v = 1;
  shape.poison = true;
  random_operations(shape, 20000, 1);
  shape.conv_channels = 2;
  random_operations(shape, 20000, 2);
  shape.max_draft = 3;
  shape.extra = 1;
  random_operations(shape, 30000, 3);
  shape.conv_width = 2;
  shape.layout = StateLayout::v_first;
  shape.max_draft = 1;
  random_operations(shape, 15000, 4);
  shape.conv_channels = 0;
  shape.max_draft = 5;
  random_operations(shape, 15000, 5);
}

// Drafted token by token, each to a slot of its own, by the reference; then every slot back is the state of a shorter text.
TEST_CASE("StateCache: the slot s tokens back is the state after T - s tokens", "[cache][state]") {
  constexpr index_t kLen = 9, kDraft = 4, kDimK = 3, kDimV = 2;
  Random random(8);
  const auto numbers = [&](index_t count) {
    std::vector<double> x(static_cast<std::size_t>(count));
    for (double& number : x) number = static_cast<double>(random.uniform(-1.f, 0.f));
    return x;
  };
  std::vector<double> k = numbers(kLen * kDimK), v = numbers(kLen * kDimV), gate = numbers(kLen * kDimK),
                      beta = numbers(kLen);
  std::vector<double> out(kLen * kDimV);
  // After `count` tokens from `first`, on `state`.
  const auto run = [&](index_t first, index_t count, std::vector<double>& state) {
    fovea::RecurrentOptions<double> options;
    options.initial_state = fovea::bhsd<const double>(state.data(), 1, 1, kDimK, kDimV);
    options.final_state = fovea::bhsd(state.data(), 1, 1, kDimK, kDimV);
    const Tensor<const double> keys = fovea::bhsd<const double>(k.data() + first * kDimK, 1, 1, count, kDimK);
    fovea::reference::kda(keys, keys, fovea::bhsd<const double>(v.data() + first * kDimV, 1, 1, count, kDimV),
                          {fovea::bhsd<const double>(gate.data() + first * kDimK, 1, 1, count, kDimK)},
                          fovea::bhsd<const double>(beta.data() + first, 1, 1, count, 1),
                          fovea::bhsd(out.data(), 1, 1, count, kDimV), options);
  };
  StateCache cache;
  StateCacheShape shape;
  shape.dim_k = kDimK;
  shape.dim_v = kDimV;
  shape.max_draft = kDraft;
  REQUIRE(cache.create(shape).ok());
  index_t sequence = 0;
  REQUIRE(cache.open(&sequence).ok());
  for (index_t t = 0; t < kLen; ++t) {
    REQUIRE(cache.begin_steps(sequence, 1).ok());
    StateViews views;
    REQUIRE(cache.views(0, sequence, &views).ok());
    std::vector<double> state(views.initial_state.data, views.initial_state.data + kDimK * kDimV);
    run(t, 1, state);
    std::transform(state.begin(), state.end(), views.final_state.data, [](double x) { return static_cast<float>(x); });
    REQUIRE(cache.commit(sequence, 1).ok());
  }
  for (index_t back = 0; back <= kDraft; ++back) {
    std::vector<double> wanted(kDimK * kDimV);
    run(0, kLen - back, wanted);
    if (back > 0) REQUIRE(cache.rollback(sequence, 1).ok());
    for (std::size_t i = 0; i < wanted.size(); ++i)
      CHECK(double{cache.state(0, sequence).data[i]} == Catch::Approx(wanted[i]).margin(1e-6));
  }
  CHECK_FALSE(cache.rollback(sequence, 1).ok());
}

TEST_CASE("StateCache: drafts through the short convolution, some of them refused", "[cache][state]") {
  constexpr index_t kLen = 40, kChannels = 3, kWidth = 4, kDraft = 5;
  Random random(6);
  std::vector<double> weight(kChannels * kWidth), all(kLen * kChannels), wanted(kLen * kChannels);
  for (double& number : weight) number = static_cast<double>(random.uniform(-1.f, 1.f));
  for (double& number : all) number = static_cast<double>(random.uniform(-1.f, 1.f));
  fovea::ShortConvParameters<double> parameters;
  parameters.weight = {weight.data(), {kChannels, kWidth}, {kWidth, 1}};
  fovea::reference::short_conv(fovea::bhsd<const double>(all.data(), 1, 1, kLen, kChannels), parameters,
                               fovea::bhsd(wanted.data(), 1, 1, kLen, kChannels));
  StateCacheShape shape;
  shape.dim_k = shape.dim_v = 1;
  shape.conv_channels = kChannels;
  shape.max_draft = kDraft;
  shape.poison = true;
  StateCache cache;
  REQUIRE(cache.create(shape).ok());
  index_t sequence = 0;
  REQUIRE(cache.open(&sequence).ok());
  std::vector<bool> seen(kLen, false);
  while (cache.len(sequence) < kLen) {
    const index_t first = cache.len(sequence), count = std::min(random.between(1, kDraft), kLen - first);
    const index_t right = random.between(0, count);   // the drafts behind are wrong, and will be refused
    std::vector<double> x(all.begin() + first * kChannels, all.begin() + (first + count) * kChannels), y(x.size());
    for (index_t i = right * kChannels; i < count * kChannels; ++i) x[static_cast<std::size_t>(i)] = 99;
    REQUIRE(cache.begin_steps(sequence, count).ok());
    StateViews views;
    REQUIRE(cache.views(0, sequence, &views).ok());
    std::vector<double> history;
    for (index_t c = 0; c < kChannels; ++c) {
      for (index_t i = 0; i < kWidth - 1; ++i) history.push_back(double{views.conv_initial(0, c, i)});
    }
    parameters.initial_state = {history.data(), {1, kChannels, kWidth - 1}, {kChannels * (kWidth - 1), kWidth - 1, 1}};
    fovea::reference::short_conv(fovea::bhsd<const double>(x.data(), 1, 1, count, kChannels), parameters,
                                 fovea::bhsd(y.data(), 1, 1, count, kChannels));
    REQUIRE(cache.keep_inputs(0, sequence, fovea::bhsd(x.data(), 1, 1, count, kChannels)).ok());
    REQUIRE(cache.commit(sequence, right).ok());
    for (index_t t = first; t < first + right; ++t) {
      seen[static_cast<std::size_t>(t)] = true;
      for (index_t c = 0; c < kChannels; ++c)
        CHECK(y[static_cast<std::size_t>((t - first) * kChannels + c)] ==
              Catch::Approx(wanted[static_cast<std::size_t>(t * kChannels + c)]).margin(1e-6));
    }
    const index_t back = std::min(random.between(0, 2), cache.rollback_limit(sequence));
    REQUIRE(cache.rollback(sequence, back).ok());
  }
  CHECK(std::find(seen.begin(), seen.end(), false) == seen.end());
}

// A mechanism on the views of two sequences side by side: a prompt, four drafts of which two are right, one of those taken
// back, and on. What it writes are the bits of the same calls on a tensor of states.
TEST_CASE("StateCache: gated_delta_net through views, drafted, accepted, rolled back", "[cache][state]") {
  constexpr index_t kHeads = 2, kDimK = 8, kDimV = 5, kPrompt = 9, kLen = kPrompt + 4;
  Random random(12);
  const auto numbers = [&](index_t dim, float low, float high) {
    std::vector<float> x(static_cast<std::size_t>(2 * kHeads * (kLen + 2) * dim));
    for (float& number : x) number = random.uniform(low, high);
    return x;
  };
  const std::vector<float> k = numbers(kDimK, -0.4f, 0.4f), v = numbers(kDimV, -1, 1), gate = numbers(1, -1, 0),
                           beta = numbers(1, 0, 1);
  // Tokens from `first` on of both sequences; the last two are the wrong drafts.
  const auto run = [&](index_t first, index_t count, const View<const float, 4>& before, const View<float, 4>& after) {
    const auto part = [&](const std::vector<float>& x, index_t dim) {
      return Tensor<const float>{
          x.data() + first * dim, {2, kHeads, count, dim}, {kHeads * (kLen + 2) * dim, (kLen + 2) * dim, dim, 1}};
    };
    std::vector<float> out(static_cast<std::size_t>(2 * kHeads * count * kDimV));
    const Status status =
        fovea::gated_delta_net(part(k, kDimK), part(k, kDimK), part(v, kDimV), {part(gate, 1)}, part(beta, 1),
                               fovea::bhsd(out.data(), 2, kHeads, count, kDimV),
                               {.layout = StateLayout::v_first, .initial_state = before, .final_state = after});
    INFO(status.message());
    REQUIRE(status.ok());
    return out;
  };
  std::vector<float> state(2 * kHeads * kDimK * kDimV);
  const View<float, 4> straight = fovea::bhsd(state.data(), 2, kHeads, kDimV, kDimK);
  StateCacheShape shape;
  shape.sequences = 2;
  shape.heads = kHeads;
  shape.dim_k = kDimK;
  shape.dim_v = kDimV;
  shape.layout = StateLayout::v_first;
  shape.max_draft = 4;
  shape.poison = true;
  StateCache cache;
  REQUIRE(cache.create(shape).ok());
  index_t n = 0;
  const auto both = [&](auto&& f) {
    for (index_t sequence = 0; sequence < 2; ++sequence) REQUIRE(f(sequence).ok());
  };
  both([&](index_t) { return cache.open(&n); });
  StateViews views;
  both([&](index_t sequence) { return cache.begin_call(sequence, kPrompt); });
  REQUIRE(cache.views(0, 0, &views, 0, 2).ok());
  CHECK(run(0, kPrompt, views.initial_state, views.final_state) == run(0, kPrompt, straight, straight));
  both([&](index_t sequence) { return cache.commit(sequence, kPrompt); });

  both([&](index_t sequence) { return cache.begin_steps(sequence, 4); });
  std::vector<float> drafted;
  for (index_t draft = 0; draft < 4; ++draft) {
    REQUIRE(cache.views(0, 0, &views, draft, 2).ok());
    const std::vector<float> out =
        run(draft < 2 ? kPrompt + draft : kLen + draft - 2, 1, views.initial_state, views.final_state);
    if (draft == 0) drafted = out;
  }
  both([&](index_t sequence) { return cache.commit(sequence, 2); });
  both([&](index_t sequence) { return cache.rollback(sequence, 1); });
  CHECK(drafted == run(kPrompt, 1, straight, straight));
  for (index_t t = kPrompt + 1; t < kLen; ++t) {
    both([&](index_t sequence) { return cache.begin_steps(sequence, 1); });
    REQUIRE(cache.views(0, 0, &views, 0, 2).ok());
    CHECK(run(t, 1, views.initial_state, views.final_state) == run(t, 1, straight, straight));
    both([&](index_t sequence) { return cache.commit(sequence, 1); });
  }
  for (index_t sequence = 0; sequence < 2; ++sequence) {
    const float* const kept = cache.state(0, sequence).data;
    const auto size = static_cast<index_t>(state.size()) / 2;
    CHECK(std::equal(kept, kept + size, state.begin() + sequence * size));
  }
  CHECK(cache.check().ok());
}

// n and m in `extra`, cut from one view: what a call reads, its states, n and m do not interleave for any number of sequences.
TEST_CASE("StateCache: mlstm through views, n and m in extra, drafted and rolled back", "[cache][state]") {
  constexpr index_t kHeads = 2, kDimK = 4, kDimV = 3, kLen = 8;
  Random random(13);
  const auto numbers = [&](index_t count) {
    std::vector<float> x(static_cast<std::size_t>(count));
    for (float& number : x) number = random.uniform(-1, 1);
    return x;
  };
  const std::vector<float> k = numbers(2 * kHeads * kLen * kDimK), v = numbers(2 * kHeads * kLen * kDimV),
                           gates = numbers(2 * kHeads * kLen);
  const auto run = [&](index_t first, index_t count, const StateViews& views) {
    const auto part = [&](const std::vector<float>& x, index_t dim) {
      return Tensor<const float>{x.data() + first * dim, {2, kHeads, count, dim}, {kHeads * kLen * dim, kLen * dim, dim, 1}};
    };
    const auto m_of = [](const auto& extra) {
      return View<std::remove_reference_t<decltype(*extra.data)>, 2>{
          &extra(0, 0, kDimK), {extra.extent[0], extra.extent[1]}, {extra.stride[0], extra.stride[1]}};
    };
    fovea::MlstmParameters<float> parameters{.i = part(gates, 1), .f = part(gates, 1)};
    parameters.initial_n = views.initial_extra, parameters.final_n = views.final_extra;
    parameters.initial_n.extent[2] = parameters.final_n.extent[2] = kDimK;
    parameters.initial_m = m_of(views.initial_extra), parameters.final_m = m_of(views.final_extra);
    std::vector<float> out(static_cast<std::size_t>(2 * kHeads * count * kDimV));
    const Status status =
        fovea::mlstm(part(k, kDimK), part(k, kDimK), part(v, kDimV), parameters,
                     fovea::bhsd(out.data(), 2, kHeads, count, kDimV),
                     {.initial_state = views.initial_state, .final_state = views.final_state});
    INFO(status.message());
    REQUIRE(status.ok());
    return out;
  };
  StateCacheShape shape;
  shape.sequences = 2;
  shape.heads = kHeads;
  shape.dim_k = kDimK;
  shape.dim_v = kDimV;
  shape.extra = kDimK + 1;
  shape.poison = true;
  StateCache in_place, drafting;
  REQUIRE(in_place.create(shape).ok());
  shape.max_draft = 2;
  REQUIRE(drafting.create(shape).ok());
  index_t n = 0;
  for (StateCache* cache : {&in_place, &in_place, &drafting, &drafting}) REQUIRE(cache->open(&n).ok());
  const auto call = [&](StateCache& cache, index_t first, index_t count) {
    for (index_t sequence = 0; sequence < 2; ++sequence) REQUIRE(cache.begin_call(sequence, count).ok());
    StateViews views;
    REQUIRE(cache.views(0, 0, &views, 0, 2).ok());
    std::vector<float> out = run(first, count, views);
    for (index_t sequence = 0; sequence < 2; ++sequence) REQUIRE(cache.commit(sequence, count).ok());
    return out;
  };
  CHECK(call(drafting, 0, 5) == call(in_place, 0, 5));
  call(drafting, 7, 1);
  for (index_t sequence = 0; sequence < 2; ++sequence) REQUIRE(drafting.rollback(sequence, 1).ok());
  CHECK(call(drafting, 5, 1) == call(in_place, 5, 1));
  CHECK(call(drafting, 6, 2) == call(in_place, 6, 2));
  CHECK(drafting.check().ok());
}

TEST_CASE("StateCache: one view for adjacent sequences whose cursors agree", "[cache][state]") {
  StateCacheShape shape;
  shape.layers = 2;
  shape.sequences = 3;
  shape.heads = 2;
  shape.dim_k = 3;
  shape.dim_v = 4;
  StateCache cache;
  REQUIRE(cache.create(shape).ok());
  index_t n = 0;
  for (int i = 0; i < 3; ++i) REQUIRE(cache.open(&n).ok());
  for (index_t sequence = 0; sequence < 3; ++sequence) REQUIRE(cache.begin_call(sequence, sequence + 1).ok());
  StateViews views;
  REQUIRE(cache.views(1, 0, &views, 0, 3).ok());
  CHECK(views.initial_state.extent == std::array<index_t, 4>{3, 2, 3, 4});
  CHECK(views.initial_state.data == views.final_state.data);
  for (index_t sequence = 0; sequence < 3; ++sequence)
    CHECK(&views.final_state(sequence, 1, 2, 3) == &cache.state(1, sequence)(0, 1, 2, 3));
  CHECK(views.conv_initial.data == nullptr);
  CHECK(views.final_extra.data == nullptr);
  CHECK(cache.views(0, 1, &views, 0, 3).code() == Code::invalid_argument);
  CHECK(cache.views(0, 0, &views, 1, 1).code() == Code::invalid_argument);

  shape.max_draft = 2;
  REQUIRE(cache.create(shape).ok());
  for (int i = 0; i < 2; ++i) REQUIRE(cache.open(&n).ok());
  REQUIRE(cache.begin_call(0, 7).ok());
  REQUIRE(cache.commit(0, 7).ok());
  for (index_t sequence = 0; sequence < 2; ++sequence) REQUIRE(cache.begin_steps(sequence, 2).ok());
  const Status status = cache.views(0, 0, &views, 0, 2);
  CHECK(status.code() == Code::unsupported);
  CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring("0 and 1 differ (7 and 0 tokens)"));
  REQUIRE(cache.views(0, 1, &views, 1).ok());
  CHECK(views.initial_state.data != views.final_state.data);
}

TEST_CASE("StateCache refuses with the numbers and stays as it was", "[cache][state]") {
  StateCacheShape shape;
  StateCache cache;
  index_t n = 0;
  CHECK(cache.open(&n).code() == Code::out_of_pages);
  CHECK(cache.check().ok());
  shape.dim_k = shape.dim_v = 2;
  shape.conv_channels = 3;
  shape.max_draft = 2;
  shape.poison = true;
  REQUIRE(cache.create(shape).ok());
  REQUIRE(cache.open(&n).ok());
  const auto refused = [&](const Status& status, Code code, const char* words) {
    CHECK(status.code() == code);
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(cache.len(0) == 0);
    CHECK(cache.check().ok());
  };
  index_t other = 77;
  refused(cache.open(&other), Code::out_of_pages, "all 1 sequences");
  refused(cache.take(0, &other), Code::out_of_pages, "all 0 snapshots");
  CHECK(other == 77);
  refused(cache.close(1), Code::invalid_argument, "sequence 1 of 1 is not open");
  refused(cache.restore(0, 0), Code::invalid_argument, "snapshot 0 of 0");
  refused(cache.drop(-1), Code::invalid_argument, "snapshot -1");
  refused(cache.begin_steps(0, 3), Code::invalid_argument, "at most 2");
  refused(cache.begin_call(0, 0), Code::invalid_argument, "0 tokens to begin");
  refused(cache.begin_call(0, PTRDIFF_MAX), Code::invalid_argument, "at most");
  refused(cache.commit(0, 1), Code::invalid_argument, "has begun 0");
  refused(cache.rollback(0, 1), Code::invalid_argument, "sequence 0 has 0");
  StateViews views;
  refused(cache.views(1, 0, &views), Code::invalid_argument, "layer 1 of 1");
  refused(cache.views(0, 0, &views), Code::invalid_argument, "has begun 0");
  REQUIRE(cache.begin_steps(0, 2).ok());
  refused(cache.begin_steps(0, 1), Code::invalid_argument, "has begun 2 tokens");
  refused(cache.rollback(0, 0), Code::invalid_argument, "commit first");
  refused(cache.commit(0, 3), Code::invalid_argument, "has begun 2");
  refused(cache.commit(0, 1), Code::invalid_argument, "and 0 inputs");
  std::vector<float> x(9);
  refused(cache.keep_inputs(0, 0, fovea::bhsd(x.data(), 1, 1, 3, 3)), Code::invalid_argument, "0 to 2, 3]");
  refused(cache.keep_inputs(0, 0, fovea::bhsd(x.data(), 1, 1, 2, 2)), Code::invalid_argument, "0 to 2, 3]");
  refused(cache.keep_inputs(0, 0, fovea::bhsd<float>(nullptr, 1, 1, 2, 3)), Code::invalid_argument, "null");
  CHECK(cache.commit(0, 0).ok());
  // Of a prompt the newest 5, in one part.
  x.assign(27, 1.f);
  REQUIRE(cache.begin_call(0, 9).ok());
  refused(cache.keep_inputs(0, 0, fovea::bhsd(x.data(), 1, 1, 4, 3)), Code::invalid_argument, "5 to 9, 3]");
  refused(cache.commit(0, 9), Code::invalid_argument, "and 0 inputs");
  REQUIRE(cache.keep_inputs(0, 0, fovea::bhsd(x.data(), 1, 1, 5, 3)).ok());
  refused(cache.keep_inputs(0, 0, fovea::bhsd(x.data(), 1, 1, 4, 3)), Code::invalid_argument, "0 to 0, 3]");
  refused(cache.commit(0, 0), Code::invalid_argument, "needs input -3 of the convolution; the oldest is 4");
  REQUIRE(cache.close(0).ok());
  REQUIRE(cache.open(&n).ok());

  const auto bad = [&](const StateCacheShape& wrong, Code code, const char* words) {
    refused(cache.create(wrong), code, words);
  };
  StateCacheShape wrong = shape;
  wrong.dim_k = 0;
  bad(wrong, Code::invalid_argument, "dim_k 0");
  wrong = shape;
  wrong.max_draft = -1;
  bad(wrong, Code::invalid_argument, "-1 to draft");
  wrong = shape;
  wrong.conv_width = 1;
  bad(wrong, Code::invalid_argument, "width 1");
  wrong = shape;
  wrong.replay = 4;
  wrong.extra = 2;
  bad(wrong, Code::unsupported, "2 numbers beside");
  wrong = shape;
  wrong.layers = wrong.sequences = wrong.heads = 1 << 20;
  bad(wrong, Code::out_of_memory, "too much");
}

TEST_CASE("StateCache: check() finds a slot that was written without being handed out", "[cache][state]") {
  StateCacheShape shape;
  shape.dim_k = shape.dim_v = 2;
  shape.max_draft = 1;
  shape.poison = true;
  StateCache cache;
  REQUIRE(cache.create(shape).ok());
  index_t n = 0;
  REQUIRE(cache.open(&n).ok());
  float* const current = cache.state(0, 0).data;
  REQUIRE(cache.check().ok());
  current[1] = 5;   // its own
  CHECK(cache.check().ok());
  current[16] = 5;   // the other slot: states are padded to 16 numbers
  CHECK_FALSE(cache.check().ok());
}
