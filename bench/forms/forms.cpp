// SPDX-License-Identifier: Apache-2.0
// Prints the lines of include/fovea/engine/recurrent_table.hpp for the vectors this program was compiled for: every form at
// every small number of tokens, in turns, four heads of their own keys, states in the caches, one thread. The other numbers of
// lanes: the same with FOVEA_ARCH_FLAGS="-mavx2 -mfma" and "-msse2" in a build folder of their own.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "fovea/mechanisms/gated_delta.hpp"
#include "fovea/mechanisms/gla.hpp"
#include "fovea/mechanisms/kda.hpp"
#include "fovea/mechanisms/rwkv7.hpp"
#include "fovea/mechanisms/simple_gla.hpp"

namespace {

using fovea::index_t;
using fovea::RecurrentForm;

constexpr index_t kHeads = 4, kMostTokens = 1024;
constexpr int kTurns = 9;
constexpr double kWindow = 1.5e-3;   // seconds

struct Problem {
  index_t dim, len;
  std::vector<float>& numbers;

  fovea::Tensor<float> tensor(index_t which, index_t width) const {
    const index_t size = kHeads * kMostTokens * 256;
    return fovea::bhsd(numbers.data() + which * size, 1, kHeads, len, width);
  }
  fovea::RecurrentOptions<float> options(RecurrentForm form, index_t chunk) const {
    const fovea::Tensor<float> all = tensor(7, dim);
    const fovea::Tensor<float> state = fovea::bhsd(all.data, 1, kHeads, dim, dim);
    fovea::RecurrentOptions<float> how;
    how.initial_state = how.final_state = state;
    how.form = form;
    how.chunk = chunk;
    return how;
  }
};

struct Kind {
  const char* written;
  bool by_key;
  std::function<fovea::Status(const Problem&, const fovea::RecurrentOptions<float>&)> call;
};

// Gates of one factor a token in tensor 4, of one a channel in 5, strengths in 6; keys small enough for a delta rule.
const Kind kKinds[] = {
    {"additive", false,
     [](const Problem& p, const auto& how) {
       return fovea::simple_gla(p.tensor(0, p.dim), p.tensor(1, p.dim), p.tensor(2, p.dim), {p.tensor(4, 1)}, p.tensor(3, p.dim), how);
     }},
    {"additive", true,
     [](const Problem& p, const auto& how) {
       return fovea::gla(p.tensor(0, p.dim), p.tensor(1, p.dim), p.tensor(2, p.dim), {p.tensor(5, p.dim)}, p.tensor(3, p.dim), how);
     }},
    {"delta", false,
     [](const Problem& p, const auto& how) {
       return fovea::gated_delta_net(p.tensor(0, p.dim), p.tensor(1, p.dim), p.tensor(2, p.dim), {p.tensor(4, 1)}, p.tensor(6, 1),
                                     p.tensor(3, p.dim), how);
     }},
    {"delta", true,
     [](const Problem& p, const auto& how) {
       return fovea::kda(p.tensor(0, p.dim), p.tensor(1, p.dim), p.tensor(2, p.dim), {p.tensor(5, p.dim)}, p.tensor(6, 1),
                         p.tensor(3, p.dim), how);
     }},
    {"dplr", true,
     [](const Problem& p, const auto& how) {
       return fovea::rwkv7(p.tensor(0, p.dim), p.tensor(1, p.dim), p.tensor(2, p.dim), {p.tensor(5, p.dim)}, p.tensor(1, p.dim),
                           p.tensor(6, p.dim), p.tensor(3, p.dim), how);
     }},
};

void fill(std::vector<float>& numbers) {
  std::uint32_t state = 1;
  const std::size_t size = numbers.size() / 8;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = static_cast<float>(state >> 8) * 0x1p-24f;   // [0, 1)
    const std::size_t which = i / size;
    numbers[i] = which == 4 || which == 5 ? -0.1f * x : which == 6 ? 0.5f * x : 0.1f * (x - 0.5f);
  }
}

double seconds_of(const Kind& kind, const Problem& problem, const fovea::RecurrentOptions<float>& how, index_t calls) {
  const auto begin = std::chrono::steady_clock::now();
  for (index_t i = 0; i < calls; ++i) {
    if (fovea::Status status = kind.call(problem, how); !status.ok()) {
      std::fprintf(stderr, "forms: %s\n", status.message());
      std::exit(1);
    }
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / static_cast<double>(calls);
}

struct Way {
  RecurrentForm form;
  index_t chunk;
};

// Medians of a call's seconds, the ways in turns.
std::vector<double> medians(const Kind& kind, const Problem& problem, const std::vector<Way>& ways) {
  std::vector<std::vector<double>> samples(ways.size());
  std::vector<index_t> calls;
  for (const Way& way : ways) {
    const auto how = problem.options(way.form, way.chunk);
    seconds_of(kind, problem, how, 1);
    calls.push_back(std::max<index_t>(static_cast<index_t>(kWindow / seconds_of(kind, problem, how, 2)), 1));
  }
  for (int turn = 0; turn < kTurns; ++turn) {
    for (std::size_t w = 0; w < ways.size(); ++w)
      samples[w].push_back(seconds_of(kind, problem, problem.options(ways[w].form, ways[w].chunk), calls[w]));
  }
  std::vector<double> found;
  for (std::vector<double>& of_way : samples) {
    std::nth_element(of_way.begin(), of_way.begin() + kTurns / 2, of_way.end());
    found.push_back(of_way[kTurns / 2]);
  }
  return found;
}

// Chunks of a prompt; another length than 32 only where it gains 5 %.
index_t best_chunk(const Kind& kind, index_t dim, std::vector<float>& numbers) {
  const std::vector<Way> ways = {
      {RecurrentForm::chunked, 32}, {RecurrentForm::chunked, 16}, {RecurrentForm::chunked, 48}, {RecurrentForm::chunked, 64}};
  const std::vector<double> t = medians(kind, {dim, kMostTokens, numbers}, ways);
  std::fprintf(stderr, "%-8s %d dim %3td, %td tokens:", kind.written, kind.by_key, dim, kMostTokens);
  for (std::size_t w = 0; w < ways.size(); ++w) std::fprintf(stderr, " chunks of %td %.1f", ways[w].chunk, 1e6 * t[w]);
  std::fprintf(stderr, " us\n");
  const auto best = std::min_element(t.begin(), t.end());
  return *best < 0.95 * t[0] ? ways[static_cast<std::size_t>(best - t.begin())].chunk : 32;
}

struct UpTo {
  index_t step = 0, fused = 0;
};

// Up to the first two lengths in a row at which chunks are faster.
UpTo measured_limits(const Kind& kind, index_t dim, index_t chunk, std::vector<float>& numbers) {
  UpTo found;
  int step_lost = 0, fused_lost = 0;
  for (const index_t len : {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32}) {
    if (step_lost == 2 && fused_lost == 2) break;
    const std::vector<double> t = medians(
        kind, {dim, len, numbers}, {{RecurrentForm::step, 0}, {RecurrentForm::fused, 0}, {RecurrentForm::chunked, chunk}});
    std::fprintf(stderr, "%-8s %d dim %3td, %2td tokens: step %.2f fused %.2f chunked %.2f us\n", kind.written, kind.by_key, dim,
                 len, 1e6 * t[0], 1e6 * t[1], 1e6 * t[2]);
    const auto count = [&](double seconds, index_t& up_to, int& lost) {
      if (lost == 2) return;
      lost = seconds > t[2] ? lost + 1 : 0;
      if (lost == 0) up_to = len;
    };
    count(t[0], found.step, step_lost);
    count(t[1], found.fused, fused_lost);
  }
  return found;
}

}   // namespace

// Everything twice: noise must not choose a length of chunks that only one pass found, nor lengthen a limit.
int main() {
  std::vector<float> numbers(static_cast<std::size_t>(8 * kHeads * kMostTokens * 256));
  for (const Kind& kind : kKinds) {
    for (const index_t dim : {32, 64, 128, 256}) {
      fill(numbers);
      const index_t first = best_chunk(kind, dim, numbers), chunk = best_chunk(kind, dim, numbers) == first ? first : 32;
      const UpTo one = measured_limits(kind, dim, chunk, numbers), two = measured_limits(kind, dim, chunk, numbers);
      std::printf("    {%td, Written::%s, %s, %td, %td, %td, %td},\n", fovea::kLanes, kind.written, kind.by_key ? "true" : "false",
                  dim, std::min(one.step, two.step), std::min(one.fused, two.fused), chunk);
      std::fflush(stdout);
    }
  }
  return 0;
}
