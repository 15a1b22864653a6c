// SPDX-License-Identifier: Apache-2.0
// fovea_bench <suite>: `core` measures every row and prints a table, `goals` holds the rows against bench/goals.tsv.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <regex>

#include "support/suites.hpp"

#ifndef FOVEA_BENCH_GOALS
#define FOVEA_BENCH_GOALS "bench/goals.tsv"
#endif

int main(int argc, char** argv) {
  CLI::App app{"Speed of fovea against the limits of this machine"};
  std::string suite;
  fovea_bench::SuiteOptions options;
  options.goals = FOVEA_BENCH_GOALS;
  app.add_option("suite", suite, "core: every row; goals: the dashboard")
      ->required()
      ->check(CLI::IsMember({"core", "goals"}));
  app.add_option("--filter", options.filter, "Regular expression: row names (core) or goal ids (goals)");
  app.add_option("--json", options.json, "Also write the results to this file");
  app.add_option("--goals", options.goals, "The table of goals")->check(CLI::ExistingFile);
  app.add_flag("--quick", options.quick, "Fewer repetitions, shorter windows; core also leaves out the longest rows");
  CLI11_PARSE(app, argc, argv);
  try {
    return suite == "core" ? fovea_bench::run_core(options) : fovea_bench::run_goals(options);
  } catch (const std::regex_error& error) {
    std::fprintf(stderr, "fovea_bench: not a regular expression, in --filter or in %s: %s\n", options.goals.c_str(),
                 error.what());
    return 1;
  }
}
