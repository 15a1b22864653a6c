// SPDX-License-Identifier: Apache-2.0
// RWKV-4's wkv (Peng et al. 2023, arXiv 2305.13048). Per channel, with the decay w < 0 and the bonus u of the newest token,
//   wkv_t = (sum_{s<t} e^{(t-1-s) w + k_s} v_s + e^{u + k_t} v_t) / (the same with v = 1).
// Numerator and denominator are kept divided by e^epsilon, epsilon the largest exponent so far.
//
// Of two terms that are divided by the larger one, one factor is 1: two exponentials a token and channel, not four.
#pragma once
#include "../call/scan_call.hpp"
#include "../simd/decay_exp2.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

namespace rwkv4_parts {

struct WkvScan {
  static constexpr std::size_t kChannelInputs = 2, kSharedInputs = 0;   // k, v
  static constexpr std::size_t kK = 0, kV = 1;
  static constexpr index_t kNumerator = 0, kDenominator = 1, kEpsilon = 2;
  static constexpr float kNothing = -1e38f;   // epsilon before the first token

  View<const float, 2> w, u;   // [head, channel]
  StateLayout layout;
  View<const float, 4> initial;
  View<float, 4> final;

  index_t state_rows() const { return 3; }
  index_t constant_rows() const { return 2; }
  void constants(const ScanPlace& place, float* rows) const {
    read_columns({&w(place.head, place.first), 0, w.stride[1]}, 1, place.count, rows);
    read_columns({&u(place.head, place.first), 0, u.stride[1]}, 1, place.count, rows + kLanes);
  }
  void load_state(const ScanPlace& place, float* rows) const {
    if (initial) {
      read_columns(state_columns(initial, layout, place.sequence, place.head, place.first), 3, place.count, rows);
    } else {
      store(rows + kEpsilon * kLanes, f32(kNothing));
    }
  }
  void save_state(const ScanPlace& place, const float* rows) const {
    if (final) write_columns(rows, 3, place.count, state_columns(final, layout, place.sequence, place.head, place.first));
  }

  void walk(const ScanBlock<kChannelInputs, kSharedInputs>& block) const {
    const f32 decay = load(block.constants), bonus = load(block.constants + kLanes);
    f32 numerator = load(block.state + kNumerator * kLanes), denominator = load(block.state + kDenominator * kLanes);
    f32 epsilon = load(block.state + kEpsilon * kLanes);
    for (index_t t = 0; t < block.tokens; ++t) {
      block.prefetch_next(t);
      const f32 k = block.input(kK, t), v = block.input(kV, t);
      const f32 lead = epsilon - (bonus + k), lesser = decay_exp2(abs(lead) * f32(-kLog2e));
      const keep_t behind = lead > f32(0.f);
      const f32 old = select(behind, f32(1.f), lesser), own = select(behind, lesser, f32(1.f));
      store(block.output(t), fma(old, numerator, own * v) * reciprocal(fma(old, denominator, own)));

      // decay + epsilon is rounded, with a constant decay always in the same direction. What it lost is not lost: `kept`
      // is the exponent that the past has against the new epsilon, almost 0 where epsilon is the decayed one.
      const f32 older = decay + epsilon;
      const keep_t decayed = older > k;
      const f32 newest = select(decayed, older, k), kept = (epsilon - newest) + decay;
      const f32 smaller = decay_exp2(select(decayed, k - newest, kept) * f32(kLog2e));
      const f32 past = select(decayed, f32(1.f), smaller), now = select(decayed, smaller, f32(1.f));
      const f32 more = select(decayed, kept, f32(0.f));
      numerator = fma(past, numerator, fma(more, numerator, now * v));
      denominator = fma(past, denominator, fma(more, denominator, now));
      epsilon = newest;
    }
    store(block.state + kNumerator * kLanes, numerator);
    store(block.state + kDenominator * kLanes, denominator);
    store(block.state + kEpsilon * kLanes, epsilon);
  }
};

inline RecurrentShape shape_of(const Operand& k, const Operand& v, const RecurrentOptions<float>& options) {
  RecurrentShape shape = door::recurrent_shape(k, k, v, options);
  shape.dim_k = 3;
  shape.out_heads = shape.state_heads;
  return shape;
}

inline Scan<WkvScan> plan(const Operand& k, const Operand& v, const Rwkv4Parameters<float>& p, const Result& out,
                          const RecurrentOptions<float>& options) {
  return {{tidy(p.w), tidy(p.u), options.layout, tidy(options.initial_state), tidy(options.final_state)},
          shape_of(k, v, options),
          options.head_map,
          options.cu_len,
          {door::tidy_operand(k), door::tidy_operand(v)},
          {},
          door::tidy_operand(out)};
}

inline Status check(const Scan<WkvScan>& scan, RecurrentOptions<float> options) {
  door::Memory memory;
  const RecurrentShape& s = scan.shape;
  if (s.k_heads < 1 || s.v_heads < 1)
    return door::invalid("fovea: k heads (%td) and v heads (%td) must be positive", s.k_heads, s.v_heads);
  if (s.state_heads % s.k_heads != 0 || s.state_heads % s.v_heads != 0)
    return door::invalid("fovea: k heads (%td) and v heads (%td) do not divide each other", s.k_heads, s.v_heads);
  if (Status status = door::check_scan_channels("v", s.dim_v); !status.ok()) return status;
  const std::array<index_t, 4> k_extent{s.batch, s.k_heads, s.len, s.dim_v}, v_extent{s.batch, s.v_heads, s.len, s.dim_v},
      out_extent{s.batch, s.out_heads, s.len, s.dim_v};
  if (Status status = door::check_scan_input("k", scan.channel[0], k_extent, "v", memory); !status.ok()) return status;
  if (Status status = door::check_scan_input("v", scan.channel[1], v_extent, "itself", memory); !status.ok()) return status;
  if (Status status = door::check_scan_output("out", scan.out, out_extent, "k and v", memory); !status.ok()) return status;
  if (Status status = door::check_parameter("w", scan.policy.w, {s.state_heads, s.dim_v}, memory); !status.ok())
    return status;
  if (Status status = door::check_parameter("u", scan.policy.u, {s.state_heads, s.dim_v}, memory); !status.ok())
    return status;
  if (Status status = door::check_how(s, options); !status.ok()) return status;
  options.initial_state = scan.policy.initial;
  options.final_state = scan.policy.final;
  if (Status status = door::check_states(s, options, memory); !status.ok()) return status;
  return memory.check_apart();
}

}   // namespace rwkv4_parts

// Bytes that rwkv4 needs with so many lanes.
inline std::size_t rwkv4_workspace_bytes(int lanes = 1) {
  return door::scan_bytes(rwkv4_parts::plan({}, {}, {}, {}, {}), lanes);
}

// k, v, out [batch, head, pos, channel], any plain formats and strides; k or v may have fewer heads. The state is [sequence,
// head, 3, channel], or [sequence, head, channel, 3] with StateLayout::v_first: numerator, denominator, epsilon. Without an
// initial state epsilon is -1e38; a state of zeros is another one (a key of exponent 0 and no weight). Of the options,
// scale, form and chunk say nothing here.
inline Status rwkv4(const Operand& k, const Operand& v, const Rwkv4Parameters<float>& parameters, const Result& out,
                    const RecurrentOptions<float>& options = {}) {
  const Scan<rwkv4_parts::WkvScan> scan = rwkv4_parts::plan(k, v, parameters, out, options);
  if (Status status = rwkv4_parts::check(scan, options); !status.ok()) return status;
  return door::run_scan(scan, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
