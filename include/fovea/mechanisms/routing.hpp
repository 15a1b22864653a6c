// SPDX-License-Identifier: Apache-2.0
// Routing Transformer (Roy et al. 2020, arXiv 2003.05997), as in the common PyTorch port (lucidrains/routing-transformer):
// tokens attend within clusters, and the clusters choose.
//   choice      cluster c takes its `window` tokens of largest x.mu_c, queries and keys apart but by the same centroids; x
//               is normalised for the choice only. A token may be in none, one or several clusters
//   attention   dense within a cluster, causal by original position, over its learned keys (always visible) and its own
//   output      the mean over the clusters a token is in; 0 for a token that is in none
// Which tokens a cluster takes depends on all of them: this is a prefill, as little causal as MoSA.
//
// Lists are sorted by position (the published order is that of the scores, which changes nothing but rounding), and the
// clusters are the sequences of one ragged dense call.
#pragma once
#include <optional>

#include "../call/in_memory.hpp"
#include "../call/recurrent_call.hpp"
#include "../call/variant.hpp"
#include "../engine/deal.hpp"
#include "../engine/parts/token_order.hpp"
#include "../simd/project.hpp"
#include "../simd/select.hpp"

namespace fovea {
inline namespace v0 {

struct RoutingOptions {
  std::optional<float> scale = {};   // 1/sqrt(dim) if absent
  bool causal = true;
  bool shared_qk = false;   // k is q: keys are normalised, a token with itself gets self_score
  float self_score = -5e4f;
  Tensor<const float> memory_k = {};   // [head, cluster, n, dim]    learned keys; causal models without shared_qk have
  Tensor<const float> memory_v = {};   // [head, cluster, n, dim_v]  at least one, or rows may see nothing (and give 0)
  std::span<const index_t> len = {};   // [batch]  tokens in use; absent: all
  Executor executor = {};
  std::span<std::byte> workspace =
      {};   // routing_select_bytes, routing_attend_bytes or routing_bytes; the dense call inside
            // uses the library's own
};

inline namespace FOVEA_ARCH {

namespace routing {

inline constexpr index_t kTokens = 512;   // rows of out that are added up at a time

struct Shape {
  index_t batch, heads, kv_heads, len, dim, dim_v, clusters, memory;
  index_t lists() const { return batch * heads * clusters; }
};

// What the clusters took, one after the other. Keys stand behind the learned ones of their cluster.
struct Gathered {
  index_t* row_begin;        // [list + 1]
  index_t* key_begin;        // [list + 1]
  std::int32_t* row_token;   // [row]
  std::int32_t* key_token;   // [key + a vector]  -1: learned
  float* q;                  // [row, dim]
  float* k;                  // [key, dim]
  float* v;                  // [key, dim_v]
  float* out;                // [row, dim_v]
};
inline Gathered carve(Bump& bump, const Shape& s, index_t rows, index_t keys) {
  Gathered g{};
  g.row_begin = bump.take<index_t>(s.lists() + 1);
  g.key_begin = bump.take<index_t>(s.lists() + 1);
  g.row_token = bump.take<std::int32_t>(rows);
  g.key_token = bump.take<std::int32_t>(keys + kLanes);
  g.q = bump.take<float>(rows * s.dim);
  g.k = bump.take<float>(keys * s.dim);
  g.v = bump.take<float>(keys * s.dim_v);
  g.out = bump.take<float>(rows * s.dim_v);
  return g;
}
struct LaneMemory {
  float* sum;            // [kTokens, dim_v]
  std::int32_t* times;   // [kTokens]
};
inline LaneMemory carve_lane(Bump& bump, index_t dim_v) {
  float* const sum = bump.take<float>(kTokens * dim_v);
  return {sum, bump.take<std::int32_t>(kTokens)};
}

struct SelectMemory {
  ProjectMemory project;
  float* scores;         // [cluster, pos]
  std::int32_t* found;   // [window]
  std::span<std::byte> top_k;
};
inline SelectMemory carve_select(Bump& bump, index_t len, index_t clusters, index_t window) {
  const ProjectMemory project = carve_project(bump, len);
  float* const scores = bump.take<float>(clusters * len);
  std::int32_t* const found = bump.take<std::int32_t>(window);
  // Enough for any shorter sequence: at most two lists of its tokens and a bitmap.
  const std::size_t bytes = 3 * top_k_scratch_bytes(len, len);
  return {project, scores, found, {bump.take<std::byte>(static_cast<index_t>(bytes)), bytes}};
}

inline index_t count_listed(const View<const std::int32_t, 4>& members) {
  index_t total = 0;
  for (index_t b = 0; b < members.extent[0]; ++b) {
    for (index_t h = 0; h < members.extent[1]; ++h) {
      for (index_t c = 0; c < members.extent[2]; ++c) {
        for (index_t n = 0; n < members.extent[3]; ++n) total += members(b, h, c, n) >= 0;
      }
    }
  }
  return total;
}

// Every list: tokens that exist, each once, in rising order; -1 anywhere is nothing.
inline Status check_lists(const char* name, const View<const std::int32_t, 4>& members, const Shape& s) {
  if (members.extent[0] != s.batch || members.extent[1] != s.heads || members.extent[2] != s.clusters)
    return door::invalid("fovea: %s is [%td, %td, %td, %td], must be [%td, %td, %td, tokens]", name, members.extent[0],
                         members.extent[1], members.extent[2], members.extent[3], s.batch, s.heads, s.clusters);
  for (index_t b = 0; b < s.batch; ++b) {
    for (index_t h = 0; h < s.heads; ++h) {
      for (index_t c = 0; c < s.clusters; ++c) {
        std::int32_t before = -1;
        for (index_t n = 0; n < members.extent[3]; ++n) {
          const std::int32_t token = members(b, h, c, n);
          if (token < 0) continue;
          if (token >= s.len || token <= before)
            return door::invalid("fovea: %s[%td, %td, %td, %td] is %d behind %d; tokens rise and are below %td", name, b, h,
                                 c, n, static_cast<int>(token), static_cast<int>(before), s.len);
          before = token;
        }
      }
    }
  }
  return {};
}

// The tokens of all lists, each behind `learned` entries of -1.
inline void list_tokens(const View<const std::int32_t, 4>& members, const Shape& s, index_t learned, index_t* begin,
                        std::int32_t* token) {
  index_t at = 0;
  for (index_t list = 0; list < s.lists(); ++list) {
    begin[list] = at;
    for (index_t n = 0; n < learned; ++n) token[at++] = -1;
    const index_t head = list / s.clusters;
    for (index_t n = 0; n < members.extent[3]; ++n) {
      const std::int32_t t = members(head / s.heads, head % s.heads, list % s.clusters, n);
      if (t >= 0) token[at++] = t;
    }
  }
  begin[s.lists()] = at;
}

inline void gather_list(const Shape& s, const Operand& q, const Operand& k, const Operand& v, const RoutingOptions& options,
                        const Gathered& g, index_t list) {
  const index_t head_of = list / s.clusters, cluster = list % s.clusters;
  const index_t b = head_of / s.heads, h = head_of % s.heads, kv_head = h / (s.heads / s.kv_heads);
  for (index_t row = g.row_begin[list]; row < g.row_begin[list + 1]; ++row)
    read_token(q, b, h, g.row_token[row], g.q + row * s.dim);
  const index_t first = g.key_begin[list];
  for (index_t n = 0; n < s.memory; ++n) {
    read_token(options.memory_k, h, cluster, n, g.k + (first + n) * s.dim);
    read_token(options.memory_v, h, cluster, n, g.v + (first + n) * s.dim_v);
  }
  for (index_t key = first + s.memory; key < g.key_begin[list + 1]; ++key) {
    read_token(k, b, kv_head, g.key_token[key], g.k + key * s.dim);
    if (options.shared_qk) make_unit(g.k + key * s.dim, s.dim);
    read_token(v, b, kv_head, g.key_token[key], g.v + key * s.dim_v);
  }
}

// One dense call; a cluster is a sequence.
inline Status attend(const Shape& s, const Gathered& g, const RoutingOptions& options) {
  const index_t rows = g.row_begin[s.lists()], keys = g.key_begin[s.lists()];
  if (rows == 0) return {};
  std::fill_n(g.key_token + keys, kLanes, 0);   // lanes behind the last key
  AttentionOptions dense;
  dense.scale = options.scale;
  dense.cu_len_q = {g.row_begin, static_cast<std::size_t>(s.lists() + 1)};
  dense.cu_len_k = {g.key_begin, static_cast<std::size_t>(s.lists() + 1)};
  dense.executor = options.executor;
  const auto all = [](float* data, index_t count, index_t dim) {
    return Tensor<float>{data, {1, 1, count, dim}, {0, 0, dim, 1}};
  };
  const Operand q = all(g.q, rows, s.dim), k = all(g.k, keys, s.dim), v = all(g.v, keys, s.dim_v);
  const Result out = all(g.out, rows, s.dim_v);
  const TokenOrder order{g.row_token, g.key_token, g.row_begin, g.key_begin};
  const auto policies = variant()
                            .with_score(SelfScore{order, options.shared_qk, options.self_score})
                            .with_mask(CausalTokens{order, options.causal});
  return door::run(door::call_of_variant<Formats<Format::f32>>(q, door::kv_of(k, v), out, dense, policies));
}

// Rows first .. end - 1 of out: the mean over the clusters, in their order.
inline void average(const Shape& s, const Gathered& g, index_t b, index_t h, index_t first, index_t end, const Result& out,
                    const LaneMemory& m) {
  std::fill_n(m.sum, (end - first) * s.dim_v, 0.f);
  std::fill_n(m.times, end - first, 0);
  for (index_t c = 0; c < s.clusters; ++c) {
    const index_t list = (b * s.heads + h) * s.clusters + c;
    const std::int32_t* const stop = g.row_token + g.row_begin[list + 1];
    const std::int32_t* const start = g.row_token + g.row_begin[list];
    const std::int32_t* token = std::lower_bound(start, stop, static_cast<std::int32_t>(first));
    for (; token != stop && *token < end; ++token) {
      const float* const from = g.out + (token - g.row_token) * s.dim_v;
      float* const to = m.sum + (*token - first) * s.dim_v;
      for (index_t d = 0; d < s.dim_v; ++d) to[d] += from[d];
      ++m.times[*token - first];
    }
  }
  for (index_t t = first; t < end; ++t) {
    float* const row = m.sum + (t - first) * s.dim_v;
    const auto times = static_cast<float>(std::max(m.times[t - first], 1));
    for (index_t d = 0; d < s.dim_v; ++d) row[d] /= times;
    write_token(row, out, b, h, t);
  }
}

struct Local : door::LocalBytes {};
struct SelectLocal : door::LocalBytes {};
struct ListLocal : door::LocalBytes {};

inline Status check_options(const RoutingOptions& options, index_t batch, index_t len) {
  if (options.scale && !std::isfinite(*options.scale))
    return door::invalid("fovea: scale %g is not finite", static_cast<double>(*options.scale));
  if (Status s = check_lanes(options.executor); !s.ok()) return s;
  if (len > door::kMaxLength)
    return door::unsupported("fovea: up to %td tokens are supported, got %td", door::kMaxLength, len);
  if (!options.len.empty() && static_cast<index_t>(options.len.size()) != batch)
    return door::invalid("fovea: len has %zu entries for %td sequences", options.len.size(), batch);
  for (std::size_t b = 0; b < options.len.size(); ++b) {
    if (options.len[b] < 0 || options.len[b] > len)
      return door::invalid("fovea: len[%zu] = %td is outside 0 .. %td", b, options.len[b], len);
  }
  return {};
}

inline Status check_attend(const Operand& q, const Operand& k, const Operand& v, const Result& out, const Shape& s,
                           const RoutingOptions& options, door::Memory& memory) {
  for (const auto& [name, tensor] : {std::pair<const char*, const Operand*>{"q", &q}, {"k", &k}, {"v", &v}}) {
    if (Status status = door::check_plain(name, tensor->format); !status.ok()) return status;
    if (Status status = memory.reads(name, *tensor); !status.ok()) return status;
  }
  if (Status status = door::check_plain("out", out.format); !status.ok()) return status;
  if (Status status = check_options(options, s.batch, s.len); !status.ok()) return status;
  if (s.dim < 1 || s.dim > door::kMaxDim || s.dim_v < 1 || s.dim_v > door::kMaxDim)
    return door::unsupported("fovea: dims up to %td are supported: dim_qk %td, dim_v %td", door::kMaxDim, s.dim, s.dim_v);
  if (s.heads < 1 || s.kv_heads < 1 || s.heads % s.kv_heads != 0)
    return door::invalid("fovea: kv heads (%td) do not divide q heads (%td)", s.kv_heads, s.heads);
  if (Status status = door::check_extents("k", k, {s.batch, s.kv_heads, s.len, s.dim}, "q"); !status.ok()) return status;
  if (Status status = door::check_extents("v", v, {s.batch, s.kv_heads, s.len, s.dim_v}, "k"); !status.ok()) return status;
  if (Status status = door::check_extents("out", out, {s.batch, s.heads, s.len, s.dim_v}, "q and v"); !status.ok())
    return status;
  if (s.memory > 0 || options.memory_v) {
    if (Status status =
            door::check_extents("memory_k", options.memory_k, {s.heads, s.clusters, s.memory, s.dim}, "heads and clusters");
        !status.ok())
      return status;
    if (Status status =
            door::check_extents("memory_v", options.memory_v, {s.heads, s.clusters, s.memory, s.dim_v}, "memory_k");
        !status.ok())
      return status;
  }
  if (Status status = memory.reads("memory_k", options.memory_k); !status.ok()) return status;
  if (Status status = memory.reads("memory_v", options.memory_v); !status.ok()) return status;
  return memory.writes("out", out);
}

inline Status check_centroids(const View<const float, 3>& centroids, index_t heads, index_t dim) {
  const index_t clusters = centroids.extent[1];
  if (centroids.extent != std::array<index_t, 3>{heads, clusters, dim} || clusters < 1)
    return door::invalid("fovea: centroids are [%td, %td, %td], must be [%td, at least 1, %td]", centroids.extent[0],
                         clusters, centroids.extent[2], heads, dim);
  if (dim > 1 && centroids.stride[2] != 1)
    return door::unsupported("fovea: centroids have innermost stride %td, must be 1", centroids.stride[2]);
  return {};
}

}   // namespace routing

// Bytes of workspace. `window` is what a cluster takes; the lists of routing_attend hold at most as many.
inline std::size_t routing_select_bytes(index_t len, index_t clusters, index_t window, int lanes = 1) {
  Bump lane;
  routing::carve_select(lane, len, clusters, std::min(window, len));
  return lane.used() * static_cast<std::size_t>(lanes) + kAlignment;
}
inline std::size_t routing_attend_bytes(index_t batch, index_t heads, index_t clusters, index_t window, index_t memory,
                                        index_t dim, index_t dim_v, int lanes = 1) {
  Bump bump, lane;
  const index_t lists = batch * heads * clusters;
  routing::carve(bump, {batch, heads, heads, 0, dim, dim_v, clusters, memory}, lists * window, lists * (window + memory));
  routing::carve_lane(lane, dim_v);
  return bump.used() + lane.used() * static_cast<std::size_t>(lanes) + kAlignment;
}
inline std::size_t routing_bytes(index_t batch, index_t heads, index_t len, index_t clusters, index_t window, index_t memory,
                                 index_t dim, index_t dim_v, int lanes = 1) {
  Bump bump;
  bump.take<std::int32_t>(2 * batch * heads * clusters * std::min(window, len));
  return bump.used() + kAlignment +
         std::max(routing_select_bytes(len, clusters, window, lanes),
                  routing_attend_bytes(batch, heads, clusters, std::min(window, len), memory, dim, dim_v, lanes));
}

// The tokens each cluster takes: rising, -1 behind them. Of equal scores the earlier token. x has as many heads as the
// centroids, or fewer that are shared by neighbours (keys of GQA).
inline Status routing_select(const Operand& x_any,             // [batch, head or kv_head, pos, dim]
                             View<const float, 3> centroids,   // [head, cluster, dim]  of unit length
                             View<std::int32_t, 4> members,    // [batch, head, cluster, window]
                             const RoutingOptions& options = {}) {
  const Operand x = door::tidy_operand(x_any);
  centroids = tidy(centroids);
  members = tidy(members);
  const index_t batch = x.extent[0], len = x.extent[2], dim = x.extent[3];
  const index_t heads = centroids.extent[0], clusters = centroids.extent[1], window = members.extent[3];
  if (Status s = door::check_plain("x", x.format); !s.ok()) return s;
  if (Status s = routing::check_options(options, batch, len); !s.ok()) return s;
  if (dim < 1 || dim > door::kMaxDim)
    return door::unsupported("fovea: dims up to %td are supported: %td", door::kMaxDim, dim);
  if (x.extent[1] < 1 || heads % x.extent[1] != 0)
    return door::invalid("fovea: %td heads of tokens do not divide %td heads of centroids", x.extent[1], heads);
  if (Status s = routing::check_centroids(centroids, heads, dim); !s.ok()) return s;
  if (Status s = door::check_extents("members", members, {batch, heads, clusters, window}, "x and centroids"); !s.ok())
    return s;
  door::Memory memory;
  if (Status s = memory.reads("x", x); !s.ok()) return s;
  if (Status s = memory.reads("centroids", centroids); !s.ok()) return s;
  if (Status s = memory.writes("members", members); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;

  const index_t most = std::min(window, len), group = heads / x.extent[1];
  const int lanes = options.executor.lanes();
  Bump lane_size;
  routing::carve_select(lane_size, len, clusters, most);
  const std::size_t wanted = routing_select_bytes(len, clusters, window, lanes);
  return door::in_memory<routing::SelectLocal>(options.workspace, wanted, [&](std::span<std::byte> bytes) -> Status {
    deal(options.executor, lanes, batch * heads, [&](int lane, index_t list) {
      Bump bump(bytes.data() + lane_size.used() * static_cast<std::size_t>(lane));
      const routing::SelectMemory m = routing::carve_select(bump, len, clusters, most);
      const index_t b = list / heads, h = list % heads;
      const index_t used = options.len.empty() ? len : options.len[static_cast<std::size_t>(b)];
      const StoredMatrix matrix{reinterpret_cast<const std::byte*>(centroids.data + h * centroids.stride[0]), Format::f32,
                                clusters, dim, centroids.stride[1]};
      for (index_t task = 0; task < project_tasks(used, clusters); ++task) {
        float unit[door::kMaxDim];
        project_task(
            task, used, matrix, Weights::by_output, m.project,
            [&](index_t row, index_t k, index_t numbers, float* to) {
              read_token(x, b, h / group, row, unit);
              make_unit(unit, dim);
              std::copy_n(unit + k, numbers, to);
            },
            [&](index_t row, index_t n, index_t numbers, const float* from) {
              for (index_t c = 0; c < numbers; ++c) m.scores[(n + c) * len + row] = from[c];
            });
      }
      for (index_t c = 0; c < clusters; ++c) {
        const std::span<const float> scores{m.scores + c * len, static_cast<std::size_t>(used)};
        const index_t taken = top_k(scores, std::min(window, used), m.found, m.top_k);
        for (index_t n = 0; n < window; ++n) members(b, h, c, n) = n < taken ? m.found[n] : -1;
      }
    });
    return {};
  });
}

// The attention within given clusters.
inline Status routing_attend(const Operand& q_any,                    // [batch, head, pos, dim]
                             const Operand& k_any,                    // [batch, kv_head, pos, dim]
                             const Operand& v_any,                    // [batch, kv_head, pos, dim_v]
                             View<const std::int32_t, 4> q_members,   // [batch, head, cluster, tokens]
                             View<const std::int32_t, 4> k_members,   // [batch, head, cluster, tokens]
                             const Result& out_any,                   // [batch, head, pos, dim_v]
                             const RoutingOptions& options = {}) {
  const Operand q = door::tidy_operand(q_any), k = door::tidy_operand(k_any), v = door::tidy_operand(v_any);
  const Result out = door::tidy_operand(out_any);
  q_members = tidy(q_members);
  k_members = tidy(k_members);
  const routing::Shape s{q.extent[0], q.extent[1], k.extent[1],         q.extent[2],
                         q.extent[3], v.extent[3], q_members.extent[2], options.memory_k.extent[2]};
  door::Memory memory;
  if (Status status = routing::check_attend(q, k, v, out, s, options, memory); !status.ok()) return status;
  if (Status status = memory.reads("q_members", q_members); !status.ok()) return status;
  if (Status status = memory.reads("k_members", k_members); !status.ok()) return status;
  if (Status status = memory.check_apart(); !status.ok()) return status;
  if (Status status = routing::check_lists("q_members", q_members, s); !status.ok()) return status;
  if (Status status = routing::check_lists("k_members", k_members, s); !status.ok()) return status;
  if (s.lists() > door::kMaxSequences)
    return door::unsupported("fovea: up to %td clusters in all are supported, got %td", door::kMaxSequences, s.lists());

  const index_t rows = routing::count_listed(q_members), keys = routing::count_listed(k_members) + s.lists() * s.memory;
  const int lanes = options.executor.lanes();
  Bump size, lane_size;
  routing::carve(size, s, rows, keys);
  routing::carve_lane(lane_size, s.dim_v);
  const std::size_t wanted = size.used() + lane_size.used() * static_cast<std::size_t>(lanes) + kAlignment;
  return door::in_memory<routing::Local>(options.workspace, wanted, [&](std::span<std::byte> bytes) -> Status {
    Bump bump(bytes.data());
    const routing::Gathered g = routing::carve(bump, s, rows, keys);
    routing::list_tokens(q_members, s, 0, g.row_begin, g.row_token);
    routing::list_tokens(k_members, s, s.memory, g.key_begin, g.key_token);
    deal(options.executor, lanes, s.lists(), [&](int, index_t list) { routing::gather_list(s, q, k, v, options, g, list); });
    if (Status status = routing::attend(s, g, options); !status.ok()) return status;
    const index_t blocks = (s.len + routing::kTokens - 1) / routing::kTokens;
    deal(options.executor, lanes, s.batch * s.heads * blocks, [&](int lane, index_t task) {
      Bump slice(bytes.data() + bump.used() + lane_size.used() * static_cast<std::size_t>(lane));
      const index_t first = task % blocks * routing::kTokens, head = task / blocks;
      routing::average(s, g, head / s.heads, head % s.heads, first, std::min(first + routing::kTokens, s.len), out,
                       routing::carve_lane(slice, s.dim_v));
    });
    return {};
  });
}

// Choice and attention. With shared_qk k is q.
inline Status routing_attention(const Operand& q_any, const Operand& k_any, const Operand& v_any,
                                View<const float, 3> centroids,   // [head, cluster, dim]  of unit length
                                index_t window,                   // tokens a cluster takes; more than there are: all
                                const Result& out_any, const RoutingOptions& options = {}) {
  const Operand q = door::tidy_operand(q_any), k = door::tidy_operand(k_any), v = door::tidy_operand(v_any);
  const Result out = door::tidy_operand(out_any);
  centroids = tidy(centroids);
  const routing::Shape s{q.extent[0], q.extent[1], k.extent[1],         q.extent[2],
                         q.extent[3], v.extent[3], centroids.extent[1], options.memory_k.extent[2]};
  door::Memory memory;
  if (Status status = routing::check_attend(q, k, v, out, s, options, memory); !status.ok()) return status;
  if (Status status = routing::check_centroids(centroids, s.heads, s.dim); !status.ok()) return status;
  if (window < 1) return door::invalid("fovea: clusters of %td tokens", window);
  if (options.shared_qk && (k.data != q.data || k.stride != q.stride || k.extent != q.extent || k.format != q.format))
    return door::invalid("fovea: with shared_qk k is q");
  if (Status status = memory.reads("centroids", centroids); !status.ok()) return status;
  if (Status status = memory.check_apart(); !status.ok()) return status;

  const index_t most = std::min(window, s.len), entries = s.lists() * most;
  const std::size_t wanted =
      routing_bytes(s.batch, s.heads, s.len, s.clusters, window, s.memory, s.dim, s.dim_v, options.executor.lanes());
  return door::in_memory<routing::ListLocal>(options.workspace, wanted, [&](std::span<std::byte> bytes) -> Status {
    Bump bump(bytes.data());
    std::int32_t* const lists = bump.take<std::int32_t>(2 * entries);
    const auto members = [&](std::int32_t* data) {
      return View<std::int32_t, 4>{
          data, {s.batch, s.heads, s.clusters, most}, {s.heads * s.clusters * most, s.clusters * most, most, 1}};
    };
    const View<std::int32_t, 4> q_members = members(lists);
    const View<std::int32_t, 4> k_members = options.shared_qk ? q_members : members(lists + entries);
    RoutingOptions inner = options;
    inner.workspace = bytes.subspan(bump.used());
    if (Status status = routing_select(q, centroids, q_members, inner); !status.ok()) return status;
    if (!options.shared_qk) {
      if (Status status = routing_select(k, centroids, k_members, inner); !status.ok()) return status;
    }
    return routing_attend(q, k, v, q_members, k_members, out, inner);
  });
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
