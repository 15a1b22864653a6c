// SPDX-License-Identifier: Apache-2.0
// Multi-token attention as plain loops in double: whole score matrices of a sequence, one step after the other, as in
// Golovneva et al. 2025 (arXiv 2504.00927). Inputs are trusted: the call is what validates.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "../core/view.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

// Every step of one sequence, [q_head, row, key]: row r is a query at position first_position + r, the last ones have
// outputs. What a row does not see is 0.
struct MultiTokenSteps {
  index_t sequence, heads, rows, keys, first_position;
  std::vector<double> dots;   // |scale| sum_d |q_d k_d|
  std::vector<double> scores, convolved, mixed, weights, convolved_weights, mixed_weights;

  std::size_t at(index_t head, index_t row, index_t key) const {
    return static_cast<std::size_t>((head * rows + row) * keys + key);
  }
  bool sees(index_t row, index_t key) const { return key <= first_position + row; }
};

inline namespace FOVEA_ARCH {

struct IgnoreSteps {
  void operator()(const MultiTokenSteps&) const {}
};

// f(tap, row, key) for the taps of a kernel around (row, key) that meet a row and a key of the sequence.
template <class Padding, class F>
void multi_token_taps(const View<const float, 3>& kernel, Padding padding, index_t head, const MultiTokenSteps& s,
                      index_t row, index_t key, const F& f) {
  const index_t cq = kernel.extent[1], ck = kernel.extent[2];
  const index_t left = padding == Padding::both ? (ck - 1) / 2 : padding == Padding::left ? ck - 1 : 0;
  for (index_t a = 0; a < cq; ++a) {
    for (index_t b = 0; b < ck; ++b) {
      const index_t i = row - (cq - 1) + a, j = key - left + b;
      if (i >= 0 && j >= 0 && j < s.keys) f(double{kernel(head, a, b)}, i, j);
    }
  }
}

// Options: MultiTokenOptions. out [batch, q_head, len_q, dim_v]. Elements of K and V that no row sees are never read.
template <class Options, class Watch = IgnoreSteps>
void multi_token(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                 const Options& options, Watch&& watch = {}) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const index_t heads = q.extent[1], group = heads / k.extent[1], dim = q.extent[3], dim_v = v.extent[3];
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(dim));
  const index_t sequences = options.cu_len_q.empty() ? q.extent[0] : static_cast<index_t>(options.cu_len_q.size()) - 1;
  for (index_t sequence = 0; sequence < sequences; ++sequence) {
    const auto n = static_cast<std::size_t>(sequence);
    index_t q_batch = sequence, k_batch = sequence, q_begin = 0, k_begin = 0, len_q = q.extent[2], len_k = k.extent[2];
    if (!options.cu_len_q.empty()) {
      q_batch = 0;
      q_begin = options.cu_len_q[n];
      len_q = options.cu_len_q[n + 1] - q_begin;
    }
    if (!options.cu_len_k.empty()) {
      k_batch = 0;
      k_begin = options.cu_len_k[n];
      len_k = options.cu_len_k[n + 1] - k_begin;
    }
    if (!options.len_k.empty()) len_k = options.len_k[n];
    const index_t pos = len_k - len_q, stored = options.q_history ? options.q_history.extent[2] : 0;
    const index_t old = std::clamp<index_t>(pos, 0, stored);

    MultiTokenSteps s{sequence, heads, old + len_q, len_k, pos - old, {}, {}, {}, {}, {}, {}, {}};
    const auto size = static_cast<std::size_t>(heads * s.rows * s.keys);
    s.dots.assign(size, 0);
    s.scores.assign(size, 0);
    const auto query = [&](index_t head, index_t row, index_t d) {
      return double{row < old ? options.q_history(sequence, head, stored - old + row, d)
                              : q(q_batch, head, q_begin + row - old, d)};
    };
    // f(head, row, key) for what a row sees; everything else stays 0, before and after each convolution.
    const auto for_each = [&](const auto& f) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < s.rows; ++i) {
          for (index_t j = 0; j < s.keys && s.sees(i, j); ++j) f(h, i, j);
        }
      }
    };

    for_each([&](index_t h, index_t i, index_t j) {
      double dot = 0, size_of_dot = 0;
      for (index_t d = 0; d < dim; ++d) {
        const double product = query(h, i, d) * double{k(k_batch, h / group, k_begin + j, d)};
        dot += product;
        size_of_dot += std::abs(product);
      }
      s.scores[s.at(h, i, j)] = scale * dot;
      s.dots[s.at(h, i, j)] = std::abs(scale) * size_of_dot;
    });

    const auto convolve = [&](const View<const float, 3>& kernel, const std::vector<double>& from) {
      if (!kernel) return from;
      std::vector<double> to(size);
      for_each([&](index_t h, index_t i, index_t j) {
        multi_token_taps(kernel, options.padding, h, s, i, j,
                         [&](double tap, index_t row, index_t key) { to[s.at(h, i, j)] += tap * from[s.at(h, row, key)]; });
      });
      return to;
    };
    s.convolved = convolve(options.pre, s.scores);
    s.mixed = s.convolved;
    if (options.pre_mix) {
      for_each([&](index_t h, index_t i, index_t j) {
        double sum = 0;
        for (index_t g = 0; g < heads; ++g) sum += double{options.pre_mix(h, g)} * s.convolved[s.at(g, i, j)];
        s.mixed[s.at(h, i, j)] = sum;
      });
    }

    s.weights.assign(size, 0);
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < s.rows; ++i) {
        double top = -infinity, sum = 0;
        for (index_t j = 0; j < s.keys && s.sees(i, j); ++j) top = std::max(top, s.mixed[s.at(h, i, j)]);
        for (index_t j = 0; j < s.keys && s.sees(i, j); ++j) sum += std::exp(s.mixed[s.at(h, i, j)] - top);
        for (index_t j = 0; j < s.keys && s.sees(i, j); ++j)
          s.weights[s.at(h, i, j)] = std::exp(s.mixed[s.at(h, i, j)] - top) / sum;
      }
    }

    s.convolved_weights = convolve(options.post, s.weights);
    s.mixed_weights = s.convolved_weights;
    if (options.post_mix) {
      const index_t together = options.post_mix.extent[1];
      for_each([&](index_t h, index_t i, index_t j) {
        const index_t first = h / together * together;
        double sum = 0;
        for (index_t g = 0; g < together; ++g)
          sum += double{options.post_mix(h / together, g, h - first)} * s.convolved_weights[s.at(first + g, i, j)];
        s.mixed_weights[s.at(h, i, j)] = sum;
      });
    }

    std::vector<double> row(static_cast<std::size_t>(dim_v)), gated(row);
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = old; i < s.rows; ++i) {
        double squares = 0;
        for (std::size_t d = 0; d < row.size(); ++d) {
          row[d] = 0;
          for (index_t j = 0; j < s.keys && s.sees(i, j); ++j)
            row[d] += s.mixed_weights[s.at(h, i, j)] * double{v(k_batch, h / group, k_begin + j, static_cast<index_t>(d))};
          squares += row[d] * row[d];
        }
        const double mean = squares / static_cast<double>(dim_v) + double{options.norm_eps};
        for (std::size_t d = 0; options.norm && d < row.size(); ++d) {
          row[d] *= mean == 0 ? 0 : double{options.norm_factor} / std::sqrt(mean);   // 0: a row that sees no key, with eps 0
          if (!options.norm_weight.empty()) row[d] *= double{options.norm_weight[d]};
        }
        gated = row;
        for (std::size_t d = 0; options.gate && d < row.size(); ++d) {
          const std::size_t unit = options.gate.extent[0] == 1 ? 0 : d;
          double logit = options.gate_bias.empty() ? 0 : double{options.gate_bias[unit]};
          for (std::size_t e = 0; e < row.size(); ++e)
            logit += double{options.gate(static_cast<index_t>(unit), static_cast<index_t>(e))} * row[e];
          gated[d] = row[d] / (1 + std::exp(-logit));
        }
        for (std::size_t d = 0; d < row.size(); ++d) out(q_batch, h, q_begin + i - old, static_cast<index_t>(d)) = gated[d];
      }
    }
    watch(s);
  }
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
