// SPDX-License-Identifier: Apache-2.0
// fovea_bench <suite>: `core`, `decode`, `storage`, `variants`, `recurrent` and `sparse` measure their rows and print a table,
// `goals` holds the rows of all suites against bench/goals.tsv.
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
  app.add_option("suite", suite, "core, decode, storage, variants, recurrent, sparse: their rows; goals: the dashboard")
      ->required()
      ->check(CLI::IsMember({"core", "decode", "storage", "variants", "recurrent", "sparse", "goals"}));
  app.add_option("--filter", options.filter, "Regular expression: row names, or goal ids (goals)");
  app.add_option("--json", options.json, "Also write the results to this file");
  app.add_option("--goals", options.goals, "The table of goals")->check(CLI::ExistingFile);
  app.add_flag("--quick", options.quick, "Fewer repetitions, shorter windows; all but goals leave out the longest rows");
  CLI11_PARSE(app, argc, argv);
  try {
    return suite == "goals" ? fovea_bench::run_goals(options) : fovea_bench::run_rows(fovea_bench::suite_of(suite), options);
  } catch (const std::regex_error& error) {
    std::fprintf(stderr, "fovea_bench: not a regular expression, in --filter or in %s: %s\n", options.goals.c_str(),
                 error.what());
    return 1;
  }
}
