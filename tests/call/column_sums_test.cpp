// SPDX-License-Identifier: Apache-2.0
#include "fovea/call/column_sums.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "catch_compat.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace {

using fovea::AttentionOptions;
using fovea::Causal;
using fovea::index_t;
using F32 = fovea::Formats<fovea::Format::f32>;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

// q, k [batch, head, pos, dim]; NaN stands behind the keys in use.
struct Problem {
  index_t batch = 2, q_heads = 4, kv_heads = 2, len_q = 5, len_k = 37, dim = 6;
  std::vector<index_t> in_use{};   // [batch]; empty: all
  std::vector<float> q{}, k{};

  void fill(std::uint64_t seed) {
    test::Random random(seed);
    q.resize(at(batch * q_heads * len_q * dim));
    k.resize(at(batch * kv_heads * len_k * dim));
    for (float& x : q) x = random.normal();
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < kv_heads; ++h) {
        for (index_t s = 0; s < len_k; ++s) {
          for (index_t d = 0; d < dim; ++d)
            k[at(((b * kv_heads + h) * len_k + s) * dim + d)] = s < keys(b) ? random.normal() : kNan;
        }
      }
    }
  }
  index_t keys(index_t b) const { return in_use.empty() ? len_k : in_use[at(b)]; }
  fovea::Tensor<const float> q_view() const { return fovea::bhsd(q.data(), batch, q_heads, len_q, dim); }
  fovea::Tensor<const float> k_view() const { return fovea::bhsd(k.data(), batch, kv_heads, len_k, dim); }
  fovea::Kv kv() const { return fovea::dense_kv(k_view(), k_view()); }
};

// [sequence, q head, number], as double loops.
struct Wanted {
  std::vector<double> keys, distances;
};
Wanted reference(const Problem& p, const AttentionOptions& o, index_t distances) {
  Wanted wanted{std::vector<double>(at(p.batch * p.q_heads * p.len_k)),
                std::vector<double>(at(p.batch * p.q_heads * distances))};
  const double scale = o.scale ? double{*o.scale} : 1 / std::sqrt(static_cast<double>(p.dim));
  for (index_t b = 0; b < p.batch; ++b) {
    for (index_t h = 0; h < p.q_heads; ++h) {
      const float* const k = p.k.data() + (b * p.kv_heads + h / (p.q_heads / p.kv_heads)) * p.len_k * p.dim;
      for (index_t i = 0; i < p.len_q; ++i) {
        const float* const q = p.q.data() + ((b * p.q_heads + h) * p.len_q + i) * p.dim;
        const index_t pos = !o.q_offset.empty()                ? i + o.q_offset[at(b)]
                            : o.causal == Causal::bottom_right ? i + p.keys(b) - p.len_q
                                                               : i;
        std::vector<double> weights(at(p.len_k));
        double sum = o.sink.empty() ? 0 : std::exp(double{o.sink[at(h)]});
        for (index_t s = 0; s < p.keys(b); ++s) {
          if (o.causal != Causal::none && s > pos) continue;
          if (o.window.left >= 0 && s < pos - o.window.left) continue;
          if (o.keep && o.keep(b, 0, i, s) == 0) continue;
          double score = 0;
          for (index_t d = 0; d < p.dim; ++d) score += double{q[d]} * double{k[s * p.dim + d]};
          score *= scale;
          if (o.softcap > 0) score = double{o.softcap} * std::tanh(score / double{o.softcap});
          sum += weights[at(s)] = std::exp(score);
        }
        for (index_t s = 0; s < p.len_k; ++s) {
          if (weights[at(s)] == 0) continue;
          wanted.keys[at((b * p.q_heads + h) * p.len_k + s)] += weights[at(s)] / sum;
          if (const index_t distance = pos - s; distance >= 0 && distance < distances)
            wanted.distances[at((b * p.q_heads + h) * distances + distance)] += weights[at(s)] / sum;
        }
      }
    }
  }
  return wanted;
}

// The groups' heads added up.
std::vector<double> by_kv_head(const Problem& p, const std::vector<double>& of_q_heads, index_t width) {
  const index_t group = p.q_heads / p.kv_heads;
  std::vector<double> sums(at(p.batch * p.kv_heads * width));
  for (index_t bh = 0; bh < p.batch * p.q_heads; ++bh) {
    for (index_t n = 0; n < width; ++n) sums[at(bh / group * width + n)] += of_q_heads[at(bh * width + n)];
  }
  return sums;
}

struct Output {
  test::Poisoned numbers;
  fovea::View<float, 3> view;
  Output(index_t batch, index_t heads, index_t width)
      : numbers(batch * heads * width), view{numbers.data(), {batch, heads, width}, {heads * width, width, 1}} {}
  std::vector<float> values() const { return {numbers.data(), numbers.data() + numbers.size()}; }
};

// Each weight is off by some 1e-6 of itself, sums are of at most group * len_q weights.
void check_close(const Output& got, const std::vector<double>& wanted) {
  REQUIRE(got.values().size() == wanted.size());
  double worst = 0;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const double error = std::abs(double{got.values()[i]} - wanted[i]) / (1e-2 + wanted[i]);
    worst = error > worst || error != error ? error : worst;
  }
  CHECK(worst < 1e-5);
  CHECK(test::first_overwritten<3>(got.numbers, {got.view}) == -1);
}

void check_all(const Problem& p, const AttentionOptions& options, index_t distances) {
  const Wanted wanted = reference(p, options, distances);
  Output keys(p.batch, p.q_heads, p.len_k), far(p.batch, p.q_heads, distances);
  REQUIRE(fovea::column_sums<F32>(p.q_view(), p.kv(), {keys.view, far.view}, options).ok());
  check_close(keys, wanted.keys);
  check_close(far, wanted.distances);
  Output kv_keys(p.batch, p.kv_heads, p.len_k), kv_far(p.batch, p.kv_heads, distances);
  REQUIRE(fovea::column_sums<F32>(p.q_view(), p.kv(), {kv_keys.view, kv_far.view}, options).ok());
  check_close(kv_keys, by_kv_head(p, wanted.keys, p.len_k));
  check_close(kv_far, by_kv_head(p, wanted.distances, distances));
}

}   // namespace

TEST_CASE("column sums: options of attention, per q head and per kv head", "[column_sums]") {
  Problem p;
  p.fill(1);
  check_all(p, {}, p.len_k);
  check_all(p, {.scale = 0.7f, .causal = Causal::bottom_right}, p.len_k);
  check_all(p, {.causal = Causal::top_left}, 3);
  check_all(p, {.causal = Causal::bottom_right, .window = {.left = 9}}, 20);
  check_all(p, {.softcap = 1.5f}, p.len_k);
  const std::vector<index_t> offset{30, -3};
  check_all(p, {.causal = Causal::bottom_right, .q_offset = offset}, p.len_k);
  const std::vector<float> sink{0.5f, -1.f, 2.f, 0.f};
  check_all(p, {.causal = Causal::bottom_right, .sink = sink}, p.len_k);
  std::vector<std::uint8_t> keep(at(p.batch * p.len_q * p.len_k));
  test::Random random(3);
  for (std::uint8_t& bit : keep) bit = random.one_in(3) ? 0 : 1;
  AttentionOptions masked;
  masked.keep = {keep.data(), {p.batch, 1, p.len_q, p.len_k}, {p.len_q * p.len_k, 0, p.len_k, 1}};
  check_all(p, masked, p.len_k);
}

TEST_CASE("column sums: more queries than a tile, keys over several chunks, lengths, what lies behind them",
          "[column_sums]") {
  Problem p;
  p.batch = 2;
  p.q_heads = 3;
  p.kv_heads = 1;
  p.len_q = 21;
  p.len_k = 2 * fovea::columns::kChunk + 70;
  p.dim = 4;
  p.in_use = {p.len_k - 3, fovea::columns::kChunk - 5};
  p.fill(2);
  AttentionOptions options{.causal = Causal::bottom_right};
  options.len_k = p.in_use;
  check_all(p, options, p.len_k);
}

TEST_CASE("column sums: rows sum to the number of queries, diagonals as well", "[column_sums]") {
  Problem p;
  p.fill(4);
  Output keys(p.batch, p.q_heads, p.len_k), far(p.batch, p.q_heads, p.len_k);
  REQUIRE(fovea::column_sums<F32>(p.q_view(), p.kv(), {keys.view, far.view}, {.causal = Causal::bottom_right}).ok());
  for (index_t b = 0; b < p.batch; ++b) {
    for (index_t h = 0; h < p.q_heads; ++h) {
      double by_key = 0, by_distance = 0;
      for (index_t n = 0; n < p.len_k; ++n) {
        by_key += double{keys.view(b, h, n)};
        by_distance += double{far.view(b, h, n)};
      }
      CHECK(by_key == Catch::Approx(static_cast<double>(p.len_q)).epsilon(1e-6));
      CHECK(by_distance == Catch::Approx(static_cast<double>(p.len_q)).epsilon(1e-6));
    }
  }
}

TEST_CASE("column sums: the last queries of a prompt are those of the whole", "[column_sums]") {
  Problem p;
  p.len_q = p.len_k;
  p.fill(5);
  Problem last = p;
  last.len_q = 8;
  last.q.clear();
  for (index_t bh = 0; bh < p.batch * p.q_heads; ++bh) {
    const auto row = p.q.begin() + (bh * p.len_q + p.len_q - 8) * p.dim;
    last.q.insert(last.q.end(), row, row + 8 * p.dim);
  }
  const AttentionOptions options{.causal = Causal::bottom_right};
  Output cut(p.batch, p.kv_heads, p.len_k), own(p.batch, p.kv_heads, p.len_k);
  REQUIRE(fovea::column_sums<F32>(fovea::last_queries(p.q_view(), 8), p.kv(), {cut.view}, options).ok());
  REQUIRE(fovea::column_sums<F32>(last.q_view(), last.kv(), {own.view}, options).ok());
  CHECK(cut.values() == own.values());
  CHECK(fovea::last_queries(p.q_view(), 1000).extent[2] == p.len_q);
}

TEST_CASE("column sums: the same bits on any lanes, in any order", "[column_sums]") {
  Problem p;
  p.len_k = 2 * fovea::columns::kChunk + 9;
  p.len_q = 3;
  p.fill(6);
  Output keys(p.batch, p.q_heads, p.len_k), far(p.batch, p.kv_heads, p.len_k);
  AttentionOptions options{.causal = Causal::bottom_right};
  REQUIRE(fovea::column_sums<F32>(p.q_view(), p.kv(), {keys.view, far.view}, options).ok());
  test::ThreadPerLane threads;
  test::Reversed reversed;
  for (const fovea::Executor& executor : {fovea::Executor(threads, 3), fovea::Executor(reversed, 5)}) {
    Output other_keys(p.batch, p.q_heads, p.len_k), other_far(p.batch, p.kv_heads, p.len_k);
    options.executor = executor;
    REQUIRE(fovea::column_sums<F32>(p.q_view(), p.kv(), {other_keys.view, other_far.view}, options).ok());
    CHECK(other_keys.values() == keys.values());
    CHECK(other_far.values() == far.values());
  }
}

TEST_CASE("column sums: added to what stands there, row after row", "[column_sums]") {
  Problem p;
  p.len_q = 4;
  p.fill(7);
  const AttentionOptions whole{.causal = Causal::bottom_right};
  const Wanted wanted = reference(p, whole, p.len_k);
  Output keys(p.batch, p.q_heads, p.len_k), far(p.batch, p.q_heads, p.len_k);
  std::fill_n(keys.numbers.data(), keys.numbers.size(), 0.f);
  std::fill_n(far.numbers.data(), far.numbers.size(), 0.f);
  for (index_t i = 0; i < p.len_q; ++i) {
    fovea::Tensor<const float> row = p.q_view();
    row.data += i * p.dim;
    row.extent[2] = 1;
    const std::vector<index_t> offset(at(p.batch), p.len_k - p.len_q + i);
    AttentionOptions step{.causal = Causal::bottom_right};
    step.q_offset = offset;
    REQUIRE(fovea::column_sums<F32>(row, p.kv(), {keys.view, far.view, true}, step).ok());
  }
  check_close(keys, wanted.keys);
  check_close(far, wanted.distances);
}

TEST_CASE("column sums: rows without keys, no queries, no keys", "[column_sums]") {
  Problem p;
  p.fill(8);
  const std::vector<index_t> before{-100, -100};
  AttentionOptions unseen{.causal = Causal::bottom_right};
  unseen.q_offset = before;
  check_all(p, unseen, p.len_k);
  Problem no_queries;
  no_queries.len_q = 0;
  no_queries.fill(9);
  check_all(no_queries, {}, 5);
  Problem no_keys;
  no_keys.in_use = {0, 0};
  no_keys.fill(10);
  AttentionOptions none;
  none.len_k = no_keys.in_use;
  check_all(no_keys, none, 5);
}

TEST_CASE("column sums: a query that is no number shows in the keys it sees, not in masked ones", "[column_sums]") {
  Problem p;
  p.batch = 1, p.in_use = {30};
  p.fill(12);
  const index_t h = 1, i = 2;
  p.q[at((h * p.len_q + i) * p.dim)] = kNan;
  const AttentionOptions options{.causal = Causal::top_left, .window = {1, -1}, .len_k = p.in_use};
  Output keys(1, p.q_heads, p.len_k), far(1, p.q_heads, p.len_k);
  REQUIRE(fovea::column_sums<F32>(p.q_view(), p.kv(), {keys.view, far.view}, options).ok());
  for (index_t head = 0; head < p.q_heads; ++head) {
    for (index_t s = 0; s < p.len_k; ++s) {
      INFO("head " << head << ", key or distance " << s);
      CHECK(std::isnan(keys.view(0, head, s)) == (head == h && (s == i - 1 || s == i)));
      CHECK(std::isnan(far.view(0, head, s)) == (head == h && s <= 1));
    }
  }
}

TEST_CASE("column sums: keys of a mixed cache without their exact part are refused", "[column_sums][errors]") {
  Problem p;
  p.fill(13);
  const std::vector<index_t> from{30, 30}, len_k{37, 37};
  fovea::Kv exact = p.kv(), all = p.kv();
  exact.k.data = nullptr;
  all.exact = &exact, all.exact_first = 4, all.exact_from = from;
  Output keys(p.batch, p.q_heads, p.len_k);
  const fovea::Status status = fovea::column_sums<F32>(p.q_view(), all, {keys.view}, {.len_k = len_k});
  CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring("the exact k has null data"));
  for (const float x : keys.values()) CHECK(test::is_canary(x));
}

TEST_CASE("column sums: refused with numbers, outputs untouched", "[column_sums]") {
  Problem p;
  p.fill(11);
  Output keys(p.batch, p.q_heads, p.len_k), short_keys(p.batch, p.q_heads, p.len_k - 1), heads(p.batch, 3, p.len_k);
  const auto refuses = [&](const fovea::ColumnSums& sums, const AttentionOptions& options, const char* words) {
    const fovea::Status status = fovea::column_sums<F32>(p.q_view(), p.kv(), sums, options);
    CHECK_FALSE(status.ok());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
  };
  refuses({short_keys.view}, {}, "keys is [2, 4, 36], must be [2, 4 | 2, at least 37]");
  refuses({heads.view}, {}, "keys is [2, 3, 37]");
  refuses({keys.view, keys.view}, {}, "keys");
  std::vector<float> lse(at(p.batch * p.q_heads * p.len_q));
  AttentionOptions with_lse;
  with_lse.lse = {lse.data(), {p.batch, p.q_heads, p.len_q}, {p.q_heads * p.len_q, p.len_q, 1}};
  refuses({keys.view}, with_lse, "LSE");
  refuses({keys.view}, {.softcap = -1.f}, "softcap -1");
  fovea::View<float, 3> folded = keys.view;
  folded.stride[1] = 0;
  refuses({folded}, {}, "overlaps itself");
  fovea::View<float, 3> inside{p.q.data(), {p.batch, p.kv_heads, p.len_k}, {p.kv_heads * p.len_k, p.len_k, 1}};
  refuses({inside}, {}, "overlaps q");
  AttentionOptions biased;
  biased.bias = {keys.view.data, {1, 1, 1, p.len_k}, {0, 0, 0, 1}};
  refuses({keys.view}, biased, "overlaps bias");
  const fovea::Status other = fovea::column_sums<fovea::Formats<fovea::Format::bf16>>(p.q_view(), p.kv(), {keys.view}, {});
  CHECK(other.code() == fovea::Code::unsupported);
  for (const float x : keys.values()) CHECK(test::is_canary(x));
}
