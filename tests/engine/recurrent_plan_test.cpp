// SPDX-License-Identifier: Apache-2.0
#include "fovea/engine/recurrent_plan.hpp"

#include <vector>

#include "fovea/adapters/std_threads.hpp"
#include "fovea/mechanisms/gated_delta.hpp"
#include "fovea/mechanisms/log_linear.hpp"
#include "catch_compat.hpp"

using namespace fovea;

namespace {

constexpr RecurrentKind kKinds[] = {{Written::additive, false}, {Written::additive, true}, {Written::delta, false},
                                    {Written::delta, true},     {Written::dplr, true}};

// A call that nothing runs: shapes and where a state would be.
struct Asked {
  RecurrentRun run;
  RecurrentOptions<float> options;
  float state = 0;

  explicit Asked(index_t len, index_t dim_k = 128, index_t dim_v = 128, index_t heads = 4) {
    run.shape = {1, len, 1, heads, heads, heads, heads, heads, dim_k, dim_v};
    run.final_state = bhsd(&state, 1, heads, dim_k, dim_v);
  }
  RecurrentPlan plan(const RecurrentKind& kind) const { return plan_recurrent(run, options, kind); }
};

}   // namespace

TEST_CASE("recurrent plans: every kind of update has rows for every width of vectors, dims rising", "[recurrent_plan]") {
  for (const index_t lanes : {4, 8, 16}) {
    for (const RecurrentKind& kind : kKinds) {
      index_t last = 0;
      for (const FormLimits& row : kFormLimits) {
        if (row.lanes != lanes || row.written != kind.written || row.by_key != kind.by_key) continue;
        CHECK(row.dim > last);
        CHECK(row.step_up_to >= 1);
        CHECK(row.chunk >= 1);
        CHECK(row.chunk <= 256);
        last = row.dim;
      }
      INFO("lanes " << lanes << ", kind " << static_cast<int>(kind.written) << ", by key " << kind.by_key);
      CHECK(last > 0);
    }
  }
}

TEST_CASE("recurrent plans: a state takes the row of the largest measured one that is not larger", "[recurrent_plan]") {
  for (const RecurrentKind& kind : kKinds) {
    CHECK(form_limits(kind, 1, 1).dim == form_limits(kind, 32, 32).dim);
    CHECK(form_limits(kind, 64, 64).dim == 64);
    CHECK(form_limits(kind, 32, 128).dim == 64);
    CHECK(form_limits(kind, 127, 128).dim == 64);
    CHECK(form_limits(kind, 128, 128).dim == 128);
    CHECK(form_limits(kind, 4096, 4096).dim == 256);
  }
}

TEST_CASE("recurrent plans: few tokens in place, more in chunks, by the table", "[recurrent_plan]") {
  for (const RecurrentKind& kind : kKinds) {
    for (const index_t dim : {64, 128}) {
      const FormLimits& limits = form_limits(kind, dim, dim);
      const index_t longest = std::max(limits.step_up_to, limits.fused_up_to);
      CHECK(Asked(1, dim, dim).plan(kind).form == RecurrentForm::step);
      CHECK(Asked(limits.step_up_to, dim, dim).plan(kind).form == RecurrentForm::step);
      const RecurrentPlan chunked = Asked(longest + 1, dim, dim).plan(kind);
      CHECK(chunked.form == RecurrentForm::chunked);
      CHECK(chunked.chunk == limits.chunk);
      // Without a place for the state, or with one that is strided, it lives in the workspace.
      for (const bool strided : {false, true}) {
        Asked nowhere(limits.fused_up_to, dim, dim);
        if (strided) {
          nowhere.run.final_state.stride[3] = 2;
        } else {
          nowhere.run.final_state = {};
        }
        CHECK((limits.fused_up_to == 0 || nowhere.plan(kind).form == RecurrentForm::fused));
        nowhere.run.shape.len = limits.fused_up_to + 1;
        CHECK(nowhere.plan(kind).form == RecurrentForm::chunked);
      }
    }
  }
}

TEST_CASE("recurrent plans: what is asked for is done, or replaced by what can be", "[recurrent_plan]") {
  const RecurrentKind kind{Written::delta, false};
  Asked asked(4000);
  asked.options.form = RecurrentForm::step;
  CHECK(asked.plan(kind).form == RecurrentForm::step);
  asked.options.form = RecurrentForm::fused;
  CHECK(asked.plan(kind).form == RecurrentForm::fused);
  asked.options.form = RecurrentForm::chunked;
  asked.options.chunk = 48;
  CHECK(asked.plan(kind).chunk == 48);
  asked.options = {};
  asked.options.form = RecurrentForm::step;
  asked.run.final_state = {};
  CHECK(asked.plan(kind).form == RecurrentForm::fused);
  // Every token reads the state after the last one: once over the tokens to write, once to read.
  Asked last(1);
  last.run.read_last = true;
  CHECK(last.plan(kind).form == RecurrentForm::chunked);
}

TEST_CASE("recurrent plans: the longest sequence of a ragged call decides", "[recurrent_plan]") {
  const RecurrentKind kind{Written::delta, false};
  const std::vector<index_t> short_ones{0, 1, 1, 3}, one_long{0, 1, 1, 200};
  Asked asked(200);
  asked.run.shape.sequences = 3;
  asked.options.cu_len = short_ones;
  CHECK(asked.plan(kind).form == RecurrentForm::step);
  asked.options.cu_len = one_long;
  CHECK(asked.plan(kind).form == RecurrentForm::chunked);
}

TEST_CASE("recurrent plans: tasks are every column of every state once", "[recurrent_plan]") {
  for (const int lanes : {1, 2, 16}) {
    for (const index_t heads : {1, 3, 32}) {
      for (const index_t len : {1, 500}) {
        Asked asked(len, 128, 80, heads);
        asked.run.shape.sequences = 2;
        StdThreads threads(lanes);
        asked.options.executor = Executor(threads, lanes);
        const RecurrentPlan plan = asked.plan({Written::additive, false});
        CHECK(plan.tasks == 2 * plan.groups * plan.tiles);
        CHECK(plan.groups * plan.group >= heads);
        CHECK((plan.groups - 1) * plan.group < heads);
        const index_t panels = value_panels(asked.run.shape);
        CHECK(plan.tiles * plan.tile_panels >= panels);
        CHECK((plan.tiles - 1) * plan.tile_panels < panels);
      }
    }
  }
}

TEST_CASE("recurrent plans: levels are stepped one state a task, whatever the form of a single state", "[recurrent_plan]") {
  for (const RecurrentKind& kind : {RecurrentKind{Written::additive, false}, RecurrentKind{Written::delta, false}}) {
    const FormLimits& limits = form_limits(kind, 128, 128);
    for (index_t len = 1; len <= limits.step_up_to + 1; ++len) {
      const Asked asked(len);
      float levels = 0;
      LevelRun run;
      static_cast<RecurrentRun&>(run) = asked.run;
      run.final_state = {};
      run.levels = 5;
      run.final_levels = {&levels, {1, 4, 5, 128, 128}, {0, 0, 0, 128, 1}};
      const RecurrentPlan plan = plan_levels(run, asked.options, kind);
      INFO(len << " tokens");
      CHECK((plan.form == RecurrentForm::step) == (len <= limits.step_up_to));
      if (plan.form == RecurrentForm::step) CHECK(plan.group == 1);
      run.final_levels = {};
      CHECK(plan_levels(run, asked.options, kind).form != RecurrentForm::step);
    }
  }
}

TEST_CASE("recurrent plans: a call says what it does", "[recurrent_plan]") {
  constexpr index_t kLen = 70, kDim = 16;
  const std::vector<float> rows(kLen * kDim, 0.1f), gates(kLen, -0.1f), ones(kLen * 8, 1.f);
  std::vector<float> out(kLen * kDim), state(kDim * kDim);
  const auto call = [&](index_t len, RecurrentOptions<float> options) {
    RecurrentPlan plan;
    options.plan = &plan;
    const auto x = bhsd(rows.data(), 1, 1, len, kDim);
    const Status status = gated_delta_net(x, x, x, {bhsd(gates.data(), 1, 1, len, 1)}, bhsd(ones.data(), 1, 1, len, 1),
                                          bhsd(out.data(), 1, 1, len, kDim), options);
    INFO(status.message());
    CHECK(status.ok());
    return plan;
  };
  const auto states = bhsd(state.data(), 1, 1, kDim, kDim);
  const RecurrentPlan prompt = call(kLen, {.final_state = states}), token = call(1, {.initial_state = states, .final_state = states});
  CHECK(prompt.form == RecurrentForm::chunked);
  CHECK(token.form == RecurrentForm::step);
  CHECK(call(1, {}).form == RecurrentForm::fused);
  CHECK(call(1, {.form = RecurrentForm::step}).form == RecurrentForm::fused);   // there is no state to step on
  const std::string words = describe(prompt), step = describe(token);
  INFO(words << step);
  CHECK(words.find("chunked") != std::string::npos);
  CHECK(words.find(std::to_string(prompt.chunk) + " tokens, f32 panels") != std::string::npos);
  CHECK(words.find(FOVEA_ARCH_NAME) != std::string::npos);
  CHECK(step.find("step") != std::string::npos);
  CHECK(step.find("chunk       none") != std::string::npos);

  RecurrentPlan levels;
  const auto x = bhsd(rows.data(), 1, 1, kLen, kDim);
  const Status status = log_linear_simple_gla(x, x, x, {bhsd(gates.data(), 1, 1, kLen, 1)},
                                              {.level_weight = bhsd(ones.data(), 1, 1, kLen, 8)}, bhsd(out.data(), 1, 1, kLen, kDim),
                                              {.plan = &levels});
  INFO(status.message());
  REQUIRE(status.ok());
  CHECK(levels.form == RecurrentForm::chunked);
  CHECK(levels.chunk == kLevelChunk);
}
