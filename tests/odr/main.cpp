// SPDX-License-Identifier: Apache-2.0
// Two units of one source, compiled for two instruction sets and linked into one program. Each must run its own code: right
// results from both, and (check.py, from the symbol table) no function that only one of them could own.
// Compiled for the baseline; asks the CPU before it calls the other unit. Exit 77 = skipped.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "unit.hpp"

namespace {

bool cpu_can_run_other() {
  __builtin_cpu_init();
#if defined(ODR_OTHER_AVX512)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
#else
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
}

constexpr fovea::index_t len_q = 3, len_k = 45, dim = 20;

double error_against_double(const Problem& problem) {
  double worst = 0;
  for (fovea::index_t i = 0; i < len_q; ++i) {
    double weighed[dim] = {}, sum = 0;
    for (fovea::index_t j = 0; j <= i + len_k - len_q; ++j) {
      double score = 0;
      for (fovea::index_t d = 0; d < dim; ++d) score += double(problem.q(0, 0, i, d)) * double(problem.k(0, 0, j, d));
      const double weight = std::exp(score / std::sqrt(double(dim)));
      sum += weight;
      for (fovea::index_t d = 0; d < dim; ++d) weighed[d] += weight * double(problem.v(0, 0, j, d));
    }
    for (fovea::index_t d = 0; d < dim; ++d)
      worst = std::fmax(worst, std::fabs(weighed[d] / sum - double(problem.out(0, 0, i, d))));
  }
  return worst;
}

}   // namespace

int main() {
  if (!cpu_can_run_other()) {
    std::printf("skipped: this CPU cannot run %s\n", odr_other_arch());
    return 77;
  }
  std::vector<float> q(len_q * dim), k(len_k * dim), v(len_k * dim), out(len_q * dim);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(std::sin(0.37 * double(i + 1)));
  for (std::size_t i = 0; i < k.size(); ++i) k[i] = static_cast<float>(std::sin(0.71 * double(i + 1)));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(std::sin(1.13 * double(i + 1)));
  Problem problem{fovea::bhsd<const float>(q.data(), 1, 1, len_q, dim),
                  fovea::bhsd<const float>(k.data(), 1, 1, len_k, dim),
                  fovea::bhsd<const float>(v.data(), 1, 1, len_k, dim),
                  fovea::bhsd(out.data(), 1, 1, len_q, dim),
                  {}};
  problem.options.causal = fovea::Causal::bottom_right;

  bool right = std::strcmp(odr_baseline_arch(), odr_other_arch()) != 0;
  const auto check = [&](const char* unit, const char* arch, bool (*run)(const Problem&)) {
    for (float& x : out) x = -1.f;
    const bool ok = run(problem);
    const double error = error_against_double(problem);
    // |score| < sqrt(20), |v| <= 1: fp32 rounding stays below (20 * sqrt(20) + 2 * 45) * 2^-24 = 1.1e-5.
    const bool good = ok && error <= 1.1e-5;
    std::printf("%s %s error %.1e %s\n", unit, arch, error, good ? "right" : "WRONG");
    right = right && good;
  };
  check("baseline", odr_baseline_arch(), odr_baseline_run);
  check("other", odr_other_arch(), odr_other_run);
  check("baseline", odr_baseline_arch(), odr_baseline_run);
  return right ? 0 : 1;
}
