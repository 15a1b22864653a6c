// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <set>
#include <string>

#include "support/rows.hpp"

namespace fovea_bench {

std::vector<Group> all_groups(int max_threads) {
  std::vector<Group> groups = softmax_groups(max_threads), stored = softmax_stored_groups(max_threads);
  groups.insert(groups.end(), std::make_move_iterator(stored.begin()), std::make_move_iterator(stored.end()));
  std::set<std::string> names;
  for (const Group& group : groups) {
    for (const Row& row : group.rows) {
      if (names.insert(row.name).second) continue;
      std::fprintf(stderr, "fovea_bench: there are two rows %s\n", row.name.c_str());
      std::exit(1);
    }
  }
  return groups;
}

}   // namespace fovea_bench
