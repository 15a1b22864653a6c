// SPDX-License-Identifier: Apache-2.0
// What the mechanisms that put positions into the scores share: slopes and buckets as published, tables by distance, the
// product of queries and relative keys, and a call cut into blocks of queries so that such products fit a bounded workspace.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <span>

#include "../../core/attention_options.hpp"
#include "../../simd/project.hpp"
#include "../deal.hpp"
#include "epilogues.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// ALiBi's slopes as the authors publish them (Press et al. 2022, arXiv 2108.12409, and their code; FlashInfer and ggml
// agree), one per head. H = 2^n heads: 2^(-8 (h + 1) / H). Otherwise P, the power of two below: its P slopes, then the 1st,
// 3rd, 5th ... slope of 2 P heads.
inline void alibi_slopes_press(std::span<float> slopes) {   // [q_head]
  const std::size_t power = std::bit_floor(slopes.size());
  for (std::size_t h = 0; h < slopes.size(); ++h) {
    const double step = h < power ? 8. * static_cast<double>(h + 1) : 4. * static_cast<double>(2 * (h - power) + 1);
    slopes[h] = static_cast<float>(std::exp2(-step / static_cast<double>(power)));
  }
}

// The one formula 2^(-8 (h + 1) / H) for any H (TransformerLens, attention-gym). Other numbers than Press's unless H = 2^n.
inline void alibi_slopes_power(std::span<float> slopes) {   // [q_head]
  for (std::size_t h = 0; h < slopes.size(); ++h)
    slopes[h] = static_cast<float>(std::exp2(-8. * static_cast<double>(h + 1) / static_cast<double>(slopes.size())));
}

// T5's buckets of distances (Raffel et al. 2020, arXiv 1910.10683). Encoders are bidirectional, decoders are not.
struct T5Buckets {
  index_t count = 32;
  index_t max_distance = 128;   // this far and farther share a bucket
  bool bidirectional = true;    // half of the buckets for keys ahead
};

constexpr index_t t5_exact_buckets(const T5Buckets& b) { return (b.bidirectional ? b.count / 2 : b.count) / 2; }

// distance = key - position. Near distances have a bucket each, farther ones share it by their logarithm.
inline index_t t5_bucket(index_t distance, const T5Buckets& buckets) {
  const index_t side = buckets.bidirectional ? buckets.count / 2 : buckets.count, exact = t5_exact_buckets(buckets);
  const index_t first = buckets.bidirectional && distance > 0 ? side : 0;
  const index_t far = buckets.bidirectional ? std::abs(distance) : std::max<index_t>(-distance, 0);
  if (far < exact) return first + far;
  const auto whole = static_cast<double>(exact);
  const double part =
      std::log(static_cast<double>(far) / whole) / std::log(static_cast<double>(buckets.max_distance) / whole);
  return first + std::min(exact + static_cast<index_t>(part * static_cast<double>(side - exact)), side - 1);
}

// A table by distance has this many copies of its end values before and behind it: keys in the lanes of a vector are
// neighbours, so their distances are, and one clamp and one load serve all of them.
inline constexpr index_t kDistancePad = 16;
static_assert(kLanes <= kDistancePad);
constexpr index_t distance_floats(index_t distances) { return padded(distances + 2 * kDistancePad, kDistancePad); }

// s + table[key - pos], the distance moved into the table.
struct DistanceLane {
  const float* table;    // from its padding on
  index_t origin, top;   // the key that meets table[0]; the last place where a vector may start

  FOVEA_INLINE f32 operator()(f32 s, i32 key) const {
    const index_t at = std::clamp<index_t>(first_lane(key) - origin, 0, top);
    return fma(load(table + at), f32(1.f), s);   // a sum no compiler fuses with s
  }
};
FOVEA_INLINE DistanceLane distance_lane(const float* table, index_t pos, index_t lowest, index_t highest) {
  return {table, pos + lowest - kDistancePad, highest - lowest + kDistancePad};
}

// Where the queries of a call stand in an array [batch, q_head, pos].
struct QueryPlaces {
  const index_t* cu_len_q = nullptr;   // [sequence + 1] of a ragged call
  index_t q_heads = 1, len = 0;

  FOVEA_INLINE index_t at(index_t batch, index_t q_head, index_t pos) const {
    return (batch * q_heads + q_head) * len + pos;
  }
  FOVEA_INLINE index_t operator()(const OutRow& row) const { return at(row.batch, row.q_head, row.pos); }
  FOVEA_INLINE index_t operator()(const Row& row) const {
    return cu_len_q == nullptr ? at(row.sequence, row.q_head, row.q_index)
                               : at(0, row.q_head, cu_len_q[row.sequence] + row.q_index);
  }
};

// The score that has a table of its own for every query: q_i . r by distance, scaled.
struct QueryDistances {
  const float* tables;   // [query, distance_floats(highest - lowest + 1)]
  index_t lowest, highest;
  QueryPlaces places;

  FOVEA_INLINE DistanceLane at(const Row& row) const {
    return distance_lane(tables + places(row) * distance_floats(highest - lowest + 1), row.pos, lowest, highest);
  }
};

// Those tables: number c of query i of head h is scale (q_i + shift_h) . r_(first + c step), r [q_head | 1, row, dim] with
// an innermost stride of 1.
struct RelativeProduct {
  Operand q;                    // [batch, q_head, pos, dim]
  View<const float, 2> shift;   // [q_head | 1, dim], may be absent
  View<const float, 3> r;
  index_t first, step, count;
  float scale;
  float* tables;

  index_t rows() const { return q.extent[0] * q.extent[2] * (r.extent[0] == 1 ? q.extent[1] : 1); }
  index_t tasks() const { return r.extent[0] * project_tasks(rows(), count); }

  void run(index_t task, const ProjectMemory& memory) const {
    const index_t each = project_tasks(rows(), count), head = task / each, len = q.extent[2], dim = q.extent[3];
    const index_t number = row_bytes(q.format, 1), width = distance_floats(count);
    const bool shared = r.extent[0] == 1;
    const float* const from = r.data + head * r.stride[0] + first * r.stride[1];
    const StoredMatrix matrix{reinterpret_cast<const std::byte*>(from), Format::f32, count, dim, step * r.stride[1]};
    const auto place = [&](index_t row) {
      const index_t batch = shared ? row / len / q.extent[1] : row / len, q_head = shared ? row / len % q.extent[1] : head;
      return std::array<index_t, 3>{batch, q_head, row % len};
    };
    project_task(
        task % each, rows(), matrix, Weights::by_output, memory,
        [&](index_t row, index_t d, index_t numbers, float* to) {
          const auto [batch, q_head, pos] = place(row);
          const index_t at = batch * q.stride[0] + q_head * q.stride[1] + pos * q.stride[2] + d * q.stride[3];
          read_strided(q.format, q.data + at * number, q.stride[3], numbers, to);
          if (!shift) return;
          const float* const plus = shift.data + (shift.extent[0] == 1 ? 0 : q_head) * shift.stride[0] + d * shift.stride[1];
          for (index_t n = 0; n < numbers; ++n) to[n] += plus[n * shift.stride[1]];
        },
        [&](index_t row, index_t column, index_t columns, const float* values) {
          const auto [batch, q_head, pos] = place(row);
          float *const table = tables + ((batch * q.extent[1] + q_head) * len + pos) * width, *const to =
                                                                                                  table + kDistancePad;
          for (index_t n = 0; n < columns; ++n) to[column + n] = values[n] * scale;
          if (column == 0) std::fill_n(table, kDistancePad, to[0]);
          if (column + columns == count) std::fill(to + count, table + width, to[count - 1]);
        });
  }
};

// The bytes that tables of queries may take before a call is cut, and the fewest queries of a block: K and V are packed once
// a block, which 64 queries are enough for.
inline constexpr index_t kTableBytes = index_t{32} << 20;
inline constexpr index_t kLeastQueries = 64;

// The queries [first, first + count) of one sequence as a call of their own. In a regime that is forced, their bits are
// those of the whole call.
class QueryBlock {
 public:
  Operand q, k, v;
  Result out;
  AttentionOptions options;
  Sequence sequence;   // of the block

  QueryBlock(const Operand& q_, const Operand& k_, const Operand& v_, const Result& out_, const AttentionOptions& options_,
             const Sequence& whole, index_t first, index_t count)
      : q(cut(q_, whole.batch, whole.q_begin + first, count)),
        k(cut(k_, whole.kv_batch, whole.k_begin, whole.len_k)),
        v(cut(v_, whole.kv_batch, whole.k_begin, whole.len_k)),
        out(cut(out_, whole.batch, whole.q_begin + first, count)),
        options(options_),
        sequence{0, count, 0, whole.len_k, whole.pos + first, 0, 0} {
    options.cu_len_q = options.cu_len_k = options.len_k = {};
    options.q_offset = {&sequence.pos, 1};
    options.workspace = {};
    if (options.lse) {
      options.lse.data += whole.batch * options.lse.stride[0] + (whole.q_begin + first) * options.lse.stride[2];
      options.lse.extent[0] = 1;
      options.lse.extent[2] = count;
    }
    if (options.regime != Regime::automatic) return;
    options.regime = automatic_regime(whole.len_q * (q.extent[1] / std::max<index_t>(k.extent[1], 1)), options.panels);
  }
  QueryBlock(const QueryBlock&) = delete;
  QueryBlock& operator=(const QueryBlock&) = delete;

 private:
  template <class Shaped>
  static Shaped cut(Shaped whole, index_t batch, index_t first, index_t count) {
    if (whole.data != nullptr)
      whole.data += (batch * whole.stride[0] + first * whole.stride[2]) * row_bytes(whole.format, 1);
    whole.extent[0] = 1;
    whole.extent[2] = count;
    return whole;
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
