// SPDX-License-Identifier: Apache-2.0
// What the front doors of the recurrent mechanisms share: the shape of a call, its sequences, and its checks.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "../core/recurrent.hpp"
#include "../core/workspace.hpp"
#include "../engine/deal.hpp"
#include "../engine/recurrent_run.hpp"
#include "../simd/tiles.hpp"
#include "local.hpp"
#include "views.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

inline constexpr index_t kMaxRecurrentDim = 4096;
inline constexpr index_t kMaxStates = index_t{1} << 24;

// The same element has the same place in both: the stride of an axis counts where both have more than one of it. Where one has
// more of an axis, its caller knows that none of the rest is both read and written.
template <class A, class B>
bool stride_alike(const A& a, const B& b) {
  for (std::size_t axis = 0; axis < a.extent.size(); ++axis) {
    if (a.extent[axis] > 1 && b.extent[axis] > 1 && a.stride[axis] != b.stride[axis]) return false;
  }
  return true;
}

// A state that is updated in place has one set of strides.
template <class From, class To>
Status check_in_place(const char* input, const From& from, const char* output, const To& to) {
  if (!from || from.data != to.data || stride_alike(from, to)) return {};
  return invalid("fovea: %s and %s share their memory with different strides", input, output);
}

// The memory of one call: what it writes may not meet anything else that it reads or writes. Null views are absent.
class Memory {
 public:
  template <class Shaped>
  Status reads(const char* name, const Shaped& view) {
    return note(name, view, inputs_, input_count_);
  }
  // What is written must not overlap itself either.
  template <class Shaped>
  Status writes(const char* name, const Shaped& view) {
    if (Status s = note(name, view, outputs_, output_count_); !s.ok()) return s;
    if (view.data != nullptr && !is_empty(view) && !writes_apart(view)) return invalid("fovea: %s overlaps itself", name);
    return {};
  }
  // An output that may be exactly an input (a state updated in place): where data and strides are the same, the two are not
  // compared. One may have more of an axis than the other: a state that grows.
  void may_be(const char* output, const char* input) {
    FOVEA_ASSERT(same_count_ < same_output_.size());
    same_output_[same_count_] = output;
    same_input_[same_count_++] = input;
  }

  Status check_apart() const {
    for (std::size_t o = 0; o < output_count_; ++o) {
      for (std::size_t i = 0; i < input_count_; ++i) {
        if (are_the_same(outputs_[o], inputs_[i])) continue;
        if (Status s = door::check_apart(outputs_[o].range, inputs_[i].range.name, inputs_[i].range.bytes); !s.ok()) return s;
      }
      for (std::size_t other = o + 1; other < output_count_; ++other) {
        if (Status s = door::check_apart(outputs_[o].range, outputs_[other].range.name, outputs_[other].range.bytes); !s.ok())
          return s;
      }
    }
    return {};
  }

 private:
  static constexpr std::size_t kMost = 24;
  struct Noted {
    OutputBytes range;
    const void* data;
    std::array<index_t, 5> extent, stride;
  };
  using Ranges = std::array<Noted, kMost>;

  template <class Shaped>
  static Status note(const char* name, const Shaped& view, Ranges& ranges, std::size_t& count) {
    if (view.data == nullptr && is_absent(view)) return {};
    Bytes bytes;
    if (Status s = check_data(name, view, bytes); !s.ok()) return s;
    FOVEA_ASSERT(count < kMost);
    Noted& noted = ranges[count++];
    noted = {{name, bytes}, view.data, {}, {}};
    static_assert(std::tuple_size_v<decltype(view.extent)> <= 5);
    std::copy(view.extent.begin(), view.extent.end(), noted.extent.begin());
    std::copy(view.stride.begin(), view.stride.end(), noted.stride.begin());
    return {};
  }
  template <class Shaped>
  static bool is_absent(const Shaped& view) {
    return std::all_of(view.extent.begin(), view.extent.end(), [](index_t extent) { return extent == 0; });
  }
  bool are_the_same(const Noted& output, const Noted& input) const {
    if (output.data != input.data || !stride_alike(output, input)) return false;
    for (std::size_t i = 0; i < same_count_; ++i) {
      if (std::strcmp(same_output_[i], output.range.name) == 0 && std::strcmp(same_input_[i], input.range.name) == 0) return true;
    }
    return false;
  }

  Ranges inputs_{}, outputs_{};
  std::size_t input_count_ = 0, output_count_ = 0, same_count_ = 0;
  std::array<const char*, 8> same_output_{}, same_input_{};
};

template <class T>
View<T, 1> view_of(std::span<T> numbers) {
  return {numbers.data(), {static_cast<index_t>(numbers.size())}, {1}};
}

using FOVEA_ARCH::RecurrentShape;
using FOVEA_ARCH::SequenceRun;
using FOVEA_ARCH::sequence_run;

inline index_t count_sequences(index_t batch, std::span<const index_t> cu_len) {
  return cu_len.empty() ? batch : static_cast<index_t>(cu_len.size()) - 1;
}

inline RecurrentShape recurrent_shape(const Operand& q, const Operand& k, const Operand& v,
                                      const RecurrentOptions<float>& options, index_t features = 0) {
  const index_t state_heads = std::max(k.extent[1], v.extent[1]);
  return {v.extent[0],
          v.extent[2],
          count_sequences(v.extent[0], options.cu_len),
          q.extent[1],
          k.extent[1],
          v.extent[1],
          state_heads,
          std::max(q.extent[1], state_heads),
          features != 0 ? features : k.extent[3],
          v.extent[3]};
}

// [batch | 1, head | 1, pos | 1, one of two widths], float; required unless `optional`.
inline Status check_gate(const char* name, const View<const float, 4>& gate, const RecurrentShape& shape, index_t heads,
                         index_t width, index_t other_width, Memory& memory) {
  const std::array<index_t, 3> wanted{shape.batch, heads, shape.len};
  if (gate.data == nullptr && shape.batch * shape.len > 0) return invalid("fovea: %s has null data", name);
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (gate.extent[axis] != 1 && gate.extent[axis] != wanted[axis])
      return invalid("fovea: %s is [%td, %td, %td, %td], must be [1 | %td, 1 | %td, 1 | %td, ..]", name, gate.extent[0],
                     gate.extent[1], gate.extent[2], gate.extent[3], wanted[0], wanted[1], wanted[2]);
  }
  if (gate.extent[3] != width && gate.extent[3] != other_width)
    return invalid("fovea: %s has %td numbers a token, must be %td or %td", name, gate.extent[3], width, other_width);
  return memory.reads(name, gate);
}

inline Status check_decay(const Decay<float>& decay, const RecurrentShape& shape, index_t other_width, Memory& memory) {
  if (decay.form > DecayForm::alpha)
    return invalid("fovea: decay.form is %d, no value of the enum", static_cast<int>(decay.form));
  return check_gate("decay.gate", decay.gate, shape, shape.state_heads, 1, other_width, memory);
}

// One number per state head.
inline Status check_per_head(const char* name, std::span<const float> numbers, const RecurrentShape& shape, Memory& memory) {
  if (static_cast<index_t>(numbers.size()) != shape.state_heads)
    return invalid("fovea: %s has %zu entries for %td states", name, numbers.size(), shape.state_heads);
  return memory.reads(name, view_of(numbers));
}

// [state_head, 1 | dim_v], optional.
inline Status check_head_vectors(const char* name, const View<const float, 2>& numbers, const RecurrentShape& shape,
                                 Memory& memory) {
  if (!numbers) return {};
  if (numbers.extent[0] != shape.state_heads || (numbers.extent[1] != 1 && numbers.extent[1] != shape.dim_v))
    return invalid("fovea: %s is [%td, %td], must be [%td, 1 | %td]", name, numbers.extent[0], numbers.extent[1],
                   shape.state_heads, shape.dim_v);
  return memory.reads(name, numbers);
}

// Extents of an optional tensor that goes with the states; `want` has the shape's numbers in the order of the axes.
template <class T, int Rank, std::size_t Axes>
Status check_like(const char* name, const View<T, Rank>& view, const std::array<index_t, Axes>& want, Memory& memory) {
  static_assert(Axes == static_cast<std::size_t>(Rank));
  if (view.data == nullptr) return {};
  for (std::size_t axis = 0; axis < Axes; ++axis) {
    if (view.extent[axis] != want[axis])
      return invalid("fovea: %s has extent %td on axis %zu, must be %td", name, view.extent[axis], axis, want[axis]);
  }
  if constexpr (std::is_const_v<T>) {
    return memory.reads(name, view);
  } else {
    return memory.writes(name, view);
  }
}

// Tokens before the call, one number per sequence or none at all; `most` with those of the call.
inline Status check_first_pos(std::span<const index_t> first_pos, const RecurrentShape& s, std::span<const index_t> cu_len,
                              index_t most) {
  if (first_pos.empty()) return {};
  if (static_cast<index_t>(first_pos.size()) != s.sequences)
    return invalid("fovea: first_pos has %zu entries for %td sequences", first_pos.size(), s.sequences);
  for (index_t n = 0; n < s.sequences; ++n) {
    const SequenceRun tokens = sequence_run(s, cu_len, n);
    const index_t first = first_pos[static_cast<std::size_t>(n)], last = most - (tokens.end - tokens.begin);
    if (first < 0 || first > last) return invalid("fovea: first_pos[%td] = %td, must be 0 to %td", n, first, last);
  }
  return {};
}

inline Status check_states(const RecurrentShape& s, const RecurrentOptions<float>& o, Memory& memory) {
  const bool v_first = o.layout == StateLayout::v_first;
  const std::array<index_t, 4> want{s.sequences, s.state_heads, v_first ? s.dim_v : s.dim_k, v_first ? s.dim_k : s.dim_v};
  if (Status status = check_like("initial_state", o.initial_state, want, memory); !status.ok()) return status;
  if (Status status = check_like("final_state", o.final_state, want, memory); !status.ok()) return status;
  memory.may_be("final_state", "initial_state");
  return check_in_place("initial_state", o.initial_state, "final_state", o.final_state);
}

inline Status check_how(const RecurrentShape& s, const RecurrentOptions<float>& o) {
  if (s.sequences > kMaxStates / std::max<index_t>(s.state_heads, 1))
    return unsupported("fovea: up to %td states are supported: %td sequences of %td", kMaxStates, s.sequences, s.state_heads);
  if (o.scale && !std::isfinite(*o.scale)) return invalid("fovea: scale %g is not finite", static_cast<double>(*o.scale));
  if (o.head_map > HeadMap::tiled) return invalid("fovea: head_map is %d, no value of the enum", static_cast<int>(o.head_map));
  if (o.layout > StateLayout::v_first) return invalid("fovea: layout is %d, no value of the enum", static_cast<int>(o.layout));
  if (o.form > RecurrentForm::chunked) return invalid("fovea: form is %d, no value of the enum", static_cast<int>(o.form));
  if (o.chunk < 0 || o.chunk > 256) return invalid("fovea: chunk is %td, must be 1 to 256, or 0", o.chunk);
  if (o.panels > Panels::bf16) return invalid("fovea: panels is %d, no value of the enum", static_cast<int>(o.panels));
  if (o.panels == Panels::bf16 && !kHasTileProducts)
    return unsupported("fovea: bf16 panels of recurrences need AVX-512 BF16 or AMX, this is %s", FOVEA_ARCH_NAME);
  if (o.panels == Panels::bf16 && !tile_products_allowed())
    return unsupported("fovea: bf16 panels of recurrences are compiled for AMX, which this system does not give to the process");
  if (Status status = check_lanes(o.executor); !status.ok()) return status;
  if (o.cu_len.empty()) return {};
  if (s.batch != 1) return invalid("fovea: a ragged call has batch 1 and its sequences along pos; batch is %td", s.batch);
  return check_cumulative("cu_len", o.cu_len, s.len);
}

// q [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k], v [batch, v_head, pos, dim_v], out [batch, out_head, pos,
// dim_v]; head counts divide each other; and the options. What is checked is noted in `memory`. features: rows of the states
// where a feature map makes them out of dim_k numbers.
inline Status check_recurrent(const Operand& q, const Operand& k, const Operand& v, const Result& out,
                              const RecurrentOptions<float>& options, Memory& memory, index_t features = 0) {
  for (const auto& [name, format] : {std::pair{"q", q.format}, std::pair{"k", k.format}, std::pair{"v", v.format},
                                     std::pair{"out", out.format}}) {
    if (Status s = check_plain(name, format); !s.ok()) return s;
  }
  const RecurrentShape s = recurrent_shape(q, k, v, options, features);
  if (s.batch < 0 || s.len < 0) return invalid("fovea: v has batch %td and %td positions", s.batch, s.len);
  if (s.q_heads < 1 || s.k_heads < 1 || s.v_heads < 1)
    return invalid("fovea: q heads (%td), k heads (%td) and v heads (%td) must be positive", s.q_heads, s.k_heads, s.v_heads);
  if (s.state_heads % s.k_heads != 0 || s.state_heads % s.v_heads != 0)
    return invalid("fovea: k heads (%td) and v heads (%td) do not divide each other", s.k_heads, s.v_heads);
  if (s.out_heads % s.q_heads != 0 || s.out_heads % s.state_heads != 0)
    return invalid("fovea: q heads (%td) and states (%td) do not divide each other", s.q_heads, s.state_heads);
  if (s.dim_k < 1 || s.dim_v < 1 || s.dim_k > kMaxRecurrentDim || s.dim_v > kMaxRecurrentDim)
    return unsupported("fovea: dims 1 to %td are supported: dim_k %td, dim_v %td", kMaxRecurrentDim, s.dim_k, s.dim_v);
  if (Status status = check_extents("q", q, {s.batch, s.q_heads, s.len, k.extent[3]}, "k and v"); !status.ok()) return status;
  if (Status status = check_extents("k", k, {s.batch, s.k_heads, s.len, k.extent[3]}, "v"); !status.ok()) return status;
  if (Status status = check_extents("out", out, {s.batch, s.out_heads, s.len, s.dim_v}, "q and v"); !status.ok()) return status;
  if (Status status = memory.reads("q", q); !status.ok()) return status;
  if (Status status = memory.reads("k", k); !status.ok()) return status;
  if (Status status = memory.reads("v", v); !status.ok()) return status;
  if (Status status = memory.writes("out", out); !status.ok()) return status;
  if (Status status = check_how(s, options); !status.ok()) return status;
  return check_states(s, options, memory);
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
