// SPDX-License-Identifier: Apache-2.0
// Attention over lists of keys against the dense reference with the lists as a bias, and what lists must not change.
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/sparse.hpp"
#include "support/executors.hpp"
#include "support/key_lists.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"
#include "support/tolerance.hpp"

using namespace fovea;

namespace {

using OnlyF32 = Formats<Format::f32>;
const float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

std::vector<float> numbers(test::Random& random, index_t count) {
  std::vector<float> made(at(count));
  for (float& x : made) x = random.normal();
  return made;
}

struct Setup {
  index_t batch, q_heads, kv_heads, len_q, len_k, dim_qk, dim_v;
  std::vector<float> q, k, v, out, lse;

  Setup(test::Random& random, index_t b, index_t hq, index_t hkv, index_t lq, index_t lk, index_t dqk, index_t dv)
      : batch(b),
        q_heads(hq),
        kv_heads(hkv),
        len_q(lq),
        len_k(lk),
        dim_qk(dqk),
        dim_v(dv),
        q(numbers(random, b * hq * lq * dqk)),
        k(numbers(random, b * hkv * lk * dqk)),
        v(numbers(random, b * hkv * lk * dv)),
        out(at(b * hq * lq * dv), -7.f),
        lse(at(b * hq * lq), -7.f) {}

  Tensor<const float> q_view() const { return bhsd(q.data(), batch, q_heads, len_q, dim_qk); }
  Tensor<const float> k_view() const { return bhsd(k.data(), batch, kv_heads, len_k, dim_qk); }
  Tensor<const float> v_view() const { return bhsd(v.data(), batch, kv_heads, len_k, dim_v); }
  Tensor<float> out_view() { return bhsd(out.data(), batch, q_heads, len_q, dim_v); }
  View<float, 3> lse_view() { return {lse.data(), {batch, q_heads, len_q}, {q_heads * len_q, len_q, 1}}; }
};

// Differences to the reference in units of its error budget: 1 or less is right.
double worst(const Setup& s, const AttentionOptions& options, std::span<const KeyLists> kinds) {
  std::vector<index_t> len_k(at(s.batch), s.len_k);
  if (!options.len_k.empty()) len_k.assign(options.len_k.begin(), options.len_k.end());
  const std::vector<float> bias = test::list_bias(kinds, s.batch, s.q_heads, s.len_q, len_k, s.len_k);
  AttentionOptions dense = options;
  dense.bias = {
      bias.data(), {s.batch, s.q_heads, s.len_q, s.len_k}, {s.q_heads * s.len_q * s.len_k, s.len_q * s.len_k, s.len_k, 1}};
  const test::Expected e = test::expect(s.q_view(), s.k_view(), s.v_view(), dense);
  double most = 0;
  for (std::size_t n = 0; n < e.out.size(); ++n)
    most = std::max(most, test::in_budgets(double{s.out[n]}, e.out[n], e.out_error[n]));
  for (std::size_t n = 0; options.lse && n < e.lse.size(); ++n)
    most = std::max(most, test::in_budgets(double{s.lse[n]}, e.lse[n], e.lse_error[n]));
  return most;
}

}   // namespace

TEST_CASE("lists of every kind, against the reference", "[sparse]") {
  test::Random random(71);
  for (int round = 0; round < 60; ++round) {
    const index_t kv_heads = random.pick({1, 2}), group = random.pick({1, 2, 5});
    const index_t dim_v = random.pick({8, 24, 33}), dim_qk = random.pick({8, 17, 32});
    Setup s(random, random.pick({1, 2}), kv_heads * group, kv_heads, random.pick({1, 3, 21, 70}),
            random.pick({1, 40, 300, 700}), dim_qk, dim_v);
    test::ListShape shape;
    shape.batch = random.one_in(2) ? 1 : s.batch;
    shape.heads = random.pick({index_t{1}, s.kv_heads, s.q_heads});
    shape.len_q = s.len_q;
    shape.q_block = random.pick({1, 4, 16, 128});
    shape.k_block = random.pick({1, 1, 3, 16, 64});
    shape.csr = random.one_in(2);
    shape.ranges = random.one_in(4);
    shape.sorted = !random.one_in(3);
    shape.holes = random.one_in(2);
    shape.duplicates = random.one_in(3);
    shape.density = random.pick({0., 0.05, 0.3, 1.});
    AttentionOptions options;
    std::vector<index_t> len_k;
    for (index_t b = 0; b < s.batch; ++b) len_k.push_back(random.between(s.len_k / 2, s.len_k));
    if (random.one_in(2)) options.len_k = len_k;
    if (!random.one_in(3)) options.causal = Causal::bottom_right;
    if (random.one_in(4)) options.window = {random.between(0, 50), -1};
    if (random.one_in(4)) options.softcap = 3.f;
    const std::vector<float> slopes(at(s.q_heads), 0.03f), sinks(at(s.q_heads), 0.4f);
    if (random.one_in(4)) options.alibi_slopes = slopes;
    if (random.one_in(4)) options.sink = sinks;
    options.regime = random.pick({Regime::automatic, Regime::prefill, Regime::decode, Regime::wide_decode});
    options.lse = s.lse_view();
    const std::vector<index_t> reached = options.len_k.empty() ? std::vector<index_t>(at(s.batch), s.len_k) : len_k;
    std::vector<test::OwnedLists> owned{test::random_lists(random, shape, reached)};
    if (random.one_in(3)) {
      test::ListShape more = shape;
      more.heads = 1;
      more.k_block = 1;
      more.ranges = false;
      owned.push_back(test::random_lists(random, more, reached));
    }
    std::vector<KeyLists> kinds;
    for (const auto& lists : owned) kinds.push_back(lists.view());
    const Status status = sparse_attention(s.q_view(), s.k_view(), s.v_view(), kinds, s.out_view(), options);
    INFO("round " << round << " " << status.message());
    REQUIRE(status.ok());
    CHECK(worst(s, options, kinds) <= 1.);
  }
}

TEST_CASE("all keys listed: the bits of dense attention", "[sparse]") {
  test::Random random(72);
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    Setup s(random, 1, 4, 2, 40, 520, 32, 32);
    std::vector<std::int32_t> tokens(520);
    std::iota(tokens.begin(), tokens.end(), 0);
    const AttentionOptions options{.causal = Causal::bottom_right, .regime = regime};
    REQUIRE(attention(s.q_view(), s.k_view(), s.v_view(), s.out_view(), options).ok());
    const std::vector<float> dense = s.out;
    KeyLists all;
    all.entries = tokens.data();
    all.capacity = 520;
    all.q_block = 40;
    REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), all, s.out_view(), options).ok());
    CHECK(s.out == dense);
    all.capacity = 9;   // blocks 0 .. 8 of 64, the last one cut
    all.k_block = 64;
    REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), all, s.out_view(), options).ok());
    CHECK(s.out == dense);
  }
}

TEST_CASE("keys that are not listed leave no trace, whatever they hold", "[sparse]") {
  test::Random random(73);
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    Setup s(random, 1, 2, 1, 17, 400, 16, 16);
    const test::ListShape shape{.len_q = 17, .q_block = 32, .k_block = 5, .density = 0.2};
    const test::OwnedLists owned = test::random_lists(random, shape, {400});
    const KeyLists lists = owned.view();
    const AttentionOptions options{.causal = Causal::bottom_right, .regime = regime};
    REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), lists, s.out_view(), options).ok());
    const std::vector<float> clean = s.out;
    for (index_t j = 0; j < 400; ++j) {
      if (test::times_listed({&lists, 1}, 0, 0, 2, 0, j, 400) > 0) continue;
      for (index_t d = 0; d < 16; ++d) s.k[at(j * 16 + d)] = s.v[at(j * 16 + d)] = d % 2 == 0 ? kNan : kInf;
    }
    REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), lists, s.out_view(), options).ok());
    CHECK(s.out == clean);
  }
}

TEST_CASE("a listed NaN shows only where the mask lets it be seen", "[sparse]") {
  test::Random random(74);
  Setup s(random, 1, 1, 1, 8, 8, 8, 8);
  for (index_t d = 0; d < 8; ++d) s.v[at(5 * 8 + d)] = kNan;
  const std::vector<std::int32_t> tokens{7, 5, 0, 2};
  KeyLists lists;
  lists.entries = tokens.data();
  lists.capacity = 4;
  lists.q_block = 8;
  for (const Regime regime : {Regime::prefill, Regime::decode}) {
    const AttentionOptions options{.causal = Causal::top_left, .regime = regime};
    REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), lists, s.out_view(), options).ok());
    for (index_t i = 0; i < 8; ++i) CHECK(std::isnan(s.out[at(i * 8)]) == (i >= 5));
  }
}

TEST_CASE("disjoint lists merge to the whole, lanes move no bit", "[sparse]") {
  test::Random random(75);
  Setup s(random, 1, 4, 4, 6, 3000, 16, 16);
  std::vector<std::int32_t> even, odd, all;
  for (std::int32_t j = 0; j < 3000; ++j) {
    if (j % 3 == 0) continue;
    all.push_back(j);
    (j % 2 == 0 ? even : odd).push_back(j);
  }
  const auto list_of = [](const std::vector<std::int32_t>& tokens) {
    KeyLists lists;
    lists.entries = tokens.data();
    lists.capacity = static_cast<index_t>(tokens.size());
    lists.q_block = 6;
    return lists;
  };
  AttentionOptions options{.causal = Causal::bottom_right};
  options.lse = s.lse_view();
  REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), list_of(all), s.out_view(), options).ok());
  const std::vector<float> whole = s.out, whole_lse = s.lse;
  test::ThreadPerLane threads;
  options.executor = Executor(threads, 3);
  REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), list_of(all), s.out_view(), options).ok());
  CHECK(s.out == whole);
  REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), list_of(even), s.out_view(), options).ok());
  std::vector<float> out(s.out), lse(s.lse);
  const Tensor<float> a = bhsd(out.data(), 1, 4, 6, 16);
  const View<float, 3> lse_a{lse.data(), {1, 4, 6}, {24, 6, 1}};
  REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), list_of(odd), s.out_view(), options).ok());
  REQUIRE(merge(a, lse_a, bhsd(std::as_const(s.out).data(), 1, 4, 6, 16),
                View<const float, 3>{s.lse.data(), {1, 4, 6}, {24, 6, 1}})
              .ok());
  for (std::size_t n = 0; n < out.size(); ++n) CHECK(out[n] == Catch::Approx(whole[n]).margin(2e-6));
  for (std::size_t n = 0; n < lse.size(); ++n) CHECK(lse[n] == Catch::Approx(whole_lse[n]).margin(2e-6));
}

TEST_CASE("lists over pages, rings and 16 bit: the same keys, the same result", "[sparse]") {
  test::Random random(76);
  Setup s(random, 1, 4, 2, 5, 96, 32, 32);
  const test::ListShape shape{.heads = 2, .len_q = 5, .q_block = 1, .k_block = 1, .duplicates = true, .density = 0.4};
  const test::OwnedLists owned = test::random_lists(random, shape, {96});
  const std::vector<index_t> len_k{96};
  AttentionOptions options{.causal = Causal::bottom_right};
  options.len_k = len_k;
  REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), owned.view(), s.out_view(), options).ok());
  const std::vector<float> contiguous = s.out;
  // Pages of 16, stored backwards.
  std::vector<float> k_pages(s.k.size()), v_pages(s.v.size());
  std::vector<std::int32_t> table(6);
  for (index_t page = 0; page < 6; ++page) {
    table[at(page)] = static_cast<std::int32_t>(5 - page);
    for (index_t h = 0; h < 2; ++h) {
      const index_t from = (h * 96 + page * 16) * 32, to = ((5 - page) * 2 + h) * 16 * 32;
      std::memcpy(&k_pages[at(to)], &s.k[at(from)], 16 * 32 * sizeof(float));
      std::memcpy(&v_pages[at(to)], &s.v[at(from)], 16 * 32 * sizeof(float));
    }
  }
  Kv paged;
  paged.k = stored_rows(k_pages.data(), Format::f32, 32, 2, 16);
  paged.v = stored_rows(v_pages.data(), Format::f32, 32, 2, 16);
  paged.kv_heads = 2;
  paged.dim_qk = paged.dim_v = 32;
  paged.batch = 6;
  paged.len = 16;
  paged.home = Home::paged;
  paged.block_table = {table.data(), {1, 6}, {6, 1}};
  REQUIRE(sparse_attention<OnlyF32>(s.q_view(), paged, owned.view(), s.out_view(), options).ok());
  CHECK(s.out == contiguous);
}

TEST_CASE("plans serve many calls and refuse others", "[sparse]") {
  test::Random random(77);
  Setup s(random, 1, 4, 2, 9, 200, 16, 16);
  const test::ListShape shape{.heads = 4, .len_q = 9, .q_block = 2, .k_block = 8};
  const test::OwnedLists owned = test::random_lists(random, shape, {200});
  const KeyLists lists = owned.view();
  AttentionOptions options{.causal = Causal::bottom_right};
  REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), lists, s.out_view(), options).ok());
  const std::vector<float> direct = s.out;
  SparsePlan plan;
  REQUIRE(make_sparse_plan(plan, {1, 4, 2, 9, 200, 16, 16}, {&lists, 1}, options).ok());
  CHECK(plan.describe().find("keys listed") != std::string::npos);
  std::vector<std::byte> workspace(plan.workspace_bytes(1), std::byte{0xff});
  options.workspace = workspace;
  std::fill(s.out.begin(), s.out.end(), kNan);
  const Kv kv = dense_kv(s.k_view(), s.v_view());
  REQUIRE(sparse_attention<OnlyF32>(plan, s.q_view(), kv, s.out_view(), options).ok());
  CHECK(s.out == direct);
  std::fill(s.out.begin(), s.out.end(), -7.f);
  const Status dense = attention<OnlyF32>(plan.plan, s.q_view(), kv, s.out_view(), options);
  CHECK_THAT(dense.message(), Catch::Matchers::ContainsSubstring("the plan is for lists of keys"));
  CHECK(s.out == std::vector<float>(s.out.size(), -7.f));
  options.causal = Causal::none;
  CHECK(sparse_attention<OnlyF32>(plan, s.q_view(), kv, s.out_view(), options).code() == Code::invalid_argument);
}

TEST_CASE("key tile by key tile for many lists, and list by list: the same keys", "[sparse]") {
  test::Random random(80);
  Setup s(random, 1, 4, 2, 150, 333, 24, 40);
  const test::ListShape shape{.heads = 4, .len_q = 150, .q_block = 16, .k_block = 32, .sorted = false, .density = 0.4};
  const test::OwnedLists owned = test::random_lists(random, shape, {333});
  const KeyLists lists = owned.view();
  AttentionOptions options{.causal = Causal::bottom_right, .regime = Regime::prefill};
  SparsePlan plan;
  REQUIRE(make_sparse_plan(plan, {1, 4, 2, 150, 333, 24, 40}, {&lists, 1}, options).ok());
  CHECK(plan.together);
  options.lse = s.lse_view();
  for (const int lanes : {1, 3}) {
    test::ThreadPerLane threads;
    options.executor = Executor(threads, lanes);
    std::fill(s.out.begin(), s.out.end(), kNan);
    REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), lists, s.out_view(), options).ok());
    CHECK(worst(s, options, {&lists, 1}) <= 1.);
  }
  // A row's bits do not hang on its neighbours' lists.
  const std::vector<float> all = s.out;
  test::OwnedLists fewer = owned;
  for (std::size_t list = 0; list < fewer.count.size(); ++list) {
    if (list % 10 != 3) fewer.count[list] = std::min(fewer.count[list], 1);
  }
  REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), fewer.view(), s.out_view(), options).ok());
  for (index_t h = 0; h < 4; ++h) {
    for (index_t i = 48; i < 64; ++i) {
      for (index_t d = 0; d < 40; ++d) CHECK(s.out[at((h * 150 + i) * 40 + d)] == all[at((h * 150 + i) * 40 + d)]);
    }
  }
  options.regime = Regime::wide_decode;
  REQUIRE(make_sparse_plan(plan, {1, 4, 2, 150, 333, 24, 40}, {&lists, 1}, options).ok());
  CHECK(!plan.together);
}

TEST_CASE("a plan for many lists at once serves its calls under the automatic regime, and a failed one none", "[sparse]") {
  test::Random random(81);
  Setup s(random, 1, 2, 2, 300, 300, 16, 16);
  const test::ListShape shape{.heads = 2, .len_q = 300, .q_block = 16, .k_block = 32, .density = 0.5};
  const test::OwnedLists owned = test::random_lists(random, shape, {300});
  const KeyLists lists = owned.view();
  const AttentionOptions options{.causal = Causal::bottom_right};
  const AttentionShape sizes{1, 2, 2, 300, 300, 16, 16};
  SparsePlan plan;
  REQUIRE(make_sparse_plan(plan, sizes, {&lists, 1}, options).ok());
  REQUIRE(plan.together);
  const Kv kv = dense_kv(s.k_view(), s.v_view());
  REQUIRE(sparse_attention<OnlyF32>(plan, s.q_view(), kv, s.out_view(), options).ok());
  const std::vector<float> planned = s.out;
  REQUIRE(sparse_attention<OnlyF32>(s.q_view(), kv, lists, s.out_view(), options).ok());
  CHECK(s.out == planned);
  std::vector<std::int32_t> entries = owned.entries;
  entries[static_cast<std::size_t>(lists.capacity) * 37] = 10;   // keys 320 and up
  KeyLists wrong = lists;
  wrong.entries = entries.data();
  wrong.count = {};
  CHECK(!make_sparse_plan(plan, sizes, {&wrong, 1}, options).ok());
  CHECK(sparse_attention<OnlyF32>(plan, s.q_view(), kv, s.out_view(), options).code() == Code::invalid_argument);
}

TEST_CASE("V between the rows of K, at another distance, is gathered by itself", "[sparse]") {
  test::Random random(82);
  const std::vector<float> rows = numbers(random, 64 * 16);
  Setup s(random, 1, 1, 1, 20, 32, 16, 16);
  for (index_t j = 0; j < 32; ++j) {
    std::copy_n(&rows[at(j * 16)], 16, &s.k[at(j * 16)]);
    std::copy_n(&rows[at(2 * j * 16)], 16, &s.v[at(j * 16)]);
  }
  Kv kv = dense_kv(s.k_view(), s.v_view());
  kv.k.data = kv.v.data = reinterpret_cast<const std::byte*>(rows.data());
  kv.v.stride[2] *= 2;
  const std::vector<std::int32_t> tokens{0, 3, 7, 12, 20};
  KeyLists lists;
  lists.entries = tokens.data();
  lists.capacity = 5;
  lists.q_block = 20;
  const AttentionOptions options{.regime = Regime::prefill};
  REQUIRE(sparse_attention<OnlyF32>(s.q_view(), kv, lists, s.out_view(), options).ok());
  CHECK(worst(s, options, {&lists, 1}) <= 1.);
}

TEST_CASE("one long prefill among many decodes has as many lists as queries", "[sparse]") {
  test::Random random(83);
  Setup s(random, 1, 1, 1, 40 + 30, 100, 8, 8);
  std::vector<index_t> cu_q{0, 40}, cu_k{0, 70};
  for (index_t n = 1; n <= 30; ++n) {
    cu_q.push_back(40 + n);
    cu_k.push_back(70 + n);
  }
  const std::vector<std::int32_t> first_key(31 * 40, 0);
  KeyLists lists;
  lists.entries = first_key.data();
  lists.capacity = 1;
  lists.batch = 31;
  lists.q_blocks = 40;
  AttentionOptions options{.causal = Causal::bottom_right};
  options.cu_len_q = cu_q;
  options.cu_len_k = cu_k;
  SparsePlan plan;
  REQUIRE(make_sparse_plan(plan, {1, 1, 1, 70, 100, 8, 8}, {&lists, 1}, options).ok());
  CHECK(plan.lists.total_slots() == 70);
  REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), lists, s.out_view(), options).ok());
  for (index_t i = 0; i < 70; ++i) {   // each sees the first key of its sequence alone
    const index_t key = i < 40 ? 0 : 70 + i - 40;
    CHECK(s.out[at(i * 8)] == Catch::Approx(s.v[at(key * 8)]).epsilon(1e-6));
  }
}

TEST_CASE("a variant's score and mask see the positions of listed keys", "[sparse]") {
  test::Random random(78);
  Setup s(random, 1, 2, 1, 30, 90, 16, 16);
  const test::ListShape shape{.heads = 2, .len_q = 30, .q_block = 8, .sorted = false, .density = 0.5};
  const test::OwnedLists owned = test::random_lists(random, shape, {90});
  const KeyLists lists = owned.view();
  const AttentionOptions options{.causal = Causal::bottom_right};
  const auto v = variant()
                     .with_score([](auto score, int, int, int q, auto k) { return score - 0.01f * to_float(q - k); })
                     .with_mask([](int, int, int, auto k) { return (k & 3) != 1; });
  const Kv kv = dense_kv(s.k_view(), s.v_view());
  REQUIRE(sparse_attention<OnlyF32>(s.q_view(), kv, {&lists, 1}, s.out_view(), options, v).ok());
  std::vector<float> bias = test::list_bias({&lists, 1}, 1, 2, 30, {90}, 90);
  for (index_t n = 0; n < 2 * 30; ++n) {
    for (index_t j = 0; j < 90; ++j) {
      float& b = bias[at(n * 90 + j)];
      b = j % 4 == 1 ? -kInf : b - 0.01f * static_cast<float>(n % 30 + 60 - j);
    }
  }
  AttentionOptions dense = options;
  dense.bias = {bias.data(), {1, 2, 30, 90}, {2 * 30 * 90, 30 * 90, 90, 1}};
  const test::Expected e = test::expect(s.q_view(), s.k_view(), s.v_view(), dense);
  for (std::size_t n = 0; n < e.out.size(); ++n) CHECK(test::in_budgets(double{s.out[n]}, e.out[n], e.out_error[n]) <= 1.);
}

TEST_CASE("wrong lists are refused with their numbers, and nothing is written", "[sparse][errors]") {
  test::Random random(79);
  Setup s(random, 1, 4, 2, 6, 50, 8, 8);
  std::vector<std::int32_t> tokens{0, 7, 49, -1};
  KeyLists good;
  good.entries = tokens.data();
  good.capacity = 4;
  good.q_block = 6;
  const auto refused = [&](const KeyLists& lists, const char* words) {
    std::fill(s.out.begin(), s.out.end(), -7.f);
    const Status status = sparse_attention(s.q_view(), s.k_view(), s.v_view(), lists, s.out_view());
    INFO(status.message());
    CHECK(!status.ok());
    CHECK(std::string(status.message()).find(words) != std::string::npos);
    CHECK(s.out == std::vector<float>(s.out.size(), -7.f));
  };
  REQUIRE(sparse_attention(s.q_view(), s.k_view(), s.v_view(), good, s.out_view()).ok());
  KeyLists bad = good;
  tokens[1] = 50;
  refused(bad, "keys 50 .. 50, the sequence has 50");
  tokens[1] = 7;
  bad.heads = 3;
  refused(bad, "3 heads");
  bad = good;
  bad.batch = 2;
  refused(bad, "2 sequences");
  bad = good;
  bad.q_block = 5;
  refused(bad, "1 blocks of 5 queries");
  bad = good;
  bad.entries = nullptr;
  refused(bad, "null entries");
  const std::vector<index_t> falling{0, 3, 2};
  bad = good;
  bad.begin = falling;
  refused(bad, "3 entries for 1 lists");
  bad.q_blocks = 2;
  refused(bad, "less than");
  const std::vector<std::int32_t> too_many{5};
  bad = good;
  bad.count = too_many;
  refused(bad, "count[0] is 5");
  bad = good;
  bad.ranges = true;
  tokens = {40, 30, -1, -1};
  refused(bad, "keys 40 .. 29");
  bad.capacity = 3;
  refused(bad, "ranges come in pairs");
  tokens = {50, 50, 10, 10};   // empty ones are legal anywhere
  bad.capacity = 4;
  CHECK(sparse_attention(s.q_view(), s.k_view(), s.v_view(), bad, s.out_view()).ok());
  bad.capacity = INT32_MAX;
  bad.q_blocks = INT32_MAX;
  bad.heads = 4;
  refused(bad, "too large");
  std::fill(s.out.begin(), s.out.end(), -7.f);
  CHECK(sparse_attention<OnlyF32>(s.q_view(), dense_kv(s.k_view(), s.v_view()), std::span<const KeyLists>(), s.out_view())
            .code() == Code::invalid_argument);
}
