// SPDX-License-Identifier: Apache-2.0
// What a reader needs beside the figures: the machine, the compiler, the limits; and one line per row.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "measure.hpp"

namespace fovea_bench {

// Measures the limits of 1 and 2 threads on the way.
std::vector<std::pair<std::string, std::string>> describe_machine(Machine& machine);

void print_row_header();
void print_rows(const std::vector<Result>& results);

// The median over a result's windows, and how far its slowest and fastest window are apart, as a share of the median.
double median_seconds(const Result& result);
double spread(const Result& result);

// "12.3 us", at most four digits.
std::string readable_time(double seconds);

}  // namespace fovea_bench
