// SPDX-License-Identifier: Apache-2.0
// supports, make_plan, workspace_bytes: pure functions. prepare and run_lane: a caller's own threads.
#include <algorithm>
#include <functional>
#include <numeric>
#include <string>
#include <thread>

#include "support/dense.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;

fovea::AttentionShape shape_of(const Dense& x) {
  return {x.q.batch, x.q.heads, x.k.heads, x.q.len, x.k.len, x.q.dim, x.v.dim};
}

// Rows x keys of every task, in the order in which lanes draw them.
std::vector<index_t> costs(const fovea::Plan& plan) {
  std::vector<index_t> all;
  for (const fovea::Task& task : plan.tasks)
    all.push_back(plan.blocks[static_cast<std::size_t>(task.block)].row_count * (task.k_end - task.k_begin));
  return all;
}

// Each task goes to the lane that is free first: what lanes do that draw from one counter.
std::vector<index_t> dealt(const std::vector<index_t>& costs, int lanes) {
  std::vector<index_t> load(static_cast<std::size_t>(lanes), 0);
  for (const index_t cost : costs) *std::min_element(load.begin(), load.end()) += cost;
  return load;
}

}  // namespace

TEST_CASE("what is asked of the plan does not depend on who asks, or when", "[plan]") {
  const fovea::AttentionShape shape{2, 8, 2, 70, 300, 64, 48};
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  REQUIRE(fovea::supports(shape, options).ok());
  fovea::Plan first, second, reused;
  REQUIRE(fovea::make_plan(reused, {1, 1, 1, 1, 1, 1, 1}, {}).ok());
  REQUIRE(fovea::make_plan(first, shape, options).ok());
  REQUIRE(fovea::make_plan(second, shape, options).ok());
  REQUIRE(fovea::make_plan(reused, shape, options).ok());
  for (const int lanes : {1, 2, 3, 8, 64}) {
    CHECK(fovea::workspace_bytes(first, lanes) == fovea::workspace_bytes(second, lanes));
    CHECK(fovea::workspace_bytes(first, lanes) == fovea::workspace_bytes(reused, lanes));
    CHECK(fovea::workspace_bytes(first, lanes) >= fovea::workspace_bytes(first, 1));
  }
}

TEST_CASE("the plan keeps no pointer: tables may change and vanish after make_plan", "[plan]") {
  const Dense x(101, 2, 4, 2, 5, 200, 16, 16);
  AttentionOptions options;
  fovea::Plan plan;
  {
    std::vector<index_t> lens{150, 20};
    options.len_k = lens;
    REQUIRE(fovea::make_plan(plan, shape_of(x), options).ok());
    lens = {-1, -1};
  }
  const std::vector<index_t> same{150, 20};
  options.len_k = same;
  const Result direct = attend(x, options);
  Result planned = unwritten(x.q.view(), x.v.view());
  options.lse = planned.lse_view();
  REQUIRE(fovea::attention(plan, x.q.view(), x.k.view(), x.v.view(), planned.out.view(), options).ok());
  CHECK(same_bits(direct, planned));
}

TEST_CASE("one plan serves every layer of a step", "[plan]") {
  fovea::Plan plan;
  const Dense first(102, 2, 4, 2, 7, 90, 16, 16);
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  REQUIRE(fovea::make_plan(plan, shape_of(first), options).ok());
  for (std::uint64_t layer = 0; layer < 5; ++layer) {
    const Dense x(103 + layer * 7, 2, 4, 2, 7, 90, 16, 16);
    const Result direct = attend(x, options);
    Result planned = unwritten(x.q.view(), x.v.view());
    AttentionOptions now = options;
    now.lse = planned.lse_view();
    REQUIRE(fovea::attention(plan, x.q.view(), x.k.view(), x.v.view(), planned.out.view(), now).ok());
    CHECK(same_bits(direct, planned));
  }
}

TEST_CASE("the workspace grows with lanes and tiles, not with len_q x len_k", "[plan][workspace]") {
  fovea::Plan small, large;
  AttentionOptions options;
  options.regime = Regime::prefill;
  REQUIRE(fovea::make_plan(small, {1, 8, 8, 512, 512, 128, 128}, options).ok());
  REQUIRE(fovea::make_plan(large, {1, 8, 8, 8192, 8192, 128, 128}, options).ok());
  CHECK(fovea::workspace_bytes(large, 1) <= fovea::workspace_bytes(small, 1) + (std::size_t{1} << 20));
  CHECK(fovea::workspace_bytes(large, 4) < std::size_t{64} << 20);
  // Decode keeps one partial per row and split: far from one float per score.
  options.regime = Regime::decode;
  REQUIRE(fovea::make_plan(large, {1, 32, 8, 1, 65536, 128, 128}, options).ok());
  CHECK(fovea::workspace_bytes(large, 2) < std::size_t{8} << 20);
}

TEST_CASE("the longest tasks come first, and lanes end at about the same time", "[plan][lanes]") {
  InOrder pool;
  const auto check = [&](const char* what, const fovea::AttentionShape& shape, AttentionOptions options) {
    options.cpu.l2_bytes = index_t{1} << 20;
    for (const int lanes : {2, 3, 8}) {
      options.executor = {pool, lanes};
      fovea::Plan plan;
      REQUIRE(fovea::make_plan(plan, shape, options).ok());
      const std::vector<index_t> all = costs(plan), load = dealt(all, lanes);
      INFO(what << ", " << lanes << " lanes:\n" << plan.describe() << "tasks cost from " << all.back() << " to " << all.front());
      CHECK(all.size() >= static_cast<std::size_t>(4 * lanes));
      CHECK(all.front() > all.back());
      CHECK(std::is_sorted(all.begin(), all.end(), std::greater<>()));
      // Four tasks a lane, of which the last are the short ones, leave no lane a tenth above its even share.
      const index_t most = *std::max_element(load.begin(), load.end());
      const index_t total = std::accumulate(all.begin(), all.end(), index_t{0});
      CHECK(10 * most * lanes <= 11 * total);
      const index_t least = *std::min_element(load.begin(), load.end());
      if (shape.q_heads % lanes == 0 && shape.kv_heads == shape.q_heads) CHECK(most == least);
    }
  };
  AttentionOptions options;
  options.causal = Causal::top_left;
  check("causal, 8 heads", {1, 8, 8, 2048, 2048, 128, 128}, options);
  check("causal, a batch of 7", {7, 1, 1, 1000, 1000, 64, 64}, options);
  options.causal = Causal::none;
  check("decode", {1, 8, 1, 1, 400000, 128, 128}, options);   // 390 splits of 1024 keys, one of 640
  check("wide decode", {2, 8, 1, 8, 130000, 64, 64}, options);
}

TEST_CASE("the plan describes what it will do", "[plan]") {
  const std::vector<index_t> cu_q{0, 1, 301}, cu_k{0, 3000, 3300};
  const auto check = [](const fovea::AttentionShape& shape, const AttentionOptions& options,
                        std::initializer_list<const char*> lines) {
    fovea::Plan plan, same;
    REQUIRE(fovea::make_plan(plan, shape, options).ok());
    REQUIRE(fovea::make_plan(same, shape, options).ok());
    const std::string text = plan.describe();
    INFO(text);
    const auto contains = [&](const std::string& words) { CHECK_THAT(text, Catch::Matchers::ContainsSubstring(words)); };
    for (const char* line : lines) contains(line + std::string("\n"));
    contains("isa         " FOVEA_ARCH_NAME "\n");
    contains("workspace   " + std::to_string(fovea::workspace_bytes(plan, 1)) + " bytes for 1 lanes\n");
    CHECK(text.back() == '\n');
    CHECK(same.describe() == text);
    fovea::AttentionShape longer = shape;
    longer.q_heads *= 2;
    REQUIRE(fovea::make_plan(same, longer, options).ok());
    CHECK(same.describe() != text);
  };
  const std::string packed = "tiles       " + std::to_string(fovea::packed_rows(fovea::Panels::f32)) + " rows x 256 keys, f32 panels";
  AttentionOptions options;
  check({1, 8, 2, 2048, 2048, 64, 48}, options,
        {"regime      prefill (K and V packed per key tile)", packed.c_str(), "heads       8 query, 2 kv (group 4), dims 64/48",
         "key splits  0 blocks split, at most 1 splits of 1024 keys"});
  check({2, 8, 2, 1, 5000, 64, 64}, options,
        {"regime      decode (K and V read in place)", "tiles       16 rows x 256 keys, no panels",
         "tasks       20 tasks in 4 blocks of up to 16 rows, 2 sequences",
         "key splits  4 blocks split, at most 5 splits of 1024 keys"});
  check({1, 8, 1, 20, 3000, 64, 64}, options,
        {"regime      wide decode (K and V packed per key tile, keys split)", packed.c_str(),
         "key splits  1 blocks split, at most 3 splits of 1024 keys"});
  options.cu_len_q = cu_q, options.cu_len_k = cu_k;
  check({1, 8, 2, 301, 3300, 64, 64}, options,
        {"regime      mixed, by the rows of each sequence", packed.c_str(),
         "key splits  2 blocks split, at most 3 splits of 1024 keys"});
}

TEST_CASE("a workspace on an odd address of exactly the size asked for", "[plan][workspace]") {
  const Dense x(104, 1, 4, 2, 3, 1100, 32, 32);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const Result own = attend(x, options);
    fovea::Plan plan;
    REQUIRE(fovea::make_plan(plan, shape_of(x), options).ok());
    for (const std::size_t misalign : {0u, 1u, 4u, 63u}) {
      PoisonedBytes workspace(fovea::workspace_bytes(plan, 1), misalign);
      Result r = unwritten(x.q.view(), x.v.view());
      options.workspace = workspace.bytes();
      options.lse = r.lse_view();
      REQUIRE(fovea::attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options).ok());
      CHECK(workspace.guards_intact());
      CHECK(same_bits(own, r));
      options.workspace = {};
    }
  }
}

TEST_CASE("lse is optional and changes no bit of out", "[plan]") {
  const Dense x(105, 1, 4, 2, 9, 700, 16, 16);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const Result with = attend(x, options);
    Result without = unwritten(x.q.view(), x.v.view());
    REQUIRE(fovea::attention(x.q.view(), x.k.view(), x.v.view(), without.out.view(), options).ok());
    CHECK(same_bits(with.out.data, without.out.data));
    for (float value : without.lse) CHECK(is_canary(value));
  }
}

TEST_CASE("prepare and run_lane on the caller's threads", "[plan][lanes]") {
  for (const Regime regime : kRegimes) {
    const Dense x(106, 2, 6, 2, 33, 650, 24, 40);
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    const Result direct = attend(x, options);
    for (const int lanes : {1, 2, 3, 8}) {
      // Lanes that never come must not be waited for: any one of them can do all the work.
      for (const int present : {lanes, 1}) {
        InOrder pool;
        options.executor = {pool, lanes};
        fovea::Plan plan;
        REQUIRE(fovea::make_plan(plan, shape_of(x), options).ok());
        PoisonedBytes workspace(fovea::workspace_bytes(plan, lanes));
        Result r = unwritten(x.q.view(), x.v.view());
        options.workspace = workspace.bytes();
        options.lse = r.lse_view();
        fovea::AttentionRun run;
        const fovea::Status status = fovea::prepare(run, plan, x.q.view(), x.k.view(), x.v.view(), r.out.view(), options);
        INFO(status.message());
        REQUIRE(status.ok());
        std::vector<std::thread> threads;
        for (int lane = lanes - present; lane < lanes; ++lane) {
          threads.emplace_back([&run, lane] { fovea::run_lane(run, lane); });
        }
        for (std::thread& thread : threads) thread.join();
        INFO(lanes << " lanes, " << present << " present, regime " << name(regime));
        CHECK(workspace.guards_intact());
        CHECK(same_bits(direct, r));
        options.workspace = {};
        options.lse = {};
        options.executor = {};
      }
    }
  }
}

TEST_CASE("a run can be prepared again", "[plan][lanes]") {
  const Dense x(107, 1, 2, 1, 20, 600, 16, 16), y(108, 1, 2, 1, 20, 600, 16, 16);
  AttentionOptions options;
  options.regime = Regime::decode;
  fovea::Plan plan;
  REQUIRE(fovea::make_plan(plan, shape_of(x), options).ok());
  std::vector<std::byte> bytes(fovea::workspace_bytes(plan, 1));
  fovea::AttentionRun run;
  for (const Dense* one : {&x, &y, &x}) {
    AttentionOptions plain;
    plain.regime = Regime::decode;
    const Result direct = attend(*one, plain);
    Result r = unwritten(one->q.view(), one->v.view());
    options.workspace = bytes;
    options.lse = r.lse_view();
    REQUIRE(fovea::prepare(run, plan, one->q.view(), one->k.view(), one->v.view(), r.out.view(), options).ok());
    fovea::run_lane(run, 0);
    CHECK(same_bits(direct, r));
  }
}

TEST_CASE("calls from several threads at once do not share state", "[plan][threads]") {
  constexpr int count = 4;
  std::vector<Dense> problems;
  std::vector<Result> expected, got;
  for (std::uint64_t n = 0; n < count; ++n) {
    problems.emplace_back(109 + 5 * n, 1, 4, 2, 10 + static_cast<index_t>(n), 300, 16, 16);
    expected.push_back(attend(problems.back()));
    got.push_back(unwritten(problems.back().q.view(), problems.back().v.view()));
  }
  bool all_ok[count] = {};
  std::vector<std::thread> threads;
  for (std::size_t n = 0; n < count; ++n) {
    threads.emplace_back([&, n] {
      all_ok[n] = true;
      for (int repeat = 0; repeat < 10; ++repeat) {
        AttentionOptions options;
        options.lse = got[n].lse_view();
        const Dense& x = problems[n];
        all_ok[n] = fovea::attention(x.q.view(), x.k.view(), x.v.view(), got[n].out.view(), options).ok() && all_ok[n];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::size_t n = 0; n < count; ++n) {
    CHECK(all_ok[n]);
    CHECK(same_bits(expected[n], got[n]));
  }
}

namespace {

// A work-stealing pool may run another attention call on a thread that is inside one already.
struct Reentrant {
  const Dense& inner;
  Result& inner_result;
  bool inside = false, inner_ok = true;

  void run(int lanes, fovea::LaneFunction f) {
    for (int lane = 0; lane < lanes; ++lane) {
      if (!inside) {
        inside = true;
        AttentionOptions options;
        options.lse = inner_result.lse_view();
        inner_ok = fovea::attention(inner.q.view(), inner.k.view(), inner.v.view(), inner_result.out.view(), options).ok() &&
                   inner_ok;
        inside = false;
      }
      f(lane);
    }
  }
};

}  // namespace

TEST_CASE("a call inside a call on the same thread keeps both right", "[plan][threads]") {
  const Dense outer(120, 1, 4, 2, 20, 700, 32, 32), inner(121, 1, 8, 2, 60, 400, 64, 64);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const Result outer_alone = attend(outer, options), inner_alone = attend(inner);
    Result inner_result = unwritten(inner.q.view(), inner.v.view());
    Reentrant pool{inner, inner_result};
    options.executor = {pool, 3};
    const Result outer_result = attend(outer, options);
    CHECK(pool.inner_ok);
    CHECK(same_bits(outer_alone, outer_result));
    CHECK(same_bits(inner_alone, inner_result));
  }
}
