// SPDX-License-Identifier: Apache-2.0
// Lists of keys for every query of every q head: what selectors of single queries (Quest, Adamas, MoBA) share. They are made
// on the executor's lanes, a query at a time, and live in the call's workspace while the attention over them runs.
#pragma once
#include <algorithm>
#include <utility>

#include "../core/key_lists.hpp"
#include "../engine/deal.hpp"
#include "sparse_call.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

// One query of one head and the keys first .. end - 1 that causality, window and lengths let it see. keep, bias and trees
// are not asked: they act on the selected keys.
struct QueryPlace {
  index_t sequence, q_head, kv_head, query;
  index_t batch, row;   // where it stands in q
  index_t first, end;
};

inline index_t longest_queries(const AttentionShape& shape, const AttentionOptions& options) {
  if (options.cu_len_q.empty()) return shape.len_q;
  index_t longest = 0;
  for (std::size_t b = 1; b < options.cu_len_q.size(); ++b)
    longest = std::max(longest, options.cu_len_q[b] - options.cu_len_q[b - 1]);
  return longest;
}

inline index_t query_lists(const AttentionShape& shape, const AttentionOptions& options) {
  return count_sequences(shape, options) * shape.q_heads * longest_queries(shape, options);
}

inline QueryPlace query_place(const AttentionShape& shape, const AttentionOptions& options, index_t sequence, index_t q_head,
                              index_t query) {
  const Sequence s = sequence_of(shape, options, sequence);
  const Reach reach = reach_of(options);
  const index_t pos = s.pos + query, first = std::clamp<index_t>(pos - reach.left, 0, s.len_k);
  const index_t end = std::clamp<index_t>(pos + reach.right + 1, 0, s.len_k);
  return {sequence,
          q_head,
          q_head / (shape.q_heads / shape.kv_heads),
          query,
          s.batch,
          s.q_begin + query,
          first,
          std::max(first, end)};
}

// f(lane, list, QueryPlace) for the queries of the call; list counts [sequence, q_head, query of the longest sequence].
// absent(list) for lists behind a shorter sequence's queries.
template <class F, class Absent>
void each_query(const AttentionShape& shape, const AttentionOptions& options, const F& f, const Absent& absent) {
  const index_t longest = longest_queries(shape, options), lists = query_lists(shape, options);
  deal(options.executor, options.executor.lanes(), lists, [&](int lane, index_t list) {
    const index_t query = list % longest, head = list / longest % shape.q_heads, sequence = list / longest / shape.q_heads;
    if (query < sequence_of(shape, options, sequence).len_q) {
      f(lane, list, query_place(shape, options, sequence, head, query));
    } else {
      absent(list);
    }
  });
}

// All that attention over the call's own keys would refuse, before a selector reads them.
inline Status check_selecting_call(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options) {
  if (Status s = check_call(tidy_operand(q), tidy_kv(kv), tidy_operand(out), options); !s.ok()) return s;
  const AttentionShape shape = shape_of(q, kv, options);
  if (Status s = check_problem(shape, options); !s.ok()) return s;
  return check_home(tidy_kv(kv), shape, options);
}

// What a selector keeps per sequence (bounds, codes, means) against the call: [sequence, kv_head, at least `rows`, numbers].
inline Status check_kept(const char* name, const std::array<index_t, 4>& extent, const AttentionShape& shape,
                         const AttentionOptions& options, index_t rows, index_t numbers) {
  if (!options.cu_len_k.empty())
    return unsupported("fovea: %s are kept per sequence, so keys take len_k, not cu_len_k", name);
  const index_t sequences = count_sequences(shape, options);
  if (extent[0] == sequences && extent[1] == shape.kv_heads && extent[2] >= rows && extent[3] == numbers) return {};
  return invalid("fovea: %s are [%td, %td, %td, %td], must be [%td, %td, at least %td, %td]", name, extent[0], extent[1],
                 extent[2], extent[3], sequences, shape.kv_heads, rows, numbers);
}
inline index_t longest_keys(const AttentionShape& shape, const AttentionOptions& options) {
  return options.len_k.empty() ? shape.len_k : *std::max_element(options.len_k.begin(), options.len_k.end());
}

// A view for the lists of a selector: [sequence, q_head, query, capacity], innermost stride 1.
inline Status check_list_view(const View<std::int32_t, 4>& to, const AttentionShape& shape, const AttentionOptions& options,
                              index_t capacity) {
  Bytes ignored;
  if (Status s = check_data("the lists", to, ignored); !s.ok()) return s;
  const std::array<index_t, 4> want{count_sequences(shape, options), shape.q_heads, longest_queries(shape, options),
                                    capacity};
  if (Status s = check_extents("the lists", to, want, "q and the budget"); !s.ok()) return s;
  if (capacity > 1 && to.stride[3] != 1)
    return unsupported("fovea: the lists have innermost stride %td, must be 1", to.stride[3]);
  return {};
}

struct QueryListWorkspace : LocalBytes {};

struct QueryListMemory {
  std::int32_t* entries;   // [lists, capacity]
  std::byte* scratch;      // [lane, lane_bytes]
};
inline QueryListMemory carve_query_lists(Bump& bump, const AttentionOptions& options, index_t lists, index_t capacity,
                                         std::size_t lane_bytes) {
  std::int32_t* const entries = bump.take<std::int32_t>(lists * capacity);
  return {entries, bump.take<std::byte>(options.executor.lanes() * static_cast<index_t>(lane_bytes))};
}
inline std::size_t list_memory_bytes(const AttentionOptions& options, index_t lists, index_t capacity,
                                     std::size_t lane_bytes) {
  Bump size;
  carve_query_lists(size, options, lists, capacity, lane_bytes);
  return size.used() + kAlignment;
}

// use(QueryListMemory, what is left of the caller's workspace).
template <class Use>
Status with_list_memory(const AttentionOptions& options, index_t lists, index_t capacity, std::size_t lane_bytes,
                        const Use& use) {
  const std::size_t wanted = list_memory_bytes(options, lists, capacity, lane_bytes);
  const auto run = [&](std::span<std::byte> bytes, std::span<std::byte> left) -> Status {
    if (Status s = check_workspace(bytes, wanted); !s.ok()) return s;
    Bump bump(aligned(bytes).data());
    return use(carve_query_lists(bump, options, lists, capacity, lane_bytes), left);
  };
  if (options.workspace.empty())
    return with_memory<QueryListWorkspace>([&](QueryListWorkspace& memory) { return run(memory.workspace(wanted), {}); });
  return run(options.workspace, options.workspace.subspan(std::min(options.workspace.size(), wanted)));
}

// select(place, to [capacity], scratch) writes one list, -1 behind its last entry; attend(KeyLists, workspace that is left).
template <class Select, class Attend>
Status with_query_lists(const AttentionShape& shape, const AttentionOptions& options, index_t capacity, index_t k_block,
                        std::size_t lane_bytes, const Select& select, const Attend& attend) {
  const index_t sequences = count_sequences(shape, options), longest = longest_queries(shape, options);
  const auto use = [&](const QueryListMemory& memory, std::span<std::byte> left) -> Status {
    std::int32_t* const entries = memory.entries;
    each_query(
        shape, options,
        [&](int lane, index_t list, const QueryPlace& place) {
          select(place, entries + list * capacity, memory.scratch + static_cast<std::size_t>(lane) * lane_bytes);
        },
        [&](index_t list) { std::fill_n(entries + list * capacity, capacity, -1); });
    KeyLists lists;
    lists.entries = entries;
    lists.capacity = capacity;
    lists.batch = sequences;
    lists.heads = shape.q_heads;
    lists.q_blocks = longest;
    lists.k_block = k_block;
    return attend(lists, left);
  };
  return with_list_memory(options, sequences * shape.q_heads * longest, capacity, lane_bytes, use);
}

// The same into lists of the caller's, a view that check_list_view has passed.
template <class Select>
Status select_into(const AttentionShape& shape, const AttentionOptions& options, const View<std::int32_t, 4>& lists,
                   std::size_t lane_bytes, const Select& select) {
  const auto use = [&](const QueryListMemory& memory, std::span<std::byte>) -> Status {
    const index_t longest = longest_queries(shape, options);
    const auto list_at = [&](index_t list) {
      return lists.data + list / longest / shape.q_heads * lists.stride[0] +
             list / longest % shape.q_heads * lists.stride[1] + list % longest * lists.stride[2];
    };
    each_query(
        shape, options,
        [&](int lane, index_t list, const QueryPlace& place) {
          select(place, list_at(list), memory.scratch + static_cast<std::size_t>(lane) * lane_bytes);
        },
        [&](index_t list) { std::fill_n(list_at(list), lists.extent[3], -1); });
    return {};
  };
  return with_list_memory(options, 0, 0, lane_bytes, use);
}

// Attention over the lists that select makes; the sparse call takes what they leave of the caller's workspace.
template <class Compiled, class Select>
Status attend_query_lists(const Operand& q, const Kv& kv, const Result& out, const AttentionShape& shape,
                          const AttentionOptions& options, index_t k_block, const Select& select) {
  return with_query_lists(shape, options, select.capacity, k_block, select.lane_bytes(), select,
                          [&](const KeyLists& lists, std::span<std::byte> left) {
                            AttentionOptions attend = options;
                            attend.workspace = left;
                            return sparse<Compiled>(q, kv, {&lists, 1}, out, attend);
                          });
}
// Bytes of a workspace that the lists take.
template <class Select>
std::size_t query_lists_bytes(const AttentionShape& shape, const AttentionOptions& options, const Select& select) {
  return list_memory_bytes(options, query_lists(shape, options), select.capacity, select.lane_bytes());
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
