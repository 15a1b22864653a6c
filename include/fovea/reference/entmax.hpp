// SPDX-License-Identifier: Apache-2.0
// Sparsemax (Martins and Astudillo 2016, arXiv 1602.02068), 1.5-entmax and alpha-entmax (Peters, Niculae and Martins 2019,
// arXiv 1905.05702) of one row in double, by sorting and by bisection: what a row of reference::variant is weighed with.
#pragma once
#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "../core/types.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// z sorted; k = max{k : 1 + k z_(k) > sum_{r <= k} z_(r)};  tau = (sum_{r <= k} z_(r) - 1) / k;  p = max(z - tau, 0).
struct SparsemaxWeights {
  void operator()(std::span<double> scores) const {
    std::vector<double> sorted(scores.begin(), scores.end());
    std::sort(sorted.rbegin(), sorted.rend());
    const double max = sorted.front();
    double sum = 0, tau = 0, count = 0;
    for (const double z : sorted) {
      sum += z - max;
      count += 1;
      if (1 + count * (z - max) > sum) tau = (sum - 1) / count;
    }
    for (double& s : scores) s = std::max(s - max - tau, 0.);
  }
};

// z = (s - max) / 2, sorted; of the k largest: mean M_k, S_k = k (mean of squares - M_k^2), tau_k = M_k - sqrt((1 - S_k) / k).
// tau_k <= z_(k) holds for the first k up to some last one, whose tau counts;  p = max(z - tau, 0)^2.
struct Entmax15Weights {
  void operator()(std::span<double> scores) const {
    std::vector<double> sorted(scores.begin(), scores.end());
    std::sort(sorted.rbegin(), sorted.rend());
    const double max = sorted.front();
    double sum = 0, squares = 0, tau = 0, count = 0;
    for (const double s : sorted) {
      const double z = (s - max) / 2;
      sum += z;
      squares += z * z;
      count += 1;
      const double mean = sum / count, spread = squares - count * mean * mean;
      const double tau_k = mean - std::sqrt(std::max(0., (1 - spread) / count));
      if (tau_k <= z) tau = tau_k;
    }
    for (double& s : scores) {
      const double p = std::max((s - max) / 2 - tau, 0.);
      s = p * p;
    }
  }
};

// tau in [max - 1, max - n^(1 - alpha)] of z = (alpha - 1) s by bisection, then divided by the sum.
struct EntmaxWeights {
  double alpha;

  void operator()(std::span<double> scores) const {
    const double max = *std::max_element(scores.begin(), scores.end()), power = 1 / (alpha - 1);
    const auto weight = [&](double s, double tau) {
      const double z = (alpha - 1) * (s - max) - tau;
      return z > 0 ? std::pow(z, power) : 0.;
    };
    double low = -1, high = -std::pow(static_cast<double>(scores.size()), 1 - alpha);
    for (int step = 0; step < 60; ++step) {
      const double tau = (low + high) / 2;
      double sum = 0;
      for (const double s : scores) sum += weight(s, tau);
      (sum >= 1 ? low : high) = tau;
    }
    double sum = 0;
    for (double& s : scores) sum += s = weight(s, low);
    for (double& s : scores) s /= sum;
  }
};

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
