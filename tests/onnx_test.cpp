// SPDX-License-Identifier: Apache-2.0
// The ONNX front door against the operator's definition in double loops, golden values, identities and refusals; the backend
// node tests of a folder beside the checkout or of FOVEA_ONNX_DIR; and their reader against files that lie.
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "../tools/onnx/onnx_case.hpp"
#include "catch_compat.hpp"
#include "fovea/onnx.hpp"
#include "support/executors.hpp"
#include "support/onnx_message.hpp"
#include "support/onnx_numbers.hpp"
#include "support/random.hpp"
#include "support/temporary_folder.hpp"

namespace {

using namespace test::onnx;
using Catch::Matchers::ContainsSubstring;
using fovea::index_t;
using fovea::OnnxType;
using onnx_tool::Verdict;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kUnit = 0x1p-24;   // half a step of fp32

struct Problem {
  fovea::OnnxAttention a;
  index_t batch = 1, q_heads = 1, kv_heads = 1, len_q = 1, len_k = 1, past = 0, dim = 1, dim_v = 1;
  Numbers q, k, v, mask, past_k, past_v, nonpad;
  Numbers y, present_k, present_v, qk;

  index_t total() const { return past + len_k; }
  fovea::OnnxAttentionInputs inputs() const {
    return {q.in(), k.in(), v.in(), mask.in(), past_k.in(), past_v.in(), nonpad.in()};
  }
  fovea::OnnxAttentionOutputs outputs() { return {y.out(), present_k.out(), present_v.out(), qk.out()}; }
  fovea::Status run(fovea::Executor executor = {}) { return fovea::onnx_attention(a, inputs(), outputs(), executor); }

  // Tensors of zeros: 3-D or 4-D, k and v without the past.
  void make(bool flat, OnnxType type, OnnxType v_type) {
    const auto shape = [&](index_t heads, index_t len, index_t size) {
      return flat ? std::vector<std::int64_t>{batch, len, heads * size} : std::vector<std::int64_t>{batch, heads, len, size};
    };
    a.q_num_heads = flat ? q_heads : 0;
    a.kv_num_heads = flat ? kv_heads : 0;
    q = zeros(type, shape(q_heads, len_q, dim));
    k = zeros(type, shape(kv_heads, len_k, dim));
    v = zeros(v_type, shape(kv_heads, len_k, dim_v));
    y = zeros(type, shape(q_heads, len_q, dim_v));
  }
};

std::size_t place(const Numbers& x, index_t heads, index_t len, index_t dim, index_t b, index_t h, index_t i, index_t d) {
  return static_cast<std::size_t>(x.shape.size() == 3 ? ((b * len + i) * heads + h) * dim + d
                                                      : ((b * heads + h) * len + i) * dim + d);
}

// Key or value j of past and new ones.
double stored(const Problem& p, bool value, index_t b, index_t h, index_t j, index_t d) {
  const Numbers &past = value ? p.past_v : p.past_k, &fresh = value ? p.v : p.k;
  const index_t dim = value ? p.dim_v : p.dim;
  return j < p.past ? past.at(place(past, p.kv_heads, p.past, dim, b, h, j, d))
                    : fresh.at(place(fresh, p.kv_heads, p.len_k, dim, b, h, j - p.past, d));
}

// What is added to a score: -inf where the key is masked.
double added(const Problem& p, index_t b, index_t h, index_t i, index_t j) {
  const index_t used = p.nonpad ? static_cast<index_t>(p.nonpad.integer(static_cast<std::size_t>(b))) : p.total();
  const index_t pos = i + (p.nonpad ? used - p.len_q : p.past);
  if (j >= used || (p.a.is_causal != 0 && j > pos)) return -kInfinity;
  if (p.a.left_window_size >= 0 && j < pos - p.a.left_window_size) return -kInfinity;
  if (p.a.right_window_size >= 0 && j > pos + p.a.right_window_size) return -kInfinity;
  if (!p.mask) return 0;
  std::array<index_t, 4> extent{1, 1, 1, 1};
  std::copy_backward(p.mask.shape.begin(), p.mask.shape.end(), extent.end());
  if (j >= extent[3]) return -kInfinity;
  const auto along = [&](std::size_t axis, index_t at) { return extent[axis] == 1 ? 0 : at; };
  const double x = p.mask.at(
      static_cast<std::size_t>(((along(0, b) * extent[1] + along(1, h)) * extent[2] + along(2, i)) * extent[3] + j));
  if (p.mask.type == OnnxType::boolean) return x != 0 ? 0 : -kInfinity;
  return x;
}

// The definition, one row at a time. scores[mode][j].
struct ExpectedRow {
  std::vector<double> y;
  std::array<std::vector<double>, 4> scores;
  double products = 0, largest = 0;   // of the row: sum of |q k| of a key, |score|
  double largest_v = 0;
};

ExpectedRow expected_row(const Problem& p, index_t b, index_t h, index_t i) {
  ExpectedRow row;
  const double scale = p.a.scale ? double{*p.a.scale} : 1 / std::sqrt(static_cast<double>(p.dim)), cap = double{p.a.softcap};
  const index_t kv_head = h / (p.q_heads / p.kv_heads);
  double max = -kInfinity, sum = 0;
  for (index_t j = 0; j < p.total(); ++j) {
    double dot = 0, products = 0;
    for (index_t d = 0; d < p.dim; ++d) {
      const double product = p.q.at(place(p.q, p.q_heads, p.len_q, p.dim, b, h, i, d)) * stored(p, false, b, kv_head, j, d);
      dot += product;
      products += std::abs(product);
    }
    const double capped = cap > 0 ? cap * std::tanh(scale * dot / cap) : scale * dot, add = added(p, b, h, i, j);
    row.scores[0].push_back(scale * dot);
    row.scores[1].push_back(capped);
    row.scores[2].push_back(add == -kInfinity ? -kInfinity : capped + add);
    max = std::max(max, row.scores[2].back());
    row.products = std::max(row.products, std::abs(scale) * products);
    if (add != -kInfinity) row.largest = std::max({row.largest, std::abs(scale * dot), std::abs(add)});
  }
  for (const double score : row.scores[2]) {
    row.scores[3].push_back(score == -kInfinity ? 0 : std::exp(score - max));
    sum += row.scores[3].back();
  }
  for (double& weight : row.scores[3]) weight = sum == 0 ? 0 : weight / sum;
  for (index_t d = 0; d < p.dim_v; ++d) {
    double y = 0;
    for (index_t j = 0; j < p.total(); ++j) {
      const double weight = row.scores[3][static_cast<std::size_t>(j)];
      if (weight == 0) continue;
      y += weight * stored(p, true, b, kv_head, j, d);
      row.largest_v = std::max(row.largest_v, std::abs(stored(p, true, b, kv_head, j, d)));
    }
    row.y.push_back(y);
  }
  return row;
}

double half_step(OnnxType type, double x) {
  const double relative = type == OnnxType::bf16 ? 0x1p-8 : type == OnnxType::f16 ? 0x1p-11 : kUnit;
  return relative * std::abs(x) + (type == OnnxType::f16 ? 0x1p-25 : 0x1p-140);
}

// Scores are off by the rounding of a dot product and of the steps after it, weights by twice that and the error of exp,
// sums by one rounding per term.
double tolerance(const Problem& p, const ExpectedRow& row, double y) {
  const double score = kUnit * (static_cast<double>(p.dim + 4) * row.products + 8 * row.largest);
  const double weight = 2 * score + kUnit * (16 + 2 * static_cast<double>(p.total()));
  return row.largest_v * weight + half_step(p.y.type, y);
}

// True if everything a call wrote is what the definition says; else the first thing that is not, in `what`.
bool right(const Problem& p, std::string& what) {
  for (index_t b = 0; b < p.batch; ++b) {
    for (index_t h = 0; h < p.q_heads; ++h) {
      for (index_t i = 0; i < p.len_q; ++i) {
        const ExpectedRow row = expected_row(p, b, h, i);
        const auto at = " of row " + std::to_string(b) + "," + std::to_string(h) + "," + std::to_string(i) + ": ";
        for (index_t d = 0; d < p.dim_v; ++d) {
          const double got = p.y.at(place(p.y, p.q_heads, p.len_q, p.dim_v, b, h, i, d)),
                       want = row.y[static_cast<std::size_t>(d)];
          if (std::abs(got - want) <= tolerance(p, row, want)) continue;
          what = "number " + std::to_string(d) + at + std::to_string(got) + ", expected " + std::to_string(want);
          return false;
        }
        for (index_t j = 0; p.qk && j < p.total(); ++j) {
          const double got = p.qk.at(place(p.qk, p.q_heads, p.len_q, p.total(), b, h, i, j));
          const double want = row.scores[static_cast<std::size_t>(p.a.qk_matmul_output_mode)][static_cast<std::size_t>(j)];
          if (got == want || std::abs(got - want) <= half_step(p.qk.type, want) + 1e-12 * (1 + std::abs(want))) continue;
          what = "score " + std::to_string(j) + at + std::to_string(got) + ", expected " + std::to_string(want);
          return false;
        }
      }
    }
  }
  for (const bool value : {false, true}) {
    const Numbers& present = value ? p.present_v : p.present_k;
    const index_t dim = value ? p.dim_v : p.dim;
    for (index_t n = 0; present && n < static_cast<index_t>(present.count()); ++n) {
      const index_t d = n % dim, j = n / dim % p.total(), h = n / dim / p.total() % p.kv_heads,
                    b = n / dim / p.total() / p.kv_heads;
      if (present.at(static_cast<std::size_t>(n)) == stored(p, value, b, h, j, d)) continue;
      what = "element " + std::to_string(n) + " of present_" + (value ? "value" : "key");
      return false;
    }
  }
  return true;
}

Problem random_problem(test::Random& random) {
  Problem p;
  p.batch = random.between(1, 2);
  p.kv_heads = random.between(1, 3);
  p.q_heads = p.kv_heads * random.between(1, 3);
  p.len_q = random.pick({index_t{1}, index_t{2}, index_t{5}, index_t{17}});
  p.len_k = random.pick({index_t{1}, index_t{6}, index_t{15}, index_t{16}, index_t{17}, index_t{33}});
  p.dim = random.pick({index_t{1}, index_t{3}, index_t{8}, index_t{16}, index_t{20}});
  p.dim_v = random.pick({index_t{1}, index_t{7}, index_t{16}});
  const OnnxType type = random.pick({OnnxType::f32, OnnxType::f32, OnnxType::f16, OnnxType::bf16, OnnxType::f64});
  const OnnxType v_type =
      random.one_in(4) ? random.pick({OnnxType::f32, OnnxType::f16, OnnxType::bf16, OnnxType::f64}) : type;
  p.make(random.one_in(2), type, v_type);
  for (Numbers* x : {&p.q, &p.k, &p.v}) *x = normal(x->type, x->shape, random);
  if (random.one_in(3)) {
    p.past = random.pick({index_t{0}, index_t{1}, index_t{12}, index_t{16}});
    p.past_k = normal(type, {p.batch, p.kv_heads, p.past, p.dim}, random);
    p.past_v = normal(v_type, {p.batch, p.kv_heads, p.past, p.dim_v}, random);
  } else if (random.one_in(3)) {
    p.nonpad = made(OnnxType::i64, {p.batch}, [&](std::size_t) { return static_cast<double>(random.between(0, p.len_k)); });
  }
  if (random.one_in(2)) {
    p.present_k = zeros(type, {p.batch, p.kv_heads, p.total(), p.dim});
    p.present_v = zeros(v_type, {p.batch, p.kv_heads, p.total(), p.dim_v});
  }
  if (random.one_in(2)) p.qk = zeros(type, {p.batch, p.q_heads, p.len_q, p.total()});
  p.a.qk_matmul_output_mode = random.between(0, 3);
  p.a.is_causal = random.between(0, 1);
  if (random.one_in(3)) p.a.left_window_size = random.between(0, 9);
  if (random.one_in(3)) p.a.right_window_size = random.between(0, 9);
  if (random.one_in(3)) p.a.softcap = random.uniform(0.5f, 20.f);
  if (random.one_in(3)) p.a.scale = random.uniform(-1.f, 1.f);
  if (random.one_in(3)) p.a.softmax_precision = random.pick({1, 10, 11, 16});
  if (random.one_in(2)) {
    std::vector<std::int64_t> shape{random.one_in(2) ? p.batch : 1, random.one_in(2) ? p.q_heads : 1,
                                    random.one_in(2) ? p.len_q : 1,
                                    random.one_in(4) ? random.between(0, p.total()) : p.total()};
    shape.erase(shape.begin(), shape.begin() + random.between(0, 3));
    const OnnxType of =
        random.pick({OnnxType::boolean, OnnxType::f32, OnnxType::f16, OnnxType::bf16, OnnxType::f64, OnnxType::i64});
    p.mask = made(of, shape, [&](std::size_t) -> double {
      if (of == OnnxType::boolean) return random.one_in(3) ? 0 : 1;
      if (of == OnnxType::i64) return static_cast<double>(random.between(-3, 3));
      return random.one_in(4) ? -kInfinity : static_cast<double>(random.normal());
    });
  }
  return p;
}

}   // namespace

TEST_CASE("ONNX Attention is its definition on random problems", "[onnx]") {
  test::Random random(20);
  for (int n = 0; n < 400; ++n) {
    Problem p = random_problem(random);
    INFO("problem " << n << ": batch " << p.batch << " heads " << p.q_heads << "/" << p.kv_heads << " len " << p.len_q << "/"
                    << p.past << "+" << p.len_k << " dims " << p.dim << "/" << p.dim_v << " type "
                    << static_cast<int>(p.q.type) << " causal " << p.a.is_causal << " mode " << p.a.qk_matmul_output_mode);
    const fovea::Status status = p.run();
    INFO(status.message());
    REQUIRE(status.ok());
    std::string what;
    const bool same = right(p, what);
    INFO(what);
    REQUIRE(same);

    const Numbers serial = p.y;
    test::ThreadPerLane pool;
    REQUIRE(p.run({pool, 3}).ok());
    REQUIRE(p.y.bytes == serial.bytes);
  }
}

TEST_CASE("ONNX opset-25 windows: golden values", "[onnx][golden]") {
  Problem p;
  p.len_q = p.len_k = 5;
  p.make(false, OnnxType::f32, OnnxType::f32);
  p.v = listed(OnnxType::f32, p.v.shape, {0, 1, 2, 3, 4});
  p.a.left_window_size = 1;
  p.a.right_window_size = 2;
  REQUIRE(p.run().ok());
  CHECK(p.y.bytes == listed(OnnxType::f32, p.y.shape, {1, 1.5, 2.5, 3, 3.5}).bytes);
  p.a.is_causal = 1;   // the right side is then closed
  REQUIRE(p.run().ok());
  CHECK(p.y.bytes == listed(OnnxType::f32, p.y.shape, {0, 0.5, 1.5, 2.5, 3.5}).bytes);

  // A side as long as an integer can say is open, in the weights as well: row 4 sees the key 4 alone.
  p.a.is_causal = 0;
  p.a.left_window_size = 0;
  p.a.right_window_size = INT64_MAX;
  p.a.qk_matmul_output_mode = 3;
  p.qk = zeros(OnnxType::f32, {1, 1, 5, 5});
  REQUIRE(p.run().ok());
  CHECK(p.y.bytes == listed(OnnxType::f32, p.y.shape, {2, 2.5, 3, 3.5, 4}).bytes);
  CHECK(p.qk.at(24) == 1.f);
}

// Scores of 0: the mean of the visible positions, by counting.
TEST_CASE("ONNX windows beside masks, past and external caches", "[onnx]") {
  const auto mean = [](index_t from, index_t to, index_t without) {
    double sum = 0, count = 0;
    for (index_t j = from; j <= to; ++j) {
      if (j == without) continue;
      sum += static_cast<double>(j);
      ++count;
    }
    return count == 0 ? 0 : sum / count;
  };
  Problem p;
  p.batch = 2;
  p.q_heads = 4;
  p.len_q = 4;
  p.len_k = 8;
  p.dim = 8;
  p.a.is_causal = 1;
  p.a.left_window_size = 2;
  const bool flat = GENERATE(false, true);
  p.make(flat, OnnxType::f32, OnnxType::f32);
  p.v = made(OnnxType::f32, p.v.shape, [](std::size_t n) { return static_cast<double>(n % 8); });
  const auto check = [&](const auto& position, const auto& without) {
    REQUIRE(p.run().ok());
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 4; ++h) {
        for (index_t i = 0; i < 4; ++i) {
          const index_t pos = position(b, i);
          CHECK(p.y.at(place(p.y, 4, 4, 1, b, h, i, 0)) ==
                Catch::Approx(mean(std::max<index_t>(pos - 2, 0), pos, without(b, h))).margin(1e-6));
        }
      }
    }
  };
  const auto nobody = [](index_t, index_t) { return index_t{-1}; };
  check([](index_t, index_t i) { return i; }, nobody);

  p.nonpad = listed(OnnxType::i64, {2}, {6, 7});
  const auto external = [](index_t b, index_t i) { return i + b + 2; };
  check(external, nobody);
  p.mask = made(OnnxType::f32, {1, 8}, [](std::size_t n) { return n == 1 ? -kInfinity : 0; });
  check(external, [](index_t, index_t) { return index_t{1}; });
  p.mask = made(OnnxType::f16, {8}, [](std::size_t n) { return n == 3 ? -kInfinity : 0; });
  check(external, [](index_t, index_t) { return index_t{3}; });
  p.mask = made(OnnxType::f32, {4, 4, 8}, [](std::size_t n) { return n % 8 == n / 32 ? -kInfinity : 0; });
  check(external, [](index_t, index_t h) { return h; });
  p.mask = made(OnnxType::boolean, {2, 1, 4, 8}, [](std::size_t n) { return n % 8 == n / 32 ? 0 : 1; });
  check(external, [](index_t b, index_t) { return b; });

  p.nonpad = {};
  p.mask = {};
  p.past = 3;
  p.past_k = zeros(OnnxType::f32, {2, 1, 3, 8});
  p.past_v = made(OnnxType::f32, {2, 1, 3, 1}, [](std::size_t n) { return static_cast<double>(n % 3); });
  p.v = made(OnnxType::f32, p.v.shape, [](std::size_t n) { return static_cast<double>(n % 8 + 3); });
  check([](index_t, index_t i) { return i + 3; }, nobody);
}

TEST_CASE("ONNX Attention: rows without keys, hidden NaN, the lowest mask, later tokens", "[onnx]") {
  test::Random random(21);
  Problem p;
  p.batch = 1;
  p.q_heads = p.kv_heads = 2;
  p.len_q = 3;
  p.len_k = 7;
  p.dim = p.dim_v = 8;
  p.make(false, OnnxType::f32, OnnxType::f32);
  for (Numbers* x : {&p.q, &p.k, &p.v}) *x = normal(x->type, x->shape, random);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::string what;

  SECTION("an external cache shorter than the queries leaves the first rows empty") {
    p.nonpad = listed(OnnxType::i64, {1}, {1});
    p.a.is_causal = 1;
    p.a.qk_matmul_output_mode = 3;
    p.qk = zeros(OnnxType::f32, {1, 2, 3, 7});
    REQUIRE(p.run().ok());
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < 3; ++i) {
        CHECK(p.qk.at(place(p.qk, 2, 3, 7, 0, h, i, 0)) == (i == 2 ? 1 : 0));
        for (index_t d = 0; d < 8; ++d)
          CHECK(p.y.at(place(p.y, 2, 3, 8, 0, h, i, d)) == (i == 2 ? p.v.at(place(p.v, 2, 7, 8, 0, h, 0, d)) : 0));
      }
    }
  }
  SECTION("what lies behind the keys in use, or behind a short mask, is not read") {
    for (std::size_t n = 0; n < p.v.count(); ++n) {
      if (n / 8 % 7 >= 4) {
        p.v.put(n, nan);
        p.k.put(n, nan);
      }
    }
    const bool short_mask = GENERATE(false, true);
    if (short_mask) {
      p.mask = made(OnnxType::boolean, {4}, [](std::size_t) { return 1; });
    } else {
      p.nonpad = listed(OnnxType::i64, {1}, {4});
    }
    REQUIRE(p.run().ok());
    CHECK(right(p, what));
    for (std::size_t n = 0; n < p.y.count(); ++n) CHECK(std::isfinite(p.y.at(n)));
  }
  SECTION("a mask of the lowest double, beyond every float, is a mean and no empty row") {
    p.mask = made(OnnxType::f64, {3, 7}, [](std::size_t n) { return n < 7 ? -std::numeric_limits<double>::max() : 0.; });
    p.a.scale = 0.f;
    REQUIRE(p.run().ok());
    double sum = 0;
    for (index_t j = 0; j < 7; ++j) sum += p.v.at(place(p.v, 2, 7, 8, 0, 0, j, 0));
    CHECK(p.y.at(0) == Catch::Approx(sum / 7).margin(1e-6));
  }
  SECTION("later tokens do not change an earlier row by a bit") {
    p.past = 4;
    p.len_k = 3;
    p.make(false, OnnxType::f32, OnnxType::f32);
    for (Numbers* x : {&p.q, &p.k, &p.v}) *x = normal(x->type, x->shape, random);
    p.past_k = normal(OnnxType::f32, {1, 2, 4, 8}, random);
    p.past_v = normal(OnnxType::f32, {1, 2, 4, 8}, random);
    p.a.is_causal = 1;
    REQUIRE(p.run().ok());
    CHECK(right(p, what));
    const Numbers before = p.y;
    for (index_t h = 0; h < 2; ++h) {
      for (index_t d = 0; d < 8; ++d) {
        p.k.put(place(p.k, 2, 3, 8, 0, h, 2, d), nan);
        p.v.put(place(p.v, 2, 3, 8, 0, h, 2, d), nan);
      }
    }
    REQUIRE(p.run().ok());
    for (index_t h = 0; h < 2; ++h) {
      const auto first = place(p.y, 2, 3, 8, 0, h, 0, 0) * 4;
      CHECK(std::memcmp(p.y.bytes.data() + first, before.bytes.data() + first, 2 * 8 * 4) == 0);
      CHECK(std::isnan(p.y.at(place(p.y, 2, 3, 8, 0, h, 2, 0))));
    }
  }
  SECTION("scores rising and falling to +-1e4") {
    const double sign = GENERATE(1., -1.);
    p.mask = made(OnnxType::f32, {7}, [&](std::size_t n) { return sign * (static_cast<double>(n) - 3) * 1e4 / 3; });
    REQUIRE(p.run().ok());
    CHECK(right(p, what));
  }
  SECTION("no new keys, no queries") {
    p.past = 7;
    p.past_k = p.k;
    p.past_v = p.v;
    p.len_k = 0;
    p.make(false, OnnxType::f32, OnnxType::f32);
    p.q = normal(OnnxType::f32, p.q.shape, random);
    p.present_k = zeros(OnnxType::f32, {1, 2, 7, 8});
    p.present_v = zeros(OnnxType::f32, {1, 2, 7, 8});
    REQUIRE(p.run().ok());
    CHECK(right(p, what));
    p.len_q = 0;
    p.make(false, OnnxType::f32, OnnxType::f32);
    std::fill(p.present_k.bytes.begin(), p.present_k.bytes.end(), std::byte{0});
    REQUIRE(p.run().ok());
    CHECK(p.present_k.bytes == p.past_k.bytes);
  }
  INFO(what);
}

TEST_CASE("ONNX Attention in 3-D is the 4-D one", "[onnx]") {
  test::Random random(22);
  Problem p;
  p.batch = 2;
  p.q_heads = 4;
  p.kv_heads = 2;
  p.len_q = 3;
  p.len_k = 17;
  p.dim = 8;
  p.dim_v = 5;
  p.make(false, OnnxType::f32, OnnxType::f32);
  for (Numbers* x : {&p.q, &p.k, &p.v}) *x = normal(x->type, x->shape, random);
  Problem flat = p;
  flat.make(true, OnnxType::f32, OnnxType::f32);
  const auto turn = [&](const Numbers& from, Numbers& to, index_t heads, index_t len, index_t dim) {
    for (index_t n = 0; n < static_cast<index_t>(from.count()); ++n) {
      const index_t d = n % dim, i = n / dim % len, h = n / dim / len % heads, b = n / dim / len / heads;
      to.put(place(to, heads, len, dim, b, h, i, d), from.at(static_cast<std::size_t>(n)));
    }
  };
  turn(p.q, flat.q, 4, 3, 8);
  turn(p.k, flat.k, 2, 17, 8);
  turn(p.v, flat.v, 2, 17, 5);
  REQUIRE(p.run().ok());
  REQUIRE(flat.run().ok());
  Numbers turned = zeros(OnnxType::f32, flat.y.shape);
  turn(p.y, turned, 4, 3, 5);
  CHECK(turned.bytes == flat.y.bytes);
}

TEST_CASE("ONNX Attention refuses with the numbers, and writes nothing", "[onnx][errors]") {
  Problem p;
  p.batch = 2;
  p.q_heads = 4;
  p.kv_heads = 2;
  p.len_q = 3;
  p.len_k = 6;
  p.dim = p.dim_v = 8;
  p.make(false, OnnxType::f32, OnnxType::f32);
  p.present_k = zeros(OnnxType::f32, {2, 2, 6, 8});
  p.present_v = zeros(OnnxType::f32, {2, 2, 6, 8});
  p.qk = zeros(OnnxType::f32, {2, 4, 3, 6});
  REQUIRE(p.run().ok());

  std::string words;
  const auto spoil = [&](const char* expected, const auto& change) {
    Problem bad = p;
    change(bad);
    for (Numbers* x : {&bad.y, &bad.present_k, &bad.present_v, &bad.qk})
      std::fill(x->bytes.begin(), x->bytes.end(), std::byte{0x5a});
    const fovea::Status status = bad.run();
    CHECK_FALSE(status.ok());
    CHECK_THAT(std::string(status.message()), ContainsSubstring(expected));
    for (const Numbers* x : {&bad.y, &bad.present_k, &bad.present_v, &bad.qk})
      CHECK(std::count(x->bytes.begin(), x->bytes.end(), std::byte{0x5a}) == static_cast<std::ptrdiff_t>(x->bytes.size()));
  };
  spoil("V is required", [](Problem& b) { b.v = {}; });
  spoil("Y is required", [](Problem& b) { b.y = {}; });
  spoil("K has element type 10, must be 1", [](Problem& b) { b.k = zeros(OnnxType::f16, b.k.shape); });
  spoil("Q has element type 7", [](Problem& b) { b.q = zeros(OnnxType::i64, b.q.shape); });
  spoil("element type 8, no type of whole bytes", [](Problem& b) { b.mask = {static_cast<OnnxType>(8), {6}, {}}; });
  spoil("ranks 4, 3 and 4", [](Problem& b) { b.k = zeros(OnnxType::f32, {2, 6, 16}); });
  spoil("Q has 4 heads, the attribute says 3", [](Problem& b) { b.a.q_num_heads = 3; });
  spoil("batches differ: Q 2, K 1, V 2", [](Problem& b) { b.k = zeros(OnnxType::f32, {1, 2, 6, 8}); });
  spoil("K has 2 heads of 5 keys, V 2 of 6", [](Problem& b) { b.k = zeros(OnnxType::f32, {2, 2, 5, 8}); });
  spoil("head size 8, K 7", [](Problem& b) { b.k = zeros(OnnxType::f32, {2, 2, 6, 7}); });
  spoil("kv heads (3) do not divide q heads (4)", [](Problem& b) {
    b.k = b.v = zeros(OnnxType::f32, {2, 3, 6, 8});
    b.present_k = b.present_v = zeros(OnnxType::f32, {2, 3, 6, 8});
  });
  spoil("past_key without the other", [](Problem& b) { b.past_k = zeros(OnnxType::f32, {2, 2, 1, 8}); });
  spoil("past_value has 2 on axis 2, must be 1", [](Problem& b) {
    b.past_k = zeros(OnnxType::f32, {2, 2, 1, 8});
    b.past_v = zeros(OnnxType::f32, {2, 2, 2, 8});
  });
  spoil("present_key has 6 on axis 2, must be 7", [](Problem& b) {
    b.past_k = zeros(OnnxType::f32, {2, 2, 1, 8});
    b.past_v = zeros(OnnxType::f32, {2, 2, 1, 8});
  });
  spoil("present_key without the other", [](Problem& b) { b.present_v = {}; });
  spoil("Y has 4 on axis 2, must be 3", [](Problem& b) { b.y = zeros(OnnxType::f32, {2, 4, 4, 8}); });
  spoil("qk_matmul_output has 5 on axis 3, must be 6", [](Problem& b) { b.qk = zeros(OnnxType::f32, {2, 4, 3, 5}); });
  spoil("qk_matmul_output_mode is 4", [](Problem& b) { b.a.qk_matmul_output_mode = 4; });
  spoil("softmax_precision is 9", [](Problem& b) { b.a.softmax_precision = 9; });
  spoil("is_causal is 2", [](Problem& b) { b.a.is_causal = 2; });
  spoil("softcap -1", [](Problem& b) { b.a.softcap = -1; });
  spoil("opset 23, this is 22", [](Problem& b) { b.a.opset = 22; });
  spoil("windows -2 and -1", [](Problem& b) { b.a.left_window_size = -2; });
  spoil("since opset 25; this is 24", [](Problem& b) {
    b.a.left_window_size = 2;
    b.a.opset = 24;
  });
  spoil("attn_mask is for 7 keys, there are 6", [](Problem& b) { b.mask = zeros(OnnxType::boolean, {7}); });
  spoil("attn_mask has 2 where [batch, head, pos] has 3", [](Problem& b) { b.mask = zeros(OnnxType::boolean, {2, 6}); });
  spoil("attn_mask has rank 5", [](Problem& b) { b.mask = zeros(OnnxType::boolean, {1, 1, 1, 1, 6}); });
  spoil("attn_mask has element type 14", [](Problem& b) { b.mask = zeros(OnnxType::c64, {6}); });
  spoil("nonpad_kv_seqlen needs opset 24, this is 23", [](Problem& b) {
    b.nonpad = zeros(OnnxType::i64, {2});
    b.a.opset = 23;
  });
  spoil("nonpad_kv_seqlen has element type 1, must be 7", [](Problem& b) { b.nonpad = zeros(OnnxType::f32, {2}); });
  spoil("nonpad_kv_seqlen[1] = 7 is outside 0 .. 6", [](Problem& b) { b.nonpad = listed(OnnxType::i64, {2}, {6, 7}); });
  spoil("exclude each other", [](Problem& b) {
    b.nonpad = zeros(OnnxType::i64, {2});
    b.past_k = b.past_v = zeros(OnnxType::f32, {2, 2, 0, 8});
  });
  spoil("Q has extent -2", [](Problem& b) { b.q.shape[0] = -2; });
  spoil("the extents of K reach beyond", [](Problem& b) { b.k.shape[0] = b.k.shape[1] = std::int64_t{1} << 40; });
  spoil("dims up to 576", [](Problem& b) {
    b.q = zeros(OnnxType::f32, {2, 4, 3, 577});
    b.k = zeros(OnnxType::f32, {2, 2, 6, 577});
    b.present_k = zeros(OnnxType::f32, {2, 2, 6, 577});
  });

  fovea::OnnxAttentionOutputs outputs = p.outputs();
  outputs.present_value.data = p.v.bytes.data();
  const fovea::Status status = fovea::onnx_attention(p.a, p.inputs(), outputs);
  CHECK_THAT(std::string(status.message()), ContainsSubstring("present_value") && ContainsSubstring("overlaps V"));

  const fovea::Status formats = fovea::onnx_attention<fovea::Formats<fovea::Format::f16>>(p.a, p.inputs(), p.outputs());
  CHECK(formats.code() == fovea::Code::unsupported);
  CHECK_THAT(std::string(formats.message()), ContainsSubstring("without kernels for K in f32"));
}

TEST_CASE("ONNX FlexAttention: modifiers against the definition", "[onnx]") {
  using Step = fovea::OnnxModifier::Kind;
  test::Random random(23);
  Problem p;
  p.batch = 2;
  p.q_heads = 4;
  p.kv_heads = 2;
  p.len_q = GENERATE(1, 5, 17);
  p.len_k = 19;
  p.dim = 8;
  p.dim_v = 6;
  p.make(false, OnnxType::f32, OnnxType::f32);
  for (Numbers* x : {&p.q, &p.k, &p.v}) *x = normal(x->type, x->shape, random);
  const auto run = [&](const std::vector<fovea::OnnxModifier>& steps, float prob_scale = 1.f) {
    return fovea::onnx_flex_attention({.score_mod = steps, .prob_scale = prob_scale}, {p.q.in(), p.k.in(), p.v.in()},
                                      p.y.out());
  };

  const std::vector<std::vector<fovea::OnnxModifier>> chains = {
      {},
      {{Step::add, 0.5f}},
      {{Step::multiply, -0.7f}},
      {{Step::soft_cap, 1.5f}},
      {{Step::causal_mask, 0.f}},
      {{Step::relative_positional, 0.25f}},
      {{Step::soft_cap, 2.f}, {Step::relative_positional, -1.f}, {Step::causal_mask, 0.f}},
      {{Step::causal_mask, 0.f}, {Step::multiply, 2.f}},
  };
  for (const auto& steps : chains) {
    REQUIRE(run(steps, 0.5f).ok());
    for (index_t row = 0; row < p.batch * p.q_heads * p.len_q; ++row) {
      const index_t i = row % p.len_q, h = row / p.len_q % p.q_heads, b = row / p.len_q / p.q_heads;
      ExpectedRow plain = expected_row(p, b, h, i);
      std::vector<double> weights;
      double max = -kInfinity, sum = 0, growth = 1;
      for (index_t j = 0; j < p.len_k; ++j) {
        double s = plain.scores[0][static_cast<std::size_t>(j)];
        for (const auto& [kind, value] : steps) {
          const double x = double{value};
          if (kind == Step::add) s += x;
          if (kind == Step::multiply) s *= x;
          if (kind == Step::soft_cap) s = x * std::tanh(s / x);
          if (kind == Step::causal_mask && j > i) s = -kInfinity;
          if (kind == Step::relative_positional) s += x * static_cast<double>(i - j);
          if (kind == Step::multiply) growth = std::max(growth, std::abs(x));
          if (std::isfinite(s)) plain.largest = std::max(plain.largest, std::abs(s));
        }
        weights.push_back(s);
        max = std::max(max, s);
      }
      for (double& weight : weights) sum += weight = std::exp(weight - max);
      plain.products *= growth;
      for (index_t d = 0; d < p.dim_v; ++d) {
        double y = 0;
        for (index_t j = 0; j < p.len_k; ++j)
          y += weights[static_cast<std::size_t>(j)] / sum * stored(p, true, b, h / 2, j, d);
        REQUIRE(std::abs(p.y.at(place(p.y, 4, p.len_q, 6, b, h, i, d)) - 0.5 * y) <= tolerance(p, plain, y));
      }
    }
  }

  // The mask of Attention, bit for bit; a constant added to every score changes nothing that counts.
  REQUIRE(run({{Step::causal_mask, 0.f}}).ok());
  const Numbers masked = p.y;
  p.a.is_causal = 1;
  REQUIRE(p.run().ok());
  CHECK(p.y.bytes == masked.bytes);

  CHECK_THAT(std::string(run({{Step::soft_cap, 0.f}}).message()), ContainsSubstring("score_mod[0] has value 0"));
  CHECK_THAT(std::string(run({{Step::add, HUGE_VALF}}).message()), ContainsSubstring("must be finite"));
  CHECK_THAT(std::string(run({}, HUGE_VALF).message()), ContainsSubstring("prob_scale"));
}

TEST_CASE("ONNX RotaryEmbedding: golden values, layouts, places", "[onnx][golden]") {
  const double c1 = std::cos(1.), s1 = std::sin(1.), c2 = std::cos(0.01), s2 = std::sin(0.01);
  Numbers x = listed(OnnxType::f32, {1, 1, 1, 4}, {1, 2, 3, 4}), y = zeros(OnnxType::f32, {1, 1, 1, 4});
  const Numbers cos = listed(OnnxType::f32, {2, 2}, {1, 1, c1, c2}), sin = listed(OnnxType::f32, {2, 2}, {0, 0, s1, s2});
  const Numbers ids = listed(OnnxType::i64, {1, 1}, {1});
  const auto run = [&](const fovea::OnnxRotaryEmbedding& a) {
    return fovea::onnx_rotary_embedding(a, {x.in(), cos.in(), sin.in(), ids.in()}, y.out());
  };
  const auto check = [&](std::initializer_list<double> values) {
    for (std::size_t n = 0; n < 4; ++n) CHECK(y.at(n) == Catch::Approx(values.begin()[n]).epsilon(1e-6));
  };
  REQUIRE(run({}).ok());
  check({-1.9841106, 1.9599007, 2.4623779, 4.0197997});
  REQUIRE(run({.interleaved = 1}).ok());
  check({-1.1426397, 1.9220756, 2.9598507, 4.0297995});

  // In place, in 3-D, and with the cosines of each token instead of positions.
  Numbers flat = x;
  flat.shape = {1, 1, 4};
  const Numbers near_cos = listed(OnnxType::f32, {1, 1, 2}, {c1, c2}), near_sin = listed(OnnxType::f32, {1, 1, 2}, {s1, s2});
  REQUIRE(fovea::onnx_rotary_embedding({.interleaved = 1, .num_heads = 1}, {flat.in(), near_cos.in(), near_sin.in(), {}},
                                       flat.out())
              .ok());
  CHECK(flat.bytes == y.bytes);

  // A half that does not turn is copied.
  const Numbers cos_1 = listed(OnnxType::f32, {1, 1}, {c1}), sin_1 = listed(OnnxType::f32, {1, 1}, {s1});
  const Numbers id_0 = zeros(OnnxType::i64, {1, 1});
  Numbers half = zeros(OnnxType::f32, x.shape);
  REQUIRE(fovea::onnx_rotary_embedding({.rotary_embedding_dim = 2}, {x.in(), cos_1.in(), sin_1.in(), id_0.in()}, half.out())
              .ok());
  CHECK(half.at(0) == Catch::Approx(c1 - 2 * s1).epsilon(1e-6));
  CHECK(half.at(1) == Catch::Approx(s1 + 2 * c1).epsilon(1e-6));
  CHECK((half.at(2) == 3 && half.at(3) == 4));

  for (const OnnxType type : {OnnxType::f16, OnnxType::bf16}) {
    const auto as = [&](const Numbers& from) { return made(type, from.shape, [&](std::size_t n) { return from.at(n); }); };
    const Numbers few_x = as(x), few_cos = as(cos), few_sin = as(sin);
    Numbers few_y = zeros(type, x.shape);
    REQUIRE(fovea::onnx_rotary_embedding({}, {few_x.in(), few_cos.in(), few_sin.in(), ids.in()}, few_y.out()).ok());
    for (std::size_t pair = 0; pair < 2; ++pair) {
      const double want = few_cos.at(2 + pair) * few_x.at(pair) - few_sin.at(2 + pair) * few_x.at(pair + 2);
      CHECK(std::abs(few_y.at(pair) - want) <= half_step(type, want) + 1e-6);
    }
  }

  const auto refuse = [&](const char* words, const fovea::Status& status) {
    CHECK_THAT(std::string(status.message()), ContainsSubstring(words));
  };
  const Numbers before = y;
  const Numbers far = listed(OnnxType::i64, {1, 1}, {2});
  refuse("position_ids has 2 at token 0, the caches hold 2",
         fovea::onnx_rotary_embedding({}, {x.in(), cos.in(), sin.in(), far.in()}, y.out()));
  refuse("3 of the 4 numbers", run({.rotary_embedding_dim = 3}));
  refuse("cos_cache has 2 on axis 1, must be 1", run({.rotary_embedding_dim = 2}));
  refuse("cos_cache has rank 2, must be 3", fovea::onnx_rotary_embedding({}, {x.in(), cos.in(), sin.in(), {}}, y.out()));
  refuse("interleaved is 2", run({.interleaved = 2}));
  refuse("cannot be cut into 0 heads",
         fovea::onnx_rotary_embedding({}, {flat.in(), near_cos.in(), near_sin.in(), {}}, flat.out()));
  CHECK(y.bytes == before.bytes);
}

TEST_CASE("ONNX TensorScatter: straight, around the end, in place", "[onnx]") {
  // [batch 2, pos 5, dim 2] in 3-D: the axis -2 is 1.
  const Numbers cache = zeros(OnnxType::i16, {2, 5, 2});
  Numbers past = zeros(OnnxType::i64, {2, 5, 2}), present = past;
  for (std::size_t n = 0; n < past.count(); ++n) past.put(n, static_cast<double>(n));
  const Numbers update = made(OnnxType::i64, {2, 3, 2}, [](std::size_t n) { return static_cast<double>(100 + n); });
  const Numbers indices = listed(OnnxType::i64, {2}, {2, 9});
  const auto run = [&](const fovea::OnnxTensorScatter& a, const fovea::OnnxTensor& where) {
    return fovea::onnx_tensor_scatter(a, {past.in(), update.in(), where}, present.out());
  };
  const auto want = [&](std::size_t b, std::size_t pos, std::size_t d, index_t first) {
    const index_t s = (static_cast<index_t>(pos) - first % 5 + 5) % 5;
    return s < 3 ? update.integer((b * 3 + static_cast<std::size_t>(s)) * 2 + d) : past.integer((b * 5 + pos) * 2 + d);
  };
  REQUIRE(run({.mode = fovea::OnnxScatterMode::circular}, indices.in()).ok());
  for (std::size_t n = 0; n < 20; ++n) CHECK(present.integer(n) == want(n / 10, n / 2 % 5, n % 2, n < 10 ? 2 : 9));

  Numbers inside = past;
  REQUIRE(fovea::onnx_tensor_scatter({.axis = 1, .mode = fovea::OnnxScatterMode::circular},
                                     {inside.in(), update.in(), indices.in()}, inside.out())
              .ok());
  CHECK(inside.bytes == present.bytes);

  REQUIRE(run({}, {}).ok());
  for (std::size_t n = 0; n < 20; ++n) CHECK(present.integer(n) == want(n / 10, n / 2 % 5, n % 2, 0));

  const Numbers before = present;
  const auto refuse = [&](const char* words, const fovea::Status& status) {
    CHECK_THAT(std::string(status.message()), ContainsSubstring(words));
  };
  refuse("write_indices[1] = 9, 3 positions of 5", run({}, indices.in()));
  refuse("write_indices[0] = -1", run({.mode = fovea::OnnxScatterMode::circular}, listed(OnnxType::i64, {2}, {-1, 0}).in()));
  refuse("axis 0 of a cache of rank 3", run({.axis = 0}, {}));
  refuse("axis -3 of a cache of rank 3", run({.axis = -3}, {}));
  refuse("axis 1: the cache has 5, update 3", run({.axis = 2}, {}));
  refuse("update has element type 7, must be 5",
         fovea::onnx_tensor_scatter({}, {cache.in(), update.in(), {}}, present.out()));
  CHECK(present.bytes == before.bytes);
}

TEST_CASE("ONNX backend node tests of a folder", "[onnx]") {
  const char* const named = std::getenv("FOVEA_ONNX_DIR");
  const std::filesystem::path folder =
      named != nullptr ? std::filesystem::path(named) : std::filesystem::path(FOVEA_SOURCE_DIR) / "../shared/onnx";
  if (!std::filesystem::is_directory(folder)) {
    REQUIRE(named == nullptr);
    WARN("no folder of backend node tests beside the checkout and none named by FOVEA_ONNX_DIR");
    return;
  }
  const auto begins = [](const std::string& name, std::initializer_list<const char*> prefixes) {
    return std::any_of(prefixes.begin(), prefixes.end(), [&](const char* prefix) { return name.starts_with(prefix); });
  };
  int passed = 0;
  for (const auto& directory : onnx_tool::folders(folder, "test_")) {
    const std::string name = directory.filename().string();
    const onnx_tool::Outcome outcome = onnx_tool::run_case(directory);
    INFO(name << ": " << outcome.reason);
    CHECK(outcome.verdict != Verdict::failed);
    // An expanded case is the operator written out in others, so none of ours.
    const bool ours = begins(name, {"test_attention", "test_rotary_embedding", "test_flexattention", "test_tensorscatter",
                                    "test_linear_attention", "test_causal_conv"});
    if (ours && !name.ends_with("_expanded")) CHECK(outcome.verdict == Verdict::passed);
    passed += outcome.verdict == Verdict::passed;
  }
  CHECK(passed > 0);
}

namespace {

onnx_tool::Outcome run_files(const std::string& model, const std::vector<std::string>& inputs,
                             const std::vector<std::string>& outputs) {
  onnx_tool::Ready ready;
  if (onnx_tool::Outcome outcome = onnx_tool::prepare(view(model), ready); outcome.verdict != Verdict::passed)
    return outcome;
  std::vector<onnx_tool::Bytes> in, out;
  for (const std::string& file : inputs) in.push_back(view(file));
  for (const std::string& file : outputs) out.push_back(view(file));
  return onnx_tool::run_data(ready, in, out);
}

struct Files {
  std::string model;
  std::vector<std::string> inputs, outputs;

  onnx_tool::Outcome run() const { return run_files(model, inputs, outputs); }
};

Files window_files() {
  const std::vector<std::int64_t> shape{1, 1, 5, 1};
  Files files;
  files.model = model_file(graph_of({node_of("Attention", {"Q", "K", "V"}, {"Y"},
                                             {attribute("left_window_size", 1), attribute("right_window_size", 2)})},
                                    {"Q", "K", "V"}, {"Y"}),
                           25);
  files.inputs = {tensor_file("Q", zeros(OnnxType::f32, shape)), tensor_file("K", zeros(OnnxType::f32, shape)),
                  tensor_file("V", listed(OnnxType::f32, shape, {0, 1, 2, 3, 4}))};
  files.outputs = {tensor_file("Y", listed(OnnxType::f32, shape, {1, 1.5, 2.5, 3, 3.5}))};
  return files;
}

// What was written to a stream that ends with this.
struct Printed {
  std::vector<std::string> lines;
  int status;
};

// A folder of cases on disk, gone with its owner.
struct Folder {
  test::TemporaryFolder owned;
  std::filesystem::path path = owned.path();

  void write(const std::string& name, const Files& files) const {
    const std::filesystem::path data = path / name / "test_data_set_0";
    std::filesystem::create_directories(data);
    const auto put = [](const std::filesystem::path& to, const std::string& bytes) {
      std::ofstream(to, std::ios::binary) << bytes;
    };
    put(path / name / "model.onnx", files.model);
    for (std::size_t n = 0; n < files.inputs.size(); ++n) put(data / ("input_" + std::to_string(n) + ".pb"), files.inputs[n]);
    for (std::size_t n = 0; n < files.outputs.size(); ++n) put(data / ("output_" + std::to_string(n) + ".pb"), files.outputs[n]);
  }
  Printed run(const std::string& name) const {
    std::FILE* const stream = std::tmpfile();
    REQUIRE(stream != nullptr);
    Printed printed{{}, onnx_tool::run_folder(path / name, stream, stream)};
    std::rewind(stream);
    std::string line;
    for (int c = std::fgetc(stream); c != EOF; c = std::fgetc(stream)) {
      if (c != '\n') {
        line += static_cast<char>(c);
      } else {
        printed.lines.push_back(line);
        line.clear();
      }
    }
    CHECK(line.empty());
    std::fclose(stream);
    return printed;
  }
};

}   // namespace

TEST_CASE("ONNX files: a case written, read and run", "[onnx][files]") {
  const Files files = window_files();
  const onnx_tool::Outcome outcome = files.run();
  INFO(outcome.reason);
  REQUIRE(outcome.verdict == Verdict::passed);

  Files wrong = files;
  wrong.outputs[0] = tensor_file("Y", listed(OnnxType::f32, {1, 1, 5, 1}, {1, 1.5, 2.5, 3.01, 3.5}));
  CHECK(wrong.run().verdict == Verdict::failed);
  CHECK_THAT(wrong.run().reason, ContainsSubstring("output Y differs at element 3: 3, expected 3.0"));
  wrong.outputs[0] = tensor_file("Y", listed(OnnxType::f32, {1, 1, 1, 5}, {1, 1.5, 2.5, 3, 3.5}));
  CHECK_THAT(wrong.run().reason, ContainsSubstring("Y has 1 on axis 2, must be 5"));
  wrong = files;
  wrong.inputs.pop_back();
  CHECK_THAT(wrong.run().reason, ContainsSubstring("2 input and 1 output files, the graph has 3 and 1"));

  const auto verdict_of = [&](const Message& node, std::int64_t opset, const char* reason) {
    Files other = files;
    other.model = model_file(graph_of({node}, {"Q", "K", "V"}, {"Y"}), opset);
    CHECK_THAT(other.run().reason, ContainsSubstring(reason));
    return other.run().verdict;
  };
  CHECK(verdict_of(node_of("Attention", {"Q", "K", "V"}, {"Y"}, {attribute("right_window_size", 1)}), 24,
                   "since opset 25") == Verdict::failed);
  CHECK(verdict_of(node_of("Attention", {"Q", "K", "V"}, {"Y"}, {attribute("sinks", 1)}), 25,
                   "attribute sinks of Attention") == Verdict::unsupported);
  CHECK(verdict_of(node_of("Softmax", {"Q"}, {"Y"}), 25, "operator Softmax") == Verdict::unsupported);
  CHECK(verdict_of(node_of("LinearAttention", {"Q", "K", "V"}, {"Y"}, {attribute_text("update_rule", "erase")}), 27,
                   "update_rule erase of LinearAttention") == Verdict::unsupported);
  CHECK(verdict_of(node_of("LinearAttention", {"Q", "K", "V", "", "", "", "Q"}, {"Y"}), 27, "input Q of LinearAttention") ==
        Verdict::unsupported);
  for (const char* const op : {"Attention", "RotaryEmbedding", "TensorScatter", "CausalConvWithState"}) {
    const std::string reason = std::string("input Q of ") + op;
    CHECK(verdict_of(node_of(op, {"Q", "K", "V", "", "", "", "", "Q"}, {"Y"}), 25, reason.c_str()) == Verdict::unsupported);
  }
  CHECK(verdict_of(node_of("CausalConvWithState", {"Q", "K"}, {"Y"}, {attribute_text("activation", "relu")}), 27,
                   "activation relu of CausalConvWithState") == Verdict::unsupported);
  CHECK(verdict_of(node_of("Attention", {"Q", "K", "V"}, {"Y"}, {}, "com.microsoft"), 25,
                   "operator com.microsoft.Attention") == Verdict::unsupported);
  CHECK(verdict_of(node_of("Attention", {"Q", "K", "W"}, {"Y"}), 25, "input W that is no input") == Verdict::unsupported);

  Files expanded = files;
  expanded.model =
      model_file(graph_of(std::vector<Message>(100, node_of("Add", {"Q", "K"}, {"Y"})), {"Q", "K", "V"}, {"Y"}), 25);
  CHECK(expanded.run().verdict == Verdict::unsupported);
  CHECK(expanded.run().reason == "a graph of 100 nodes");
}

TEST_CASE("ONNX files: a folder's last line and exit status", "[onnx][files]") {
  const Folder folder;
  const Files good = window_files();
  Files spoiled = good, foreign = good;
  spoiled.outputs[0] = tensor_file("Y", listed(OnnxType::f32, {1, 1, 5, 1}, {1, 1.5, 2.5, 3.01, 3.5}));
  foreign.model = model_file(graph_of({node_of("Softmax", {"Q"}, {"Y"})}, {"Q", "K", "V"}, {"Y"}), 25);
  folder.write("a_good", good);
  folder.write("b_spoiled", spoiled);
  folder.write("c_foreign", foreign);

  const Printed all = folder.run("");
  REQUIRE(all.lines.size() == 4);
  CHECK(all.lines[0] == "passed       a_good  (largest error 0.0e+00)");
  CHECK_THAT(all.lines[1], ContainsSubstring("failed       b_spoiled: output Y differs at element 3: 3, expected 3.0"));
  CHECK(all.lines[2] == "unsupported  c_foreign: operator Softmax");
  CHECK(all.lines[3] == "1 passed, 1 failed, 1 unsupported");
  CHECK(all.status == 1);

  // A folder that is a case, with a slash behind it or without; a case without data does not pass.
  for (const char* const name : {"b_spoiled", "b_spoiled/"}) {
    CHECK(folder.run(name).lines.back() == "0 passed, 1 failed, 0 unsupported");
    CHECK(folder.run(name).status == 1);
  }
  // A file may claim any size without holding it.
  std::filesystem::resize_file(folder.path / "b_spoiled" / "test_data_set_0" / "input_0.pb", std::uintmax_t{3} << 30);
  CHECK_THAT(folder.run("b_spoiled").lines[0], ContainsSubstring("input_0.pb is too large"));
  std::filesystem::remove_all(folder.path / "b_spoiled" / "test_data_set_0");
  CHECK_THAT(folder.run("b_spoiled").lines[0], ContainsSubstring("no test_data_set_<n>"));
  CHECK(folder.run("b_spoiled").status == 1);

  std::filesystem::remove_all(folder.path / "b_spoiled");
  CHECK(folder.run("").lines.back() == "1 passed, 0 failed, 1 unsupported");
  CHECK(folder.run("").status == 0);

  for (const char* const name : {"a_good", "c_foreign"}) std::filesystem::remove_all(folder.path / name);
  for (const char* const name : {"", "nowhere"}) {
    const Printed none = folder.run(name);
    CHECK(none.status == 2);
    REQUIRE(none.lines.size() == 1);
    CHECK_THAT(none.lines[0], ContainsSubstring("is no folder of cases"));
  }
}

TEST_CASE("ONNX files: score_mod graphs are read by meaning", "[onnx][files]") {
  const auto number = [](const char* name, float x) { return tensor_file(name, listed(OnnxType::f32, {}, {double{x}})); };
  const auto integers = [](const char* name, std::vector<std::int64_t> shape, std::initializer_list<double> values) {
    return tensor_file(name, listed(OnnxType::i64, std::move(shape), values));
  };
  const std::vector<std::string> constants = {number("cap", 2.f),
                                              number("half", 0.5f),
                                              number("neg_inf", -HUGE_VALF),
                                              integers("0", {}, {0}),
                                              integers("1", {}, {1}),
                                              integers("2", {}, {2}),
                                              integers("3", {}, {3}),
                                              integers("rows", {2}, {-1, 1}),
                                              integers("columns", {2}, {1, -1})};
  const std::vector<Message> indices = {node_of("Shape", {"s"}, {"shape"}),         node_of("Gather", {"shape", "2"}, {"L"}),
                                        node_of("Gather", {"shape", "3"}, {"S"}),   node_of("Range", {"0", "L", "1"}, {"l"}),
                                        node_of("Range", {"0", "S", "1"}, {"r"}),   node_of("Reshape", {"l", "rows"}, {"q"}),
                                        node_of("Reshape", {"r", "columns"}, {"k"})};
  onnx_tool::ModifierGraph read;
  const auto steps_of = [&](std::vector<Message> nodes) {
    nodes.insert(nodes.begin(), indices.begin(), indices.end());
    const Message graph = graph_of(nodes, {"s"}, {"out"}, constants);
    std::string words = read.read(view(graph.bytes)) ? "" : read.reason();
    for (const fovea::OnnxModifier& step : words.empty() ? read.steps() : std::vector<fovea::OnnxModifier>{})
      words += std::to_string(static_cast<int>(step.kind)) + ":" + std::to_string(step.value).substr(0, 4) + " ";
    return words;
  };
  CHECK(steps_of({node_of("Add", {"cap", "s"}, {"out"})}) == "0:2.00 ");
  CHECK(steps_of({node_of("Sub", {"s", "cap"}, {"out"})}) == "0:-2.0 ");
  CHECK(steps_of({node_of("Div", {"s", "cap"}, {"a"}), node_of("Tanh", {"a"}, {"b"}),
                  node_of("Mul", {"b", "cap"}, {"out"})}) == "1:0.50 2:1.00 1:2.00 ");
  CHECK(steps_of({node_of("GreaterOrEqual", {"q", "k"}, {"m"}), node_of("Where", {"m", "s", "neg_inf"}, {"out"})}) ==
        "3:0.00 ");
  CHECK(steps_of({node_of("LessOrEqual", {"k", "q"}, {"m"}), node_of("Where", {"m", "s", "neg_inf"}, {"out"})}) ==
        "3:0.00 ");
  CHECK(steps_of({node_of("Cast", {"cap"}, {"i"}, {attribute("to", 7)}), node_of("Cast", {"i"}, {"f"}, {attribute("to", 1)}),
                  node_of("Add", {"s", "f"}, {"out"})}) == "0:2.00 ");
  CHECK(steps_of({node_of("Sub", {"k", "q"}, {"d"}), node_of("Cast", {"d"}, {"e"}, {attribute("to", 1)}),
                  node_of("Mul", {"e", "cap"}, {"f"}), node_of("Add", {"s", "f"}, {"out"})}) == "4:-2.0 ");

  const char* const refused = "a subgraph with node ";
  CHECK(steps_of({node_of("Erf", {"s"}, {"out"})}) == refused + std::string("Erf"));
  CHECK(steps_of({node_of("Cast", {"half"}, {"i"}, {attribute("to", 7)}), node_of("Add", {"s", "i"}, {"out"})}) ==
        refused + std::string("Cast"));
  CHECK(steps_of({node_of("Cast", {"cap"}, {"b"}, {attribute("to", 9)}), node_of("Add", {"s", "b"}, {"out"})}) ==
        refused + std::string("Cast"));
  CHECK(steps_of({node_of("Mul", {"s", "s"}, {"out"})}) == refused + std::string("Mul"));
  CHECK(steps_of({node_of("Div", {"cap", "s"}, {"out"})}) == refused + std::string("Div"));
  CHECK(steps_of({node_of("Add", {"s", "neg_inf"}, {"out"})}) == refused + std::string("Add"));
  CHECK(steps_of({node_of("GreaterOrEqual", {"k", "q"}, {"m"}), node_of("Where", {"m", "s", "neg_inf"}, {"out"})}) ==
        refused + std::string("GreaterOrEqual"));
  CHECK(steps_of({node_of("GreaterOrEqual", {"q", "k"}, {"m"}), node_of("Where", {"m", "s", "cap"}, {"out"})}) ==
        refused + std::string("Where"));
  CHECK(steps_of({node_of("Reshape", {"l", "columns"}, {"out"})}) == refused + std::string("Reshape"));
  CHECK(steps_of({node_of("Gather", {"shape", "1"}, {"out"})}) == refused + std::string("Gather"));
  CHECK(steps_of({node_of("Sub", {"q", "k"}, {"out"})}) == "a subgraph with an output that is not its input changed");
  CHECK(steps_of({node_of("Add", {"s", "nothing"}, {"out"})}) == refused + std::string("Add"));

  // And through a model: prob_mod scales, more than scaling is said to be unsupported.
  test::Random random(24);
  const std::vector<std::int64_t> shape{1, 2, 3, 4};
  const Numbers q = normal(OnnxType::f32, shape, random), k = normal(OnnxType::f32, shape, random),
                v = normal(OnnxType::f32, shape, random);
  Numbers y = zeros(OnnxType::f32, shape);
  REQUIRE(fovea::onnx_flex_attention({}, {q.in(), k.in(), v.in()}, y.out()).ok());
  for (std::size_t n = 0; n < y.count(); ++n) y.put(n, 2 * y.at(n));
  const auto prob_mod = [&](const Message& node) {
    const Message graph = graph_of({node}, {"s"}, {"out"}, constants);
    const Message flex = node_of("FlexAttention", {"Q", "K", "V"}, {"Y"}, {attribute("prob_mod", graph)}, "ai.onnx.preview");
    return run_files(model_file(graph_of({flex}, {"Q", "K", "V"}, {"Y"}), 1, "ai.onnx.preview"),
                     {tensor_file("Q", q), tensor_file("K", k), tensor_file("V", v)}, {tensor_file("Y", y)});
  };
  CHECK(prob_mod(node_of("Mul", {"s", "cap"}, {"out"})).verdict == Verdict::passed);
  CHECK(prob_mod(node_of("Add", {"s", "cap"}, {"out"})).reason == "prob_mod: a subgraph that does more than scale");
}

TEST_CASE("ONNX files that were cut never pass", "[onnx][files]") {
  const Files files = window_files();
  for (std::size_t length = 0; length < files.model.size(); ++length) {
    Files cut = files;
    cut.model.resize(length);
    const onnx_tool::Outcome outcome = cut.run();
    INFO("model of " << length << " bytes: " << outcome.reason);
    CHECK(outcome.verdict == Verdict::failed);
  }
  for (std::size_t file = 0; file < 4; ++file) {
    const std::string& whole = file < 3 ? files.inputs[file] : files.outputs[0];
    for (std::size_t length = 0; length < whole.size(); ++length) {
      Files cut = files;
      (file < 3 ? cut.inputs[file] : cut.outputs[0]).resize(length);
      const onnx_tool::Outcome outcome = cut.run();
      INFO("file " << file << " of " << length << " bytes: " << outcome.reason);
      CHECK(outcome.verdict == Verdict::failed);
    }
  }
}

TEST_CASE("ONNX files with random bytes give a verdict and a reason", "[onnx][files]") {
  const Files files = window_files();
  test::Random random(25);
  int counts[3] = {};
  for (int n = 0; n < 3000; ++n) {
    Files bad = files;
    const auto spoil = [&](std::string& bytes) {
      for (std::ptrdiff_t flips = random.between(1, 3); flips > 0; --flips)
        bytes[static_cast<std::size_t>(random.below(static_cast<std::ptrdiff_t>(bytes.size())))] =
            static_cast<char>(random.below(256));
    };
    switch (n % 4) {
      case 0:
        spoil(bad.inputs[static_cast<std::size_t>(random.below(3))]);
        break;
      case 1:
        spoil(bad.outputs[0]);
        break;
      default:
        spoil(bad.model);
    }
    const onnx_tool::Outcome outcome = bad.run();
    ++counts[static_cast<int>(outcome.verdict)];
    REQUIRE(outcome.reason.empty() == (outcome.verdict == Verdict::passed));
  }
  CHECK(counts[static_cast<int>(Verdict::failed)] > 1500);
  CHECK(counts[static_cast<int>(Verdict::unsupported)] > 0);
}
