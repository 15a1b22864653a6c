// SPDX-License-Identifier: Apache-2.0
// Relative positions in keys and values (Shaw et al. 2018, arXiv 1803.02155), c = clip(j - i, -K, K):
//   e_ij = scale q_i . (k_j + aK_c),   p = softmax(e),   out_i = sum_j p_ij (v_j + aV_c)
// Keys: the 2 K + 1 products of a query with aK are made once, in blocks of queries, and looked up by distance. Values: the
// weights of a row are collected by distance while they pass, and meet aV once, when the row is closed.
#pragma once
#include "../call/variant.hpp"
#include "../engine/parts/positions.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Either table may be absent. Row c of 2 K + 1 belongs to the distance key - position = c - K; the innermost stride is 1.
struct ShawTables {
  View<const float, 3> k{};   // [q_head | 1, 2 K + 1, dim_qk]
  View<const float, 3> v{};   // [q_head | 1, 2 K + 1, dim_v]

  index_t clip() const { return ((k ? k : v).extent[1] - 1) / 2; }
};

// The weights of a row by clipped distance, in memory that starts at zero.
struct ShawWeights {
  float* buckets;   // [query, stride]
  index_t clip, stride;
  QueryPlaces places;

  static FOVEA_INLINE float sum(std::span<const float> weights, index_t begin, index_t end) {
    if (begin >= end) return 0.f;
    const i32 numbers = lane_numbers(), low(static_cast<std::int32_t>(begin)), high(static_cast<std::int32_t>(end));
    f32 total(0.f);
    for (index_t j = begin / kLanes * kLanes; j < end; j += kLanes) {
      const i32 at = numbers + i32(static_cast<std::int32_t>(j));
      const f32 w = load(weights.data() + j);   // whole vectors of scores
      total = total + (j >= begin && j + kLanes <= end ? w : select(as_keep((at >= low) & (at < high)), w, f32(0.f)));
    }
    return reduce_add(total);
  }

  FOVEA_INLINE void absorb(const Row& row, index_t k_begin, std::span<const float> weights, float rescale) const {
    float* const by_distance = buckets + places(row) * stride;
    if (rescale != 1.f) {
      for (index_t c = 0; c < stride; c += kLanes) store(by_distance + c, load(by_distance + c) * f32(rescale));
    }
    const index_t count = static_cast<index_t>(weights.size()), first = k_begin - row.pos;
    const index_t near = std::clamp<index_t>(1 - clip - first, 0, count);   // weights[near] is at distance 1 - clip
    const index_t far = std::clamp<index_t>(clip - first, near, count);     // weights[far] at distance clip
    by_distance[0] += sum(weights, 0, near);
    for (index_t j = near; j < far; ++j) by_distance[clip + first + j] += weights[static_cast<std::size_t>(j)];
    by_distance[2 * clip] += sum(weights, far, count);
  }
  FOVEA_INLINE void finish(const Row&, Final) const {}
};

// out_i += sum_c p_ic aV_c.
struct ShawValues {
  const float* buckets;   // [query, stride]
  index_t stride;
  QueryPlaces places;
  View<const float, 3> table;   // [q_head | 1, distance, dim_v]

  FOVEA_INLINE void operator()(const OutRow& row, std::span<float> values, Final end) const {
    const float* const by_distance = buckets + places(row) * stride;
    const float* const from = table.data + (table.extent[0] == 1 ? 0 : row.q_head) * table.stride[0];
    const index_t dim = static_cast<index_t>(values.size());
    index_t d = 0;
    for (; d + 4 * kLanes <= dim; d += 4 * kLanes) add<4>(by_distance, from + d, kLanes, values.data() + d, end.scale);
    for (; d < dim; d += kLanes) add<1>(by_distance, from + d, std::min(kLanes, dim - d), values.data() + d, end.scale);
  }

 private:
  // A distance without weight is passed over: its row of the table leaves no trace.
  template <int Vectors>
  FOVEA_INLINE void add(const float* by_distance, const float* from, index_t last, float* to, float scale) const {
    f32 total[Vectors];
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) total[n] = f32(0.f);
    for (index_t c = 0; c < table.extent[1]; ++c, from += table.stride[1]) {
      if (by_distance[c] == 0.f) continue;
      const f32 weight(by_distance[c]);
      FOVEA_UNROLL
      for (int n = 0; n < Vectors; ++n)
        total[n] = fma(weight, last == kLanes ? load(from + n * kLanes) : load_some(from, last), total[n]);
    }
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) store(to + n * kLanes, fma(total[n], f32(scale), load(to + n * kLanes)));
  }
};

namespace shaw {

inline Status check_table(const char* name, const View<const float, 3>& table, const AttentionShape& shape, index_t dim,
                          index_t rows, door::Bytes& bytes) {
  if (Status s = door::check_data(name, table, bytes); !s.ok()) return s;
  if (table.extent[1] < 1 || table.extent[1] % 2 == 0 || table.extent[1] > door::kMaxLength || table.extent[1] != rows)
    return door::invalid("fovea: the Shaw table %s has %td distances, must have an odd number, and k and v the same", name,
                         table.extent[1]);
  if ((table.extent[0] != 1 && table.extent[0] != shape.q_heads) || table.extent[2] != dim)
    return door::invalid("fovea: the Shaw table %s is [%td, %td, %td], must be [1 or %td, %td, %td]", name, table.extent[0],
                         table.extent[1], table.extent[2], shape.q_heads, table.extent[1], dim);
  if (table.stride[2] == 1 || dim == 1) return {};
  return door::unsupported("fovea: the Shaw table %s has innermost stride %td, must be 1", name, table.stride[2]);
}

// How a call is cut, and what lies in its workspace.
struct Layout {
  bool whole;
  index_t step;   // queries of a block

  static Layout of(const AttentionShape& shape, const ShawTables& tables) {
    const index_t floats = (tables.k ? distance_floats(tables.k.extent[1]) : 0) + (tables.v ? bucket_stride(tables) : 0);
    const index_t fit = kTableBytes / (4 * floats * shape.q_heads);
    return {shape.batch * shape.len_q <= fit, std::max(fit, kLeastQueries)};
  }
  static index_t bucket_stride(const ShawTables& tables) { return padded(2 * tables.clip() + 1, kDistancePad); }
};

struct Memory {
  float* tables = nullptr;    // [query of a block, distance_floats]
  float* buckets = nullptr;   // [query of a block, bucket_stride]
  ProjectMemory first_lane{};
  std::size_t lane_bytes = 0;
  std::byte* lanes = nullptr;

  static Memory carve(Bump& bump, const AttentionShape& shape, const ShawTables& tables, int lanes) {
    const Layout layout = Layout::of(shape, tables);
    const index_t queries = shape.q_heads * (layout.whole ? shape.batch * shape.len_q : std::min(layout.step, shape.len_q));
    Memory memory;
    if (tables.v) memory.buckets = bump.take<float>(queries * Layout::bucket_stride(tables));
    if (!tables.k) return memory;
    memory.tables = bump.take<float>(queries * distance_floats(tables.k.extent[1]));
    Bump lane;
    carve_project(lane, queries);
    memory.lane_bytes = lane.used();
    memory.lanes = bump.take<std::byte>(static_cast<index_t>(lane.used()) * lanes);
    return memory;
  }
};

template <class Compiled, class V>
Status run_variant(const Operand& q, const Operand& k, const Operand& v, const Result& out, const AttentionOptions& options,
                   const V& variant) {
  return door::run(door::call_of_variant<Compiled>(q, door::kv_of(k, v), out, options, variant));
}

// One call of the engine: all sequences, or a block of one.
template <class Compiled>
Status run_block(const Operand& q, const Operand& k, const Operand& v, const Result& out, const AttentionOptions& options,
                 const ShawTables& tables, const Memory& memory) {
  const index_t clip = tables.clip(), stride = Layout::bucket_stride(tables);
  const QueryPlaces places{options.cu_len_q.empty() ? nullptr : options.cu_len_q.data(), q.extent[1], q.extent[2]};
  const QueryDistances score{memory.tables, -clip, clip, places};
  if (tables.k) {
    const RelativeProduct product{door::tidy_operand(q),          {},           tidy(tables.k), 0, 1, 2 * clip + 1,
                                  scale_of(options, q.extent[3]), memory.tables};
    deal(options.executor, options.executor.lanes(), product.tasks(), [&](int lane, index_t task) {
      Bump bump(memory.lanes + memory.lane_bytes * static_cast<std::size_t>(lane));
      product.run(task, carve_project(bump, product.rows()));
    });
  }
  if (!tables.v) return run_variant<Compiled>(q, k, v, out, options, variant().with_score(score));
  std::fill_n(memory.buckets, q.extent[0] * q.extent[1] * q.extent[2] * stride, 0.f);
  const auto values = variant()
                          .with_tap(ShawWeights{memory.buckets, clip, stride, places})
                          .with_close(ShawValues{memory.buckets, stride, places, tidy(tables.v)});
  if (!tables.k) return run_variant<Compiled>(q, k, v, out, options, values);
  return run_variant<Compiled>(q, k, v, out, options, values.with_score(score));
}

template <class Compiled>
Status run(const Operand& q, const Operand& k, const Operand& v, const Result& out, const ShawTables& tables,
           const AttentionOptions& options) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  const Kv kv = door::kv_of(k, v);
  const AttentionShape shape = door::shape_of(q, kv, options);
  const door::Needs needs = VariantTraits<Variant<QueryDistances>>::needs();
  if (Status s = door::check_call(q, kv, out, options); !s.ok()) return s;
  if (Status s = door::check_problem(shape, options, needs); !s.ok()) return s;
  if (Status s = door::check_home(kv, shape, options); !s.ok()) return s;
  if (!tables.k && !tables.v) return door::invalid("fovea: Shaw's attention needs a table for k or for v, it has neither");
  const std::span<std::byte> workspace = options.workspace;
  const std::pair<const char*, const View<const float, 3>*> both[] = {{"k", &tables.k}, {"v", &tables.v}};
  for (const auto& [name, table] : both) {
    door::Bytes bytes;
    if (!*table) continue;
    const index_t dim = table == &tables.k ? shape.dim_qk : shape.dim_v;
    if (Status s = check_table(name, *table, shape, dim, 2 * tables.clip() + 1, bytes); !s.ok()) return s;
    if (Status s = door::check_learned("a Shaw table", bytes, out, options); !s.ok()) return s;
  }
  const int lanes = options.executor.lanes();
  Bump count;
  Memory::carve(count, shape, tables, lanes);
  if (Status s = door::check_workspace(workspace, count.used() + kAlignment); !s.ok()) return s;
  Bump bump(aligned(workspace).data());
  const Memory memory = Memory::carve(bump, shape, tables, lanes);
  const Layout layout = Layout::of(shape, tables);
  if (layout.whole) {
    AttentionOptions inner = options;
    inner.workspace = {};
    return run_block<Compiled>(q, k, v, out, inner, tables, memory);
  }
  for (index_t b = 0; b < door::count_sequences(shape, options); ++b) {
    const Sequence sequence = door::sequence_of(shape, options, b);
    for (index_t first = 0; first < sequence.len_q; first += layout.step) {
      const QueryBlock block(q, k, v, out, options, sequence, first, std::min(layout.step, sequence.len_q - first));
      if (Status s = run_block<Compiled>(block.q, block.k, block.v, block.out, block.options, tables, memory); !s.ok())
        return s;
    }
  }
  return {};
}

}   // namespace shaw

// Bytes that options.workspace must have: the products and the collected weights of a block of queries, at most 32 MiB or
// what 64 queries take, and a projection's tile per lane. Pure.
inline std::size_t shaw_workspace_bytes(const AttentionShape& shape, const ShawTables& tables, int lanes = 1) {
  Bump count;
  if (!door::check_shape(shape).ok()) return 0;
  if (tables.k || tables.v) shaw::Memory::carve(count, shape, tables, lanes);
  return count.used() + kAlignment;
}

// Every option of a variant holds (softcap, ALiBi, bias, keep and trees are refused); options.workspace is required, the
// engine's own memory is the library's.
template <class TK, class TV>
Status shaw_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                      const ShawTables& tables, const AttentionOptions& options) {
  return shaw::run<door::FormatsOf<TK, TV>>(q, k, v, out, tables, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
