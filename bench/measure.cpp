// SPDX-License-Identifier: Apache-2.0
#include "support/measure.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "support/allocations.hpp"

namespace fovea_bench {

double median(std::vector<double> values) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

Limits Machine::careful_limits(int threads) {
  Limits limits;
  limits.gflops = fma_gflops(pool_, threads, 0.05, 6);
  limits.bf16_gflops = bf16_gflops(pool_, threads, 0.05, 6);
  for (int pass = 0; pass < 3; ++pass) {
    limits.gbps = std::max(limits.gbps, bandwidth_.read_gbps(pool_, threads, BandwidthProbe::kBytes));
  }
  return limits;
}

Limits Machine::near_limits(int threads, const Result& row, double seconds) {
  Limits limits;
  limits.gflops = fma_gflops(pool_, threads, seconds, 2);
  if (row.bf16_limit) limits.bf16_gflops = bf16_gflops(pool_, threads, seconds, 2);
  if (row.streamed) limits.gbps = bandwidth_.read_gbps(pool_, threads, std::size_t{128} << 20);
  return limits;
}

RowMemory Machine::memory_for(std::size_t input_floats, std::size_t output_floats) {
  // Caches in other formats need the room that rows of f32 took before.
  const std::size_t bytes = input_floats * sizeof(float);
  if (inputs_.bytes() > std::max(16 * bytes, std::size_t{256} << 20)) inputs_.release();
  if (inputs_.reserve(bytes)) fill_random(inputs_.floats());
  outputs_.reserve(output_floats * sizeof(float));
  return {inputs_.floats(), outputs_.floats(), &pool_, nullptr};
}

namespace {

struct Turn {
  std::unique_ptr<PreparedRow> row;
  long calls = 1;
  bool warm_up = false;   // a call before each window: the probe and the other rows have emptied the caches
};

double time_calls(PreparedRow& row, long calls) {
  const double start = now();
  for (long call = 0; call < calls; ++call) row.call();
  return (now() - start) / static_cast<double>(calls);
}

// Prepares a row, checks its result and finds how many calls fill a window.
Turn first_calls(const Row& row, const RowMemory& memory, double window, Result& result) {
  Turn turn;
  turn.row = row.prepare(memory);
  // An output that is not written must not pass as right because an earlier row left the right answer there.
  // The pattern is a NaN of two halves that are NaN as well, in bf16 and in f16.
  std::fill_n(memory.outputs.begin(), row.output_floats, std::bit_cast<float>(0x7fc07fc0u));
  double seconds = time_calls(*turn.row, 1);
  result.refusal = turn.row->refusal();
  if (!result.refusal.empty()) return turn;
  result.max_error = turn.row->max_error();
  if (seconds < 0.05) seconds = std::min(seconds, time_calls(*turn.row, 1));
  if (seconds < 0.0005) seconds = std::min(seconds, time_calls(*turn.row, 20));
  turn.calls = std::max(1L, std::lround(window / seconds));
  turn.warm_up = row.memory == Memory::cached && seconds < 0.03;
  return turn;
}

}  // namespace

std::vector<Result> measure(Machine& machine, const Group& group, const Effort& effort) {
  std::size_t input_floats = 0, output_floats = 0;
  for (const Row& row : group.rows) {
    input_floats = std::max(input_floats, row.input_floats);
    output_floats = std::max(output_floats, row.output_floats);
  }
  GroupBuffers buffers;
  RowMemory memory = machine.memory_for(input_floats, output_floats);
  memory.buffers = &buffers;
  std::vector<Result> results;
  std::vector<Turn> turns;
  for (const Row& row : group.rows) {
    Result result;
    result.name = row.name;
    result.flops = row.flops;
    result.bytes = row.bytes;
    result.streamed = row.memory == Memory::streamed;
    result.bf16_limit = row.bf16_limit && kHasBf16Peak;
    turns.push_back(first_calls(row, memory, group.window * effort.window_scale, result));
    results.push_back(std::move(result));
  }
  const double probe = std::clamp(group.window / 3, 0.0005, 0.003);
  for (int repetition = 0; repetition < effort.windows(group); ++repetition) {
    for (std::size_t at = 0; at < turns.size(); ++at) {
      Result& result = results[at];
      if (!result.refusal.empty()) continue;
      const int threads = group.rows[at].threads;
      Turn& turn = turns[at];
      Sample sample;
      const Limits before = machine.near_limits(threads, result, probe);
      if (turn.warm_up) turn.row->call();
      const long allocations = allocations_so_far();
      sample.seconds = time_calls(*turn.row, turn.calls);
      result.allocations = static_cast<double>(allocations_so_far() - allocations) / static_cast<double>(turn.calls);
      const Limits after = machine.near_limits(threads, result, probe);
      // The clock moves between states within a second; the mean of the neighbours is the best guess at the window's own.
      sample.limit = {(before.gflops + after.gflops) / 2, (before.gbps + after.gbps) / 2,
                      (before.bf16_gflops + after.bf16_gflops) / 2};
      result.samples.push_back(sample);
    }
  }
  return results;
}

}  // namespace fovea_bench
