// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/bigbird.hpp"

#include "fovea/reference/bigbird.hpp"
#include "pattern_support.hpp"

namespace {

using namespace test;
using fovea::BigBird;

// random_blocks [head, blocks - 2, r], outside of window and global blocks where that leaves any, as in the published code.
struct Drawn {
  std::vector<std::int32_t> numbers;
  View<const std::int32_t, 3> view;
};
Drawn draw(std::uint64_t seed, index_t heads, index_t blocks, index_t r) {
  Drawn drawn;
  Random random(seed);
  for (index_t h = 0; h < heads; ++h) {
    for (index_t i = 1; i < blocks - 1; ++i) {
      for (index_t n = 0; n < r; ++n) {
        index_t block = -1;
        for (int trial = 0; trial < 50 && block < 0; ++trial) {
          const index_t wish = random.between(1, blocks - 2);
          bool taken = std::abs(wish - i) <= 1;
          for (index_t before = 0; before < n; ++before)
            taken = taken || drawn.numbers[drawn.numbers.size() - 1 - static_cast<std::size_t>(before)] == wish;
          if (!taken) block = wish;
        }
        drawn.numbers.push_back(static_cast<std::int32_t>(block));
      }
    }
  }
  drawn.view = {drawn.numbers.data(), {heads, blocks - 2, r}, {(blocks - 2) * r, r, 1}};
  return drawn;
}

PatternCall call_with(const BigBird& p) {
  return [p](Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out,
             const AttentionOptions& options) { return fovea::bigbird_attention(q, k, v, out, p, options); };
}
PatternReference reference_with(const BigBird& p) {
  return [p](const Dense& x, const AttentionOptions& options, Tensor<double> out, View<double, 3> lse) {
    fovea::reference::bigbird(x.q.view(), x.k.view(), x.v.view(), out, p.block, p.random_blocks, p.valid, options, lse);
  };
}
// Without duplicates.
Sees sees_with(const BigBird& p, index_t blocks) {
  return [p, blocks](index_t b, index_t head, index_t pos, index_t key) {
    if (p.valid && (p.valid(b, pos) == 0 || p.valid(b, key) == 0)) return false;
    const index_t i = pos / p.block, n = key / p.block;
    const auto global = [&](index_t block) { return block == 0 || block == blocks - 1; };
    if (global(i) || global(n) || std::abs(i - n) <= 1) return true;
    for (index_t r = 0; p.random_blocks && r < p.random_blocks.extent[2]; ++r) {
      if (p.random_blocks(p.random_blocks.extent[0] == 1 ? 0 : head, i - 1, r) == n) return true;
    }
    return false;
  };
}

}   // namespace

TEST_CASE("bigbird: against the reference", "[bigbird]") {
  for (const auto& [block, blocks, r, heads] :
       {std::tuple<index_t, index_t, index_t, index_t>{4, 12, 3, 4}, {8, 6, 1, 1}, {5, 4, 0, 1}, {3, 9, 2, 4}}) {
    const Drawn drawn = draw(500, heads, blocks, r);
    BigBird p;
    p.block = block;
    if (r > 0) p.random_blocks = drawn.view;
    const Dense x(501, 2, 4, 2, block * blocks, block * blocks, 8, 12);
    check_pattern(call_with(p), reference_with(p), sees_with(p, blocks), x, {}, "r " + std::to_string(r));
    std::vector<std::uint8_t> valid(static_cast<std::size_t>(2 * x.q.len), 1);
    std::fill(valid.begin() + x.q.len - 7, valid.begin() + x.q.len, std::uint8_t{0});
    valid[static_cast<std::size_t>(x.q.len) + 2] = 0;
    p.valid = {valid.data(), {2, x.q.len}, {x.q.len, 1}};
    check_pattern(call_with(p), reference_with(p), sees_with(p, blocks), x, {}, "padding, r " + std::to_string(r));
  }
}

TEST_CASE("bigbird: kinds of rows, and keys per row", "[bigbird]") {
  constexpr index_t kBlock = 2, kBlocks = 11, kLen = kBlock * kBlocks, kRandom = 3;
  const Drawn drawn = draw(510, 1, kBlocks, kRandom);
  BigBird p;
  p.block = kBlock;
  p.random_blocks = drawn.view;
  const Values zero(1, 1, kLen, 1);
  const Result r = run_pattern(call_with(p), zero.view(), zero.view(), identity_values(1, 1, kLen).view(), {});
  for (index_t t = 0; t < kLen; ++t) {
    const index_t i = t / kBlock;
    index_t blocks = 5 + kRandom;
    if (i == 0 || i == kBlocks - 1) blocks = kBlocks;
    if (i == 1 || i == kBlocks - 2) blocks = 4 + kRandom;
    index_t keys = 0;
    double sum = 0;
    for (index_t s = 0; s < kLen; ++s) {
      keys += r.at(0, 0, t, s) > 0;
      sum += double{r.at(0, 0, t, s)};
    }
    CHECK(keys == blocks * kBlock);
    CHECK(sum == Catch::Approx(1).margin(1e-6));
    CHECK(r.lse_at(0, 0, t) == Catch::Approx(std::log(static_cast<double>(blocks * kBlock))).margin(1e-6));
  }
}

// The published generator may draw a block of the window: its keys then stand twice in the softmax.
TEST_CASE("bigbird: a block that is drawn twice counts twice", "[bigbird]") {
  constexpr index_t kBlock = 4, kBlocks = 7, kLen = kBlock * kBlocks;
  std::vector<std::int32_t> numbers;
  for (std::int32_t i = 1; i < kBlocks - 1; ++i) numbers.insert(numbers.end(), {i, -1, 5, 5});
  BigBird p;
  p.block = kBlock;
  p.random_blocks = {numbers.data(), {1, kBlocks - 2, 4}, {(kBlocks - 2) * 4, 4, 1}};
  const Dense x(520, 1, 2, 2, kLen, kLen, 8, 8);
  // Multiplicity m is log m on the score.
  std::vector<float> bias(static_cast<std::size_t>(kLen * kLen));
  for (index_t t = 0; t < kLen; ++t) {
    for (index_t s = 0; s < kLen; ++s) {
      const index_t i = t / kBlock, n = s / kBlock;
      int count = 0;
      if (i == 0 || i == kBlocks - 1) {
        count = 1;
      } else {
        count = (n == 0 || n == kBlocks - 1 || std::abs(n - i) <= 1) + (n == i) + 2 * (n == 5);
      }
      bias[static_cast<std::size_t>(t * kLen + s)] = count == 0 ? -kInfinity : std::log(static_cast<float>(count));
    }
  }
  AttentionOptions weighed;
  weighed.bias = {bias.data(), {1, 1, kLen, kLen}, {kLen * kLen, kLen * kLen, kLen, 1}};
  const Expected want = expect(x.q.view(), x.k.view(), x.v.view(), weighed);
  CHECK(distance(run_pattern(call_with(p), x, {}), want) <= 1);
  std::vector<double> out(want.out.size()), lse(want.lse.size());
  reference_with(p)(x, {}, fovea::bhsd(out.data(), 1, 2, kLen, 8), {lse.data(), {1, 2, kLen}, {2 * kLen, kLen, 1}});
  for (std::size_t n = 0; n < out.size(); ++n) CHECK(std::abs(out[n] - want.out[n]) <= want.out_error[n]);
}

TEST_CASE("bigbird: dense rows", "[bigbird]") {
  // Middle rows see everything where the random blocks are the rest: 5 + r blocks; four blocks are dense without any.
  for (const index_t blocks : {index_t{4}, index_t{7}}) {
    BigBird p;
    p.block = 6;
    std::vector<std::int32_t> numbers;
    for (index_t i = 1; i < blocks - 1; ++i) {
      index_t written = 0;
      for (index_t n = 1; n < blocks - 1; ++n) {
        if (std::abs(n - i) <= 1) continue;
        numbers.push_back(static_cast<std::int32_t>(n));
        ++written;
      }
      for (; written < 3; ++written) numbers.push_back(-1);
    }
    if (blocks > 4) p.random_blocks = {numbers.data(), {1, blocks - 2, 3}, {0, 3, 1}};
    const Dense x(530, 1, 2, 1, 6 * blocks, 6 * blocks, 8, 8);
    CHECK(distance(run_pattern(call_with(p), x, {}), expect(x.q.view(), x.k.view(), x.v.view(), {})) <= 1);
  }
}

TEST_CASE("bigbird: refusals write nothing", "[bigbird][errors]") {
  const Dense x(540, 1, 2, 2, 24, 24, 8, 6);
  Result r = unwritten(x.q.view(), x.v.view());
  const auto with = [&](const BigBird& p, AttentionOptions options = {}) {
    options.lse = r.lse_view();
    return [&r, &x, p, options] {
      return fovea::bigbird_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), p, options);
    };
  };
  BigBird p;
  p.block = 5;
  check_refused(r, "24 positions in blocks of 5", with(p));
  p.block = 8;
  check_refused(r, "24 positions in blocks of 8", with(p));
  p.block = 4;
  AttentionOptions causal;
  causal.causal = Causal::bottom_right;
  check_refused(r, "bidirectional", with(p, causal));
  Drawn drawn = draw(541, 2, 5, 1);
  p.random_blocks = drawn.view;
  check_refused(r, "must be [2 | 1, 4, r]", with(p));
  drawn = draw(541, 2, 6, 1);
  drawn.numbers[3] = 6;
  p.random_blocks = {drawn.numbers.data(), {2, 4, 1}, {4, 1, 1}};
  check_refused(r, "is 6, there are 6 blocks", with(p));
  drawn.numbers[3] = 1;
  const std::vector<std::uint8_t> valid(20, 1);
  p.valid = {valid.data(), {1, 20}, {20, 1}};
  check_refused(r, "valid is [1, 20]", with(p));
}
