// SPDX-License-Identifier: Apache-2.0
// The shapes of softmax attention: the 32 heads of a 7B model, and 8 where a row would take seconds (all heads do the same work, and
// 8 divide evenly over the threads).
#include "support/attention_row.hpp"

namespace fovea_bench {
namespace {

AttentionRow prefill(index_t dim, index_t len, bool causal, index_t q_heads = 8, index_t kv_heads = 8) {
  AttentionRow row;
  row.regime = "prefill";
  row.dim_qk = row.dim_v = dim;
  row.len_q = row.len_k = len;
  row.q_heads = q_heads;
  row.kv_heads = kv_heads;
  row.causal = causal;
  return row;
}

AttentionRow decode(index_t len_k, index_t kv_heads, Memory memory) {
  AttentionRow row;
  row.regime = "decode";
  row.len_k = len_k;
  row.q_heads = 32;
  row.kv_heads = kv_heads;
  row.memory = memory;
  return row;
}

AttentionRow front_door(index_t dim, index_t len_q, index_t len_k, bool causal, index_t q_heads, index_t kv_heads) {
  AttentionRow row = prefill(dim, len_q, causal, q_heads, kv_heads);
  row.regime = "call";
  row.len_k = len_k;
  return row;
}

class Table {
 public:
  explicit Table(int max_threads) : max_threads_(max_threads) {}

  Group& group(const AttentionRow& row) {
    groups_.emplace_back();
    groups_.back().title = problem_name(row);
    return groups_.back();
  }

  // One and two threads, in turns.
  void add(Group& group, AttentionRow row, Impl impl) {
    row.impl = impl;
    for (int threads = 1; threads <= std::min(2, max_threads_); ++threads) {
      row.threads = threads;
      group.rows.push_back(make_row(row));
    }
  }
  void add_one_thread(Group& group, AttentionRow row, Impl impl) {
    row.impl = impl;
    group.rows.push_back(make_row(row));
  }

  std::vector<Group> take() { return std::move(groups_); }

 private:
  int max_threads_;
  std::vector<Group> groups_;
};

void add_prefill(Table& table) {
  for (const index_t len : {2048, 4096}) {
    const index_t heads = len > 2048 ? 8 : 32;
    const AttentionRow row = prefill(128, len, false, heads, heads);
    Group& group = table.group(row);
    table.add(group, row, Impl::fovea);
    table.add(group, row, Impl::eigen);
    group.slow = len > 2048;
  }
  for (const index_t kv_heads : {32, 8}) {
    for (const index_t len : {2048, 4096}) {
      const AttentionRow row = prefill(128, len, true, 32, kv_heads);
      Group& group = table.group(row);
      table.add(group, row, Impl::fovea);
      table.add(group, row, Impl::eigen);
      group.slow = len > 2048;
    }
  }
  for (const bool causal : {false, true}) {
    const AttentionRow row = prefill(64, 2048, causal, 32, 32);
    Group& group = table.group(row);
    table.add(group, row, Impl::fovea);
    table.add(group, row, Impl::eigen);
  }
  {
    const AttentionRow row = prefill(128, 512, true, 32, 32);
    Group& group = table.group(row);
    table.add(group, row, Impl::fovea);
    table.add(group, row, Impl::eigen);
    table.add_one_thread(group, row, Impl::scalar);   // measured at 3 GFLOP/s: 0.7 s per call
  }
  constexpr std::pair<index_t, index_t> kOtherDims[] = {{72, 72}, {80, 80}, {96, 96}, {112, 112}, {192, 128}, {256, 256}};
  for (const auto& [dim_qk, dim_v] : kOtherDims) {
    for (const bool causal : {false, true}) {
      AttentionRow row = prefill(dim_qk, 2048, causal);
      row.dim_v = dim_v;
      Group& group = table.group(row);
      table.add_one_thread(group, row, Impl::fovea);
      table.add_one_thread(group, row, Impl::eigen);
      group.slow = causal;
    }
  }
  {
    AttentionRow row = prefill(128, 8192, true);
    row.window_keys = 512;
    Group& group = table.group(row);
    table.add(group, row, Impl::fovea);
    table.add(group, row, Impl::eigen);
  }
}

// What an extra costs is the ratio to the bare kernel in the same minute, so they share a group.
void add_extras(Table& table) {
  AttentionRow row = prefill(128, 2048, true);
  Group& group = table.group(row);
  group.title += " and its extras";
  for (const Extra extra : {Extra::none, Extra::softcap, Extra::alibi, Extra::sink, Extra::bias}) {
    row.extra = extra;
    table.add_one_thread(group, row, Impl::fovea);
  }
  row.extra = Extra::none;
  table.add_one_thread(group, row, Impl::eigen);
}

void add_decode(Table& table) {
  for (const index_t kv_heads : {32, 8}) {
    for (const index_t len : {16384, 65536}) {
      const AttentionRow row = decode(len, kv_heads, Memory::streamed);
      Group& group = table.group(row);
      table.add(group, row, Impl::fovea);
      table.add(group, row, Impl::eigen);
      group.window = 0.08;
      group.slow = len > 16384;
    }
  }
  const AttentionRow cached = decode(512, 8, Memory::cached);
  Group& group = table.group(cached);
  table.add(group, cached, Impl::fovea);
  table.add(group, cached, Impl::eigen);
  table.add_one_thread(group, cached, Impl::scalar);
  group.window = 0.02;
}

// Small and middling calls through the front door, planning included: where a fixed cost per call would show.
void add_calls(Table& table) {
  const auto add = [&](const AttentionRow& row) {
    Group& group = table.group(row);
    table.add_one_thread(group, row, Impl::fovea);
    table.add_one_thread(group, row, Impl::eigen);
    group.window = 0.003;
    group.turns = 3;
    if (attention_flops(row) < 1e7) table.add_one_thread(group, row, Impl::scalar);   // a few milliseconds per call
    group.slow = attention_flops(row) > 1e9;
  };
  for (const auto& [q_heads, kv_heads] : {std::pair<index_t, index_t>{1, 1}, {8, 2}}) {
    for (const index_t dim : {32, 64, 128}) {
      for (const index_t len : {1, 4, 16, 64, 256, 1024}) {
        add(front_door(dim, len, len, false, q_heads, kv_heads));
        if (len > 1) add(front_door(dim, len, len, true, q_heads, kv_heads));
      }
    }
  }
  for (const auto& [q_heads, kv_heads] : {std::pair<index_t, index_t>{8, 8}, {8, 2}}) {
    for (const index_t dim : {64, 128}) {
      for (const index_t len_k : {16, 64, 256, 1024, 4096}) add(front_door(dim, 1, len_k, false, q_heads, kv_heads));
    }
  }
}

}  // namespace

std::vector<Group> softmax_groups(int max_threads) {
  Table table(max_threads);
  add_prefill(table);
  add_extras(table);
  add_decode(table);
  add_calls(table);
  return table.take();
}

}  // namespace fovea_bench
