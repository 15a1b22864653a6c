// SPDX-License-Identifier: Apache-2.0
// Transformer-XL's relative positions (Dai et al. 2019, arXiv 1901.02860):
//   s_ij = scale ((q_i + u) . k_j + (q_i + v) . r_(i - j)),   r_d = W_r sinusoid(d),   u and v per head
// The second product is made for a block of queries and the distances these can see, and read along the keys: rel_shift
// without a shift. A memory of earlier tokens is nothing but more keys than queries: causal bottom_right.
#pragma once
#include "../call/variant.hpp"
#include "../engine/parts/positions.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct XlTables {
  View<const float, 3> r{};              // [q_head | 1, ahead + distance, dim_qk]  row ahead + d for a key d positions back;
                                         // farther keys take the last row (the paper's clamp_len); innermost stride 1
  index_t ahead = 0;                     // rows for keys after the query, as XLNet has them; 0 needs causal
  View<const float, 2> content_bias{};   // u [q_head | 1, dim_qk], may be absent
  View<const float, 2> position_bias{};   // v
};

// Rows of the paper's encoding, row n for the distance first + n: sin(d w_0), sin(d w_1) ..., then the cosines; w_m =
// 10000^(-2 m / dim). r is this times W_r, head by head.
inline Status xl_sinusoids(index_t first, View<float, 2> rows) {   // [distance, dim]
  const index_t dim = rows.extent[1];
  if (!rows || dim < 2 || dim % 2 != 0)
    return door::invalid("fovea: sinusoids come in pairs: dim %td must be even and at least 2", dim);
  for (index_t n = 0; n < rows.extent[0]; ++n) {
    for (index_t m = 0; m < dim / 2; ++m) {
      const double angle =
          static_cast<double>(first + n) * std::pow(10000., -2. * static_cast<double>(m) / static_cast<double>(dim));
      rows(n, m) = static_cast<float>(std::sin(angle));
      rows(n, m + dim / 2) = static_cast<float>(std::cos(angle));
    }
  }
  return {};
}

namespace xl {

// Distances position - key, both ends included; what is outside of r's rows is moved to its nearest row.
struct Distances {
  index_t nearest, farthest;
  index_t count() const { return farthest - nearest + 1; }
};

inline Distances seen(const Sequence& s, const Reach& reach, const XlTables& tables) {
  const auto row = [&](index_t distance) {
    return std::clamp<index_t>(distance, -tables.ahead, tables.r.extent[1] - 1 - tables.ahead);
  };
  const index_t nearest = row(std::max(s.pos - std::max<index_t>(s.len_k - 1, 0), -reach.right));
  return {nearest, std::max(row(std::min(s.pos + std::max<index_t>(s.len_q - 1, 0), reach.left)), nearest)};
}

// How a call is cut, and what lies in its workspace. One block serves all sequences where that fits.
struct Layout {
  bool whole = false;
  index_t step = 0, queries = 0, columns = 0;   // most of a block
  Distances distances{};                        // of the whole call

  static Layout of(const AttentionShape& shape, const AttentionOptions& options, const XlTables& tables) {
    const Reach reach = reach_of(options);
    const index_t sequences = door::count_sequences(shape, options);
    index_t longest_q = 0, widest = 1;
    Layout layout;
    for (index_t b = 0; b < sequences; ++b) {
      const Sequence s = door::sequence_of(shape, options, b);
      const Distances own = seen(s, reach, tables);
      layout.distances = b == 0 ? own
                                : Distances{std::min(layout.distances.nearest, own.nearest),
                                            std::max(layout.distances.farthest, own.farthest)};
      longest_q = std::max(longest_q, s.len_q);
      widest = std::max(widest, s.len_k + kLeastQueries);
    }
    const auto fit = [&](index_t distances_of_row) {
      return kTableBytes / (4 * (distance_floats(distances_of_row) + shape.dim_qk) * shape.q_heads);
    };
    const index_t tokens = shape.batch * shape.len_q;
    layout.whole = tokens <= fit(layout.distances.count());
    layout.step = std::clamp(fit(widest), kLeastQueries, 4 * kLeastQueries);
    layout.queries = layout.whole ? tokens : std::min(layout.step, longest_q);
    // Of a block: no more distances than keys and queries span, than the window shows, than r has.
    layout.columns =
        layout.whole ? layout.distances.count()
                     : std::min({widest - kLeastQueries + layout.queries, reach.left + reach.right + 1, tables.r.extent[1]});
    layout.columns = std::max<index_t>(layout.columns, 1);
    return layout;
  }
};

struct Memory {
  float* tables = nullptr;    // [batch, q_head, pos, distance_floats(columns)] of a block
  float* queries = nullptr;   // [batch, q_head, pos, dim] of a block: q + u
  std::byte* lanes = nullptr;
  std::size_t lane_bytes = 0;

  static Memory carve(Bump& bump, const AttentionShape& shape, const Layout& layout, const XlTables& tables, int lanes) {
    const index_t rows = shape.q_heads * layout.queries;
    Memory memory;
    memory.tables = bump.take<float>(rows * distance_floats(layout.columns));
    if (tables.content_bias) memory.queries = bump.take<float>(rows * shape.dim_qk);
    Bump lane;
    carve_project(lane, rows);
    memory.lane_bytes = lane.used();
    memory.lanes = bump.take<std::byte>(static_cast<index_t>(lane.used()) * lanes);
    return memory;
  }
};

// to[batch, q_head, pos, dim] = q + u.
inline void add_bias(const Operand& q, const View<const float, 2>& bias, index_t row, float* to) {
  const index_t len = q.extent[2], dim = q.extent[3], head = row / len % q.extent[1];
  const index_t at = row / len / q.extent[1] * q.stride[0] + head * q.stride[1] + row % len * q.stride[2];
  read_strided(q.format, q.data + at * row_bytes(q.format, 1), q.stride[3], dim, to);
  const float* const plus = bias.data + (bias.extent[0] == 1 ? 0 : head) * bias.stride[0];
  for (index_t d = 0; d < dim; ++d) to[d] += plus[d * bias.stride[1]];
}

template <class Compiled>
Status run_block(const Operand& q_any, const Operand& k, const Operand& v, const Result& out,
                 const AttentionOptions& options, const XlTables& tables, const Distances& distances, const Memory& memory) {
  const Operand q = door::tidy_operand(q_any);
  const QueryPlaces places{options.cu_len_q.empty() ? nullptr : options.cu_len_q.data(), q.extent[1], q.extent[2]};
  const RelativeProduct product{q,
                                tables.position_bias,
                                tidy(tables.r),
                                distances.farthest + tables.ahead,
                                -1,
                                distances.count(),
                                scale_of(options, q.extent[3]),
                                memory.tables};
  deal(options.executor, options.executor.lanes(), product.tasks(), [&](int lane, index_t task) {
    Bump bump(memory.lanes + memory.lane_bytes * static_cast<std::size_t>(lane));
    product.run(task, carve_project(bump, product.rows()));
  });
  Operand queries = q;
  if (tables.content_bias) {
    const index_t rows = q.extent[0] * q.extent[1] * q.extent[2], each = 64;
    deal(options.executor, options.executor.lanes(), (rows + each - 1) / each, [&](int, index_t task) {
      for (index_t row = task * each; row < std::min((task + 1) * each, rows); ++row)
        add_bias(q, tables.content_bias, row, memory.queries + row * q.extent[3]);
    });
    queries = bhsd(static_cast<const float*>(memory.queries), q.extent[0], q.extent[1], q.extent[2], q.extent[3]);
  }
  const auto shifted = variant().with_score(QueryDistances{memory.tables, -distances.farthest, -distances.nearest, places});
  return door::run(door::call_of_variant<Compiled>(queries, door::kv_of(k, v), out, options, shifted));
}

template <class T, int Rank>
Status check_apart(const char* name, const View<T, Rank>& table, const Result& out, const AttentionOptions& options) {
  door::Bytes bytes;
  if (!table) return {};
  if (Status s = door::check_data(name, table, bytes); !s.ok()) return s;
  return door::check_learned(name, bytes, out, options);
}

inline Status check_bias(const char* name, const View<const float, 2>& bias, const AttentionShape& shape) {
  if (!bias || ((bias.extent[0] == 1 || bias.extent[0] == shape.q_heads) && bias.extent[1] == shape.dim_qk)) return {};
  return door::invalid("fovea: %s is [%td, %td], must be [1 or %td, %td]", name, bias.extent[0], bias.extent[1],
                       shape.q_heads, shape.dim_qk);
}

inline Status check_tables(const XlTables& t, const AttentionShape& shape, const AttentionOptions& options) {
  if (!t.r || (t.r.extent[0] != 1 && t.r.extent[0] != shape.q_heads) || t.r.extent[2] != shape.dim_qk)
    return door::invalid("fovea: r is [%td, %td, %td], must be [1 or %td, distances, %td]", t.r.extent[0], t.r.extent[1],
                         t.r.extent[2], shape.q_heads, shape.dim_qk);
  if (t.ahead < 0 || t.ahead >= t.r.extent[1] || t.r.extent[1] > door::kMaxLength)
    return door::invalid("fovea: r has %td rows, %td of them ahead; at least one must be for a key that is not",
                         t.r.extent[1], t.ahead);
  if (t.r.stride[2] != 1 && shape.dim_qk > 1)
    return door::unsupported("fovea: r has innermost stride %td, must be 1", t.r.stride[2]);
  if (t.ahead == 0 && reach_of(options).right > 0)
    return door::invalid("fovea: queries see keys ahead of them, r has no rows for those; call it causal, or set ahead");
  if (Status s = check_bias("content_bias", t.content_bias, shape); !s.ok()) return s;
  return check_bias("position_bias", t.position_bias, shape);
}

template <class Compiled>
Status run(const Operand& q, const Operand& k, const Operand& v, const Result& out, const XlTables& tables,
           const AttentionOptions& options) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  const Kv kv = door::kv_of(k, v);
  const AttentionShape shape = door::shape_of(q, kv, options);
  const door::Needs needs = VariantTraits<Variant<QueryDistances>>::needs();
  if (Status s = door::check_call(q, kv, out, options); !s.ok()) return s;
  if (Status s = door::check_problem(shape, options, needs); !s.ok()) return s;
  if (Status s = door::check_home(kv, shape, options); !s.ok()) return s;
  if (Status s = check_tables(tables, shape, options); !s.ok()) return s;
  if (Status s = check_apart("r", tables.r, out, options); !s.ok()) return s;
  if (Status s = check_apart("content_bias", tables.content_bias, out, options); !s.ok()) return s;
  if (Status s = check_apart("position_bias", tables.position_bias, out, options); !s.ok()) return s;
  const int lanes = options.executor.lanes();
  const Layout layout = Layout::of(shape, options, tables);
  Bump count;
  Memory::carve(count, shape, layout, tables, lanes);
  if (Status s = door::check_workspace(options.workspace, count.used() + kAlignment); !s.ok()) return s;
  Bump bump(aligned(options.workspace).data());
  const Memory memory = Memory::carve(bump, shape, layout, tables, lanes);
  if (layout.whole) {
    AttentionOptions inner = options;
    inner.workspace = {};
    return run_block<Compiled>(q, k, v, out, inner, tables, layout.distances, memory);
  }
  for (index_t b = 0; b < door::count_sequences(shape, options); ++b) {
    const Sequence sequence = door::sequence_of(shape, options, b);
    for (index_t first = 0; first < sequence.len_q; first += layout.step) {
      const QueryBlock block(q, k, v, out, options, sequence, first, std::min(layout.step, sequence.len_q - first));
      const Distances distances = seen(block.sequence, reach_of(options), tables);
      FOVEA_ASSERT(distances.count() <= layout.columns);
      if (Status s = run_block<Compiled>(block.q, block.k, block.v, block.out, block.options, tables, distances, memory);
          !s.ok())
        return s;
    }
  }
  return {};
}

}   // namespace xl

// Bytes that options.workspace must have: the products of a block of queries with every distance it can see, at most 32 MiB
// or what 64 queries take, and a projection's tile per lane. Pure; 0 where the call would be refused.
inline std::size_t transformer_xl_workspace_bytes(const AttentionShape& shape, const XlTables& tables,
                                                  const AttentionOptions& options = {}) {
  if (!door::check_problem(shape, options).ok() || !xl::check_tables(tables, shape, options).ok()) return 0;
  Bump count;
  xl::Memory::carve(count, shape, xl::Layout::of(shape, options, tables), tables, options.executor.lanes());
  return count.used() + kAlignment;
}

// Every option of a variant holds (softcap, ALiBi, bias, keep and trees are refused); options.workspace is required, the
// engine's own memory is the library's.
template <class TK, class TV>
Status transformer_xl_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                                const XlTables& tables, const AttentionOptions& options) {
  return xl::run<door::FormatsOf<TK, TV>>(q, k, v, out, tables, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
