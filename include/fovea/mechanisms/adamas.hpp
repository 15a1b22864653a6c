// SPDX-License-Identifier: Apache-2.0
// Adamas (Yan et al. 2025, arXiv 2510.18413): per query and q head the k keys nearest to the query in a space of 2-bit
// codes,
//   code(x) = how many of (-10, 0, 10) are below (H x), H the orthonormal Hadamard transform of the rotated row,
//   distance = sum |code_q - code_k|,  the k smallest,
// then softmax over these keys in full precision. At dim 128 a key's codes are 32 bytes, 1/16 of K and V in 16 bits, and a
// distance of two keys is some ten instructions (simd/code_distance.hpp).
//
// There are at most 3 dim + 1 distances, so ties are the rule: among equal ones the lower index is taken.
#pragma once
#include <cstring>

#include "../call/query_lists.hpp"
#include "../call/sparse_call.hpp"
#include "../simd/code_distance.hpp"
#include "../simd/hadamard.hpp"
#include "../simd/numbers.hpp"
#include "../simd/select.hpp"

namespace fovea {
inline namespace v0 {

struct AdamasOptions {
  index_t budget = 1024;    // keys attended to, the current one among them
  bool current = true;      // the last key a query sees is always one of them
  float threshold = 10.f;   // of the codes, the query's and the keys' alike
  CodeDistance distance = CodeDistance::exact;
};

inline namespace FOVEA_ARCH {

namespace adamas_codes {

struct Scratch {
  float* row;                 // [dim]
  std::byte* codes;           // [code_bytes(dim)]
  std::uint16_t* distances;   // [key]
};
inline Scratch carve(Bump& bump, index_t dim, index_t keys) {
  float* const row = bump.take<float>(dim);
  std::byte* const codes = bump.take<std::byte>(code_bytes(dim));
  return {row, codes, bump.take<std::uint16_t>(keys)};
}

inline void encode(const Operand& x, index_t at, float threshold, float* row, std::byte* to) {
  const index_t dim = x.extent[3];
  read_numbers(x.format, x.data + at * row_bytes(x.format, 1), x.stride[3], dim, row);
  hadamard(row, dim);
  write_codes(row, dim, threshold, to);
}

// Selects for one query at a time.
struct Selector {
  Operand q;
  View<const std::uint8_t, 4> codes;   // [sequence, kv_head, key, byte]
  AdamasOptions adamas;
  index_t most_keys;   // of any sequence
  index_t capacity;    // of a list, enough for the budget or for all keys

  std::size_t lane_bytes() const {
    Bump bump;
    carve(bump, q.extent[3], most_keys);
    return bump.used();
  }

  void operator()(const door::QueryPlace& place, std::int32_t* to, std::byte* bytes) const {
    const index_t count = place.end - place.first, dim = q.extent[3];
    index_t taken = 0;
    if (count <= adamas.budget) {
      for (; taken < count; ++taken) to[taken] = static_cast<std::int32_t>(place.first + taken);
    } else {
      Bump bump(bytes);
      const Scratch scratch = carve(bump, dim, most_keys);
      encode(q, place.batch * q.stride[0] + place.q_head * q.stride[1] + place.row * q.stride[2], adamas.threshold,
             scratch.row, scratch.codes);
      const index_t competing = adamas.current ? count - 1 : count;
      const std::uint8_t* const keys =
          codes.data + place.sequence * codes.stride[0] + place.kv_head * codes.stride[1] + place.first * codes.stride[2];
      code_distances(adamas.distance, scratch.codes, code_bytes(dim), reinterpret_cast<const std::byte*>(keys),
                     codes.stride[2], competing, scratch.distances);
      taken = select_smallest({scratch.distances, static_cast<std::size_t>(competing)},
                              adamas.current ? adamas.budget - 1 : adamas.budget,
                              static_cast<std::uint16_t>(largest_distance(dim)), to);
      for (index_t i = 0; i < taken; ++i) to[i] += static_cast<std::int32_t>(place.first);
      if (adamas.current) to[taken++] = static_cast<std::int32_t>(place.end - 1);
    }
    std::fill(to + taken, to + capacity, -1);
  }
};

inline Selector selector(const Operand& q, const View<const std::uint8_t, 4>& codes, const AttentionShape& shape,
                         const AttentionOptions& options, const AdamasOptions& adamas) {
  const index_t keys = door::longest_keys(shape, options);
  return {q, codes, adamas, keys, std::min(adamas.budget, std::max<index_t>(keys, 1))};
}

inline Status check(const Operand& q, const View<const std::uint8_t, 4>& codes, const AttentionShape& shape,
                    const AttentionOptions& options, const AdamasOptions& adamas) {
  if (!is_code_dim(q.extent[3]))
    return door::unsupported("fovea: adamas: dim_qk is %td, must be a power of two from 4 to %td", q.extent[3], kMaxCodeDim);
  if (adamas.budget < 1 || adamas.budget > door::kMaxLength)
    return door::invalid("fovea: adamas: the budget is %td keys, must be 1 to %td", adamas.budget, door::kMaxLength);
  if (!(adamas.threshold > 0.f))
    return door::invalid("fovea: adamas: the threshold is %g, must be positive", static_cast<double>(adamas.threshold));
  if (adamas.distance > CodeDistance::xor_popcount)
    return door::invalid("fovea: adamas: distance is %d, no value of the enum", static_cast<int>(adamas.distance));
  door::Bytes ignored;
  if (Status s = door::check_data("codes", codes, ignored); !s.ok()) return s;
  if (codes.stride[3] != 1 && codes.extent[3] > 1)
    return door::unsupported("fovea: codes have innermost stride %td, must be 1", codes.stride[3]);
  return door::check_kept("codes", codes.extent, shape, options, door::longest_keys(shape, options),
                          code_bytes(q.extent[3]));
}

}   // namespace adamas_codes

// Codes of rows, x [batch, head, pos, dim] -> [batch, head, pos, dim / 4]: keys as they are cached (rotated), once per
// token. CodeCache does it as tokens are appended.
inline Status adamas_encode(const Operand& x_any, const View<std::uint8_t, 4>& codes_any, float threshold = 10.f) {
  const Operand x = door::tidy_operand(x_any);
  const View<std::uint8_t, 4> codes = tidy(codes_any);
  door::Bytes x_bytes, code_range;
  if (Status s = door::check_plain("x", x.format); !s.ok()) return s;
  if (Status s = door::check_data("x", x, x_bytes); !s.ok()) return s;
  if (Status s = door::check_data("codes", codes, code_range); !s.ok()) return s;
  if (!is_code_dim(x.extent[3]))
    return door::unsupported("fovea: adamas: rows have dim %td, must be a power of two from 4 to %td", x.extent[3],
                             kMaxCodeDim);
  if (!(threshold > 0.f))
    return door::invalid("fovea: adamas: the threshold is %g, must be positive", static_cast<double>(threshold));
  const std::array<index_t, 4> want{x.extent[0], x.extent[1], x.extent[2], code_bytes(x.extent[3])};
  if (Status s = door::check_extents("codes", codes, want, "x"); !s.ok()) return s;
  if (codes.stride[3] != 1 && codes.extent[3] > 1)
    return door::unsupported("fovea: codes have innermost stride %td, must be 1", codes.stride[3]);
  if (!door::writes_apart(codes)) return door::invalid("fovea: codes overlap themselves");
  if (Status s = door::check_apart({"codes", code_range}, "x", x_bytes); !s.ok()) return s;
  alignas(64) float row[kMaxCodeDim];
  for (index_t b = 0; b < x.extent[0]; ++b) {
    for (index_t h = 0; h < x.extent[1]; ++h) {
      for (index_t i = 0; i < x.extent[2]; ++i) {
        std::uint8_t* const to = codes.data + b * codes.stride[0] + h * codes.stride[1] + i * codes.stride[2];
        adamas_codes::encode(x, b * x.stride[0] + h * x.stride[1] + i * x.stride[2], threshold, row,
                             reinterpret_cast<std::byte*>(to));
      }
    }
  }
  return {};
}

// The keys of every query: lists [sequence, q_head, query, adamas.budget], ascending, -1 behind the last one; a KeyLists of
// k_block 1. codes [sequence, kv_head, key, dim / 4]. options: causality, window, len_k and q_offset say what a query sees,
// without len_k every key with codes is in use; the executor's lanes share the queries.
inline Status adamas_select(const Operand& q_any, const View<const std::uint8_t, 4>& codes_any,
                            const View<std::int32_t, 4>& lists_any, const AttentionOptions& options = {},
                            const AdamasOptions& adamas = {}) {
  const Operand q = door::tidy_operand(q_any);
  const View<const std::uint8_t, 4> codes = tidy(codes_any);
  const View<std::int32_t, 4> lists = tidy(lists_any);
  door::Bytes ignored;
  if (Status s = door::check_plain("q", q.format); !s.ok()) return s;
  if (Status s = door::check_data("q", q, ignored); !s.ok()) return s;
  const AttentionShape shape{q.extent[0],     q.extent[1], codes.extent[1], q.extent[2],
                             codes.extent[2], q.extent[3], q.extent[3]};
  if (Status s = door::check_problem(shape, options); !s.ok()) return s;
  if (Status s = adamas_codes::check(q, codes, shape, options, adamas); !s.ok()) return s;
  if (Status s = door::check_list_view(lists, shape, options, adamas.budget); !s.ok()) return s;
  adamas_codes::Selector select = adamas_codes::selector(q, codes, shape, options, adamas);
  select.capacity = adamas.budget;
  return door::select_into(shape, options, lists, select.lane_bytes(), select);
}

// Attention over the selected keys; the rest is fovea::attention's, the LSE counts the selected keys alone. kv in any home;
// keys are counted 0 .. len_k - 1. Of a given options.workspace the selection takes the first adamas_workspace_bytes, the
// attention the rest.
template <class Compiled = AllFormats>
Status adamas_attention(const Operand& q_any, const Kv& kv, const View<const std::uint8_t, 4>& codes_any, const Result& out,
                        const AttentionOptions& options = {}, const AdamasOptions& adamas = {}) {
  const Operand q = door::tidy_operand(q_any);
  const View<const std::uint8_t, 4> codes = tidy(codes_any);
  if (Status s = door::check_selecting_call(q, kv, out, options); !s.ok()) return s;
  const AttentionShape shape = door::shape_of(q, kv, options);
  if (Status s = adamas_codes::check(q, codes, shape, options, adamas); !s.ok()) return s;
  door::Bytes bytes;
  if (Status s = door::check_data("codes", codes, bytes); !s.ok()) return s;
  if (Status s = door::check_learned("codes", bytes, out, options); !s.ok()) return s;
  const adamas_codes::Selector select = adamas_codes::selector(q, codes, shape, options, adamas);
  return door::attend_query_lists<Compiled>(q, kv, out, shape, options, 1, select);
}
template <class TK, class TV>
Status adamas_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v,
                        const View<const std::uint8_t, 4>& codes, const Result& out, const AttentionOptions& options = {},
                        const AdamasOptions& adamas = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return adamas_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), codes, out, options, adamas);
}

// What the selection takes of a workspace, for a call of these shapes.
inline std::size_t adamas_workspace_bytes(const AttentionShape& shape, const AttentionOptions& options,
                                          const AdamasOptions& adamas = {}) {
  Operand q;
  q.extent[3] = shape.dim_qk;
  return door::query_lists_bytes(shape, options, adamas_codes::selector(q, {}, shape, options, adamas));
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
