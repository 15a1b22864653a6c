// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/lolcats.hpp"

#include <vector>

#include "catch_compat.hpp"
#include "fovea/core/convert.hpp"
#include "fovea/reference/lolcats.hpp"
#include "paired_numbers.hpp"
#include "support/executors.hpp"

using namespace fovea;
using namespace test::paired;

namespace {

struct Heads {
  index_t q = 2, k = 2, v = 2;
  index_t out() const { return std::max({q, k, v}); }
};

struct Sizes {
  index_t batch = 1, len = 20, dim_k = 5, dim_v = 3, features = 4, window = 6;
  Heads heads = {};
};

struct Problem {
  Sizes s;
  Numbers q, k, v, query_map, key_map;
  std::vector<float> weight;
  std::vector<double> wide_weight;

  explicit Problem(const Sizes& sizes)
      : s(sizes),
        q(Numbers::random(1, s.batch, s.heads.q, s.len, s.dim_k)),
        k(Numbers::random(2, s.batch, s.heads.k, s.len, s.dim_k)),
        v(Numbers::random(3, s.batch, s.heads.v, s.len, s.dim_v)),
        query_map(Numbers::random(4, 1, s.heads.out(), s.dim_k, s.features)),
        key_map(Numbers::random(5, 1, s.heads.out(), s.dim_k, s.features)) {
    for (index_t h = 0; h < s.heads.out(); ++h) weight.push_back(0.1f + 0.3f * static_cast<float>(h));
    wide_weight.assign(weight.begin(), weight.end());
  }
  LolcatsOptions<float> options(LolcatsWindow shape = LolcatsWindow::sliding) const {
    return {.window = s.window,
            .shape = shape,
            .query_map = rank3(query_map.f()),
            .key_map = rank3(key_map.f()),
            .window_weight = weight,
            .linear_weight = 0.75f};
  }
  LolcatsOptions<double> wide_options(LolcatsWindow shape = LolcatsWindow::sliding) const {
    return {.window = s.window,
            .shape = shape,
            .query_map = rank3(query_map.d()),
            .key_map = rank3(key_map.d()),
            .window_weight = wide_weight,
            .linear_weight = 0.75};
  }
  Numbers out() const { return {s.batch, s.heads.out(), s.len, s.dim_v}; }
};

// States, key sums and windows of `keys` keys.
struct Carried {
  Numbers state, sum, k, v;

  Carried(const Sizes& s, index_t sequences, index_t keys, bool v_first = false)
      : state(sequences, s.heads.out(), v_first ? s.dim_v : 2 * s.features, v_first ? 2 * s.features : s.dim_v),
        sum(1, sequences, s.heads.out(), 2 * s.features),
        k(sequences, s.heads.out(), keys, s.dim_k),
        v(sequences, s.heads.out(), keys, s.dim_v) {}
  void fill() {
    std::uint64_t seed = 60;
    for (Numbers* x : {&state, &sum, &k, &v}) {
      test::Random random(++seed);
      for (std::size_t n = 0; n < x->doubles.size(); ++n) x->set(n, x == &sum ? random.uniform(1, 2) : random.normal());
    }
  }
  void start(LolcatsOptions<float>& l, RecurrentOptions<float>& o) const {
    o.initial_state = state.f();
    l.initial_key_sum = rank3(sum.f());
    l.initial_window_k = k.f();
    l.initial_window_v = v.f();
  }
  void end(LolcatsOptions<float>& l, RecurrentOptions<float>& o) {
    o.final_state = state.f();
    l.final_key_sum = rank3(sum.f());
    l.final_window_k = k.f();
    l.final_window_v = v.f();
  }
  void start(LolcatsOptions<double>& l, RecurrentOptions<double>& o) const {
    o.initial_state = state.d();
    l.initial_key_sum = rank3(sum.d());
    l.initial_window_k = k.d();
    l.initial_window_v = v.d();
  }
  void end(LolcatsOptions<double>& l, RecurrentOptions<double>& o) {
    o.final_state = state.d();
    l.final_key_sum = rank3(sum.d());
    l.final_window_k = k.d();
    l.final_window_v = v.d();
  }
  void check() const {
    CHECK(distance(state) <= kRelative);
    CHECK(distance(sum) <= kRelative);
    CHECK(distance(k) == 0);
    CHECK(distance(v) == 0);
    CHECK((state.guarded() && sum.guarded() && k.guarded() && v.guarded()));
  }
  std::vector<float> values() const {
    std::vector<float> all;
    for (const Numbers* x : {&state, &sum, &k, &v}) {
      const std::vector<float> part = x->values();
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }
};

}   // namespace

TEST_CASE("lolcats: against the reference", "[lolcats]") {
  for (const Heads heads : {Heads{}, Heads{4, 2, 1}, Heads{1, 2, 2}}) {
    for (const index_t len : {0, 1, 7, 8, 9, 43}) {
      for (const index_t window : {1, 4, 8, 11, 64}) {
        for (const LolcatsWindow shape : {LolcatsWindow::sliding, LolcatsWindow::terraced}) {
          for (const bool large : {false, true}) {
            if (large && (window == 4 || len == 7)) continue;
            INFO("heads " << heads.q << ' ' << heads.k << ' ' << heads.v << ", len " << len << ", window " << window
                          << ", shape " << static_cast<int>(shape) << ", large " << large);
            // large: rows of whole vectors, which are worked on where they lie
            const Sizes s = large ? Sizes{2, len, 33, 64, 16, window, heads} : Sizes{1, len, 5, 3, 4, window, heads};
            const Problem x(s);
            const HeadMap map = large ? HeadMap::tiled : HeadMap::blocks;
            Numbers out = x.out();
            Carried after(s, s.batch, std::min(len, window));
            LolcatsOptions<float> options = x.options(shape);
            LolcatsOptions<double> wide = x.wide_options(shape);
            RecurrentOptions<float> how{.head_map = map};
            RecurrentOptions<double> wide_how{.head_map = map};
            after.end(options, how);
            after.end(wide, wide_how);
            reference::lolcats(x.q.d(), x.k.d(), x.v.d(), out.d(), wide, wide_how);
            require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), out.f(), options, how));
            CHECK(distance(out) <= kRelative);
            CHECK(out.guarded());
            after.check();
          }
        }
      }
    }
  }
}

TEST_CASE("lolcats: from a given state, in both layouts and in place", "[lolcats]") {
  for (const bool v_first : {false, true}) {
    for (const index_t dim_v : {18, 32})
      for (const index_t len : {0, 1, 3, 19}) {
        for (const index_t given : {0, 4, 6}) {
          INFO("dim_v first " << v_first << ", dim_v " << dim_v << ", len " << len << ", given " << given);
          const Sizes s{.batch = 2, .len = len, .dim_v = dim_v, .window = 6};
          const Problem x(s);
          Carried before(s, 2, given, v_first), after(s, 2, std::min<index_t>(6, given + len), v_first);
          before.fill();
          Numbers out = x.out();
          LolcatsOptions<float> options = x.options();
          LolcatsOptions<double> wide = x.wide_options();
          RecurrentOptions<float> how{.scale = 0.3f};
          RecurrentOptions<double> wide_how{.scale = double{0.3f}};
          how.layout = wide_how.layout = v_first ? StateLayout::v_first : StateLayout::k_first;
          before.start(options, how);
          before.start(wide, wide_how);
          after.end(options, how);
          after.end(wide, wide_how);
          reference::lolcats(x.q.d(), x.k.d(), x.v.d(), out.d(), wide, wide_how);
          require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), out.f(), options, how));
          CHECK(distance(out) <= kRelative);
          after.check();
          if (given < 6) continue;
          Numbers again = x.out();
          before.end(options, how);
          require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), again.f(), options, how));
          CHECK(same_bits(again.values(), out.values()));
          CHECK(same_bits(before.values(), after.values()));
        }
      }
  }
}

TEST_CASE("lolcats: a sequence split anywhere is the whole one", "[lolcats]") {
  const Sizes s{.len = 22, .dim_k = 9, .dim_v = 7, .features = 6, .window = 5};
  const Problem x(s);
  Numbers out = x.out();
  reference::lolcats(x.q.d(), x.k.d(), x.v.d(), out.d(), x.wide_options());
  Carried whole(s, 1, 5);
  {
    LolcatsOptions<double> wide = x.wide_options();
    RecurrentOptions<double> wide_how;
    whole.end(wide, wide_how);
    Numbers unused = x.out();
    reference::lolcats(x.q.d(), x.k.d(), x.v.d(), unused.d(), wide, wide_how);
  }
  for (index_t split = 0; split <= s.len; ++split) {
    INFO("split at " << split);
    Carried half(s, 1, std::min<index_t>(split, 5));
    const auto run = [&](index_t begin, index_t end, const LolcatsOptions<float>& options,
                         const RecurrentOptions<float>& how) {
      require_ok(lolcats(tokens(x.q.f(), begin, end), tokens(x.k.f(), begin, end), tokens(x.v.f(), begin, end),
                         tokens(out.f(), begin, end), options, how));
    };
    LolcatsOptions<float> first = x.options(), second = x.options();
    RecurrentOptions<float> first_how, second_how;
    half.end(first, first_how);
    half.start(second, second_how);
    whole.end(second, second_how);
    run(0, split, first, first_how);
    run(split, s.len, second, second_how);
    CHECK(distance(out) <= kRelative);
    whole.check();
  }
  // Token by token, the state in one place: decode.
  Carried kept(s, 1, 5);
  for (index_t t = 0; t < s.len; ++t) {
    LolcatsOptions<float> options = x.options();
    RecurrentOptions<float> how;
    const index_t before = std::min<index_t>(t, 5), after = std::min<index_t>(t + 1, 5);
    if (t > 0) kept.start(options, how);
    kept.end(options, how);
    options.initial_window_k.extent[2] = options.initial_window_v.extent[2] = before;
    options.final_window_k.extent[2] = options.final_window_v.extent[2] = after;
    Carried grown(s, 1, after);   // while the window grows, its old and its new rows are not the same bytes
    if (before != after) {
      options.final_window_k = grown.k.f();
      options.final_window_v = grown.v.f();
    }
    require_ok(lolcats(tokens(x.q.f(), t, t + 1), tokens(x.k.f(), t, t + 1), tokens(x.v.f(), t, t + 1),
                       tokens(out.f(), t, t + 1), options, how));
    for (index_t h = 0; before != after && h < 2; ++h) {
      for (index_t n = 0; n < after; ++n) {
        for (index_t d = 0; d < s.dim_k; ++d) kept.k.f()(0, h, n, d) = grown.k.f()(0, h, n, d);
        for (index_t d = 0; d < s.dim_v; ++d) kept.v.f()(0, h, n, d) = grown.v.f()(0, h, n, d);
      }
    }
  }
  kept.state.doubles = whole.state.doubles;
  kept.sum.doubles = whole.sum.doubles;
  kept.k.doubles = whole.k.doubles;
  kept.v.doubles = whole.v.doubles;
  CHECK(distance(out) <= kRelative);
  kept.check();
}

TEST_CASE("lolcats: within the window it is softmax attention, and constant values are returned", "[lolcats]") {
  const Sizes s{.batch = 1, .len = 17, .dim_k = 8, .dim_v = 6, .features = 5, .window = 17};
  Problem x(s);
  Numbers out = x.out();
  require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), out.f(), x.options()));
  for (index_t h = 0; h < 2; ++h) {
    for (index_t t = 0; t < s.len; ++t) {
      std::vector<double> weights;
      double sum = 0;
      for (index_t j = 0; j <= t; ++j) {
        double score = 0;
        for (index_t d = 0; d < s.dim_k; ++d) score += x.q.d()(0, h, t, d) * x.k.d()(0, h, j, d);
        weights.push_back(std::exp(score / std::sqrt(8.)));
        sum += weights.back();
      }
      for (index_t d = 0; d < s.dim_v; ++d) {
        double value = 0;
        for (index_t j = 0; j <= t; ++j) value += weights[static_cast<std::size_t>(j)] / sum * x.v.d()(0, h, j, d);
        out.d()(0, h, t, d) = value;
      }
    }
  }
  CHECK(distance(out) <= kRelative);

  x.s.window = 3;
  for (std::size_t n = 0; n < x.v.doubles.size(); ++n) x.v.set(n, 2.5f);
  require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), out.f(), x.options()));
  std::fill(out.doubles.begin(), out.doubles.end(), 2.5);
  CHECK(distance(out) <= kRelative);
}

TEST_CASE("lolcats: sequences one after the other are the single ones, bit for bit", "[lolcats]") {
  const std::vector<index_t> cu{0, 0, 9, 10, 10, 31};
  const Sizes s{.len = 33, .dim_v = 17, .heads = {4, 2, 2}};
  const Problem x(s);
  for (const LolcatsWindow shape : {LolcatsWindow::sliding, LolcatsWindow::terraced}) {
    Numbers out = x.out();
    Carried after(s, 5, s.window);
    LolcatsOptions<float> options = x.options(shape);
    RecurrentOptions<float> how{.cu_len = cu};
    after.end(options, how);
    require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), out.f(), options, how));
    for (std::size_t n = 0; n + 1 < cu.size(); ++n) {
      INFO("sequence " << n);
      const index_t begin = cu[n], end = cu[n + 1], kept = std::min(end - begin, s.window);
      Numbers one(1, 4, end - begin, s.dim_v);
      Carried own(s, 1, kept);
      LolcatsOptions<float> alone = x.options(shape);
      RecurrentOptions<float> alone_how;
      own.end(alone, alone_how);
      require_ok(lolcats(tokens(x.q.f(), begin, end), tokens(x.k.f(), begin, end), tokens(x.v.f(), begin, end), one.f(),
                         alone, alone_how));
      bool equal = true;
      const auto row = static_cast<index_t>(n);
      const auto compare = [&](Tensor<float> all, index_t from, index_t first, Tensor<float> part) {
        for (index_t h = 0; h < part.extent[1]; ++h) {
          for (index_t i = 0; i < part.extent[2]; ++i) {
            for (index_t d = 0; d < part.extent[3]; ++d) equal = equal && all(from, h, first + i, d) == part(0, h, i, d);
          }
        }
      };
      compare(out.f(), 0, begin, one.f());
      compare(after.state.f(), row, 0, own.state.f());
      compare(after.k.f(), row, 0, own.k.f());
      compare(after.v.f(), row, 0, own.v.f());
      for (index_t h = 0; h < 4; ++h) {
        for (index_t f = 0; f < 2 * s.features; ++f) equal = equal && after.sum.f()(0, row, h, f) == own.sum.f()(0, 0, h, f);
        for (index_t i = kept; i < s.window; ++i) equal = equal && test::is_canary(after.k.f()(row, h, i, 0));
      }
      CHECK(equal);
    }
    bool padding = true;
    for (index_t h = 0; h < 4; ++h) {
      for (index_t t = cu.back(); t < s.len; ++t) padding = padding && test::is_canary(out.f()(0, h, t, 0));
    }
    CHECK(padding);
  }
}

TEST_CASE("lolcats: lanes and workspace change no bit", "[lolcats]") {
  const Sizes s{.batch = 3, .len = 25, .dim_k = 12, .dim_v = 20, .features = 9, .heads = {4, 2, 2}};
  const Problem x(s);
  Numbers want = x.out();
  require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), want.f(), x.options()));
  test::ThreadPerLane threads;
  test::Reversed reversed;
  for (const Executor& executor : {Executor(threads, 3), Executor(reversed, 3), Executor(threads, 40)}) {
    RecurrentOptions<float> how{.executor = executor};
    const std::size_t bytes = lolcats_workspace_bytes(x.q.f(), x.k.f(), x.v.f(), x.options(), how);
    test::PoisonedBytes workspace(bytes, 3);
    how.workspace = workspace.bytes();
    Numbers out = x.out();
    require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), out.f(), x.options(), how));
    CHECK(same_bits(out.values(), want.values()));
    CHECK(workspace.guards_intact());

    how.workspace = workspace.bytes().subspan(0, bytes - kAlignment - 1);
    Numbers untouched = x.out();
    CHECK(lolcats(x.q.f(), x.k.f(), x.v.f(), untouched.f(), x.options(), how).code() == Code::workspace_too_small);
    CHECK(untouched.untouched());
  }
}

namespace {

template <class T>
std::vector<T> stored(const Numbers& x) {
  std::vector<T> to;
  for (const double value : x.doubles) {
    if constexpr (std::is_same_v<T, double>) {
      to.push_back(value);
    } else {
      to.push_back(convert<T>(static_cast<float>(value)));
    }
  }
  return to;
}
template <class T>
Tensor<T> view_like(std::vector<T>& data, const Numbers& x) {
  return bhsd(data.data(), x.extent[0], x.extent[1], x.extent[2], x.extent[3]);
}
template <class T>
double wide(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return double{convert<float>(x)};
  }
}

// Inputs rounded to T; the output is that of floats, rounded once more: `last` units.
template <class T>
void check_storage(double last) {
  const Sizes s{.len = 21, .dim_k = 10, .dim_v = 19};
  Problem x(s);
  std::vector<T> q = stored<T>(x.q), k = stored<T>(x.k), v = stored<T>(x.v), to(x.out().doubles.size());
  for (std::size_t n = 0; n < q.size(); ++n) x.q.set(n, static_cast<float>(wide(q[n])));
  for (std::size_t n = 0; n < k.size(); ++n) x.k.set(n, static_cast<float>(wide(k[n])));
  for (std::size_t n = 0; n < v.size(); ++n) x.v.set(n, static_cast<float>(wide(v[n])));
  Numbers out = x.out();
  require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), out.f(), x.options()));
  require_ok(lolcats(view_like(q, x.q), view_like(k, x.k), view_like(v, x.v), view_like(to, out), x.options()));
  double worst = 0;
  for (std::size_t n = 0; n < to.size(); ++n) {
    const double value = double{out.floats.data()[n]};
    worst = std::max(worst, std::abs(wide(to[n]) - value) / std::abs(value));
  }
  CHECK(worst <= last);
}

}   // namespace

TEST_CASE("lolcats: numbers of 16 and 64 bits, and strided tensors", "[lolcats]") {
  check_storage<bf16>(0x1p-8);
  check_storage<f16>(0x1p-11);
  check_storage<double>(0);

  // Token-major tensors whose numbers lie two apart, with NaN between them.
  const Sizes s{.batch = 2, .len = 13, .dim_v = 17};
  const Problem x(s);
  Numbers want = x.out();
  require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), want.f(), x.options()));
  const auto spread = [](const Numbers& from, test::Poisoned& to) {
    const auto& e = from.extent;
    Tensor<float> view{to.data(), e, {e[1] * e[2] * e[3] * 2, e[3] * 2, e[1] * e[3] * 2, 2}};
    for (index_t b = 0; b < e[0]; ++b) {
      for (index_t h = 0; h < e[1]; ++h) {
        for (index_t t = 0; t < e[2]; ++t) {
          for (index_t d = 0; d < e[3]; ++d) view(b, h, t, d) = from.f()(b, h, t, d);
        }
      }
    }
    return view;
  };
  test::Poisoned q(2 * x.q.floats.size()), k(2 * x.k.floats.size()), v(2 * x.v.floats.size()), to(2 * want.floats.size());
  const Tensor<float> out = spread(x.out(), to);
  require_ok(lolcats(spread(x.q, q), spread(x.k, k), spread(x.v, v), out, x.options()));
  test::Poisoned expected(2 * want.floats.size());
  spread(want, expected);
  CHECK(same_bits({to.everything().begin(), to.everything().end()},
                  {expected.everything().begin(), expected.everything().end()}));
}

TEST_CASE("lolcats: what comes later does not reach a token", "[lolcats]") {
  const Sizes s{.len = 24, .dim_v = 17};
  const Problem x(s);
  Numbers want = x.out();
  require_ok(lolcats(x.q.f(), x.k.f(), x.v.f(), want.f(), x.options()));
  for (const index_t from : {1, 5, 8, 13}) {
    Problem y = x;
    for (index_t h = 0; h < 2; ++h) {
      for (index_t t = from; t < s.len; ++t) {
        for (index_t d = 0; d < s.dim_k; ++d) y.q.f()(0, h, t, d) = y.k.f()(0, h, t, d) = test::canary();
        for (index_t d = 0; d < s.dim_v; ++d) y.v.f()(0, h, t, d) = test::canary();
      }
    }
    Numbers out = x.out();
    require_ok(lolcats(y.q.f(), y.k.f(), y.v.f(), out.f(), y.options()));
    bool equal = true, reached = true;
    for (index_t h = 0; h < 2; ++h) {
      for (index_t t = 0; t < s.len; ++t) {
        for (index_t d = 0; d < s.dim_v; ++d) {
          equal = equal && (t >= from || out.f()(0, h, t, d) == want.f()(0, h, t, d));
          reached = reached && (t < from || std::isnan(out.f()(0, h, t, d)));
        }
      }
    }
    CHECK(equal);
    CHECK(reached);
  }
}

TEST_CASE("lolcats: refusals leave everything as it was", "[lolcats][errors]") {
  const Sizes s{.len = 9};
  const Problem x(s);
  const auto refused = [&](const char* words, auto&& change) {
    Numbers out = x.out();
    Carried after(s, 1, 6);
    LolcatsOptions<float> options = x.options();
    RecurrentOptions<float> how;
    after.end(options, how);
    Tensor<const float> k = x.k.f();
    Tensor<float> to = out.f();
    change(options, how, k, to);
    const Status status = lolcats(x.q.f(), k, x.v.f(), to, options, how);
    INFO(status.message());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK((out.untouched() && after.state.untouched() && after.sum.untouched() && after.k.untouched()));
  };
  using L = LolcatsOptions<float>;
  using R = RecurrentOptions<float>;
  using In = Tensor<const float>;
  using Out = Tensor<float>;
  Numbers other = Numbers::random(70, 1, 2, 6, 8);
  refused("window is 0", [](L& l, R&, In&, Out&) { l.window = 0; });
  refused("shape is 7", [](L& l, R&, In&, Out&) { l.shape = static_cast<LolcatsWindow>(7); });
  refused("query_map has null data", [](L& l, R&, In&, Out&) { l.query_map = {}; });
  refused("query_map has extent 3 on axis 2, must be 4", [](L& l, R&, In&, Out&) { l.query_map.extent[2] = 3; });
  refused("key_map has extent 1 on axis 0, must be 2", [](L& l, R&, In&, Out&) { l.key_map.extent[0] = 1; });
  refused("window_weight has 1 numbers for 2 heads",
          [](L& l, R&, In&, Out&) { l.window_weight = l.window_weight.first(1); });
  const float zero[] = {0.5f, 0.f};
  refused("window_weight[1] is 0", [&](L& l, R&, In&, Out&) { l.window_weight = zero; });
  refused("linear_weight is -1", [](L& l, R&, In&, Out&) { l.linear_weight = -1; });
  refused("k is [1, 2, 8, 5], must be [1, 2, 9, 5]", [](L&, R&, In& k, Out&) { k.extent[2] = 8; });
  refused("final_state has extent 5 on axis 2, must be 8", [](L&, R& r, In&, Out&) { r.final_state.extent[2] = 5; });
  refused("final_key_sum has extent 4 on axis 2, must be 8", [](L& l, R&, In&, Out&) { l.final_key_sum.extent[2] = 4; });
  refused("final_window_k has extent 5 on axis 2, must be 6", [](L& l, R&, In&, Out&) { l.final_window_k.extent[2] = 5; });
  refused("starts from an empty state", [&](L& l, R& r, In&, Out&) {
    l.shape = LolcatsWindow::terraced;
    r.initial_state = {other.f().data, {1, 2, 8, 3}, {48, 24, 3, 1}};
  });
  refused("initial_window_k has 7 keys, the window 6", [&](L& l, R&, In&, Out&) {
    l.initial_window_k = {other.f().data, {1, 2, 7, 5}, {70, 35, 5, 1}};
  });
  refused("go together", [&](L& l, R&, In&, Out&) { l.initial_window_k = {other.f().data, {1, 2, 6, 5}, {60, 30, 5, 1}}; });
  refused("overlaps k", [&](L&, R&, In& k, Out& to) { k = {to.data, k.extent, k.stride}; });
  refused("overlaps final_window_v", [&](L& l, R&, In&, Out& to) { l.final_window_v.data = to.data; });
  refused("different strides", [](L& l, R&, In&, Out&) {
    l.initial_key_sum = l.final_key_sum;
    l.initial_key_sum.stride[1] += 1;
  });
  const std::vector<index_t> falling{0, 5, 4};
  refused("cu_len[2] = 4 is less", [&](L&, R& r, In&, Out&) { r.cu_len = falling; });
}
