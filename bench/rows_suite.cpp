// SPDX-License-Identifier: Apache-2.0
// The suites of rows: every row as a Google Benchmark with manual time. The first benchmark of a group measures the whole
// group in turns; the others play back what was measured then, one repetition per window, so that the JSON is Google
// Benchmark's own.
#include <benchmark/benchmark.h>

#include <cstdio>
#include <memory>
#include <regex>
#include <utility>

#include "support/allocations.hpp"
#include "support/measure.hpp"
#include "support/report.hpp"
#include "support/suites.hpp"

namespace fovea_bench {
namespace {

// A group and, once one of its benchmarks has run, its results.
struct MeasuredGroup {
  Group group;
  std::vector<Result> results;
};

class NoReporter final : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>&) override {}
};

// Row names without the settings Google Benchmark appends (/iterations:1/repeats:5/manual_time).
class PlainNames final : public benchmark::JSONReporter {
 public:
  void ReportRuns(const std::vector<Run>& runs) override {
    std::vector<Run> plain = runs;
    for (Run& run : plain) {
      benchmark::BenchmarkName name;
      name.function_name = run.run_name.function_name;
      run.run_name = name;
      run.cpu_accumulated_time = run.real_accumulated_time;   // the playback's own would mean nothing
    }
    benchmark::JSONReporter::ReportRuns(plain);
  }
};

void play_back(benchmark::State& state, const Result& result, std::size_t repetition) {
  if (!result.refusal.empty()) {
    state.SkipWithError(result.refusal.c_str());
    return;
  }
  const Sample& sample = result.samples[repetition % result.samples.size()];
  for (auto _ : state) state.SetIterationTime(sample.seconds);
  state.counters["gflops"] = result.gflops(sample);
  state.counters["gbps"] = result.gbps(sample);
  state.counters["of_peak"] = result.of_peak(sample);
  if (result.bf16_limit) state.counters["of_bf16_peak"] = result.of_bf16_peak(sample);
  if (result.streamed) state.counters["of_bandwidth"] = result.of_bandwidth(sample);
  state.counters["max_err"] = result.max_error;
  if (allocations_are_counted()) state.counters["allocations"] = result.allocations;
}

void register_group(Machine& machine, const std::shared_ptr<MeasuredGroup>& measured, const Effort& effort) {
  for (std::size_t at = 0; at < measured->group.rows.size(); ++at) {
    auto repetition = std::make_shared<std::size_t>(0);
    benchmark::RegisterBenchmark(measured->group.rows[at].name.c_str(),
                                 [&machine, measured, effort, at, repetition](benchmark::State& state) {
                                   if (measured->results.empty()) {
                                     measured->results = measure(machine, measured->group, effort);
                                     print_rows(measured->results);
                                   }
                                   play_back(state, measured->results[at], (*repetition)++);
                                 })
        ->UseManualTime()
        ->Iterations(1)
        ->Repetitions(effort.windows(measured->group))
        ->Unit(benchmark::kMicrosecond);
  }
}

}   // namespace

unsigned suite_of(const std::string& name) {
  constexpr std::pair<const char*, unsigned> kSuites[] = {{"core", kCore},           {"decode", kDecode},
                                                          {"storage", kStorage},     {"variants", kVariants},
                                                          {"recurrent", kRecurrent}, {"sparse", kSparse}};
  for (const auto& [known, flag] : kSuites) {
    if (name == known) return flag;
  }
  return 0;
}

int run_rows(unsigned suite, const SuiteOptions& options) {
  Machine machine(static_cast<int>(usable_cores().size()));
  const Effort effort = options.quick ? Effort{3, 0.3} : Effort{7, 1};
  const std::regex filter(options.filter);
  std::size_t rows = 0;
  for (Group& group : all_groups(machine.threads())) {
    if (options.quick && group.slow) continue;
    auto measured = std::make_shared<MeasuredGroup>();
    std::erase_if(group.rows,
                  [&](const Row& row) { return (row.suites & suite) == 0 || !std::regex_search(row.name, filter); });
    if (group.rows.empty()) continue;
    rows += group.rows.size();
    measured->group = std::move(group);
    register_group(machine, measured, effort);
  }
  if (rows == 0) {
    std::fprintf(stderr, "fovea_bench: no row matches '%s'\n", options.filter.c_str());
    return 1;
  }

  for (const auto& [key, value] : describe_machine(machine)) {
    std::printf("%-22s %s\n", key.c_str(), value.c_str());
    benchmark::AddCustomContext(key, value);
  }
  std::printf("%zu rows, %d windows each, short ones more\n\n", rows, effort.repetitions);
  print_row_header();

  std::string program = "fovea_bench", out = "--benchmark_out=" + options.json, format = "--benchmark_out_format=json";
  std::vector<char*> arguments{program.data()};
  if (!options.json.empty()) arguments.insert(arguments.end(), {out.data(), format.data()});
  int count = static_cast<int>(arguments.size());
  arguments.push_back(nullptr);
  benchmark::Initialize(&count, arguments.data());
  NoReporter silent;
  PlainNames json;
  if (options.json.empty()) {
    benchmark::RunSpecifiedBenchmarks(&silent);
  } else {
    benchmark::RunSpecifiedBenchmarks(&silent, &json);
  }
  benchmark::Shutdown();
  return 0;
}

}   // namespace fovea_bench
