// SPDX-License-Identifier: Apache-2.0
// The grid: generated problems over all dims, lengths, layouts and options, each against the double reference.
//   FOVEA_GRID_CASES=200   only 200 cases, spread evenly over the grid
//   FOVEA_GRID_ONLY=1234   only that case
#include <cstdlib>
#include <map>
#include <set>

#include "catch_compat.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;

const std::vector<index_t>& dims() {
  static const std::vector<index_t> all = [] {
    std::vector<index_t> values(33);
    std::iota(values.begin(), values.end(), 1);
    for (index_t dim : {40, 64, 72, 80, 96, 112, 128, 192, 256, 576}) values.push_back(dim);
    return values;
  }();
  return all;
}

// Around the row groups (6 to 16), the vector widths (4 to 32), the key tiles (64 to 256) and the decode splits.
const std::vector<index_t> kLengths{0,  1,  1,  2,  3,  5,  6,  7,  8,  11, 12,  13,  15,  16,  17,  23,  24,  25,
                                    31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 127, 128, 129, 255, 256, 257, 511, 513};

constexpr index_t kCases = 43 * 126;   // every dim 126 times

// Around the borders of KV splits.
const std::vector<index_t> kSplitLengths{1023, 1024, 1025, 1281, 2047, 2048, 2049, 3073};

index_t shorter(Random& random, index_t len) { return len <= 1 ? len : random.between(1, (len + 1) / 2); }

// A step over several KV splits, in one sequence of a ragged call and in all of another: few queries near the end of the keys,
// no cost to speak of.
void lengthen(Problem& p, Random& random) {
  const index_t stored = random.pick(kSplitLengths), queries = random.between(1, 3);
  const auto place = [&](std::size_t s) {
    p.len_q[s] = queries;
    p.stored_k[s] = stored;
    if (!p.len_k.empty()) p.len_k[s] = random.one_in(3) ? stored : random.between(stored - 600, stored);
  };
  if (!p.is_ragged) {
    for (std::size_t s = 0; s < p.sequences(); ++s) place(s);
  } else {
    place(static_cast<std::size_t>(random.below(static_cast<index_t>(p.sequences()))));
  }
  if (!p.q_offset.empty() || p.causal == Causal::top_left) {
    p.q_offset.clear();
    for (std::size_t s = 0; s < p.sequences(); ++s) p.q_offset.push_back(random.between(p.stored_k[s] * 3 / 4, p.stored_k[s] + 3));
  }
  if (p.window.left >= 0) p.window.left = random.pick<index_t>({0, 31, 700, 1024, 1500, 2100});
  if (p.dim_v != p.dim_qk) p.dim_v = std::min<index_t>(p.dim_v, 40);
  while (p.flop() > 1.2e6 && p.q_heads > 1) {
    if (p.q_heads > p.kv_heads && (p.kv_heads == 1 || random.one_in(2))) {
      p.q_heads = p.kv_heads;
    } else {
      p.q_heads /= p.kv_heads;
      p.kv_heads = 1;
    }
  }
}

// Case n depends on n alone.
Problem grid_case(index_t n) {
  Random random(static_cast<std::uint64_t>(n) * 7919 + 1);
  Problem p;
  p.seed = static_cast<std::uint64_t>(n) + 1000;
  p.dim_qk = dims()[static_cast<std::size_t>(n % 43)];
  p.regime = std::array{Regime::automatic, Regime::prefill, Regime::decode, Regime::wide_decode}[static_cast<std::size_t>(n / 43 % 4)];
  p.layout =
      random.pick({Layout::bshd, Layout::bhsd, Layout::packed_qkv, Layout::interleaved_kv, Layout::padded, Layout::padded});
  p.is_ragged = random.one_in(3);

  const bool one_dim = p.layout == Layout::packed_qkv || p.layout == Layout::interleaved_kv;
  p.dim_v = one_dim || random.one_in(3) ? p.dim_qk : random.one_in(12) ? 512 : random.pick(dims());
  const index_t group = random.pick<index_t>({1, 1, 2, 3, 4, 8});
  p.kv_heads = random.pick<index_t>({1, 1, 2, 3});
  p.q_heads = group * p.kv_heads;

  const auto sequences = static_cast<std::size_t>(p.is_ragged ? random.between(1, 5) : random.between(1, 3));
  p.len_q.assign(sequences, random.pick(kLengths));
  p.stored_k.assign(sequences, random.pick(kLengths));
  if (p.is_ragged) {
    for (std::size_t s = 0; s < sequences; ++s) {
      p.len_q[s] = random.one_in(6) ? 0 : random.pick(kLengths);
      p.stored_k[s] = random.one_in(6) ? 0 : random.pick(kLengths);
    }
  }
  // A typical decode step: one query or a few.
  if (random.one_in(3)) {
    const index_t step = random.between(1, 3);
    for (index_t& len : p.len_q) len = std::min(len, step);
  }

  const double limit = n % 16 == 0 ? 8e6 : 1.2e6;
  while (p.flop() > limit) {
    if (p.q_heads > p.kv_heads && random.one_in(3)) {
      p.q_heads = p.kv_heads;
    } else if (p.kv_heads > 1 && random.one_in(3)) {
      p.q_heads /= p.kv_heads;
      p.kv_heads = 1;
    } else if (p.is_ragged) {
      const auto s = static_cast<std::size_t>(random.below(static_cast<index_t>(sequences)));
      p.len_q[s] = shorter(random, p.len_q[s]);
      if (p.len_q[s] <= 1) p.stored_k[s] = shorter(random, p.stored_k[s]);
    } else {
      const index_t len = shorter(random, p.len_q[0]);
      if (len <= 1) p.stored_k.assign(sequences, shorter(random, p.stored_k[0]));
      p.len_q.assign(sequences, len);
    }
  }
  if (p.layout == Layout::packed_qkv) p.stored_k = p.len_q;

  if (random.one_in(3)) {
    for (index_t stored : p.stored_k) p.len_k.push_back(random.one_in(4) ? stored : random.between(0, stored));
  }
  if (random.one_in(3)) p.scale = random.pick({0.f, -0.3f, 0.05f, 1.f});
  p.q_spread = p.scale == 1.f ? 1.f : random.pick({0.25f, 1.f, 1.f, 4.f, 20.f});
  p.causal = random.pick({Causal::none, Causal::top_left, Causal::bottom_right});
  if (random.one_in(3)) {
    p.window.left = random.pick<index_t>({-1, 0, 1, 5, 31, 64, 100});
    p.window.right = random.pick<index_t>({-1, 0, 1, 7, 40, 130});
  }
  if (random.one_in(3)) p.softcap = random.pick({1.f, 5.f, 30.f, 50.f});
  if (random.one_in(4)) {
    for (std::size_t s = 0; s < sequences; ++s) p.q_offset.push_back(random.between(-3, p.stored_k[s] + 3));
  }
  p.alibi = random.one_in(4);
  p.sink = random.one_in(4);
  p.lse = !random.one_in(4);
  const std::initializer_list<Share> shares{Share::full, Share::sequences, Share::heads, Share::rows};
  if (random.one_in(4)) p.bias = random.pick(shares);
  p.bias_masks = random.one_in(2);
  if (random.one_in(4)) p.keep = random.pick(shares);
  p.nan_in_live_key = random.one_in(24);
  p.nan_in_live_value = !p.nan_in_live_key && random.one_in(24);
  p.lanes = static_cast<int>(random.between(1, 4));
  p.pool = random.pick({Pool::serial, Pool::threads, Pool::reversed, Pool::one_after_other});
  const bool splits = p.regime != Regime::prefill && p.layout != Layout::packed_qkv && p.dim_qk <= 64;
  if (splits && random.one_in(6)) lengthen(p, random);
  return p;
}

index_t number(const char* variable, index_t otherwise) {
  const char* const text = std::getenv(variable);
  return text == nullptr ? otherwise : static_cast<index_t>(std::strtoll(text, nullptr, 10));
}

// Is a row's softmax put together from several KV splits?
bool has_splits(const Problem& p) {
  const index_t group = p.q_heads / p.kv_heads;
  for (std::size_t s = 0; s < p.sequences(); ++s) {
    const bool whole = p.regime == Regime::automatic && p.len_q[s] * group > fovea::kWideRows;
    if (whole || p.regime == Regime::prefill) continue;
    for (index_t i = 0; i < p.len_q[s]; ++i) {
      const index_t pos = p.position(s, i), left = p.window.left, right = p.causal != Causal::none ? 0 : p.window.right;
      const index_t first = left < 0 ? 0 : std::max<index_t>(pos - left, 0);
      const index_t last = std::min(right < 0 ? p.used_k(s) : pos + right + 1, p.used_k(s)) - 1;
      if (first <= last && first / fovea::kSplitKeys != last / fovea::kSplitKeys) return true;
    }
  }
  return false;
}

// One line per option: is it on in this problem?
std::vector<bool> switches(const Problem& p) {
  const index_t group = p.q_heads / p.kv_heads;
  return {p.is_ragged,
          p.scale.has_value(),
          p.causal == Causal::top_left,
          p.causal == Causal::bottom_right,
          p.window.left >= 0,
          p.window.right >= 0,
          p.softcap > 0,
          !p.q_offset.empty(),
          !p.len_k.empty(),
          p.alibi,
          p.sink,
          p.lse,
          p.bias != Share::absent,
          p.keep != Share::absent,
          p.dim_qk != p.dim_v,
          group > 1,
          p.regime == Regime::prefill,
          p.regime == Regime::decode,
          p.layout == Layout::packed_qkv,
          p.layout == Layout::interleaved_kv,
          p.layout == Layout::padded,
          p.lanes > 1,
          p.nan_in_live_key,
          p.nan_in_live_value,
          p.regime == Regime::wide_decode,
          has_splits(p)};
}

}  // namespace

TEST_CASE("the grid covers every dim, every pair of options and stays cheap", "[grid]") {
  double flop = 0;
  std::map<index_t, int> by_dim;
  std::set<index_t> lengths;
  std::set<index_t> groups;
  std::map<std::pair<std::size_t, std::size_t>, int> pairs;
  std::size_t count = 0;
  for (index_t n = 0; n < kCases; ++n) {
    const Problem p = grid_case(n);
    flop += p.flop();
    ++by_dim[p.dim_qk];
    groups.insert(p.q_heads / p.kv_heads);
    for (index_t len : p.stored_k) lengths.insert(len);
    const std::vector<bool> on = switches(p);
    count = on.size();
    for (std::size_t a = 0; a < count; ++a) {
      for (std::size_t b = 0; b < a; ++b) pairs[{b, a}] += on[a] && on[b];
    }
  }
  CHECK(kCases >= 5000);
  CHECK(flop < 10e9);
  CHECK(flop > 1e9);
  for (index_t dim : dims()) CHECK(by_dim[dim] == 126);
  for (index_t len : kLengths) CHECK(lengths.count(len) == 1);
  for (index_t len : kSplitLengths) CHECK(lengths.count(len) == 1);
  for (index_t group : {1, 3, 8}) CHECK(groups.count(group) == 1);
  for (std::size_t a = 0; a < count; ++a) {
    for (std::size_t b = 0; b < a; ++b) {
      // Contradictions: one causal mode, one regime, one layout, one dim where K and V share a token, one NaN; prefill splits no
      // keys, and fused QKV with as many queries as a split has keys is prefill too.
      const bool exclusive = (b == 2 && a == 3) || (b == 16 && a == 17) || (b >= 18 && a <= 20) ||
                             (b == 14 && a >= 18 && a <= 19) || (b == 22 && a == 23) ||
                             (a == 24 && (b == 16 || b == 17)) || (a == 25 && (b == 16 || b == 18));
      INFO("switches " << b << " and " << a);
      CHECK((pairs[{b, a}] > 0) != exclusive);
    }
  }
}

TEST_CASE("attention agrees with the double reference over the grid", "[grid]") {
  const index_t only = number("FOVEA_GRID_ONLY", -1);
  const index_t wanted = std::min(std::max(number("FOVEA_GRID_CASES", kCases), index_t{1}), kCases);
  index_t failures = 0, ran = 0;
  double worst = 0;
  for (index_t step = 0; step < wanted; ++step) {
    const index_t n = only >= 0 ? only : step * kCases / wanted;
    const Problem p = grid_case(n);
    const Instance x(p);
    Output output(x, p.lse);
    std::string wrong = run(x, output, p.lanes, p.pool);
    if (wrong.empty()) {
      const Worst difference = compare(x.expected(), output.out, output.lse);
      worst = std::max(worst, difference.budgets);
      if (difference.budgets > 1) wrong = difference.where + ", " + std::to_string(difference.budgets) + " budgets off";
    }
    // Equal bits for another number of lanes in another order, in a quarter of the cases.
    if (wrong.empty() && n % 4 == 0) {
      Output again(x, p.lse);
      wrong = run(x, again, p.lanes == 1 ? 3 : 1, Pool::reversed);
      if (wrong.empty() && !(again == output)) wrong = "other lanes, other bits";
    }
    ++ran;
    if (!wrong.empty()) {
      ++failures;
      UNSCOPED_INFO("case " << n << ": " << wrong << "\n  " << describe(p) << "\n  rerun: FOVEA_GRID_ONLY=" << n
                            << " and this program with the argument [grid]");
      CHECK(wrong.empty());
    }
    if (only >= 0 || failures >= 20) break;
  }
  INFO("ran " << ran << " cases, stopped after 20 failures; worst error " << worst << " budgets");
  CHECK(failures == 0);
}
