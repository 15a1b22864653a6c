// SPDX-License-Identifier: Apache-2.0
// A bias on the score that depends on where key and query stand, not on what they hold: s_ij + b_h(j - i).
//   by distance: T5's buckets (Raffel et al. 2020, arXiv 1910.10683), or any table of yours
//   by place on a grid: Swin (Liu et al. 2021, arXiv 2103.14030), BEiT: a table of differences and an index per pair
//
//   fovea::DistanceBias bias;
//   std::vector<float> floats(fovea::t5_bias_floats(heads, buckets));
//   fovea::t5_bias(weight, buckets, floats, bias);
//   fovea::attention(q, k, v, out, {.scale = 1.f}, fovea::relative_bias(bias));
#pragma once
#include "../call/variant.hpp"
#include "../engine/parts/positions.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Made by distance_bias or t5_bias. Distances key - position outside lowest .. highest take the value at the nearer end.
struct DistanceBias {
  const float* table = nullptr;   // [q_head, distance_floats(highest - lowest + 1)]
  index_t q_heads = 1, lowest = 0, highest = 0;

  Status check(const AttentionShape& shape) const {
    if (table != nullptr && shape.q_heads == q_heads) return {};
    return door::invalid("fovea: the bias by distance has %td heads, the call has %td q heads", table == nullptr ? 0 : q_heads,
                         shape.q_heads);
  }
  FOVEA_INLINE DistanceLane at(const Row& row) const {
    return distance_lane(table + row.q_head * distance_floats(highest - lowest + 1), row.pos, lowest, highest);
  }
};

inline std::size_t distance_bias_floats(index_t q_heads, index_t distances) {
  return static_cast<std::size_t>(q_heads * distance_floats(distances));
}

// values [q_head, distance]: column c belongs to the distance lowest + c. `memory` must outlive the bias.
inline Status distance_bias(View<const float, 2> values, index_t lowest, std::span<float> memory, DistanceBias& bias) {
  const index_t heads = values.extent[0], distances = values.extent[1];
  if (!values || heads < 1 || distances < 1)
    return door::invalid("fovea: a bias by distance has %td heads and %td distances, must have some", heads, distances);
  if (std::abs(lowest) > door::kMaxLength || distances > door::kMaxLength)
    return door::unsupported("fovea: a bias by distance has %td distances from %td on, up to %td are supported", distances,
                             lowest, door::kMaxLength);
  if (memory.size() < distance_bias_floats(heads, distances))
    return door::invalid("fovea: the memory of a bias by distance has %zu floats, must have %zu", memory.size(),
                         distance_bias_floats(heads, distances));
  const index_t width = distance_floats(distances);
  for (index_t h = 0; h < heads; ++h) {
    for (index_t n = 0; n < width; ++n) {
      const index_t column = std::clamp<index_t>(n - kDistancePad, 0, distances - 1);
      memory[static_cast<std::size_t>(h * width + n)] = values.data[h * values.stride[0] + column * values.stride[1]];
    }
  }
  bias = {memory.data(), heads, lowest, lowest + distances - 1};
  return {};
}

inline Status check_buckets(const T5Buckets& b) {
  const index_t exact = t5_exact_buckets(b);
  if (exact >= 1 && b.max_distance > exact && b.max_distance <= door::kMaxLength / 4 && b.count <= door::kMaxLength)
    return {};
  return door::invalid("fovea: %td buckets, %s, up to distance %td: some must be exact, and max_distance beyond those %td",
                       b.count, b.bidirectional ? "bidirectional" : "unidirectional", b.max_distance, exact);
}

// T5's distances saturate at max_distance, so a table is as short as that whatever the sequence.
inline index_t t5_distances(const T5Buckets& b) { return b.max_distance + 1 + (b.bidirectional ? b.max_distance : 0); }
inline std::size_t t5_bias_floats(index_t q_heads, const T5Buckets& b) {
  return distance_bias_floats(q_heads, t5_distances(b));
}

// weight [bucket, q_head]: relative_attention_bias.weight of a checkpoint. T5 has no 1 / sqrt(dim): call with a scale of 1.
inline Status t5_bias(View<const float, 2> weight, const T5Buckets& buckets, std::span<float> memory, DistanceBias& bias) {
  if (Status s = check_buckets(buckets); !s.ok()) return s;
  if (!weight || weight.extent[0] != buckets.count || weight.extent[1] < 1)
    return door::invalid("fovea: the table of a T5 bias is [%td, %td], must be [%td, q heads]", weight.extent[0],
                         weight.extent[1], buckets.count);
  const index_t heads = weight.extent[1], distances = t5_distances(buckets), width = distance_floats(distances);
  if (memory.size() < t5_bias_floats(heads, buckets))
    return door::invalid("fovea: the memory of a T5 bias has %zu floats, must have %zu", memory.size(),
                         t5_bias_floats(heads, buckets));
  for (index_t n = 0; n < width; ++n) {
    const index_t column = std::clamp<index_t>(n - kDistancePad, 0, distances - 1);
    const float* const row = weight.data + t5_bucket(column - buckets.max_distance, buckets) * weight.stride[0];
    for (index_t h = 0; h < heads; ++h) memory[static_cast<std::size_t>(h * width + n)] = row[h * weight.stride[1]];
  }
  bias = {memory.data(), heads, -buckets.max_distance, buckets.bidirectional ? buckets.max_distance : 0};
  return {};
}

// s + table[index[position, key], head]: the names and layouts of Swin's checkpoints. Queries and keys outside of the index and
// entries outside of the table take the nearest one inside (keys behind the last: entry 0).
struct GridBias {
  View<const float, 2> table{};   // [entry, q_head]  relative_position_bias_table
  View<const std::int32_t, 2> index{};   // [query, key]  relative_position_index; neighbouring keys stand next to each other

  Status check(const AttentionShape& shape) const {
    if (table && index && shape.q_heads == table.extent[1]) return {};
    return door::invalid("fovea: the bias on a grid has %td heads, the call has %td q heads", table ? table.extent[1] : 0,
                         shape.q_heads);
  }

  struct Lane {
    const float* table;
    const std::int32_t* index;
    std::int32_t entry_stride, last_entry;
    index_t keys;

    FOVEA_INLINE f32 operator()(f32 s, i32 key) const {
      const index_t first = first_lane(key);
      const i32 entry = max(min(entries(first), i32(last_entry)), i32(0));
      return fma(gather(table, entry * i32(entry_stride)), f32(1.f), s);
    }
    FOVEA_INLINE i32 entries(index_t first) const {
      if (first + kLanes <= keys) return i32::load_unaligned(index + first);
      alignas(i32) std::int32_t lanes[kLanes] = {};
      for (index_t n = 0; first + n < keys; ++n) lanes[n] = index[first + n];
      return i32::load_aligned(lanes);
    }
  };
  FOVEA_INLINE Lane at(const Row& row) const {
    const index_t query = std::clamp<index_t>(row.pos, 0, index.extent[0] - 1);
    return {table.data + row.q_head * table.stride[1], index.data + query * index.stride[0],
            static_cast<std::int32_t>(table.stride[0]), static_cast<std::int32_t>(table.extent[0] - 1), index.extent[1]};
  }
};

inline Status grid_bias(View<const float, 2> table, View<const std::int32_t, 2> index, GridBias& bias) {
  if (!table || !index || table.extent[0] < 1 || table.extent[1] < 1 || index.extent[0] < 1 || index.extent[1] < 1)
    return door::invalid("fovea: a bias on a grid has a table [%td, %td] and an index [%td, %td], must have some of each",
                         table.extent[0], table.extent[1], index.extent[0], index.extent[1]);
  if (index.extent[1] > 1 && index.stride[1] != 1)
    return door::unsupported("fovea: the index of a bias on a grid has innermost stride %td, must be 1", index.stride[1]);
  if (table.stride[0] < 0 || table.extent[0] > door::kMaxLength / std::max<index_t>(table.stride[0], 1))
    return door::unsupported(
        "fovea: the table of a bias on a grid has %td entries %td apart, up to %td floats are supported", table.extent[0],
        table.stride[0], door::kMaxLength);
  bias = {table, index};
  return {};
}

// Swin's index of a grid of height x width tokens in row order: (dy + height - 1) (2 width - 1) + dx + width - 1, with dy
// and dx from key to query. The table then has (2 height - 1) (2 width - 1) entries.
inline Status grid_bias_index(index_t height, index_t width, std::span<std::int32_t> index) {   // [query, key]
  if (height < 1 || width < 1 || height > 16384 || width > 16384)
    return door::invalid("fovea: a grid of %td x %td tokens, must be 1 to 16384 each", height, width);
  const index_t tokens = height * width;
  if (static_cast<index_t>(index.size()) != tokens * tokens)
    return door::invalid("fovea: the index of a grid of %td tokens has %zu entries, must have %td", tokens, index.size(),
                         tokens * tokens);
  for (index_t i = 0; i < tokens; ++i) {
    for (index_t j = 0; j < tokens; ++j) {
      const index_t dy = i / width - j / width, dx = i % width - j % width;
      index[static_cast<std::size_t>(i * tokens + j)] =
          static_cast<std::int32_t>((dy + height - 1) * (2 * width - 1) + dx + width - 1);
    }
  }
  return {};
}

constexpr auto relative_bias(const DistanceBias& bias) { return variant().with_score(bias); }
constexpr auto relative_bias(const GridBias& bias) { return variant().with_score(bias); }

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
