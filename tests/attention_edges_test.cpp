// SPDX-License-Identifier: Apache-2.0
// Values and calls at the edge of what floats, integers and callers can do.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/attention.hpp"

using namespace fovea;

namespace {

const float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

// One head, dim 1, scale 1: the scores are the keys themselves.
struct Line {
  std::vector<float> q, k, v, out;

  Line(index_t queries, std::vector<float> keys, std::vector<float> values)
      : q(static_cast<std::size_t>(queries), 1.f), k(std::move(keys)), v(std::move(values)), out(q.size(), -7.f) {}

  Status run(AttentionOptions options = {}) {
    options.scale = 1.f;
    const auto view = [](auto& data) { return bhsd(data.data(), 1, 1, static_cast<index_t>(data.size()), 1); };
    return attention(view(std::as_const(q)), view(std::as_const(k)), view(std::as_const(v)), view(out), options);
  }
};

}   // namespace

TEST_CASE("large scores in different tiles keep their ratio", "[edges]") {
  // The maximum moves from the first tile to the last; exp(-1/2) is exact to a few roundings whatever the size of the scores.
  for (const float size : {1.f, 100.f, 1e4f, 1e5f, 4e6f, 5814530.5f, 5814539.5f, 5814541.f, 8e6f}) {
    for (const Regime regime : {Regime::prefill, Regime::decode}) {
      std::vector<float> keys(2500, -kInf), values(2500, 0.f);
      keys[3] = size;
      keys[2400] = size + 0.5f;
      values[3] = 1.f;
      Line line(1, keys, values);
      REQUIRE(line.run({.regime = regime}).ok());
      INFO("score " << size);
      const double gap = static_cast<double>(keys[2400]) - static_cast<double>(keys[3]);
      CHECK(static_cast<double>(line.out[0]) == Catch::Approx(1. / (1. + std::exp(gap))).epsilon(1e-6));
    }
  }
}

TEST_CASE("a visible key with a score of -inf is visible: NaN in its V shows, in a chunk and alone", "[edges]") {
  for (const Regime regime : {Regime::prefill, Regime::decode}) {
    const std::vector<float> keys{0.f, -kInf, 0.f}, values{1.f, kNan, 1.f};
    Line chunk(3, keys, values), alone(1, keys, values);
    REQUIRE(chunk.run({.causal = Causal::top_left, .regime = regime}).ok());
    REQUIRE(alone.run({.causal = Causal::bottom_right, .regime = regime}).ok());
    CHECK(chunk.out[0] == 1.f);
    CHECK(std::isnan(chunk.out[1]));
    CHECK(std::isnan(chunk.out[2]));
    CHECK(std::isnan(alone.out[0]));
  }
}

TEST_CASE("the sign of an underflowed output does not depend on masked keys", "[edges]") {
  for (const Regime regime : {Regime::prefill, Regime::decode}) {
    const std::vector<float> keys{0.f, -60.f, 0.f}, values{-1e-38f, -1e-38f, 1.f};
    Line chunk(2, {keys[0], keys[1]}, {values[0], values[1]}), padded(3, keys, values);
    REQUIRE(chunk.run({.causal = Causal::top_left, .regime = regime}).ok());
    REQUIRE(padded.run({.causal = Causal::top_left, .regime = regime}).ok());
    CHECK(std::memcmp(chunk.out.data(), padded.out.data(), 2 * sizeof(float)) == 0);
  }
}

TEST_CASE("numbers and enums outside their range are refused with the number", "[edges][errors]") {
  using Catch::Matchers::ContainsSubstring;
  Line line(1, {0.f, 1.f}, {1.f, 2.f});
  const std::vector<index_t> far{-2147483647};
  CHECK_THAT(line.run({.q_offset = far}).message(), ContainsSubstring("-2147483647"));
  CHECK_THAT(line.run({.softcap = 1e-39f}).message(), ContainsSubstring("softcap"));
  CHECK_THAT(line.run({.causal = static_cast<Causal>(7)}).message(), ContainsSubstring("7"));
  CHECK_THAT(line.run({.regime = static_cast<Regime>(9)}).message(), ContainsSubstring("9"));
  CHECK(line.out[0] == -7.f);
  CHECK_FALSE(supports({1, index_t{1} << 20, index_t{1} << 20, index_t{1} << 20, 8, 8, 8}).message()[0] != 0);
  Plan plan;
  const Status status = make_plan(plan, {1, index_t{1} << 20, index_t{1} << 20, index_t{1} << 20, 8, 8, 8});
  CHECK(status.code() == Code::unsupported);
  CHECK(plan.tasks.empty());
  CHECK_FALSE(supports({std::numeric_limits<std::int32_t>::max(), 1, 1, 0, 0, 8, 8}).ok());
}

TEST_CASE("a stride along an axis of extent 1 may be anything", "[edges]") {
  std::vector<float> q(8, 0.5f), k(24, 0.25f), v(24, 2.f), out(8, kNan);
  const index_t wild = std::numeric_limits<index_t>::min();
  Tensor<const float> queries = bhsd<const float>(q.data(), 1, 1, 1, 8), keys = bhsd<const float>(k.data(), 1, 1, 3, 8),
                      values = bhsd<const float>(v.data(), 1, 1, 3, 8);
  Tensor<float> to = bhsd(out.data(), 1, 1, 1, 8);
  for (auto* stride : {&queries.stride, &keys.stride, &values.stride, &to.stride}) (*stride)[0] = (*stride)[1] = wild;
  queries.stride[2] = to.stride[2] = wild;
  REQUIRE(attention(queries, keys, values, to).ok());
  for (const float x : out) CHECK(x == Catch::Approx(2.f));
}

TEST_CASE("so may those of the exact part of a mixed cache", "[edges]") {
  const index_t dim = 16, wild = PTRDIFF_MAX / 2;
  std::vector<float> q(16, 1.f), k(48, 0.5f), v(48, 2.f), exact_k(16, 0.5f), exact_v(16, 6.f), out(16);
  fovea::Kv kv = fovea::dense_kv(bhsd<const float>(k.data(), 1, 1, 3, dim), bhsd<const float>(v.data(), 1, 1, 3, dim));
  fovea::Kv exact = fovea::dense_kv(bhsd<const float>(exact_k.data(), 1, 1, 1, dim), bhsd<const float>(exact_v.data(), 1, 1, 1, dim));
  exact.k.stride = exact.v.stride = {wild, wild, wild};
  const std::vector<index_t> from{3}, len{4};
  kv.exact = &exact;
  kv.exact_from = from;
  for (const Regime regime : {Regime::decode, Regime::wide_decode, Regime::prefill}) {
    const auto status = fovea::attention<fovea::Formats<fovea::Format::f32>>(
        bhsd<const float>(q.data(), 1, 1, 1, dim), kv, bhsd(out.data(), 1, 1, 1, dim), {.len_k = len, .regime = regime});
    INFO(status.message());
    REQUIRE(status.ok());
    for (const float x : out) CHECK(x == Catch::Approx(3.f));
  }
}

TEST_CASE("a lane the workspace has no slice for does nothing", "[edges]") {
  Line line(40, std::vector<float>(40, 0.f), std::vector<float>(40, 3.f));
  const AttentionShape shape{1, 1, 1, 40, 40, 1, 1};
  Plan plan;
  REQUIRE(make_plan(plan, shape).ok());
  std::vector<std::byte> bytes(workspace_bytes(plan, 1));
  CHECK(workspace_bytes(plan, -1) == bytes.size());
  AttentionRun run;
  const auto view = [](auto& data) { return bhsd(data.data(), 1, 1, 40, 1); };
  REQUIRE(prepare(run, plan, view(std::as_const(line.q)), view(std::as_const(line.k)), view(std::as_const(line.v)),
                  view(line.out), {.workspace = bytes})
              .ok());
  run_lane(run, 3);
  run_lane(run, -1);
  CHECK(line.out[0] == -7.f);
  run_lane(run, 0);
  for (const float x : line.out) CHECK(x == 3.f);
}
