// SPDX-License-Identifier: Apache-2.0
// The causal depthwise convolution in front of most recurrent layers (H3: Fu et al. 2022, arXiv 2212.14052; Mamba: Gu and
// Dao 2023, arXiv 2312.00752):
//   y_t[c] = act(bias[c] + sum_j weight[c, j] x_{t - width + 1 + j}[c]),   act is SiLU or nothing.
// What came before a sequence is its state, the newest inputs (not outputs), or zero.
//
// Every y is one chain of FMAs from the oldest input to the newest, bias first: decode, prefill and any split of it give the
// same bits. A task is a run of channels of one sequence, whole rows where there are sequences enough for the lanes; it
// walks over the tokens with the last `width` inputs in a ring of rows. Whole rows of 8192 channels took 62 to 77 ns per 16
// numbers where blocks of 512 took 84 to 122 and memcpy 19 to 25 (2048 tokens, a busy machine): a block starts a page for
// each token.
#pragma once
#include "../call/in_memory.hpp"
#include "../call/recurrent_call.hpp"
#include "../simd/math.hpp"
#include "../simd/numbers.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

namespace short_conv_parts {

inline constexpr index_t kMostChannels = 8192, kLeastChannels = 512;   // of a task
inline constexpr index_t kMaxWidth = 1 << 16;

// Channels of a task. The result does not depend on it.
inline index_t task_channels(index_t channels, index_t sequences, int lanes) {
  const index_t parts = (lanes + sequences - 1) / std::max<index_t>(sequences, 1);
  const index_t share = (channels + parts - 1) / std::max<index_t>(parts, 1);
  return std::clamp(round_up(share, 16), std::min(channels, kLeastChannels), std::min(channels, kMostChannels));
}

struct Memory {
  index_t pitch;   // from row to row: whole vectors, and no multiple of 4 KiB
  float* taps;     // [width, pitch]
  float* bias;     // [pitch]
  float* ring;     // [width, pitch]  the inputs of token t in row t mod width
  float* row;      // [pitch]
};
inline Memory carve(Bump& bump, index_t channels, index_t width) {
  const index_t pitch = round_up(channels, 16) + 16;
  static_assert(16 % kLanes == 0);
  return {pitch, bump.take<float>(width * pitch), bump.take<float>(pitch), bump.take<float>(width * pitch),
          bump.take<float>(pitch)};
}

// Floats `stride` apart to neighbours; `to` is padded to whole vectors.
FOVEA_INLINE void gather_row(const float* from, index_t stride, index_t count, float* to) {
  for (index_t c = 0; c < count; c += kLanes) store(to + c, load_strided(from + c * stride, stride, count - c));
}

// The outputs of one token, whose inputs are row `newest` of the ring.
template <int Width, bool Silu>
void convolve_row(const Memory& memory, index_t any_width, index_t newest, index_t channels, float* to) {
  const index_t width = Width > 0 ? Width : any_width;
  const auto sum_at = [&](index_t c) {
    f32 sum = load(memory.bias + c);
    index_t row = newest;
    FOVEA_UNROLL
    for (index_t j = 0; j < width; ++j) {
      row = row + 1 == width ? 0 : row + 1;
      sum = fma(load(memory.taps + j * memory.pitch + c), load(memory.ring + row * memory.pitch + c), sum);
    }
    return Silu ? silu(sum) : sum;
  };
  index_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(to + c, sum_at(c));
  if (c < channels) store_some(to + c, sum_at(c), channels - c);
}

using ConvolveRow = void (*)(const Memory&, index_t, index_t, index_t, float*);
inline ConvolveRow convolve_row_for(index_t width, bool with_silu) {
  if (width == 4) return with_silu ? &convolve_row<4, true> : &convolve_row<4, false>;
  return with_silu ? &convolve_row<0, true> : &convolve_row<0, false>;
}

// One block of channels of one sequence.
class ChannelBlock {
 public:
  ChannelBlock(const Operand& x, const Result& y, const ShortConvParameters<float>& parameters, index_t sequence,
        const door::SequenceRun& run, index_t first, index_t most)
      : x_(x),
        y_(y),
        parameters_(parameters),
        sequence_(sequence),
        run_(run),
        first_(first),
        count_(std::min(most, x.extent[3] - first)) {}

  void run(const Memory& memory) const {
    const index_t width = parameters_.weight.extent[1], len = run_.end - run_.begin;
    for (index_t j = 0; j < width; ++j)
      gather_row(&parameters_.weight(first_, j), parameters_.weight.stride[0], count_, memory.taps + j * memory.pitch);
    std::fill_n(memory.bias, memory.pitch, 0.f);
    if (!parameters_.bias.empty()) std::copy_n(parameters_.bias.data() + first_, count_, memory.bias);
    for (index_t t = 1 - width; t < 0; ++t) read_input(t, memory.ring + (t + width) * memory.pitch);
    // Before y, which may be x, and from the oldest to the newest: the state may be updated in place.
    const View<float, 3>& final = parameters_.final_state;
    for (index_t n = 0; final && n < final.extent[2]; ++n) {
      read_input(len - final.extent[2] + n, memory.row);
      for (index_t c = 0; c < count_; ++c) final(sequence_, first_ + c, n) = memory.row[c];
    }

    const ConvolveRow convolve = convolve_row_for(width, parameters_.silu);
    const bool writes_floats = y_.format == Format::f32 && y_.stride[3] == 1;
    index_t newest = 0;
    for (index_t t = 0; t < len; ++t) {
      read_input(t, memory.ring + newest * memory.pitch);
      float* const to = writes_floats ? reinterpret_cast<float*>(y_at(t)) : memory.row;
      convolve(memory, width, newest, count_, to);
      if (!writes_floats) write_numbers(y_.format, to, count_, y_at(t), y_.stride[3]);
      newest = newest + 1 == width ? 0 : newest + 1;
    }
  }

 private:
  index_t offset(const auto& tensor, index_t t) const {
    return (run_.batch * tensor.stride[0] + (run_.begin + t) * tensor.stride[2] + first_ * tensor.stride[3]) *
           row_bytes(tensor.format, 1);
  }
  const std::byte* x_at(index_t t) const { return x_.data + offset(x_, t); }
  std::byte* y_at(index_t t) const { return y_.data + offset(y_, t); }

  // The inputs of token t of the sequence, before it those of the state, before that zeros.
  void read_input(index_t t, float* to) const {
    const View<const float, 3>& state = parameters_.initial_state;
    const index_t stored = state ? state.extent[2] : 0;
    if (t >= 0) {
      read_numbers(x_.format, x_at(t), x_.stride[3], count_, to);
    } else if (stored + t >= 0) {
      gather_row(&state(sequence_, first_, stored + t), state.stride[1], count_, to);
    } else {
      std::fill_n(to, count_, 0.f);
    }
  }

  const Operand& x_;
  const Result& y_;
  const ShortConvParameters<float>& parameters_;
  index_t sequence_;
  door::SequenceRun run_;
  index_t first_, count_;
};

inline Status check_state(const char* name, const auto& state, index_t sequences, index_t channels, index_t width,
                          door::Memory& memory) {
  if (state.data != nullptr && state.extent[2] < width - 1)
    return door::invalid("fovea: %s keeps %td inputs, a width of %td needs %td", name, state.extent[2], width, width - 1);
  return door::check_like(name, state, std::array<index_t, 3>{sequences, channels, state.extent[2]}, memory);
}

inline Status check(const Operand& x, const ShortConvParameters<float>& p, const Result& y,
                    const door::RecurrentShape& shape, const RecurrentOptions<float>& options) {
  door::Memory memory;
  const index_t channels = x.extent[3], width = p.weight.extent[1];
  if (Status s = door::check_plain("x", x.format); !s.ok()) return s;
  if (Status s = door::check_plain("y", y.format); !s.ok()) return s;
  if (x.extent[1] != 1 || channels < 1)
    return door::invalid("fovea: x is [%td, %td, %td, %td], must be [batch, 1, pos, channel]", x.extent[0], x.extent[1],
                         x.extent[2], x.extent[3]);
  if (Status s = memory.reads("x", x); !s.ok()) return s;
  if (Status s = door::check_extents("y", y, x.extent, "x"); !s.ok()) return s;
  if (Status s = memory.writes("y", y); !s.ok()) return s;
  if (p.weight.data == nullptr || p.weight.extent[0] != channels || width < 1 || width > kMaxWidth)
    return door::invalid("fovea: weight is [%td, %td]%s, must be [%td, width], width 1 to %td", p.weight.extent[0], width,
                         p.weight.data == nullptr ? " without data" : "", channels, kMaxWidth);
  if (Status s = memory.reads("weight", p.weight); !s.ok()) return s;
  if (!p.bias.empty() && static_cast<index_t>(p.bias.size()) != channels)
    return door::invalid("fovea: bias has %zu numbers, there are %td channels", p.bias.size(), channels);
  if (Status s = memory.reads("bias", door::view_of(p.bias)); !s.ok()) return s;
  if (options.initial_state || options.final_state)
    return door::invalid("fovea: the states of a short_conv stand in ShortConvParameters, not in the options");
  if (Status s = door::check_how(shape, options); !s.ok()) return s;
  if (Status s = check_state("initial_state", p.initial_state, shape.sequences, channels, width, memory); !s.ok()) return s;
  if (Status s = check_state("final_state", p.final_state, shape.sequences, channels, width, memory); !s.ok()) return s;
  if (y.data == x.data && y.format == x.format && y.stride == x.stride) memory.may_be("y", "x");
  if (p.final_state.data == p.initial_state.data && p.final_state.extent == p.initial_state.extent &&
      p.final_state.stride == p.initial_state.stride)
    memory.may_be("final_state", "initial_state");
  return memory.check_apart();
}

// Of a lane, however wide its tasks are.
inline std::size_t lane_bytes(index_t channels, index_t width) {
  Bump bump;
  carve(bump, std::min(channels, kMostChannels), width);
  return bump.used();
}

}   // namespace short_conv_parts

inline std::size_t short_conv_bytes(index_t channels, index_t width, int lanes = 1) {
  return short_conv_parts::lane_bytes(channels, width) * static_cast<std::size_t>(lanes) + kAlignment;
}

// x, y [batch, 1, pos, channel] of any plain format, any strides; y may be x. Of the options, cu_len, executor and workspace
// (short_conv_bytes). The states may have room for more than width - 1 inputs, and be the same memory; they are fastest with
// their channels next to each other, and so is the weight.
inline Status short_conv(const Operand& x_any, const ShortConvParameters<float>& parameters_any, const Result& y_any,
                         const RecurrentOptions<float>& options = {}) {
  using namespace short_conv_parts;
  const Operand x = door::tidy_operand(x_any);
  const Result y = door::tidy_operand(y_any);
  ShortConvParameters<float> parameters = parameters_any;
  parameters.weight = tidy(parameters.weight);
  parameters.initial_state = tidy(parameters.initial_state);
  parameters.final_state = tidy(parameters.final_state);
  const index_t sequences = door::count_sequences(x.extent[0], options.cu_len);
  const door::RecurrentShape shape{x.extent[0], x.extent[2], sequences, 1, 1, 1, 1, 1, 1, 1};
  if (Status s = check(x, parameters, y, shape, options); !s.ok()) return s;

  const int lanes = options.executor.lanes();
  const index_t width = parameters.weight.extent[1], most = task_channels(x.extent[3], sequences, lanes);
  const index_t blocks = (x.extent[3] + most - 1) / most;
  const auto run = [&](Bump bump, index_t task) {
    const index_t sequence = task / blocks;
    const ChannelBlock block(x, y, parameters, sequence, door::sequence_run(shape, options.cu_len, sequence),
                             task % blocks * most, most);
    block.run(carve(bump, most, width));
  };
  return door::deal_in_memory<door::LocalBytes>(options.executor, lanes, sequences * blocks, options.workspace,
                                                lane_bytes(x.extent[3], width), run);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
