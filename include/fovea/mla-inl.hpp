// SPDX-License-Identifier: Apache-2.0
// Behind mla.hpp: checks, the plan, and the two forms.
#pragma once
#include <optional>
#include <string>

#include "mla.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr index_t kMlaBytes = index_t{64} << 20;   // absorbed queries and outputs of several sequences; expanded keys, values
inline constexpr index_t kMlaQueries = 256;               // of one sequence at a time in the absorbed form

namespace door {

inline index_t mla_key_dim(const MlaDims& dims) { return dims.latent + dims.rope; }

inline Status check_mla_dims(const MlaDims& d) {
  if (d.heads < 1 || d.nope < 1 || d.rope < 0 || d.latent < 1 || d.value < 1)
    return invalid("fovea: mla: heads %td, nope %td, rope %td, latent %td, value %td: all positive, rope may be 0", d.heads,
                   d.nope, d.rope, d.latent, d.value);
  for (const index_t dim : {d.nope + d.rope, mla_key_dim(d), d.value}) {
    if (dim > kMaxDim)
      return unsupported("fovea: mla: dims up to %td are supported: nope + rope %td, latent + rope %td, value %td", kMaxDim,
                         d.nope + d.rope, mla_key_dim(d), d.value);
  }
  return {};
}

inline Status check_mla_format(Format format, const MlaDims& dims) {
  if (static_cast<int>(format) >= kFormats)
    return invalid("fovea: mla: latents have format %d, no value of the enum", static_cast<int>(format));
  if (format == Format::i8_channel)
    return unsupported("fovea: mla: latents in i8_channel: their scales per channel cannot be V's");
  if (format == Format::latent_fp8 && (mla_key_dim(dims) != kLatentFp8Dim || dims.latent != kLatentFp8Values))
    return unsupported("fovea: mla: latent_fp8 rows are %td + %td numbers, the dims %td + %td", kLatentFp8Values,
                       kLatentFp8Dim - kLatentFp8Values, dims.latent, dims.rope);
  return {};
}

inline AttentionShape latent_shape(const MlaShape& shape) {
  return {shape.batch,
          shape.dims.heads,
          1,
          shape.len_q,
          shape.len_k,
          mla_key_dim(shape.dims),
          latent_value_dim(shape.latents, shape.dims)};
}

// A mask from query and key `q_first`, `k_first` on, of one head range and one sequence where those axes are not shared.
template <class T>
View<const T, 4> cut_mask(View<const T, 4> mask, std::optional<index_t> sequence, index_t head, index_t heads,
                          index_t q_first, index_t k_first) {
  if (!mask) return mask;
  const auto cut = [&](std::size_t axis, index_t first, index_t count) {
    if (mask.extent[axis] == 1 && axis != 3) return;
    mask.data += first * mask.stride[axis];
    mask.extent[axis] = count;
  };
  if (sequence) cut(0, *sequence, 1);
  cut(1, head, heads);
  cut(2, q_first, mask.extent[2] - q_first);
  cut(3, k_first, mask.extent[3] - k_first);
  return mask;
}

inline AttentionOptions absorbed_options(const MlaPlan& plan, const MlaPlan::Absorbed& step,
                                         const AttentionOptions& options) {
  AttentionOptions o = options;
  o.scale = plan.scale;
  o.q_offset = step.q_offset;
  o.len_k = plan.len_k;
  o.cu_len_q = step.cu_len_q;
  const index_t first = step.pieces.front().q_first;
  o.bias = cut_mask(options.bias, {}, 0, plan.shape.dims.heads, first, 0);
  o.keep = cut_mask(options.keep, {}, 0, plan.shape.dims.heads, first, 0);
  o.tree = {};   // its words are by token: whoever runs the step has them
  o.lse = {};
  o.workspace = {};
  return o;
}

inline AttentionOptions expanded_options(const MlaPlan& plan, const MlaPlan::Expanded& step, index_t head, index_t heads,
                                         const AttentionOptions& options) {
  const auto s = static_cast<std::size_t>(step.sequence);
  const Sequence& place = plan.sequences[s];
  const index_t k_begin = plan.costs[s].k_begin;
  const auto h = static_cast<std::size_t>(head), count = static_cast<std::size_t>(heads);
  AttentionOptions o = options;
  o.scale = plan.scale;
  o.q_offset = {&step.q_offset, 1};
  o.len_k = o.cu_len_q = o.cu_len_k = {};
  if (!o.alibi_slopes.empty()) o.alibi_slopes = o.alibi_slopes.subspan(h, count);
  if (!o.sink.empty()) o.sink = o.sink.subspan(h, count);
  o.bias = cut_mask(options.bias, step.sequence, head, heads, 0, k_begin);
  o.keep = cut_mask(options.keep, step.sequence, head, heads, 0, k_begin);
  if (!o.tree.empty())
    o.tree = o.tree.subspan(static_cast<std::size_t>(place.batch * plan.shape.len_q + place.q_begin),
                            static_cast<std::size_t>(place.len_q));
  if (o.lse) {
    o.lse.data += place.batch * o.lse.stride[0] + head * o.lse.stride[1] + place.q_begin * o.lse.stride[2];
    o.lse.extent = {1, heads, place.len_q};
  }
  o.workspace = {};
  return o;
}

inline index_t expanded_bytes(const MlaPlan& plan) { return plan.panels == Panels::bf16 ? 2 : 4; }
inline index_t keys_of(const MlaPlan& plan, const MlaPlan::Expanded& step) {
  const MlaPlan::Cost& cost = plan.costs[static_cast<std::size_t>(step.sequence)];
  return cost.k_end - cost.k_begin;
}

struct AbsorbedMemory {
  float* q;              // [head, token, latent + rope]
  float* z;              // [head, token, value_dim]
  float* lse;            // [head, token]
  std::uint64_t* tree;   // [token]
  std::byte* scratch;    // [lane]
  std::byte* attention;
  std::size_t lane_bytes;
};
inline AbsorbedMemory carve(Bump& bump, const MlaPlan& plan, const MlaPlan::Absorbed& step, int lanes) {
  const index_t heads = plan.shape.dims.heads, tokens = step.tokens(), rows = heads * tokens;
  Bump lane;
  carve_project(lane, tokens);
  AbsorbedMemory memory{};
  memory.q = bump.take<float>(rows * mla_key_dim(plan.shape.dims));
  memory.z = bump.take<float>(rows * plan.value_dim);
  memory.lse = bump.take<float>(rows);
  memory.tree = bump.take<std::uint64_t>(plan.tree ? tokens : 0);
  memory.lane_bytes = lane.used();
  memory.scratch = bump.take<std::byte>(static_cast<index_t>(lane.used()) * lanes);
  memory.attention = bump.take<std::byte>(static_cast<index_t>(step.plan.workspace_bytes(lanes)));
  return memory;
}

struct ExpandedMemory {
  std::byte* k;         // [head, key, nope + rope]
  std::byte* v;         // [head, key, value]
  std::byte* scratch;   // [lane]
  std::byte* attention;
  std::size_t lane_bytes, attention_bytes;
};
inline ExpandedMemory carve(Bump& bump, const MlaPlan& plan, const MlaPlan::Expanded& step, int lanes) {
  const MlaDims& dims = plan.shape.dims;
  const index_t rows = step.heads * keys_of(plan, step) * expanded_bytes(plan);
  Bump lane;
  carve_project(lane, keys_of(plan, step));
  ExpandedMemory memory{};
  memory.k = bump.take<std::byte>(rows * (dims.nope + dims.rope));
  memory.v = bump.take<std::byte>(rows * dims.value);
  memory.lane_bytes = lane.used();
  memory.scratch = bump.take<std::byte>(static_cast<index_t>(lane.used()) * lanes);
  memory.attention_bytes = std::max(step.plan.workspace_bytes(lanes), step.last.workspace_bytes(lanes));
  memory.attention = bump.take<std::byte>(static_cast<index_t>(memory.attention_bytes));
  return memory;
}

inline ProjectMemory project_memory(std::byte* scratch, std::size_t lane_bytes, int lane, index_t rows) {
  Bump bump(scratch + lane_bytes * static_cast<std::size_t>(lane));
  return carve_project(bump, rows);
}

inline MlaPlan::Cost mla_cost(const MlaPlan& plan, const Sequence& s) {
  const MlaDims& d = plan.shape.dims;
  double pairs = 0;
  index_t first = s.len_k, last = 0;
  for (index_t i = 0; i < s.len_q; ++i) {
    const index_t begin = std::clamp<index_t>(s.pos + i - plan.reach.left, 0, s.len_k);
    const index_t end = std::clamp<index_t>(s.pos + i + plan.reach.right + 1, 0, s.len_k);
    if (end <= begin) continue;
    pairs += static_cast<double>(end - begin);
    first = std::min(first, begin);
    last = std::max(last, end);
  }
  if (plan.tree && s.len_q > 0) {   // its words count from the last key
    first = 0;
    last = s.len_k;
  }
  const auto heads = static_cast<double>(d.heads), change = 2. * static_cast<double>(d.latent * (d.nope + d.value));
  const index_t keys = std::max<index_t>(last - first, 0);
  MlaPlan::Cost cost{plan.wanted, keys == 0 ? 0 : first, keys == 0 ? 0 : last, 0, 0};
  cost.absorbed = heads * (2 * pairs * static_cast<double>(2 * d.latent + d.rope) + change * static_cast<double>(s.len_q));
  cost.expanded = heads * (2 * pairs * static_cast<double>(d.nope + d.rope + d.value) + change * static_cast<double>(keys));
  if (plan.wanted == MlaForm::automatic) cost.form = cost.absorbed <= cost.expanded ? MlaForm::absorbed : MlaForm::expanded;
  return cost;
}

// The absorbed sequences in pieces: several whole sequences to a step while they fit, a long one in steps of its own. The
// queries of a step change nothing in the bits of another's.
inline void list_absorbed(MlaPlan& plan) {
  const MlaDims& dims = plan.shape.dims;
  const index_t token_bytes = 4 * dims.heads * (mla_key_dim(dims) + plan.value_dim);
  index_t tokens = 0;
  for (std::size_t s = 0; s < plan.sequences.size(); ++s) {
    const index_t len_q = plan.sequences[s].len_q, sequence = static_cast<index_t>(s);
    if (plan.costs[s].form != MlaForm::absorbed || len_q == 0) continue;
    const bool whole = len_q <= kMlaQueries;
    for (index_t first = 0; first < len_q; first += kMlaQueries) {
      const MlaPlan::Piece piece{sequence, first, std::min(kMlaQueries, len_q - first)};
      const bool joins = whole && !plan.absorbed.empty() && plan.absorbed.back().whole &&
                         (tokens + piece.q_count) * token_bytes <= kMlaBytes;
      if (!joins) {
        plan.absorbed.emplace_back();
        plan.absorbed.back().whole = whole;
        tokens = 0;
      }
      plan.absorbed.back().pieces.push_back(piece);
      tokens += piece.q_count;
    }
  }
  for (MlaPlan::Absorbed& step : plan.absorbed) {
    step.cu_len_q.assign(1, 0);
    auto piece = step.pieces.begin();
    for (std::size_t s = 0; s < plan.sequences.size(); ++s) {
      const Sequence& place = plan.sequences[s];
      const bool here = piece != step.pieces.end() && piece->sequence == static_cast<index_t>(s);
      step.q_offset.push_back(place.pos + (here ? piece->q_first : 0));
      step.cu_len_q.push_back(step.cu_len_q.back() + (here ? piece->q_count : 0));
      if (!here) continue;
      for (index_t i = 0; i < piece->q_count; ++i) {
        step.batch.push_back(place.batch);
        step.pos.push_back(place.q_begin + piece->q_first + i);
      }
      ++piece;
    }
  }
}

}   // namespace door

inline Status make_plan(MlaPlan& plan, const MlaShape& shape, const AttentionOptions& options, MlaForm form) {
  if (Status s = door::check_mla_dims(shape.dims); !s.ok()) return s;
  if (Status s = door::check_mla_format(shape.latents, shape.dims); !s.ok()) return s;
  if (form > MlaForm::expanded) return door::invalid("fovea: mla: form is %d, no value of the enum", static_cast<int>(form));
  const AttentionShape whole = door::latent_shape(shape);
  if (Status s = supports(whole, options); !s.ok()) return s;
  const MlaDims& dims = shape.dims;
  plan = {};
  plan.shape = shape;
  plan.wanted = form;
  plan.value_dim = whole.dim_v;
  plan.scale = options.scale ? *options.scale : mla_scale(dims);
  plan.reach = reach_of(options);
  plan.regime = options.regime;
  plan.panels = options.panels;
  plan.tree = !options.tree.empty();
  plan.lanes = options.executor.lanes();
  for (index_t b = 0; b < door::count_sequences(whole, options); ++b) {
    plan.sequences.push_back(door::sequence_of(whole, options, b));
    plan.len_k.push_back(plan.sequences.back().len_k);
    plan.costs.push_back(door::mla_cost(plan, plan.sequences.back()));
  }
  door::list_absorbed(plan);
  for (MlaPlan::Absorbed& step : plan.absorbed) {
    const AttentionShape inner{1, dims.heads, 1, step.tokens(), shape.len_k, whole.dim_qk, whole.dim_v};
    if (Status s = make_plan(step.plan, inner, door::absorbed_options(plan, step, options)); !s.ok()) return s;
  }
  for (std::size_t b = 0; b < plan.sequences.size(); ++b) {
    const Sequence& place = plan.sequences[b];
    if (plan.costs[b].form != MlaForm::expanded || place.len_q == 0) continue;
    MlaPlan::Expanded step{static_cast<index_t>(b), place.pos - plan.costs[b].k_begin, 0, {}, {}};
    const index_t keys = door::keys_of(plan, step);
    const index_t head_bytes =
        std::max<index_t>(keys * (dims.nope + dims.rope + dims.value), 1) * door::expanded_bytes(plan);
    step.heads = std::clamp<index_t>(kMlaBytes / head_bytes, 1, dims.heads);
    const auto plan_heads = [&](Plan& inner, index_t heads) {
      return make_plan(inner, {1, heads, heads, place.len_q, keys, dims.nope + dims.rope, dims.value},
                       door::expanded_options(plan, step, 0, heads, options));
    };
    if (Status s = plan_heads(step.plan, step.heads); !s.ok()) return s;
    if (const index_t rest = dims.heads % step.heads; rest != 0) {
      if (Status s = plan_heads(step.last, rest); !s.ok()) return s;
    }
    plan.expanded.push_back(std::move(step));
  }
  return {};
}

inline std::size_t workspace_bytes(const MlaPlan& plan, int lanes) {
  std::size_t most = 0;
  for (const MlaPlan::Absorbed& step : plan.absorbed) {
    Bump bump;
    door::carve(bump, plan, step, lanes);
    most = std::max(most, bump.used());
  }
  for (const MlaPlan::Expanded& step : plan.expanded) {
    Bump bump;
    door::carve(bump, plan, step, lanes);
    most = std::max(most, bump.used());
  }
  return most + kAlignment;
}

inline std::string MlaPlan::describe() const {
  index_t count[2] = {0, 0}, queries[2] = {0, 0}, most_heads = 0, most_keys = 0;
  double flops[2] = {0, 0}, other[2] = {0, 0}, cache_bytes = 0;
  const auto row = static_cast<double>(row_bytes(shape.latents, shape.dims.latent + shape.dims.rope));
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    if (sequences[s].len_q == 0) continue;
    const std::size_t form = costs[s].form == MlaForm::absorbed ? 0 : 1;
    ++count[form];
    queries[form] += sequences[s].len_q;
    flops[form] += form == 0 ? costs[s].absorbed : costs[s].expanded;
    other[form] += form == 0 ? costs[s].expanded : costs[s].absorbed;
    cache_bytes += row * static_cast<double>(costs[s].k_end - costs[s].k_begin);
  }
  for (const Expanded& step : expanded) {
    most_heads = std::max(most_heads, step.heads);
    most_keys = std::max(most_keys, door::keys_of(*this, step));
  }
  const MlaDims& d = shape.dims;
  char text[1024];
  std::snprintf(text, sizeof text,
                "form        %s: %td sequences (%td queries) absorbed, %td (%td) expanded\n"
                "dims        %td heads, nope %td + rope %td, latent %td, value %td, scale %.7f\n"
                "cache       %s, %.0f bytes a token, %.0f bytes in reach\n"
                "flops       absorbed %.4g (expanded would be %.4g)\n"
                "            expanded %.4g (absorbed would be %.4g)\n"
                "steps       %zu absorbed, %zu expanded of up to %td keys, %td heads at a time\n"
                "isa         " FOVEA_ARCH_NAME
                "\n"
                "workspace   %zu bytes for %d lanes\n",
                wanted == MlaForm::automatic ? "by flops" : "forced", count[0], queries[0], count[1], queries[1], d.heads,
                d.nope, d.rope, d.latent, d.value, static_cast<double>(scale), name_of(shape.latents), row, cache_bytes,
                flops[0], other[0], flops[1], other[1], absorbed.size(), expanded.size(), most_keys, most_heads,
                fovea::workspace_bytes(*this, lanes), lanes);
  return text;
}

namespace door {

// The cache with V in K, whatever it was said to be.
struct Latents {
  Kv kv, exact;
  index_t value_dim;

  Latents(const Kv& from, const MlaDims& dims) : kv(from), value_dim(latent_value_dim(from.k.format, dims)) {
    if (from.exact != nullptr) {
      exact = *from.exact;
      value_dim = std::max(value_dim, latent_value_dim(exact.k.format, dims));
      exact.v = exact.k;
      exact.dim_v = value_dim;
      kv.exact = &exact;
    }
    kv.v = kv.k;
    kv.dim_v = value_dim;
  }
  Latents(const Latents&) = delete;
  Latents& operator=(const Latents&) = delete;
};

// Numbers [d, d + count) of a stored row.
using LatentReader = void (*)(const std::byte* row, index_t d, index_t count, index_t dim, float* to);

template <Format F>
void read_latent(const std::byte* row, index_t d, index_t count, index_t dim, float* to) {
  constexpr CodecOf<F> codec{};
  const f32 scale(codec.scale(row, dim));
  const auto part = [&](index_t from, index_t width) {
    const f32 numbers = load_part(codec, row, from, std::min(width, kLanes), dim);
    return CodecOf<F>::kRowScaled ? numbers * scale : numbers;
  };
  // Codecs read from multiples of kLanes.
  if (const index_t skip = d % kLanes; skip != 0) {
    const index_t here = std::min(kLanes - skip, count);
    alignas(f32) float head[kLanes];
    store(head, part(d - skip, dim - (d - skip)));
    std::copy_n(head + skip, here, to);
    d += here;
    count -= here;
    to += here;
  }
  for (; count > 0; d += kLanes, count -= kLanes, to += kLanes) {
    if (count >= kLanes) {
      store(to, part(d, kLanes));
    } else {
      store_some(to, part(d, count), count);
    }
  }
}

template <Format... List>
LatentReader latent_reader(Format format, Formats<List...>) {
  LatentReader reader = nullptr;
  ((format == List ? void(reader = &read_latent<List>) : void()), ...);
  return reader;
}

struct MlaCall {
  Operand q, kv_b;
  const Latents& latents;
  Result out;
  const AttentionOptions& options;
  LatentReader read, read_exact;
};

inline MlaDims mla_dims(const Operand& q, const Operand& kv_b, const Result& out) {
  const index_t value = out.extent[3], nope = kv_b.extent[2] - value;
  return {kv_b.extent[1], nope, q.extent[3] - nope, kv_b.extent[3], value};
}
inline MlaShape mla_shape(const MlaDims& dims, const Operand& q, const Kv& latents, const AttentionOptions& o) {
  const AttentionShape shape = shape_of(q, latents, o);
  return {dims, shape.batch, shape.len_q, shape.len_k, latents.k.format};
}

// Everything that could go wrong, before anything is written.
inline Status check_mla(const Operand& q, const Operand& kv_b, const Latents& latents, const Result& out,
                        const MlaDims& dims, const AttentionOptions& o, LatentReader read, LatentReader read_exact) {
  const Kv& kv = latents.kv;
  Bytes q_bytes, weight_bytes, k_bytes, exact_bytes, out_bytes, lse_bytes;
  if (Status s = check_plain("q", q.format); !s.ok()) return s;
  if (Status s = check_plain("out", out.format); !s.ok()) return s;
  if (!is_weight_format(kv_b.format))
    return unsupported("fovea: mla: kv_b has format %s; weights are f32, bf16 or f16", name_of(kv_b.format));
  if (Status s = check_data("q", q, q_bytes); !s.ok()) return s;
  if (Status s = check_data("kv_b", kv_b, weight_bytes); !s.ok()) return s;
  if (Status s = check_data("out", out, out_bytes); !s.ok()) return s;
  if (Status s = check_innermost("kv_b", kv_b); !s.ok()) return s;
  if (kv_b.extent[0] != 1 || kv_b.extent[1] != q.extent[1])
    return invalid(
        "fovea: mla: kv_b is [%td, %td, %td, %td], q has %td heads; kv_b must be [1, heads, nope + value, latent]",
        kv_b.extent[0], kv_b.extent[1], kv_b.extent[2], kv_b.extent[3], q.extent[1]);
  if (dims.nope < 1 || dims.rope < 0 || kv.dim_qk != mla_key_dim(dims) || kv.kv_heads != 1)
    return invalid(
        "fovea: mla: kv_b has %td rows of %td, out dim %td, q dim %td: nope %td, rope %td, so latents must have 1 head "
        "of %td numbers, they have %td of %td",
        kv_b.extent[2], kv_b.extent[3], out.extent[3], q.extent[3], dims.nope, dims.rope, mla_key_dim(dims), kv.kv_heads,
        kv.dim_qk);
  if (Status s = check_mla_dims(dims); !s.ok()) return s;
  if (Status s = check_mla_format(kv.k.format, dims); !s.ok()) return s;
  if (Status s = check_extents("out", out, {q.extent[0], q.extent[1], q.extent[2], dims.value}, "q and kv_b"); !s.ok())
    return s;
  if (Status s = check_stored("latents", kv, kv.k, kv.dim_qk, k_bytes); !s.ok()) return s;
  if (kv.exact != nullptr) {
    if (Status s = check_mla_format(latents.exact.k.format, dims); !s.ok()) return s;
    if (Status s = check_stored("the exact latents", latents.exact, latents.exact.k, latents.exact.dim_qk, exact_bytes);
        !s.ok())
      return s;
  }
  if (read == nullptr || read_exact == nullptr)
    return unsupported("fovea: mla: latents are stored as %s%s%s: not among the formats of this call", name_of(kv.k.format),
                       kv.exact == nullptr ? "" : " and ", kv.exact == nullptr ? "" : name_of(latents.exact.k.format));
  const Format exact_format = kv.exact == nullptr ? kv.k.format : latents.exact.k.format;
  if (o.panels == Panels::bf16 && (!is_narrow(kv.k.format) || !is_narrow(exact_format)))
    return unsupported("fovea: mla: bf16 panels would round latents, which are stored wider (%s)", name_of(kv.k.format));
  if (Status s = check_outputs(out, out_bytes, o.lse, q.extent, lse_bytes); !s.ok()) return s;
  Bytes bias_bytes, keep_bytes;
  if (Status s = check_data("bias", o.bias, bias_bytes); o.bias && !s.ok()) return s;
  if (Status s = check_data("keep", o.keep, keep_bytes); o.keep && !s.ok()) return s;
  const OutputBytes workspace{"workspace", span_bytes(o.workspace)};
  if (Status s = check_apart(workspace, "out", out_bytes); !s.ok()) return s;
  if (Status s = check_apart(workspace, "lse", lse_bytes); !s.ok()) return s;
  for (const auto& [name, bytes] : {std::pair<const char*, Bytes>{"q", q_bytes},
                                    {"kv_b", weight_bytes},
                                    {"latents", k_bytes},
                                    {"the exact latents", exact_bytes},
                                    {"bias", bias_bytes},
                                    {"keep", keep_bytes},
                                    {"alibi_slopes", span_bytes(o.alibi_slopes)},
                                    {"sink", span_bytes(o.sink)},
                                    {"tree", span_bytes(o.tree)}}) {
    if (Status s = check_apart(workspace, name, bytes); !s.ok()) return s;
    if (Status s = check_apart({"out", out_bytes}, name, bytes); !s.ok()) return s;
    if (Status s = check_apart({"lse", lse_bytes}, name, bytes); !s.ok()) return s;
  }
  AttentionShape shape = shape_of(q, kv, o);
  shape.dim_qk = kv.dim_qk;
  if (Status s = supports(shape, o); !s.ok()) return s;
  return check_home(kv, shape, o);
}

inline Status check_mla_plan(const MlaPlan& plan, const MlaDims& dims, const Operand& q, const Latents& latents,
                             const AttentionOptions& o) {
  const MlaDims& d = plan.shape.dims;
  if (d.heads != dims.heads || d.nope != dims.nope || d.rope != dims.rope || d.latent != dims.latent ||
      d.value != dims.value || plan.value_dim != latents.value_dim)
    return invalid(
        "fovea: mla: the plan is for %td heads, dims %td + %td, %td, %td over %s; the call has %td heads, %td + %td, "
        "%td, %td over %s",
        d.heads, d.nope, d.rope, d.latent, d.value, name_of(plan.shape.latents), dims.heads, dims.nope, dims.rope,
        dims.latent, dims.value, name_of(latents.kv.k.format));
  const float scale = o.scale ? *o.scale : mla_scale(dims);
  const Reach reach = reach_of(o);
  if (!(plan.scale == scale) || plan.reach.left != reach.left || plan.reach.right != reach.right ||
      plan.regime != o.regime || plan.panels != o.panels || plan.tree != !o.tree.empty())
    return invalid(
        "fovea: mla: the plan was made with another scale (%g against %g), window, causal, tree, regime or panels",
        static_cast<double>(plan.scale), static_cast<double>(scale));
  AttentionShape shape = shape_of(q, latents.kv, o);
  if (static_cast<index_t>(plan.sequences.size()) != count_sequences(shape, o))
    return invalid("fovea: mla: the plan is for %zu sequences, the call has %td", plan.sequences.size(),
                   count_sequences(shape, o));
  for (std::size_t b = 0; b < plan.sequences.size(); ++b) {
    const Sequence &planned = plan.sequences[b], called = sequence_of(shape, o, static_cast<index_t>(b));
    if (planned != called)
      return invalid(
          "fovea: mla: sequence %zu is planned as %td queries from position %td and %td keys, the call has %td, %td, "
          "%td",
          b, planned.len_q, planned.pos, planned.len_k, called.len_q, called.pos, called.len_k);
  }
  return {};
}

template <class Compiled>
Status run_absorbed(const MlaPlan& plan, const MlaPlan::Absorbed& step, const MlaCall& call, std::byte* bytes, int lanes) {
  const MlaDims& dims = plan.shape.dims;
  const index_t tokens = step.tokens(), key_dim = mla_key_dim(dims), value_dim = plan.value_dim;
  Bump bump(bytes);
  const AbsorbedMemory memory = carve(bump, plan, step, lanes);
  const index_t q_bytes = row_bytes(call.q.format, 1), out_bytes = row_bytes(call.out.format, 1);
  const auto q_at = [&](index_t head, index_t token, index_t d) {
    const auto t = static_cast<std::size_t>(token);
    const auto& stride = call.q.stride;
    return call.q.data + (step.batch[t] * stride[0] + head * stride[1] + step.pos[t] * stride[2] + d * stride[3]) * q_bytes;
  };

  const index_t absorb = project_tasks(tokens, dims.latent);
  deal(call.options.executor, lanes, dims.heads * absorb, [&](int lane, index_t task) {
    const index_t head = task / absorb;
    float* const to = memory.q + head * tokens * key_dim;
    project_task(
        task % absorb, tokens, rows_of(matrix_of(call.kv_b, head), 0, dims.nope), Weights::by_input,
        project_memory(memory.scratch, memory.lane_bytes, lane, tokens),
        [&](index_t token, index_t d, index_t count, float* row) {
          read_strided(call.q.format, q_at(head, token, d), call.q.stride[3], count, row);
        },
        [&](index_t token, index_t n, index_t count, const float* from) {
          std::copy_n(from, count, to + token * key_dim + n);
          if (n == 0)
            read_strided(call.q.format, q_at(head, token, dims.nope), call.q.stride[3], dims.rope,
                         to + token * key_dim + dims.latent);
        });
  });

  AttentionOptions options = absorbed_options(plan, step, call.options);
  if (plan.tree && step.whole) {
    for (index_t t = 0; t < tokens; ++t) {
      const auto at = static_cast<std::size_t>(t);
      memory.tree[t] = call.options.tree[static_cast<std::size_t>(step.batch[at] * plan.shape.len_q + step.pos[at])];
    }
    options.tree = {memory.tree, static_cast<std::size_t>(tokens)};
  }
  if (call.options.lse) options.lse = {memory.lse, {1, dims.heads, tokens}, {dims.heads * tokens, tokens, 1}};
  options.workspace = {memory.attention, step.plan.workspace_bytes(lanes)};
  const Tensor<const float> absorbed_q = bhsd<const float>(memory.q, 1, dims.heads, tokens, key_dim);
  const Tensor<float> z = bhsd(memory.z, 1, dims.heads, tokens, value_dim);
  if (Status s = attention<Compiled>(step.plan, absorbed_q, call.latents.kv, z, options); !s.ok()) return s;

  const index_t leave = project_tasks(tokens, dims.value);
  deal(call.options.executor, lanes, dims.heads * leave, [&](int lane, index_t task) {
    const index_t head = task / leave;
    const float* const from_z = memory.z + head * tokens * value_dim;
    project_task(
        task % leave, tokens, rows_of(matrix_of(call.kv_b, head), dims.nope, dims.value), Weights::by_output,
        project_memory(memory.scratch, memory.lane_bytes, lane, tokens),
        [&](index_t token, index_t d, index_t count, float* row) {
          std::copy_n(from_z + token * value_dim + d, count, row);
        },
        [&](index_t token, index_t n, index_t count, const float* from) {
          const auto t = static_cast<std::size_t>(token);
          const auto& stride = call.out.stride;
          const index_t at = step.batch[t] * stride[0] + head * stride[1] + step.pos[t] * stride[2] + n * stride[3];
          write_strided(call.out.format, from, count, call.out.data + at * out_bytes, stride[3]);
        });
  });
  if (call.options.lse) {
    for (index_t head = 0; head < dims.heads; ++head) {
      for (index_t t = 0; t < tokens; ++t) {
        const auto at = static_cast<std::size_t>(t);
        call.options.lse(step.batch[at], head, step.pos[at]) = memory.lse[head * tokens + t];
      }
    }
  }
  return {};
}

inline Status run_expanded(const MlaPlan& plan, const MlaPlan::Expanded& step, const MlaCall& call, std::byte* bytes,
                           int lanes) {
  const MlaDims& dims = plan.shape.dims;
  const auto s = static_cast<std::size_t>(step.sequence);
  const Sequence& place = plan.sequences[s];
  const MlaPlan::Cost& cost = plan.costs[s];
  const index_t keys = keys_of(plan, step), wide = dims.nope + dims.rope, number = expanded_bytes(plan);
  const Format format = plan.panels == Panels::bf16 ? Format::bf16 : Format::f32;
  Bump bump(bytes);
  const ExpandedMemory memory = carve(bump, plan, step, lanes);
  const StoredSource source{call.latents.kv, plan.sequences.data(), {}, {}};
  const Row row{place.pos, 0, static_cast<int>(step.sequence), 0, 0};
  const auto read_key = [&](index_t key, index_t d, index_t count, float* to) {
    const Run run = source.run(row, cost.k_begin + key, cost.k_begin + key + 1);
    (run.kernels == &source.kernels ? call.read : call.read_exact)(run.k.data, d, count, call.latents.kv.dim_qk, to);
  };

  for (index_t head = 0; head < dims.heads; head += step.heads) {
    const index_t heads = std::min(step.heads, dims.heads - head);
    const index_t expand = project_tasks(keys, dims.nope + dims.value);
    deal(call.options.executor, lanes, heads * expand, [&](int lane, index_t task) {
      const index_t h = task / expand;
      std::byte* const k = memory.k + h * keys * wide * number;
      std::byte* const v = memory.v + h * keys * dims.value * number;
      project_task(task % expand, keys, matrix_of(call.kv_b, head + h), Weights::by_output,
                   project_memory(memory.scratch, memory.lane_bytes, lane, keys), read_key,
                   [&](index_t key, index_t n, index_t count, const float* from) {
                     const index_t to_k = std::clamp<index_t>(dims.nope - n, 0, count);
                     write_strided(format, from, to_k, k + (key * wide + n) * number, 1);
                     if (to_k < count)
                       write_strided(format, from + to_k, count - to_k,
                                     v + (key * dims.value + n + to_k - dims.nope) * number, 1);
                     if (n != 0 || dims.rope == 0) return;
                     float k_pe[kMaxDim];
                     read_key(key, dims.latent, dims.rope, k_pe);
                     write_strided(format, k_pe, dims.rope, k + (key * wide + dims.nope) * number, 1);
                   });
    });

    const Plan& inner = heads == step.heads ? step.plan : step.last;
    AttentionOptions options = expanded_options(plan, step, head, heads, call.options);
    options.workspace = {memory.attention, memory.attention_bytes};
    Operand q = call.q;
    q.data += (place.batch * q.stride[0] + head * q.stride[1] + place.q_begin * q.stride[2]) * row_bytes(q.format, 1);
    q.extent = {1, heads, place.len_q, wide};
    Result out = call.out;
    out.data +=
        (place.batch * out.stride[0] + head * out.stride[1] + place.q_begin * out.stride[2]) * row_bytes(out.format, 1);
    out.extent = {1, heads, place.len_q, dims.value};
    Kv kv;
    kv.k = stored_rows(memory.k, format, wide, heads, keys);
    kv.v = stored_rows(memory.v, format, dims.value, heads, keys);
    kv.kv_heads = heads;
    kv.dim_qk = wide;
    kv.dim_v = dims.value;
    kv.len = keys;
    if (Status status = attention<Formats<Format::f32, Format::bf16>>(inner, q, kv, out, options); !status.ok())
      return status;
  }
  return {};
}

// Everything has been checked.
template <class Compiled>
Status run_mla(const MlaPlan& plan, const MlaCall& call) {
  const int lanes = call.options.executor.lanes();
  const std::size_t wanted = workspace_bytes(plan, lanes);
  const auto run = [&](std::span<std::byte> workspace) -> Status {
    if (Status s = check_workspace(workspace, wanted); !s.ok()) return s;
    std::byte* const bytes = aligned(workspace).data();
    for (const MlaPlan::Absorbed& step : plan.absorbed) {
      if (Status s = run_absorbed<Compiled>(plan, step, call, bytes, lanes); !s.ok()) return s;
    }
    for (const MlaPlan::Expanded& step : plan.expanded) {
      if (Status s = run_expanded(plan, step, call, bytes, lanes); !s.ok()) return s;
    }
    return {};
  };
  if (!call.options.workspace.empty()) return run(call.options.workspace);
  return with_local([&](Local& local) { return run(local.workspace(wanted)); });
}

template <class Compiled>
Status mla_call(const MlaPlan* planned, MlaForm form, const Operand& q, const Operand& kv_b, const Kv& kv, const Result& out,
                const AttentionOptions& options) {
  const MlaDims dims = mla_dims(q, kv_b, out);
  const Latents latents(tidy_kv(kv), dims);
  const LatentReader read = latent_reader(latents.kv.k.format, Compiled{});
  const LatentReader read_exact = kv.exact == nullptr ? read : latent_reader(latents.exact.k.format, Compiled{});
  const MlaCall call{tidy_operand(q), tidy_operand(kv_b), latents, tidy_operand(out), options, read, read_exact};
  if (Status s = check_mla(call.q, call.kv_b, latents, call.out, dims, options, read, read_exact); !s.ok()) return s;
  if (planned != nullptr) {
    if (Status s = check_mla_plan(*planned, dims, q, latents, options); !s.ok()) return s;
    return run_mla<Compiled>(*planned, call);
  }
  MlaPlan plan;
  MlaShape shape = mla_shape(dims, q, latents.kv, options);
  if (latents.value_dim != latent_value_dim(shape.latents, dims)) shape.latents = latents.exact.k.format;
  if (Status s = make_plan(plan, shape, options, form); !s.ok()) return s;
  return run_mla<Compiled>(plan, call);
}

}   // namespace door

template <class Compiled>
Status mla(const Operand& q, const Operand& kv_b, const Kv& latents, const Result& out, const AttentionOptions& options,
           MlaForm form) {
  return door::mla_call<Compiled>(nullptr, form, q, kv_b, latents, out, options);
}

template <class Compiled>
Status mla(const MlaPlan& plan, const Operand& q, const Operand& kv_b, const Kv& latents, const Result& out,
           const AttentionOptions& options) {
  return door::mla_call<Compiled>(&plan, plan.wanted, q, kv_b, latents, out, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
