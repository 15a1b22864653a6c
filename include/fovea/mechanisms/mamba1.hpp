// SPDX-License-Identifier: Apache-2.0
// Mamba's selective scan, S6 (Gu and Dao 2023, arXiv 2312.00752). For channel d and mode n:
//   h_t[n, d] = exp(dt_t[d] A[d, n]) h_{t-1}[n, d] + dt_t[d] B_t[n] x_t[d],   y_t[d] = sum_n C_t[n] h_t[n, d] + D[d] x_t[d].
//
// One exponential per mode, channel and token is what it costs, and three more instructions (write, decay, read). With
// AVX-512 the 16 modes of a vector of channels stay in registers for a block of tokens.
#pragma once
#include "../call/scan_call.hpp"
#include "../simd/decay_exp2.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

namespace mamba1_parts {

// Modes held in registers at a time.
inline constexpr index_t kModes = kLanes == 16 ? 16 : 8;

struct SelectiveScan {
  static constexpr std::size_t kChannelInputs = 2, kSharedInputs = 2;   // x, dt; B, C
  static constexpr std::size_t kX = 0, kDt = 1, kB = 0, kC = 1;

  index_t dim_state;
  View<const float, 3> a;   // [group, channel, dim_state]
  View<const float, 2> d;
  float scale;
  StateLayout layout;
  View<const float, 4> initial;
  View<float, 4> final;

  index_t state_rows() const { return dim_state; }
  // A log2(e) of every mode, and D.
  index_t constant_rows() const { return dim_state + 1; }
  void constants(const ScanPlace& place, float* rows) const {
    read_columns({a.data + place.head * a.stride[0] + place.first * a.stride[1], a.stride[2], a.stride[1]}, dim_state,
                 place.count, rows);
    for (index_t n = 0; n < dim_state; ++n) store(rows + n * kLanes, load(rows + n * kLanes) * f32(kLog2e));
    if (d) read_columns({&d(place.head, place.first), 0, d.stride[1]}, 1, place.count, rows + dim_state * kLanes);
  }
  void load_state(const ScanPlace& place, float* rows) const {
    if (initial)
      read_columns(state_columns(initial, layout, place.sequence, place.head, place.first), dim_state, place.count, rows);
  }
  void save_state(const ScanPlace& place, const float* rows) const {
    if (final)
      write_columns(rows, dim_state, place.count, state_columns(final, layout, place.sequence, place.head, place.first));
  }

  using Block = ScanBlock<kChannelInputs, kSharedInputs>;
  void walk(const Block& block) const {
    index_t n = 0;
    for (; dim_state - n >= kModes; n += kModes) walk_modes<kModes>(block, n);
    for (; dim_state - n >= 4; n += 4) walk_modes<4>(block, n);
    for (; n < dim_state; ++n) walk_modes<1>(block, n);
  }

  // The first modes of a channel begin with D x, the others add to what those before them wrote.
  template <index_t Modes>
  FOVEA_NOINLINE void walk_modes(const Block& block, index_t first) const {
    const float* const rates = block.constants + first * kLanes;
    const f32 skip = load(block.constants + dim_state * kLanes), times(scale);
    float* const state = block.state + first * kLanes;
    f32 h[Modes];
    FOVEA_UNROLL
    for (index_t n = 0; n < Modes; ++n) h[n] = load(state + n * kLanes);
    for (index_t t = 0; t < block.tokens; ++t) {
      if (first == 0) block.prefetch_next(t);
      const f32 x = block.input(kX, t), dt = block.input(kDt, t), written = dt * x;
      const float* const b = block.numbers(kB, t) + first;
      const float* const c = block.numbers(kC, t) + first;
      f32 sum(0.f);
      FOVEA_UNROLL
      for (index_t n = 0; n < Modes; ++n) {
        h[n] = fma(decay_exp2(dt * load(rates + n * kLanes)), h[n], written * f32(b[n]));
        sum = fma(h[n], f32(c[n]), sum);
      }
      float* const y = block.output(t);
      store(y, fma(sum, times, first == 0 ? skip * x : load(y)));
    }
    FOVEA_UNROLL
    for (index_t n = 0; n < Modes; ++n) store(state + n * kLanes, h[n]);
  }
};

inline Scan<SelectiveScan> plan(const Operand& x, const Operand& b, const Operand& c, const Mamba1Parameters<float>& p,
                                const Result& y, const RecurrentOptions<float>& options) {
  const RecurrentShape shape = door::recurrent_shape(c, b, x, options);
  return {{shape.dim_k, tidy(p.a), tidy(p.d), options.scale.value_or(1.f), options.layout, tidy(options.initial_state),
           tidy(options.final_state)},
          shape,
          options.head_map,
          options.cu_len,
          {door::tidy_operand(x), door::tidy_operand(Operand(p.dt))},
          {door::tidy_operand(b), door::tidy_operand(c)},
          door::tidy_operand(y)};
}

inline Status check(const Scan<SelectiveScan>& scan, const View<const float, 4>& dt, RecurrentOptions<float> options) {
  door::Memory memory;
  const RecurrentShape& s = scan.shape;
  if (s.q_heads < 1 || s.k_heads < 1 || s.v_heads < 1)
    return door::invalid("fovea: x groups (%td), b groups (%td) and c groups (%td) must be positive", s.v_heads, s.k_heads,
                         s.q_heads);
  if (s.state_heads % s.k_heads != 0 || s.state_heads % s.v_heads != 0)
    return door::invalid("fovea: b groups (%td) and x groups (%td) do not divide each other", s.k_heads, s.v_heads);
  if (s.out_heads % s.q_heads != 0 || s.out_heads % s.state_heads != 0)
    return door::invalid("fovea: c groups (%td) and states (%td) do not divide each other", s.q_heads, s.state_heads);
  if (Status status = door::check_scan_channels("x", s.dim_v); !status.ok()) return status;
  if (s.dim_k < 1 || s.dim_k > door::kMaxRecurrentDim)
    return door::unsupported("fovea: dim_state %td, 1 to %td are supported", s.dim_k, door::kMaxRecurrentDim);
  const std::array<index_t, 4> x_extent{s.batch, s.v_heads, s.len, s.dim_v}, b_extent{s.batch, s.k_heads, s.len, s.dim_k},
      c_extent{s.batch, s.q_heads, s.len, s.dim_k}, y_extent{s.batch, s.out_heads, s.len, s.dim_v};
  if (Status status = door::check_scan_input("x", scan.channel[0], x_extent, "itself", memory); !status.ok()) return status;
  if (Status status = door::check_scan_input("b", scan.shared[0], b_extent, "x", memory); !status.ok()) return status;
  if (Status status = door::check_scan_input("c", scan.shared[1], c_extent, "x and b", memory); !status.ok()) return status;
  if (Status status = door::check_scan_output("y", scan.out, y_extent, "x, b and c", memory); !status.ok()) return status;
  if (Status status = door::check_gate("dt", dt, s, s.state_heads, s.dim_v, s.dim_v, memory); !status.ok()) return status;
  if (Status status = door::check_parameter("a", scan.policy.a, {s.state_heads, s.dim_v, s.dim_k}, memory); !status.ok())
    return status;
  if (Status status = door::check_like("d", scan.policy.d, std::array<index_t, 2>{s.state_heads, s.dim_v}, memory);
      !status.ok())
    return status;
  if (Status status = door::check_how(s, options); !status.ok()) return status;
  options.initial_state = scan.policy.initial;
  options.final_state = scan.policy.final;
  if (Status status = door::check_states(s, options, memory); !status.ok()) return status;
  return memory.check_apart();
}

}   // namespace mamba1_parts

// Bytes that mamba1 needs with so many lanes.
inline std::size_t mamba1_workspace_bytes(index_t dim_state, int lanes = 1) {
  Operand row;
  row.extent[3] = dim_state;
  return door::scan_bytes(mamba1_parts::plan({}, row, row, {}, {}, {}), lanes);
}

// x, y [batch, group, pos, channel]; b, c [batch, group, pos, dim_state], any plain formats and strides; b, c or x may have
// fewer groups than the others. dt may have extent 1 for batch, group or pos. The state is [sequence, group, dim_state,
// channel], or [sequence, group, channel, dim_state] with StateLayout::v_first, as Mamba keeps it. Of the options, form and
// chunk say nothing here; scale multiplies C and is 1 by itself. y may overlap nothing.
inline Status mamba1(const Operand& x, const Operand& b, const Operand& c, const Mamba1Parameters<float>& parameters,
                     const Result& y, const RecurrentOptions<float>& options = {}) {
  const Scan<mamba1_parts::SelectiveScan> scan = mamba1_parts::plan(x, b, c, parameters, y, options);
  if (Status status = mamba1_parts::check(scan, tidy(parameters.dt), options); !status.ok()) return status;
  return door::run_scan(scan, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
