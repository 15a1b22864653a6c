// SPDX-License-Identifier: Apache-2.0
// Recurrences whose every state cell decays by a factor of its own (Mamba-1, S4D, RWKV-4): no matrix product, so there is
// one form of them. Vectors run over channels, time is walked token by token, and a policy keeps the states of a vector of
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

// Channels of a tile. Rows of a tensor are far apart, and pieces of 512 bytes of them come from memory at half the speed of
// whole pages (4.6 instead of 10 GB/s on one core of a Sapphire Rapids), because no hardware prefetcher follows.
inline constexpr index_t kMostScanChannels = 1024, kLeastScanChannels = 128;
inline constexpr index_t kScanTokens = 16;             // of a block: a tile's rows of two inputs and an output are 192 KiB
inline constexpr index_t kScanStateFloats = 1 << 16;   // of a tile, if it has more than the least channels

// What a policy walks over: one vector of channels of one block. The rows of a block are copied so that those of a vector
// stand next to each other: a power of two apart, they would all want the same few places of the first cache. Meanwhile the
// rows of the next block are asked for, in the order in which they lie in memory.
template <std::size_t Channel, std::size_t Shared>
struct ScanBlock {
  index_t tokens;
  std::array<const float*, Channel> channel;   // [pos, lane]
  std::array<const float*, Shared> shared;     // [pos, number]  the same for all channels
  std::array<index_t, Shared> shared_stride;
  float* out;                                                // [pos, lane]
  float* state;                                              // [row, lane]
  const float* constants;                                    // [row, lane]
  std::array<const std::byte*, Channel + 1> next;            // the caller's rows of the next block: inputs and output
  std::array<index_t, Channel + 1> next_stride, next_step;   // bytes from row to row and from vector to vector
  index_t vector, vectors;                                   // which one this is, of how many

  FOVEA_INLINE f32 input(std::size_t n, index_t t) const { return load(channel[n] + t * kLanes); }
  FOVEA_INLINE const float* numbers(std::size_t n, index_t t) const { return shared[n] + t * shared_stride[n]; }
  FOVEA_INLINE float* output(index_t t) const { return out + t * kLanes; }
  FOVEA_INLINE void prefetch_next(index_t t) const {
    const index_t count = vector * kScanTokens + t, row = count / vectors, place = count % vectors;
    FOVEA_UNROLL
    for (std::size_t n = 0; n <= Channel; ++n) {
      const auto begin = reinterpret_cast<std::uintptr_t>(next[n]);
      const auto at = begin + static_cast<std::uintptr_t>(row * next_stride[n] + place * next_step[n]);
      __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);   // for the second cache
    }
  }
};

// Where a vector of channels is.
struct ScanPlace {
  index_t sequence, head, first, count;   // channels [first, first + count), count <= kLanes
};

// kChannelInputs tensors have a number per channel, kSharedInputs a row that all channels see. constants(): decays and the
// like, once per task. Lanes from place.count on are zeros, and may
// become anything. load_state and save_state: to and from the caller's memory.
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

// States or constants of a vector of channels, cells k_stride and v_stride apart <-> [row, lane]. Either stride being 1 is
// fast.
inline void read_columns(const StateColumns<const float>& from, index_t rows, index_t count, float* to,
                         index_t to_stride = kLanes) {
  if (from.v_stride == 1 || from.k_stride != 1) {
    for (index_t r = 0; r < rows; ++r)
      store(to + r * to_stride, load_strided(from.data + r * from.k_stride, from.v_stride, count));
    return;
  }
  for (index_t r = 0; r < rows; r += kLanes) {
    f32 block[kLanes];
    for (index_t lane = 0; lane < kLanes; ++lane)
      block[lane] = lane < count ? load_strided(from.data + lane * from.v_stride + r, 1, rows - r) : f32(0.f);
    transpose(block);
    for (index_t row = 0; row < std::min(kLanes, rows - r); ++row) store(to + (r + row) * to_stride, block[row]);
  }
}
inline void write_columns(const float* from, index_t rows, index_t count, const StateColumns<float>& to,
                          index_t from_stride = kLanes) {
  const auto put = [](float* at, f32 numbers, index_t here) {
    if (here >= kLanes) {
      store(at, numbers);
    } else {
      store_some(at, numbers, here);
    }
  };
  if (to.v_stride == 1) {
    for (index_t r = 0; r < rows; ++r) put(to.data + r * to.k_stride, load(from + r * from_stride), count);
    return;
  }
  if (to.k_stride != 1) {
    for (index_t r = 0; r < rows; ++r) {
      for (index_t lane = 0; lane < count; ++lane)
        to.data[r * to.k_stride + lane * to.v_stride] = from[r * from_stride + lane];
    }
    return;
  }
  for (index_t r = 0; r < rows; r += kLanes) {
    f32 block[kLanes];
    for (index_t row = 0; row < kLanes; ++row) block[row] = r + row < rows ? load(from + (r + row) * from_stride) : f32(0.f);
    transpose(block);
    for (index_t lane = 0; lane < count; ++lane) put(to.data + lane * to.v_stride + r, block[lane], rows - r);
  }
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
  index_t width = kMostScanChannels;   // channels of a tile, whole vectors; no bit depends on it

  index_t most_width() const {
    const index_t fitting = kScanStateFloats / std::max<index_t>(policy.state_rows(), 1) / kLanes * kLanes;
    return std::clamp(fitting, kLeastScanChannels, kMostScanChannels);
  }
  // As wide as leaves a tile for every lane.
  index_t width_for(int lanes) const {
    const index_t states = std::max<index_t>(shape.sequences * shape.state_heads, 1);
    const index_t tiles_wanted = (lanes + states - 1) / states;
    const index_t vectors = (shape.dim_v + kLanes - 1) / kLanes;
    return std::clamp((vectors + tiles_wanted - 1) / tiles_wanted * kLanes, kLeastScanChannels, most_width());
  }

  // A tile's memory, all of it vector by vector.
  struct Memory {
    float *state, *constants;
    std::array<float*, kChannel> channel;
    std::array<float*, kShared> shared;
    float *out, *row, *out_row;
  };
  Memory carve(Bump& bump) const {
    Memory memory{};
    const index_t most = most_width();
    memory.state = bump.take<float>(policy.state_rows() * most);
    memory.constants = bump.take<float>(policy.constant_rows() * most);
    for (float*& rows : memory.channel) rows = bump.take<float>(kScanTokens * most);
    for (std::size_t n = 0; n < kShared; ++n) memory.shared[n] = bump.take<float>(kScanTokens * shared[n].extent[3]);
    memory.out = bump.take<float>(kScanTokens * most);
    memory.row = bump.take<float>(most);
    memory.out_row = bump.take<float>(most);
    return memory;
  }

  index_t tiles() const { return (shape.dim_v + width - 1) / width; }
  index_t tasks() const { return shape.sequences * shape.state_heads * tiles(); }

  void run(index_t task, const Memory& memory) const {
    const index_t first = task % tiles() * width;
    const Tile tile{task / tiles() / shape.state_heads, task / tiles() % shape.state_heads, first,
                    std::min(width, shape.dim_v - first)};
    const index_t padded = round_up(tile.count, kLanes);
    std::fill_n(memory.constants, policy.constant_rows() * padded, 0.f);
    std::fill_n(memory.row, padded, 0.f);
    const auto each_vector = [&](const auto& f) {
      for (index_t c = 0; c < tile.count; c += kLanes)
        f(ScanPlace{tile.sequence, tile.head, first + c, std::min(kLanes, tile.count - c)}, c);
    };
    each_vector(
        [&](const ScanPlace& place, index_t c) { policy.constants(place, memory.constants + c * policy.constant_rows()); });
    // Outputs that share a state and differ in what reads it are walked one after the other; only the last hands the state
    // on, which may lie where the first one was.
    const index_t readers = shape.out_heads / shape.state_heads;
    for (index_t reader = 0; reader < readers; ++reader) {
      std::fill_n(memory.state, policy.state_rows() * padded, 0.f);
      each_vector(
          [&](const ScanPlace& place, index_t c) { policy.load_state(place, memory.state + c * policy.state_rows()); });
      walk(tile, head_map == HeadMap::tiled ? tile.head + reader * shape.state_heads : tile.head * readers + reader, memory);
    }
    each_vector(
        [&](const ScanPlace& place, index_t c) { policy.save_state(place, memory.state + c * policy.state_rows()); });
  }

 private:
  struct Tile {
    index_t sequence, head, first, count;
  };
  // Rows of one tensor from the first token of a sequence on.
  template <class Byte>
  struct Rows {
    Byte* data;
    Format format;
    index_t pos_stride, stride, count;   // strides in numbers

    index_t bytes() const { return row_bytes(format, 1); }
    Byte* at(index_t t) const { return data + t * pos_stride * bytes(); }
  };
  template <class Byte, class Tensor>
  Rows<Byte> rows_of(const Tensor& x, index_t batch, index_t head, index_t begin, index_t first, index_t count) const {
    const index_t b = x.extent[0] == 1 ? 0 : batch;
    const index_t offset = b * x.stride[0] + head * x.stride[1] + begin * x.stride[2] + first * x.stride[3];
    return {x.data + offset * row_bytes(x.format, 1), x.format, x.stride[2], x.stride[3], count};
  }

  static bool are_floats(const auto& rows) { return rows.format == Format::f32 && (rows.stride == 1 || rows.count == 1); }
  // Rows of a tile -> [vector, pos, lane], zeros behind the last channel as in `row`; and back.
  static void read(const Rows<const std::byte>& rows, index_t t, index_t tokens, float* row, float* to) {
    for (index_t i = 0; i < tokens; ++i) {
      const float* from = row;
      if (are_floats(rows) && rows.count % kLanes == 0) {
        from = reinterpret_cast<const float*>(rows.at(t + i));
      } else {
        read_numbers(rows.format, rows.at(t + i), rows.stride, rows.count, row);
      }
      for (index_t c = 0; c < rows.count; c += kLanes) store(to + c * kScanTokens + i * kLanes, load(from + c));
    }
  }
  static void write(const float* from, index_t t, index_t tokens, float* row, const Rows<std::byte>& rows) {
    const bool in_place = are_floats(rows) && rows.count % kLanes == 0;
    for (index_t i = 0; i < tokens; ++i) {
      float* const to = in_place ? reinterpret_cast<float*>(rows.at(t + i)) : row;
      for (index_t c = 0; c < rows.count; c += kLanes) store(to + c, load(from + c * kScanTokens + i * kLanes));
      if (!in_place) write_numbers(rows.format, row, rows.count, rows.at(t + i), rows.stride);
    }
  }

  void walk(const Tile& tile, index_t out_head, const Memory& memory) const {
    const SequenceRun tokens = sequence_run(shape, cu_len, tile.sequence);
    std::array<Rows<const std::byte>, kChannel> channel_rows;
    std::array<Rows<const std::byte>, kShared> shared_rows;
    for (std::size_t n = 0; n < kChannel; ++n) {
      const index_t head = shared_head(tile.head, shape.state_heads, channel[n].extent[1], head_map);
      channel_rows[n] = rows_of<const std::byte>(channel[n], tokens.batch, head, tokens.begin, tile.first, tile.count);
    }
    for (std::size_t n = 0; n < kShared; ++n) {
      const index_t heads = shared[n].extent[1];
      const index_t head = n + 1 == kShared ? shared_head(out_head, shape.out_heads, heads, head_map)
                                            : shared_head(tile.head, shape.state_heads, heads, head_map);
      shared_rows[n] = rows_of<const std::byte>(shared[n], tokens.batch, head, tokens.begin, 0, shared[n].extent[3]);
    }
    const Rows<std::byte> out_rows = rows_of<std::byte>(out, tokens.batch, out_head, tokens.begin, tile.first, tile.count);

    ScanBlock<kChannel, kShared> block;
    for (std::size_t n = 0; n < kShared; ++n) {
      block.shared[n] = memory.shared[n];
      block.shared_stride[n] = shared_rows[n].count;
    }
    const auto ahead = [&](std::size_t n, const auto& rows, index_t t) {
      block.next[n] = rows.at(t + kScanTokens);
      block.next_stride[n] = rows.pos_stride * rows.bytes();
      block.next_step[n] = rows.stride * rows.bytes() * kLanes;
    };
    block.vectors = round_up(tile.count, kLanes) / kLanes;
    const index_t len = tokens.end - tokens.begin;
    for (index_t t = 0; t < len; t += kScanTokens) {
      block.tokens = std::min(kScanTokens, len - t);
      for (std::size_t n = 0; n < kShared; ++n) {
        const Rows<const std::byte>& rows = shared_rows[n];
        for (index_t i = 0; i < block.tokens; ++i)
          read_numbers(rows.format, rows.at(t + i), rows.stride, rows.count, memory.shared[n] + i * rows.count);
      }
      for (std::size_t n = 0; n < kChannel; ++n) read(channel_rows[n], t, block.tokens, memory.row, memory.channel[n]);
      for (std::size_t n = 0; n < kChannel; ++n) ahead(n, channel_rows[n], t);
      ahead(kChannel, out_rows, t);
      for (index_t c = 0; c < tile.count; c += kLanes) {
        for (std::size_t n = 0; n < kChannel; ++n) block.channel[n] = memory.channel[n] + c * kScanTokens;
        block.vector = c / kLanes;
        block.out = memory.out + c * kScanTokens;
        block.state = memory.state + c * policy.state_rows();
        block.constants = memory.constants + c * policy.constant_rows();
        policy.walk(block);
      }
      write(memory.out, t, block.tokens, memory.out_row, out_rows);
    }
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
