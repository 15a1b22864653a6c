// SPDX-License-Identifier: Apache-2.0
// Scores to lists, above the kernels of simd/select.hpp: many rows, long rows on all lanes, and the smallest set of a given
// mass. Results never depend on the number of lanes. Everything trusts its arguments (docs/selection.md).
#pragma once
#include <utility>

#include "../../core/executor.hpp"
#include "../../core/view.hpp"
#include "../../simd/select.hpp"
#include "../deal.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Row r of `scores` [row, score] (innermost stride 1) is cut to its first lengths[r] scores; no lengths: all. to [row, k],
// each as top_k writes it; counts [row] or null.
inline std::size_t top_k_rows_scratch_bytes(index_t n, index_t k, int lanes);
inline void top_k_rows(const View<const float, 2>& scores, std::span<const index_t> lengths, index_t k, std::int32_t* to,
                       std::int32_t* counts, const Executor& executor, TopKScratch scratch);

// One row on all lanes of the executor, with the result of top_k(scores, k, to, scratch). For rows of a million scores; many
// shorter ones are better dealt out whole.
inline std::size_t top_k_lanes_scratch_bytes(index_t n, index_t k);
inline index_t top_k(std::span<const float> scores, index_t k, std::int32_t* to, TopKScratch scratch,
                     const Executor& executor);

// The smallest set, in the order (weight descending, index ascending), whose weights sum to at least p times the sum of all;
// to `to` [n], ascending; how many. p >= 1 takes every weight, zeros too, where a sum in floating point would stop early; p
// <= 0 none. Weights are finite; negative ones and NaN are not there. Sums are of doubles, in an order that the weights
// alone decide.
inline std::size_t top_p_scratch_bytes();
inline index_t top_p(std::span<const float> weights, double p, std::int32_t* to, std::span<std::byte> scratch);
// The same for a given mass, where some of the whole is taken already: all positive weights if they do not reach it.
inline index_t top_mass(std::span<const float> weights, double mass, std::int32_t* to, std::span<std::byte> scratch);

inline std::size_t top_k_rows_scratch_bytes(index_t n, index_t k, int lanes) {
  return top_k_scratch_bytes(n, k) * static_cast<std::size_t>(lanes);
}

inline void top_k_rows(const View<const float, 2>& scores, std::span<const index_t> lengths, index_t k, std::int32_t* to,
                       std::int32_t* counts, const Executor& executor, TopKScratch scratch) {
  const std::size_t slice = top_k_rows_scratch_bytes(scores.extent[1], k, 1);
  FOVEA_ASSERT(scratch.size() >= slice * static_cast<std::size_t>(executor.lanes()));
  FOVEA_ASSERT(scores.stride[1] == 1 || scores.extent[1] <= 1);
  deal(executor, executor.lanes(), scores.extent[0], [&](int lane, index_t row) {
    const index_t length = lengths.empty() ? scores.extent[1] : lengths[static_cast<std::size_t>(row)];
    const std::span<const float> of_row{scores.data + row * scores.stride[0], static_cast<std::size_t>(length)};
    const index_t taken = top_k(of_row, k, to + row * k, scratch.subspan(slice * static_cast<std::size_t>(lane), slice));
    if (counts != nullptr) counts[row] = static_cast<std::int32_t>(taken);
  });
}

namespace selection {

inline constexpr index_t kLaneScores = index_t{1} << 15;   // of one task
static_assert(kLaneScores % kWord == 0);

}   // namespace selection

inline std::size_t top_k_lanes_scratch_bytes(index_t n, index_t k) {
  const index_t tasks = (n + selection::kLaneScores - 1) / selection::kLaneScores;
  return top_k_scratch_bytes(n, k) + static_cast<std::size_t>(tasks) * sizeof(index_t) + kAlignment;
}

inline index_t top_k(std::span<const float> scores, index_t k, std::int32_t* to, TopKScratch scratch,
                     const Executor& executor) {
  using namespace selection;
  const auto n = static_cast<index_t>(scores.size());
  const index_t tasks = (n + kLaneScores - 1) / kLaneScores;
  if (k <= 0 || executor.lanes() == 1 || tasks < 2 || !is_sampled(n, k)) return top_k(scores, k, to, scratch);
  FOVEA_ASSERT(scratch.size() >= top_k_lanes_scratch_bytes(n, k));
  Bump bump(aligned(scratch).data());
  const Memory memory = carve(bump, n, k);
  index_t* const marks = bump.take<index_t>(tasks);
  const float bound = sample_bound(scores.data(), n, k, memory.keys);
  deal(executor, executor.lanes(), tasks, [&](int, index_t task) {
    const index_t first = task * kLaneScores;
    marks[task] =
        mark_at_least(scores.data() + first, std::min(kLaneScores, n - first), bound, memory.words + first / kWord);
  });
  index_t marked = 0;
  for (index_t task = 0; task < tasks; ++task) marked += std::exchange(marks[task], marked);
  index_t taken;
  if (is_enough(marked, k, bound, memory.room)) {
    deal(executor, executor.lanes(), tasks, [&](int, index_t task) {
      const index_t first = task * kLaneScores, here = std::min(kLaneScores, n - first), begin = marks[task];
      const index_t end = task + 1 < tasks ? marks[task + 1] : marked;
      list_marked(memory.words + first / kWord, (here + kWord - 1) / kWord, first, memory.names + begin, end - begin);
    });
    taken = take_candidates(scores.data(), memory.names, marked, k, memory.keys, to);
  } else {
    taken = take_by_passes(scores.data(), n, k, bound, memory.words, to);
  }
  std::fill(to + taken, to + k, -1);
  return taken;
}

namespace selection {

// A positive float's bits order it; they are read in digits of 11, 11 and 9 bits, the highest first.
struct Digit {
  int shift, bits;
};
inline constexpr Digit kDigits[3] = {{20, 11}, {9, 11}, {0, 9}};
inline constexpr index_t kBins = index_t{1} << 11;

// mass[d]: the sum of the positive weights whose highest digit is d.
inline void sum_by_first_digit(std::span<const float> weights, double* mass) {
  std::fill_n(mass, kBins, 0.);
  for (const float weight : weights) {
    const auto bits = std::bit_cast<std::int32_t>(weight);
    if (bits > 0 && bits <= kInfinity) mass[bits >> kDigits[0].shift] += static_cast<double>(weight);
  }
}
// The same of a later digit, over the listed weights of which the bits above it are `prefix`.
inline void sum_by_digit(std::span<const float> weights, std::span<const std::int32_t> listed, Digit digit,
                         std::int32_t prefix, double* mass) {
  std::fill_n(mass, kBins, 0.);
  const std::int32_t mask = (std::int32_t{1} << digit.bits) - 1;
  for (const std::int32_t i : listed) {
    const float weight = weights[static_cast<std::size_t>(i)];
    const auto bits = std::bit_cast<std::int32_t>(weight);
    if (bits >> digit.shift >> digit.bits == prefix) mass[(bits >> digit.shift) & mask] += static_cast<double>(weight);
  }
}

// The digit at which the sum from the highest one down reaches `mass`, or the lowest one in use. `above`, what stands
// before, grows.
inline std::int32_t digit_of(const double* mass_by_digit, double mass, double& above) {
  std::int32_t lowest = -1;
  double before = above;
  for (index_t d = kBins - 1; d >= 0; --d) {
    if (mass_by_digit[d] == 0) continue;
    lowest = static_cast<std::int32_t>(d);
    before = above;
    if (above + mass_by_digit[d] >= mass) break;
    above += mass_by_digit[d];
  }
  above = before;
  return lowest;
}

// The first digit is summed already.
inline index_t take_mass(std::span<const float> weights, double mass, double* mass_by_digit, std::int32_t* to) {
  if (!(mass > 0)) return 0;
  double above = 0;
  std::int32_t prefix = digit_of(mass_by_digit, mass, above);
  if (prefix < 0) return 0;
  const std::int32_t lowest = prefix << kDigits[0].shift, digit_end = lowest + (std::int32_t{1} << kDigits[0].shift) - 1;
  const i32 first(lowest), last(std::min(digit_end, kInfinity));
  const auto in_digit = [&](f32 x) { return keep_bits(as_keep((float_bits(x) >= first) & (float_bits(x) <= last))); };
  const std::span<const std::int32_t> listed(to, static_cast<std::size_t>(select_where(weights, in_digit, to)));
  for (const Digit& digit : {kDigits[1], kDigits[2]}) {
    sum_by_digit(weights, listed, digit, prefix, mass_by_digit);
    prefix = prefix << digit.bits | std::max(digit_of(mass_by_digit, mass, above), 0);
  }
  const double weight = static_cast<double>(std::bit_cast<float>(prefix));
  const auto reaches = [&](index_t ties) { return above + weight * static_cast<double>(ties) >= mass; };
  const auto n = static_cast<index_t>(weights.size());
  const double wanted = (mass - above) / weight;
  index_t ties = wanted < static_cast<double>(n) ? std::max<index_t>(static_cast<index_t>(wanted), 1) : n;
  while (ties < n && !reaches(ties)) ++ties;
  while (ties > 1 && reaches(ties - 1)) --ties;
  return select_where(
      weights, [&](f32 x) { return taken_bits(order_keys(x), prefix, ties); }, to);
}

inline double* mass_memory(std::span<std::byte> scratch) {
  FOVEA_ASSERT(scratch.size() >= top_p_scratch_bytes());
  return Bump(aligned(scratch).data()).take<double>(kBins);
}

}   // namespace selection

inline std::size_t top_p_scratch_bytes() { return static_cast<std::size_t>(selection::kBins) * sizeof(double) + kAlignment; }

inline index_t top_mass(std::span<const float> weights, double mass, std::int32_t* to, std::span<std::byte> scratch) {
  using namespace selection;
  double* const mass_by_digit = mass_memory(scratch);
  sum_by_first_digit(weights, mass_by_digit);
  return take_mass(weights, mass, mass_by_digit, to);
}

inline index_t top_p(std::span<const float> weights, double p, std::int32_t* to, std::span<std::byte> scratch) {
  using namespace selection;
  if (p >= 1) return select_at_least(weights, 0.f, to);
  double* const mass_by_digit = mass_memory(scratch);
  sum_by_first_digit(weights, mass_by_digit);
  double whole = 0;
  for (index_t d = kBins - 1; d >= 0; --d) whole += mass_by_digit[d];
  return take_mass(weights, p * whole, mass_by_digit, to);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
