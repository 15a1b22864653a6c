// SPDX-License-Identifier: Apache-2.0
// MoSA, mixture of sparse attention (Piekos, Csordas, Schmidhuber 2025, arXiv 2505.00315): every head is an expert that
// chooses its own k = len / sparsity tokens, and is a dense causal head among them:
//   r = sigmoid(x W_r),  I = the k tokens of largest r,  y_I = r_I * softmax(Q_I K_I' / sqrt(dim)) V_I,  out = sum of y W_o.
// Which tokens a head takes depends on all of them, so this is a prefill. mosa_step is another rule for token-by-token
// decoding and does not reproduce it (docs/mechanisms/mosa.md).
//
// Lists are sorted by position, which turns the published mask (compare original positions) into the causal one, so the
// heads are ragged sequences of one dense call. Projections happen behind the choice: a token a head did not take costs it
// nothing.
#pragma once
#include <optional>

#include "../call/in_memory.hpp"
#include "../call/recurrent_call.hpp"
#include "../call/variant.hpp"
#include "../core/rope.hpp"
#include "../engine/deal.hpp"
#include "../engine/parts/rope.hpp"
#include "../engine/parts/token_order.hpp"
#include "../simd/project.hpp"
#include "../simd/select.hpp"

namespace fovea {
inline namespace v0 {

struct MosaSelectOptions {
  double sparsity = 16;                // k = mosa_count(len, sparsity)
  bool include_first = false;          // token 0 always, and the k - 1 best of the others
  std::span<const index_t> len = {};   // [batch]  tokens in use; absent: all
  Executor executor = {};
  std::span<std::byte> workspace = {};   // mosa_select_bytes(...); empty = a thread-local one of the library
};

struct MosaOptions {
  std::optional<float> scale = {};   // 1/sqrt(dim) if absent
  const RopeTable* rope = nullptr;   // turns chosen q and k by their original positions; published: mosa_rotary_dim(dim)
  RopeLayout rope_layout = RopeLayout::half_split;
  Executor executor = {};
  std::span<std::byte> workspace =
      {};   // mosa_bytes(...) for what is gathered; the dense call inside uses the library's own
};

// Rows of f32, bf16 or f16, innermost stride 1.
struct MosaWeights {
  Operand qkv;   // [1, head, model, 3 dim]  Q, K, V side by side
  Operand out;   // [1, head, dim, model]
};

// What a head keeps while it decodes: its `budget` best tokens so far. The caller's memory.
struct MosaState {
  View<float, 3> score;          // [batch, head, budget]
  View<std::int32_t, 3> token;   // [batch, head, budget]
  Result k, v;                   // [batch, head, budget, dim]
  View<index_t, 2> count;        // [batch, head]  in use; 0 in a new sequence
};

struct MosaStepOptions {
  std::optional<float> scale = {};
  bool include_first = false;   // token 0 is never pushed out
  Executor executor = {};
};

inline namespace FOVEA_ARCH {

// k: min(max(floor(len / sparsity), 2), len).
inline index_t mosa_count(index_t len, double sparsity) {
  return std::min(std::max(static_cast<index_t>(std::floor(static_cast<double>(len) / sparsity)), index_t{2}), len);
}
// Numbers of a head that the published code turns: half of them, an even count.
constexpr index_t mosa_rotary_dim(index_t dim) { return 2 * (dim / 2 / 2); }

namespace mosa {

inline constexpr index_t kTokens = 1024;   // rows of out that are added up at a time

struct SelectMemory {
  float* scores;         // [pos]
  std::int32_t* found;   // [count]
  std::span<std::byte> top_k;
};
inline SelectMemory carve_select(Bump& bump, index_t len, index_t count) {
  // Enough for any shorter sequence: at most two lists of its tokens and a bitmap.
  const std::size_t bytes = 3 * top_k_scratch_bytes(len, len);
  float* const scores = bump.take<float>(len);
  std::int32_t* const found = bump.take<std::int32_t>(count);
  return {scores, found, {bump.take<std::byte>(static_cast<index_t>(bytes)), bytes}};
}
inline std::size_t lane_bytes_of_select(index_t len, index_t count) {
  Bump bump;
  carve_select(bump, len, count);
  return bump.used();
}

struct Shape {
  index_t batch, heads, dim, dim_v;
  index_t lists() const { return batch * heads; }
};

// What the heads took, one list after the other.
struct Gathered {
  index_t* begin;        // [list + 1]
  std::int32_t* token;   // [row]
  float* q;              // [row, q_stride]
  float* k;
  float* v;
  float* out;   // [row, dim_v]
  index_t q_stride, k_stride, v_stride;
  index_t total;

  std::span<const std::int32_t> tokens(index_t list) const {
    return {token + begin[list], static_cast<std::size_t>(begin[list + 1] - begin[list])};
  }
};
// `fused`: Q, K and V of a row side by side, as their projection writes them.
inline Gathered carve(Bump& bump, const Shape& s, index_t total, bool fused) {
  Gathered g{};
  g.begin = bump.take<index_t>(s.lists() + 1);
  g.token = bump.take<std::int32_t>(total);
  g.total = total;
  if (fused) {
    g.q = bump.take<float>(total * 3 * s.dim);
    g.k = g.q == nullptr ? nullptr : g.q + s.dim;
    g.v = g.q == nullptr ? nullptr : g.k + s.dim;
    g.q_stride = g.k_stride = g.v_stride = 3 * s.dim;
  } else {
    g.q = bump.take<float>(total * s.dim);
    g.k = bump.take<float>(total * s.dim);
    g.v = bump.take<float>(total * s.dim_v);
    g.q_stride = g.k_stride = s.dim;
    g.v_stride = s.dim_v;
  }
  g.out = bump.take<float>(total * s.dim_v);
  return g;
}

struct LaneMemory {
  ProjectMemory project;
  float* tile;   // [kTokens, kProjectColumns]
};
inline LaneMemory carve_lane(Bump& bump) {
  const ProjectMemory project = carve_project(bump, kProjectRows);
  return {project, bump.take<float>(kTokens * kProjectColumns)};
}

// Every list: tokens that exist, each once, in rising order; -1 anywhere is nothing.
inline Status check_lists(const View<const std::int32_t, 3>& chosen, index_t batch, index_t heads, index_t len,
                          index_t& total) {
  total = 0;
  if (chosen.extent[0] != batch || chosen.extent[1] != heads)
    return door::invalid("fovea: chosen is [%td, %td, %td], must be [%td, %td, tokens]", chosen.extent[0], chosen.extent[1],
                         chosen.extent[2], batch, heads);
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      std::int32_t before = -1;
      for (index_t n = 0; n < chosen.extent[2]; ++n) {
        const std::int32_t token = chosen(b, h, n);
        if (token < 0) continue;
        if (token >= len || token <= before)
          return door::invalid("fovea: chosen[%td, %td, %td] is %d behind %d; tokens rise and are below %td", b, h, n,
                               static_cast<int>(token), static_cast<int>(before), len);
        before = token;
        ++total;
      }
    }
  }
  return {};
}

inline void list_tokens(const View<const std::int32_t, 3>& chosen, const Shape& s, const Gathered& g) {
  index_t row = 0;
  for (index_t list = 0; list < s.lists(); ++list) {
    g.begin[list] = row;
    for (index_t n = 0; n < chosen.extent[2]; ++n) {
      const std::int32_t token = chosen(list / s.heads, list % s.heads, n);
      if (token >= 0) g.token[row++] = token;
    }
  }
  g.begin[s.lists()] = row;
}

inline Status check_rope(const RopeTable* table, index_t dim, index_t len) {
  if (table == nullptr || len == 0) return {};
  if (table->cos == nullptr || table->sin == nullptr || 2 * table->pairs > dim || table->first_pos > 0 ||
      table->first_pos + table->len < len)
    return door::invalid(
        "fovea: the RoPE table turns %td numbers of %td and holds the positions %td to %td, tokens are 0 to %td",
        2 * table->pairs, dim, table->first_pos, table->first_pos + table->len - 1, len - 1);
  return {};
}

inline void turn(const MosaOptions& options, const Gathered& g, index_t list, index_t dim) {
  if (options.rope == nullptr) return;
  const RopeTable& table = *options.rope;
  for (index_t row = g.begin[list]; row < g.begin[list + 1]; ++row) {
    for (float* const x : {g.q + row * g.q_stride, g.k + row * g.k_stride})
      rotate_rows(options.rope_layout, x, dim, x, dim, 1, table.cos_at(g.token[row]), table.sin_at(g.token[row]),
                  table.stride, table.pairs, dim);
  }
}

// One dense causal call; a list is a sequence.
inline Status attend(const Shape& s, const Gathered& g, const MosaOptions& options) {
  if (g.total == 0) return {};
  AttentionOptions dense;
  dense.scale = options.scale;
  dense.causal = Causal::top_left;
  dense.cu_len_q = dense.cu_len_k = {g.begin, static_cast<std::size_t>(s.lists() + 1)};
  dense.executor = options.executor;
  const auto rows = [&](float* data, index_t dim, index_t stride) {
    return Tensor<float>{data, {1, 1, g.total, dim}, {0, 0, stride, 1}};
  };
  const Operand q = rows(g.q, s.dim, g.q_stride), k = rows(g.k, s.dim, g.k_stride), v = rows(g.v, s.dim_v, g.v_stride);
  const Result out = rows(g.out, s.dim_v, s.dim_v);
  const auto plain = variant();
  return door::run(door::call_of_variant<Formats<Format::f32>>(q, door::kv_of(k, v), out, dense, plain));
}

FOVEA_INLINE float factor_of(const View<const float, 3>& router, index_t list, index_t heads, index_t token) {
  if (!router) return 1.f;
  return router.data[list / heads * router.stride[0] + list % heads * router.stride[1] + token * router.stride[2]];
}

inline Status check_router(const View<const float, 3>& router, index_t batch, index_t heads, index_t len) {
  if (!router || router.extent == std::array<index_t, 3>{batch, heads, len}) return {};
  return door::invalid("fovea: router is [%td, %td, %td], must be [%td, %td, %td]", router.extent[0], router.extent[1],
                       router.extent[2], batch, heads, len);
}

inline Status check_sizes(index_t batch, index_t heads, index_t len, index_t dim, index_t dim_v) {
  if (batch < 0 || heads < 1 || len < 0 || len > door::kMaxLength || dim < 1 || dim > door::kMaxDim || dim_v < 1 ||
      dim_v > door::kMaxDim)
    return door::unsupported("fovea: batch %td, heads %td, len %td, dims %td and %td; dims are 1 to %td", batch, heads, len,
                             dim, dim_v, door::kMaxDim);
  return {};
}

// The Q, K and V of a list's tokens: task `task` of project_tasks, if the list is that long.
inline void project_in(const Operand& x, const Operand& qkv, const Gathered& g, const Shape& s, index_t list, index_t task,
                       const ProjectMemory& memory) {
  const std::span<const std::int32_t> tokens = g.tokens(list);
  const auto count = static_cast<index_t>(tokens.size());
  if (count == 0 || task >= project_tasks(count, 3 * s.dim)) return;
  const index_t b = list / s.heads, number = row_bytes(x.format, 1);
  project_task(
      task, count, matrix_of(qkv, list % s.heads), Weights::by_input, memory,
      [&](index_t row, index_t k, index_t numbers, float* to) {
        const index_t at = b * x.stride[0] + tokens[static_cast<std::size_t>(row)] * x.stride[2] + k * x.stride[3];
        read_strided(x.format, x.data + at * number, x.stride[3], numbers, to);
      },
      [&](index_t row, index_t n, index_t numbers, const float* from) {
        std::copy_n(from, numbers, g.q + (g.begin[list] + row) * g.q_stride + n);
      });
}

// Columns `column` * kProjectColumns .. of kTokens rows of out: the heads add up in their order, whoever does which block.
inline void project_out(const Operand& weights, const View<const float, 3>& router, const Gathered& g, const Shape& s,
                        index_t b, index_t block, index_t column, const Result& out, const LaneMemory& memory) {
  const index_t model = out.extent[3], len = out.extent[2], first = block * kTokens, end = std::min(first + kTokens, len);
  const index_t left = column * kProjectColumns, width = std::min(kProjectColumns, model - left);
  const index_t across = (model + kProjectColumns - 1) / kProjectColumns;
  std::fill_n(memory.tile, (end - first) * kProjectColumns, 0.f);
  for (index_t h = 0; h < s.heads; ++h) {
    const index_t list = b * s.heads + h;
    const std::span<const std::int32_t> tokens = g.tokens(list);
    const auto at = [&](index_t token) {
      return std::lower_bound(tokens.begin(), tokens.end(), static_cast<std::int32_t>(token)) - tokens.begin();
    };
    const index_t from = at(first), count = at(end) - from;
    for (index_t rows = 0; rows < count; rows += kProjectRows) {
      project_task(
          rows / kProjectRows * across + column, count, matrix_of(weights, h), Weights::by_input, memory.project,
          [&](index_t row, index_t k, index_t numbers, float* to) {
            const float factor = factor_of(router, list, s.heads, tokens[static_cast<std::size_t>(from + row)]);
            const float* const y = g.out + (g.begin[list] + from + row) * s.dim + k;
            for (index_t d = 0; d < numbers; ++d) to[d] = y[d] * factor;
          },
          [&](index_t row, index_t n, index_t numbers, const float* y) {
            const index_t token = tokens[static_cast<std::size_t>(from + row)];
            float* const to = memory.tile + (token - first) * kProjectColumns + n - left;
            for (index_t d = 0; d < numbers; ++d) to[d] += y[d];
          });
    }
  }
  const index_t number = row_bytes(out.format, 1);
  for (index_t t = first; t < end; ++t) {
    const index_t at = b * out.stride[0] + t * out.stride[2] + left * out.stride[3];
    write_strided(out.format, memory.tile + (t - first) * kProjectColumns, width, out.data + at * number, out.stride[3]);
  }
}

inline Status check_options(const MosaOptions& options, index_t dim, index_t len) {
  if (options.scale && !std::isfinite(*options.scale))
    return door::invalid("fovea: scale %g is not finite", static_cast<double>(*options.scale));
  if (Status s = check_lanes(options.executor); !s.ok()) return s;
  return check_rope(options.rope, dim, len);
}

struct StepMemory {
  index_t* len_k;   // [head]
  float* out;       // [head, dim_v]
};
inline StepMemory carve_step(Bump& bump, index_t heads, index_t dim_v) {
  index_t* const len_k = bump.take<index_t>(heads);
  return {len_k, bump.take<float>(heads * dim_v)};
}

template <Format... List>
bool is_one_of(Format format, Formats<List...>) {
  return ((format == List) || ...);
}

template <class Compiled>
Status check_step(const Operand& q, const Operand& k, const Operand& v, const View<const float, 2>& router, index_t position,
                  const MosaState& state, const Result& out, Compiled compiled) {
  const index_t batch = q.extent[0], heads = q.extent[1], dim = q.extent[3], dim_v = v.extent[3];
  const index_t budget = state.k.extent[2];
  door::Memory memory;
  for (const auto& [name, tensor] : {std::pair<const char*, const Operand*>{"q", &q}, {"k", &k}, {"v", &v}}) {
    if (Status s = door::check_plain(name, tensor->format); !s.ok()) return s;
    if (Status s = memory.reads(name, *tensor); !s.ok()) return s;
  }
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Result*>{"state.k", &state.k}, {"state.v", &state.v}, {"out", &out}}) {
    if (Status s = door::check_plain(name, tensor->format); !s.ok()) return s;
    if (Status s = memory.writes(name, *tensor); !s.ok()) return s;
    if (tensor != &out && tensor->stride[3] != 1 && tensor->extent[3] > 1)
      return door::unsupported("fovea: %s has innermost stride %td, must be 1", name, tensor->stride[3]);
    if (tensor != &out && !is_one_of(tensor->format, compiled))
      return door::unsupported("fovea: %s is stored as %s, which is not among the formats of this call", name,
                               name_of(tensor->format));
  }
  if (Status s = check_sizes(batch, heads, 1, dim, dim_v); !s.ok()) return s;
  if (Status s = door::check_extents("q", q, {batch, heads, 1, dim}, "one token"); !s.ok()) return s;
  if (Status s = door::check_extents("k", k, {batch, heads, 1, dim}, "q"); !s.ok()) return s;
  if (Status s = door::check_extents("v", v, {batch, heads, 1, dim_v}, "q"); !s.ok()) return s;
  if (Status s = door::check_extents("out", out, {batch, heads, 1, dim_v}, "q and v"); !s.ok()) return s;
  if (Status s = door::check_extents("state.k", state.k, {batch, heads, budget, dim}, "q"); !s.ok()) return s;
  if (Status s = door::check_extents("state.v", state.v, {batch, heads, budget, dim_v}, "state.k"); !s.ok()) return s;
  const std::array<index_t, 3> slots{batch, heads, budget};
  if (budget < 1 || budget > door::kMaxLength || state.score.extent != slots || state.token.extent != slots ||
      state.count.extent != std::array<index_t, 2>{batch, heads} || router.extent != state.count.extent)
    return door::invalid(
        "fovea: a state of %td tokens for %td x %td heads: score [%td, %td, %td], count [%td, %td], router [%td, %td]",
        budget, batch, heads, state.score.extent[0], state.score.extent[1], state.score.extent[2], state.count.extent[0],
        state.count.extent[1], router.extent[0], router.extent[1]);
  if (position < 0 || position > door::kMaxLength) return door::invalid("fovea: position %td is outside the text", position);
  if (Status s = memory.reads("router", router); !s.ok()) return s;
  if (Status s = memory.writes("state.score", state.score); !s.ok()) return s;
  if (Status s = memory.writes("state.token", state.token); !s.ok()) return s;
  if (Status s = memory.writes("state.count", state.count); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      if (state.count(b, h) < 0 || state.count(b, h) > budget)
        return door::invalid("fovea: state.count[%td, %td] is %td, the state has %td slots", b, h, state.count(b, h),
                             budget);
    }
  }
  return {};
}

// The slot a token of score r takes, counted in; -1 where it does not enter. NaN and -inf never do.
inline index_t slot_for(const MosaState& state, index_t b, index_t h, float r, index_t position, bool include_first) {
  const bool first = include_first && position == 0;
  if (!(r > -std::numeric_limits<float>::infinity()) && !first) return -1;
  index_t& count = state.count(b, h);
  if (count < state.score.extent[2]) return count++;
  index_t worst = -1;
  for (index_t n = 0; n < count; ++n) {
    if (include_first && state.token(b, h, n) == 0) continue;
    if (worst >= 0) {
      const float here = state.score(b, h, n), lowest = state.score(b, h, worst);
      if (here > lowest || (here == lowest && state.token(b, h, n) < state.token(b, h, worst))) continue;
    }
    worst = n;
  }
  return worst >= 0 && r > state.score(b, h, worst) ? worst : -1;
}

struct Local : door::LocalBytes {};
struct SelectLocal : door::LocalBytes {};

}   // namespace mosa

// router[b, h, t] = sigmoid(x_t W_r).
inline Status mosa_router(const Operand& x_any,     // [batch, 1, pos, model]
                          const Operand& weights,   // [1, 1, model, head], innermost stride 1
                          View<float, 3> router,    // [batch, head, pos]
                          const MosaOptions& options = {}) {
  const Operand x = door::tidy_operand(x_any);
  router = tidy(router);
  const index_t batch = x.extent[0], len = x.extent[2], heads = router.extent[1];
  if (Status s = door::check_plain("x", x.format); !s.ok()) return s;
  if (Status s = door::check_extents("x", x, {batch, 1, len, x.extent[3]}, "itself: one head"); !s.ok()) return s;
  if (Status s = door::check_extents("weights", weights, {1, 1, x.extent[3], heads}, "x and router"); !s.ok()) return s;
  if (Status s = mosa::check_router(router, batch, heads, len); !s.ok()) return s;
  if (!is_weight_format(weights.format))
    return door::unsupported("fovea: router weights are %s; f32, bf16 and f16 are supported", name_of(weights.format));
  if (Status s = door::check_innermost("weights", weights); !s.ok()) return s;
  door::Memory memory;
  if (Status s = memory.reads("x", x); !s.ok()) return s;
  if (Status s = memory.reads("weights", weights); !s.ok()) return s;
  if (Status s = memory.writes("router", router); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;

  Bump lane;
  carve_project(lane, len);
  const int lanes = options.executor.lanes();
  const std::size_t wanted = lane.used() * static_cast<std::size_t>(lanes) + kAlignment;
  return door::in_memory<mosa::Local>(options.workspace, wanted, [&](std::span<std::byte> memory_bytes) -> Status {
    std::byte* const bytes = memory_bytes.data();
    const index_t tasks = project_tasks(len, heads);
    deal(options.executor, lanes, batch * tasks, [&](int n, index_t task) {
      Bump bump(bytes + lane.used() * static_cast<std::size_t>(n));
      const ProjectMemory project = carve_project(bump, len);
      const index_t b = task / tasks;
      const index_t number = row_bytes(x.format, 1);
      project_task(
          task % tasks, len, matrix_of(weights), Weights::by_input, project,
          [&](index_t row, index_t k, index_t count, float* to) {
            const index_t at = b * x.stride[0] + row * x.stride[2] + k * x.stride[3];
            read_strided(x.format, x.data + at * number, x.stride[3], count, to);
          },
          [&](index_t row, index_t first, index_t count, const float* from) {
            alignas(f32) float opened[kLanes];
            for (index_t d = 0; d < count; d += kLanes) {
              // e^-x beyond 2^125 is a sigmoid of 0 to any use.
              const f32 t = min(load_some(from + d, std::min(kLanes, count - d)) * f32(-kLog2e), f32(125.f));
              store(opened, reciprocal(f32(1.f) + exp2(t)));
              for (index_t i = 0; i < kLanes && d + i < count; ++i) router(b, first + d + i, row) = opened[i];
            }
          });
    });
    return {};
  });
}

inline std::size_t mosa_select_bytes(index_t len, double sparsity, int lanes = 1) {
  return mosa::lane_bytes_of_select(len, mosa_count(len, sparsity)) * static_cast<std::size_t>(lanes) + kAlignment;
}

// The tokens every head takes: rising, -1 behind them. Of equal scores the earlier token; NaN and -inf are never taken.
inline Status mosa_select(View<const float, 3> router,    // [batch, head, pos]
                          View<std::int32_t, 3> chosen,   // [batch, head, at least mosa_count(pos)]
                          const MosaSelectOptions& options = {}) {
  router = tidy(router);
  chosen = tidy(chosen);
  const index_t batch = router.extent[0], heads = router.extent[1], len = router.extent[2];
  if (!(options.sparsity > 0) || !std::isfinite(options.sparsity))
    return door::invalid("fovea: sparsity is %g, must be positive", options.sparsity);
  if (len > door::kMaxLength)
    return door::unsupported("fovea: up to %td tokens are supported, got %td", door::kMaxLength, len);
  const index_t most = mosa_count(len, options.sparsity);
  if (chosen.extent[0] != batch || chosen.extent[1] != heads || chosen.extent[2] < most)
    return door::invalid("fovea: chosen is [%td, %td, %td], must be [%td, %td, at least %td]", chosen.extent[0],
                         chosen.extent[1], chosen.extent[2], batch, heads, most);
  if (!options.len.empty() && static_cast<index_t>(options.len.size()) != batch)
    return door::invalid("fovea: len has %zu entries for %td sequences", options.len.size(), batch);
  for (std::size_t b = 0; b < options.len.size(); ++b) {
    if (options.len[b] < 0 || options.len[b] > len)
      return door::invalid("fovea: len[%zu] = %td is outside 0 .. %td", b, options.len[b], len);
  }
  door::Memory memory;
  if (Status s = memory.reads("router", router); !s.ok()) return s;
  if (Status s = memory.writes("chosen", chosen); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;

  const int lanes = options.executor.lanes();
  const std::size_t lane_bytes = mosa::lane_bytes_of_select(len, most);
  const std::size_t wanted = lane_bytes * static_cast<std::size_t>(lanes) + kAlignment;
  return door::in_memory<mosa::SelectLocal>(options.workspace, wanted, [&](std::span<std::byte> memory_bytes) -> Status {
    std::byte* const bytes = memory_bytes.data();
    deal(options.executor, lanes, batch * heads, [&](int lane, index_t list) {
      Bump bump(bytes + lane_bytes * static_cast<std::size_t>(lane));
      const mosa::SelectMemory m = mosa::carve_select(bump, len, most);
      const index_t b = list / heads, h = list % heads;
      const index_t used = options.len.empty() ? len : options.len[static_cast<std::size_t>(b)];
      const index_t count = mosa_count(used, options.sparsity);
      for (index_t t = 0; t < used; ++t) m.scores[t] = router(b, h, t);
      const index_t first = options.include_first && used > 0 ? 1 : 0;
      const std::span<const float> others{m.scores + first, static_cast<std::size_t>(used - first)};
      const index_t taken = top_k(others, count - first, m.found, m.top_k) + first;
      for (index_t n = 0; n < chosen.extent[2]; ++n)
        chosen(b, h, n) = n < first ? 0 : n < taken ? m.found[n - first] + static_cast<std::int32_t>(first) : -1;
    });
    return {};
  });
}

// Bytes of workspace of mosa_attention and mosa_layer for lists of `total` tokens in all (batch * head * mosa_count at
// most).
inline std::size_t mosa_attention_bytes(index_t batch, index_t heads, index_t total, index_t dim, index_t dim_v) {
  Bump bump;
  mosa::carve(bump, {batch, heads, dim, dim_v}, total, false);
  return bump.used() + kAlignment;
}
inline std::size_t mosa_layer_bytes(index_t batch, index_t heads, index_t total, index_t dim, int lanes = 1) {
  Bump bump, lane;
  mosa::carve(bump, {batch, heads, dim, dim}, total, true);
  mosa::carve_lane(lane);
  return bump.used() + lane.used() * static_cast<std::size_t>(lanes) + kAlignment;
}

// The attention of every head among its own tokens, rows times r; rows a head did not take are 0. q, k and v are
// projections of all tokens: where nobody else needs them, mosa_layer saves most of them.
inline Status mosa_attention(const Operand& q_any,                 // [batch, head, pos, dim]
                             const Operand& k_any,                 // [batch, kv_head, pos, dim]
                             const Operand& v_any,                 // [batch, kv_head, pos, dim_v]
                             View<const float, 3> router,          // [batch, head, pos]  absent: 1
                             View<const std::int32_t, 3> chosen,   // [batch, head, tokens]  rising; -1 is nothing
                             const Result& out_any,                // [batch, head, pos, dim_v]
                             const MosaOptions& options = {}) {
  const Operand q = door::tidy_operand(q_any), k = door::tidy_operand(k_any), v = door::tidy_operand(v_any);
  const Result out = door::tidy_operand(out_any);
  router = tidy(router);
  chosen = tidy(chosen);
  const mosa::Shape s{q.extent[0], q.extent[1], q.extent[3], v.extent[3]};
  const index_t len = q.extent[2], kv_heads = k.extent[1];
  for (const auto& [name, tensor] : {std::pair<const char*, const Operand*>{"q", &q}, {"k", &k}, {"v", &v}}) {
    if (Status status = door::check_plain(name, tensor->format); !status.ok()) return status;
  }
  if (Status status = door::check_plain("out", out.format); !status.ok()) return status;
  if (Status status = mosa::check_sizes(s.batch, s.heads, len, s.dim, s.dim_v); !status.ok()) return status;
  if (kv_heads < 1 || s.heads % kv_heads != 0)
    return door::invalid("fovea: kv heads (%td) do not divide q heads (%td)", kv_heads, s.heads);
  if (Status status = door::check_extents("k", k, {s.batch, kv_heads, len, s.dim}, "q"); !status.ok()) return status;
  if (Status status = door::check_extents("v", v, {s.batch, kv_heads, len, s.dim_v}, "k"); !status.ok()) return status;
  if (Status status = door::check_extents("out", out, {s.batch, s.heads, len, s.dim_v}, "q and v"); !status.ok())
    return status;
  if (Status status = mosa::check_router(router, s.batch, s.heads, len); !status.ok()) return status;
  if (Status status = mosa::check_options(options, s.dim, len); !status.ok()) return status;
  door::Memory memory;
  for (const auto& [name, tensor] : {std::pair<const char*, const Operand*>{"q", &q}, {"k", &k}, {"v", &v}}) {
    if (Status status = memory.reads(name, *tensor); !status.ok()) return status;
  }
  if (Status status = memory.reads("router", router); !status.ok()) return status;
  if (Status status = memory.reads("chosen", chosen); !status.ok()) return status;
  if (Status status = memory.writes("out", out); !status.ok()) return status;
  if (Status status = memory.check_apart(); !status.ok()) return status;
  index_t total = 0;
  if (Status status = mosa::check_lists(chosen, s.batch, s.heads, len, total); !status.ok()) return status;

  const std::size_t wanted = mosa_attention_bytes(s.batch, s.heads, total, s.dim, s.dim_v);
  return door::in_memory<mosa::Local>(options.workspace, wanted, [&](std::span<std::byte> memory_bytes) -> Status {
    std::byte* const bytes = memory_bytes.data();
    Bump bump(bytes);
    const mosa::Gathered g = mosa::carve(bump, s, total, false);
    mosa::list_tokens(chosen, s, g);
    const int lanes = options.executor.lanes();
    deal(options.executor, lanes, s.lists(), [&](int, index_t list) {
      const index_t b = list / s.heads, h = list % s.heads, kv_head = h / (s.heads / kv_heads);
      for (index_t row = g.begin[list]; row < g.begin[list + 1]; ++row) {
        read_token(q, b, h, g.token[row], g.q + row * g.q_stride);
        read_token(k, b, kv_head, g.token[row], g.k + row * g.k_stride);
        read_token(v, b, kv_head, g.token[row], g.v + row * g.v_stride);
      }
      mosa::turn(options, g, list, s.dim);
    });
    if (Status status = mosa::attend(s, g, options); !status.ok()) return status;
    deal(options.executor, lanes, s.lists(), [&](int, index_t list) {
      const index_t b = list / s.heads, h = list % s.heads;
      const float zeros[door::kMaxDim] = {};
      index_t row = g.begin[list];
      for (index_t t = 0; t < len; ++t) {
        if (row == g.begin[list + 1] || g.token[row] != t) {
          write_token(zeros, out, b, h, t);
          continue;
        }
        float* const y = g.out + row++ * s.dim_v;
        const float factor = mosa::factor_of(router, list, s.heads, t);
        for (index_t d = 0; d < s.dim_v; ++d) y[d] *= factor;
        write_token(y, out, b, h, t);
      }
    });
    return {};
  });
}

// The whole layer for given choices: projections of the chosen tokens, attention, rows times r, W_o, sum over the heads.
// Tokens that no head took get 0.
inline Status mosa_layer(const Operand& x_any,                                      // [batch, 1, pos, model]
                         const MosaWeights& weights, View<const float, 3> router,   // [batch, head, pos]  absent: 1
                         View<const std::int32_t, 3> chosen,   // [batch, head, tokens]  rising; -1 is nothing
                         const Result& out_any,                // [batch, 1, pos, model]
                         const MosaOptions& options = {}) {
  const Operand x = door::tidy_operand(x_any);
  const Result out = door::tidy_operand(out_any);
  router = tidy(router);
  chosen = tidy(chosen);
  const index_t heads = weights.qkv.extent[1], dim = weights.out.extent[2], model = x.extent[3], len = x.extent[2];
  const mosa::Shape s{x.extent[0], heads, dim, dim};
  if (Status status = door::check_plain("x", x.format); !status.ok()) return status;
  if (Status status = door::check_plain("out", out.format); !status.ok()) return status;
  if (Status status = mosa::check_sizes(s.batch, heads, len, dim, dim); !status.ok()) return status;
  if (Status status = door::check_extents("x", x, {s.batch, 1, len, model}, "itself: one head"); !status.ok()) return status;
  if (Status status = door::check_extents("out", out, x.extent, "x"); !status.ok()) return status;
  if (Status status =
          door::check_extents("qkv weights", weights.qkv, {1, heads, model, 3 * dim}, "x and the output weights");
      !status.ok())
    return status;
  if (Status status = door::check_extents("output weights", weights.out, {1, heads, dim, model}, "x and the qkv weights");
      !status.ok())
    return status;
  door::Memory memory;
  for (const auto& [name, matrix] :
       {std::pair<const char*, const Operand*>{"qkv weights", &weights.qkv}, {"output weights", &weights.out}}) {
    if (!is_weight_format(matrix->format))
      return door::unsupported("fovea: %s are %s; f32, bf16 and f16 are supported", name, name_of(matrix->format));
    if (Status status = door::check_innermost(name, *matrix); !status.ok()) return status;
    if (Status status = memory.reads(name, *matrix); !status.ok()) return status;
  }
  if (Status status = mosa::check_router(router, s.batch, heads, len); !status.ok()) return status;
  if (Status status = mosa::check_options(options, dim, len); !status.ok()) return status;
  if (Status status = memory.reads("x", x); !status.ok()) return status;
  if (Status status = memory.reads("router", router); !status.ok()) return status;
  if (Status status = memory.reads("chosen", chosen); !status.ok()) return status;
  if (Status status = memory.writes("out", out); !status.ok()) return status;
  if (Status status = memory.check_apart(); !status.ok()) return status;
  index_t total = 0;
  if (Status status = mosa::check_lists(chosen, s.batch, heads, len, total); !status.ok()) return status;

  const int lanes = options.executor.lanes();
  return door::in_memory<mosa::Local>(options.workspace, mosa_layer_bytes(s.batch, heads, total, dim, lanes),
                                      [&](std::span<std::byte> memory_bytes) -> Status {
                                        std::byte* const bytes = memory_bytes.data();
                                        Bump bump(bytes), lane;
                                        const mosa::Gathered g = mosa::carve(bump, s, total, true);
                                        mosa::carve_lane(lane);
                                        const auto memory_of = [&](int n) {
                                          Bump slice(bytes + bump.used() + lane.used() * static_cast<std::size_t>(n));
                                          return mosa::carve_lane(slice);
                                        };
                                        mosa::list_tokens(chosen, s, g);
                                        const index_t most = project_tasks(chosen.extent[2], 3 * dim);
                                        deal(options.executor, lanes, s.lists() * most, [&](int n, index_t task) {
                                          const index_t list = task / most;
                                          mosa::project_in(x, weights.qkv, g, s, list, task % most, memory_of(n).project);
                                        });
                                        deal(options.executor, lanes, s.lists(),
                                             [&](int, index_t list) { mosa::turn(options, g, list, dim); });
                                        if (Status status = mosa::attend(s, g, options); !status.ok()) return status;
                                        const index_t blocks = (len + mosa::kTokens - 1) / mosa::kTokens;
                                        const index_t across = (model + kProjectColumns - 1) / kProjectColumns;
                                        deal(options.executor, lanes, s.batch * blocks * across, [&](int n, index_t task) {
                                          mosa::project_out(weights.out, router, g, s, task / across / blocks,
                                                            task / across % blocks, task % across, out, memory_of(n));
                                        });
                                        return {};
                                      });
}

// One token in another rule than the prefill's: a head keeps its `budget` best tokens so far. The new token attends, to what
// the head keeps and to itself, if it is among them; else its row is 0. Who is pushed out stays out. Until `budget` tokens
// have come this is dense attention times r. Of equal scores the earlier token stays.
template <class Compiled = AllFormats>
Status mosa_step(const Operand& q_any,          // [batch, head, 1, dim]  rotated, if at all, by `position`
                 const Operand& k_any,          // [batch, head, 1, dim]
                 const Operand& v_any,          // [batch, head, 1, dim_v]
                 View<const float, 2> router,   // [batch, head]
                 index_t position, const MosaState& state_any,
                 const Result& out_any,   // [batch, head, 1, dim_v]
                 const MosaStepOptions& options = {}) {
  const Operand q = door::tidy_operand(q_any), k = door::tidy_operand(k_any), v = door::tidy_operand(v_any);
  const Result out = door::tidy_operand(out_any);
  MosaState state = state_any;
  state.k = door::tidy_operand(state.k);
  state.v = door::tidy_operand(state.v);
  state.score = tidy(state.score);
  state.token = tidy(state.token);
  state.count = tidy(state.count);
  router = tidy(router);
  const index_t batch = q.extent[0], heads = q.extent[1], dim = q.extent[3], dim_v = v.extent[3];
  if (Status s = mosa::check_step(q, k, v, router, position, state, out, Compiled{}); !s.ok()) return s;

  Bump size;
  mosa::carve_step(size, heads, dim_v);
  return door::in_memory<mosa::Local>({}, size.used() + kAlignment, [&](std::span<std::byte> memory_bytes) -> Status {
    std::byte* const bytes = memory_bytes.data();
    Bump bump(bytes);
    const mosa::StepMemory m = mosa::carve_step(bump, heads, dim_v);
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        const index_t slot = mosa::slot_for(state, b, h, router(b, h), position, options.include_first);
        m.len_k[h] = slot < 0 ? 0 : state.count(b, h);
        if (slot < 0) continue;
        float numbers[door::kMaxDim];
        state.score(b, h, slot) = router(b, h);
        state.token(b, h, slot) = static_cast<std::int32_t>(position);
        read_token(k, b, h, 0, numbers);
        write_token(numbers, state.k, b, h, slot);
        read_token(v, b, h, 0, numbers);
        write_token(numbers, state.v, b, h, slot);
      }
      // Heads take the place of sequences, each with its own number of keys.
      AttentionOptions dense;
      dense.scale = options.scale;
      dense.len_k = {m.len_k, static_cast<std::size_t>(heads)};
      dense.executor = options.executor;
      Operand queries = q;
      queries.data += b * q.stride[0] * row_bytes(q.format, 1);
      queries.extent = {heads, 1, 1, dim};
      queries.stride = {q.stride[1], 0, 0, q.stride[3]};
      const auto stored = [&](const Result& x) {
        const index_t number = row_bytes(x.format, 1);
        return Stored{x.data + b * x.stride[0] * number, x.format, {x.stride[1] * number, 0, x.stride[2] * number}};
      };
      Kv kv;
      kv.k = stored(state.k);
      kv.v = stored(state.v);
      kv.dim_qk = dim;
      kv.dim_v = dim_v;
      kv.batch = heads;
      kv.len = state.k.extent[2];
      const auto plain = variant();
      const Tensor<float> rows{m.out, {heads, 1, 1, dim_v}, {dim_v, 0, 0, 1}};
      if (Status s = door::run(door::call_of_variant<Compiled>(queries, kv, rows, dense, plain)); !s.ok()) return s;
      for (index_t h = 0; h < heads; ++h) {
        float* const row = m.out + h * dim_v;
        for (index_t d = 0; d < dim_v; ++d) row[d] = m.len_k[h] == 0 ? 0.f : row[d] * router(b, h);
        write_token(row, out, b, h, 0);
      }
    }
    return {};
  });
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
