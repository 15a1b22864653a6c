// SPDX-License-Identifier: Apache-2.0
// The suites of the command line.
#pragma once
#include <string>

namespace fovea_bench {

struct SuiteOptions {
  std::string filter;   // regular expression: of row names, or of goal ids
  std::string json;     // file to write, or empty
  std::string goals;    // the table of goals
  bool quick = false;
};

// The flag in Row::suites of a suite of rows: core, decode, storage, variants, recurrent, sparse. 0: no such suite.
unsigned suite_of(const std::string& name);

// Both return the exit status of the program.
int run_rows(unsigned suite, const SuiteOptions& options);
int run_goals(const SuiteOptions& options);

}  // namespace fovea_bench
