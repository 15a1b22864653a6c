// SPDX-License-Identifier: Apache-2.0
// S4D (Gu et al. 2022, arXiv 2206.11893). Per channel, over complex modes n with A_n = -exp(log_a_real) + i a_imag:
//   s_n <- e^{dt A_n} s_n + u_t,   y_t = 2 Re sum_n C_n (e^{dt A_n} - 1) / A_n s_n + D u_t.
//
// The factors are the same for all tokens, so what is wrong about them adds up: a mode that remembers 2000 tokens turns an
// fp32 factor's 3e-8 into 6e-5. They are made in double once per call, and kept as e^{dt A} - 1, which fp32 holds to 6e-8 of
// itself: s <- s + ((e^{dt A} - 1) s + u), for two additions more.
#pragma once
#include <cmath>

#include "../call/scan_call.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

namespace s4d_parts {

inline constexpr index_t kModes = 4;   // with a real and an imaginary part in registers at a time

struct ModeScan {
  static constexpr std::size_t kChannelInputs = 1, kSharedInputs = 0;   // u
  static constexpr index_t kRows = 5;                                   // of constants of a mode

  index_t modes;
  View<const float, 2> log_a_real, a_imag, c_real, c_imag;   // [channel, mode]
  std::span<const float> log_dt, d;                          // [channel]
  View<const float, 4> initial;                              // [sequence, channel, mode, 2]
  View<float, 4> final;

  index_t state_rows() const { return 2 * modes; }
  // Of a mode: e^{dt A} - 1 real, imaginary and minus imaginary, what is read of it real and minus imaginary. Then D.
  index_t constant_rows() const { return kRows * modes + 1; }
  void constants(const ScanPlace& place, float* rows) const {
    for (index_t lane = 0; lane < place.count; ++lane) {
      const index_t channel = place.first + lane;
      const double dt = std::exp(double{log_dt[static_cast<std::size_t>(channel)]});
      for (index_t n = 0; n < modes; ++n) {
        const double a_re = -std::exp(double{log_a_real(channel, n)}), a_im = a_imag(channel, n);
        const double c_re = c_real(channel, n), c_im = c_imag(channel, n);
        // e^{x + iy} - 1 = e^x cos y - 1 + i e^x sin y, without the difference of numbers close to 1.
        const double shrunk = std::expm1(dt * a_re), size = 1 + shrunk;
        const double half_sine = std::sin(dt * a_im / 2), half_cosine = std::cos(dt * a_im / 2);
        const double re = shrunk - 2 * size * half_sine * half_sine, im = 2 * size * half_sine * half_cosine;
        const double over_re = (re * a_re + im * a_im) / (a_re * a_re + a_im * a_im),
                     over_im = (im * a_re - re * a_im) / (a_re * a_re + a_im * a_im);
        float* const row = rows + kRows * n * kLanes + lane;
        row[0] = static_cast<float>(re);
        row[kLanes] = static_cast<float>(im);
        row[2 * kLanes] = static_cast<float>(-im);
        row[3 * kLanes] = static_cast<float>(2 * (c_re * over_re - c_im * over_im));
        row[4 * kLanes] = static_cast<float>(-2 * (c_re * over_im + c_im * over_re));
      }
      rows[kRows * modes * kLanes + lane] = d[static_cast<std::size_t>(channel)];
    }
  }
  // [mode, part] -> row; the parts are mostly next to each other.
  template <class T>
  StateColumns<T> columns(const View<T, 4>& states, const ScanPlace& place, index_t part) const {
    return {states.data + place.sequence * states.stride[0] + place.first * states.stride[1] + part * states.stride[3],
            states.stride[2], states.stride[1]};
  }
  void load_state(const ScanPlace& place, float* rows) const {
    for (index_t part = 0; initial && part < 2; ++part)
      read_columns(columns(initial, place, part), modes, place.count, rows + part * kLanes, 2 * kLanes);
  }
  void save_state(const ScanPlace& place, const float* rows) const {
    for (index_t part = 0; final && part < 2; ++part)
      write_columns(rows + part * kLanes, modes, place.count, columns(final, place, part), 2 * kLanes);
  }

  using Block = ScanBlock<kChannelInputs, kSharedInputs>;
  void walk(const Block& block) const {
    index_t n = 0;
    for (; modes - n >= kModes; n += kModes) walk_modes<kModes>(block, n);
    for (; n < modes; ++n) walk_modes<1>(block, n);
  }

  // The first modes of a channel begin with D u, the others add to what those before them wrote.
  template <index_t Modes>
  FOVEA_NOINLINE void walk_modes(const Block& block, index_t first) const {
    const float* const rows = block.constants + kRows * first * kLanes;
    const f32 skip = load(block.constants + kRows * modes * kLanes);
    float* const state = block.state + 2 * first * kLanes;
    f32 re[Modes], im[Modes];
    FOVEA_UNROLL
    for (index_t n = 0; n < Modes; ++n) {
      re[n] = load(state + 2 * n * kLanes);
      im[n] = load(state + (2 * n + 1) * kLanes);
    }
    for (index_t t = 0; t < block.tokens; ++t) {
      if (first == 0) block.prefetch_next(t);
      const f32 u = block.input(0, t);
      float* const y = block.output(t);
      f32 sum = first == 0 ? skip * u : load(y);
      FOVEA_UNROLL
      for (index_t n = 0; n < Modes; ++n) {
        const float* const row = rows + kRows * n * kLanes;
        const f32 change_re = fma(load(row + 2 * kLanes), im[n], fma(load(row), re[n], u));
        const f32 change_im = fma(load(row + kLanes), re[n], load(row) * im[n]);
        re[n] = re[n] + change_re;
        im[n] = im[n] + change_im;
        sum = fma(load(row + 4 * kLanes), im[n], fma(load(row + 3 * kLanes), re[n], sum));
      }
      store(y, sum);
    }
    FOVEA_UNROLL
    for (index_t n = 0; n < Modes; ++n) {
      store(state + 2 * n * kLanes, re[n]);
      store(state + (2 * n + 1) * kLanes, im[n]);
    }
  }
};

inline Scan<ModeScan> plan(const Operand& u, const S4dParameters<float>& p, const Result& y,
                           const RecurrentOptions<float>& options) {
  RecurrentShape shape{};
  shape.batch = u.extent[0];
  shape.len = u.extent[2];
  shape.sequences = door::count_sequences(u.extent[0], options.cu_len);
  shape.state_heads = shape.out_heads = 1;
  shape.dim_v = u.extent[3];
  return {{p.c_real.extent[1], tidy(p.log_a_real), tidy(p.a_imag), tidy(p.c_real), tidy(p.c_imag), p.log_dt, p.d,
           tidy(p.initial_state), tidy(p.final_state)},
          shape,
          HeadMap::blocks,
          options.cu_len,
          {door::tidy_operand(u)},
          {},
          door::tidy_operand(y)};
}

inline Status check(const Scan<ModeScan>& scan, const RecurrentOptions<float>& options) {
  door::Memory memory;
  const RecurrentShape& s = scan.shape;
  const ModeScan& p = scan.policy;
  const std::array<index_t, 4> extent{s.batch, 1, s.len, s.dim_v};
  if (Status status = door::check_scan_channels("u", s.dim_v); !status.ok()) return status;
  if (Status status = door::check_scan_input("u", scan.channel[0], extent, "one head", memory); !status.ok()) return status;
  if (Status status = door::check_scan_output("y", scan.out, extent, "u", memory); !status.ok()) return status;
  if (p.modes < 1 || p.modes > door::kMaxRecurrentDim)
    return door::unsupported("fovea: %td modes, 1 to %td are supported", p.modes, door::kMaxRecurrentDim);
  const std::array<index_t, 2> modes{s.dim_v, p.modes};
  if (Status status = door::check_parameter("log_a_real", p.log_a_real, modes, memory); !status.ok()) return status;
  if (Status status = door::check_parameter("a_imag", p.a_imag, modes, memory); !status.ok()) return status;
  if (Status status = door::check_parameter("c_real", p.c_real, modes, memory); !status.ok()) return status;
  if (Status status = door::check_parameter("c_imag", p.c_imag, modes, memory); !status.ok()) return status;
  const View<const float, 1> log_dt = door::view_of(p.log_dt), d = door::view_of(p.d);
  if (Status status = door::check_parameter("log_dt", log_dt, {s.dim_v}, memory); !status.ok()) return status;
  if (Status status = door::check_parameter("d", d, {s.dim_v}, memory); !status.ok()) return status;
  if (options.initial_state || options.final_state)
    return door::invalid("fovea: the states of s4d stand in S4dParameters, not in the options");
  if (Status status = door::check_how(s, options); !status.ok()) return status;
  const std::array<index_t, 4> states{s.sequences, s.dim_v, p.modes, 2};
  if (Status status = door::check_like("initial_state", p.initial, states, memory); !status.ok()) return status;
  if (Status status = door::check_like("final_state", p.final, states, memory); !status.ok()) return status;
  memory.may_be("final_state", "initial_state");
  if (Status status = door::check_in_place("initial_state", p.initial, "final_state", p.final); !status.ok()) return status;
  return memory.check_apart();
}

}   // namespace s4d_parts

// Bytes that s4d needs with so many lanes.
inline std::size_t s4d_workspace_bytes(index_t modes, int lanes = 1) {
  S4dParameters<float> parameters;
  parameters.c_real.extent = {1, modes};
  return door::scan_bytes(s4d_parts::plan({}, parameters, {}, {}), lanes);
}

// u, y [batch, 1, pos, channel], any plain formats and strides; states stand in the parameters. Of the options, cu_len,
// executor and workspace.
inline Status s4d(const Operand& u, const S4dParameters<float>& parameters, const Result& y,
                  const RecurrentOptions<float>& options = {}) {
  const Scan<s4d_parts::ModeScan> scan = s4d_parts::plan(u, parameters, y, options);
  if (Status status = s4d_parts::check(scan, options); !status.ok()) return status;
  return door::run_scan(scan, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
