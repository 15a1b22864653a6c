// SPDX-License-Identifier: Apache-2.0
// What front door 1 refuses, and why: every check of a call, before anything is read or written.
#pragma once
#include <cmath>
#include <cstdint>
#include <utility>

#include "../engine/deal.hpp"
#include "run.hpp"
#include "views.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

inline constexpr index_t kMaxDim = 576;
inline constexpr index_t kMaxLength = INT32_MAX;   // lanes carry positions as int32
inline constexpr index_t kMaxSequences = kMaxTasks;

inline index_t count_sequences(const AttentionShape& shape, const AttentionOptions& options) {
  return options.cu_len_q.empty() ? shape.batch : static_cast<index_t>(options.cu_len_q.size()) - 1;
}

inline Status check_shape(const AttentionShape& s) {
  if (s.batch < 0 || s.len_q < 0 || s.len_k < 0)
    return invalid("fovea: negative extent: batch %td, len_q %td, len_k %td", s.batch, s.len_q, s.len_k);
  if (s.q_heads < 1 || s.kv_heads < 1)
    return invalid("fovea: q heads (%td) and kv heads (%td) must be positive", s.q_heads, s.kv_heads);
  if (s.q_heads % s.kv_heads != 0)
    return invalid("fovea: kv heads (%td) do not divide q heads (%td)", s.kv_heads, s.q_heads);
  if (s.dim_qk < 1 || s.dim_v < 1) return invalid("fovea: dims must be positive: dim_qk %td, dim_v %td", s.dim_qk, s.dim_v);
  if (s.dim_qk > kMaxDim || s.dim_v > kMaxDim)
    return unsupported("fovea: dims up to %td are supported: dim_qk %td, dim_v %td", kMaxDim, s.dim_qk, s.dim_v);
  if (s.len_q > kMaxLength || s.len_k > kMaxLength || s.q_heads > kMaxLength || s.batch > kMaxLength)
    return unsupported("fovea: extents up to %td are supported: batch %td, q heads %td, len_q %td, len_k %td", kMaxLength,
                       s.batch, s.q_heads, s.len_q, s.len_k);
  return {};
}

// A sequence that has more queries than a word has bits, a prompt beside drafts, has no tree: its words say so by 0.
inline Status check_tree(const AttentionShape& s, const AttentionOptions& o) {
  if (o.tree.empty()) return {};
  const index_t queries = s.batch * s.len_q;
  if (static_cast<index_t>(o.tree.size()) != queries)
    return invalid("fovea: tree has %zu words for %td queries", o.tree.size(), queries);
  for (index_t b = 0; b < count_sequences(s, o); ++b) {
    const auto at = static_cast<std::size_t>(b);
    const index_t begin = o.cu_len_q.empty() ? b * s.len_q : o.cu_len_q[at];
    const index_t len_q = o.cu_len_q.empty() ? s.len_q : o.cu_len_q[at + 1] - begin;
    for (index_t i = 0; len_q > kTreeQueries && i < len_q; ++i) {
      const std::uint64_t word = o.tree[static_cast<std::size_t>(begin + i)];
      if (word != 0)
        return unsupported(
            "fovea: trees of up to %td queries are supported, sequence %td has %td: its words must be 0 (no tree), word %td is "
            "%#llx; the mask fovea::tree takes larger trees",
            kTreeQueries, b, len_q, i, static_cast<unsigned long long>(word));
    }
  }
  return {};
}

inline Status check_tables(const AttentionShape& s, const AttentionOptions& o) {
  if (o.cu_len_q.empty() && !o.cu_len_k.empty())
    return invalid("fovea: cu_len_k (%zu entries) needs cu_len_q, which has none", o.cu_len_k.size());
  if (!o.cu_len_q.empty()) {
    if (s.batch != 1) return invalid("fovea: a ragged call has batch 1 and its sequences along pos; batch is %td", s.batch);
    if (Status status = check_cumulative("cu_len_q", o.cu_len_q, s.len_q); !status.ok()) return status;
  }
  if (!o.cu_len_k.empty()) {
    if (o.cu_len_q.size() != o.cu_len_k.size())
      return invalid("fovea: cu_len_q has %zu entries, cu_len_k has %zu", o.cu_len_q.size(), o.cu_len_k.size());
    if (Status status = check_cumulative("cu_len_k", o.cu_len_k, s.len_k); !status.ok()) return status;
  }
  const index_t sequences = count_sequences(s, o);
  if (sequences > kMaxSequences)
    return unsupported("fovea: up to %td sequences are supported, got %td", kMaxSequences, sequences);
  if (!o.len_k.empty() && static_cast<index_t>(o.len_k.size()) != sequences)
    return invalid("fovea: len_k has %zu entries for %td sequences", o.len_k.size(), sequences);
  if (!o.q_offset.empty() && static_cast<index_t>(o.q_offset.size()) != sequences)
    return invalid("fovea: q_offset has %zu entries for %td sequences", o.q_offset.size(), sequences);
  for (std::size_t b = 0; b < o.len_k.size(); ++b) {
    const index_t stored = o.cu_len_k.empty() ? s.len_k : o.cu_len_k[b + 1] - o.cu_len_k[b];
    if (o.len_k[b] < 0 || o.len_k[b] > stored)
      return invalid("fovea: len_k[%zu] = %td is outside 0 .. %td, the keys stored", b, o.len_k[b], stored);
  }
  for (std::size_t b = 0; b < o.q_offset.size(); ++b) {
    if (o.q_offset[b] < s.len_k - kMaxLength || o.q_offset[b] > kMaxLength - s.len_q)
      return unsupported("fovea: q_offset[%zu] = %td puts distances to keys beyond %td", b, o.q_offset[b], kMaxLength);
  }
  if (!o.alibi_slopes.empty() && static_cast<index_t>(o.alibi_slopes.size()) != s.q_heads)
    return invalid("fovea: alibi_slopes has %zu entries for %td q heads", o.alibi_slopes.size(), s.q_heads);
  if (Status status = check_tree(s, o); !status.ok()) return status;
  if (!o.sink.empty() && static_cast<index_t>(o.sink.size()) != s.q_heads)
    return invalid("fovea: sink has %zu entries for %td q heads", o.sink.size(), s.q_heads);
  return {};
}

template <class T>
Status check_mask(const char* name, const View<const T, 4>& mask, const AttentionShape& s, const AttentionOptions& o) {
  if (!mask) return {};
  index_t len_q = s.len_q, len_k = s.len_k;
  if (!o.cu_len_q.empty()) {
    len_q = 0;
    for (std::size_t b = 1; b < o.cu_len_q.size(); ++b) len_q = std::max(len_q, o.cu_len_q[b] - o.cu_len_q[b - 1]);
  }
  if (!o.cu_len_k.empty()) {
    len_k = 0;
    for (std::size_t b = 1; b < o.cu_len_k.size(); ++b) len_k = std::max(len_k, o.cu_len_k[b] - o.cu_len_k[b - 1]);
  }
  // Caches have room for more keys than are in use.
  if (o.cu_len_k.empty() && !o.len_k.empty()) len_k = *std::max_element(o.len_k.begin(), o.len_k.end());
  const index_t wanted[3] = {count_sequences(s, o), s.q_heads, len_q};
  const char* const axis_name[3] = {"sequence", "q_head", "len_q"};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const bool enough = axis == 2 ? mask.extent[axis] >= wanted[axis] : mask.extent[axis] == wanted[axis];
    if (mask.extent[axis] != 1 && !enough)
      return invalid("fovea: %s has %td along %s, must be 1 or %td", name, mask.extent[axis], axis_name[axis], wanted[axis]);
  }
  if (mask.extent[3] < len_k) return invalid("fovea: %s has %td keys, the call has %td", name, mask.extent[3], len_k);
  return {};
}

inline Status check_numbers(const AttentionOptions& o) {
  if (o.causal > Causal::bottom_right)
    return invalid("fovea: causal is %d, no value of the enum", static_cast<int>(o.causal));
  if (o.regime > Regime::wide_decode) return invalid("fovea: regime is %d, no value of the enum", static_cast<int>(o.regime));
  if (o.panels > Panels::bf16) return invalid("fovea: panels is %d, no value of the enum", static_cast<int>(o.panels));
  if (o.panels == Panels::bf16 && !kHasBf16Dot)
    return unsupported("fovea: bf16 panels need AVX-512 BF16, this is %s", FOVEA_ARCH_NAME);
  if (o.scale && !std::isfinite(*o.scale)) return invalid("fovea: scale %g is not finite", static_cast<double>(*o.scale));
  if (!std::isfinite(o.softcap) || o.softcap < 0.f || (o.softcap > 0.f && !std::isfinite(1.f / o.softcap)))
    return invalid("fovea: softcap %g must be 0 (off), or positive with a finite inverse", static_cast<double>(o.softcap));
  for (std::size_t h = 0; h < o.alibi_slopes.size(); ++h) {
    if (!std::isfinite(o.alibi_slopes[h]))
      return invalid("fovea: alibi_slopes[%zu] = %g is not finite", h, static_cast<double>(o.alibi_slopes[h]));
  }
  if (Status s = check_lanes(o.executor); !s.ok()) return s;
  return {};
}

inline Kv tidy_kv(Kv kv) {
  for (Stored* stored : {&kv.k, &kv.v}) {
    if (kv.batch <= 1) stored->stride[0] = 0;
    if (kv.kv_heads <= 1) stored->stride[1] = 0;
    if (kv.len <= 1) stored->stride[2] = 0;
  }
  return kv;
}
inline index_t pages_of(const Kv& kv, index_t sequence) {
  if (kv.block_table) return kv.block_table.extent[1];
  const auto b = static_cast<std::size_t>(sequence);
  return kv.page_begin[b + 1] - kv.page_begin[b];
}

inline Status check_stored(const char* name, const Kv& kv, const Stored& stored, index_t dim, Bytes& bytes) {
  if (static_cast<int>(stored.format) >= kFormats)
    return invalid("fovea: %s has format %d, no value of the enum", name, static_cast<int>(stored.format));
  if (dim < 1 || dim > kMaxDim) return unsupported("fovea: dims 1 to %td are supported, %s has %td", kMaxDim, name, dim);
  if (kv.batch < 0 || kv.kv_heads < 0 || kv.len < 0)
    return invalid("fovea: %s has batch %td, kv heads %td, len %td", name, kv.batch, kv.kv_heads, kv.len);
  if (kv.len > kMaxLength) return unsupported("fovea: %s has len %td, up to %td are supported", name, kv.len, kMaxLength);
  const std::array<index_t, 3> extent{kv.batch, kv.kv_heads, kv.len};
  if (stored.data == nullptr && kv.batch > 0 && kv.len > 0) return invalid("fovea: %s has null data", name);
  if (!bytes_of(stored.data, extent, stored.stride, 1, row_bytes(stored.format, dim), bytes))
    return invalid("fovea: %s reaches beyond the address space, check its strides", name);
  return {};
}

// k_channel_scale: of the call, also where kv is the exact part of a mixed cache.
inline Status check_formats(const Kv& kv, const float* k_channel_scale) {
  if (kv.v.format == Format::i8_channel)
    return unsupported("fovea: v has format i8_channel, which is for k: scales per channel would have to be summed over keys");
  if (kv.k.format == Format::i8_channel && k_channel_scale == nullptr)
    return invalid("fovea: k has format i8_channel and no k_channel_scale");
  if (kv.k.format != Format::i8_channel && kv.k_channel_scale != nullptr)
    return invalid("fovea: k_channel_scale goes with format i8_channel, k is %s", name_of(kv.k.format));
  if (kv.k.format == Format::latent_fp8 && kv.dim_qk != kLatentFp8Dim)
    return invalid("fovea: a latent_fp8 row has %td numbers as k, dim_qk is %td", kLatentFp8Dim, kv.dim_qk);
  const bool head_of_k = kv.v.data == kv.k.data && kv.k.data != nullptr && kv.dim_v != kv.dim_qk;
  if (head_of_k && kv.k.format != Format::latent_fp8 && !is_plain(kv.k.format))
    return unsupported("fovea: v cannot be the head of k in %s rows: their scales stand behind all of dim_qk %td",
                       name_of(kv.k.format), kv.dim_qk);
  if (kv.v.format == Format::latent_fp8 && kv.dim_v != kLatentFp8Values)
    return invalid("fovea: a latent_fp8 row has %td numbers as v, dim_v is %td", kLatentFp8Values, kv.dim_v);
  return {};
}

// The pages of the keys first .. keys_of(b) - 1 of each sequence.
template <class KeysOf>
Status check_pages(const Kv& kv, index_t sequences, index_t first, const KeysOf& keys_of) {
  if (kv.len < 1) return invalid("fovea: a page holds %td positions, must be at least 1", kv.len);
  if (kv.block_table) {
    if (!kv.page_indices.empty() || !kv.page_begin.empty())
      return invalid("fovea: pages are listed twice, by block_table and by page_indices");
    if (kv.block_table.extent[0] != sequences || kv.block_table.extent[1] < 0)
      return invalid("fovea: block_table is [%td, %td], must have a row for each of %td sequences", kv.block_table.extent[0],
                     kv.block_table.extent[1], sequences);
  } else {
    if (static_cast<index_t>(kv.page_begin.size()) != sequences + 1)
      return invalid("fovea: page_begin has %zu entries for %td sequences, must have one more", kv.page_begin.size(), sequences);
    if (Status s = check_cumulative("page_begin", kv.page_begin, static_cast<index_t>(kv.page_indices.size())); !s.ok())
      return s;
  }
  for (index_t b = 0; b < sequences; ++b) {
    const index_t keys = keys_of(static_cast<std::size_t>(b)), used = (keys + kv.len - 1) / kv.len;
    if (used > pages_of(kv, b))
      return invalid("fovea: sequence %td has %td keys, %td pages of %td; its table lists %td", b, keys, used, kv.len,
                     pages_of(kv, b));
    for (index_t page = first / kv.len; page < used; ++page) {
      const std::int32_t entry =
          kv.block_table ? kv.block_table.data[b * kv.block_table.stride[0] + page * kv.block_table.stride[1]]
                         : kv.page_indices[static_cast<std::size_t>(kv.page_begin[static_cast<std::size_t>(b)] + page)];
      if (entry < 0 || entry >= kv.batch)
        return invalid("fovea: page %td of sequence %td is %d, the pool has %td pages", page, b, static_cast<int>(entry),
                       kv.batch);
    }
  }
  return {};
}

inline Status check_ring(const Kv& kv, index_t sequences) {
  if (kv.sinks < 0 || kv.sinks >= kv.len)
    return invalid("fovea: a ring of %td slots has %td sinks, must leave at least one slot", kv.len, kv.sinks);
  if (static_cast<index_t>(kv.ring_begin.size()) != sequences)
    return invalid("fovea: ring_begin has %zu entries for %td sequences", kv.ring_begin.size(), sequences);
  for (std::size_t b = 0; b < kv.ring_begin.size(); ++b) {
    if (kv.ring_begin[b] < 0 || kv.ring_begin[b] >= kv.len - kv.sinks)
      return invalid("fovea: ring_begin[%zu] = %td is outside the ring's 0 .. %td", b, kv.ring_begin[b],
                     kv.len - kv.sinks - 1);
  }
  return {};
}

// The 16-bit part of a mixed cache.
inline Status check_exact(const Kv& kv, const AttentionOptions& o, index_t sequences) {
  const Kv& exact = *kv.exact;
  if (exact.exact != nullptr || exact.home == Home::paged)
    return unsupported("fovea: the exact part of a mixed cache is contiguous or a ring, and not mixed itself");
  if (exact.kv_heads != kv.kv_heads || exact.dim_qk != kv.dim_qk || exact.dim_v != kv.dim_v)
    return invalid("fovea: the exact part has %td kv heads and dims %td/%td, the others %td and %td/%td", exact.kv_heads,
                   exact.dim_qk, exact.dim_v, kv.kv_heads, kv.dim_qk, kv.dim_v);
  if (exact.k_channel_scale != nullptr)
    return invalid("fovea: the exact part has a k_channel_scale; the other part's is for both, and exact k are stored divided by it");
  if (exact.home > Home::ring)
    return invalid("fovea: the exact part's home is %d, no value of the enum", static_cast<int>(exact.home));
  if (!o.cu_len_k.empty() || static_cast<index_t>(o.len_k.size()) != sequences)
    return invalid("fovea: a mixed cache needs len_k, one entry for each of %td sequences, and no cu_len_k", sequences);
  if (static_cast<index_t>(kv.exact_from.size()) != sequences || kv.exact_first < 0)
    return invalid("fovea: exact_from has %zu entries for %td sequences, exact_first is %td", kv.exact_from.size(), sequences,
                   kv.exact_first);
  for (std::size_t b = 0; b < kv.exact_from.size(); ++b) {
    if (kv.exact_from[b] < 0 || kv.exact_from[b] > std::max(o.len_k[b], kv.exact_first))
      return invalid("fovea: exact_from[%zu] = %td is outside 0 .. %td, the keys in use", b, kv.exact_from[b],
                     std::max(o.len_k[b], kv.exact_first));
    const index_t from = std::min(kv.exact_from[b], o.len_k[b]);
    const index_t held = std::min(kv.exact_first, from) + o.len_k[b] - from;
    if (held > exact.len)
      return invalid("fovea: the exact part of sequence %zu would hold %td keys, it has %td positions", b, held, exact.len);
    if (kv.home != Home::paged && from > kv.exact_first && from > kv.len)
      return invalid("fovea: sequence %zu reads keys up to %td from %td positions", b, from, kv.len);
  }
  if (exact.batch != sequences)
    return invalid("fovea: the exact part has %td entries for %td sequences", exact.batch, sequences);
  return exact.home == Home::ring ? check_ring(exact, sequences) : Status{};
}

// Where the keys are, against the lengths of the call.
inline Status check_home(const Kv& kv, const AttentionShape& shape, const AttentionOptions& o) {
  const index_t sequences = count_sequences(shape, o);
  if (Status s = check_formats(kv, kv.k_channel_scale); !s.ok()) return s;
  if (kv.home != Home::contiguous || kv.exact != nullptr) {
    if (!o.cu_len_k.empty())
      return invalid("fovea: cu_len_k is for keys stored one sequence after the other; a cache takes len_k");
  }
  switch (kv.home) {
    case Home::contiguous:
      if (o.cu_len_k.empty() && kv.batch != sequences)
        return invalid("fovea: k has %td batch entries for %td sequences (one entry for all of them needs cu_len_k)", kv.batch,
                       sequences);
      if (!o.cu_len_k.empty() && kv.batch != 1)
        return invalid("fovea: ragged keys have batch 1 and their sequences along pos; batch is %td", kv.batch);
      break;
    case Home::paged:
      if (static_cast<index_t>(o.len_k.size()) != sequences)
        return invalid("fovea: paged keys need len_k, one entry for each of %td sequences, got %zu", sequences, o.len_k.size());
      break;
    case Home::ring:
      if (kv.batch != sequences) return invalid("fovea: the ring has %td entries for %td sequences", kv.batch, sequences);
      if (Status s = check_ring(kv, sequences); !s.ok()) return s;
      break;
    default:
      return invalid("fovea: home is %d, no value of the enum", static_cast<int>(kv.home));
  }
  if (kv.exact != nullptr) {
    if (Status s = check_exact(kv, o, sequences); !s.ok()) return s;
  }
  if (kv.home != Home::paged) return {};
  return check_pages(kv, sequences, kv.exact == nullptr ? 0 : kv.exact_first, [&](std::size_t b) {
    if (kv.exact == nullptr) return o.len_k[b];
    return kv.exact_from[b] <= kv.exact_first ? 0 : std::min(kv.exact_from[b], o.len_k[b]);   // the others are exact keys
  });
}

// The widest call this Kv can serve; lengths in use travel in the options.
inline AttentionShape shape_of(const Operand& q, const Kv& kv, const AttentionOptions& o) {
  index_t len_k = kv.len;
  if (kv.home == Home::paged || kv.exact != nullptr) {
    len_k = 0;
    for (const index_t len : o.len_k) len_k = std::max(len_k, len);
  }
  return {q.extent[0], q.extent[1], kv.kv_heads, q.extent[2], len_k, q.extent[3], kv.dim_v};
}

template <class T>
Bytes span_bytes(const std::span<T>& span) {
  const auto base = reinterpret_cast<std::uintptr_t>(span.data());
  return {base, base + span.size_bytes()};
}

// What a call reads of the options' tensors and tables.
using NamedBytes = std::pair<const char*, Bytes>;
inline Status option_inputs(const AttentionOptions& o, std::array<NamedBytes, 5>& inputs) {
  Bytes bias, keep;
  if (Status s = check_data("bias", o.bias, bias); o.bias && !s.ok()) return s;
  if (Status s = check_data("keep", o.keep, keep); o.keep && !s.ok()) return s;
  inputs = {{{"bias", bias},
             {"keep", keep},
             {"alibi_slopes", span_bytes(o.alibi_slopes)},
             {"sink", span_bytes(o.sink)},
             {"tree", span_bytes(o.tree)}}};
  return {};
}

// What outputs must be by themselves: no element named twice, the LSE of q's rows, apart from out.
inline Status check_outputs(const Result& out, const Bytes& out_bytes, const View<float, 3>& lse,
                            const std::array<index_t, 4>& q_extent, Bytes& lse_bytes) {
  if (!writes_apart(out)) {
    return invalid("fovea: out overlaps itself: extents [%td, %td, %td, %td], strides [%td, %td, %td, %td]", out.extent[0],
                   out.extent[1], out.extent[2], out.extent[3], out.stride[0], out.stride[1], out.stride[2], out.stride[3]);
  }
  if (!lse) return {};
  if (Status s = check_data("lse", lse, lse_bytes); !s.ok()) return s;
  if (lse.extent != std::array<index_t, 3>{q_extent[0], q_extent[1], q_extent[2]})
    return invalid("fovea: lse is [%td, %td, %td], must be [%td, %td, %td]", lse.extent[0], lse.extent[1], lse.extent[2],
                   q_extent[0], q_extent[1], q_extent[2]);
  if (!writes_apart(lse))
    return invalid("fovea: lse overlaps itself: strides [%td, %td, %td]", lse.stride[0], lse.stride[1], lse.stride[2]);
  return check_apart({"out", out_bytes}, "lse", lse_bytes);
}

// What only a mechanism reads (a gate, a learned key, a table), against everything the call writes.
inline Status check_learned(const char* name, const Bytes& bytes, const Result& out, const AttentionOptions& o) {
  Bytes out_bytes, lse_bytes;
  if (Status s = check_plain("out", out.format); !s.ok()) return s;
  if (Status s = check_data("out", tidy_operand(out), out_bytes); !s.ok()) return s;
  if (Status s = check_data("lse", tidy(o.lse), lse_bytes); o.lse && !s.ok()) return s;
  if (Status s = check_apart({"out", out_bytes}, name, bytes); !s.ok()) return s;
  if (Status s = check_apart({"lse", lse_bytes}, name, bytes); !s.ok()) return s;
  return check_apart({"workspace", span_bytes(o.workspace)}, name, bytes);
}

inline Status check_call(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& o) {
  Bytes q_bytes, k_bytes, v_bytes, exact_k_bytes, exact_v_bytes, out_bytes, lse_bytes;
  if (Status s = check_plain("q", q.format); !s.ok()) return s;
  if (Status s = check_plain("out", out.format); !s.ok()) return s;
  if (Status s = check_data("q", q, q_bytes); !s.ok()) return s;
  if (Status s = check_stored("k", kv, kv.k, kv.dim_qk, k_bytes); !s.ok()) return s;
  if (Status s = check_stored("v", kv, kv.v, kv.dim_v, v_bytes); !s.ok()) return s;
  if (kv.exact != nullptr) {
    if (Status s = check_stored("the exact k", *kv.exact, kv.exact->k, kv.exact->dim_qk, exact_k_bytes); !s.ok()) return s;
    if (Status s = check_stored("the exact v", *kv.exact, kv.exact->v, kv.exact->dim_v, exact_v_bytes); !s.ok()) return s;
    if (Status s = check_formats(*kv.exact, kv.k_channel_scale); !s.ok()) return s;
  }
  if (Status s = check_data("out", out, out_bytes); !s.ok()) return s;
  std::array<NamedBytes, 5> of_options;
  if (Status s = option_inputs(o, of_options); !s.ok()) return s;
  if (q.extent[3] != kv.dim_qk) return invalid("fovea: q has dim %td, k has dim %td", q.extent[3], kv.dim_qk);
  if (Status s = check_extents("out", out, {q.extent[0], q.extent[1], q.extent[2], kv.dim_v}, "q and v"); !s.ok()) return s;
  if (Status s = check_outputs(out, out_bytes, o.lse, q.extent, lse_bytes); !s.ok()) return s;
  Bytes scale_bytes, table_bytes;
  if (kv.k_channel_scale != nullptr) {
    const auto base = reinterpret_cast<std::uintptr_t>(kv.k_channel_scale);
    scale_bytes = {base, base + static_cast<std::uintptr_t>(kv.kv_heads) * static_cast<std::uintptr_t>(kv.dim_qk) * sizeof(float)};
  }
  if (Status s = check_data("block_table", kv.block_table, table_bytes); kv.block_table && !s.ok()) return s;
  const NamedBytes inputs[] = {{"q", q_bytes},
                               {"k", k_bytes},
                               {"v", v_bytes},
                               {"the exact k", exact_k_bytes},
                               {"the exact v", exact_v_bytes},
                               {"k_channel_scale", scale_bytes},
                               {"page_indices", span_bytes(kv.page_indices)},
                               {"block_table", table_bytes}};
  const OutputBytes outputs[] = {{"workspace", span_bytes(o.workspace)}, {"out", out_bytes}, {"lse", lse_bytes}};
  const auto apart = [&](const NamedBytes& input) -> Status {
    for (const OutputBytes& output : outputs) {
      if (output.bytes.overlaps(input.second)) return check_apart(output, input.first, input.second);
    }
    return {};
  };
  for (const NamedBytes& input : inputs) {
    if (Status s = apart(input); !s.ok()) return s;
  }
  for (const NamedBytes& input : of_options) {
    if (Status s = apart(input); !s.ok()) return s;
  }
  for (const OutputBytes& output : {outputs[1], outputs[2]}) {
    if (output.bytes.overlaps(outputs[0].bytes)) return check_apart(output, outputs[0].name, outputs[0].bytes);
  }
  return {};
}

// K and V as tensors: what a Kv cannot say any more.
inline Status check_dense(const Operand& q, const Operand& k, const Operand& v) {
  Bytes ignored;
  for (const auto& [name, tensor] : {std::pair<const char*, const Operand*>{"q", &q}, {"k", &k}, {"v", &v}}) {
    if (Status s = check_plain(name, tensor->format); !s.ok()) return s;
    if (Status s = check_data(name, *tensor, ignored); !s.ok()) return s;
  }
  if (Status s = check_extents("k", k, {k.extent[0], k.extent[1], k.extent[2], q.extent[3]}, "q"); !s.ok()) return s;
  if (Status s = check_extents("v", v, {k.extent[0], k.extent[1], k.extent[2], v.extent[3]}, "k"); !s.ok()) return s;
  if (Status s = check_innermost("k", k); !s.ok()) return s;
  return check_innermost("v", v);
}

inline Sequence sequence_of(const AttentionShape& shape, const AttentionOptions& options, index_t b) {
  const auto i = static_cast<std::size_t>(b);
  Sequence sequence{0, shape.len_q, 0, shape.len_k, 0, b, b};
  if (!options.cu_len_q.empty()) {
    sequence.q_begin = options.cu_len_q[i];
    sequence.len_q = options.cu_len_q[i + 1] - options.cu_len_q[i];
    sequence.batch = 0;
  }
  if (!options.cu_len_k.empty()) {
    sequence.k_begin = options.cu_len_k[i];
    sequence.len_k = options.cu_len_k[i + 1] - options.cu_len_k[i];
    sequence.kv_batch = 0;
  }
  if (!options.len_k.empty()) sequence.len_k = options.len_k[i];
  sequence.pos = !options.q_offset.empty()                ? options.q_offset[i]
                 : options.causal == Causal::bottom_right ? sequence.len_k - sequence.len_q
                                                          : 0;
  return sequence;
}

// A plan made for another problem would mask wrongly, or read and write outside these tensors.
inline Status check_plan(const Plan& plan, const AttentionShape& s, const AttentionOptions& o, bool split_keys, bool strip) {
  const PlanRequest& r = plan.request;
  if (r.q_heads != s.q_heads || r.kv_heads != s.kv_heads || r.dim_qk != s.dim_qk || r.dim_v != s.dim_v)
    return invalid("fovea: the plan is for %td/%td heads and dims %td/%td, the call has %td/%td and %td/%td", r.q_heads,
                   r.kv_heads, r.dim_qk, r.dim_v, s.q_heads, s.kv_heads, s.dim_qk, s.dim_v);
  const Reach reach = reach_of(o);
  if (r.reach.left != reach.left || r.reach.right != reach.right)
    return invalid("fovea: the plan is for keys %td left to %td right of the query, the options say %td and %td",
                   r.reach.left, r.reach.right, reach.left, reach.right);
  if (static_cast<index_t>(plan.sequences.size()) != count_sequences(s, o))
    return invalid("fovea: the plan is for %zu sequences, the call has %td", plan.sequences.size(), count_sequences(s, o));
  if (r.regime != o.regime || r.panels != o.panels)
    return invalid("fovea: the plan was made with another regime or panels option than the call");
  if (r.split_keys != split_keys || r.strip != strip)
    return invalid("fovea: the plan was made for another variant: %s, %s; this one needs %s, %s",
                   r.split_keys ? "keys split" : "keys whole", r.strip ? "rows kept" : "online",
                   split_keys ? "keys split" : "keys whole", strip ? "rows kept" : "online");
  for (std::size_t b = 0; b < plan.sequences.size(); ++b) {
    const Sequence &planned = plan.sequences[b], called = sequence_of(s, o, static_cast<index_t>(b));
    if (planned != called) {
      return invalid(
          "fovea: sequence %zu is planned as %td queries from position %td and %td keys, the call has %td, %td, %td", b,
          planned.len_q, planned.pos, planned.len_k, called.len_q, called.pos, called.len_k);
    }
  }
  return {};
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
