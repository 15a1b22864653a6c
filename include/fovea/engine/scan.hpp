// SPDX-License-Identifier: Apache-2.0
// Recurrences whose every state cell decays by a factor of its own (Mamba-1, S4D, RWKV-4): no matrix product, so there is one
// form of them. Vectors run over channels, time is walked token by token, and a policy keeps the states of a vector of
// channels in registers for kScanTokens tokens at a time.
//
// A task is a sequence, a state head and a tile of channels. A channel's numbers never meet another channel's, and a state
// goes from block to block as the fp32 it is handed on as: the bits depend on neither lanes, tiles nor splits of the
// sequence.
#pragma once
#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>

#include "../core/workspace.hpp"
#include "../simd/numbers.hpp"
#include "recurrent_run.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr index_t kScanChannels = 64;   // of a tile: four cache lines of a row of floats
// Tokens of a block: with a tile's rows of two inputs and an output, and those of the next block on their way, 24 KiB of the
// first cache. The states are loaded and stored once per block, 1 % of Mamba-1's instructions.
inline constexpr index_t kScanTokens = 16;

// What a policy walks over: one vector of channels of one block.
template <std::size_t Channel, std::size_t Shared>
struct ScanBlock {
  index_t tokens;
  std::array<const float*, Channel> channel;   // [pos, lane]
  std::array<index_t, Channel> channel_stride;
  std::array<const float*, Shared> shared;   // [pos, number]  the same for all channels
  std::array<index_t, Shared> shared_stride;
  float* out;   // [pos, lane]
  index_t out_stride;
  float* state;             // [row, lane], rows kScanChannels apart
  const float* constants;   // the same

  FOVEA_INLINE f32 input(std::size_t n, index_t t) const { return load(channel[n] + t * channel_stride[n]); }
  FOVEA_INLINE const float* numbers(std::size_t n, index_t t) const { return shared[n] + t * shared_stride[n]; }
  FOVEA_INLINE float* output(index_t t) const { return out + t * out_stride; }
  // Rows of a tensor are often farther apart than a hardware prefetcher looks: the same row of the next block.
  FOVEA_INLINE void prefetch_next(index_t t) const {
    for (std::size_t n = 0; n < Channel; ++n) ahead(channel[n], channel_stride[n], t);
    ahead(out, out_stride, t);
  }

 private:
  FOVEA_INLINE static void ahead(const float* rows, index_t stride, index_t t) {
    prefetch(reinterpret_cast<const std::byte*>(rows), (t + kScanTokens) * stride * static_cast<index_t>(sizeof(float)));
  }
};

// Where a tile is.
struct ScanPlace {
  index_t sequence, head, first, count;   // channels [first, first + count)
};

// kChannelInputs tensors have a number per channel, kSharedInputs a row that all channels see. constants(): decays and the
// like, once per task; padded lanes are zeros in both. load_state and save_state: to and from the caller's memory.
template <class P>
concept ScanPolicy = requires(const P& p, const ScanPlace& place, float* rows,
                              const ScanBlock<P::kChannelInputs, P::kSharedInputs>& block) {
  { p.state_rows() } -> std::same_as<index_t>;
  { p.constant_rows() } -> std::same_as<index_t>;
  p.constants(place, rows);
  p.load_state(place, rows);
  p.save_state(place, rows);
  p.walk(block);
};

// Cells that lie k_stride and v_stride apart <-> rows of a tile. Either stride being 1 is fast.
inline void read_columns(const StateColumns<const float>& from, index_t rows, index_t count, float* to, index_t to_stride) {
  if (from.v_stride != 1 && from.k_stride == 1) {
    for (index_t c = 0; c < count; c += kLanes) {
      for (index_t r = 0; r < rows; r += kLanes) {
        f32 block[kLanes];
        const index_t here = std::min(kLanes, rows - r);
        for (index_t lane = 0; lane < kLanes; ++lane)
          block[lane] = c + lane < count ? load_strided(from.data + (c + lane) * from.v_stride + r, 1, here) : f32(0.f);
        transpose(block);
        for (index_t row = 0; row < here; ++row) store(to + (r + row) * to_stride + c, block[row]);
      }
    }
    return;
  }
  for (index_t r = 0; r < rows; ++r) {
    for (index_t c = 0; c < count; c += kLanes)
      store(to + r * to_stride + c,
            load_strided(from.data + r * from.k_stride + c * from.v_stride, from.v_stride, count - c));
  }
}
inline void write_columns(const float* from, index_t from_stride, index_t rows, index_t count,
                          const StateColumns<float>& to) {
  if (to.v_stride != 1 && to.k_stride == 1) {
    for (index_t c = 0; c < count; c += kLanes) {
      for (index_t r = 0; r < rows; r += kLanes) {
        f32 block[kLanes];
        const index_t here = std::min(kLanes, rows - r), channels = std::min(kLanes, count - c);
        for (index_t row = 0; row < kLanes; ++row)
          block[row] = row < here ? load(from + (r + row) * from_stride + c) : f32(0.f);
        transpose(block);
        for (index_t lane = 0; lane < channels; ++lane) {
          float* const cells = to.data + (c + lane) * to.v_stride + r;
          if (here == kLanes) {
            store(cells, block[lane]);
          } else {
            store_some(cells, block[lane], here);
          }
        }
      }
    }
    return;
  }
  for (index_t r = 0; r < rows; ++r)
    write_numbers(Format::f32, from + r * from_stride, count, reinterpret_cast<std::byte*>(to.data + r * to.k_stride),
                  to.v_stride);
}

template <ScanPolicy Policy>
struct Scan {
  static constexpr std::size_t kChannel = Policy::kChannelInputs, kShared = Policy::kSharedInputs;

  Policy policy;
  RecurrentShape shape;   // dim_v: channels
  HeadMap head_map = HeadMap::blocks;
  std::span<const index_t> cu_len;
  std::array<Operand, kChannel> channel;
  std::array<Operand, kShared> shared;   // the last one belongs to the outputs' heads, the others to the states'
  Result out;

  struct Memory {
    float *state, *constants;
    std::array<float*, kChannel> channel;
    std::array<float*, kShared> shared;
    float* out;
  };
  Memory carve(Bump& bump) const {
    Memory memory{};
    memory.state = bump.take<float>(policy.state_rows() * kScanChannels);
    memory.constants = bump.take<float>(policy.constant_rows() * kScanChannels);
    for (float*& rows : memory.channel) rows = bump.take<float>(kScanTokens * kScanChannels);
    for (std::size_t n = 0; n < kShared; ++n) memory.shared[n] = bump.take<float>(kScanTokens * shared[n].extent[3]);
    memory.out = bump.take<float>(kScanTokens * kScanChannels);
    return memory;
  }

  index_t tiles() const { return (shape.dim_v + kScanChannels - 1) / kScanChannels; }
  index_t tasks() const { return shape.sequences * shape.state_heads * tiles(); }

  void run(index_t task, const Memory& memory) const {
    const index_t first = task % tiles() * kScanChannels;
    const ScanPlace place{task / tiles() / shape.state_heads, task / tiles() % shape.state_heads, first,
                          std::min(kScanChannels, shape.dim_v - first)};
    std::fill_n(memory.constants, policy.constant_rows() * kScanChannels, 0.f);
    policy.constants(place, memory.constants);
    if (place.count % kLanes != 0) {
      for (float* const rows : memory.channel) std::fill_n(rows, kScanTokens * kScanChannels, 0.f);
    }
    // Outputs that share a state and differ in what reads it are walked one after the other; only the last hands the state
    // on, which may lie where the first one was.
    const index_t readers = shape.out_heads / shape.state_heads;
    for (index_t reader = 0; reader < readers; ++reader) {
      std::fill_n(memory.state, policy.state_rows() * kScanChannels, 0.f);
      policy.load_state(place, memory.state);
      walk(place, head_map == HeadMap::tiled ? place.head + reader * shape.state_heads : place.head * readers + reader,
           memory);
    }
    policy.save_state(place, memory.state);
  }

 private:
  // Rows of one tensor from the first token of a sequence on.
  template <class Byte>
  struct Rows {
    Byte* data;
    Format format;
    index_t pos_stride, stride, count;   // strides in numbers

    index_t bytes() const { return row_bytes(format, 1); }
    Byte* at(index_t t) const { return data + t * pos_stride * bytes(); }
    bool are_floats() const { return format == Format::f32 && (stride == 1 || count == 1); }
  };
  template <class Byte, class Tensor>
  Rows<Byte> rows_of(const Tensor& x, index_t batch, index_t head, index_t begin, index_t first, index_t count) const {
    const index_t b = x.extent[0] == 1 ? 0 : batch;
    const index_t offset = b * x.stride[0] + head * x.stride[1] + begin * x.stride[2] + first * x.stride[3];
    return {x.data + offset * row_bytes(x.format, 1), x.format, x.stride[2], x.stride[3], count};
  }

  // The rows as floats: where they lie, or copied.
  struct Floats {
    const float* data;
    index_t stride;
  };
  static Floats read(const Rows<const std::byte>& rows, bool in_place, index_t t, index_t tokens, float* copy,
                     index_t copy_stride) {
    if (in_place) return {reinterpret_cast<const float*>(rows.at(t)), rows.pos_stride};
    for (index_t i = 0; i < tokens; ++i) {
      const std::byte* const row = rows.at(t + i);
      for (index_t byte = 0; rows.stride == 1 && byte < rows.count * rows.bytes(); byte += 64)
        prefetch(row, kScanTokens * rows.pos_stride * rows.bytes() + byte);
      read_numbers(rows.format, row, rows.stride, rows.count, copy + i * copy_stride);
    }
    return {copy, copy_stride};
  }

  void walk(const ScanPlace& place, index_t out_head, const Memory& memory) const {
    const SequenceRun tokens = sequence_run(shape, cu_len, place.sequence);
    std::array<Rows<const std::byte>, kChannel> channel_rows;
    std::array<Rows<const std::byte>, kShared> shared_rows;
    for (std::size_t n = 0; n < kChannel; ++n) {
      const index_t head = shared_head(place.head, shape.state_heads, channel[n].extent[1], head_map);
      channel_rows[n] = rows_of<const std::byte>(channel[n], tokens.batch, head, tokens.begin, place.first, place.count);
    }
    for (std::size_t n = 0; n < kShared; ++n) {
      const index_t heads = shared[n].extent[1];
      const index_t head = n + 1 == kShared ? shared_head(out_head, shape.out_heads, heads, head_map)
                                            : shared_head(place.head, shape.state_heads, heads, head_map);
      shared_rows[n] = rows_of<const std::byte>(shared[n], tokens.batch, head, tokens.begin, 0, shared[n].extent[3]);
    }
    const Rows<std::byte> out_rows =
        rows_of<std::byte>(out, tokens.batch, out_head, tokens.begin, place.first, place.count);

    const bool whole = place.count % kLanes == 0;
    const bool out_in_place = whole && out_rows.are_floats();
    const index_t len = tokens.end - tokens.begin;
    for (index_t t = 0; t < len; t += kScanTokens) {
      ScanBlock<kChannel, kShared> block;
      block.tokens = std::min(kScanTokens, len - t);
      for (std::size_t n = 0; n < kShared; ++n) {
        const Floats rows = read(shared_rows[n], shared_rows[n].are_floats(), t, block.tokens, memory.shared[n],
                                 shared_rows[n].count);
        block.shared[n] = rows.data;
        block.shared_stride[n] = rows.stride;
      }
      std::array<Floats, kChannel> inputs;
      for (std::size_t n = 0; n < kChannel; ++n) {
        inputs[n] = read(channel_rows[n], whole && channel_rows[n].are_floats(), t, block.tokens, memory.channel[n],
                         kScanChannels);
        block.channel_stride[n] = inputs[n].stride;
      }
      float* const to = out_in_place ? reinterpret_cast<float*>(out_rows.at(t)) : memory.out;
      block.out_stride = out_in_place ? out_rows.pos_stride : kScanChannels;
      for (index_t c = 0; c < place.count; c += kLanes) {
        for (std::size_t n = 0; n < kChannel; ++n) block.channel[n] = inputs[n].data + c;
        block.out = to + c;
        block.state = memory.state + c;
        block.constants = memory.constants + c;
        policy.walk(block);
      }
      for (index_t i = 0; !out_in_place && i < block.tokens; ++i)
        write_numbers(out_rows.format, memory.out + i * kScanChannels, place.count, out_rows.at(t + i), out_rows.stride);
    }
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
