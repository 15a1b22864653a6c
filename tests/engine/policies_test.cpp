// SPDX-License-Identifier: Apache-2.0
// Policies the library does not ship, run through the engine as it is: a source in two pieces, a normaliser, a mask, a
// score, a tap.
#include "fovea/mechanisms/softmax.hpp"

#include <cmath>
#include <vector>

#include "catch_compat.hpp"
#include "support/random.hpp"

using namespace fovea;

namespace {

// Keys up to `border` in one buffer, the rest in another: what a page border or a ring's wrap looks like.
struct TwoPieces {
  const float *k, *k_rest, *v, *v_rest;
  index_t border, dim;
  KvKernels kernels = kv_kernels<F32Codec, F32Codec>();

  Run run(const Row&, index_t begin, index_t end) const {
    const bool head = begin < border;
    const index_t count = head ? std::min(border, end) - begin : end - begin;
    const auto piece = [&](const float* first, const float* rest) {
      const float* const at = head ? first + begin * dim : rest + (begin - border) * dim;
      return Segment{reinterpret_cast<const std::byte*>(at), dim * 4, count, 0};
    };
    return {piece(k, k_rest), piece(v, v_rest), &kernels};
  }
};

// Sigmoid attention, arXiv 2409.04431: partial rows add without weights.
struct Sigmoid {
  struct State {};
  State begin(const Row&, bool) const { return {}; }
  void absorb(State*, const ScoreRows& scores, float* rescale) const {
    for (index_t r = 0; r < scores.rows; ++r) {
      for (float& x : scores.row(r)) x = 1.f / (1.f + std::exp(-x));   // exp(+inf) = inf, so a masked score gives 0
      rescale[r] = 1.f;
    }
  }
  std::array<float, 2> merge(State&, const State&) const { return {1.f, 1.f}; }
  Final finish(const State&) const { return {1.f, 0.f}; }
};

// Every third key, counted from the query.
struct Dilated {
  struct Lane {
    index_t phase;
    keep_t operator()(i32 pos) const {
      alignas(f32) float keep[kLanes];
      for (index_t i = 0; i < kLanes; ++i) keep[i] = pos.get(static_cast<std::size_t>(i)) % 3 == phase ? 1.f : 0.f;
      return f32::load_aligned(keep) != f32(0.f);
    }
  };
  Lane at(const Row& row) const { return {row.pos % 3}; }
  KeyRange hull(std::span<const Row>) const { return {0, PTRDIFF_MAX}; }
  Cover cover(const Tile&) const { return Cover::partial; }
};

struct Doubled {
  struct Lane {
    f32 operator()(f32 s, i32) const { return s + s; }
  };
  Lane at(const Row&) const { return {}; }
};

struct WeightSum {
  double* sum;
  void absorb(const Row& row, index_t, std::span<const float> weights, float rescale) const {
    double& mine = sum[row.q_index];
    mine *= static_cast<double>(rescale);
    for (const float w : weights) mine += static_cast<double>(w);
  }
  void finish(const Row& row, Final end) const { sum[row.q_index] *= static_cast<double>(end.scale); }
};

struct Setup {
  index_t len_q, len_k, dim = 20, border;
  std::vector<float> q, k, v, out;
  Plan plan;

  Setup(index_t rows, index_t keys, index_t cut, Regime regime) : len_q(rows), len_k(keys), border(cut) {
    test::Random random(static_cast<std::uint64_t>(rows * 1000 + keys));
    for (auto* tensor : {&q, &k, &v, &out}) {
      tensor->resize(static_cast<std::size_t>((tensor == &k || tensor == &v ? len_k : len_q) * dim));
      for (float& x : *tensor) x = random.normal();
    }
    plan.sequences.push_back({0, len_q, 0, len_k, 0, 0, 0});
    plan.build({1, 1, dim, dim, {kUnbounded, kUnbounded}, regime, Panels::f32, 1, {}}).or_throw();
  }

  template <class Spec>
  void run(const Spec& spec) {
    std::vector<std::byte> bytes(plan.workspace_bytes(1));
    Bump shared_bytes(aligned(bytes).data());
    const SharedMemory shared = carve_shared(shared_bytes, plan);
    Bump lane_bytes(aligned(bytes).data() + shared_bytes.used());
    const LaneMemory memory = carve_lane(lane_bytes, plan);
    for (std::size_t b = 0; shared.open != nullptr && b < plan.blocks.size(); ++b) shared.open[b] = plan.blocks[b].splits;
    std::atomic<index_t> next{0};
    run_tiles<F32Panels>(plan, Queries{bhsd<const float>(q.data(), 1, 1, len_q, dim), 0.25f, nullptr}, spec, memory, shared, next);
  }
  Store store() { return {bhsd(out.data(), 1, 1, len_q, dim), {}, plan.sequences.data()}; }
  TwoPieces source() const {
    const auto cut = static_cast<std::size_t>(border * dim);
    return {k.data(), k.data() + cut, v.data(), v.data() + cut, border, dim};
  }
  double score(index_t i, index_t j) const {
    double sum = 0;
    for (index_t d = 0; d < dim; ++d)
      sum += static_cast<double>(q[static_cast<std::size_t>(i * dim + d)]) *
             static_cast<double>(k[static_cast<std::size_t>(j * dim + d)]);
    return 0.25 * sum;
  }
  // out[i] = sum_j weight(i, j) v[j], divided by the sum of weights if `normalised`
  template <class Weight>
  double largest_error(const Weight& weight, bool normalised) const {
    double worst = 0;
    for (index_t i = 0; i < len_q; ++i) {
      std::vector<double> sum(static_cast<std::size_t>(dim));
      double total = 0;
      for (index_t j = 0; j < len_k; ++j) {
        const double w = weight(i, j);
        total += w;
        for (index_t d = 0; d < dim; ++d)
          sum[static_cast<std::size_t>(d)] += w * static_cast<double>(v[static_cast<std::size_t>(j * dim + d)]);
      }
      for (index_t d = 0; d < dim; ++d)
        worst = std::max(worst, std::abs(sum[static_cast<std::size_t>(d)] / (normalised ? total : 1.) -
                                         static_cast<double>(out[static_cast<std::size_t>(i * dim + d)])));
    }
    return worst;
  }
};

}   // namespace

TEST_CASE("a source in two segments gives the bits of one") {
  for (const Regime regime : {Regime::prefill, Regime::decode}) {
    for (const index_t border : {0, 1, 7, 255, 256, 300, 530}) {
      Setup setup(13, 530, border, regime);
      setup.run(TileSpec{setup.source(), Identity{}, Band{{kUnbounded, 0}}, Softmax{}, NoTap{}, setup.store()});
      const std::vector<float> two = setup.out;
      Setup whole(13, 530, 530, regime);
      whole.run(TileSpec{whole.source(), Identity{}, Band{{kUnbounded, 0}}, Softmax{}, NoTap{}, whole.store()});
      CHECK(two == whole.out);
      CHECK(setup.largest_error([&](index_t i, index_t j) { return j <= i ? std::exp(setup.score(i, j)) : 0.; }, true) <
            2e-6);
    }
  }
}

TEST_CASE("a normaliser of ten lines: sigmoid, split and unsplit") {
  for (const Regime regime : {Regime::prefill, Regime::decode}) {
    Setup setup(5, 2300, 2300, regime);
    setup.run(TileSpec{setup.source(), Identity{}, Band{{kUnbounded, kUnbounded}}, Sigmoid{}, NoTap{}, setup.store()});
    CHECK(setup.largest_error([&](index_t i, index_t j) { return 1. / (1. + std::exp(-setup.score(i, j))); }, false) < 2e-4);
  }
}

TEST_CASE("a mask and a score of one's own") {
  for (const Regime regime : {Regime::prefill, Regime::decode}) {
    Setup setup(19, 300, 100, regime);
    setup.run(
        TileSpec{setup.source(), Doubled{}, Both<Band, Dilated>{{{kUnbounded, 0}}, {}}, Softmax{}, NoTap{}, setup.store()});
    CHECK(setup.largest_error(
              [&](index_t i, index_t j) { return j <= i && (i - j) % 3 == 0 ? std::exp(2 * setup.score(i, j)) : 0.; },
              true) < 2e-6);
  }
}

TEST_CASE("a tap sees weights that add up to one") {
  Setup setup(37, 700, 700, Regime::prefill);
  std::vector<double> sum(37);
  setup.run(
      TileSpec{setup.source(), Identity{}, Band{{kUnbounded, kUnbounded}}, Softmax{}, WeightSum{sum.data()}, setup.store()});
  for (const double s : sum) CHECK(s == Catch::Approx(1.).epsilon(1e-6));
}
