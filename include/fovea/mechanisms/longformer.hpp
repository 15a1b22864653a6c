// SPDX-License-Identifier: Apache-2.0
// Longformer (Beltagy et al. 2020, arXiv 2004.05150), as its code has it: a symmetric window of 2 w + 1 keys, and global
// tokens with projections of their own.
//   local row   one softmax over [all global keys | local keys with |t - s| <= w], q, k and v of the local projections; a
//               global key inside the window counts once
//   global row  softmax of q_global . k_global over all keys that are no padding, times v_global: replaces the local row
//   padding     is never a key; its rows are 0
// One list per 64 queries: the global keys, then the local ones that some of the 64 see. A mask cuts the window's edges row
// by row; the global rows are gathered, attend together, and are written back.
#pragma once
#include "../call/in_memory.hpp"
#include "../call/pattern_call.hpp"
#include "../call/sparse_call.hpp"
#include "../simd/numbers.hpp"

namespace fovea {
inline namespace v0 {

struct LongformerInputs {
  Operand q, k, v;   // [batch, head, pos, dim]
  Operand q_global, k_global,
      v_global;   // [batch, head, pos, dim]  k, v in the formats of the local ones; not read where no
                  //                          token is global
};

inline namespace FOVEA_ARCH {
namespace longformer {

inline constexpr index_t kQueries = 64;   // of a list: 2 w + 64 keys are scored for 2 w + 1 that count, 12 % more at w = 256

// Local keys near the row, and all global ones.
struct NearOrGlobal {
  View<const std::int8_t, 2> kind;   // [batch, pos]
  index_t window;

  struct Lane {
    const std::int8_t* kind;
    index_t stride, len;
    i32 first, last;
    FOVEA_INLINE keep_t operator()(i32 pos) const {
      const auto near = (pos >= first) & (pos <= last);
      if (xsimd::all(near)) return as_keep(near);
      // Asked on tiles with an edge of the window, or with the first keys of a list.
      alignas(i32) std::int32_t at[kLanes];
      alignas(i32) std::int32_t global[kLanes];
      pos.store_aligned(at);
      for (index_t n = 0; n < kLanes; ++n) global[n] = at[n] >= 0 && at[n] < len && kind[at[n] * stride] > 0;
      return as_keep(near | (i32::load_aligned(global) > i32(0)));
    }
    static constexpr bool kAnyPositions = true;
  };
  FOVEA_INLINE Lane at(const Row& row) const {
    return {kind.data + row.sequence * kind.stride[0], kind.stride[1], kind.extent[1],
            i32(static_cast<std::int32_t>(std::max<index_t>(row.pos - window, 0))),
            i32(static_cast<std::int32_t>(std::min(row.pos + window, kind.extent[1])))};
  }
  FOVEA_INLINE KeyRange hull(std::span<const Row>) const { return {0, kind.extent[1]}; }
  FOVEA_INLINE Cover cover(const Tile& tile) const {
    for (const Row& row : tile.rows) {
      if (tile.k_begin < row.pos - window || tile.k_end - 1 > row.pos + window) return Cover::partial;
    }
    return Cover::full;
  }
};

struct Memory : door::LocalBytes {};

// The global tokens of all sequences, one after the other, and room for the rows of one sequence's.
struct Globals {
  std::int32_t* tokens = nullptr;
  index_t* begin = nullptr;   // [batch + 1]
  index_t most = 0;           // of one sequence
  float* q = nullptr;         // [head, most, dim_qk]
  float* out = nullptr;       // [head, most, dim_v]
  float* lse = nullptr;       // [head, most]

  void carve(Bump& bump, const AttentionShape& shape, index_t total) {
    begin = bump.take<index_t>(shape.batch + 1);
    tokens = bump.take<std::int32_t>(total);
    q = bump.take<float>(shape.q_heads * most * shape.dim_qk);
    out = bump.take<float>(shape.q_heads * most * shape.dim_v);
    lse = bump.take<float>(shape.q_heads * most);
  }
  void list(View<const std::int8_t, 2> kind) {
    index_t n = begin[0] = 0;
    for (index_t b = 0; b < kind.extent[0]; ++b) {
      for (index_t t = 0; t < kind.extent[1]; ++t) {
        if (kind(b, t) > 0) tokens[n++] = static_cast<std::int32_t>(t);
      }
      begin[b + 1] = n;
    }
  }
};

inline Status check(const LongformerInputs& x, const View<const std::int8_t, 2>& kind, index_t window, const Result& out,
                    const AttentionOptions& o) {
  if (window < 0 || window > door::kMaxLength)
    return door::invalid("fovea: window %td is one side's keys, must be 0 to %td", window, door::kMaxLength);
  if (o.causal != Causal::none || o.window.left >= 0 || o.window.right >= 0 || !o.q_offset.empty() || !o.len_k.empty() ||
      !o.cu_len_q.empty() || !o.cu_len_k.empty() || !o.sink.empty())
    return door::unsupported(
        "fovea: Longformer is bidirectional over whole sequences: causal, window, q_offset, len_k, cu_len_q, cu_len_k and "
        "sink "
        "of the options are not its");
  if (Status s = VariantTraits<Variant<>>::check_options(o); !s.ok()) return s;
  if (x.k.extent[2] != x.q.extent[2])
    return door::invalid("fovea: q has %td positions, k has %td: self-attention needs as many", x.q.extent[2],
                         x.k.extent[2]);
  if (kind.extent != std::array<index_t, 2>{x.q.extent[0], x.q.extent[2]})
    return door::invalid("fovea: kind is [%td, %td], must be [%td, %td]", kind.extent[0], kind.extent[1], x.q.extent[0],
                         x.q.extent[2]);
  if (kind.data == nullptr && kind.extent[0] * kind.extent[1] > 0) return door::invalid("fovea: kind has null data");
  door::Bytes bytes;
  if (!door::bytes_of(kind.data, kind.extent, kind.stride, 1, 1, bytes))
    return door::invalid("fovea: kind reaches beyond the address space, check its strides");
  return door::check_learned("kind", bytes, out, o);
}

// One set of projections.
inline Status check_projections(const Operand& q, const Operand& k, const Operand& v, const Result& out,
                                const AttentionOptions& options) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  const Kv kv = door::kv_of(k, v);
  const AttentionShape shape = door::shape_of(q, kv, options);
  if (Status s = door::check_call(door::tidy_operand(q), kv, out, options); !s.ok()) return s;
  if (Status s = door::check_problem(shape, options); !s.ok()) return s;
  return door::check_home(kv, shape, options);
}
inline Status check_global_projections(const LongformerInputs& x, const Result& out, const AttentionOptions& options) {
  if (Status s = door::check_extents("q_global", x.q_global, x.q.extent, "q"); !s.ok()) return s;
  if (Status s = door::check_extents("k_global", x.k_global, x.k.extent, "k"); !s.ok()) return s;
  if (Status s = door::check_extents("v_global", x.v_global, x.v.extent, "v"); !s.ok()) return s;
  if (x.k_global.format != x.k.format || x.v_global.format != x.v.format)
    return door::invalid("fovea: k_global and v_global are %s and %s, must be stored as k and v are, %s and %s",
                         name_of(x.k_global.format), name_of(x.v_global.format), name_of(x.k.format), name_of(x.v.format));
  return check_projections(x.q_global, x.k_global, x.v_global, out, options);
}

template <class Compiled>
Status attend_local(const LongformerInputs& x, const AttentionShape& shape, const View<const std::int8_t, 2>& kind,
                    index_t window, const Globals& globals, const Result& out, const AttentionOptions& options) {
  const auto write = [&](const door::ListPlace& place, door::ListWriter& list) {
    bool any = false;
    for (index_t t = place.first; t <= place.last && !any; ++t) any = kind(place.sequence, t) == 0;
    if (!any) return;
    for (index_t n = globals.begin[place.sequence]; n < globals.begin[place.sequence + 1]; ++n)
      list.range(globals.tokens[n], globals.tokens[n] + 1);
    const index_t end = std::min(place.last + window + 1, shape.len_k);
    for (index_t s = std::max<index_t>(place.first - window, 0); s < end; ++s) {
      const index_t first = s;
      while (s < end && kind(place.sequence, s) == 0) ++s;
      list.range(first, s);
    }
  };
  const door::ListLayout layout{shape.batch, 1, std::max<index_t>((shape.len_q + kQueries - 1) / kQueries, 1), kQueries};
  const auto local = variant().with_mask(NearOrGlobal{kind, window});
  return door::with_position_lists(layout, shape, options, 1, true, write, [&](const KeyLists& lists) {
    return door::sparse<Compiled>(x.q, door::kv_of(x.k, x.v), {&lists, 1}, out, options, local);
  });
}

template <class Compiled>
Status attend_global(const LongformerInputs& x, const AttentionShape& shape, const View<const std::int8_t, 2>& kind,
                     const Globals& globals, index_t b, const Result& out, const AttentionOptions& options) {
  const index_t first = globals.begin[b], count = globals.begin[b + 1] - first;
  if (count == 0) return {};
  const auto row_of = [&](const auto& tensor, index_t h, index_t n) {
    return (b * tensor.stride[0] + h * tensor.stride[1] + globals.tokens[first + n] * tensor.stride[2]) *
           row_bytes(tensor.format, 1);
  };
  for (index_t h = 0; h < shape.q_heads; ++h) {
    for (index_t n = 0; n < count; ++n)
      read_numbers(x.q_global.format, x.q_global.data + row_of(x.q_global, h, n), x.q_global.stride[3], shape.dim_qk,
                   globals.q + (h * count + n) * shape.dim_qk);
  }
  const auto only = [b](Operand tensor) {
    tensor.data += b * tensor.stride[0] * row_bytes(tensor.format, 1);
    tensor.extent[0] = 1;
    return tensor;
  };
  AttentionOptions inner = options;
  inner.lse = {globals.lse, {1, shape.q_heads, count}, {shape.q_heads * count, count, 1}};
  const AttentionShape one{1, shape.q_heads, shape.kv_heads, count, shape.len_k, shape.dim_qk, shape.dim_v};
  const auto write = [&](const door::ListPlace&, door::ListWriter& list) {
    for (index_t s = 0; s < shape.len_k; ++s) {
      const index_t begin = s;
      while (s < shape.len_k && kind(b, s) >= 0) ++s;
      list.range(begin, s);
    }
  };
  const auto run = [&](const KeyLists& lists) {
    return door::sparse<Compiled>(bhsd<const float>(globals.q, 1, shape.q_heads, count, shape.dim_qk),
                                  door::kv_of(only(x.k_global), only(x.v_global)), {&lists, 1},
                                  bhsd(globals.out, 1, shape.q_heads, count, shape.dim_v), inner);
  };
  if (Status s = door::with_position_lists({1, 1, 1, count}, one, inner, 1, true, write, run); !s.ok()) return s;
  for (index_t h = 0; h < shape.q_heads; ++h) {
    for (index_t n = 0; n < count; ++n) {
      write_numbers(out.format, globals.out + (h * count + n) * shape.dim_v, shape.dim_v, out.data + row_of(out, h, n),
                    out.stride[3]);
      if (options.lse) options.lse(b, h, globals.tokens[first + n]) = globals.lse[h * count + n];
    }
  }
  return {};
}

}   // namespace longformer

// kind [batch, pos]: < 0 padding, 0 local, > 0 global; `window` is one side, w. Options: scale, LSE (of padding -inf),
// regime, panels, executor; others are refused, and memory is the library's.
template <class Compiled = AllFormats>
Status longformer_attention(const LongformerInputs& inputs, View<const std::int8_t, 2> kind, index_t window,
                            const Result& out_any, const AttentionOptions& options_any = {}) {
  using door::tidy_operand;
  const LongformerInputs x{tidy_operand(inputs.q),        tidy_operand(inputs.k),        tidy_operand(inputs.v),
                           tidy_operand(inputs.q_global), tidy_operand(inputs.k_global), tidy_operand(inputs.v_global)};
  const Result out = tidy_operand(out_any);
  AttentionOptions options = options_any;
  options.workspace = {};
  options.lse = tidy(options.lse);
  kind = tidy(kind);
  if (Status s = longformer::check_projections(x.q, x.k, x.v, out, options); !s.ok()) return s;
  if (Status s = longformer::check(x, kind, window, out, options); !s.ok()) return s;
  const AttentionShape shape = door::shape_of(x.q, door::kv_of(x.k, x.v), options);
  longformer::Globals globals;
  index_t total = 0;
  for (index_t b = 0; b < shape.batch; ++b) {
    const index_t before = total;
    for (index_t t = 0; t < shape.len_q; ++t) total += kind(b, t) > 0;
    globals.most = std::max(globals.most, total - before);
  }
  if (total > 0) {
    if (Status s = longformer::check_global_projections(x, out, options); !s.ok()) return s;
  }
  Bump size;
  globals.carve(size, shape, total);
  return door::in_memory<longformer::Memory>({}, size.used() + kAlignment, [&](std::span<std::byte> bytes) -> Status {
    Bump bump(bytes.data());
    globals.carve(bump, shape, total);
    globals.list(kind);
    if (Status s = longformer::attend_local<Compiled>(x, shape, kind, window, globals, out, options); !s.ok()) return s;
    for (index_t b = 0; b < shape.batch; ++b) {
      if (Status s = longformer::attend_global<Compiled>(x, shape, kind, globals, b, out, options); !s.ok()) return s;
    }
    door::clear_padding(out, options.lse, [&](index_t b, index_t t) { return kind(b, t) < 0; });
    return {};
  });
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
