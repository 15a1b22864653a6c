// SPDX-License-Identifier: Apache-2.0
// Quest (Tang et al. 2024, arXiv 2406.10774): per query and q head the pages of keys with the highest upper bound of a
// score,
//   bound(page) = sum_d max(q_d M_d, q_d m_d) >= max over the page's keys of q . k,
// M and m the largest and smallest value of channel d among the (rotated) keys of the page; then softmax over their keys.
// With q+ = max(q, 0) and q- = min(q, 0) the bound is q+ . M + q- . m, one dot product over a row of 2 dim numbers, read
// once and in order: 2 dim numbers a page instead of 32 dim, so a step reads 1/16 of K and V beside what it selects.
#pragma once
#include "../call/query_lists.hpp"
#include "../call/sparse_call.hpp"
#include "../simd/numbers.hpp"
#include "../simd/select.hpp"

namespace fovea {
inline namespace v0 {

struct QuestOptions {
  index_t page = 16;         // keys of a page; bounds are made for it
  index_t budget = 2048;     // keys of the selected pages, so budget / page pages
  index_t least_pages = 1;   // never fewer; the paper's Python evaluation takes 3
  bool current_page =
      true;   // the page of the last key a query sees is always one of them, as in the CUDA kernels; the Python
              // evaluation lets it compete
};

inline namespace FOVEA_ARCH {

constexpr index_t quest_pages(const QuestOptions& quest) {
  return std::max({quest.budget / quest.page, quest.least_pages, index_t{1}});
}

namespace quest_bounds {

inline constexpr index_t kPagesAtOnce = 4;

// to[i] = parts . row i, count rows of `numbers` numbers. `parts` has zeros up to whole pairs of vectors.
template <index_t Bytes, f32 (*Load)(const std::byte*), f32 (*LoadSome)(const std::byte*, index_t)>
FOVEA_NOINLINE void scores(const float* parts, index_t numbers, const std::byte* rows, index_t stride, index_t count,
                           float* to) {
  for (index_t first = 0; first < count; first += kPagesAtOnce) {
    const index_t here = std::min(kPagesAtOnce, count - first);
    const std::byte* row[kPagesAtOnce];
    f32 even[kPagesAtOnce], odd[kPagesAtOnce];
    for (index_t n = 0; n < kPagesAtOnce; ++n) {
      row[n] = rows + (first + std::min(n, here - 1)) * stride;
      even[n] = odd[n] = f32(0.f);
    }
    index_t d = 0;
    for (; d + 2 * kLanes <= numbers; d += 2 * kLanes) {
      const f32 one = load(parts + d), other = load(parts + d + kLanes);
      FOVEA_UNROLL
      for (index_t n = 0; n < kPagesAtOnce; ++n) {
        even[n] = fma(one, Load(row[n] + Bytes * d), even[n]);
        odd[n] = fma(other, Load(row[n] + Bytes * (d + kLanes)), odd[n]);
      }
    }
    for (; d < numbers; d += kLanes) {
      const f32 one = load(parts + d);
      for (index_t n = 0; n < kPagesAtOnce; ++n)
        even[n] = fma(one, LoadSome(row[n] + Bytes * d, std::min(kLanes, numbers - d)), even[n]);
    }
    alignas(f32) float sums[kPagesAtOnce];
    reduce_add4(even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3], sums);
    std::copy_n(sums, here, to + first);
  }
}

struct Scratch {
  float* parts;    // [2 dim, padded]  the query's positive numbers, then its negative ones
  float* scores;   // [page]
  TopKScratch top;
};
inline Scratch carve(Bump& bump, index_t dim, index_t pages, index_t k) {
  Scratch scratch{bump.take<float>(padded(2 * dim, kLanes)), bump.take<float>(pages), {}};
  const std::size_t bytes = top_k_scratch_bytes(pages, k);
  scratch.top = {bump.take<std::byte>(static_cast<index_t>(bytes)), bytes};
  return scratch;
}

// Selects for one query at a time.
struct Selector {
  Operand q, bounds;
  QuestOptions quest;
  index_t most_pages;   // of any sequence
  index_t capacity;     // of a list, enough for the budget or for all pages

  std::size_t lane_bytes() const {
    Bump bump;
    carve(bump, q.extent[3], most_pages, capacity);
    return bump.used();
  }

  // The bounds of the pages [begin, begin + count) for a query.
  void bounds_of(const door::QueryPlace& place, index_t begin, index_t count, const Scratch& scratch) const {
    const index_t dim = q.extent[3], bytes = row_bytes(bounds.format, 1);
    const index_t at = place.batch * q.stride[0] + place.q_head * q.stride[1] + place.row * q.stride[2];
    std::fill_n(scratch.parts, padded(2 * dim, kLanes), 0.f);
    float* const negative = scratch.parts + dim;
    read_numbers(q.format, q.data + at * row_bytes(q.format, 1), q.stride[3], dim, scratch.parts);
    for (index_t d = 0; d < dim; ++d) {
      const float x = scratch.parts[d];
      scratch.parts[d] = x > 0.f ? x : 0.f;
      negative[d] = x > 0.f ? 0.f : x;
    }
    const std::byte* const rows =
        bounds.data +
        (place.sequence * bounds.stride[0] + place.kv_head * bounds.stride[1] + begin * bounds.stride[2]) * bytes;
    const index_t stride = bounds.stride[2] * bytes;
    if (bounds.format == Format::bf16) {
      scores<2, load_bf16, load_bf16_some>(scratch.parts, 2 * dim, rows, stride, count, scratch.scores);
    } else {
      scores<4, load_f32, load_f32_some>(scratch.parts, 2 * dim, rows, stride, count, scratch.scores);
    }
  }

  void operator()(const door::QueryPlace& place, std::int32_t* to, std::byte* bytes) const {
    const index_t k = quest_pages(quest);
    index_t taken = 0;
    if (place.first < place.end) {
      const index_t begin = place.first / quest.page, last = (place.end - 1) / quest.page, count = last + 1 - begin;
      if (count <= k) {
        for (; taken < count; ++taken) to[taken] = static_cast<std::int32_t>(begin + taken);
      } else {
        Bump bump(bytes);
        const Scratch scratch = carve(bump, q.extent[3], most_pages, capacity);
        const index_t competing = quest.current_page ? count - 1 : count;
        bounds_of(place, begin, competing, scratch);
        taken =
            top_k({scratch.scores, static_cast<std::size_t>(competing)}, quest.current_page ? k - 1 : k, to, scratch.top);
        for (index_t i = 0; i < taken; ++i) to[i] += static_cast<std::int32_t>(begin);
        if (quest.current_page) to[taken++] = static_cast<std::int32_t>(last);
      }
    }
    std::fill(to + taken, to + capacity, -1);
  }
};

inline index_t most_pages(const AttentionShape& shape, const AttentionOptions& options, const QuestOptions& quest) {
  return (door::longest_keys(shape, options) + quest.page - 1) / quest.page;
}
inline Selector selector(const Operand& q, const Operand& bounds, const AttentionShape& shape,
                         const AttentionOptions& options, const QuestOptions& quest) {
  const index_t pages = most_pages(shape, options, quest);
  return {q, bounds, quest, pages, std::min(quest_pages(quest), std::max<index_t>(pages, 1))};
}

inline Status check(const Operand& q, const Operand& bounds, const AttentionShape& shape, const AttentionOptions& options,
                    const QuestOptions& quest) {
  if (quest.page < 1 || quest.page > door::kMaxLength || quest.budget < 1 || quest.least_pages < 0 ||
      quest_pages(quest) > door::kMaxLength)
    return door::invalid("fovea: quest: page %td, budget %td, least_pages %td: page and budget must be positive", quest.page,
                         quest.budget, quest.least_pages);
  if (bounds.format != Format::f32 && bounds.format != Format::bf16)
    return door::unsupported("fovea: quest: bounds are f32 or bf16, not %s",
                             static_cast<int>(bounds.format) < kFormats ? name_of(bounds.format) : "outside the enum");
  door::Bytes ignored;
  if (Status s = door::check_data("bounds", bounds, ignored); !s.ok()) return s;
  if (Status s = door::check_innermost("bounds", bounds); !s.ok()) return s;
  return door::check_kept("bounds", bounds.extent, shape, options, most_pages(shape, options, quest), 2 * q.extent[3]);
}

}   // namespace quest_bounds

// The pages of every query: lists [sequence, q_head, query, quest_pages(quest)], ascending, -1 behind the last one; a
// KeyLists of k_block = quest.page. bounds [sequence, kv_head, page, 2 dim] as PageBounds keeps them, f32 or bf16. options:
// causality, window, len_k and q_offset say what a query sees, without len_k all pages are full; the executor's lanes share
// the queries.
inline Status quest_select(const Operand& q_any, const Operand& bounds_any, const View<std::int32_t, 4>& lists_any,
                           const AttentionOptions& options = {}, const QuestOptions& quest = {}) {
  const Operand q = door::tidy_operand(q_any), bounds = door::tidy_operand(bounds_any);
  const View<std::int32_t, 4> lists = tidy(lists_any);
  door::Bytes ignored;
  if (Status s = door::check_plain("q", q.format); !s.ok()) return s;
  if (Status s = door::check_data("q", q, ignored); !s.ok()) return s;
  if (quest.page < 1 || quest.page > door::kMaxLength) return door::invalid("fovea: quest: page is %td", quest.page);
  const index_t len_k = options.len_k.empty() ? bounds.extent[2] * quest.page : door::longest_keys({}, options);
  const AttentionShape shape{q.extent[0], q.extent[1], bounds.extent[1], q.extent[2], len_k, q.extent[3], q.extent[3]};
  if (Status s = door::check_problem(shape, options); !s.ok()) return s;
  if (Status s = quest_bounds::check(q, bounds, shape, options, quest); !s.ok()) return s;
  const index_t k = quest_pages(quest);
  if (Status s = door::check_list_view(lists, shape, options, k); !s.ok()) return s;
  quest_bounds::Selector select = quest_bounds::selector(q, bounds, shape, options, quest);
  select.capacity = k;
  return door::select_into(shape, options, lists, select.lane_bytes(), select);
}

// Attention over the selected pages; the rest is fovea::attention's, the LSE counts the selected keys alone. kv in any home;
// keys are counted 0 .. len_k - 1 in pages of quest.page whatever its own pages are. Of a given options.workspace the
// selection takes the first quest_workspace_bytes, the attention the rest.
template <class Compiled = AllFormats>
Status quest_attention(const Operand& q_any, const Kv& kv, const Operand& bounds_any, const Result& out,
                       const AttentionOptions& options = {}, const QuestOptions& quest = {}) {
  const Operand q = door::tidy_operand(q_any), bounds = door::tidy_operand(bounds_any);
  if (Status s = door::check_selecting_call(q, kv, out, options); !s.ok()) return s;
  const AttentionShape shape = door::shape_of(q, kv, options);
  if (Status s = quest_bounds::check(q, bounds, shape, options, quest); !s.ok()) return s;
  door::Bytes bytes;
  if (Status s = door::check_data("bounds", bounds, bytes); !s.ok()) return s;
  if (Status s = door::check_learned("bounds", bytes, out, options); !s.ok()) return s;
  const quest_bounds::Selector select = quest_bounds::selector(q, bounds, shape, options, quest);
  return door::attend_query_lists<Compiled>(q, kv, out, shape, options, quest.page, select);
}
template <class TK, class TV>
Status quest_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Operand& bounds,
                       const Result& out, const AttentionOptions& options = {}, const QuestOptions& quest = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return quest_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), bounds, out, options, quest);
}

// What the selection takes of a workspace, for a call of these shapes.
inline std::size_t quest_workspace_bytes(const AttentionShape& shape, const AttentionOptions& options,
                                         const QuestOptions& quest = {}) {
  Operand q;
  q.extent[3] = shape.dim_qk;
  return door::query_lists_bytes(shape, options, quest_bounds::selector(q, {}, shape, options, quest));
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
