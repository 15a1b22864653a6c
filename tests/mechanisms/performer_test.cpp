// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/performer.hpp"

#include <vector>

#include "catch_compat.hpp"
#include "fovea/reference/performer.hpp"
#include "paired_numbers.hpp"
#include "support/executors.hpp"

using namespace fovea;
using namespace test::paired;

namespace {

struct Sizes {
  index_t batch = 1, len = 20, dim = 6, dim_v = 5, features = 9, q_heads = 2, k_heads = 2, v_heads = 2;
  index_t states() const { return std::max(k_heads, v_heads); }
};

struct Problem {
  Sizes s;
  Numbers q, k, v, w;

  explicit Problem(const Sizes& sizes)
      : s(sizes),
        q(Numbers::random(1, s.batch, s.q_heads, s.len, s.dim)),
        k(Numbers::random(2, s.batch, s.k_heads, s.len, s.dim)),
        v(Numbers::random(3, s.batch, s.v_heads, s.len, s.dim_v)),
        w(Numbers::random(4, 1, 1, s.features, s.dim)) {}
  PerformerOptions options() const { return {.projection = rank2(w.f())}; }
  reference::PerformerReference wide() const { return {.w = rank2(w.d())}; }
  Numbers out() const { return {s.batch, std::max(s.q_heads, s.states()), s.len, s.dim_v}; }
  Status run(Numbers& to, const PerformerOptions& performer_options, const LinearOptions<float>& linear = {},
             const RecurrentOptions<float>& how = {}) const {
    return performer(q.f(), k.f(), v.f(), to.f(), performer_options, linear, how);
  }
};

struct Carried {
  Numbers state, sum;

  Carried(const Sizes& s, index_t sequences, bool v_first = false)
      : state(sequences, s.states(), v_first ? s.dim_v : s.features, v_first ? s.features : s.dim_v),
        sum(1, sequences, s.states(), s.features) {}
  template <class Linear, class How>
  void end(Linear& linear, How& how) {
    if constexpr (std::is_same_v<How, RecurrentOptions<float>>) {
      how.final_state = state.f();
      linear.final_key_sum = rank3(sum.f());
    } else {
      how.final_state = state.d();
      linear.final_key_sum = rank3(sum.d());
    }
  }
  template <class Linear, class How>
  void start(Linear& linear, How& how) const {
    if constexpr (std::is_same_v<How, RecurrentOptions<float>>) {
      how.initial_state = state.f();
      linear.initial_key_sum = rank3(sum.f());
    } else {
      how.initial_state = state.d();
      linear.initial_key_sum = rank3(sum.d());
    }
  }
};

}   // namespace

TEST_CASE("performer: against the reference", "[performer]") {
  const Sizes sizes[] = {{},
                         {.batch = 2, .len = 37, .dim = 17, .dim_v = 20, .features = 40, .q_heads = 4, .v_heads = 4},
                         {.len = 13, .q_heads = 4},
                         {.len = 12, .features = 300, .q_heads = 1, .k_heads = 1, .v_heads = 1},
                         {.len = 3},
                         {.len = 1},
                         {.len = 0}};
  for (const Sizes& s : sizes) {
    for (const bool relu : {false, true}) {
      for (const bool causal : {true, false}) {
        for (const bool normalize : {true, false}) {
          INFO("len " << s.len << ", features " << s.features << ", relu " << relu << ", causal " << causal
                      << ", normalised " << normalize);
          const Problem x(s);
          const HeadMap map = s.batch == 2 ? HeadMap::tiled : HeadMap::blocks;
          Numbers out = x.out();
          Carried after(s, s.batch, relu);
          PerformerOptions options = x.options();
          reference::PerformerReference wide = x.wide();
          if (relu) options.kernel = PerformerKernel::relu;
          wide.relu = relu;
          wide.eps = relu ? 1e-3 : 1e-4;
          LinearOptions<float> linear{.causal = causal, .normalize = normalize};
          LinearOptions<double> wide_linear{.causal = causal, .normalize = normalize};
          RecurrentOptions<float> how{.head_map = map};
          RecurrentOptions<double> wide_how{.head_map = map};
          how.layout = wide_how.layout = relu ? StateLayout::v_first : StateLayout::k_first;
          after.end(linear, how);
          after.end(wide_linear, wide_how);
          reference::performer(x.q.d(), x.k.d(), x.v.d(), out.d(), wide, wide_linear, wide_how);
          require_ok(x.run(out, options, linear, how));
          CHECK(distance(out) <= kRelative);
          CHECK(distance(after.state) <= kRelative);
          CHECK(distance(after.sum) <= kRelative);
          CHECK((out.guarded() && after.state.guarded() && after.sum.guarded()));
        }
      }
    }
  }
}

TEST_CASE("performer: a sequence split anywhere is the whole one", "[performer]") {
  const Sizes s{.len = 19};
  const Problem x(s);
  Numbers stabiliser(1, 1, 1, 2), used(1, 1, 1, 2);
  PerformerOptions options = x.options();
  options.used_stabiliser = rank2(stabiliser.f());
  Numbers whole = x.out();
  require_ok(x.run(whole, options));
  for (index_t h = 0; h < 2; ++h) {
    double largest = -HUGE_VAL;
    for (index_t t = 0; t < s.len; ++t) {
      largest = std::max(largest, reference::favor_largest(reference::row(x.k.d(), 0, h, t), x.wide().w));
    }
    CHECK(double{stabiliser.f()(0, 0, 0, h)} == Catch::Approx(largest).epsilon(kRelative));
  }
  options.key_stabiliser = rank2(stabiliser.f());
  options.used_stabiliser = rank2(used.f());
  for (index_t n = 0; n <= 2 * s.len + 1; ++n) {
    const index_t split = n / 2;
    const bool normalize = n % 2 == 0;
    INFO("split at " << split << ", normalised " << normalize);
    Numbers out = x.out();
    Carried kept(s, 1);
    LinearOptions<double> wide_linear{.normalize = normalize};
    RecurrentOptions<double> wide_how;
    kept.end(wide_linear, wide_how);
    reference::performer(x.q.d(), x.k.d(), x.v.d(), out.d(), x.wide(), wide_linear, wide_how);
    LinearOptions<float> first{.normalize = normalize}, second = first;
    RecurrentOptions<float> first_how, second_how;
    kept.end(first, first_how);
    kept.start(second, second_how);
    kept.end(second, second_how);   // in place
    const auto run = [&](index_t begin, index_t end, const LinearOptions<float>& linear,
                         const RecurrentOptions<float>& how) {
      require_ok(performer(tokens(x.q.f(), begin, end), tokens(x.k.f(), begin, end), tokens(x.v.f(), begin, end),
                           tokens(out.f(), begin, end), options, linear, how));
    };
    run(0, split, first, first_how);
    run(split, s.len, second, second_how);
    CHECK(distance(out) <= kRelative);
    CHECK(distance(kept.state) <= kRelative);
    CHECK(distance(kept.sum) <= kRelative);
    CHECK(same_bits(used.values(), stabiliser.values()));
  }
}

TEST_CASE("performer: stabilisers cancel where eps does not stand beside them", "[performer]") {
  const Problem x({.len = 15});
  PerformerOptions options = x.options();
  options.eps = 0.f;
  Numbers own = x.out(), given = x.out(), stabiliser(1, 1, 1, 2);
  stabiliser.set(0, -1.f);
  stabiliser.set(1, 3.f);
  require_ok(x.run(own, options, {.eps = 0.f}));
  options.key_stabiliser = rank2(stabiliser.f());
  require_ok(x.run(given, options, {.eps = 0.f}));
  for (std::size_t n = 0; n < own.doubles.size(); ++n) given.doubles[n] = double{own.floats.data()[n]};
  CHECK(distance(given) <= kRelative);

  // Constant values are returned.
  Problem ones = x;
  for (std::size_t n = 0; n < ones.v.doubles.size(); ++n) ones.v.set(n, 1.f);
  for (const bool causal : {true, false}) {
    require_ok(ones.run(own, ones.options(), {.causal = causal, .eps = 0.f}));
    std::fill(own.doubles.begin(), own.doubles.end(), 1.);
    CHECK(distance(own) <= kRelative);
  }
}

TEST_CASE("performer: sequences one after the other are the single ones, bit for bit", "[performer]") {
  const std::vector<index_t> cu{0, 0, 14, 15, 15, 31};
  const Sizes s{.len = 33, .q_heads = 4};
  const Problem x(s);
  for (const bool causal : {true, false}) {
    // 33 tokens go through the matrix product, and so must the single sequences: they are padded with NaN to as many.
    Numbers out = x.out(), used(1, 1, 5, 2);
    Carried after(s, 5);
    LinearOptions<float> linear{.causal = causal};
    RecurrentOptions<float> how{.cu_len = cu, .form = RecurrentForm::chunked};
    after.end(linear, how);
    PerformerOptions options = x.options();
    options.used_stabiliser = rank2(used.f());
    Problem poisoned = x;
    for (index_t h = 0; h < 2; ++h) {
      for (index_t t = cu.back(); t < s.len; ++t) poisoned.k.f()(0, h, t, 0) = poisoned.v.f()(0, h, t, 0) = test::canary();
    }
    require_ok(poisoned.run(out, options, linear, how));
    CHECK(used.f()(0, 0, 0, 0) == 0);
    bool equal = true, padding = true;
    for (std::size_t n = 0; n + 1 < cu.size(); ++n) {
      const std::vector<index_t> one{0, cu[n + 1] - cu[n]};
      Problem alone = x;
      for (Numbers* part : {&alone.q, &alone.k, &alone.v}) {
        const Tensor<float> view = part->f();
        for (index_t h = 0; h < part->extent[1]; ++h) {
          for (index_t t = 0; t < s.len; ++t) {
            for (index_t d = 0; d < part->extent[3]; ++d) {
              view(0, h, t, d) = t < one[1] ? view(0, h, cu[n] + t, d) : test::canary();
            }
          }
        }
      }
      Numbers to = x.out();
      Carried own(s, 1);
      LinearOptions<float> own_linear{.causal = causal};
      RecurrentOptions<float> own_how{.cu_len = one, .form = RecurrentForm::chunked};
      own.end(own_linear, own_how);
      require_ok(alone.run(to, x.options(), own_linear, own_how));
      for (index_t h = 0; h < 4; ++h) {
        for (index_t t = 0; t < one[1]; ++t) {
          for (index_t d = 0; d < s.dim_v; ++d) equal = equal && to.f()(0, h, t, d) == out.f()(0, h, cu[n] + t, d);
        }
        for (index_t t = cu.back(); t < s.len; ++t) padding = padding && test::is_canary(out.f()(0, h, t, 0));
      }
      for (index_t h = 0; h < 2; ++h) {
        for (index_t f = 0; f < s.features; ++f) {
          equal = equal && own.sum.f()(0, 0, h, f) == after.sum.f()(0, static_cast<index_t>(n), h, f);
          for (index_t d = 0; d < s.dim_v; ++d)
            equal = equal && own.state.f()(0, h, f, d) == after.state.f()(static_cast<index_t>(n), h, f, d);
        }
      }
    }
    CHECK(equal);
    CHECK(padding);
  }
}

TEST_CASE("performer: lanes and workspace change no bit", "[performer]") {
  for (const index_t len : {3, 30}) {
    const Problem x({.batch = 2, .len = len, .dim_v = 40, .features = 20, .q_heads = 4});
    Numbers want = x.out();
    require_ok(x.run(want, x.options()));
    test::ThreadPerLane threads;
    test::Reversed reversed;
    for (const Executor& executor : {Executor(threads, 3), Executor(reversed, 3), Executor(threads, 40)}) {
      RecurrentOptions<float> how{.executor = executor};
      Numbers out = x.out(), untouched = x.out();
      const std::size_t bytes = performer_workspace_bytes(x.q.f(), x.k.f(), x.v.f(), out.f(), x.options(), {}, how);
      test::PoisonedBytes workspace(bytes, 3);
      how.workspace = workspace.bytes();
      require_ok(x.run(out, x.options(), {}, how));
      CHECK(same_bits(out.values(), want.values()));
      CHECK(workspace.guards_intact());
      how.workspace = workspace.bytes().subspan(1);
      CHECK(x.run(untouched, x.options(), {}, how).code() == Code::workspace_too_small);
      CHECK(untouched.untouched());
    }
  }
}

TEST_CASE("performer: 16-bit inputs are their numbers", "[performer]") {
  Problem x({.len = 21, .dim = 10});
  const auto stored = [](Numbers& from, std::vector<bf16>& to) {
    for (std::size_t n = 0; n < from.doubles.size(); ++n) {
      to.push_back(convert<bf16>(from.floats.data()[n]));
      from.set(n, convert<float>(to.back()));
    }
    return bhsd(to.data(), from.extent[0], from.extent[1], from.extent[2], from.extent[3]);
  };
  std::vector<bf16> q, k, v;
  const Operand q16 = stored(x.q, q), k16 = stored(x.k, k), v16 = stored(x.v, v);
  Numbers want = x.out(), out = x.out();
  require_ok(x.run(want, x.options()));
  require_ok(performer(q16, k16, v16, out.f(), x.options()));
  CHECK(same_bits(out.values(), want.values()));
}

TEST_CASE("performer: a drawn projection is orthogonal, and the mean over many is the softmax kernel", "[performer]") {
  const auto product = [](const Numbers& w, index_t a, index_t b) {
    double sum = 0;
    for (index_t d = 0; d < w.extent[3]; ++d) sum += double{w.f()(0, 0, a, d)} * double{w.f()(0, 0, b, d)};
    return sum;
  };
  for (const index_t dim : {1, 5, 16}) {
    for (const index_t features : {0, 3, 16, 37}) {
      Numbers w(1, 1, features, dim), again = w, other = w, lengths = w;
      require_ok(draw_projection(7, rank2(w.f()), ProjectionLength::equal));
      require_ok(draw_projection(7, rank2(again.f()), ProjectionLength::equal));
      CHECK(same_bits(w.values(), again.values()));
      CHECK(w.guarded());
      if (features == 0) continue;
      require_ok(draw_projection(8, rank2(other.f()), ProjectionLength::equal));
      CHECK((dim == 1 || !same_bits(w.values(), other.values())));
      const double size = static_cast<double>(dim);
      for (index_t a = 0; a < features; ++a) {
        CHECK(product(w, a, a) == Catch::Approx(size).epsilon(kRelative));
        for (index_t b = a - a % dim; b < a; ++b) CHECK(std::abs(product(w, a, b)) <= kRelative * size);
      }
      require_ok(draw_projection(7, rank2(lengths.f())));
      if (dim > 1 && features > 1) CHECK(std::abs(product(lengths, 0, 0) - product(lengths, 1, 1)) > 1e-3);
    }
  }

  const double q_data[] = {0.5, -0.3, 0.8, 0.1}, k_data[] = {0.2, 0.4, 0.6, -0.7};
  const reference::Vector q(q_data, 4), k(k_data, 4);
  const double expected = std::exp(reference::dot(q, k) / 2);
  constexpr std::size_t kDraws = 20000;
  double sum = 0, squares = 0;
  Numbers w(1, 1, 4, 4);
  for (std::size_t n = 0; n < kDraws; ++n) {
    require_ok(draw_projection(1000 + n, rank2(w.f())));
    for (std::size_t i = 0; i < 16; ++i) w.doubles[i] = double{w.floats.data()[i]};
    const reference::MatrixView view = rank2(static_cast<const Numbers&>(w).d());
    const double one = reference::dot(reference::favor_features(reference::favor_exponents(q, view), 0, 0),
                                      reference::favor_features(reference::favor_exponents(k, view), 0, 0));
    sum += one;
    squares += one * one;
  }
  const double mean = sum / kDraws, deviation = std::sqrt((squares / kDraws - mean * mean) / kDraws);
  CHECK(deviation <= 0.01 * expected);
  CHECK(std::abs(mean - expected) <= 4 * deviation);
}

TEST_CASE("performer: refusals leave everything as it was", "[performer][errors]") {
  const Sizes s{.len = 9};
  const Problem x(s);
  Numbers other = Numbers::random(9, 1, 2, 9, 6);
  const auto refused = [&](const char* words, auto&& change) {
    Numbers out = x.out(), used(1, 1, 1, 2);
    Carried after(s, 1);
    PerformerOptions options = x.options();
    options.used_stabiliser = rank2(used.f());
    LinearOptions<float> linear;
    RecurrentOptions<float> how;
    after.end(linear, how);
    change(options, linear, how);
    const Status status = x.run(out, options, linear, how);
    INFO(status.message());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK((out.untouched() && after.state.untouched() && after.sum.untouched() && used.untouched()));
  };
  using P = PerformerOptions;
  using L = LinearOptions<float>;
  using R = RecurrentOptions<float>;
  refused("projection has 0 features", [](P& p, L&, R&) { p.projection = {}; });
  refused("projection has null data", [](P& p, L&, R&) { p.projection.data = nullptr; });
  refused("projection is [9, 5], q has dim 6", [](P& p, L&, R&) { p.projection.extent[1] = 5; });
  refused("innermost stride 2", [](P& p, L&, R&) { p.projection.stride[1] = 2; });
  refused("kernel is 9", [](P& p, L&, R&) { p.kernel = static_cast<PerformerKernel>(9); });
  refused("performer.eps -1", [](P& p, L&, R&) { p.eps = -1.f; });
  refused("the relu kernel has no stabiliser", [](P& p, L&, R&) { p.kernel = PerformerKernel::relu; });
  refused("used_stabiliser has extent 1 on axis 1, must be 2", [](P& p, L&, R&) { p.used_stabiliser.extent[1] = 1; });
  refused("goes on with the key_stabiliser", [](P&, L& l, R&) { l.initial_key_sum = l.final_key_sum; });
  refused("final_state has extent 8 on axis 2, must be 9", [](P&, L&, R& r) { r.final_state.extent[2] = 8; });
  refused("final_key_sum has extent 8 on axis 2, must be 9", [](P&, L& l, R&) { l.final_key_sum.extent[2] = 8; });
  refused("overlaps projection", [&](P& p, L& l, R&) { l.final_key_sum.data = const_cast<float*>(p.projection.data); });
  Numbers w(1, 1, 4, 4);
  CHECK(!draw_projection(1, {w.f().data, {4, 4}, {1, 1}}).ok());
  CHECK(w.untouched());
}
