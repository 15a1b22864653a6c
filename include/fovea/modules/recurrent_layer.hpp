// SPDX-License-Identifier: Apache-2.0
// What the layers around a recurrence share: their tokens and states, the checks of both, projections into rows of floats,
// the convolution in front of the recurrence, and the way back to the model's width.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <span>

#include "../core/recurrent.hpp"
#include "../mechanisms/short_conv.hpp"
#include "projection.hpp"
#include "recurrent_norms.hpp"

namespace fovea {
inline namespace v0 {

// The state of a layer's convolution, [sequence, channel, n] with n of width - 1 or more: the newest inputs, zeros before the
// first. More than the convolution needs is for a cache that takes drafts back (StateCache::keep_inputs). Both may be the
// same memory; null = zeros, not wanted.
struct ConvState {
  View<const float, 3> initial = {};
  View<float, 3> final = {};
};

inline namespace FOVEA_ARCH {
namespace recurrent_layer {

// Rows of tokens, all heads of a token next to each other.
struct Rows {
  float* data;
  index_t width;

  Tensor<float> heads(index_t batch, index_t len, index_t first, index_t count, index_t dim) const {
    return {data + first, {batch, count, len, dim}, {len * width, dim, width, 1}};
  }
};

// The tokens of a call: [batch, 1, pos, model], or those that cu_len gives to a sequence.
struct Tokens {
  index_t batch, len, sequences;
  index_t count() const { return batch * len; }
};
inline Tokens tokens_of(const Operand& x, std::span<const index_t> cu_len) {
  if (cu_len.empty()) return {x.extent[0], x.extent[2], x.extent[0]};
  return {1, std::clamp<index_t>(cu_len.back(), 0, x.extent[2]), static_cast<index_t>(cu_len.size()) - 1};
}

// A weight by name, for messages.
struct Weight {
  const char* name;
  const Operand& tensor;
  index_t rows, columns;   // a vector has 0 rows
  bool optional = false;   // no data = absent
};

// Matrices as a checkpoint has them, [1, 1, output, input] in f32, bf16 or f16 with innermost stride 1; vectors [1, 1, 1,
// n], f64 and any stride too.
inline Status check_weight(const char* layer, const Weight& weight, door::Memory& memory) {
  const Operand& w = weight.tensor;
  const bool vector = weight.rows == 0;
  const index_t rows = vector ? 1 : weight.rows;
  if (w.data == nullptr && weight.optional) return {};
  if (w.data == nullptr || w.extent != std::array<index_t, 4>{1, 1, rows, weight.columns})
    return door::invalid("fovea: %s: %s is [%td, %td, %td, %td]%s, must be [1, 1, %td, %td]", layer, weight.name,
                         w.extent[0], w.extent[1], w.extent[2], w.extent[3], w.data == nullptr ? " without data" : "", rows,
                         weight.columns);
  if (!vector || !is_plain(w.format)) {
    if (Status s = check_weight_format(layer, weight.name, w); !s.ok()) return s;
  }
  return memory.reads(weight.name, w);
}

inline Status check_conv_state(const char* layer, const char* name, const auto& state, index_t sequences, index_t channels,
                               index_t width, door::Memory& memory) {
  if (state.data != nullptr && state.extent[2] < width - 1)
    return door::invalid("fovea: %s: %s keeps %td inputs, a width of %td needs %td", layer, name, state.extent[2], width,
                         width - 1);
  return door::check_like(name, state, std::array<index_t, 3>{sequences, channels, state.extent[2]}, memory);
}

// Everything that is not a weight: x and y [batch, 1, pos, model], the states, how the call runs. y may be x.
inline Status check_call(const char* layer, const Operand& x, const Result& y, index_t model,
                         const door::RecurrentShape& shape, index_t channels, index_t width, const ConvState& conv,
                         const RecurrentOptions<float>& options, door::Memory& memory) {
  if (Status s = door::check_plain("x", x.format); !s.ok()) return s;
  if (Status s = door::check_plain("y", y.format); !s.ok()) return s;
  if (x.extent[1] != 1 || x.extent[3] != model)
    return door::invalid("fovea: %s: x is [%td, %td, %td, %td], must be [batch, 1, pos, %td]", layer, x.extent[0],
                         x.extent[1], x.extent[2], x.extent[3], model);
  if (Status s = memory.reads("x", x); !s.ok()) return s;
  if (Status s = door::check_extents("y", y, x.extent, "x"); !s.ok()) return s;
  if (Status s = memory.writes("y", y); !s.ok()) return s;
  if (y.data == x.data && y.format == x.format && y.stride == x.stride) memory.may_be("y", "x");
  if (Status s = door::check_how(shape, options); !s.ok()) return s;
  if (Status s = door::check_states(shape, options, memory); !s.ok()) return s;
  if (width > short_conv_parts::kMaxWidth)
    return door::invalid("fovea: %s: a convolution of width %td, at most %td", layer, width, short_conv_parts::kMaxWidth);
  if (Status s = check_conv_state(layer, "conv.initial", conv.initial, shape.sequences, channels, width, memory); !s.ok())
    return s;
  if (Status s = check_conv_state(layer, "conv.final", conv.final, shape.sequences, channels, width, memory); !s.ok())
    return s;
  if (conv.final.extent == conv.initial.extent && conv.final.stride == conv.initial.stride)
    memory.may_be("conv.final", "conv.initial");
  return memory.check_apart();
}

// Memory of the projections and of the convolution; the same code counts its bytes.
struct Common {
  float* taps;             // [channel, width]
  float* conv_state;       // [sequence, kept, channel]  handed out when nothing can fail any more
  std::byte* conv_bytes;   // of short_conv
  std::size_t conv_size;
  std::byte* scratch;   // [lane]  of a projection
  std::size_t lane_bytes;
};
inline Common carve_common(Bump& bump, index_t channels, index_t width, index_t tokens, index_t sequences, int lanes,
                           index_t kept) {
  Bump lane;
  carve_project(lane, tokens);
  Common memory{};
  memory.taps = bump.take<float>(channels * width);
  memory.conv_state = bump.take<float>(sequences * channels * std::max(width, kept));
  memory.conv_size = short_conv_bytes(channels, width, lanes);
  memory.conv_bytes = bump.take<std::byte>(static_cast<index_t>(memory.conv_size));
  memory.lane_bytes = lane.used();
  memory.scratch = bump.take<std::byte>(static_cast<index_t>(lane.used()) * lanes);
  return memory;
}

inline auto read_rows(const Rows& rows) {
  return [rows](index_t token, index_t d, index_t count, float* to) {
    std::copy_n(rows.data + token * rows.width + d, count, to);
  };
}
inline auto write_tokens(const Result& y, const Tokens& tokens) {
  return [&y, tokens](index_t token, index_t n, index_t count, const float* from) {
    const index_t at = token / tokens.len * y.stride[0] + token % tokens.len * y.stride[2] + n * y.stride[3];
    write_strided(y.format, from, count, y.data + at * row_bytes(y.format, 1), y.stride[3]);
  };
}
inline auto write_rows(const Rows& rows, index_t first = 0) {
  return [rows, first](index_t token, index_t n, index_t count, const float* from) {
    std::copy_n(from, count, rows.data + token * rows.width + first + n);
  };
}

// Outputs of one matrix that belong into several places: its rows come in equal groups of pieces, and each piece's groups
// lie next to each other in `rows` from `first` on.
struct Piece {
  index_t width;
  Rows rows;
  index_t first;
};
template <std::size_t Count>
auto write_pieces(const std::array<Piece, Count>& pieces) {
  return [pieces](index_t token, index_t n, index_t count, const float* from) {
    index_t per_group = 0;
    for (const Piece& piece : pieces) per_group += piece.width;
    while (count > 0) {
      index_t within = n % per_group;
      std::size_t which = 0;
      for (; within >= pieces[which].width; ++which) within -= pieces[which].width;
      const Piece& piece = pieces[which];
      const index_t here = std::min(count, piece.width - within);
      std::copy_n(from, here,
                  piece.rows.data + token * piece.rows.width + piece.first + n / per_group * piece.width + within);
      n += here;
      from += here;
      count -= here;
    }
  };
}

inline void read_vector(const Operand& vector, float* to) {
  read_strided(vector.format, vector.data, vector.stride[3], vector.extent[3], to);
}
// Rows of a matrix, one after the other.
inline void read_matrix(const Operand& matrix, float* to) {
  for (index_t row = 0; row < matrix.extent[2]; ++row) {
    read_strided(matrix.format, matrix.data + row * matrix.stride[2] * row_bytes(matrix.format, 1), matrix.stride[3],
                 matrix.extent[3], to + row * matrix.extent[3]);
  }
}

// Inputs that a call hands out; none if they are not wanted.
inline index_t kept_of(const ConvState& conv) { return conv.final ? conv.final.extent[2] : 0; }

// SiLU of the convolution, in place; the state afterwards stays in memory.conv_state.
inline Status convolve(const Rows& rows, const Tokens& tokens, index_t width, const Common& memory, const ConvState& conv,
                       const RecurrentOptions<float>& options) {
  const index_t channels = rows.width, kept = kept_of(conv);
  ShortConvParameters<float> parameters;
  parameters.weight = {memory.taps, {channels, width}, {width, 1}};
  parameters.initial_state = conv.initial;
  if (kept > 0)
    parameters.final_state = {memory.conv_state, {tokens.sequences, channels, kept}, {channels * kept, 1, channels}};
  RecurrentOptions<float> how;
  how.cu_len = options.cu_len;
  how.executor = options.executor;
  how.workspace = {memory.conv_bytes, memory.conv_size};
  const Tensor<float> x = rows.heads(tokens.batch, tokens.len, 0, 1, channels);
  return short_conv(Operand(Tensor<const float>(x)), parameters, Result(x), how);
}

inline void hand_out(const ConvState& conv, const Common& memory) {
  const View<float, 3>& final = conv.final;
  const index_t channels = final.extent[1], kept = final.extent[2];
  for (index_t s = 0; final && s < final.extent[0]; ++s) {
    for (index_t c = 0; c < channels; ++c) {
      for (index_t n = 0; n < kept; ++n) final(s, c, n) = memory.conv_state[(s * kept + n) * channels + c];
    }
  }
}

}   // namespace recurrent_layer
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
