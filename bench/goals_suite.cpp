// SPDX-License-Identifier: Apache-2.0
// The dashboard: reads the table of goals, measures the rows it names and says which goals are reached.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <sstream>
#include <string_view>
#include <vector>

#include "support/measure.hpp"
#include "support/report.hpp"
#include "support/suites.hpp"

namespace fovea_bench {
namespace {

// One line of the table. Every row whose whole name matches `rows` is held against the target and the worst one counts.
// `against`, where the kind compares two rows, makes the other row's name out of the match ($1, $2 ...).
struct Goal {
  std::string id, rows, against, kind;
  bool at_least = true;
  double target = 0;
  bool applies = true;   // elsewhere its figure is shown and judges nothing

  bool is_worse(double a, double b) const { return at_least ? a < b : a > b; }
  bool is_met(double reached) const { return at_least ? reached >= target : reached <= target; }
};

[[noreturn]] void stop(const std::string& file, int line, const std::string& why) {
  std::fprintf(stderr, "fovea_bench: %s:%d: %s\n", file.c_str(), line, why.c_str());
  std::exit(1);
}

constexpr std::string_view kBest = "/fovea_best";

// A name that ends in fovea_best means the faster kind of panels, of those this build has.
std::vector<std::string> choices_of(const std::string& name) {
  if (!name.ends_with(kBest)) return {name};
  const std::string problem = name.substr(0, name.size() - kBest.size());
  return {problem + "/fovea", problem + "/fovea_bf16"};
}

bool compares_two_rows(const std::string& kind) {
  return kind == "time_ratio" || kind == "extra_time" || kind == "rate_ratio";
}

std::vector<Goal> read_goals(const std::string& file, const std::string& filter) {
  std::ifstream stream(file);
  if (!stream) stop(file, 0, "cannot be read");
  const std::set<std::string> kinds{"of_peak",   "of_bf16_peak", "of_bandwidth", "microseconds", "allocations",
                                    "max_error", "time_ratio",   "extra_time",   "rate_ratio"};
  const std::regex wanted(filter);
  std::vector<Goal> goals;
  std::string line;
  for (int number = 1; std::getline(stream, line); ++number) {
    if (line.empty() || line[0] == '#') continue;
    std::vector<std::string> fields;
    std::stringstream split(line);
    for (std::string field; std::getline(split, field, '\t');) fields.push_back(field);
    if (fields.size() != 6 && fields.size() != 7)
      stop(file, number, "expected 6 or 7 fields, tabs between, found " + std::to_string(fields.size()));
    Goal goal{fields[0], fields[1], fields[2], fields[3], fields[4] == "at_least", std::atof(fields[5].c_str())};
    if (kinds.count(goal.kind) == 0) stop(file, number, "unknown kind '" + goal.kind + "'");
    if (!goal.at_least && fields[4] != "at_most") stop(file, number, "'" + fields[4] + "' is neither at_least nor at_most");
    if (compares_two_rows(goal.kind) == (goal.against == "-")) stop(file, number, "kind and second row do not fit together");
    if (fields.size() == 7) {
      if (fields[6] != "bf16_dot" && fields[6] != "no_bf16_dot") stop(file, number, "unknown condition '" + fields[6] + "'");
      goal.applies = (fields[6] == "bf16_dot") == kHasBf16Peak;
    }
    if (std::regex_search(goal.id, wanted)) goals.push_back(goal);
  }
  return goals;
}

// What a goal asks to be measured: the row, and the one it is compared with (or an empty name). Rows that should have a
// partner and have none (measured with one thread only, say) are left out.
std::vector<std::pair<std::string, std::string>> pairs_of(const Goal& goal, const std::set<std::string>& names) {
  const std::regex pattern(goal.rows);
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const std::string& name : names) {
    std::smatch match;
    if (!std::regex_match(name, match, pattern)) continue;
    const std::string other = goal.against == "-" ? "" : match.format(goal.against);
    if (other.empty() || names.count(other) != 0) pairs.emplace_back(name, other);
  }
  return pairs;
}

struct Measured {
  const Result* result = nullptr;
  std::size_t group = 0;
};

// NaN if the row was refused. Ratios are taken window by window, then the median: both rows had the same minute.
double reached_by(const Goal& goal, const Result& row, const Result* other) {
  if (!row.refusal.empty()) return std::numeric_limits<double>::quiet_NaN();
  if (goal.kind == "allocations") return row.allocations;
  if (goal.kind == "max_error") return row.max_error;
  std::vector<double> values;
  for (std::size_t at = 0; at < row.samples.size(); ++at) {
    const Sample& sample = row.samples[at];
    if (goal.kind == "of_peak") values.push_back(row.of_peak(sample));
    if (goal.kind == "of_bf16_peak" && row.bf16_limit) values.push_back(row.of_bf16_peak(sample));
    if (goal.kind == "of_bandwidth") values.push_back(row.of_bandwidth(sample));
    if (goal.kind == "microseconds") values.push_back(sample.seconds * 1e6);
    if (other == nullptr || at >= other->samples.size()) continue;
    const double ratio = sample.seconds / other->samples[at].seconds;
    if (goal.kind == "time_ratio") values.push_back(ratio);
    if (goal.kind == "extra_time") values.push_back(ratio - 1);
    if (goal.kind == "rate_ratio") values.push_back(row.flops / other->flops / ratio);
  }
  return median(values);
}

}  // namespace

int run_goals(const SuiteOptions& options) {
  const std::vector<Goal> goals = read_goals(options.goals, options.filter);
  if (goals.empty()) {
    std::fprintf(stderr, "fovea_bench: no goal matches '%s'\n", options.filter.c_str());
    return 1;
  }
  Machine machine(static_cast<int>(usable_cores().size()));
  std::vector<Group> groups = all_groups(machine.threads());
  std::set<std::string> names;
  for (const Group& group : groups) {
    for (const Row& row : group.rows) {
      names.insert(row.name);
      if (row.name.ends_with("/fovea")) names.insert(row.name + "_best");
    }
  }
  std::set<std::string> needed;
  for (const Goal& goal : goals) {
    for (const auto& [row, other] : pairs_of(goal, names)) {
      for (const std::string& name : {row, other}) {
        for (const std::string& choice : choices_of(name)) needed.insert(choice);
      }
    }
  }

  for (const auto& [key, value] : describe_machine(machine)) std::printf("%-22s %s\n", key.c_str(), value.c_str());
  for (Group& group : groups) std::erase_if(group.rows, [&](const Row& row) { return needed.count(row.name) == 0; });
  std::erase_if(groups, [](const Group& group) { return group.rows.empty(); });
  std::size_t rows = 0;
  for (const Group& group : groups) rows += group.rows.size();
  std::printf("%zu goals, %zu rows\n\n", goals.size(), rows);
  print_row_header();
  const Effort effort = options.quick ? Effort{3, 0.3} : Effort{7, 1};
  std::vector<std::vector<Result>> results(groups.size());
  std::map<std::string, Measured> measured;
  for (std::size_t at = 0; at < groups.size(); ++at) {
    results[at] = measure(machine, groups[at], effort);
    print_rows(results[at]);
    for (const Result& result : results[at]) measured[result.name] = {&result, at};
  }

  const auto result_of = [&](const std::string& name) {
    Measured best;
    for (const std::string& choice : choices_of(name)) {
      const auto place = measured.find(choice);
      if (place == measured.end()) continue;
      const Measured& found = place->second;
      const bool faster = best.result == nullptr || !best.result->refusal.empty() ||
                          (found.result->refusal.empty() && median_seconds(*found.result) < median_seconds(*best.result));
      if (faster) best = found;
    }
    return best;
  };
  std::printf("\n%-36s %10s %10s  %-7s %s\n", "goal", "target", "reached", "verdict", "worst row");
  nlohmann::ordered_json report = {{"goals", nlohmann::ordered_json::array()}};
  bool complete = true;
  for (const Goal& goal : goals) {
    double reached = std::numeric_limits<double>::quiet_NaN();
    std::string worst = "no such row";
    for (const auto& [name, other_name] : pairs_of(goal, names)) {
      const Measured row = result_of(name), other = other_name.empty() ? Measured{} : result_of(other_name);
      double value = std::numeric_limits<double>::quiet_NaN();
      if (!other_name.empty() && (other.result == nullptr || other.group != row.group)) {
        worst = name + ": not measured in turns with " + other_name;
        reached = value;
        break;
      }
      value = reached_by(goal, *row.result, other.result);
      if (std::isnan(reached) || std::isnan(value) || goal.is_worse(value, reached)) {
        reached = value;
        worst = row.result->refusal.empty() ? row.result->name : row.result->name + ": " + row.result->refusal;
      }
      if (std::isnan(value)) break;
    }
    complete = complete && (!goal.applies || !std::isnan(reached));
    const bool met = !std::isnan(reached) && goal.is_met(reached);
    const char* const verdict = !goal.applies ? "info" : met ? "ok" : "short";
    std::printf("%-36s %2s%8.3g %10.3f  %-7s %s\n", goal.id.c_str(), goal.at_least ? ">=" : "<=", goal.target, reached,
                verdict, worst.c_str());
    if (goal.applies)
      report["goals"].push_back({{"id", goal.id}, {"target", goal.target}, {"reached", reached}, {"verdict", verdict}});
  }
  if (!options.json.empty() && !(std::ofstream(options.json) << report.dump(2) << std::endl)) {
    std::fprintf(stderr, "fovea_bench: cannot write %s\n", options.json.c_str());
    return 1;
  }
  if (!complete) std::fprintf(stderr, "fovea_bench: some goals could not be measured\n");
  return complete ? 0 : 1;
}

}  // namespace fovea_bench
