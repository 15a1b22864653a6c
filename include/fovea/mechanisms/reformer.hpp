// SPDX-License-Identifier: Apache-2.0
// Reformer's LSH attention (Kitaev, Kaiser, Levskaya 2020, arXiv 2001.04451), as in the widely used PyTorch port
// (lucidrains/reformer-pytorch): queries are keys, keys of unit length, and a token attends to what falls into its bucket.
//   bucket of round h:  argmax [x R_h, -x R_h],  R_h [dim, buckets / 2] random; ties to the lower bucket
//   per round           tokens sorted by bucket (stable), cut into pieces of `bucket` tokens; a piece attends to itself and
//                       to the piece before it, whatever buckets these are; the first piece of a round looks at the last one
//                       of the round before, that of the first round at the last piece of all
//   masks               causal by original position; a token with itself gets the logit -5e4: only if nothing else is left
//   rounds              added up by their LSE
// A piece and its look-back are neighbours in sorted memory, so a round is one dense call over overlapping strided views.
#pragma once
#include <optional>

#include "../call/in_memory.hpp"
#include "../call/recurrent_call.hpp"
#include "../call/variant.hpp"
#include "../engine/deal.hpp"
#include "../engine/parts/token_order.hpp"
#include "../simd/project.hpp"

namespace fovea {
inline namespace v0 {

struct ReformerOptions {
  std::optional<float> scale = {};   // 1/sqrt(dim) if absent
  index_t bucket = 64;               // tokens of a piece; 2 * bucket divides the length
  bool causal = true;
  bool count_duplicates = true;   // false: a key that a query meets n times, in whatever rounds, loses log(n)
  float self_score = -5e4f;
  Executor executor = {};
  std::span<std::byte> workspace = {};   // reformer_bytes(...); the dense calls inside use the library's own
};

inline namespace FOVEA_ARCH {

namespace reformer {

inline constexpr index_t kTokens = 256;   // of a task that moves rows
inline constexpr index_t kMaxRounds = 256;

// The scores of one round: the self rule, and what a pair that meets n times loses.
struct RoundScore {
  SelfScore self;
  const std::int32_t* piece;       // [round, token]  counted through all rounds; null: duplicates count
  std::span<const float> log_of;   // [2 * rounds + 1]  log(n)
  index_t rounds, len, pieces;     // pieces of one round

  struct Lane {
    SelfScore::Lane self;
    const RoundScore& round;
    std::int32_t token;
    FOVEA_INLINE f32 operator()(f32 s, i32 pos) const {
      s = self(s, pos);
      if (round.piece == nullptr) return s;
      const i32 key = i32::load_unaligned(self.keys + first_lane(pos));
      const f32 one(1.f), none(0.f);
      const auto total = static_cast<std::int32_t>(round.rounds * round.pieces);
      f32 times = none;
      for (index_t h = 0; h < round.rounds; ++h) {
        const std::int32_t own = round.piece[h * round.len + token], before = own == 0 ? total - 1 : own - 1;
        const i32 here = gather(round.piece + h * round.len, key);
        const i32 there = gather(round.piece + before / static_cast<std::int32_t>(round.pieces) * round.len, key);
        times = times + select(here == i32(own), one, none) + select(there == i32(before), one, none);
      }
      return s - lookup(round.log_of, xsimd::to_int(times));
    }
  };
  FOVEA_INLINE Lane at(const Row& row) const { return {self.at(row), *this, self.order.row(row)}; }
};

struct Shape {
  index_t batch, heads, len, dim, dim_v, rounds, bucket;
  index_t pieces() const { return len / bucket; }
  index_t slots() const { return len + bucket; }   // of a round, with the piece it looks back at
};

// One head at a time.
struct Memory {
  std::int32_t*
      order;   // [bucket + rounds * pos + a vector]  tokens as sorted; the last piece of all stands before the first
  std::int32_t* piece;   // [round, pos]
  std::int32_t* count;   // [pieces + 1]
  index_t* begin;        // [piece]
  float* log_of;         // [2 * rounds + 1]
  float* q;              // [pos, dim]
  float* k;              // [slots, dim]
  float* v;              // [slots, dim_v]
  float* round_out;      // [pos, dim_v]
  float* round_lse;      // [pos]
  float* out;            // [pos, dim_v]  in the order of the text
  float* lse;            // [pos]
};
inline Memory carve(Bump& bump, const Shape& s) {
  Memory m{};
  m.order = bump.take<std::int32_t>(s.bucket + s.rounds * s.len + kLanes);
  m.piece = bump.take<std::int32_t>(s.rounds * s.len);
  m.count = bump.take<std::int32_t>(s.pieces() + 1);
  m.begin = bump.take<index_t>(s.pieces());
  m.log_of = bump.take<float>(2 * s.rounds + 1);
  m.q = bump.take<float>(s.len * s.dim);
  m.k = bump.take<float>(s.slots() * s.dim);
  m.v = bump.take<float>(s.slots() * s.dim_v);
  m.round_out = bump.take<float>(s.len * s.dim_v);
  m.round_lse = bump.take<float>(s.len);
  m.out = bump.take<float>(s.len * s.dim_v);
  m.lse = bump.take<float>(s.len);
  return m;
}

// Sorts the tokens of every round by bucket, in the order of the text within one.
inline void sort(const Shape& s, const View<const std::int32_t, 4>& buckets, index_t b, index_t head, const Memory& m) {
  const index_t pieces = s.pieces();
  for (index_t h = 0; h < s.rounds; ++h) {
    const std::int32_t* const bucket =
        buckets.data + b * buckets.stride[0] + head * buckets.stride[1] + h * buckets.stride[2];
    std::int32_t* const order = m.order + s.bucket + h * s.len;
    std::fill_n(m.count, pieces + 1, 0);
    for (index_t t = 0; t < s.len; ++t) ++m.count[bucket[t * buckets.stride[3]] + 1];
    for (index_t n = 0; n < pieces; ++n) m.count[n + 1] += m.count[n];
    for (index_t t = 0; t < s.len; ++t) {
      const std::int32_t slot = m.count[bucket[t * buckets.stride[3]]]++;
      order[slot] = static_cast<std::int32_t>(t);
      m.piece[h * s.len + t] = static_cast<std::int32_t>(h * pieces + slot / s.bucket);
    }
  }
  std::copy_n(m.order + s.rounds * s.len, s.bucket, m.order);
  std::fill_n(m.order + s.bucket + s.rounds * s.len, kLanes, 0);   // lanes behind the last key
}

// f(first, count) over runs of tokens.
template <class F>
void deal_tokens(const Executor& executor, index_t tokens, const F& f) {
  deal(executor, executor.lanes(), (tokens + kTokens - 1) / kTokens,
       [&](int, index_t task) { f(task * kTokens, std::min(kTokens, tokens - task * kTokens)); });
}

// Adds a round's row to the sum of those before it.
inline void add_round(const Shape& s, const Memory& m, index_t slot, index_t token) {
  const double old_lse = static_cast<double>(m.lse[token]), new_lse = static_cast<double>(m.round_lse[slot]);
  const double top = std::max(old_lse, new_lse);
  const double old_weight = std::exp(old_lse - top), new_weight = std::exp(new_lse - top), sum = old_weight + new_weight;
  const float old_share = static_cast<float>(old_weight / sum), new_share = static_cast<float>(new_weight / sum);
  const float* const from = m.round_out + slot * s.dim_v;
  float* const to = m.out + token * s.dim_v;
  for (index_t d = 0; d < s.dim_v; ++d) to[d] = std::fma(to[d], old_share, from[d] * new_share);
  m.lse[token] = static_cast<float>(top + std::log(sum));
}

inline Status round(const Shape& s, const Operand& qk, const Operand& v, index_t b, index_t head, index_t h,
                    const ReformerOptions& options, const Memory& m) {
  const std::int32_t* const tokens = m.order + h * s.len;   // of the slots: the piece before the round, then the round
  deal_tokens(options.executor, s.slots(), [&](index_t first, index_t count) {
    for (index_t slot = first; slot < first + count; ++slot) {
      float* const key = m.k + slot * s.dim;
      read_token(qk, b, head, tokens[slot], key);
      if (slot >= s.bucket) std::copy_n(key, s.dim, m.q + (slot - s.bucket) * s.dim);
      make_unit(key, s.dim);
      read_token(v, b, head, tokens[slot], m.v + slot * s.dim_v);
    }
  });
  const index_t pieces = s.pieces();
  AttentionOptions dense;
  dense.scale = options.scale;
  dense.executor = options.executor;
  dense.lse = {m.round_lse, {pieces, 1, s.bucket}, {s.bucket, 0, 1}};
  const Tensor<float> q{m.q, {pieces, 1, s.bucket, s.dim}, {s.bucket * s.dim, 0, s.dim, 1}};
  const Tensor<float> k{m.k, {pieces, 1, 2 * s.bucket, s.dim}, {s.bucket * s.dim, 0, s.dim, 1}};
  const Tensor<float> values{m.v, {pieces, 1, 2 * s.bucket, s.dim_v}, {s.bucket * s.dim_v, 0, s.dim_v, 1}};
  const Tensor<float> out{m.round_out, {pieces, 1, s.bucket, s.dim_v}, {s.bucket * s.dim_v, 0, s.dim_v, 1}};
  const TokenOrder order{tokens + s.bucket, tokens, m.begin, m.begin};
  const RoundScore score{{order, true, options.self_score},
                         options.count_duplicates ? nullptr : m.piece,
                         {m.log_of, static_cast<std::size_t>(2 * s.rounds + 1)},
                         s.rounds,
                         s.len,
                         pieces};
  const auto policies = variant().with_score(score).with_mask(CausalTokens{order, options.causal});
  const Operand keys = k, stored_values = values;
  if (Status status =
          door::run(door::call_of_variant<Formats<Format::f32>>(q, door::kv_of(keys, stored_values), out, dense, policies));
      !status.ok())
    return status;
  deal_tokens(options.executor, s.len, [&](index_t first, index_t count) {
    for (index_t slot = first; slot < first + count; ++slot) {
      const index_t token = tokens[s.bucket + slot];
      if (h > 0) {
        add_round(s, m, slot, token);
      } else {
        std::copy_n(m.round_out + slot * s.dim_v, s.dim_v, m.out + token * s.dim_v);
        m.lse[token] = m.round_lse[slot];
      }
    }
  });
  return {};
}

struct Local : door::LocalBytes {};
struct BucketLocal : door::LocalBytes {};

inline Status check_length(index_t len, const ReformerOptions& options) {
  if (options.bucket < 1 || len % (2 * options.bucket) != 0)
    return door::invalid("fovea: %td tokens are no multiple of twice the bucket of %td", len, options.bucket);
  return check_lanes(options.executor);
}

inline Status check_rotations(const View<const float, 3>& rotations, index_t len, index_t dim,
                              const ReformerOptions& options) {
  const std::array<index_t, 3> want{dim, rotations.extent[1], len / options.bucket / 2};
  if (rotations.extent != want || want[1] < 1 || want[1] > kMaxRounds)
    return door::invalid("fovea: rotations are [%td, %td, %td], must be [%td, 1 to %td rounds, %td]", rotations.extent[0],
                         rotations.extent[1], rotations.extent[2], want[0], kMaxRounds, want[2]);
  return {};
}

inline Status check_call(const Operand& qk, const Operand& v, const Result& out, index_t rounds,
                         const ReformerOptions& options, door::Memory& memory) {
  const index_t batch = qk.extent[0], heads = qk.extent[1], len = qk.extent[2], dim = qk.extent[3], dim_v = v.extent[3];
  if (Status s = door::check_plain("qk", qk.format); !s.ok()) return s;
  if (Status s = door::check_plain("v", v.format); !s.ok()) return s;
  if (Status s = door::check_plain("out", out.format); !s.ok()) return s;
  if (Status s = check_length(len, options); !s.ok()) return s;
  if (dim < 1 || dim > door::kMaxDim || dim_v < 1 || dim_v > door::kMaxDim || rounds < 1 || rounds > kMaxRounds ||
      len > door::kMaxLength / (2 * rounds))
    return door::unsupported("fovea: dims %td and %td, %td rounds over %td tokens; dims are 1 to %td, rounds 1 to %td", dim,
                             dim_v, rounds, len, door::kMaxDim, kMaxRounds);
  if (options.scale && !std::isfinite(*options.scale))
    return door::invalid("fovea: scale %g is not finite", static_cast<double>(*options.scale));
  if (Status s = door::check_extents("v", v, {batch, heads, len, dim_v}, "qk"); !s.ok()) return s;
  if (Status s = door::check_extents("out", out, {batch, heads, len, dim_v}, "qk and v"); !s.ok()) return s;
  if (Status s = memory.reads("qk", qk); !s.ok()) return s;
  if (Status s = memory.reads("v", v); !s.ok()) return s;
  return memory.writes("out", out);
}

inline Status check_buckets(const View<const std::int32_t, 4>& buckets, index_t pieces) {
  for (index_t b = 0; b < buckets.extent[0]; ++b) {
    for (index_t head = 0; head < buckets.extent[1]; ++head) {
      for (index_t h = 0; h < buckets.extent[2]; ++h) {
        for (index_t t = 0; t < buckets.extent[3]; ++t) {
          if (buckets(b, head, h, t) < 0 || buckets(b, head, h, t) >= pieces)
            return door::invalid("fovea: buckets[%td, %td, %td, %td] is %d, there are %td", b, head, h, t,
                                 static_cast<int>(buckets(b, head, h, t)), pieces);
        }
      }
    }
  }
  return {};
}

// The best column of a row of x R and -(x R) so far.
struct Best {
  float value;
  std::int32_t bucket;
};
// `count` neighbouring columns of one round, from column `first` of `half` on.
inline void take_best(const float* from, index_t count, index_t first, index_t half, Best& best) {
  f32 top(0.f);
  for (index_t d = 0; d < count; d += kLanes)
    top = max(top, abs(count - d >= kLanes ? load(from + d) : load_some(from + d, count - d)));
  const float value = reduce_max(top);
  if (!(value >= best.value)) return;
  std::int32_t bucket = INT32_MAX;
  for (index_t d = 0; d < count && bucket == INT32_MAX; ++d) {
    if (from[d] == value) bucket = static_cast<std::int32_t>(first + d);
  }
  for (index_t d = 0; d < count && bucket == INT32_MAX; ++d) {
    if (from[d] == -value) bucket = static_cast<std::int32_t>(half + first + d);
  }
  if (bucket == INT32_MAX) return;   // not a number
  best = {value, value == best.value ? std::min(best.bucket, bucket) : bucket};
}

struct HashMemory {
  ProjectMemory project;
  Best* best;   // [row, round]
};
inline HashMemory carve_hash(Bump& bump, index_t len, index_t rounds) {
  const ProjectMemory project = carve_project(bump, len);
  return {project, bump.take<Best>(std::min(len, kProjectRows) * rounds)};
}

}   // namespace reformer

// Bytes of workspace of reformer_buckets, reformer_attend and reformer_attention.
inline std::size_t reformer_buckets_bytes(index_t len, index_t rounds, int lanes = 1) {
  Bump lane;
  reformer::carve_hash(lane, len, rounds);
  return lane.used() * static_cast<std::size_t>(lanes) + kAlignment;
}
inline std::size_t reformer_attend_bytes(index_t len, index_t dim, index_t dim_v, index_t rounds, index_t bucket) {
  Bump bump;
  reformer::carve(bump, {1, 1, len, dim, dim_v, rounds, bucket});
  return bump.used() + kAlignment;
}
inline std::size_t reformer_bytes(index_t batch, index_t heads, index_t len, index_t dim, index_t dim_v, index_t rounds,
                                  index_t bucket, int lanes = 1) {
  Bump bump;
  bump.take<std::int32_t>(batch * heads * rounds * len);
  return bump.used() + kAlignment +
         std::max(reformer_buckets_bytes(len, rounds, lanes), reformer_attend_bytes(len, dim, dim_v, rounds, bucket));
}

// The bucket of every token in every round. NaN vectors fall into bucket 0.
inline Status reformer_buckets(const Operand& qk_any,            // [batch, head, pos, dim]
                               View<const float, 3> rotations,   // [dim, round, buckets / 2]  buckets = pos / options.bucket
                               View<std::int32_t, 4> buckets,    // [batch, head, round, pos]
                               const ReformerOptions& options = {}) {
  const Operand qk = door::tidy_operand(qk_any);
  rotations = tidy(rotations);
  buckets = tidy(buckets);
  const index_t batch = qk.extent[0], heads = qk.extent[1], len = qk.extent[2], dim = qk.extent[3];
  const index_t rounds = rotations.extent[1], half = rotations.extent[2];
  if (Status s = door::check_plain("qk", qk.format); !s.ok()) return s;
  if (Status s = reformer::check_length(len, options); !s.ok()) return s;
  if (Status s = reformer::check_rotations(rotations, len, dim, options); !s.ok()) return s;
  if ((half > 1 && rotations.stride[2] != 1) || (rounds > 1 && rotations.stride[1] != half))
    return door::unsupported("fovea: rotations have strides [%td, %td, %td]; rounds and columns of a row must be neighbours",
                             rotations.stride[0], rotations.stride[1], rotations.stride[2]);
  if (buckets.extent != std::array<index_t, 4>{batch, heads, rounds, len})
    return door::check_extents("buckets", buckets, {batch, heads, rounds, len}, "qk and rotations");
  door::Memory memory;
  if (Status s = memory.reads("qk", qk); !s.ok()) return s;
  if (Status s = memory.reads("rotations", rotations); !s.ok()) return s;
  if (Status s = memory.writes("buckets", buckets); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  if (len == 0) return {};

  const StoredMatrix matrix{reinterpret_cast<const std::byte*>(rotations.data), Format::f32, dim, rounds * half,
                            rotations.stride[0]};
  Bump lane_size;
  reformer::carve_hash(lane_size, len, rounds);
  const int lanes = options.executor.lanes();
  const std::size_t wanted = reformer_buckets_bytes(len, rounds, lanes);
  return door::in_memory<reformer::BucketLocal>(options.workspace, wanted, [&](std::span<std::byte> bytes) -> Status {
    std::byte* const begin = bytes.data();
    const index_t across = (rounds * half + kProjectColumns - 1) / kProjectColumns;
    const index_t down = (len + kProjectRows - 1) / kProjectRows, number = row_bytes(qk.format, 1);
    deal(options.executor, lanes, batch * heads * down, [&](int lane, index_t task) {
      Bump bump(begin + lane_size.used() * static_cast<std::size_t>(lane));
      const reformer::HashMemory m = reformer::carve_hash(bump, len, rounds);
      const index_t list = task / down, first = task % down * kProjectRows, count = std::min(kProjectRows, len - first);
      const index_t b = list / heads, head = list % heads;
      std::fill_n(m.best, count * rounds, reformer::Best{-1.f, 0});
      for (index_t column = 0; column < across; ++column) {
        project_task(
            task % down * across + column, len, matrix, Weights::by_input, m.project,
            [&](index_t row, index_t k, index_t numbers, float* to) {
              const index_t at = b * qk.stride[0] + head * qk.stride[1] + row * qk.stride[2] + k * qk.stride[3];
              read_strided(qk.format, qk.data + at * number, qk.stride[3], numbers, to);
            },
            [&](index_t row, index_t n, index_t numbers, const float* from) {
              reformer::Best* const best = m.best + (row - first) * rounds;
              for (index_t d = 0; d < numbers;) {   // a task may begin and end within a round
                const index_t round = (n + d) / half, at = (n + d) % half, run = std::min(half - at, numbers - d);
                reformer::take_best(from + d, run, at, half, best[round]);
                d += run;
              }
            });
      }
      for (index_t row = 0; row < count; ++row) {
        for (index_t h = 0; h < rounds; ++h) buckets(b, head, h, first + row) = m.best[row * rounds + h].bucket;
      }
    });
    return {};
  });
}

// The attention for given buckets.
inline Status reformer_attend(const Operand& qk_any,                 // [batch, head, pos, dim]
                              const Operand& v_any,                  // [batch, head, pos, dim_v]
                              View<const std::int32_t, 4> buckets,   // [batch, head, round, pos]
                              const Result& out_any,                 // [batch, head, pos, dim_v]
                              const ReformerOptions& options = {}) {
  const Operand qk = door::tidy_operand(qk_any), v = door::tidy_operand(v_any);
  const Result out = door::tidy_operand(out_any);
  buckets = tidy(buckets);
  const reformer::Shape s{qk.extent[0], qk.extent[1],      qk.extent[2],  qk.extent[3],
                          v.extent[3],  buckets.extent[2], options.bucket};
  door::Memory memory;
  if (Status status = reformer::check_call(qk, v, out, s.rounds, options, memory); !status.ok()) return status;
  if (Status status = door::check_extents("buckets", buckets, {s.batch, s.heads, s.rounds, s.len}, "qk"); !status.ok())
    return status;
  if (Status status = memory.reads("buckets", buckets); !status.ok()) return status;
  if (Status status = memory.check_apart(); !status.ok()) return status;
  if (s.len == 0) return {};
  if (Status status = reformer::check_buckets(buckets, s.pieces()); !status.ok()) return status;

  const std::size_t wanted = reformer_attend_bytes(s.len, s.dim, s.dim_v, s.rounds, s.bucket);
  return door::in_memory<reformer::Local>(options.workspace, wanted, [&](std::span<std::byte> bytes) -> Status {
    Bump bump(bytes.data());
    const reformer::Memory m = reformer::carve(bump, s);
    for (index_t n = 0; n < s.pieces(); ++n) m.begin[n] = n * s.bucket;
    for (index_t n = 0; n <= 2 * s.rounds; ++n) m.log_of[n] = n == 0 ? 0.f : std::log(static_cast<float>(n));
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t head = 0; head < s.heads; ++head) {
        reformer::sort(s, buckets, b, head, m);
        for (index_t h = 0; h < s.rounds; ++h) {
          if (Status status = reformer::round(s, qk, v, b, head, h, options, m); !status.ok()) return status;
        }
        reformer::deal_tokens(options.executor, s.len, [&](index_t first, index_t count) {
          for (index_t t = first; t < first + count; ++t) write_token(m.out + t * s.dim_v, out, b, head, t);
        });
      }
    }
    return {};
  });
}

// Hashing and attention. The same rotations give the same bits.
inline Status reformer_attention(const Operand& qk,                // [batch, head, pos, dim]
                                 const Operand& v,                 // [batch, head, pos, dim_v]
                                 View<const float, 3> rotations,   // [dim, round, pos / options.bucket / 2]
                                 const Result& out,                // [batch, head, pos, dim_v]
                                 const ReformerOptions& options = {}) {
  const index_t batch = qk.extent[0], heads = qk.extent[1], len = qk.extent[2], rounds = rotations.extent[1];
  door::Memory memory;
  const Operand qk_tidy = door::tidy_operand(qk), v_tidy = door::tidy_operand(v);
  if (Status s = reformer::check_call(qk_tidy, v_tidy, door::tidy_operand(out), rounds, options, memory); !s.ok()) return s;
  if (Status s = reformer::check_rotations(rotations, len, qk.extent[3], options); !s.ok()) return s;
  if (Status s = memory.reads("rotations", tidy(rotations)); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  struct Buckets : door::LocalBytes {};
  const std::size_t wanted =
      reformer_bytes(batch, heads, len, qk.extent[3], v.extent[3], rounds, options.bucket, options.executor.lanes());
  return door::in_memory<Buckets>(options.workspace, wanted, [&](std::span<std::byte> bytes) -> Status {
    Bump bump(bytes.data());
    const View<std::int32_t, 4> buckets{bump.take<std::int32_t>(batch * heads * rounds * len),
                                        {batch, heads, rounds, len},
                                        {heads * rounds * len, rounds * len, len, 1}};
    ReformerOptions inner = options;
    inner.workspace = bytes.subspan(bump.used());
    if (Status s = reformer_buckets(qk, rotations, buckets, inner); !s.ok()) return s;
    return reformer_attend(qk, v, buckets, out, inner);
  });
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
