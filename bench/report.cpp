// SPDX-License-Identifier: Apache-2.0
#include "support/report.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "fovea/core/config.hpp"
#include "support/allocations.hpp"

#ifndef FOVEA_BENCH_FLAGS
#define FOVEA_BENCH_FLAGS "unknown"
#endif

namespace fovea_bench {
namespace {

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  char buffer[256];
  va_list values;
  va_start(values, format);
  std::vsnprintf(buffer, sizeof buffer, format, values);
  va_end(values);
  return buffer;
}

std::string cpu_name() {
  std::string name = "unknown";
  if (std::FILE* const file = std::fopen("/proc/cpuinfo", "r")) {
    char line[512];
    while (std::fgets(line, sizeof line, file) != nullptr) {
      const char* const colon = std::strchr(line, ':');
      if (std::strncmp(line, "model name", 10) != 0 || colon == nullptr) continue;
      name = colon + 2;
      while (!name.empty() && name.back() == '\n') name.pop_back();
      break;
    }
    std::fclose(file);
  }
  return name;
}

template <class Figure>
double median_of(const Result& result, Figure figure) {
  std::vector<double> values;
  for (const Sample& sample : result.samples) values.push_back(figure(sample));
  return median(values);
}

constexpr int kNameWidth = 72;

}  // namespace

std::vector<std::pair<std::string, std::string>> describe_machine(Machine& machine) {
  std::vector<std::pair<std::string, std::string>> lines;
  lines.emplace_back("cpu", cpu_name());
#if defined(__clang__)
  lines.emplace_back("compiler", "clang " __clang_version__);
#else
  lines.emplace_back("compiler", "g++ " __VERSION__);
#endif
  lines.emplace_back("flags", FOVEA_BENCH_FLAGS);
  lines.emplace_back("instruction_set", FOVEA_ARCH_NAME);
  for (int threads = 1; threads <= std::min(2, machine.threads()); ++threads) {
    const Limits limits = machine.careful_limits(threads);
    lines.emplace_back(text("fma_peak_t%d", threads), text("%.1f GFLOP/s", limits.gflops));
    if (kHasBf16Peak) lines.emplace_back(text("bf16_peak_t%d", threads), text("%.1f GFLOP/s", limits.bf16_gflops));
    lines.emplace_back(text("dram_read_t%d", threads), text("%.1f GB/s", limits.gbps));
  }
  return lines;
}

double median_seconds(const Result& result) {
  return median_of(result, [](const Sample& sample) { return sample.seconds; });
}

double spread(const Result& result) {
  const auto faster = [](const Sample& a, const Sample& b) { return a.seconds < b.seconds; };
  const auto [least, most] = std::minmax_element(result.samples.begin(), result.samples.end(), faster);
  return result.samples.empty() ? 0 : (most->seconds - least->seconds) / median_seconds(result);
}

std::string readable_time(double seconds) {
  if (seconds < 1e-6) return text("%.0f ns", seconds * 1e9);
  if (seconds < 1e-3) return text("%.4g us", seconds * 1e6);
  return seconds < 1 ? text("%.4g ms", seconds * 1e3) : text("%.4g s", seconds);
}

void print_row_header() {
  std::printf("%-*s %10s %7s %8s %7s %8s %8s %8s %8s %6s\n", kNameWidth, "row (medians)", "time", "spread", "gflops", "gbps",
              "of_peak", "of_bf16", "of_bandw", "max_err", "allocs");
  std::fflush(stdout);
}

void print_rows(const std::vector<Result>& results) {
  for (const Result& result : results) {
    if (!result.refusal.empty()) {
      std::printf("%-*s refused: %s\n", kNameWidth, result.name.c_str(), result.refusal.c_str());
      continue;
    }
    const double seconds = median_seconds(result);
    const double of_peak = median_of(result, [&](const Sample& sample) { return result.of_peak(sample); });
    const double of_bf16_peak = median_of(result, [&](const Sample& sample) { return result.of_bf16_peak(sample); });
    const double of_bandwidth = median_of(result, [&](const Sample& sample) { return result.of_bandwidth(sample); });
    std::printf("%-*s %10s %6.1f%% %8.2f %7.2f %7.1f%% %8s %8s %8.1e %6s\n", kNameWidth, result.name.c_str(),
                readable_time(seconds).c_str(), 100 * spread(result), result.flops / seconds * 1e-9,
                result.bytes / seconds * 1e-9, 100 * of_peak,
                result.bf16_limit ? text("%.1f%%", 100 * of_bf16_peak).c_str() : "-",
                result.streamed ? text("%.1f%%", 100 * of_bandwidth).c_str() : "-", result.max_error,
                allocations_are_counted() ? text("%.3g", result.allocations).c_str() : "-");
  }
  std::fflush(stdout);
}

}  // namespace fovea_bench
