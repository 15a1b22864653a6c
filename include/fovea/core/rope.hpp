// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding (RoFormer, Su et al. 2021, arXiv 2104.09864) as data: which pairs of numbers turn, how fast, and
// where the cosines and sines lie. What is done with it: engine/parts/rope.hpp.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "types.hpp"
#include "view.hpp"

namespace fovea {
inline namespace v0 {

// Which two numbers of a head make pair m of R/2, R = rotary_dim. Half-split: m and m + R/2 (GPT-NeoX, Hugging Face,
// gpt-oss). Interleaved: 2m and 2m + 1 (GPT-J, Meta's and DeepSeek's inference code). A model is trained with one of them.
enum class RopeLayout : std::uint8_t { half_split, interleaved };

// Backward turns by the negative angle: the inverse where the table's attention factor is 1.
enum class RopeDirection : std::uint8_t { forward, backward };

// How frequencies are stretched for contexts longer than those of training; formulas in docs/mechanisms/rope.md.
enum class RopeScaling : std::uint8_t { none, linear, ntk, dynamic_ntk, yarn, llama3, longrope };

// M-RoPE (Qwen2-VL): a token has three positions (time, height, width) and each pair follows one of them. In blocks: the
// first pairs[0] time, then height, then width. Interleaved (Qwen3-VL): pair 1, 4, 7, ... height while there is any, pair
// 2, 5, 8, ... width, the others time. All zero: one position.
struct RopeSections {
  std::array<index_t, 3> pairs{};   // add up to rotary_dim / 2
  bool interleaved = false;
};

struct RopeOptions {
  index_t rotary_dim = 0;   // R, even: the first R numbers of a head turn, the others are copied
  double base = 10000;
  RopeScaling scaling = RopeScaling::none;
  double factor = 1;   // every scaling: how many times longer than in training; for longrope only in the attention factor
  index_t original_len = 0;   // dynamic_ntk, yarn, llama3, longrope: context length of training
  index_t current_len = 0;    // dynamic_ntk: tokens so far; another length is another table and makes rotated keys stale

  double beta_fast = 32, beta_slow = 1;   // yarn: turns within original_len at the ends of the ramp
  bool round_range = true;   // yarn: the ramp starts and ends at whole pairs; false = gpt-oss ("truncate": false)

  double low_freq_factor = 1, high_freq_factor = 4;   // llama3

  std::span<const double> pair_factors = {};   // [pair]  longrope: the short or the long list, the caller decides which

  // Multiplies cos and sin, hence scores by its square. Absent: yarn 0.1 ln(factor) + 1, longrope
  // sqrt(1 + ln(factor) / ln(original_len)), else 1. DeepSeek has 1 here and yarn_mscale squared in the softmax scale.
  std::optional<double> attention_factor = {};

  RopeSections sections = {};
};

// Cosines and sines in memory of the caller, both [pos, pair], times the attention factor. Row p is position first_pos + p;
// first_pos may be negative. cos and sin may come from elsewhere (a cache file, another library).
struct RopeTable {
  const float* cos = nullptr;
  const float* sin = nullptr;
  index_t stride = 0;   // floats from one position to the next
  index_t pairs = 0;    // rotary_dim / 2
  index_t first_pos = 0, len = 0;

  FOVEA_DATA_INLINE const float* cos_at(index_t pos) const { return cos + (pos - first_pos) * stride; }
  FOVEA_DATA_INLINE const float* sin_at(index_t pos) const { return sin + (pos - first_pos) * stride; }
};

// Positions of the tokens of a tensor.
struct RopePositions {
  index_t start = 0;                 // of token 0 of every batch entry
  index_t step = 1;                  // 0 = all tokens alike: the shift of a ring
  View<const index_t, 2> ids = {};   // [batch | 1, pos]  instead of both: the position of each token
};

}   // namespace v0
}   // namespace fovea
