// SPDX-License-Identifier: Apache-2.0
// Native sparse attention (NSA; Yuan et al. 2025, arXiv 2502.11089): three softmaxes over one sequence, gated and added.
//   o_t = g_cmp Attn(q, compressed) + g_slc Attn(q, selected blocks) + g_win Attn(q, the last w keys)
//   compressed   entry c = phi(tokens c s .. c s + l - 1), visible to position t if c s + l - 1 <= t
//   selected     blocks of l' tokens: the first `init`, the last `local`, and the best others, n in all, a list per kv head;
//                a block's score is what the weights of the compressed branch give it:
//                sum over the group's heads and over entries c of p_c * (strides of s tokens that c and the block share)
//   window       the keys t - w + 1 .. t
// Query i of a sequence has position q_offset + i, or len_k - len_q + i without q_offset.
//
// The weights of the compressed branch are made once: whole rows of them stay in the workspace, where they are added up over
// the heads of the group, in head order, and then multiply V. K is packed for few rows too, so a row's weights, and with
// them its blocks, have the same bits in prefill and in decode.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../call/in_memory.hpp"
#include "../call/sparse_call.hpp"
#include "../call/variant.hpp"
#include "../core/key_lists.hpp"
#include "../engine/deal.hpp"
#include "../engine/parts/rope.hpp"
#include "../simd/project.hpp"
#include "../simd/select.hpp"

namespace fovea {
inline namespace v0 {

// The defaults are the paper's. stride divides block and selected_block; init + local <= selected.
struct NsaShape {
  index_t block = 32, stride = 16;   // l, s
  index_t selected_block = 64;       // l'
  index_t selected = 16;             // n, forced blocks included
  index_t init = 1, local = 2;       // forced: the first blocks, and the last ones up to the query's own
  index_t window = 512;              // w keys, the query's own included
};

// phi. Weights of the last two are f32, bf16 or f16, innermost stride 1; the inputs of a block are token by token.
enum class NsaPool : std::uint8_t { mean, weighted, linear, mlp };
struct NsaPhi {
  NsaPool pool = NsaPool::mean;
  View<const float, 3> embedding = {};     // [kv_head | 1, l, dim]  added to the tokens of a block by their place in it
  View<const float, 2> slot_weight = {};   // weighted: [kv_head | 1, l]
  Operand first = {};                      // linear, mlp: [1, kv_head | 1, l * dim, dim out | hidden]
  Operand second = {};                     // mlp, behind a ReLU: [1, kv_head | 1, hidden, dim out]
  View<const float, 2> first_bias = {};    // [kv_head | 1, dim out | hidden]
  View<const float, 2> second_bias = {};   // [kv_head | 1, dim out]
};

// pool_then_rope turns entry c by the position of its first token, rope_then_pool each token by its own before it is pooled.
// none: the tokens come turned already, or the compressed branch has no positions (NsaOptions::compressed_q).
enum class NsaRopeOrder : std::uint8_t { none, pool_then_rope, rope_then_pool };
struct NsaRope {
  NsaRopeOrder order = NsaRopeOrder::none;
  const RopeTable* table = nullptr;
  RopeLayout layout = RopeLayout::half_split;
  index_t position = 0;   // of token 0
};

struct NsaOptions {
  std::optional<float> scale = {};          // 1/sqrt(dim_qk) if absent
  std::span<const index_t> len_k = {};      // [batch]  tokens in use; the stored length if empty
  std::span<const index_t> q_offset = {};   // [batch]  position of query 0; len_k - len_q if empty
  View<float, 3> lse = {};                  // [batch, q_head, pos]  of one branch; nsa_attention refuses it
  const Kv* window_kv = nullptr;            // keys and values of the window's own; null: those of the selected branch
  Operand compressed_q = {};                // queries of the compressed branch where they differ (q without positions)
  bool gate_logits = false;                 // the gates are yet to go through a sigmoid
  Executor executor = {};
  std::span<std::byte> workspace = {};   // at least nsa_workspace_bytes; empty = a thread-local one of the library
};

inline namespace FOVEA_ARCH {

// Entries of `tokens` tokens that are complete: what the last of them sees.
FOVEA_INLINE index_t nsa_entries(index_t tokens, const NsaShape& shape) {
  return tokens < shape.block ? 0 : (tokens - shape.block) / shape.stride + 1;
}
FOVEA_INLINE index_t nsa_blocks(index_t tokens, const NsaShape& shape) {
  return tokens <= 0 ? 0 : (tokens + shape.selected_block - 1) / shape.selected_block;
}

inline Status check_nsa(const NsaShape& s) {
  if (s.block < 1 || s.stride < 1 || s.selected_block < 1 || s.selected < 1 || s.init < 0 || s.local < 0 || s.window < 1)
    return door::invalid(
        "fovea: nsa: block %td, stride %td, selected_block %td, selected %td, init %td, local %td, window %td", s.block,
        s.stride, s.selected_block, s.selected, s.init, s.local, s.window);
  if (s.block % s.stride != 0 || s.selected_block % s.stride != 0)
    return door::invalid("fovea: nsa: stride %td must divide block %td and selected_block %td", s.stride, s.block,
                         s.selected_block);
  if (s.init > s.selected || s.local > s.selected - s.init)
    return door::invalid("fovea: nsa: init %td + local %td blocks are forced, only %td are selected", s.init, s.local,
                         s.selected);
  if (std::max({s.block, s.selected_block, s.selected, s.window}) > door::kMaxLength)
    return door::unsupported("fovea: nsa: block %td, selected_block %td, selected %td, window %td: at most %td each",
                             s.block, s.selected_block, s.selected, s.window, door::kMaxLength);
  return {};
}

namespace nsa {

struct Memory : door::LocalBytes {};

template <class Tensor4>
Tensor4 positions_of(Tensor4 x, index_t first, index_t count) {
  if (x.data != nullptr) x.data += first * x.stride[2] * row_bytes(x.format, 1);
  x.extent[2] = count;
  return x;
}

inline Status check_spans(const NsaOptions& o, index_t batch) {
  if (!o.len_k.empty() && static_cast<index_t>(o.len_k.size()) != batch)
    return door::invalid("fovea: nsa: len_k has %zu entries for %td sequences", o.len_k.size(), batch);
  if (!o.q_offset.empty() && static_cast<index_t>(o.q_offset.size()) != batch)
    return door::invalid("fovea: nsa: q_offset has %zu entries for %td sequences", o.q_offset.size(), batch);
  for (const index_t len : o.len_k) {
    if (len < 0 || len > door::kMaxLength) return door::invalid("fovea: nsa: len_k holds %td", len);
  }
  for (const index_t first : o.q_offset) {
    if (std::abs(first) > door::kMaxLength) return door::invalid("fovea: nsa: q_offset holds %td", first);
  }
  return {};
}
inline Status check_places(const NsaOptions& o, index_t batch) {
  if (Status s = check_spans(o, batch); !s.ok()) return s;
  if (o.q_offset.empty() && o.len_k.empty() && batch > 0)
    return door::invalid("fovea: nsa: positions need q_offset or len_k, the entries do not tell how many tokens there are");
  return {};
}
FOVEA_INLINE index_t first_position(const NsaOptions& o, index_t sequence, index_t len_q) {
  const auto b = static_cast<std::size_t>(sequence);
  return o.q_offset.empty() ? o.len_k[b] - len_q : o.q_offset[b];
}
inline index_t last_tokens(const NsaOptions& o, index_t batch, index_t len_q) {
  index_t most = 0;
  for (index_t b = 0; b < batch; ++b) most = std::max(most, first_position(o, b, len_q) + len_q);
  return most;
}

// Compression: runs of entries of one head, each lane with the tokens of a run as floats.
inline constexpr index_t kRunEntries = 64;

struct CompressLane {
  float* tokens;   // [tokens of a run, dim]
  float* pooled;   // [run, dim out]
  float* hidden;   // [run, hidden]
  ProjectMemory project;
};
struct CompressSizes {
  index_t run, dim, dim_out, hidden;
  bool projects;
};
inline CompressLane carve_compress(Bump& bump, const NsaShape& shape, const CompressSizes& sizes) {
  CompressLane lane{};
  lane.tokens = bump.take<float>(((sizes.run - 1) * shape.stride + shape.block) * sizes.dim + kLanes);
  lane.pooled = bump.take<float>(sizes.run * sizes.dim_out + kLanes);
  lane.hidden = bump.take<float>(sizes.run * sizes.hidden);
  if (sizes.projects) lane.project = carve_project(bump, sizes.run);
  return lane;
}

inline Status check_compress(const Operand& x, const NsaShape& shape, const NsaRope& rope, const Result& to) {
  door::Bytes x_bytes, to_bytes;
  if (Status s = check_nsa(shape); !s.ok()) return s;
  if (Status s = door::check_plain("x", x.format); !s.ok()) return s;
  if (Status s = door::check_plain("to", to.format); !s.ok()) return s;
  if (Status s = door::check_data("x", x, x_bytes); !s.ok()) return s;
  if (Status s = door::check_data("to", to, to_bytes); !s.ok()) return s;
  if (Status s = door::check_extents("to", to, {x.extent[0], x.extent[1], to.extent[2], to.extent[3]}, "x"); !s.ok())
    return s;
  if (to.extent[2] > nsa_entries(x.extent[2], shape))
    return door::invalid("fovea: nsa: %td entries to make, %td tokens hold %td", to.extent[2], x.extent[2],
                         nsa_entries(x.extent[2], shape));
  if (x.extent[3] < 1 || x.extent[3] > door::kMaxDim || to.extent[3] < 1 || to.extent[3] > door::kMaxDim)
    return door::unsupported("fovea: nsa: tokens of %td and entries of %td numbers; 1 to %td", x.extent[3], to.extent[3],
                             door::kMaxDim);
  if (!door::writes_apart(to)) return door::invalid("fovea: nsa: to overlaps itself");
  if (Status s = door::check_apart({"to", to_bytes}, "x", x_bytes); !s.ok()) return s;
  if (rope.order == NsaRopeOrder::none || to.extent[2] == 0) return {};
  if (rope.table == nullptr || rope.table->cos == nullptr || rope.table->sin == nullptr)
    return door::invalid("fovea: nsa: the order of RoPE is given, but no table");
  const bool before = rope.order == NsaRopeOrder::rope_then_pool;
  const index_t dim = before ? x.extent[3] : to.extent[3], steps = (to.extent[2] - 1) * shape.stride;
  const index_t last = rope.position + steps + (before ? shape.block - 1 : 0);
  if (2 * rope.table->pairs > dim)
    return door::invalid("fovea: nsa: the RoPE table turns %td numbers of %td", 2 * rope.table->pairs, dim);
  if (rope.position < rope.table->first_pos || last >= rope.table->first_pos + rope.table->len)
    return door::invalid("fovea: nsa: positions %td to %td are outside the RoPE table's %td to %td", rope.position, last,
                         rope.table->first_pos, rope.table->first_pos + rope.table->len - 1);
  return {};
}

// pool(kv_head, entries, lane) makes lane.pooled from lane.tokens. The arguments are checked.
template <class Pool>
Status compress(const Operand& x, const NsaShape& shape, const NsaRope& rope, const Result& to, const Executor& executor,
                CompressSizes sizes, const Pool& pool) {
  const index_t entries = to.extent[2], heads = x.extent[1], number = row_bytes(x.format, 1);
  sizes.run = std::clamp<index_t>(entries, 1, kRunEntries);
  const index_t runs = (entries + sizes.run - 1) / sizes.run, tasks = x.extent[0] * heads * runs;
  if (tasks == 0) return {};
  const int lanes = static_cast<int>(std::min<index_t>(std::max(executor.lanes(), 1), tasks));
  Bump counting;
  carve_compress(counting, shape, sizes);
  const std::size_t lane_bytes = counting.used();
  return door::deal_in_memory<Memory>(executor, lanes, tasks, {}, lane_bytes, [&](Bump bump, index_t task) {
    const CompressLane lane = carve_compress(bump, shape, sizes);
    const index_t head = task / runs % heads, batch = task / runs / heads;
    const index_t first = task % runs * sizes.run, count = std::min(sizes.run, entries - first);
    const index_t token = first * shape.stride, tokens = (count - 1) * shape.stride + shape.block;
    for (index_t j = 0; j < tokens; ++j) {
      const index_t at = batch * x.stride[0] + head * x.stride[1] + (token + j) * x.stride[2];
      read_strided(x.format, x.data + at * number, x.stride[3], sizes.dim, lane.tokens + j * sizes.dim);
    }
    const auto turn = [&](float* rows, index_t dim, index_t n, index_t position, index_t step) {
      for (index_t r = 0; r < n; ++r, rows += dim, position += step)
        rotate_rows(rope.layout, rows, dim, rows, dim, 1, rope.table->cos_at(position), rope.table->sin_at(position),
                    rope.table->stride, rope.table->pairs, dim);
    };
    if (rope.order == NsaRopeOrder::rope_then_pool) turn(lane.tokens, sizes.dim, tokens, rope.position + token, 1);
    pool(head, count, lane);
    if (rope.order == NsaRopeOrder::pool_then_rope)
      turn(lane.pooled, sizes.dim_out, count, rope.position + token, shape.stride);
    for (index_t c = 0; c < count; ++c) {
      const index_t at = batch * to.stride[0] + head * to.stride[1] + (first + c) * to.stride[2];
      write_strided(to.format, lane.pooled + c * sizes.dim_out, sizes.dim_out, to.data + at * row_bytes(to.format, 1),
                    to.stride[3]);
    }
  });
}

// A head's row of what may be shared by the heads.
template <class T, int Rank>
FOVEA_INLINE const T* head_of(const View<T, Rank>& view, index_t head) {
  return view.data + (view.extent[0] == 1 ? 0 : head * view.stride[0]);
}

inline Status check_weights(const char* name, const Operand& w, index_t heads, index_t rows, index_t columns) {
  door::Bytes ignored;
  if (w.extent[0] != 1 || (w.extent[1] != 1 && w.extent[1] != heads) || w.extent[2] != rows || w.extent[3] != columns)
    return door::invalid("fovea: nsa: %s is [%td, %td, %td, %td], must be [1, %td | 1, %td, %td]", name, w.extent[0],
                         w.extent[1], w.extent[2], w.extent[3], heads, rows, columns);
  if (!is_weight_format(w.format))
    return door::unsupported("fovea: nsa: %s is %s; weights are f32, bf16 or f16", name, name_of(w.format));
  if (Status s = door::check_data(name, w, ignored); !s.ok()) return s;
  return door::check_innermost(name, w);
}
inline Status check_bias(const char* name, const View<const float, 2>& bias, index_t heads, index_t count) {
  if (!bias || ((bias.extent[0] == 1 || bias.extent[0] == heads) && bias.extent[1] == count)) return {};
  return door::invalid("fovea: nsa: %s is [%td, %td], must be [%td | 1, %td]", name, bias.extent[0], bias.extent[1], heads,
                       count);
}

inline Status check_phi(const NsaPhi& phi, const NsaShape& shape, index_t heads, index_t dim, index_t dim_out) {
  const auto& e = phi.embedding;
  if (e && ((e.extent[0] != 1 && e.extent[0] != heads) || e.extent[1] != shape.block || e.extent[2] != dim))
    return door::invalid("fovea: nsa: embedding is [%td, %td, %td], must be [%td | 1, %td, %td]", e.extent[0], e.extent[1],
                         e.extent[2], heads, shape.block, dim);
  switch (phi.pool) {
    case NsaPool::mean:
    case NsaPool::weighted:
      if (dim_out != dim)
        return door::invalid("fovea: nsa: pooling keeps the dim, %td numbers cannot become %td", dim, dim_out);
      if (phi.pool == NsaPool::mean) return {};
      if (!phi.slot_weight) return door::invalid("fovea: nsa: weighted pooling needs slot_weight");
      return check_bias("slot_weight", phi.slot_weight, heads, shape.block);
    case NsaPool::linear:
      if (Status s = check_weights("first", phi.first, heads, shape.block * dim, dim_out); !s.ok()) return s;
      return check_bias("first_bias", phi.first_bias, heads, dim_out);
    case NsaPool::mlp:
      if (Status s = check_weights("first", phi.first, heads, shape.block * dim, phi.first.extent[3]); !s.ok()) return s;
      if (Status s = check_weights("second", phi.second, heads, phi.first.extent[3], dim_out); !s.ok()) return s;
      if (Status s = check_bias("first_bias", phi.first_bias, heads, phi.first.extent[3]); !s.ok()) return s;
      return check_bias("second_bias", phi.second_bias, heads, dim_out);
  }
  return door::invalid("fovea: nsa: pool is %d, no value of the enum", static_cast<int>(phi.pool));
}

inline void pool_slots(const NsaPhi& phi, const NsaShape& shape, index_t head, index_t count, index_t dim,
                       const CompressLane& lane) {
  const float even = 1.f / static_cast<float>(shape.block);
  for (index_t c = 0; c < count; ++c) {
    const float* const block = lane.tokens + c * shape.stride * dim;
    for (index_t d = 0; d < dim; d += kLanes) {
      const index_t width = std::min(kLanes, dim - d);
      f32 sum(0.f);
      for (index_t j = 0; j < shape.block; ++j) {
        f32 x = load_strided(block + j * dim + d, 1, width);
        if (phi.embedding)
          x = x + load_strided(head_of(phi.embedding, head) + j * phi.embedding.stride[1] + d * phi.embedding.stride[2],
                               phi.embedding.stride[2], width);
        const float weight = phi.pool == NsaPool::mean ? 1.f : head_of(phi.slot_weight, head)[j * phi.slot_weight.stride[1]];
        sum = fma(f32(weight), x, sum);
      }
      if (phi.pool == NsaPool::mean) sum = sum * f32(even);
      store_some(lane.pooled + c * dim + d, sum, width);
    }
  }
}

inline void add_bias(const View<const float, 2>& bias, index_t head, index_t first, index_t count, float* to) {
  if (!bias) return;
  const float* const from = head_of(bias, head) + first * bias.stride[1];
  for (index_t n = 0; n < count; ++n) to[n] += from[n * bias.stride[1]];
}

inline void pool_projected(const NsaPhi& phi, const NsaShape& shape, index_t head, index_t count, const CompressSizes& sizes,
                           const CompressLane& lane) {
  const auto tokens = [&](index_t entry, index_t k, index_t n, float* to) {
    std::memcpy(to, lane.tokens + entry * shape.stride * sizes.dim + k, static_cast<std::size_t>(n) * sizeof(float));
    if (!phi.embedding) return;
    const float* const from = head_of(phi.embedding, head);
    for (index_t i = 0; i < n; ++i)
      to[i] += from[(k + i) / sizes.dim * phi.embedding.stride[1] + (k + i) % sizes.dim * phi.embedding.stride[2]];
  };
  const auto multiply = [&](const Operand& weights, const auto& read, const auto& write) {
    const StoredMatrix b = matrix_of(weights, weights.extent[1] == 1 ? 0 : head);
    for (index_t task = 0; task < project_tasks(count, b.columns); ++task)
      project_task(task, count, b, Weights::by_input, lane.project, read, write);
  };
  const auto into = [](float* rows, index_t stride, const auto& change) {
    return [=](index_t entry, index_t n, index_t width, const float* from) {
      float* const to = rows + entry * stride + n;
      std::memcpy(to, from, static_cast<std::size_t>(width) * sizeof(float));
      change(n, width, to);
    };
  };
  const auto last_bias = [&](const View<const float, 2>& bias) {
    return [&bias, head](index_t n, index_t width, float* to) { add_bias(bias, head, n, width, to); };
  };
  if (phi.pool == NsaPool::linear) {
    multiply(phi.first, tokens, into(lane.pooled, sizes.dim_out, last_bias(phi.first_bias)));
    return;
  }
  multiply(phi.first, tokens, into(lane.hidden, sizes.hidden, [&](index_t n, index_t width, float* to) {
             add_bias(phi.first_bias, head, n, width, to);
             for (index_t i = 0; i < width; ++i) to[i] = to[i] < 0.f ? 0.f : to[i];
           }));
  const auto hidden = [&](index_t entry, index_t k, index_t n, float* to) {
    std::memcpy(to, lane.hidden + entry * sizes.hidden + k, static_cast<std::size_t>(n) * sizeof(float));
  };
  multiply(phi.second, hidden, into(lane.pooled, sizes.dim_out, last_bias(phi.second_bias)));
}

}   // namespace nsa

// Entries 0 .. to.extent[2] - 1 of the tokens x [batch, kv_head, pos, dim]; to [batch, kv_head, entry, dim out]. To append
// entries later, hand in views that start at the first token and at the first entry of the new ones.
inline Status nsa_compress(const Operand& x_any, const NsaShape& shape, const NsaPhi& phi, const Result& to_any,
                           const NsaRope& rope = {}, const Executor& executor = {}) {
  const Operand x = door::tidy_operand(x_any);
  const Result to = door::tidy_operand(to_any);
  if (Status s = nsa::check_compress(x, shape, rope, to); !s.ok()) return s;
  if (Status s = nsa::check_phi(phi, shape, x.extent[1], x.extent[3], to.extent[3]); !s.ok()) return s;
  const bool projects = phi.pool == NsaPool::linear || phi.pool == NsaPool::mlp;
  const nsa::CompressSizes sizes{0, x.extent[3], to.extent[3], phi.pool == NsaPool::mlp ? phi.first.extent[3] : 0, projects};
  return nsa::compress(x, shape, rope, to, executor, sizes, [&](index_t head, index_t count, const nsa::CompressLane& lane) {
    if (projects) return nsa::pool_projected(phi, shape, head, count, sizes, lane);
    nsa::pool_slots(phi, shape, head, count, x.extent[3], lane);
  });
}

// The same with a phi of the caller's: phi(kv_head, block, to) turns the block's tokens [l, dim] into to [dim out]. Several
// lanes call it at once.
template <class F>
  requires(std::is_invocable_v<const F&, index_t, const float*, float*>)
Status nsa_compress(const Operand& x_any, const NsaShape& shape, const F& phi, const Result& to_any,
                    const NsaRope& rope = {}, const Executor& executor = {}) {
  const Operand x = door::tidy_operand(x_any);
  const Result to = door::tidy_operand(to_any);
  if (Status s = nsa::check_compress(x, shape, rope, to); !s.ok()) return s;
  const nsa::CompressSizes sizes{0, x.extent[3], to.extent[3], 0, false};
  return nsa::compress(x, shape, rope, to, executor, sizes, [&](index_t head, index_t count, const nsa::CompressLane& lane) {
    for (index_t c = 0; c < count; ++c)
      phi(head, lane.tokens + c * shape.stride * x.extent[3], lane.pooled + c * to.extent[3]);
  });
}

namespace nsa {

// Rows of one task: enough to pay for packing K, while whole rows of scores stay near (64k tokens: 1.2 MiB).
inline constexpr index_t kTaskRows = 72, kTaskQueries = 48;
inline constexpr index_t kValueKeys = 64;   // values packed at a time: 32 KiB of dim 128 stay in the L1
static_assert(kMaxKeyTile % kValueKeys == 0 && kMaxKeyTile % kPanel == 0 && kMaxKeyTile % kScoreRun == 0);

struct CompressedSizes {
  index_t batch, q_heads, kv_heads, len_q, dim_qk, dim_v;
  index_t tiles;     // of kMaxKeyTile entries
  index_t queries;   // of a task
  index_t group() const { return q_heads / kv_heads; }
  index_t rows() const { return padded(queries * group(), kTileRows); }
  index_t tasks() const { return batch * kv_heads * ((len_q + queries - 1) / queries); }
};
inline CompressedSizes compressed_sizes(const AttentionShape& s, index_t entries) {
  CompressedSizes sizes{
      s.batch, s.q_heads, s.kv_heads, s.len_q, s.dim_qk, s.dim_v, (entries + kMaxKeyTile - 1) / kMaxKeyTile, 1};
  sizes.queries = std::clamp<index_t>(kTaskRows / sizes.group(), 1, std::max<index_t>(std::min(kTaskQueries, s.len_q), 1));
  return sizes;
}

struct CompressedLane {
  float* staging;   // [kTileRows, padded dim_qk]
  float* queries;   // [row group, dim_qk, kTileRows]
  float* keys;      // [dim_qk, kPanel]
  float* values;    // [panel, kValueKeys, kPanel]
  float* strip;     // [tile of entries, row, kScoreStride]  scores, then weights
  float* sums;      // [entry]  weights of a query, added up over its heads
  float* acc;       // [row, padded dim_v]
  Final* ends;      // [row]
};
inline CompressedLane carve_compressed(Bump& bump, const CompressedSizes& s) {
  CompressedLane lane{};
  lane.staging = bump.take<float>(kTileRows * padded(s.dim_qk, kLanes));
  lane.queries = bump.take<float>(s.rows() * s.dim_qk);
  lane.keys = bump.take<float>(s.dim_qk * kPanel);
  lane.values = bump.take<float>(padded(s.dim_v, kPanel) * kValueKeys);
  lane.strip = bump.take<float>(s.tiles * s.rows() * kScoreStride);
  lane.sums = bump.take<float>(s.tiles * kMaxKeyTile);
  lane.acc = bump.take<float>(s.rows() * padded(s.dim_v, kPanel));
  lane.ends = bump.take<Final>(s.rows());
  return lane;
}

inline std::size_t compressed_bytes(const CompressedSizes& sizes, int lanes) {
  Bump lane, shared;
  carve_compressed(lane, sizes);
  shared.take<Sequence>(sizes.batch);
  return lane.used() * static_cast<std::size_t>(lanes) + shared.used();
}

class CompressedRun {
 public:
  Operand q;
  StoredSource source;
  Result out;
  View<float, 3> lse;          // optional
  View<float, 4> importance;   // optional
  const NsaShape& shape;
  const NsaOptions& options;
  CompressedSizes sizes;
  float scale;

  void run(index_t task, const CompressedLane& lane) const {
    const index_t pieces = (sizes.len_q + sizes.queries - 1) / sizes.queries;
    const index_t piece = task % pieces, kv_head = task / pieces % sizes.kv_heads, batch = task / pieces / sizes.kv_heads;
    const index_t first = piece * sizes.queries, count = std::min(sizes.queries, sizes.len_q - first);
    const Place place{batch, kv_head, first, count, first_position(options, batch, sizes.len_q) + first};
    const index_t rows = count * sizes.group();
    pack(place, rows, lane);
    score(place, rows, lane);
    for (index_t r = 0; r < rows; ++r) lane.ends[r] = weigh_row(r, visible(place, r), lane);
    if (importance) {
      for (index_t i = 0; i < count; ++i) spread(place, i, lane);
    }
    weigh_values(place, rows, lane);
    for (index_t r = 0; r < rows; ++r) store_row(place, r, lane);
  }

 private:
  struct Place {
    index_t batch, kv_head, first, count, position;   // of query `first`
  };
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();

  index_t visible(const Place& place, index_t row) const {
    return nsa_entries(place.position + row / sizes.group() + 1, shape);
  }
  index_t head(const Place& place, index_t row) const { return place.kv_head * sizes.group() + row % sizes.group(); }
  index_t acc_stride() const { return padded(sizes.dim_v, kPanel); }
  float* weights(const CompressedLane& lane, index_t row, index_t entry) const {
    return lane.strip + (entry / kMaxKeyTile * sizes.rows() + row) * kScoreStride + entry % kMaxKeyTile;
  }

  void pack(const Place& place, index_t rows, const CompressedLane& lane) const {
    const index_t stride = padded(sizes.dim_qk, kLanes);
    for (index_t g = 0; g < rows; g += kTileRows) {
      const float* from[kTileRows] = {};
      const index_t here = std::min(kTileRows, rows - g);
      for (index_t r = 0; r < here; ++r) {
        const index_t at = place.batch * q.stride[0] + head(place, g + r) * q.stride[1] +
                           (place.first + (g + r) / sizes.group()) * q.stride[2];
        float* const to = lane.staging + r * stride;
        read_strided(q.format, q.data + at * row_bytes(q.format, 1), q.stride[3], sizes.dim_qk, to);
        from[r] = to;
      }
      F32Panels::pack_queries(from, here, 1, sizes.dim_qk, scale, lane.queries + g * sizes.dim_qk);
    }
  }

  // f(run, how many entries before it) for the runs of the entries [begin, end).
  template <class F>
  void each_run(const Place& place, index_t begin, index_t end, const F& f) const {
    const Row row{0, 0, static_cast<int>(place.batch), 0, static_cast<int>(place.kv_head)};
    for (index_t entry = begin; entry < end;) {
      const Run run = source.run(row, entry, end);
      f(run, entry - begin);
      entry += run.k.count;
    }
  }

  // A panel of K is packed and met by all rows while it is in the L1.
  void score(const Place& place, index_t rows, const CompressedLane& lane) const {
    const index_t most = visible(place, rows - 1);
    for (index_t entry = 0; entry < most; entry += kPanel) {
      const index_t count = std::min(kPanel, most - entry);
      each_run(place, entry, entry + count,
               [&](const Run& run, index_t at) { run.kernels->k.pack(run.k, sizes.dim_qk, at, lane.keys); });
      if (count < kPanel) F32Panels::clear_keys(lane.keys, sizes.dim_qk, count, kPanel);
      for (index_t g = 0; g < rows; g += kTileRows)
        F32Panels::scores(std::min(kTileRows, rows - g), 0, count, lane.queries + g * sizes.dim_qk, lane.keys, sizes.dim_qk,
                          scale, weights(lane, g, entry));
    }
  }

  // Scores to weights, exp(s - largest). Weights below 2^-100 of the largest count as 0, as in softmax.
  Final weigh_row(index_t row, index_t count, const CompressedLane& lane) const {
    const auto each_tile = [&](const auto& f) {
      for (index_t entry = 0; entry < count; entry += kMaxKeyTile)
        f(weights(lane, row, entry), std::min(kMaxKeyTile, count - entry));
    };
    f32 top[4] = {f32(kNothing), f32(kNothing), f32(kNothing), f32(kNothing)};
    each_tile([&](float* s, index_t n) {
      std::fill(s + n, s + padded(n, kLanes), kNothing);
      for_each_vector(padded(n, kLanes),
                      [&](index_t j, index_t chain) { top[chain] = xsimd::max(top[chain], load(s + j)); });
    });
    const float largest = reduce_max(xsimd::max(xsimd::max(top[0], top[1]), xsimd::max(top[2], top[3])));
    const f32 reference(largest == kNothing ? 0.f : largest);
    f32 sum[4] = {f32(0.f), f32(0.f), f32(0.f), f32(0.f)};
    each_tile([&](float* s, index_t n) {
      for_each_vector(padded(n, kLanes), [&](index_t j, index_t chain) {
        const f32 weight = exp2((load(s + j) - reference) * f32(kLog2e), -100.f);
        store(s + j, weight);
        sum[chain] += weight;
      });
    });
    const float total = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (total == 0.f) return {0.f, kNothing};
    return {1.f / total,
            lse ? static_cast<float>(static_cast<double>(largest) + std::log(static_cast<double>(total))) : 0.f};
  }

  // The weights of query i, added up over its heads, to the blocks: entry c shares so many strides with block j.
  void spread(const Place& place, index_t i, const CompressedLane& lane) const {
    const index_t row = i * sizes.group(), seen = visible(place, row);
    for (index_t entry = 0; entry < seen; entry += kMaxKeyTile) {
      for (index_t j = 0; j < std::min(kMaxKeyTile, seen - entry); j += kLanes) {
        f32 sum(0.f);
        for (index_t h = 0; h < sizes.group(); ++h)
          sum = fma(load(weights(lane, row + h, entry + j)), f32(lane.ends[row + h].scale), sum);
        store(lane.sums + entry + j, sum);
      }
    }
    const index_t covers = shape.block / shape.stride, wide = shape.selected_block / shape.stride;
    float* const to = importance.data + place.batch * importance.stride[0] + place.kv_head * importance.stride[1] +
                      (place.first + i) * importance.stride[2];
    for (index_t block = 0; block < importance.extent[3]; ++block) {
      const index_t begin = block * wide, end = begin + wide;
      float sum = 0.f;
      for (index_t c = std::max<index_t>(begin - covers + 1, 0); c < std::min(end, seen); ++c)
        sum += lane.sums[c] * static_cast<float>(std::min(c + covers, end) - std::max(c, begin));
      to[block * importance.stride[3]] = sum;
    }
  }

  // Entries that all queries of the task see go to all rows at once; the few behind them row by row, because a weight of 0
  // times a NaN that the row must not see would be NaN.
  void weigh_values(const Place& place, index_t rows, const CompressedLane& lane) const {
    constexpr index_t kPanelStride = kValueKeys * kPanel;
    const index_t least = visible(place, 0), most = visible(place, rows - 1);
    float unchanged[kTileRows];
    std::uint8_t live[kValueKeys];
    std::fill_n(unchanged, kTileRows, 1.f);
    std::fill_n(live, kValueKeys, std::uint8_t{1});
    std::fill_n(lane.acc, sizes.rows() * acc_stride(), 0.f);
    for (index_t begin = 0; begin < most;) {
      const index_t stop = begin < least ? least : most;
      const index_t end = std::min(begin / kValueKeys * kValueKeys + kValueKeys, stop);
      each_run(place, begin, end, [&](const Run& run, index_t at) {
        static_cast<void>(run.kernels->v.pack(run.v, sizes.dim_v, at, lane.values, kPanelStride));
      });
      if (begin < least) {
        for (index_t g = 0; g < rows; g += kTileRows)
          F32Panels::weigh(std::min(kTileRows, rows - g), 0, end - begin, weights(lane, g, begin), lane.values, kPanelStride,
                           sizes.dim_v, unchanged, lane.acc + g * acc_stride(), acc_stride());
      } else {
        for (index_t r = 0; r < rows; ++r) {
          const index_t seen = std::min(visible(place, r), end);
          if (seen > begin)
            F32Panels::weigh_live(0, seen - begin, live, weights(lane, r, begin), lane.values, kPanelStride, sizes.dim_v,
                                  1.f, lane.acc + r * acc_stride());
        }
      }
      begin = end;
    }
  }

  void store_row(const Place& place, index_t row, const CompressedLane& lane) const {
    const index_t i = place.first + row / sizes.group(), h = head(place, row);
    float* const acc = lane.acc + row * acc_stride();
    const f32 factor(lane.ends[row].scale);
    for (index_t d = 0; d < sizes.dim_v; d += kLanes) store(acc + d, (load(acc + d) + f32(0.f)) * factor);
    const index_t at = place.batch * out.stride[0] + h * out.stride[1] + i * out.stride[2];
    write_strided(out.format, acc, sizes.dim_v, out.data + at * row_bytes(out.format, 1), out.stride[3]);
    if (lse) lse.data[place.batch * lse.stride[0] + h * lse.stride[1] + i * lse.stride[2]] = lane.ends[row].lse;
  }
};

inline int compressed_lanes(const CompressedSizes& sizes, const Executor& executor) {
  return static_cast<int>(std::min<index_t>(std::max(executor.lanes(), 1), std::max<index_t>(sizes.tasks(), 1)));
}

inline Status check_entries(const Kv& compressed, const NsaShape& shape, const NsaOptions& o, index_t batch, index_t len_q) {
  if (compressed.home != Home::contiguous || compressed.exact != nullptr)
    return door::unsupported("fovea: nsa: compressed keys and values must be contiguous");
  if (compressed.batch != batch)
    return door::invalid("fovea: nsa: the entries have batch %td, q has %td", compressed.batch, batch);
  const index_t wanted = nsa_entries(last_tokens(o, batch, len_q), shape);
  if (wanted > compressed.len)
    return door::invalid("fovea: nsa: the last query sees %td entries, there are %td", wanted, compressed.len);
  return {};
}

template <class Compiled>
Status bind_compressed(CompressedRun& run) {
  const Kv& kv = run.source.kv;
  run.source.kernels = {key_kernels<F32Panels>(kv.k.format, Compiled{}), value_kernels<F32Panels>(kv.v.format, Compiled{})};
  if (run.source.kernels.k.pack != nullptr && run.source.kernels.v.pack != nullptr && kv.k.format != Format::i8_channel)
    return {};
  return door::unsupported("fovea: nsa: entries are stored as %s and %s: not both among the formats of this call",
                           name_of(kv.k.format), name_of(kv.v.format));
}

// Everything is checked; `memory` has compressed_bytes.
inline void run_compressed(CompressedRun& run, std::byte* memory) {
  const int lanes = compressed_lanes(run.sizes, run.options.executor);
  Bump shared(memory), counting;
  Sequence* const sequences = shared.take<Sequence>(run.sizes.batch);
  for (index_t b = 0; b < run.sizes.batch; ++b) sequences[b] = {0, run.sizes.len_q, 0, run.source.kv.len, 0, b, b};
  run.source.sequences = sequences;
  carve_compressed(counting, run.sizes);
  const std::size_t lane_bytes = counting.used();
  std::byte* const lane_memory = memory + shared.used();
  deal(run.options.executor, lanes, run.sizes.tasks(), [&](int lane, index_t task) {
    Bump bump(lane_memory + lane_bytes * static_cast<std::size_t>(lane));
    run.run(task, carve_compressed(bump, run.sizes));
  });
}

inline CompressedRun compressed_run(const Operand& q, const Kv& compressed, const Result& out, const View<float, 3>& lse,
                                    const View<float, 4>& importance, const NsaShape& shape, const NsaOptions& options) {
  const AttentionShape s{q.extent[0],    q.extent[1],       compressed.kv_heads, q.extent[2],
                         compressed.len, compressed.dim_qk, compressed.dim_v};
  const CompressedSizes sizes = compressed_sizes(s, nsa_entries(last_tokens(options, s.batch, s.len_q), shape));
  return {q,
          {compressed, nullptr, {}, {}},
          out,
          lse,
          importance,
          shape,
          options,
          sizes,
          options.scale ? *options.scale : 1.f / std::sqrt(static_cast<float>(s.dim_qk))};
}

inline AttentionOptions attention_options(const NsaOptions& o) {
  AttentionOptions options;
  options.scale = o.scale;
  options.causal = Causal::bottom_right;
  options.len_k = o.len_k;
  options.q_offset = o.q_offset;
  options.lse = o.lse;
  options.executor = o.executor;
  return options;
}

}   // namespace nsa

// The first branch: q against the entries that are complete at its position. importance [batch, kv_head, pos, block], where
// given, gets the scores of the blocks. Entries are contiguous; options.len_k counts tokens.
template <class Compiled = AllFormats>
Status nsa_compressed_attention(const Operand& q_any, const Kv& compressed_any, const NsaShape& shape, const Result& out_any,
                                View<float, 4> importance, const NsaOptions& options) {
  const Operand q = door::tidy_operand(q_any);
  const Kv compressed = door::tidy_kv(compressed_any);
  const Result out = door::tidy_operand(out_any);
  importance = tidy(importance);
  AttentionOptions checked;
  checked.scale = options.scale;
  checked.lse = options.lse;
  checked.workspace = options.workspace;
  checked.executor = options.executor;
  if (Status s = check_nsa(shape); !s.ok()) return s;
  if (Status s = door::check_call(q, compressed, out, checked); !s.ok()) return s;
  const AttentionShape extents = door::shape_of(q, compressed, checked);
  if (Status s = door::check_problem(extents, checked); !s.ok()) return s;
  if (Status s = nsa::check_places(options, q.extent[0]); !s.ok()) return s;
  if (Status s = nsa::check_entries(compressed, shape, options, q.extent[0], q.extent[2]); !s.ok()) return s;
  if (importance) {
    const std::array<index_t, 4> want{q.extent[0], compressed.kv_heads, q.extent[2], importance.extent[3]};
    door::Bytes bytes, q_bytes, k_bytes, v_bytes;
    if (Status s = door::check_extents("importance", importance, want, "q and the entries"); !s.ok()) return s;
    if (Status s = door::check_data("importance", importance, bytes); !s.ok()) return s;
    if (!door::writes_apart(importance)) return door::invalid("fovea: nsa: importance overlaps itself");
    if (Status s = door::check_learned("importance", bytes, out, checked); !s.ok()) return s;
    if (Status s = door::check_data("q", q, q_bytes); !s.ok()) return s;
    if (Status s = door::check_stored("k", compressed, compressed.k, compressed.dim_qk, k_bytes); !s.ok()) return s;
    if (Status s = door::check_stored("v", compressed, compressed.v, compressed.dim_v, v_bytes); !s.ok()) return s;
    if (Status s = door::check_apart({"importance", bytes}, "q", q_bytes); !s.ok()) return s;
    if (Status s = door::check_apart({"importance", bytes}, "k", k_bytes); !s.ok()) return s;
    if (Status s = door::check_apart({"importance", bytes}, "v", v_bytes); !s.ok()) return s;
  }
  nsa::CompressedRun run = nsa::compressed_run(q, compressed, out, tidy(options.lse), importance, shape, options);
  if (Status s = nsa::bind_compressed<Compiled>(run); !s.ok()) return s;
  const std::size_t bytes = nsa::compressed_bytes(run.sizes, nsa::compressed_lanes(run.sizes, options.executor));
  return door::in_memory<nsa::Memory>(options.workspace, bytes + kAlignment, [&](std::span<std::byte> memory) -> Status {
    nsa::run_compressed(run, memory.data());
    return {};
  });
}

// Block lists [batch, kv_head, pos, n] from the scores importance [batch, kv_head, pos, block], blocks ascending, -1 behind
// them. The best of the blocks that are not forced: the lower index among equals, NaN and -inf never.
inline Status nsa_select(View<const float, 4> importance, const NsaShape& shape, std::span<std::int32_t> lists,
                         const NsaOptions& options) {
  importance = tidy(importance);
  const index_t batch = importance.extent[0], heads = importance.extent[1], len_q = importance.extent[2];
  door::Bytes bytes;
  if (Status s = check_nsa(shape); !s.ok()) return s;
  if (Status s = door::check_data("importance", importance, bytes); !s.ok()) return s;
  if (Status s = nsa::check_places(options, batch); !s.ok()) return s;
  if (static_cast<index_t>(lists.size()) != batch * heads * len_q * shape.selected)
    return door::invalid("fovea: nsa: lists hold %zu numbers, must be %td x %td x %td x %td", lists.size(), batch, heads,
                         len_q, shape.selected);
  if (Status s = door::check_apart({"lists", door::span_bytes(lists)}, "importance", bytes); !s.ok()) return s;
  const index_t blocks = batch * len_q == 0 ? 0 : nsa_blocks(nsa::last_tokens(options, batch, len_q), shape);
  if (blocks > importance.extent[3])
    return door::invalid("fovea: nsa: the last query stands in block %td, importance has %td", blocks - 1,
                         importance.extent[3]);
  deal(options.executor, options.executor.lanes(), batch * heads, [&](int, index_t task) {
    for (index_t i = 0; i < len_q; ++i) {
      const float* const scores = importance.data + task / heads * importance.stride[0] +
                                  task % heads * importance.stride[1] + i * importance.stride[2];
      const auto key = [&](index_t block) { return order_key(scores[block * importance.stride[3]]); };
      std::int32_t* const to = lists.data() + (task * len_q + i) * shape.selected;
      const index_t position = nsa::first_position(options, task / heads, len_q) + i;
      const index_t last = position < 0 ? -1 : position / shape.selected_block;
      const index_t first_free = std::min(shape.init, last + 1), end_free = std::max(first_free, last + 1 - shape.local);
      const index_t forced = first_free + (last + 1 - end_free), room = shape.selected - forced;
      // Insertion into a sorted list: of some hundred blocks few get in.
      index_t taken = 0;
      std::int32_t* const best = to + first_free;
      for (index_t block = first_free; block < end_free && room > 0; ++block) {
        const std::int32_t own = key(block);
        if (own <= selection::kNever || (taken == room && own <= key(best[taken - 1]))) continue;
        index_t at = taken < room ? taken++ : taken - 1;
        for (; at > 0 && own > key(best[at - 1]); --at) best[at] = best[at - 1];
        best[at] = static_cast<std::int32_t>(block);
      }
      std::sort(best, best + taken);
      for (index_t block = 0; block < first_free; ++block) to[block] = static_cast<std::int32_t>(block);
      for (index_t block = end_free; block <= last; ++block) best[taken++] = static_cast<std::int32_t>(block);
      std::fill(best + taken, to + shape.selected, -1);
    }
  });
  return {};
}

// The second branch: q against the keys of its kv head's blocks, up to its own position.
template <class Compiled = AllFormats>
Status nsa_selected_attention(const Operand& q, const Kv& kv, std::span<const std::int32_t> lists, const NsaShape& shape,
                              const Result& out, const NsaOptions& options) {
  if (Status s = check_nsa(shape); !s.ok()) return s;
  if (Status s = nsa::check_spans(options, q.extent[0]); !s.ok()) return s;
  if (static_cast<index_t>(lists.size()) != q.extent[0] * kv.kv_heads * q.extent[2] * shape.selected)
    return door::invalid("fovea: nsa: lists hold %zu numbers, must be %td x %td x %td x %td", lists.size(), q.extent[0],
                         kv.kv_heads, q.extent[2], shape.selected);
  KeyLists blocks;
  blocks.entries = lists.data();
  blocks.capacity = shape.selected;
  blocks.batch = q.extent[0];
  blocks.heads = kv.kv_heads;
  blocks.q_blocks = q.extent[2];
  blocks.k_block = shape.selected_block;
  return door::sparse<Compiled>(q, kv, std::span<const KeyLists>(&blocks, 1), out, nsa::attention_options(options));
}

// The third branch.
template <class Compiled = AllFormats>
Status nsa_window_attention(const Operand& q, const Kv& kv, const NsaShape& shape, const Result& out,
                            const NsaOptions& options) {
  if (Status s = check_nsa(shape); !s.ok()) return s;
  AttentionOptions window = nsa::attention_options(options);
  window.window.left = shape.window - 1;
  const auto plain = variant();
  return door::run(door::call_of_variant<Compiled>(q, kv, out, window, plain));
}

namespace nsa {

inline Status check_gates(const Operand& gates, const std::array<index_t, 4>& rows) {
  door::Bytes ignored;
  if (Status s = door::check_plain("gates", gates.format); !s.ok()) return s;
  const auto fits = [&](std::size_t axis) {
    return gates.extent[axis] == rows[axis] || (axis != 2 && gates.extent[axis] == 1);
  };
  if (!fits(0) || !fits(1) || !fits(2) || gates.extent[3] != 3)
    return door::invalid("fovea: nsa: gates is [%td, %td, %td, %td], must be [%td | 1, %td | 1, %td, 3]", gates.extent[0],
                         gates.extent[1], gates.extent[2], gates.extent[3], rows[0], rows[1], rows[2]);
  return door::check_data("gates", gates, ignored);
}

// Below -125 ln 2 a sigmoid is 0 (it is below 2.4e-38 there), NaN stays NaN.
FOVEA_INLINE f32 open(f32 logit) {
  const f32 t = logit * f32(-kLog2e);
  const keep_t closed = t > f32(125.f);
  return select(closed, f32(0.f), reciprocal(f32(1.f) + exp2(select(closed, f32(125.f), t))));
}

// out = sum_n gate_n branch_n. A branch whose gate is exactly 0 leaves no trace, whatever it holds.
inline void add_gated(const Tensor<const float> (&branches)[3], const Operand& gates, bool logits, const Result& out,
                      const Executor& executor) {
  const index_t heads = out.extent[1], dim = out.extent[3];
  deal(executor, executor.lanes(), out.extent[0] * heads, [&](int, index_t task) {
    const index_t b = task / heads, h = task % heads;
    alignas(f32) float values[(door::kMaxDim + kLanes - 1) / kLanes * kLanes];
    for (index_t i = 0; i < out.extent[2]; ++i) {
      alignas(f32) float gate[std::max(kLanes, index_t{4})] = {};
      const index_t from = b * gates.stride[0] + h * gates.stride[1] + i * gates.stride[2];
      read_numbers(gates.format, gates.data + from * row_bytes(gates.format, 1), gates.stride[3], 3, gate);
      if (logits) store(gate, open(load(gate)));
      std::fill_n(values, padded(dim, kLanes), 0.f);
      for (std::size_t n = 0; n < 3; ++n) {
        if (gate[n] == 0.f) continue;
        const Tensor<const float>& branch = branches[n];
        const float* const row = branch.data + b * branch.stride[0] + h * branch.stride[1] + i * branch.stride[2];
        for (index_t d = 0; d < dim; d += kLanes)
          store(values + d,
                fma(load_strided(row + d * branch.stride[3], branch.stride[3], dim - d), f32(gate[n]), load(values + d)));
      }
      const index_t to = b * out.stride[0] + h * out.stride[1] + i * out.stride[2];
      write_strided(out.format, values, dim, out.data + to * row_bytes(out.format, 1), out.stride[3]);
    }
  });
}

// nsa_attention works on so many queries at a time: the branches of a piece are a few MB, whatever the length of the prompt.
inline index_t piece_of(const AttentionShape& s) {
  return std::clamp<index_t>(8192 / std::max<index_t>(s.q_heads * s.batch, 1), 1, std::max<index_t>(s.len_q, 1));
}

struct DriverMemory {
  float* branches[3];    // [batch, q_head, piece, dim_v]
  float* importance;     // [batch, kv_head, piece, block]
  std::int32_t* lists;   // [batch, kv_head, piece, n]
  index_t* len_k;        // [batch]
  index_t* q_offset;     // [batch]
};
// `tokens`: up to the last query.
inline DriverMemory carve_driver(Bump& bump, const AttentionShape& s, const NsaShape& shape, index_t tokens) {
  const index_t piece = piece_of(s);
  DriverMemory memory{};
  for (float*& branch : memory.branches) branch = bump.take<float>(s.batch * s.q_heads * piece * s.dim_v);
  memory.importance = bump.take<float>(s.batch * s.kv_heads * piece * nsa_blocks(tokens, shape));
  memory.lists = bump.take<std::int32_t>(s.batch * s.kv_heads * piece * shape.selected);
  memory.len_k = bump.take<index_t>(s.batch);
  memory.q_offset = bump.take<index_t>(s.batch);
  return memory;
}
inline CompressedSizes piece_sizes(const AttentionShape& s, const NsaShape& shape, index_t tokens) {
  AttentionShape piece = s;
  piece.len_q = piece_of(s);
  return compressed_sizes(piece, nsa_entries(tokens, shape));
}
inline std::size_t driver_bytes(const AttentionShape& s, const NsaShape& shape, index_t tokens, int lanes) {
  Bump bump;
  carve_driver(bump, s, shape, tokens);
  return bump.used() + compressed_bytes(piece_sizes(s, shape, tokens), lanes);
}

}   // namespace nsa

// out = g_cmp * compressed + g_slc * selected + g_win * windowed, branches [batch, q_head, pos, dim] in f32; gates
// [batch | 1, q_head | 1, pos, 3] in this order.
inline Status nsa_gated_sum(Tensor<const float> compressed, Tensor<const float> selected, Tensor<const float> windowed,
                            const Operand& gates, const Result& out_any, bool gate_logits = false,
                            const Executor& executor = {}) {
  const Result out = door::tidy_operand(out_any);
  const Tensor<const float> branches[3] = {tidy(compressed), tidy(selected), tidy(windowed)};
  door::Bytes out_bytes, bytes;
  if (Status s = door::check_plain("out", out.format); !s.ok()) return s;
  if (Status s = door::check_data("out", out, out_bytes); !s.ok()) return s;
  if (out.extent[3] > door::kMaxDim)
    return door::unsupported("fovea: nsa: dim %td, at most %td", out.extent[3], door::kMaxDim);
  if (!door::writes_apart(out)) return door::invalid("fovea: nsa: out overlaps itself");
  if (Status s = nsa::check_gates(gates, out.extent); !s.ok()) return s;
  constexpr const char* kNames[3] = {"compressed", "selected", "windowed"};
  for (std::size_t n = 0; n < 3; ++n) {
    if (Status s = door::check_extents(kNames[n], branches[n], out.extent, "out"); !s.ok()) return s;
    if (Status s = door::check_data(kNames[n], branches[n], bytes); !s.ok()) return s;
    if (Status s = door::check_apart({"out", out_bytes}, kNames[n], bytes); !s.ok()) return s;
  }
  if (Status s = door::check_data("gates", door::tidy_operand(gates), bytes); !s.ok()) return s;
  if (Status s = door::check_apart({"out", out_bytes}, "gates", bytes); !s.ok()) return s;
  nsa::add_gated(branches, door::tidy_operand(gates), gate_logits, out, executor);
  return {};
}

// Bytes of NsaOptions::workspace for calls, of the whole or of the first branch, of up to `shape.len_q` queries on up to
// `shape.len_k` tokens. The selected and the window branch keep to the library's thread-local memory.
inline std::size_t nsa_workspace_bytes(const AttentionShape& shape, const NsaShape& nsa_shape, int lanes) {
  const nsa::CompressedSizes branch = nsa::compressed_sizes(shape, nsa_entries(shape.len_k, nsa_shape));
  return std::max(nsa::driver_bytes(shape, nsa_shape, shape.len_k, std::max(lanes, 1)),
                  nsa::compressed_bytes(branch, std::max(lanes, 1))) +
         kAlignment;
}

// The whole of it, for prefill, chunks of it and decode alike. kv holds the keys of the selected branch (and of the window,
// unless options.window_kv does), `compressed` the entries of nsa_compress or anybody else's, gates
// [batch | 1, q_head | 1, pos, 3] for compressed, selected, window.
template <class Compiled = AllFormats>
Status nsa_attention(const Operand& q_any, const Kv& kv, const Kv& compressed_any, const Operand& gates_any,
                     const Result& out_any, const NsaShape& shape, const NsaOptions& options = {}) {
  const Operand q = door::tidy_operand(q_any), gates = door::tidy_operand(gates_any);
  const Operand entry_q = options.compressed_q.data == nullptr ? q : door::tidy_operand(options.compressed_q);
  const Kv compressed = door::tidy_kv(compressed_any);
  const Kv& window_kv = options.window_kv == nullptr ? kv : *options.window_kv;
  const Result out = door::tidy_operand(out_any);
  const index_t batch = q.extent[0], len_q = q.extent[2];
  if (Status s = check_nsa(shape); !s.ok()) return s;
  if (options.lse) return door::unsupported("fovea: nsa: three softmaxes have three LSE; ask the branches one by one");
  if (Status s = nsa::check_spans(options, batch); !s.ok()) return s;
  if (options.len_k.empty() && (kv.home != Home::contiguous || kv.exact != nullptr))
    return door::invalid("fovea: nsa: a cache needs len_k, one entry for each of %td sequences", batch);

  AttentionOptions checked;
  checked.scale = options.scale;
  checked.len_k = options.len_k;
  checked.workspace = options.workspace;
  checked.executor = options.executor;
  AttentionOptions without_lengths = checked;
  without_lengths.len_k = {};
  for (const Kv* const one : {&kv, &window_kv}) {
    const Kv tidied = door::tidy_kv(*one);
    if (Status s = door::check_call(q, tidied, out, checked); !s.ok()) return s;
    const AttentionShape extents = door::shape_of(q, tidied, checked);
    if (Status s = door::check_problem(extents, checked); !s.ok()) return s;
    if (Status s = door::check_home(tidied, extents, checked); !s.ok()) return s;
  }
  if (Status s = door::check_call(entry_q, compressed, out, without_lengths); !s.ok()) return s;
  if (entry_q.extent != q.extent || compressed.kv_heads != kv.kv_heads)
    return door::invalid(
        "fovea: nsa: compressed_q is [%td, %td, %td, %td] with %td kv heads, q [%td, %td, %td, %td] with %td",
        entry_q.extent[0], entry_q.extent[1], entry_q.extent[2], entry_q.extent[3], compressed.kv_heads, q.extent[0],
        q.extent[1], q.extent[2], q.extent[3], kv.kv_heads);
  door::Bytes gate_bytes;
  if (Status s = nsa::check_gates(gates, q.extent); !s.ok()) return s;
  if (Status s = door::check_data("gates", gates, gate_bytes); !s.ok()) return s;
  if (Status s = door::check_learned("gates", gate_bytes, out, checked); !s.ok()) return s;
  if (door::is_empty(q)) return {};

  const AttentionShape extents{batch, q.extent[1], kv.kv_heads, len_q, kv.len, q.extent[3], kv.dim_v};
  index_t tokens = 0;
  for (index_t b = 0; b < batch; ++b) {
    const auto at = static_cast<std::size_t>(b);
    const index_t len = options.len_k.empty() ? kv.len : options.len_k[at];
    const index_t last = options.q_offset.empty() ? len : options.q_offset[at] + len_q;
    if (last > len)
      return door::invalid("fovea: nsa: sequence %td has %td tokens, its last query position %td", b, len, last - 1);
    tokens = std::max(tokens, last);
  }
  const int lanes = nsa::compressed_lanes(nsa::piece_sizes(extents, shape, tokens), options.executor);
  return door::in_memory<nsa::Memory>(
      options.workspace, nsa::driver_bytes(extents, shape, tokens, lanes) + kAlignment,
      [&](std::span<std::byte> workspace) -> Status {
        std::byte* const begin = workspace.data();
        Bump bump(begin);
        const nsa::DriverMemory memory = nsa::carve_driver(bump, extents, shape, tokens);
        const index_t piece = nsa::piece_of(extents), blocks = nsa_blocks(tokens, shape);
        for (index_t b = 0; b < batch; ++b) {
          const auto at = static_cast<std::size_t>(b);
          memory.len_k[b] = options.len_k.empty() ? kv.len : options.len_k[at];
          memory.q_offset[b] = options.q_offset.empty() ? memory.len_k[b] - len_q : options.q_offset[at];
        }
        NsaOptions part = options;
        part.len_k = {memory.len_k, static_cast<std::size_t>(batch)};
        part.q_offset = {memory.q_offset, static_cast<std::size_t>(batch)};
        part.workspace = {};
        if (Status s = nsa::check_entries(compressed, shape, part, batch, len_q); !s.ok()) return s;
        for (index_t first = 0; first < len_q; first += piece) {
          const index_t count = std::min(piece, len_q - first);
          Tensor<float> branches[3];
          for (std::size_t n = 0; n < 3; ++n) branches[n] = bhsd(memory.branches[n], batch, q.extent[1], count, kv.dim_v);
          const Tensor<float> importance = bhsd(memory.importance, batch, kv.kv_heads, count, blocks);
          const std::span<std::int32_t> lists(memory.lists,
                                              static_cast<std::size_t>(batch * kv.kv_heads * count * shape.selected));
          const Operand rows = nsa::positions_of(q, first, count);

          nsa::CompressedRun run = nsa::compressed_run(nsa::positions_of(entry_q, first, count), compressed, branches[0], {},
                                                       importance, shape, part);
          if (Status s = nsa::bind_compressed<Compiled>(run); !s.ok()) return s;
          nsa::run_compressed(run, begin + bump.used());
          if (Status s = nsa_select(importance, shape, lists, part); !s.ok()) return s;
          if (Status s = nsa_selected_attention<Compiled>(rows, kv, lists, shape, branches[1], part); !s.ok()) return s;
          if (Status s = nsa_window_attention<Compiled>(rows, window_kv, shape, branches[2], part); !s.ok()) return s;
          const Tensor<const float> done[3] = {branches[0], branches[1], branches[2]};
          nsa::add_gated(done, nsa::positions_of(gates, first, count), options.gate_logits,
                         nsa::positions_of(out, first, count), options.executor);
          for (index_t b = 0; b < batch; ++b) memory.q_offset[b] += count;
        }
        return {};
      });
}
template <class Compiled = AllFormats>
Status nsa_attention(const Operand& q, const Operand& k, const Operand& v, const Operand& compressed_k,
                     const Operand& compressed_v, const Operand& gates, const Result& out, const NsaShape& shape,
                     const NsaOptions& options = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  if (Status s = door::check_dense(q, compressed_k, compressed_v); !s.ok()) return s;
  return nsa_attention<Compiled>(q, door::kv_of(k, v), door::kv_of(compressed_k, compressed_v), gates, out, shape, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
