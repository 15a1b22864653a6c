// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/linear.hpp"

#include <atomic>

#include "fovea/engine/parts/feature_maps.hpp"
#include "fovea/reference/feature_maps.hpp"
#include "fovea/reference/linear.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

template <class Real>
LinearOptions<Real> linear_options(const Arguments<Real>& x, LinearOptions<Real> options) {
  options.initial_key_sum = x.initial_n;
  options.final_key_sum = x.final_n;
  options.first_pos = x.first_pos;
  return options;
}

Mechanism linear(const char* name, bool normalize, bool causal, bool clamp) {
  const LinearOptions<float> options{.causal = causal, .normalize = normalize, .eps = 0.01f, .clamp_denominator = clamp};
  const LinearOptions<double> exact{
      .causal = causal, .normalize = normalize, .eps = double{0.01f}, .clamp_denominator = clamp};
  return {
      .name = name,
      .run =
          [=](const Arguments<float>& x) {
            return fovea::linear_attention(x.q, x.k, x.v, x.out, linear_options(x, options), x.options);
          },
      .reference =
          [=](const Arguments<double>& x) { reference::linear(x.q, x.k, x.v, x.out, linear_options(x, exact), x.options); },
      .positive = normalize,
      .carries_n = normalize,
      .causal = causal};
}
const Mechanism& plain() {
  static const Mechanism mechanism = linear("linear", false, true, false);
  return mechanism;
}
const Mechanism& normalized() {
  static const Mechanism mechanism = linear("linear, normalised", true, true, false);
  return mechanism;
}
const Mechanism& bidirectional() {
  static const Mechanism mechanism = linear("linear, bidirectional", true, false, false);
  return mechanism;
}
// phi = elu + 1
const Mechanism& elu() {
  static const Mechanism mechanism{.name = "linear, elu + 1",
                                   .run =
                                       [](const Arguments<float>& x) {
                                         return fovea::linear_attention(x.q, x.k, x.v, x.out, linear_options<float>(x, {}),
                                                                        x.options, fovea::EluMap{x.k.extent[3]});
                                       },
                                   .reference =
                                       [](const Arguments<double>& x) {
                                         reference::linear(x.q, x.k, x.v, x.out, linear_options<double>(x, {}), x.options,
                                                           reference::elu_features);
                                       },
                                   .carries_n = true,
                                   .features = [](index_t dim) { return dim; }};
  return mechanism;
}

// Features in double of a row of a head of q or k, at a position of its sequence.
using Phi = std::function<reference::Vector(const reference::Vector& x, index_t head, index_t pos)>;

Exact mapped_rows(const Tensor<const double>& x, const Arguments<double>& a, index_t features, const Phi& phi) {
  Exact out({x.extent[0], x.extent[1], x.extent[2], features});
  const std::span<const index_t> cu_len = a.options.cu_len;
  const index_t sequences = cu_len.empty() ? x.extent[0] : static_cast<index_t>(cu_len.size()) - 1;
  for (index_t s = 0; s < sequences; ++s) {
    const index_t begin = cu_len.empty() ? 0 : cu_len[at(s)], end = cu_len.empty() ? x.extent[2] : cu_len[at(s) + 1];
    const index_t first = a.first_pos.empty() ? 0 : a.first_pos[at(s)], batch = cu_len.empty() ? s : 0;
    for (index_t h = 0; h < x.extent[1]; ++h) {
      for (index_t t = begin; t < end; ++t)
        reference::put(out.writable(), batch, h, t, phi(reference::row(x, batch, h, t), h, first + t - begin));
    }
  }
  return out;
}

// Linear attention with maps for q and k, against the reference on rows mapped in double.
template <class QueryMap, class KeyMap>
Mechanism mapped(const char* name, const QueryMap& q_map, const KeyMap& k_map, const Phi& q_phi, const Phi& k_phi,
                 const std::function<index_t(index_t)>& features, bool normalize, bool clamp = false) {
  const LinearOptions<float> options{.normalize = normalize, .eps = 0.01f, .clamp_denominator = clamp};
  const LinearOptions<double> exact{.normalize = normalize, .eps = double{0.01f}, .clamp_denominator = clamp};
  return {.name = name,
          .run =
              [=](const Arguments<float>& x) {
                return fovea::linear_attention(x.q, x.k, x.v, x.out, linear_options(x, options), x.options, q_map, k_map);
              },
          .reference =
              [=](const Arguments<double>& x) {
                const index_t rows = features(x.k.extent[3]);
                const Exact q = mapped_rows(x.q, x, rows, q_phi), k = mapped_rows(x.k, x, rows, k_phi);
                reference::linear(q.view(), k.view(), x.v, x.out, linear_options(x, exact), x.options);
              },
          .carries_n = normalize,
          .features = features};
}

const Mechanism& cosformer() {
  static const Mechanism mechanism = [] {
    const Phi phi = [](const reference::Vector& x, index_t, index_t pos) {
      return reference::cosformer_features(x, pos + 1, 1000);
    };
    const fovea::CosformerMap any{};
    Mechanism m = mapped(
        "linear, cosFormer", any, any, phi, phi, [](index_t dim) { return 2 * dim; }, true, true);
    m.run = [](const Arguments<float>& x) {
      const LinearOptions<float> options{.eps = 0.01f, .clamp_denominator = true};
      return fovea::linear_attention(x.q, x.k, x.v, x.out, linear_options(x, options), x.options,
                                     fovea::CosformerMap{x.k.extent[3], 1000});
    };
    return m;
  }();
  return mechanism;
}

}   // namespace

TEST_CASE("linear: what every recurrent mechanism does") {
  check_everything(plain());
  check_everything(normalized());
  check_everything(bidirectional());
}
TEST_CASE("linear: every option with every other", "[grid]") {
  check_grid(plain());
  check_grid(normalized());
  check_grid(bidirectional(), 40);
  check_grid(linear("linear, clamped", true, true, true), 30);
  check_grid(linear("linear, bidirectional, unnormalised", false, false, false), 30);
}
// Positions are those of the tokens in their sequences, however these are packed, batched or handed on.
TEST_CASE("linear: cosFormer, sequences split, packed, in batches") {
  check_splits(cosformer());
  check_decode(cosformer());
  check_ragged(cosformer());
  check_batch(cosformer());
  check_heads_and_layouts(cosformer());
  check_grid(cosformer(), 10);
}

TEST_CASE("linear: cosFormer, ragged sequences that go on from different positions") {
  Case c{.seed = 20, .heads = {4, 2, 2}, .dim_k = 6, .dim_v = 20};
  c.lengths = {0, 5, 1, 40, 17};
  c.unowned = 2;
  const Problem problem(cosformer(), c);
  Mechanism later = cosformer();
  const std::vector<index_t> first{7, 0, 500, 33, 2};
  later.run = [&](const Arguments<float>& x) {
    Arguments<float> own = x;
    own.first_pos = first;
    return cosformer().run(own);
  };
  later.reference = [&](const Arguments<double>& x) {
    Arguments<double> own = x;
    own.first_pos = first;
    cosformer().reference(own);
  };
  const Expected expected = problem.expected(later);
  for (const How& how : all_forms()) check(later, problem, expected, how);
  check(later, problem, expected, {RecurrentForm::chunked, 32, 3, Pool::threads});
}

TEST_CASE("linear: every feature map in every form") {
  constexpr index_t kDim = 6, kFeatures = 9;
  const Heads heads{4, 2, 2};
  // Learned matrices of the four heads of q and then the two of k; each in double too.
  Numbers w({1, 6, kFeatures, kDim}), w2 = w, across({1, 6, kDim, kFeatures}), bias({1, 1, 6, kFeatures}),
      gamma({1, 1, 6, kDim}), beta = gamma;
  test::Random random(21);
  for (Numbers* x : {&w, &w2, &across, &bias, &gamma, &beta}) x->fill([&](auto...) { return 0.5 * random.normal(); });
  const Exact w_exact(w), w2_exact(w2), across_exact(across), bias_exact(bias), gamma_exact(gamma), beta_exact(beta);
  const auto heads_of = [](auto view, bool of_q) {
    view.data += of_q ? 0 : 4 * view.stride[0];
    view.extent[0] = of_q ? 4 : 2;
    return view;
  };
  const auto matrix = [](const Exact& x, index_t head) {
    const auto view = x.view();
    return reference::MatrixView{&view(0, head, 0, 0), {view.extent[2], view.extent[3]}, {view.stride[2], view.stride[3]}};
  };
  const auto vector = [](const Exact& x, index_t head) {
    return std::span<const double>(&x.view()(0, 0, head, 0), at(x.extent()[3]));
  };
  // The outer product with each pair once.
  const auto rebased = [&](const reference::Vector& x, index_t head) {
    const auto g = vector(gamma_exact, head), b = vector(beta_exact, head);
    const reference::Vector whole =
        reference::rebased_features(x, reference::Vector(g.data(), g.size()), reference::Vector(b.data(), b.size()));
    std::vector<double> squares, pairs;
    for (std::size_t i = 0; i < at(kDim); ++i) {
      squares.push_back(whole[i * at(kDim) + i]);
      for (std::size_t j = i + 1; j < at(kDim); ++j) pairs.push_back(std::sqrt(2.) * whole[i * at(kDim) + j]);
    }
    squares.insert(squares.end(), pairs.begin(), pairs.end());
    return reference::Vector(squares.data(), squares.size());
  };
  const auto with = [&](const char* name, index_t features, bool normalize, const auto& map_of, const auto& phi) {
    const auto rows = [features](index_t) { return features; };
    return mapped(
        name, map_of(true), map_of(false), [phi](const auto& x, index_t h, index_t) { return phi(x, h); },
        [phi](const auto& x, index_t h, index_t) { return phi(x, 4 + h); }, rows, normalize);
  };
  using fovea::DpfpMap;
  using fovea::EluMap;
  using reference::Vector;
  const auto dpfp = [](const Vector& x, index_t) { return reference::dpfp_features(x, 2); };
  const auto sum_to_one = [](const Vector& x) { return Vector(x / (x.sum() + double{1e-4f})); };
  const std::vector<Mechanism> all{
      with(
          "ReLU", kDim, true, [](bool) { return fovea::ReluMap{kDim}; },
          [](const Vector& x, index_t) { return reference::relu_features(x); }),
      with(
          "exponential", 2 * kDim, true, [](bool) { return fovea::ExponentialMap{kDim}; },
          [](const Vector& x, index_t) { return reference::exponential_features(x); }),
      with(
          "Taylor", 28, false, [](bool) { return fovea::TaylorMap{kDim}; },
          [](const Vector& x, index_t) { return reference::taylor_features(x); }),
      with(
          "DPFP", 4 * kDim, true, [](bool) { return DpfpMap{kDim, 2}; }, dpfp),
      with(
          "T2R", kFeatures, true,
          [&](bool q) { return fovea::T2rMap{heads_of(w.floats<3>(), q), heads_of(bias.floats<2>(), q)}; },
          [&](const Vector& x, index_t h) { return reference::t2r_features(x, matrix(w_exact, h), vector(bias_exact, h)); }),
      with(
          "Hedgehog", 2 * kFeatures, true,
          [&](bool q) { return fovea::HedgehogMap{heads_of(w.floats<3>(), q), heads_of(bias.floats<2>(), q)}; },
          [&](const Vector& x, index_t h) {
            return reference::hedgehog_features(x, matrix(w_exact, h), vector(bias_exact, h));
          }),
      with(
          "LoLCATs", 2 * kFeatures, true, [&](bool q) { return fovea::LolcatsMap{heads_of(across.floats<3>(), q)}; },
          [&](const Vector& x, index_t h) { return reference::lolcats_features(x, matrix(across_exact, h)); }),
      with(
          "ReBased", kDim * (kDim + 1) / 2, false,
          [&](bool q) { return fovea::RebasedMap{kDim, heads_of(gamma.floats<2>(), q), heads_of(beta.floats<2>(), q)}; },
          rebased),
      with(
          "Hadamard", kFeatures, false,
          [&](bool q) { return fovea::HadamardMap{heads_of(w.floats<3>(), q), heads_of(w2.floats<3>(), q)}; },
          [&](const Vector& x, index_t h) { return reference::hadamard_features(x, matrix(w_exact, h), matrix(w2_exact, h)); }),
      with(
          "elu + 1, sums of 1", kDim, true, [](bool) { return fovea::SumNormalizedMap<EluMap>{{kDim}}; },
          [&](const Vector& x, index_t) { return sum_to_one(reference::elu_features(x)); }),
      with(
          "DPFP, sums of 1", 4 * kDim, true, [](bool) { return fovea::SumNormalizedMap<DpfpMap>{{kDim, 2}}; },
          [&](const Vector& x, index_t h) { return sum_to_one(dpfp(x, h)); })};
  Case batch{.seed = 22, .batch = 2, .len = 37, .heads = heads, .dim_k = kDim, .dim_v = 20};
  Case ragged = batch;
  ragged.lengths = {0, 5, 1, 20};
  ragged.unowned = 2;
  ragged.map = HeadMap::tiled;
  ragged.format = Format::bf16;
  using enum RecurrentForm;
  for (const Mechanism& mechanism : all) {
    for (const Case& c : {batch, ragged}) {
      const Problem problem(mechanism, c);
      const Expected expected = problem.expected(mechanism);
      for (const How& how : {How{step}, How{fused}, How{chunked, 16}, How{chunked, 32, 3, Pool::threads}})
        check(mechanism, problem, expected, how);
    }
  }
}

// The map runs within a task: there a denormal is 0, afterwards it is not.
TEST_CASE("linear: tasks flush denormals, the thread does not go on doing so") {
#if defined(__SSE__) || defined(__aarch64__)
  struct Probe {
    std::atomic<int>*asked, *kept;
    index_t features(index_t dim) const { return dim; }
    void operator()(index_t, index_t, const float* row, float* to) const {
      volatile float tiny = 1e-40f;
      ++*asked;
      if (tiny * 1.f != 0) ++*kept;
      std::copy_n(row, 4, to);
    }
  };
  std::atomic<int> asked{0}, kept{0};
  const Problem problem(plain(), {.seed = 23, .batch = 2, .len = 20, .heads = {2, 2, 2}});
  for (const RecurrentForm form : {RecurrentForm::step, RecurrentForm::fused, RecurrentForm::chunked}) {
    Answer a = problem.answer(plain());
    Arguments<float> x = problem.arguments(plain(), a);
    x.options.form = form;
    test::check_float_mode([&](const fovea::Executor& executor) {
      x.options.executor = executor;
      return fovea::linear_attention(x.q, x.k, x.v, x.out, {}, x.options, Probe{&asked, &kept});
    });
    volatile float tiny = 1e-40f;
    CHECK(tiny * 1.f != 0);
  }
  CHECK(asked > 0);
  CHECK(kept == 0);
#endif
}

TEST_CASE("linear: golden values") { check_golden("linear", plain(), golden_problem(plain())); }

TEST_CASE("linear: elu + 1, golden values and lengths") {
  Problem problem = golden_problem(elu());
  problem.c.initial = false;
  problem.c.scale = {};
  check_golden("elu", elu(), problem);
  check_lengths(elu());
}

// Sums of T terms of both signs: a rounding per token, as a walk; a chunk adds its tokens first.
TEST_CASE("linear: long sequences") {
  check_long(plain(), 4096, Gating::mild, 0x1p-24 * 64);
  check_long(normalized(), 4096, Gating::mild, 0x1p-24 * 64);
}

TEST_CASE("linear: normalised, values of one come back, features of zero give zero") {
  for (const Mechanism* mechanism : {&normalized(), &bidirectional()}) {
    Problem ones(*mechanism, {.seed = 10, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .initial = false});
    ones.v.fill([](auto...) { return 1; });
    Problem zeros = ones;
    zeros.q.fill([](auto...) { return 0; });
    for (const How& how : all_forms()) {
      INFO(mechanism->name << ", " << describe(how));
      double worst = 0;
      const Answer a = answer_of(*mechanism, ones, how);
      for (index_t t = 0; t < 70; t += 23) {
        double sum = 0;
        const auto q = row_of(ones.q, 1, t);
        for (index_t s = 0; s < (mechanism->causal ? t + 1 : 70); ++s) sum += dot(q, row_of(ones.k, 1, s));
        for (const double x : row_of(a.out, 1, t)) worst = std::max(worst, std::abs(x - sum / (sum + 0.01)));
      }
      CHECK(worst <= 1e-5);
      CHECK(squares_of(answer_of(*mechanism, zeros, how).out) == 0);
    }
  }
}

// No positions: the last output does not depend on the order of the past.
TEST_CASE("linear: the order of the past does not matter") {
  Problem problem(normalized(), {.seed = 11, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
  Problem turned = problem;
  turned.k.fill([&](index_t b, index_t h, index_t t, index_t i) { return problem.k.get(b, h, t == 69 ? t : 68 - t, i); });
  turned.v.fill([&](index_t b, index_t h, index_t t, index_t j) { return problem.v.get(b, h, t == 69 ? t : 68 - t, j); });
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer one = answer_of(normalized(), problem, how), other = answer_of(normalized(), turned, how);
    Distance apart;
    for (index_t j = 0; j < 20; ++j) apart.see(one.out.get(0, 1, 69, j), other.out.get(0, 1, 69, j));
    CHECK(apart.value() <= 2 * kRelativeError);
  }
}

// Every token of a bidirectional call reads what the last one of a causal call does.
TEST_CASE("linear: bidirectional is the last state for all") {
  const Problem problem(bidirectional(), {.seed = 12, .len = 45, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
  Problem last = problem;
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 12; ++i) last.q.put(0, h, 44, i, problem.q.get(0, h, 7, i));
  }
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer all = answer_of(bidirectional(), problem, how), causal = answer_of(normalized(), last, how);
    Distance apart;
    for (index_t j = 0; j < 20; ++j) apart.see(all.out.get(0, 1, 7, j), causal.out.get(0, 1, 44, j));
    CHECK(apart.value() <= 2 * kRelativeError);
  }
}

TEST_CASE("linear: refused positions and maps of other rows") {
  const Problem problem(cosformer(), {.seed = 24, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6});
  check_refused(cosformer(), problem,
                {{"first_pos has 1 entries for 2 sequences", [](auto& x) { x.first_pos = {3}; }},
                 {"first_pos[1] = -1", [](auto& x) { x.first_pos = {3, -1}; }},
                 {"first_pos[0]", [](auto& x) { x.first_pos = {PTRDIFF_MAX - 4, 0}; }}});
  const Numbers w({1, 1, 9, 5}), across({1, 1, 5, 9});   // made for rows of 5 numbers
  const auto refused = [&](const auto& map) {
    Mechanism other = cosformer();
    other.run = [&](const Arguments<float>& x) {
      return fovea::linear_attention(x.q, x.k, x.v, x.out, {}, x.options, map);
    };
    check_refused(other, problem, {{"phi gives 0 features", [](auto&) {}}});
  };
  refused(fovea::CosformerMap{5, 100});
  refused(fovea::T2rMap{w.floats<3>()});
  refused(fovea::HedgehogMap{w.floats<3>()});
  refused(fovea::LolcatsMap{across.floats<3>()});
  refused(fovea::HadamardMap{w.floats<3>(), w.floats<3>()});
  refused(fovea::FavorReluMap{w.floats<3>()});
  refused(fovea::SumNormalizedMap<fovea::EluMap>{{5}});
}

TEST_CASE("linear: refused key sums and options") {
  const Problem problem(normalized(), {.seed = 13, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6});
  Mechanism no_eps = normalized();
  no_eps.run = [](const Arguments<float>& x) {
    return fovea::linear_attention(x.q, x.k, x.v, x.out, linear_options<float>(x, {.eps = kInfinity}), x.options);
  };
  check_refused(no_eps, problem, {{"eps inf", [](auto&) {}}});
  check_refused(normalized(), problem,
                {{"initial_key_sum has extent 5 on axis 2, must be 6", [](auto& x) { x.initial_n.extent[2] = 5; }},
                 {"final_key_sum has extent 3 on axis 1, must be 4", [](auto& x) { x.final_n.extent[1] = 3; }},
                 {"final_key_sum overlaps itself", [](auto& x) { x.final_n.stride[1] = 0; }},
                 {"overlaps", [](auto& x) { x.final_n.data = x.options.final_state.data; }}});
}
