// SPDX-License-Identifier: Apache-2.0
// The shapes of softmax attention over caches of 16, 8 and 4 bits: decode from memory, shared prefixes, latents, ragged
// mixes, and prefill against its f32 twin.
#include "support/stored_row.hpp"

namespace fovea_bench {
namespace {

using fovea::Panels;
using fovea::Regime;

StoredRow decode(index_t sequences, index_t len, index_t kv_heads) {
  StoredRow row;
  row.cache.sequences = sequences;
  row.cache.len = len;
  row.cache.kv_heads = kv_heads;
  row.memory = Memory::streamed;
  return row;
}

StoredRow in_format(StoredRow row, Format k, Format v) {
  row.cache.k_format = k;
  row.cache.v_format = v;
  return row;
}
StoredRow in_format(const StoredRow& row, Format format) { return in_format(row, format, format); }

StoredRow in_place(StoredRow row, Place place, index_t page_size = 16) {
  row.cache.place = place;
  row.cache.page_size = page_size;
  return row;
}

StoredRow in_suites(StoredRow row, unsigned suites) {
  row.suites = suites;
  return row;
}

class Table {
 public:
  explicit Table(int max_threads) : max_threads_(std::min(2, max_threads)) {}

  Group& group(const std::string& title) {
    groups_.emplace_back();
    groups_.back().title = title;
    return groups_.back();
  }

  // One and two threads, in turns.
  void add(Group& group, StoredRow row) const {
    for (row.threads = 1; row.threads <= max_threads_; ++row.threads) group.rows.push_back(make_row(row));
  }
  void add_most_threads(Group& group, StoredRow row) const {
    row.threads = max_threads_;
    group.rows.push_back(make_row(row));
  }
  static void add_one_thread(Group& group, const StoredRow& row) { group.rows.push_back(make_row(row)); }

  // What `add` does, for both kinds of panels where this build has both.
  template <class Add>
  static void both_panels(StoredRow row, const Add& add) {
    add(row);
    row.panels = Panels::bf16;
    if (fovea::kHasBf16Dot) add(row);
  }

  std::vector<Group> take() { return std::move(groups_); }

 private:
  int max_threads_;
  std::vector<Group> groups_;
};

// bf16, f16 and the quantised formats in groups of their own, because the caches of a group are in memory together: 3.5 GB
// with batch 8 of the quantised ones.
void add_decode(Table& table) {
  for (const index_t sequences : {1, 8}) {
    for (const index_t kv_heads : {32, 8}) {
      for (const index_t len : {16384, 65536}) {
        const StoredRow plain = decode(sequences, len, kv_heads);
        const auto group = [&](const StoredRow& first) -> Group& {
          Group& made = table.group(problem_name(first));
          made.window = 0.08;
          made.slow = len > 16384 || sequences > 1;
          return made;
        };
        const bool in_storage = sequences == 1 && len == 16384;
        const unsigned suites = in_storage ? kDecode + kStorage : kDecode;

        const StoredRow bf16 = in_suites(in_format(plain, Format::bf16), suites);
        Group& wide = group(bf16);
        table.add(wide, bf16);
        if (len == 16384) table.add(wide, in_place(bf16, Place::paged));
        if (in_storage && kv_heads == 8) {
          for (const index_t page_size : {1, 64, 256})
            table.add(wide, in_suites(in_place(bf16, Place::paged, page_size), kStorage));
          table.add(wide, in_suites(in_place(bf16, Place::ring), kStorage));
          table.add(wide, in_suites(in_place(bf16, Place::token_major), kStorage));
        }
        const StoredRow f16 = in_suites(in_format(plain, Format::f16), suites);
        table.add(group(f16), f16);

        Group& quantised = group(in_format(plain, Format::i8_token));
        for (const Format format : {Format::i8_token, Format::i4_g32, Format::e4m3})
          table.add(quantised, in_suites(in_format(plain, format), suites));
        if (!in_storage || kv_heads == 8) continue;
        for (const Format format : {Format::i4_g64, Format::i4_g32_zero, Format::i4_g64_zero, Format::e5m2})
          table.add(quantised, in_suites(in_format(plain, format), kStorage));
        table.add(quantised, in_suites(in_format(plain, Format::i8_channel, Format::i8_token), kStorage));
        table.add(quantised, in_suites(in_format(plain, Format::i8_token, Format::i4_g32), kStorage));
      }
    }
  }
}

// 16 requests that begin with the same 8192 tokens and have 64 of their own; the same without sharing, every request with
// its own copy of the prefix; and the part of the work that is shared, alone.
void add_cascade(Table& table) {
  constexpr index_t kRequests = 16, kPrefix = 8192, kOwn = 64;
  Group& group = table.group("cascade of 16 requests");
  group.window = 0.08;
  StoredRow cascade = decode(kRequests, kOwn, 32);
  cascade.regime = "cascade";
  cascade.kv_name = std::to_string(kPrefix) + "_" + std::to_string(kOwn);
  cascade.lens_q.assign(kRequests, 1);
  cascade.shared_keys = kPrefix;
  cascade.bf16_limit = true;
  Table::both_panels(cascade, [&](const StoredRow& row) { table.add_most_threads(group, row); });

  StoredRow prefix = decode(1, kPrefix, 32);
  prefix.regime = "cascade_prefix";
  prefix.len_q = kRequests;
  prefix.bf16_limit = true;
  Table::both_panels(prefix, [&](const StoredRow& row) { table.add_most_threads(group, row); });
  prefix.forced = Regime::wide_decode;
  Table::both_panels(prefix, [&](const StoredRow& row) { table.add_most_threads(group, row); });

  StoredRow apart = decode(kRequests, kPrefix + kOwn, 32);
  table.add_most_threads(group, apart);
}

// MLA in the absorbed form: all heads on one latent of 512 + 64 numbers, V its first 512.
void add_latent(Table& table) {
  for (const index_t q_heads : {16, 128}) {
    StoredRow row = decode(1, 4096, 1);
    row.q_heads = q_heads;
    row.cache.dim_qk = fovea::kLatentFp8Dim;
    row.cache.dim_v = fovea::kLatentFp8Values;
    row.cache.latent = true;
    row.memory = Memory::cached;   // 4.7 MB
    row.bf16_limit = true;
    Group& group = table.group(problem_name(row));
    const auto add = [&](const StoredRow& added) { Table::add_one_thread(group, added); };
    row.suites = kDecode + kStorage;
    Table::both_panels(row, add);
    StoredRow wide = row;
    wide.forced = Regime::wide_decode;
    wide.suites = kDecode;
    if (q_heads <= 16) Table::both_panels(wide, add);
    row = in_suites(in_format(row, Format::latent_fp8), kStorage);
    Table::both_panels(row, add);
  }
}

// One call with a prefill of 512 tokens and 31 decodes on 1024, 1536 ... 16384 keys; and the same as two calls, the prefill
// and the decodes.
void add_mix(Table& table) {
  StoredRow row = in_place(decode(32, 16384, 8), Place::paged);
  row.regime = "mix";
  row.q_name = "512_1";
  row.kv_name = "512_16384";
  row.causal = true;
  row.lens_q.assign(32, 1);
  row.lens_q[0] = 512;
  row.cache.lengths = {512};
  for (index_t len = 1024; len <= 16384; len += 512) row.cache.lengths.push_back(len);
  Group& group = table.group("ragged mix");
  group.window = 0.08;
  table.add(group, row);
  row.regime = "mix_parts";
  row.alone = 1;
  table.add(group, row);
}

// What other storage costs in prefill, against f32 and against bf16 in both kinds of panels.
void add_prefill(Table& table) {
  StoredRow row;
  row.regime = "prefill";
  row.cache.len = row.len_q = 4096;
  row.q_heads = row.cache.kv_heads = 8;
  row.causal = true;
  row.bf16_limit = true;
  row.suites = kStorage;
  Group& group = table.group("prefill from other storage");
  StoredRow f32 = in_format(row, Format::f32);
  f32.bf16_limit = false;
  table.add(group, f32);
  for (const Format format : {Format::bf16, Format::i8_token})
    Table::both_panels(in_format(row, format), [&](const StoredRow& added) { table.add(group, added); });
  for (const Format format : {Format::f16, Format::i4_g32, Format::e4m3})
    Table::both_panels(in_format(row, format), [&](const StoredRow& added) { Table::add_one_thread(group, added); });
}

}   // namespace

std::vector<Group> softmax_stored_groups(int max_threads) {
  Table table(max_threads);
  add_decode(table);
  add_cascade(table);
  add_latent(table);
  add_mix(table);
  add_prefill(table);
  return table.take();
}

}   // namespace fovea_bench
