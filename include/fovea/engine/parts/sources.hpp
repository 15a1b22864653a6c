// SPDX-License-Identifier: Apache-2.0
// Where K and V are: every home of core/kv.hpp behind one type, because a switch per run of keys costs nothing beside reading
// them, and one type means one instantiation of the engine.
#pragma once
#include <algorithm>

#include "../../core/kv.hpp"
#include "../plan.hpp"
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr index_t kPrefetchBytes = 4096;

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
      return stored.data + place.entry * stored.stride[0] + row.kv_head * stored.stride[1] + place.position * stored.stride[2];
    };
    if (home.home == Home::paged) {
      // The run ends with its page, or where what it prefetches does.
      const index_t near_k = rows_ahead(home.k.format, home.dim_qk), near_v = rows_ahead(home.v.format, home.dim_v);
      const index_t page = begin / home.len, slot = begin - page * home.len;
      const Place place{entry(home, row.sequence, page), slot};
      // Pages behind the middle of a mixed cache are not in use.
      const index_t in_use = home.exact == nullptr ? sequence.len_k : home.exact_from[static_cast<std::size_t>(row.sequence)];
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
      return Segment{at(stored, place), stored.stride[2], count, near * stored.stride[2]};
    };
    return {segment(home.k, rows_ahead(home.k.format, home.dim_qk)), segment(home.v, rows_ahead(home.v.format, home.dim_v)),
            &reads};
  }

  static std::int32_t entry(const Kv& home, int sequence, index_t page) {
    return home.block_table
               ? home.block_table.data[sequence * home.block_table.stride[0] + page * home.block_table.stride[1]]
               : home.page_indices[static_cast<std::size_t>(home.page_begin[static_cast<std::size_t>(sequence)] + page)];
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
