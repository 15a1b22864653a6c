// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <set>
#include <string>

#include "support/rows.hpp"

namespace fovea_bench {

std::vector<Group> all_groups(int max_threads) {
  constexpr std::vector<Group> (*kTables[])(int) = {
      &softmax_groups, &softmax_stored_groups, &variant_groups, &block_mask_groups, &differential_groups, &elu_groups,
      &entmax_groups, &gated_groups, &head_mixtures_groups, &hydra_groups, &kv_bias_groups, &multi_token_groups,
      &off_by_one_groups, &registers_groups, &relative_bias_groups, &relu_groups, &shaw_groups, &sigmoid_groups,
      &softpick_groups, &transformer_xl_groups,
      &linear_groups, &retention_groups, &lightning_groups, &simple_gla_groups, &gla_groups, &mamba2_groups, &rwkv6_groups,
      &rwkv7_groups, &mlstm_groups, &mamba1_groups, &rwkv4_groups, &s4d_groups, &lolcats_groups, &performer_groups,
      &short_conv_groups, &log_linear_groups, &delta_groups, &gated_delta_groups, &kda_groups,
      &select_groups, &sparse_groups, &nsa_groups, &dsa_groups, &quest_groups, &adamas_groups, &moba_groups,
      &sparse_transformer_groups, &longformer_groups, &bigbird_groups, &block_local_groups, &star_groups,
      &vertical_slash_groups, &xattention_groups, &flex_prefill_groups, &mosa_groups, &reformer_groups, &routing_groups,
      &eviction_groups};
  std::vector<Group> groups;
  for (const auto table : kTables) {
    std::vector<Group> more = table(max_threads);
    groups.insert(groups.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
  }
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
