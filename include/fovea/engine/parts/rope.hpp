// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding in three steps: frequencies from options, a table of cosines and sines from frequencies, rows
// turned with a row of the table. The first two work in double, once per model or step; the third is the kernel.
//
//   (first, second) -> (first cos - second sin, second cos + first sin),  angle = position * inv_freq[pair]
#pragma once
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <utility>

#include "../../core/rope.hpp"
#include "../../core/status.hpp"
#include "../../simd/simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// YaRN's "mscale", 0.1 mscale ln(factor) + 1. DeepSeek-V3: softmax scale = yarn_mscale(40)^2 / sqrt(192).
inline double yarn_mscale(double factor, double mscale = 1) { return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1; }

namespace rope {

inline constexpr double kTwoPi = 6.283185307179586476925286766559;

inline bool positive(double x) { return std::isfinite(x) && x > 0; }

inline Status invalid_value(const char* name, double value, const char* want) {
  return Status::error(Code::invalid_argument, "fovea: rope: %s = %g, must be %s", name, value, want);
}

inline Status check_sections(const RopeSections& sections, index_t pairs) {
  const auto [time, height, width] = sections.pairs;
  if (time == 0 && height == 0 && width == 0) return {};
  const bool fit = time >= 0 && height >= 0 && width >= 0 && time <= pairs && height <= pairs && width <= pairs;
  if (!fit || time + height + width != pairs)
    return Status::error(Code::invalid_argument, "fovea: rope: sections %td, %td, %td must add up to rotary_dim / 2 = %td",
                         time, height, width, pairs);
  if (sections.interleaved && ((height > 0 && 3 * height - 2 >= pairs) || (width > 0 && 3 * width - 1 >= pairs)))
    return Status::error(Code::invalid_argument,
                         "fovea: rope: %td height and %td width pairs, every third of them, do not fit into %td pairs",
                         height, width, pairs);
  return {};
}

inline Status check_options(const RopeOptions& o) {
  if (o.rotary_dim <= 0 || o.rotary_dim % 2 != 0)
    return Status::error(Code::invalid_argument, "fovea: rope: rotary_dim = %td, must be positive and even", o.rotary_dim);
  if (o.scaling > RopeScaling::longrope)
    return Status::error(Code::invalid_argument, "fovea: rope: scaling = %d, no value of the enum",
                         static_cast<int>(o.scaling));
  if (!positive(o.base)) return invalid_value("base", o.base, "positive and finite");
  if (o.scaling != RopeScaling::none && !positive(o.factor)) return invalid_value("factor", o.factor, "positive and finite");
  if (o.attention_factor && !positive(*o.attention_factor))
    return invalid_value("attention_factor", *o.attention_factor, "positive and finite");
  if (Status s = check_sections(o.sections, o.rotary_dim / 2); !s.ok()) return s;

  const bool from_length =
      o.scaling == RopeScaling::dynamic_ntk || o.scaling == RopeScaling::yarn || o.scaling == RopeScaling::llama3;
  if (from_length && o.original_len <= 0)
    return Status::error(Code::invalid_argument,
                         "fovea: rope: original_len = %td, this scaling needs the length of training", o.original_len);
  switch (o.scaling) {
    case RopeScaling::dynamic_ntk:
      if (o.current_len < 0)
        return Status::error(Code::invalid_argument, "fovea: rope: current_len = %td is negative", o.current_len);
      [[fallthrough]];
    case RopeScaling::ntk:
      if (o.rotary_dim == 2)
        return Status::error(Code::invalid_argument,
                             "fovea: rope: NTK raises to R / (R - 2), so rotary_dim = 2 has no base");
      break;
    case RopeScaling::yarn:
      if (o.base <= 1) return invalid_value("base", o.base, "above 1: YaRN divides by its logarithm");
      if (!positive(o.beta_slow)) return invalid_value("beta_slow", o.beta_slow, "positive and finite");
      if (!std::isfinite(o.beta_fast) || o.beta_fast < o.beta_slow)
        return invalid_value("beta_fast", o.beta_fast, "finite and at least beta_slow");
      break;
    case RopeScaling::llama3:
      if (!positive(o.low_freq_factor)) return invalid_value("low_freq_factor", o.low_freq_factor, "positive and finite");
      if (!std::isfinite(o.high_freq_factor) || o.high_freq_factor <= o.low_freq_factor)
        return invalid_value("high_freq_factor", o.high_freq_factor, "finite and above low_freq_factor");
      break;
    case RopeScaling::longrope:
      if (static_cast<index_t>(o.pair_factors.size()) != o.rotary_dim / 2)
        return Status::error(Code::invalid_argument,
                             "fovea: rope: longrope has %zu pair_factors, needs rotary_dim / 2 = %td", o.pair_factors.size(),
                             o.rotary_dim / 2);
      for (std::size_t m = 0; m < o.pair_factors.size(); ++m) {
        if (!positive(o.pair_factors[m]))
          return Status::error(Code::invalid_argument, "fovea: rope: pair_factors[%zu] = %g, must be positive and finite", m,
                               o.pair_factors[m]);
      }
      if (!o.attention_factor && o.factor > 1 && o.original_len <= 1)
        return Status::error(Code::invalid_argument,
                             "fovea: rope: original_len = %td, longrope needs more than 1 for its attention factor",
                             o.original_len);
      break;
    default:
      break;
  }
  return {};
}

// Where YaRN's ramp begins and ends, in pairs.
struct YarnRange {
  double low, high;
};
inline YarnRange yarn_range(const RopeOptions& o) {
  const auto dim = static_cast<double>(o.rotary_dim), len = static_cast<double>(o.original_len);
  const auto pair_of = [&](double turns) { return dim * std::log(len / (kTwoPi * turns)) / (2 * std::log(o.base)); };
  double low = pair_of(o.beta_fast), high = pair_of(o.beta_slow);
  if (o.round_range) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = low < 0 ? 0 : low;
  high = high > dim - 1 ? dim - 1 : high;
  return {low, high == low ? high + 0.001 : high};
}

inline double attention_factor(const RopeOptions& o) {
  if (o.attention_factor) return *o.attention_factor;
  if (o.scaling == RopeScaling::yarn) return yarn_mscale(o.factor);
  if (o.scaling == RopeScaling::longrope && o.factor > 1)
    return std::sqrt(1 + std::log(o.factor) / std::log(static_cast<double>(o.original_len)));
  return 1;
}

inline double base(const RopeOptions& o) {
  if (o.scaling != RopeScaling::ntk && o.scaling != RopeScaling::dynamic_ntk) return o.base;
  const auto dim = static_cast<double>(o.rotary_dim);
  double grown = o.factor;
  if (o.scaling == RopeScaling::dynamic_ntk) {
    const index_t len = o.current_len > o.original_len ? o.current_len : o.original_len;
    grown = o.factor * static_cast<double>(len) / static_cast<double>(o.original_len) - (o.factor - 1);
  }
  return o.base * std::pow(grown, dim / (dim - 2));
}

// `plain` is base^(-2m / R).
inline double stretched(const RopeOptions& o, index_t pair, double plain, YarnRange range) {
  switch (o.scaling) {
    case RopeScaling::linear:
      return plain / o.factor;
    case RopeScaling::yarn: {
      const double ramp = (static_cast<double>(pair) - range.low) / (range.high - range.low);
      const double share = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
      return plain / o.factor * share + plain * (1 - share);
    }
    case RopeScaling::llama3: {
      const double turns = static_cast<double>(o.original_len) * plain / kTwoPi;   // within the length of training
      if (turns < o.low_freq_factor) return plain / o.factor;
      if (turns > o.high_freq_factor) return plain;
      const double share = (turns - o.low_freq_factor) / (o.high_freq_factor - o.low_freq_factor);
      return plain * ((1 - share) / o.factor + share);
    }
    case RopeScaling::longrope:
      return plain / o.pair_factors[static_cast<std::size_t>(pair)];
    default:
      return plain;
  }
}

template <class Real>
Status frequencies(const RopeOptions& o, std::span<Real> inv_freq, float& attention) {
  if (Status s = check_options(o); !s.ok()) return s;
  const index_t pairs = o.rotary_dim / 2;
  if (static_cast<index_t>(inv_freq.size()) != pairs)
    return Status::error(Code::invalid_argument, "fovea: rope: inv_freq has %zu elements, needs rotary_dim / 2 = %td",
                         inv_freq.size(), pairs);
  const double from = base(o);
  const YarnRange range = o.scaling == RopeScaling::yarn ? yarn_range(o) : YarnRange{0, 1};
  for (index_t m = 0; m < pairs; ++m) {
    const double plain = std::pow(from, -static_cast<double>(2 * m) / static_cast<double>(o.rotary_dim));
    inv_freq[static_cast<std::size_t>(m)] = static_cast<Real>(stretched(o, m, plain, range));
  }
  attention = static_cast<float>(attention_factor(o));
  return {};
}

// Which of a token's three positions a pair follows.
inline index_t axis_of(const RopeSections& sections, index_t pair) {
  const auto [time, height, width] = sections.pairs;
  if (!sections.interleaved) return pair < time ? 0 : pair < time + height ? 1 : 2;
  return pair % 3 == 1 && pair < 3 * height ? 1 : pair % 3 == 2 && pair < 3 * width ? 2 : 0;
}

inline Status check_table(std::span<const double> inv_freq, float attention, index_t len, std::span<float> memory) {
  if (inv_freq.empty()) return Status::error(Code::invalid_argument, "fovea: rope: inv_freq is empty");
  if (len < 0) return Status::error(Code::invalid_argument, "fovea: rope: a table of %td positions", len);
  if (!positive(static_cast<double>(attention)))
    return invalid_value("attention_factor", static_cast<double>(attention), "positive and finite");
  index_t floats = 0;
  if (__builtin_mul_overflow(len, 2 * static_cast<index_t>(inv_freq.size()), &floats) ||
      static_cast<index_t>(memory.size()) < floats)
    return Status::error(Code::workspace_too_small, "fovea: rope: %zu floats for a table of %td positions x 2 x %zu pairs",
                         memory.size(), len, inv_freq.size());
  return {};
}

// A cosine of a position and the sine of the same lie in one row of 2 * pairs floats: a short row is one stream to read.
inline RopeTable lay_out(std::size_t pairs, index_t first_pos, index_t len, const float* memory) {
  const auto count = static_cast<index_t>(pairs);
  return {memory, memory + count, 2 * count, count, first_pos, len};
}

inline void write_pair(double angle, float attention, float* cos, float* sin) {
  *cos = static_cast<float>(static_cast<double>(attention) * std::cos(angle));
  *sin = static_cast<float>(static_cast<double>(attention) * std::sin(angle));
}

}   // namespace rope

// inv_freq[m], radians per position of pair m, and what cos and sin are multiplied by. Pure. Keep the doubles: with fp32
// frequencies pairs turn wrong by up to 0.03 radians at position 1e6, with fp32 angles, as peers have it, by up to 0.06.
inline Status rope_frequencies(const RopeOptions& options, std::span<double> inv_freq, float& attention_factor) {
  return rope::frequencies(options, inv_freq, attention_factor);
}
inline Status rope_frequencies(const RopeOptions& options, std::span<float> inv_freq, float& attention_factor) {
  return rope::frequencies(options, inv_freq, attention_factor);
}

// Floats of memory for a table.
inline index_t rope_table_floats(index_t len, index_t rotary_dim) { return len * rotary_dim; }

// The positions first_pos .. first_pos + len - 1. Angles are products in double, so each cosine is right to one rounding of
// fp32 up to positions of 1e6 and beyond.
inline Status make_rope_table(RopeTable& table, std::span<const double> inv_freq, float attention_factor, index_t first_pos,
                              index_t len, std::span<float> memory) {
  if (Status s = rope::check_table(inv_freq, attention_factor, len, memory); !s.ok()) return s;
  index_t end = 0;
  if (__builtin_add_overflow(first_pos, len, &end))
    return Status::error(Code::invalid_argument, "fovea: rope: %td positions from %td on overflow", len, first_pos);
  const std::size_t pairs = inv_freq.size();
  float* to = memory.data();
  for (index_t p = 0; p < len; ++p, to += 2 * pairs) {
    const auto pos = static_cast<double>(first_pos + p);
    for (std::size_t m = 0; m < pairs; ++m) rope::write_pair(pos * inv_freq[m], attention_factor, to + m, to + pairs + m);
  }
  table = rope::lay_out(pairs, first_pos, len, memory.data());
  return {};
}

// One row per token of a step instead of one per position: row t, to be asked for as position t, holds ids[axis][t]. With
// one axis for scattered positions, with three and sections for M-RoPE.
inline Status make_rope_table(RopeTable& table, std::span<const double> inv_freq, float attention_factor,
                              View<const index_t, 2> ids, const RopeSections& sections,   // [1 | 3, token]
                              std::span<float> memory) {
  const index_t len = ids.extent[1];
  if (Status s = rope::check_table(inv_freq, attention_factor, len, memory); !s.ok()) return s;
  if (ids.extent[0] != 1 && ids.extent[0] != 3)
    return Status::error(Code::invalid_argument, "fovea: rope: a token has 1 or 3 positions, ids is [%td, %td]",
                         ids.extent[0], ids.extent[1]);
  if (len > 0 && ids.data == nullptr) return Status::error(Code::invalid_argument, "fovea: rope: ids has null data");
  const std::size_t pairs = inv_freq.size();
  if (Status s = rope::check_sections(sections, static_cast<index_t>(pairs)); !s.ok()) return s;
  if (ids.extent[0] == 3 && sections.pairs == std::array<index_t, 3>{})
    return Status::error(Code::invalid_argument, "fovea: rope: three positions per token need sections");
  float* to = memory.data();
  for (index_t token = 0; token < len; ++token, to += 2 * pairs) {
    for (std::size_t m = 0; m < pairs; ++m) {
      const index_t axis = ids.extent[0] == 1 ? 0 : rope::axis_of(sections, static_cast<index_t>(m));
      const auto pos = static_cast<double>(ids(axis, token));
      rope::write_pair(pos * inv_freq[m], attention_factor, to + m, to + pairs + m);
    }
  }
  table = rope::lay_out(pairs, 0, len, memory.data());
  return {};
}

namespace rope {

using Lanes = float __attribute__((vector_size(sizeof(f32))));
using LaneNumbers = std::make_index_sequence<f32::size>;

// Lanes of two vectors picked by number: the compilers' own shuffle, one instruction on AVX-512.
template <std::size_t... number>
FOVEA_INLINE f32 pick(f32 a, f32 b, std::index_sequence<number...>) {
  return f32(static_cast<f32::register_type>(__builtin_shufflevector(static_cast<Lanes>(static_cast<f32::register_type>(a)),
                                                                     static_cast<Lanes>(static_cast<f32::register_type>(b)),
                                                                     static_cast<int>(number)...)));
}
template <std::size_t... i>
FOVEA_INLINE f32 even_lanes(f32 a, f32 b, std::index_sequence<i...>) {
  return pick(a, b, std::index_sequence<2 * i...>{});
}
template <std::size_t... i>
FOVEA_INLINE f32 odd_lanes(f32 a, f32 b, std::index_sequence<i...>) {
  return pick(a, b, std::index_sequence<2 * i + 1 ...>{});
}
template <std::size_t from, std::size_t... i>
FOVEA_INLINE f32 zip(f32 a, f32 b, std::index_sequence<i...>) {   // a[from], b[from], a[from + 1], b[from + 1], ...
  return pick(a, b, std::index_sequence<from + i / 2 + i % 2 * sizeof...(i)...>{});
}

// The same two chains in every lane, tail and layout. sin_for_first is -sin (or sin, backward).
FOVEA_INLINE void turn(f32& first, f32& second, f32 cos, f32 sin_for_first, f32 sin_for_second) {
  const f32 x = first, y = second;
  first = fma(x, cos, y * sin_for_first);
  second = fma(y, cos, x * sin_for_second);
}

template <bool whole>
FOVEA_INLINE void half_split(const float* from, float* to, const float* cos, const float* sin, index_t pairs, index_t m,
                             float sign) {
  const index_t count = pairs - m;
  const auto read = [&](const float* at) { return whole ? load(at) : load_some(at, count); };
  f32 first = read(from + m), second = read(from + pairs + m);
  const f32 s = read(sin + m);
  turn(first, second, read(cos + m), s * f32(-sign), s * f32(sign));
  if constexpr (whole) {
    store(to + m, first);
    store(to + pairs + m, second);
  } else {
    store_some(to + m, first, count);
    store_some(to + pairs + m, second, count);
  }
}

template <bool whole>
FOVEA_INLINE void interleaved(const float* from, float* to, const float* cos, const float* sin, index_t pairs, index_t m,
                              float sign) {
  const index_t count = pairs - m, numbers = 2 * count;
  const index_t in_a = whole || numbers > kLanes ? kLanes : numbers, in_b = whole ? kLanes : numbers - in_a;
  const f32 a = whole ? load(from + 2 * m) : load_some(from + 2 * m, in_a);
  const f32 b = whole ? load(from + 2 * m + kLanes) : in_b > 0 ? load_some(from + 2 * m + kLanes, in_b) : f32(0.f);
  const f32 c = whole ? load(cos + m) : load_some(cos + m, count), s = whole ? load(sin + m) : load_some(sin + m, count);
  f32 first = even_lanes(a, b, LaneNumbers{}), second = odd_lanes(a, b, LaneNumbers{});
  turn(first, second, c, s * f32(-sign), s * f32(sign));
  const f32 low = zip<0>(first, second, LaneNumbers{}), high = zip<f32::size / 2>(first, second, LaneNumbers{});
  if constexpr (whole) {
    store(to + 2 * m, low);
    store(to + 2 * m + kLanes, high);
  } else {
    store_some(to + 2 * m, low, in_a);
    if (in_b > 0) store_some(to + 2 * m + kLanes, high, in_b);
  }
}

}   // namespace rope

// One vector: its first 2 * pairs numbers turn, the others up to dim are copied. `to` is `from`, or they do not overlap.
// Trusts its arguments. A row of 128 in L2 takes about as long as copying it: 15 to 20 ns with AVX-512.
template <RopeLayout layout>
FOVEA_INLINE void rotate_row(const float* from, float* to, const float* cos, const float* sin, index_t pairs, index_t dim,
                             RopeDirection direction = RopeDirection::forward) {
  const float sign = direction == RopeDirection::forward ? 1.f : -1.f;
  index_t m = 0;
  if constexpr (layout == RopeLayout::half_split) {
    for (; m + kLanes <= pairs; m += kLanes) rope::half_split<true>(from, to, cos, sin, pairs, m, sign);
    if (m < pairs) rope::half_split<false>(from, to, cos, sin, pairs, m, sign);
  } else {
    for (; m + kLanes <= pairs; m += kLanes) rope::interleaved<true>(from, to, cos, sin, pairs, m, sign);
    if (m < pairs) rope::interleaved<false>(from, to, cos, sin, pairs, m, sign);
  }
  if (to != from && dim > 2 * pairs)
    std::memcpy(to + 2 * pairs, from + 2 * pairs, static_cast<std::size_t>(dim - 2 * pairs) * sizeof(float));
}

// `count` vectors, strides in floats. Vector n turns with row n of cos and sin; table_stride 0 turns all of them alike (the
// heads of one token, the shift of a ring).
template <RopeLayout layout>
void rotate_rows(const float* from, index_t from_stride, float* to, index_t to_stride, index_t count, const float* cos,
                 const float* sin, index_t table_stride, index_t pairs, index_t dim,
                 RopeDirection direction = RopeDirection::forward) {
  for (index_t n = 0; n < count; ++n) {
    rotate_row<layout>(from + n * from_stride, to + n * to_stride, cos + n * table_stride, sin + n * table_stride, pairs,
                       dim, direction);
  }
}

// The layout as a run-time value.
inline void rotate_rows(RopeLayout layout, const float* from, index_t from_stride, float* to, index_t to_stride,
                        index_t count, const float* cos, const float* sin, index_t table_stride, index_t pairs, index_t dim,
                        RopeDirection direction = RopeDirection::forward) {
  const auto rows =
      layout == RopeLayout::half_split ? &rotate_rows<RopeLayout::half_split> : &rotate_rows<RopeLayout::interleaved>;
  rows(from, from_stride, to, to_stride, count, cos, sin, table_stride, pairs, dim, direction);
}

namespace rope {

inline constexpr index_t kTokens = 32;   // whose table rows, 16 KiB at rotary_dim 128, stay in L1 for all heads

// The floats a tensor spans, as addresses; false where an offset overflows.
struct Span {
  std::uintptr_t begin = 0, end = 0;
};
inline bool span_of(Tensor<const float> x, Span& span) {
  index_t low = 0, high = 0;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    index_t reach = 0;
    if (__builtin_mul_overflow(x.extent[axis] - 1, x.stride[axis], &reach)) return false;
    if (__builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high)) return false;
  }
  constexpr index_t kLimit = PTRDIFF_MAX / static_cast<index_t>(sizeof(float)) - 1;
  if (low < -kLimit || high > kLimit) return false;
  const auto data = reinterpret_cast<std::uintptr_t>(x.data);
  span = {data + static_cast<std::uintptr_t>(low) * sizeof(float),
          data + static_cast<std::uintptr_t>(high + 1) * sizeof(float)};
  return true;
}

// No two indices name one float: from the smallest stride up, each axis steps over all before it.
inline bool writes_apart(Tensor<float> x) {
  std::array<bool, 4> done{};
  index_t covered = 0;
  for (int round = 0; round < 4; ++round) {
    std::size_t next = 4;
    for (std::size_t axis = 0; axis < 4; ++axis) {
      if (!done[axis] && (next == 4 || std::abs(x.stride[axis]) < std::abs(x.stride[next]))) next = axis;
    }
    done[next] = true;
    if (x.extent[next] == 1) continue;
    if (std::abs(x.stride[next]) <= covered) return false;
    covered += (x.extent[next] - 1) * std::abs(x.stride[next]);
  }
  return true;
}

inline Status check_position(const RopeTable& table, index_t pos, index_t batch, index_t token) {
  const std::size_t row = static_cast<std::size_t>(pos) - static_cast<std::size_t>(table.first_pos);
  if (pos >= table.first_pos && table.len > 0 && row < static_cast<std::size_t>(table.len)) return {};
  return Status::error(Code::invalid_argument,
                       "fovea: rope: token %td of batch %td has position %td, the table holds %td positions from %td on",
                       token, batch, pos, table.len, table.first_pos);
}

inline Status check_positions(const RopePositions& positions, const RopeTable& table, index_t batch, index_t len) {
  const View<const index_t, 2>& ids = positions.ids;
  if (!ids) {
    index_t way = 0, last = 0;
    if (__builtin_mul_overflow(len - 1, positions.step, &way) || __builtin_add_overflow(positions.start, way, &last))
      return Status::error(Code::invalid_argument, "fovea: rope: start %td and step %td overflow within %td tokens",
                           positions.start, positions.step, len);
    if (Status s = check_position(table, positions.start, 0, 0); !s.ok()) return s;
    return check_position(table, last, 0, len - 1);
  }
  if ((ids.extent[0] != batch && ids.extent[0] != 1) || ids.extent[1] != len)
    return Status::error(Code::invalid_argument, "fovea: rope: ids is [%td, %td], must be [%td or 1, %td]", ids.extent[0],
                         ids.extent[1], batch, len);
  for (index_t b = 0; b < ids.extent[0]; ++b) {
    for (index_t token = 0; token < len; ++token) {
      if (Status s = check_position(table, ids(b, token), b, token); !s.ok()) return s;
    }
  }
  return {};
}

inline Status check_call(Tensor<const float> from, Tensor<float> to, const RopePositions& positions, const RopeTable& table,
                         RopeLayout layout, RopeDirection direction) {
  if (layout > RopeLayout::interleaved || direction > RopeDirection::backward)
    return Status::error(Code::invalid_argument, "fovea: rope: layout %d or direction %d is no value of its enum",
                         static_cast<int>(layout), static_cast<int>(direction));
  if (from.extent != to.extent)
    return Status::error(Code::invalid_argument, "fovea: rope: from is [%td, %td, %td, %td], to [%td, %td, %td, %td]",
                         from.extent[0], from.extent[1], from.extent[2], from.extent[3], to.extent[0], to.extent[1],
                         to.extent[2], to.extent[3]);
  bool empty = false;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    if (from.extent[axis] < 0)
      return Status::error(Code::invalid_argument, "fovea: rope: extent %td on axis %zu", from.extent[axis], axis);
    empty = empty || from.extent[axis] == 0;
  }
  if (table.pairs < 0 || table.pairs > from.extent[3] / 2)
    return Status::error(Code::invalid_argument, "fovea: rope: the table turns 2 x %td numbers of a vector of %td",
                         table.pairs, from.extent[3]);
  if (empty) return {};
  if (from.data == nullptr || to.data == nullptr)
    return Status::error(Code::invalid_argument, "fovea: rope: %s has null data", from.data == nullptr ? "from" : "to");
  if (table.pairs > 0 && (table.cos == nullptr || table.sin == nullptr))
    return Status::error(Code::invalid_argument, "fovea: rope: the table has null data");
  if (from.stride[3] != to.stride[3] || (from.stride[3] != 1 && from.extent[3] > 1))
    return Status::error(Code::unsupported,
                         "fovea: rope: innermost strides %td and %td, must be 1: vectors are turned in place",
                         from.stride[3], to.stride[3]);
  Span read, written;
  if (!span_of(from, read) || !span_of(to, written))
    return Status::error(Code::invalid_argument,
                         "fovea: rope: a tensor reaches beyond the address space, check its strides");
  if (!writes_apart(to))
    return Status::error(
        Code::invalid_argument,
        "fovea: rope: the output overlaps itself: extents [%td, %td, %td, %td], strides [%td, %td, %td, %td]", to.extent[0],
        to.extent[1], to.extent[2], to.extent[3], to.stride[0], to.stride[1], to.stride[2], to.stride[3]);
  if ((from.data != to.data || from.stride != to.stride) && read.begin < written.end && written.begin < read.end)
    return Status::error(Code::invalid_argument, "fovea: rope: from [%#zx, %#zx) overlaps to [%#zx, %#zx) without being it",
                         static_cast<std::size_t>(read.begin), static_cast<std::size_t>(read.end),
                         static_cast<std::size_t>(written.begin), static_cast<std::size_t>(written.end));
  return check_positions(positions, table, from.extent[0], from.extent[2]);
}

}   // namespace rope

// to = from, every vector turned by its token's position: [batch, head, pos, dim], innermost stride 1, any others. `to` may
// be `from`. On error nothing has been written. Serial: deal batch entries or heads to threads by slicing the views.
inline Status rotate(Tensor<const float> from, Tensor<float> to, const RopePositions& positions, const RopeTable& table,
                     RopeLayout layout, RopeDirection direction = RopeDirection::forward) {
  from = tidy(from);
  to = tidy(to);
  if (Status s = rope::check_call(from, to, positions, table, layout, direction); !s.ok()) return s;
  const auto [batches, heads, len, dim] = from.extent;
  if (dim == 0) return {};
  const bool listed = static_cast<bool>(positions.ids);
  const auto turn_row =
      layout == RopeLayout::half_split ? &rotate_rows<RopeLayout::half_split> : &rotate_rows<RopeLayout::interleaved>;
  for (index_t b = 0; b < batches; ++b) {
    for (index_t first = 0; first < len; first += rope::kTokens) {
      const index_t count = len - first < rope::kTokens ? len - first : rope::kTokens;
      for (index_t h = 0; h < heads; ++h) {
        const float* const x = from.data + b * from.stride[0] + h * from.stride[1] + first * from.stride[2];
        float* const y = to.data + b * to.stride[0] + h * to.stride[1] + first * to.stride[2];
        if (!listed) {
          const index_t pos = positions.start + first * positions.step;
          turn_row(x, from.stride[2], y, to.stride[2], count, table.cos_at(pos), table.sin_at(pos),
                   positions.step * table.stride, table.pairs, dim, direction);
          continue;
        }
        for (index_t n = 0; n < count; ++n) {
          const index_t pos = positions.ids(positions.ids.extent[0] == 1 ? 0 : b, first + n);
          turn_row(x + n * from.stride[2], 0, y + n * to.stride[2], 0, 1, table.cos_at(pos), table.sin_at(pos), 0,
                   table.pairs, dim, direction);
        }
      }
    }
  }
  return {};
}

// In place.
inline Status rotate(Tensor<float> x, const RopePositions& positions, const RopeTable& table, RopeLayout layout,
                     RopeDirection direction = RopeDirection::forward) {
  return rotate(x, x, positions, table, layout, direction);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
