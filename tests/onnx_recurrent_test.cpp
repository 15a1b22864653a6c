// SPDX-License-Identifier: Apache-2.0
// The ONNX operators LinearAttention and CausalConvWithState against their definitions in double loops, identities that the
// definitions imply, and refusals. The backend node tests of both run in onnx_test.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/onnx_recurrent.hpp"
#include "support/executors.hpp"
#include "support/onnx_numbers.hpp"
#include "support/random.hpp"

namespace {

using namespace test::onnx;
using Catch::Matchers::ContainsSubstring;
using fovea::OnnxUpdateRule;

constexpr double kUnit = 0x1p-24;    // half a step of fp32
constexpr std::byte kPoison{0xff};   // NaN in every float type

// Half a step of a type, relative: what storing a result costs.
double unit_of(OnnxType type) { return type == OnnxType::f16 ? 0x1p-11 : type == OnnxType::bf16 ? 0x1p-8 : kUnit; }

Numbers poisoned(OnnxType type, std::vector<std::int64_t> shape) {
  Numbers numbers = zeros(type, std::move(shape));
  std::fill(numbers.bytes.begin(), numbers.bytes.end(), kPoison);
  return numbers;
}

// An operator's problem, changed, is refused in these words, and nothing is written.
template <class Problem, class F>
void check_refused(const Problem& sound, const char* words, const F& change, fovea::Code code) {
  INFO(words);
  Problem bad = sound;
  change(bad);
  for (Numbers* x : {&bad.y, &bad.present}) std::fill(x->bytes.begin(), x->bytes.end(), std::byte{0x5a});
  const fovea::Status status = bad.run();
  CHECK(status.code() == code);
  CHECK_THAT(std::string(status.message()), ContainsSubstring(words));
  for (const Numbers* x : {&bad.y, &bad.present})
    CHECK(std::count(x->bytes.begin(), x->bytes.end(), std::byte{0x5a}) == static_cast<std::ptrdiff_t>(x->bytes.size()));
}

struct Linear {
  fovea::OnnxLinearAttention a;
  index_t batch = 1, len = 1, dim_k = 4, dim_v = 4;
  Numbers q, k, v, past, decay, beta;
  Numbers y, present;

  index_t q_heads() const { return a.q_num_heads; }
  index_t kv_heads() const { return a.kv_num_heads; }
  fovea::OnnxLinearAttentionInputs inputs() const {
    return {
        .query = q.in(), .key = k.in(), .value = v.in(), .past_state = past.in(), .decay = decay.in(), .beta = beta.in()};
  }
  fovea::OnnxLinearAttentionOutputs outputs() { return {.output = y.out(), .present_state = present.out()}; }
  fovea::Status run(fovea::Executor executor = {}) { return fovea::onnx_linear_attention(a, inputs(), outputs(), executor); }
};

struct LinearShape {
  OnnxUpdateRule rule = OnnxUpdateRule::gated_delta;
  OnnxType type = OnnxType::f32, state_type = OnnxType::f32;
  index_t batch = 2, len = 5, q_heads = 2, kv_heads = 2, dim_k = 6, dim_v = 7;
  bool decay_by_key = true, shared_beta = false, carried = true;
};

Linear made_linear(const LinearShape& s, test::Random& random) {
  Linear p;
  p.a.update_rule = s.rule;
  p.a.q_num_heads = s.q_heads;
  p.a.kv_num_heads = s.kv_heads;
  p.batch = s.batch;
  p.len = s.len;
  p.dim_k = s.dim_k;
  p.dim_v = s.dim_v;
  const double key_size = 1 / std::sqrt(static_cast<double>(s.dim_k));   // about length 1: a delta rule that contracts
  p.q = normal(s.type, {s.batch, s.len, s.q_heads * s.dim_k}, random);
  p.k = made(s.type, {s.batch, s.len, s.kv_heads * s.dim_k}, [&](std::size_t) { return random.normal() * key_size; });
  p.v = normal(s.type, {s.batch, s.len, s.kv_heads * s.dim_v}, random);
  if (s.carried) p.past = normal(s.state_type, {s.batch, s.kv_heads, s.dim_k, s.dim_v}, random);
  if (s.rule == OnnxUpdateRule::gated || s.rule == OnnxUpdateRule::gated_delta)
    p.decay = made(s.type, {s.batch, s.len, s.kv_heads * (s.decay_by_key ? s.dim_k : 1)}, [&](std::size_t) {
      return random.one_in(40) ? -std::numeric_limits<double>::infinity() : -0.2 * std::abs(double{random.normal()});
    });
  if (s.rule == OnnxUpdateRule::delta || s.rule == OnnxUpdateRule::gated_delta)
    p.beta = made(s.type, {s.batch, s.len, s.shared_beta ? 1 : s.kv_heads}, [&](std::size_t) { return random.uniform(); });
  p.y = poisoned(s.type, {s.batch, s.len, s.q_heads * s.dim_v});
  p.present = poisoned(s.state_type, {s.batch, s.kv_heads, s.dim_k, s.dim_v});
  return p;
}

// The operator's recurrence, head by head and token by token.
struct Expected {
  std::vector<double> y, present;
};
Expected expected(const Linear& p) {
  const index_t group = p.q_heads() / p.kv_heads();
  const double scale = p.a.scale != 0.f ? double{p.a.scale} : 1 / std::sqrt(static_cast<double>(p.dim_k));
  const auto at = [](index_t n) { return static_cast<std::size_t>(n); };
  Expected out{std::vector<double>(p.y.count()), std::vector<double>(at(p.batch * p.kv_heads() * p.dim_k * p.dim_v))};
  for (index_t b = 0; b < p.batch; ++b) {
    for (index_t h = 0; h < p.kv_heads(); ++h) {
      const index_t cells = p.dim_k * p.dim_v, first = (b * p.kv_heads() + h) * cells;
      std::vector<double> state(at(cells));
      for (index_t n = 0; n < cells && p.past; ++n) state[at(n)] = p.past.at(at(first + n));
      for (index_t t = 0; t < p.len; ++t) {
        const index_t token = b * p.len + t;
        const auto key = [&](index_t d) { return p.k.at(at((token * p.kv_heads() + h) * p.dim_k + d)); };
        for (index_t d = 0; d < p.dim_k && p.decay; ++d) {
          const bool by_key = p.decay.shape[2] != p.kv_heads();
          const index_t head = token * p.kv_heads() + h;
          const double factor = std::exp(p.decay.at(at(by_key ? head * p.dim_k + d : head)));
          for (index_t n = 0; n < p.dim_v; ++n) state[at(d * p.dim_v + n)] *= factor;
        }
        for (index_t n = 0; n < p.dim_v; ++n) {
          double written = p.v.at(at((token * p.kv_heads() + h) * p.dim_v + n));
          if (p.beta) {
            for (index_t d = 0; d < p.dim_k; ++d) written -= state[at(d * p.dim_v + n)] * key(d);
            written *= p.beta.at(at(p.beta.shape[2] == 1 ? token : token * p.kv_heads() + h));
          }
          for (index_t d = 0; d < p.dim_k; ++d) state[at(d * p.dim_v + n)] += key(d) * written;
        }
        for (index_t reader = h * group; reader < (h + 1) * group; ++reader) {
          for (index_t n = 0; n < p.dim_v; ++n) {
            double sum = 0;
            for (index_t d = 0; d < p.dim_k; ++d)
              sum += p.q.at(at((token * p.q_heads() + reader) * p.dim_k + d)) * state[at(d * p.dim_v + n)];
            out.y[at((token * p.q_heads() + reader) * p.dim_v + n)] = scale * sum;
          }
        }
      }
      std::copy(state.begin(), state.end(), out.present.begin() + first);
    }
  }
  return out;
}

// Root mean square of the difference over that of `want`; infinite where a number is missing or none.
double distance(const Numbers& got, const std::vector<double>& want) {
  double error = 0, size = 0;
  for (std::size_t n = 0; n < want.size(); ++n) {
    const double difference = got.at(n) - want[n];
    if (!std::isfinite(difference)) return std::numeric_limits<double>::infinity();
    error += difference * difference;
    size += want[n] * want[n];
  }
  return size == 0 ? error : std::sqrt(error / size);
}

// 1e-5 for the arithmetic, half a step of the type for storing the result.
double allowed(OnnxType type) { return 1e-5 + unit_of(type); }

void check_linear(Linear& p, const std::string& what) {
  INFO(what);
  const fovea::Status status = p.run();
  INFO(status.message());
  REQUIRE(status.ok());
  const Expected want = expected(p);
  CHECK(distance(p.y, want.y) <= allowed(p.y.type));
  if (p.present) CHECK(distance(p.present, want.present) <= allowed(p.present.type));
}

bool same(const Numbers& a, const Numbers& b) { return a.shape == b.shape && a.bytes == b.bytes; }

// Along axis 1 of [batch, pos, numbers], from position `begin` on.
Numbers positions(const Numbers& x, index_t begin, index_t end) {
  if (!x) return {};
  const auto row = x.bytes.size() / static_cast<std::size_t>(x.shape[0] * x.shape[1]);
  Numbers cut = zeros(x.type, {x.shape[0], end - begin, x.shape[2]});
  const auto size = static_cast<std::size_t>(end - begin) * row;
  for (index_t b = 0; b < x.shape[0]; ++b)
    std::memcpy(cut.bytes.data() + static_cast<std::size_t>(b) * size,
                x.bytes.data() + static_cast<std::size_t>(b * x.shape[1] + begin) * row, size);
  return cut;
}

// Each head of `width` numbers of [batch, pos, heads * width], repeated in place.
Numbers repeated(const Numbers& x, index_t heads, index_t times) {
  if (!x) return {};
  const index_t width = x.shape[2] / heads, rows = x.shape[0] * x.shape[1];
  Numbers more = zeros(x.type, {x.shape[0], x.shape[1], x.shape[2] * times});
  for (index_t n = 0; n < rows * heads * times; ++n) {
    for (index_t d = 0; d < width; ++d)
      more.put(static_cast<std::size_t>(n * width + d), x.at(static_cast<std::size_t>(n / times * width + d)));
  }
  return more;
}

}   // namespace

TEST_CASE("ONNX LinearAttention is its definition on random problems", "[onnx]") {
  test::Random random(27);
  constexpr OnnxType kTypes[] = {OnnxType::f32, OnnxType::f16, OnnxType::bf16, OnnxType::f64};
  for (int n = 0; n < 96; ++n) {
    LinearShape s;
    s.rule = static_cast<OnnxUpdateRule>(n % 4);
    s.type = n < 48 ? OnnxType::f32 : kTypes[random.below(4)];
    s.state_type = kTypes[n < 48 ? 0 : random.below(4)];
    s.batch = random.between(1, 3);
    s.len = random.pick({1, 1, 2, 3, 7, 9, 33, 40});   // step, fused and chunked forms
    s.kv_heads = random.between(1, 3);
    s.q_heads = s.kv_heads * random.between(1, 3);
    s.dim_k = random.pick({1, 3, 8, 16, 21});
    s.dim_v = random.pick({1, 5, 8, 16, 19});
    s.decay_by_key = random.one_in(2);
    s.shared_beta = random.one_in(2);
    s.carried = !random.one_in(3);
    Linear p = made_linear(s, random);
    if (random.one_in(3)) p.a.scale = random.uniform(-2.f, 2.f);
    if (random.one_in(4)) p.present = {};
    check_linear(p, "problem " + std::to_string(n) + ", rule " + std::to_string(n % 4) + ", " + std::to_string(s.len) +
                        " tokens, types " + std::to_string(static_cast<int>(s.type)) + " and " +
                        std::to_string(static_cast<int>(s.state_type)));
  }
}

TEST_CASE("ONNX LinearAttention: golden values by hand", "[onnx][golden]") {
  // One head, dims 1 and 1, scale 1: state 2, decay ln(1/2), k = 1, v = 4, beta = 1/2: 1 -> 1 + (4 - 1) / 2 = 2.5; then
  // k = 2, v = 1, beta = 1: 1.25 -> 1.25 + 2 (1 - 2.5) = -1.75.
  Linear p;
  p.a = {.q_num_heads = 1, .kv_num_heads = 1, .scale = 1};
  p.len = 2;
  p.dim_k = p.dim_v = 1;
  p.q = listed(OnnxType::f32, {1, 2, 1}, {1, 3});
  p.k = listed(OnnxType::f32, {1, 2, 1}, {1, 2});
  p.v = listed(OnnxType::f32, {1, 2, 1}, {4, 1});
  p.past = listed(OnnxType::f32, {1, 1, 1, 1}, {2});
  p.decay = listed(OnnxType::f32, {1, 2, 1}, {std::log(0.5), std::log(0.5)});
  p.beta = listed(OnnxType::f32, {1, 2, 1}, {0.5, 1});
  p.y = poisoned(OnnxType::f32, {1, 2, 1});
  p.present = poisoned(OnnxType::f32, {1, 1, 1, 1});
  REQUIRE(p.run().ok());
  CHECK(p.y.at(0) == Catch::Approx(2.5).epsilon(1e-6));
  CHECK(p.y.at(1) == Catch::Approx(-5.25).epsilon(1e-6));
  CHECK(p.present.at(0) == Catch::Approx(-1.75).epsilon(1e-6));

  p.a.update_rule = OnnxUpdateRule::gated;   // 1 + 4 = 5, 2.5 + 2 = 4.5
  p.beta = {};
  REQUIRE(p.run().ok());
  CHECK(p.y.at(0) == Catch::Approx(5).epsilon(1e-6));
  CHECK(p.y.at(1) == Catch::Approx(13.5).epsilon(1e-6));

  p.a.update_rule = OnnxUpdateRule::linear;   // 2 + 4 = 6, 6 + 2 = 8
  p.decay = {};
  REQUIRE(p.run().ok());
  CHECK(p.y.at(0) == 6);
  CHECK(p.y.at(1) == 24);
  CHECK(p.present.at(0) == 8);
}

TEST_CASE("ONNX LinearAttention: what is shared equals what is repeated", "[onnx]") {
  test::Random random(5);
  for (const index_t len : {1, 5, 45}) {   // in place, in the workspace, in chunks
    LinearShape s;
    s.len = len;
    s.q_heads = 6;
    Linear p = made_linear(s, random);
    REQUIRE(p.run().ok());

    Linear all = p;   // a state for each query head
    all.a.kv_num_heads = 6;
    all.k = repeated(p.k, 2, 3);
    all.v = repeated(p.v, 2, 3);
    all.decay = repeated(p.decay, 2, 3);
    all.beta = repeated(p.beta, 2, 3);
    Numbers heads = p.past;   // [batch, 1, heads * state], so that the heads repeat as above
    heads.shape = {2, 1, 2 * 6 * 7};
    all.past = repeated(heads, 2, 3);
    all.past.shape = {2, 6, 6, 7};
    all.present = poisoned(OnnxType::f32, {2, 6, 6, 7});
    REQUIRE(all.run().ok());
    CHECK(same(all.y, p.y));

    Linear head_decay = p;   // one number per head, and the same for each channel
    head_decay.decay = made(OnnxType::f32, {2, len, 2}, [&](std::size_t) { return -random.uniform(); });
    Linear key_decay = head_decay;
    key_decay.decay = repeated(head_decay.decay, 2 * 1, 6);
    REQUIRE(head_decay.run().ok());
    REQUIRE(key_decay.run().ok());
    CHECK(distance(key_decay.y, expected(head_decay).y) <= 1e-5);

    Linear shared = p;
    shared.beta = made(OnnxType::f32, {2, len, 1}, [&](std::size_t) { return random.uniform(); });
    Linear separate = shared;
    separate.beta = repeated(shared.beta, 1, 2);
    REQUIRE(shared.run().ok());
    REQUIRE(separate.run().ok());
    CHECK(same(shared.y, separate.y));
  }
}

TEST_CASE("ONNX LinearAttention: scale 0 is 1/sqrt(dim_k), chunk_size changes nothing, lanes change no bit", "[onnx]") {
  test::Random random(6);
  LinearShape s;
  s.len = 35;
  s.q_heads = 4;
  s.dim_k = 16;
  s.dim_v = 40;
  Linear p = made_linear(s, random);
  REQUIRE(p.run().ok());

  Linear other = p;
  other.a.scale = 0.25f;
  REQUIRE(other.run().ok());
  CHECK(same(other.y, p.y));
  other = p;
  other.a.chunk_size = -7;
  REQUIRE(other.run().ok());
  CHECK(same(other.y, p.y));
  test::ThreadPerLane pool;
  test::Reversed reversed;
  for (const int lanes : {2, 3, 8}) {
    for (const fovea::Executor executor : {fovea::Executor(pool, lanes), fovea::Executor(reversed, lanes)}) {
      other = p;
      std::fill(other.y.bytes.begin(), other.y.bytes.end(), kPoison);
      std::fill(other.present.bytes.begin(), other.present.bytes.end(), kPoison);
      REQUIRE(other.run(executor).ok());
      CHECK(same(other.y, p.y));
      CHECK(same(other.present, p.present));
    }
  }
}

TEST_CASE("ONNX LinearAttention: prefill then decode, the state in place", "[onnx]") {
  test::Random random(7);
  for (const OnnxType state_type : {OnnxType::f32, OnnxType::f64, OnnxType::bf16}) {
    for (const OnnxUpdateRule rule : {OnnxUpdateRule::linear, OnnxUpdateRule::gated_delta}) {
      LinearShape s;
      s.rule = rule;
      s.state_type = state_type;
      s.len = 14;
      s.q_heads = 4;
      Linear whole = made_linear(s, random);
      const Expected want = expected(whole);

      Numbers state = whole.past;
      for (index_t begin = 0; begin < s.len;) {
        const index_t end = begin == 0 ? 10 : begin + 1;
        Linear part = whole;
        part.len = end - begin;
        part.q = positions(whole.q, begin, end);
        part.k = positions(whole.k, begin, end);
        part.v = positions(whole.v, begin, end);
        part.decay = positions(whole.decay, begin, end);
        part.beta = positions(whole.beta, begin, end);
        part.y = poisoned(s.type, {s.batch, end - begin, s.q_heads * s.dim_v});
        fovea::OnnxLinearAttentionInputs inputs = part.inputs();
        inputs.past_state = state.in();
        const fovea::Status status =
            fovea::onnx_linear_attention(part.a, inputs, {.output = part.y.out(), .present_state = state.out()});
        INFO(status.message());
        REQUIRE(status.ok());
        std::vector<double> rows;
        for (index_t b = 0; b < s.batch; ++b) {
          const auto row = static_cast<std::size_t>(s.q_heads * s.dim_v);
          const auto from = want.y.begin() + static_cast<std::ptrdiff_t>(row) * (b * s.len + begin);
          rows.insert(rows.end(), from, from + static_cast<std::ptrdiff_t>(row) * (end - begin));
        }
        // A state stored in bf16 is rounded after each call, so after the first the outputs are off by that much too.
        CHECK(distance(part.y, rows) <= 1e-5 + (state_type == OnnxType::bf16 && begin > 0 ? 8 * unit_of(state_type) : 0));
        begin = end;
      }
      CHECK(distance(state, want.present) <= 1e-5 + (state_type == OnnxType::bf16 ? 8 * unit_of(state_type) : 0));
    }
  }
}

TEST_CASE("ONNX LinearAttention without tokens or sequences hands the state on", "[onnx]") {
  test::Random random(8);
  for (const OnnxType state_type : {OnnxType::f32, OnnxType::f16}) {
    for (const bool carried : {true, false}) {
      for (const OnnxUpdateRule rule : {OnnxUpdateRule::linear, OnnxUpdateRule::gated_delta}) {
        LinearShape s;
        s.rule = rule;
        s.state_type = state_type;
        s.len = 0;
        s.carried = carried;
        Linear p = made_linear(s, random);
        const fovea::Status status = p.run();
        INFO(status.message());
        REQUIRE(status.ok());
        CHECK(same(p.present, carried ? p.past : zeros(state_type, p.present.shape)));
        s.batch = 0;
        s.len = 3;
        Linear none = made_linear(s, random);
        CHECK(none.run().ok());
      }
    }
  }
}

TEST_CASE("ONNX LinearAttention refuses with the numbers, and writes nothing", "[onnx][errors]") {
  test::Random random(9);
  LinearShape s;
  s.q_heads = 4;
  const Linear p = made_linear(s, random);   // batch 2, 5 tokens, heads 4 and 2, dims 6 and 7
  REQUIRE(Linear(p).run().ok());
  const auto spoil = [&](const char* words, const auto& change, fovea::Code code = fovea::Code::invalid_argument) {
    check_refused(p, words, change, code);
  };
  spoil("query is required", [](Linear& b) { b.q = {}; });
  spoil("value is required", [](Linear& b) { b.v = {}; });
  spoil("output is required", [](Linear& b) { b.y = {}; });
  spoil("query has element type 7, must be 1, 10, 11 or 16", [](Linear& b) { b.q = zeros(OnnxType::i64, b.q.shape); });
  spoil("key has element type 10, must be 1", [](Linear& b) { b.k = zeros(OnnxType::f16, b.k.shape); });
  spoil("decay has element type 16, must be 1", [](Linear& b) { b.decay = zeros(OnnxType::bf16, b.decay.shape); });
  spoil("past_state has element type 3", [](Linear& b) { b.past = zeros(OnnxType::i8, b.past.shape); });
  spoil("present_state has element type 10, must be 1",
        [](Linear& b) { b.present = zeros(OnnxType::f16, b.present.shape); });
  spoil("present_state has element type 9", [](Linear& b) {
    b.past = {};
    b.present = zeros(OnnxType::boolean, b.present.shape);
  });
  spoil("output has element type 11, must be 1", [](Linear& b) { b.y = zeros(OnnxType::f64, b.y.shape); });
  spoil("query has rank 4, must be 3", [](Linear& b) { b.q = zeros(OnnxType::f32, {2, 5, 4, 6}); });
  spoil("q_num_heads is 3, must be a positive multiple of kv_num_heads, 2", [](Linear& b) { b.a.q_num_heads = 3; });
  spoil("q_num_heads is 0", [](Linear& b) { b.a.q_num_heads = 0; });
  spoil("kv_num_heads, 0", [](Linear& b) { b.a.kv_num_heads = 0; });
  spoil("4611686018427387904 query heads of 4 numbers are more than an output can have", [](Linear& b) {
    b.a = {.update_rule = OnnxUpdateRule::linear, .q_num_heads = std::int64_t{1} << 62, .kv_num_heads = 1};
    b.q = b.k = zeros(OnnxType::f32, {1, 1, 0});
    b.v = zeros(OnnxType::f32, {1, 1, 4});
    b.past = b.decay = b.beta = {};
  });
  spoil("the last axis of query, 25, cannot be cut into 4 heads", [](Linear& b) { b.q = zeros(OnnxType::f32, {2, 5, 25}); });
  spoil("key has 14 on axis 2, must be 12", [](Linear& b) { b.k = zeros(OnnxType::f32, {2, 5, 14}); });
  spoil("key has 4 on axis 1, must be 5", [](Linear& b) { b.k = zeros(OnnxType::f32, {2, 4, 12}); });
  spoil("value has 1 on axis 0, must be 2", [](Linear& b) { b.v = zeros(OnnxType::f32, {1, 5, 14}); });
  spoil("output has 14 on axis 2, must be 28", [](Linear& b) { b.y = zeros(OnnxType::f32, {2, 5, 14}); });
  spoil("past_state has 4 on axis 1, must be 2", [](Linear& b) { b.past = zeros(OnnxType::f32, {2, 4, 6, 7}); });
  spoil("present_state has 7 on axis 2, must be 6", [](Linear& b) { b.present = zeros(OnnxType::f32, {2, 2, 7, 6}); });
  spoil("decay has 5 on axis 2, must be 12", [](Linear& b) { b.decay = zeros(OnnxType::f32, {2, 5, 5}); });
  spoil("decay has rank 4, must be 3", [](Linear& b) { b.decay = zeros(OnnxType::f32, {2, 5, 2, 6}); });
  spoil("beta has 4 on axis 2, must be 2", [](Linear& b) { b.beta = zeros(OnnxType::f32, {2, 5, 4}); });
  spoil("beta has rank 2, must be 3", [](Linear& b) { b.beta = zeros(OnnxType::f32, {2, 5}); });
  spoil("update_rule gated_delta needs decay", [](Linear& b) { b.decay = {}; });
  spoil("update_rule gated_delta needs beta", [](Linear& b) { b.beta = {}; });
  spoil("update_rule linear takes no decay", [](Linear& b) { b.a.update_rule = OnnxUpdateRule::linear; });
  spoil("update_rule gated takes no beta", [](Linear& b) { b.a.update_rule = OnnxUpdateRule::gated; });
  spoil("update_rule delta takes no decay", [](Linear& b) { b.a.update_rule = OnnxUpdateRule::delta; });
  spoil("update_rule is 9", [](Linear& b) { b.a.update_rule = static_cast<OnnxUpdateRule>(9); });
  spoil("scale inf is not finite", [](Linear& b) { b.a.scale = std::numeric_limits<float>::infinity(); });
  spoil("value has extent -2 on axis 0", [](Linear& b) { b.v.shape[0] = -2; });
  spoil("the extents of decay reach beyond", [](Linear& b) { b.decay.shape[0] = b.decay.shape[1] = std::int64_t{1} << 40; });
  spoil(
      "dims 1 to 4096 are supported: dim_k 4097",
      [](Linear& b) {
        b.q = zeros(OnnxType::f32, {2, 5, 4 * 4097});
        b.k = b.decay = zeros(OnnxType::f32, {2, 5, 2 * 4097});
        b.past = {};
        b.present = zeros(OnnxType::f32, {2, 2, 4097, 7});
      },
      fovea::Code::unsupported);

  Linear bad = p;
  fovea::OnnxLinearAttentionOutputs outputs = bad.outputs();
  outputs.output.data = bad.q.bytes.data();
  CHECK_THAT(std::string(fovea::onnx_linear_attention(bad.a, bad.inputs(), outputs).message()),
             ContainsSubstring("output [") && ContainsSubstring("overlaps query"));
  outputs = bad.outputs();
  outputs.present_state.data = bad.past.bytes.data() + 4;
  CHECK_THAT(std::string(fovea::onnx_linear_attention(bad.a, bad.inputs(), outputs).message()),
             ContainsSubstring("present_state [") && ContainsSubstring("overlaps past_state"));
  outputs.present_state.data = bad.y.bytes.data();
  CHECK_THAT(std::string(fovea::onnx_linear_attention(bad.a, bad.inputs(), outputs).message()),
             ContainsSubstring("present_state [") && ContainsSubstring("overlaps output"));
}

namespace {

struct Conv {
  fovea::OnnxCausalConvWithState a;
  index_t batch = 2, channels = 3, len = 5, width = 4;
  Numbers x, weight, bias, past, y, present;

  fovea::OnnxCausalConvWithStateInputs inputs() const {
    return {.input = x.in(), .weight = weight.in(), .bias = bias.in(), .past_state = past.in()};
  }
  fovea::OnnxCausalConvWithStateOutputs outputs() { return {.output = y.out(), .present_state = present.out()}; }
  fovea::Status run(fovea::Executor executor = {}) {
    return fovea::onnx_causal_conv_with_state(a, inputs(), outputs(), executor);
  }
};

Conv made_conv(OnnxType type, index_t batch, index_t channels, index_t len, index_t width, bool with_bias, bool carried,
               bool silu, test::Random& random) {
  Conv p;
  p.a.activation = silu ? fovea::OnnxConvActivation::silu : fovea::OnnxConvActivation::none;
  p.batch = batch;
  p.channels = channels;
  p.len = len;
  p.width = width;
  p.x = normal(type, {batch, channels, len}, random);
  p.weight = normal(type, {channels, 1, width}, random);
  if (with_bias) p.bias = normal(type, {channels}, random);
  if (carried) p.past = normal(type, {batch, channels, width - 1}, random);
  p.y = poisoned(type, {batch, channels, len});
  p.present = poisoned(type, {batch, channels, width - 1});
  return p;
}

// Element `at` of past and input joined along the last axis; zeros where there is no past.
double joined(const Conv& p, index_t row, index_t at) {
  if (at >= p.width - 1) return p.x.at(static_cast<std::size_t>(row * p.len + at - (p.width - 1)));
  return p.past ? p.past.at(static_cast<std::size_t>(row * (p.width - 1) + at)) : 0;
}

void check_conv(const Conv& p) {
  for (index_t row = 0; row < p.batch * p.channels; ++row) {
    const index_t c = row % p.channels;
    for (index_t t = 0; t < p.len; ++t) {
      double sum = p.bias ? p.bias.at(static_cast<std::size_t>(c)) : 0, size = std::abs(sum);
      for (index_t j = 0; j < p.width; ++j) {
        const double product = p.weight.at(static_cast<std::size_t>(c * p.width + j)) * joined(p, row, t + j);
        sum += product;
        size += std::abs(product);
      }
      const bool silu = p.a.activation == fovea::OnnxConvActivation::silu;
      const double want = silu ? sum / (1 + std::exp(-sum)) : sum;
      // `width` additions, three roundings a product (f64 is read as fp32); the slope of SiLU is below 1.1, its own 8 steps.
      const double budget = 1.1 * static_cast<double>(p.width + 4) * kUnit * size + 8 * kUnit * std::abs(want);
      const double got = p.y.at(static_cast<std::size_t>(row * p.len + t));
      if (!(std::abs(got - want) <= budget + (unit_of(p.y.type) + 0x1p-25) * std::abs(want) + 0x1p-25)) {
        INFO("row " << row << ", position " << t);
        CHECK(got == Catch::Approx(want));
        return;
      }
    }
    for (index_t n = 0; p.present && n < p.width - 1; ++n) {
      const double want = joined(p, row, p.len + n), got = p.present.at(static_cast<std::size_t>(row * (p.width - 1) + n));
      if (p.x.type == OnnxType::f64) {
        CHECK(std::abs(got - want) <= kUnit * std::abs(want));
      } else {
        CHECK(got == want);
      }
    }
  }
}

}   // namespace

TEST_CASE("ONNX CausalConvWithState is its definition", "[onnx]") {
  test::Random random(28);
  int checked = 0;
  for (const OnnxType type : {OnnxType::f32, OnnxType::f16, OnnxType::bf16, OnnxType::f64}) {
    for (const index_t width : {1, 2, 4, 5}) {
      for (const index_t len : {1, 2, 9}) {
        for (int n = 0; n < 4; ++n) {
          const index_t channels = random.pick({1, 3, 16, 37});
          Conv p = made_conv(type, random.between(1, 3), channels, len, width, n % 2 == 0, n >= 2, random.one_in(2), random);
          if (random.one_in(4)) p.present = {};
          const fovea::Status status = p.run();
          INFO(status.message());
          REQUIRE(status.ok());
          check_conv(p);
          ++checked;
        }
      }
    }
  }
  CHECK(checked == 192);
}

TEST_CASE("ONNX CausalConvWithState: golden values by hand", "[onnx][golden]") {
  Conv p;
  p.batch = p.channels = 1;
  p.len = 3;
  p.width = 3;
  p.x = listed(OnnxType::f32, {1, 1, 3}, {1, 2, 3});
  p.weight = listed(OnnxType::f32, {1, 1, 3}, {100, 10, 1});
  p.bias = listed(OnnxType::f32, {1}, {0.5});
  p.past = listed(OnnxType::f32, {1, 1, 2}, {8, 9});
  p.y = poisoned(OnnxType::f32, {1, 1, 3});
  p.present = poisoned(OnnxType::f32, {1, 1, 2});
  REQUIRE(p.run().ok());
  CHECK(p.y.at(0) == 891.5);
  CHECK(p.y.at(1) == 912.5);
  CHECK(p.y.at(2) == 123.5);
  CHECK(p.present.at(0) == 2);
  CHECK(p.present.at(1) == 3);
  p.past = {};
  REQUIRE(p.run().ok());
  CHECK(p.y.at(0) == 1.5);
  CHECK(p.y.at(1) == 12.5);
}

TEST_CASE("ONNX CausalConvWithState: any split, in place, any lanes: the same bits", "[onnx]") {
  test::Random random(29);
  for (const OnnxType type : {OnnxType::f32, OnnxType::bf16}) {
    Conv whole = made_conv(type, 2, 21, 7, 4, true, true, true, random);
    REQUIRE(whole.run().ok());
    test::ThreadPerLane pool;
    Conv lanes = whole;
    std::fill(lanes.y.bytes.begin(), lanes.y.bytes.end(), kPoison);
    REQUIRE(lanes.run(fovea::Executor(pool, 3)).ok());
    CHECK(same(lanes.y, whole.y));

    Numbers state = whole.past;
    const std::size_t size = static_cast<std::size_t>(fovea::onnx::bytes_of(type));
    for (index_t t = 0; t < whole.len; ++t) {
      Conv step = whole;
      step.len = 1;
      step.x = zeros(type, {2, 21, 1});
      step.y = poisoned(type, {2, 21, 1});
      for (std::size_t row = 0; row < 2 * 21; ++row)
        std::memcpy(step.x.bytes.data() + row * size, whole.x.bytes.data() + (row * 7 + static_cast<std::size_t>(t)) * size,
                    size);
      fovea::OnnxCausalConvWithStateInputs inputs = step.inputs();
      inputs.past_state = state.in();
      const fovea::Status status =
          fovea::onnx_causal_conv_with_state(step.a, inputs, {.output = step.y.out(), .present_state = state.out()});
      INFO(status.message());
      REQUIRE(status.ok());
      for (std::size_t row = 0; row < 2 * 21; ++row)
        CHECK(step.y.at(row) == whole.y.at(row * 7 + static_cast<std::size_t>(t)));
    }
    CHECK(same(state, whole.present));

    Conv none = made_conv(type, 2, 21, 0, 4, true, true, true, random);
    REQUIRE(none.run().ok());
    CHECK(same(none.present, none.past));
    none.past = {};
    REQUIRE(none.run().ok());
    CHECK(same(none.present, zeros(type, none.present.shape)));
    for (const auto& [batch, channels] : {std::pair<index_t, index_t>{0, 3}, {3, 0}}) {
      Conv nothing = made_conv(type, batch, channels, 5, 4, true, true, true, random);
      CHECK(nothing.run().ok());
    }
  }
}

TEST_CASE("ONNX CausalConvWithState refuses with the numbers, and writes nothing", "[onnx][errors]") {
  test::Random random(30);
  const Conv p = made_conv(OnnxType::f32, 2, 3, 5, 4, true, true, false, random);
  const auto spoil = [&](const char* words, const auto& change, fovea::Code code = fovea::Code::invalid_argument) {
    check_refused(p, words, change, code);
  };
  spoil("input is required", [](Conv& b) { b.x = {}; });
  spoil("weight is required", [](Conv& b) { b.weight = {}; });
  spoil("output is required", [](Conv& b) { b.y = {}; });
  spoil("input has element type 6", [](Conv& b) { b.x = zeros(OnnxType::i32, b.x.shape); });
  spoil("weight has element type 10, must be 1", [](Conv& b) { b.weight = zeros(OnnxType::f16, b.weight.shape); });
  spoil("present_state has element type 16, must be 1", [](Conv& b) { b.present = zeros(OnnxType::bf16, b.present.shape); });
  spoil("input has rank 2, must be 3", [](Conv& b) { b.x = zeros(OnnxType::f32, {2, 5}); });
  spoil(
      "input has rank 4; convolutions along one axis, rank 3",
      [](Conv& b) {
        b.x = zeros(OnnxType::f32, {2, 3, 5, 5});
      },
      fovea::Code::unsupported);
  spoil("weight has rank 2, must be 3", [](Conv& b) { b.weight = zeros(OnnxType::f32, {3, 4}); });
  spoil("weight has 2 on axis 0, must be 3", [](Conv& b) { b.weight = zeros(OnnxType::f32, {2, 1, 4}); });
  spoil("weight has 3 on axis 1, must be 1", [](Conv& b) { b.weight = zeros(OnnxType::f32, {3, 3, 4}); });
  spoil("weight has 0 taps", [](Conv& b) { b.weight = zeros(OnnxType::f32, {3, 1, 0}); });
  spoil("bias has 4 on axis 0, must be 3", [](Conv& b) { b.bias = zeros(OnnxType::f32, {4}); });
  spoil("past_state has 4 on axis 2, must be 3", [](Conv& b) { b.past = zeros(OnnxType::f32, {2, 3, 4}); });
  spoil("present_state has 2 on axis 1, must be 3", [](Conv& b) { b.present = zeros(OnnxType::f32, {2, 2, 3}); });
  spoil("output has 4 on axis 2, must be 5", [](Conv& b) { b.y = zeros(OnnxType::f32, {2, 3, 4}); });
  spoil("activation is 2", [](Conv& b) { b.a.activation = static_cast<fovea::OnnxConvActivation>(2); });

  Conv bad = p;
  fovea::OnnxCausalConvWithStateOutputs outputs = bad.outputs();
  outputs.output.data = bad.x.bytes.data();
  CHECK_THAT(std::string(fovea::onnx_causal_conv_with_state(bad.a, bad.inputs(), outputs).message()),
             ContainsSubstring("output [") && ContainsSubstring("overlaps input"));
  outputs = bad.outputs();
  outputs.present_state.data = bad.weight.bytes.data();
  CHECK_THAT(std::string(fovea::onnx_causal_conv_with_state(bad.a, bad.inputs(), outputs).message()),
             ContainsSubstring("present_state [") && ContainsSubstring("overlaps weight"));
}
