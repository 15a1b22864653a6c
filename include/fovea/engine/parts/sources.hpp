// SPDX-License-Identifier: Apache-2.0
// Where K and V are: every home of core/kv.hpp behind one type, because a switch per run of keys costs nothing beside reading
// them, and one type means one instantiation of the engine.
#pragma once
#include <algorithm>
#include <cstring>

#include "../../core/kv.hpp"
#include "../key_ranges.hpp"
#include "../plan.hpp"
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Rows between a row and the one to prefetch beside it.
FOVEA_INLINE index_t rows_ahead(Format format, index_t dim) {
  return std::max<index_t>(kPrefetchBytes / row_bytes(format, dim), 1);
}

struct StoredSource {
  Kv kv;
  const Sequence* sequences;   // [sequence]
  KvKernels kernels, exact_kernels;

  Run run(const Row& row, index_t begin, index_t end) const {
    if (kv.exact == nullptr) return run_of(kv, kernels, row, begin, end);
    const index_t first = kv.exact_first, from = kv.exact_from[static_cast<std::size_t>(row.sequence)];
    if (begin >= from) {
      const index_t shift = from - std::min(first, from);
      return run_of(*kv.exact, exact_kernels, row, begin - shift, end - shift);
    }
    if (begin < first) return run_of(*kv.exact, exact_kernels, row, begin, std::min({end, first, from}));
    return run_of(kv, kernels, row, begin, std::min(end, from));
  }

 private:
  struct Place {
    index_t entry, position;
  };

  Run run_of(const Kv& home, const KvKernels& reads, const Row& row, index_t begin, index_t end) const {
    const Sequence& sequence = sequences[row.sequence];
    const auto at = [&](const Stored& stored, Place place) {
      return stored.data + place.entry * stored.stride[0] + row.kv_head * stored.stride[1] +
             place.position * stored.stride[2];
    };
    if (home.home == Home::paged) {
      // The run ends with its page, or where what it prefetches does.
      const index_t near_k = in_pages(rows_ahead(home.k.format, home.dim_qk), home.len);
      const index_t near_v = in_pages(rows_ahead(home.v.format, home.dim_v), home.len);
      const index_t page = begin / home.len, slot = begin - page * home.len;
      const Place place{entry(home, row.sequence, page), slot};
      // Pages behind the middle of a mixed cache are not in use.
      const index_t in_use =
          home.exact == nullptr ? sequence.len_k : home.exact_from[static_cast<std::size_t>(row.sequence)];
      index_t count = std::min(end - begin, home.len - place.position);
      const auto segment = [&](const Stored& stored, index_t near) {
        const std::byte* const data = at(stored, place);
        if (begin + near >= in_use) return Segment{data, stored.stride[2], 0, kPrefetchBytes};
        // A handful of steps at most, where a second and third division would cost more than the run's bookkeeping.
        index_t next_page = page, next_slot = slot + near;
        for (; next_slot >= home.len; next_slot -= home.len) ++next_page;
        const Place next{entry(home, row.sequence, next_page), next_slot};
        if (home.len > near) count = std::min(count, home.len - next.position);
        return Segment{data, stored.stride[2], 0, at(stored, next) - data};
      };
      Run run{segment(home.k, near_k), segment(home.v, near_v), &reads};
      run.k.count = run.v.count = count;
      return run;
    }
    Place place{sequence.kv_batch, sequence.k_begin + begin};
    index_t count = end - begin;
    if (home.home == Home::ring) {
      if (begin < home.sinks) {
        count = std::min(count, home.sinks - begin);
      } else {
        const index_t slots = home.len - home.sinks;
        const index_t turned = (home.ring_begin[static_cast<std::size_t>(row.sequence)] + begin - home.sinks) % slots;
        place.position = home.sinks + turned;
        count = std::min(count, slots - turned);
      }
    }
    const auto segment = [&](const Stored& stored, index_t near) {
      const index_t stride = home.len > 1 ? stored.stride[2] : 0;   // that of an exact part of one position may be anything
      return Segment{at(stored, place), stride, count, near * stride};
    };
    return {segment(home.k, rows_ahead(home.k.format, home.dim_qk)), segment(home.v, rows_ahead(home.v.format, home.dim_v)),
            &reads};
  }

  // Whole pages where pages are small, so that what lies ahead of a run is a run, too.
  static index_t in_pages(index_t near, index_t page) {
    return 2 * near < page ? near : std::max<index_t>((near + page / 2) / page, 1) * page;
  }

  static std::int32_t entry(const Kv& home, int sequence, index_t page) {
    return home.block_table
               ? home.block_table.data[sequence * home.block_table.stride[0] + page * home.block_table.stride[1]]
               : home.page_indices[static_cast<std::size_t>(home.page_begin[static_cast<std::size_t>(sequence)] + page)];
  }
};

// A StoredSource for rows whose plan counts more heads than there are kv heads.
struct SharedHeads {
  StoredSource stored;
  index_t heads_per_kv;
  Run run(const Row& asked, index_t begin, index_t end) const {
    Row row = asked;
    row.kv_head = static_cast<int>(row.kv_head / heads_per_kv);
    return stored.run(row, begin, end);
  }
};

// A StoredSource seen through lists of keys. Neighbouring keys are read in place; scattered ones are copied together first, in
// the format they are stored in: one copy for all rows that share the list, in a cache that the kernels then read.
struct ListSource {
  StoredSource stored;
  const KeyRanges* lists;
  index_t heads_per_kv;   // plan heads of a kv head: lists may belong to query heads

  void positions(const Row& row, index_t begin, index_t end, std::int32_t* to) const {
    lists->positions(lists->list_of(row.sequence, row.kv_head, row.q_index), begin, end + kPositionsAhead, to);
  }

  Run run(const Row& asked, const std::int32_t* positions, index_t count, Want want, std::byte* gathered) const {
    Row row = asked;
    row.kv_head = static_cast<int>(row.kv_head / heads_per_kv);
    const index_t together = neighbours(positions, count);
    if (together == count || together >= kInPlace) return in_place(row, positions, together, want);
    return gather(row, positions, count, want, gathered);
  }

 private:
  static constexpr index_t kInPlace = 8;   // shorter runs of neighbours are copied

  static index_t neighbours(const std::int32_t* positions, index_t count) {
    index_t n = 1;
    while (n < count && positions[n] == positions[0] + n) ++n;
    return n;
  }
  // Read row by row, the last rows of a run prefetch what stands after it in the list; four keys are read at once.
  Run in_place(const Row& row, const std::int32_t* positions, index_t count, Want want) const {
    Run run = stored.run(row, positions[0], positions[0] + count);
    const Kv& kv = stored.kv;
    if (want == Want::both || kv.home == Home::paged) return run;
    const index_t near = std::max(near_rows(kv.k.format, kv.dim_qk), near_rows(kv.v.format, kv.dim_v));
    const index_t inner = (run.k.count - near) / 4 * 4;
    if (inner > 0) {
      run.k.count = run.v.count = inner;
      return run;
    }
    const auto lead = [&](Segment& segment, const Stored& rows, index_t dim, const auto& of) {
      const index_t next = positions[near_rows(rows.format, dim)];
      segment.ahead = of(stored.run(row, next, next + 1)) - segment.data;
    };
    lead(run.k, kv.k, kv.dim_qk, [](const Run& next) { return next.k.data; });
    lead(run.v, kv.v, kv.dim_v, [](const Run& next) { return next.v.data; });
    return run;
  }
  static index_t near_rows(Format format, index_t dim) { return std::min(rows_ahead(format, dim), kPositionsAhead); }

  Run gather(const Row& row, const std::int32_t* positions, index_t count, Want want, std::byte* gathered) const {
    const Run first = stored.run(row, positions[0], positions[0] + 1);
    const Kv& kv = first.kernels == &stored.exact_kernels ? *stored.kv.exact : stored.kv;
    const index_t k_row = row_bytes(kv.k.format, kv.dim_qk), v_row = row_bytes(kv.v.format, kv.dim_v);
    // The head of K: one copy serves both.
    const index_t inside = first.v.data - first.k.data;
    const bool shared = want == Want::both && inside >= 0 && inside + v_row <= k_row && kv.k.stride == kv.v.stride;
    const bool keys = want != Want::values, values = want != Want::keys && !shared;
    std::byte* const k_to = gathered;
    std::byte* const v_to = shared ? gathered + inside : gathered + kGatherRows * gathered_row(kv.dim_qk);
    const index_t ahead = std::min(near_rows(kv.k.format, kv.dim_qk), kGatherRows);
    index_t n = 0;
    for (; n < std::min(count, kGatherRows); ++n) {
      if (n > 0 && n % 4 == 0 && neighbours(positions + n, std::min(count - n, kInPlace)) == kInPlace) break;
      const Run from = stored.run(row, positions[n], positions[n] + 1);
      if (from.kernels != first.kernels) break;
      const Run next = stored.run(row, positions[n + ahead], positions[n + ahead] + 1);
      if (keys) copy_row(from.k.data, next.k.data, k_row, k_to + n * k_row);
      if (values) copy_row(from.v.data, next.v.data, v_row, v_to + n * v_row);
    }
    return {{k_to, k_row, n, 0}, {v_to, shared ? k_row : v_row, n, 0}, first.kernels};
  }
  FOVEA_INLINE static void copy_row(const std::byte* from, const std::byte* next, index_t bytes, std::byte* to) {
    for (index_t at = 0; at < bytes; at += 64) prefetch(next, at);
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
