// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/moba.hpp"

#include "fovea/reference/moba.hpp"
#include "query_selectors.hpp"

namespace {

using namespace test;
using fovea::MobaOptions;
using F32 = fovea::Formats<fovea::Format::f32>;

SelectorCase moba(index_t block, index_t k) {
  return {[=](const Dense& x, const AttentionOptions& o, const fovea::Result& out) {
            return fovea::moba_attention<F32>(x.q.view(), fovea::dense_kv(x.k.view(), x.v.view()), out, o, {block, k, {}});
          },
          [=](const Dense& x, const AttentionOptions& o) {
            return fovea::reference::moba_selection(x.q.view(), x.k.view(), o, {block, k});
          }};
}

AttentionOptions causal(Regime regime = Regime::automatic) {
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  options.regime = regime;
  return options;
}

Values means_of(const Dense& x, index_t block, const AttentionOptions& options = {}) {
  Values means(x.k.batch, x.k.heads, (x.k.len + block - 1) / block, x.k.dim, canary());
  const Status status =
      fovea::moba_means<F32>(fovea::dense_kv(x.k.view(), x.v.view()), means.view(), options, {block, 3, {}});
  INFO(status.message());
  REQUIRE(status.ok());
  return means;
}

}   // namespace

TEST_CASE("moba: exact selection and attention on integers, as lists and grouped by block", "[moba]") {
  for (const Regime regime : {Regime::decode, Regime::prefill, Regime::automatic}) {
    for (const index_t block : {index_t{8}, index_t{16}}) {   // powers of two: means are exact
      for (const index_t k : {index_t{1}, index_t{2}, index_t{4}}) {
        INFO("regime " << static_cast<int>(regime) << ", block " << block << ", k " << k);
        check_selected(moba(block, k), integer_problem(20, 2, 4, 2, 96, 96, 16, 8, 3), causal(regime));
        check_selected(moba(block, k), integer_problem(21, 1, 3, 1, 70, 101, 12, 20, 3), causal(regime));
      }
    }
  }
}

TEST_CASE("moba: lengths, places, sinks and a window", "[moba]") {
  // The last block has 8 of 16 keys: its mean is exact too, for queries behind all keys.
  const std::vector<index_t> used{40, 80}, offsets{-5, 50}, far{90, 30};
  const std::vector<float> sink{0.5f, -1.f, 2.f, 0.f};
  for (const Regime regime : {Regime::decode, Regime::prefill}) {
    const Dense x = integer_problem(31, 2, 4, 2, 70, 80, 16, 8, 3);
    AttentionOptions options = causal(regime);
    options.sink = sink;
    check_selected(moba(16, 3), x, options);
    options.len_k = used;
    check_selected(moba(16, 3), x, options);
    options.q_offset = offsets;   // queries before all keys
    check_selected(moba(16, 3), x, options);
    options.q_offset = far;   // queries behind all keys have no own block
    check_selected(moba(16, 3), x, options);
    options.sink = {};
    check_selected(moba(16, 3), x, options);
    options = causal(regime);
    options.window.left = 30;   // listed, whatever the regime
    check_selected(moba(16, 3), x, options);
  }
}

TEST_CASE("moba: a batch of long and short sequences", "[moba]") {
  // 70 queries are grouped, 3 are listed; each as if it were alone.
  const Dense x = integer_problem(41, 1, 4, 2, 73, 100, 16, 8, 3);
  Dense both(42, 2, 4, 2, 73, 100, 16, 8);
  const std::vector<index_t> cu{0, 70, 73};
  both.q = x.q;
  both.k = integer_problem(43, 2, 4, 2, 1, 100, 16, 8, 3).k;
  AttentionOptions options = causal();
  options.cu_len_q = cu;
  Result r = unwritten(both.q.view(), only_batch(both.v.view(), 0));
  options.lse = r.lse_view();
  const MobaOptions rule{16, 3, {}};
  REQUIRE(
      fovea::moba_attention<F32>(both.q.view(), fovea::dense_kv(both.k.view(), both.v.view()), r.out.view(), options, rule)
          .ok());
  for (index_t b = 0; b < 2; ++b) {
    Dense one = with_queries(both, cu[static_cast<std::size_t>(b)],
                             cu[static_cast<std::size_t>(b) + 1] - cu[static_cast<std::size_t>(b)]);
    one.k = Values(1, 2, 100, 16);
    one.v = Values(1, 2, 100, 8);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t j = 0; j < 100; ++j) {
        for (index_t d = 0; d < 16; ++d) one.k.view()(0, h, j, d) = both.k.view()(b, h, j, d);
        for (index_t d = 0; d < 8; ++d) one.v.view()(0, h, j, d) = both.v.view()(b, h, j, d);
      }
    }
    const Result alone = run_selector(moba(16, 3), one, causal());
    CHECK(same_rows(r, 0, cu[static_cast<std::size_t>(b)], alone));
    CHECK(error_over(alone, one, causal(), moba(16, 3).select(one, causal())) <= 1);
  }
}

TEST_CASE("moba: the lists themselves, ties to the lower block", "[moba]") {
  Dense x = integer_problem(51, 2, 4, 2, 5, 60, 16, 8, 3);
  const Values means = means_of(x, 8);
  std::vector<std::int32_t> lists(2 * 4 * 5 * 3, 99);
  const fovea::View<std::int32_t, 4> view{lists.data(), {2, 4, 5, 3}, {60, 15, 3, 1}};
  const std::vector<index_t> used{60, 60};
  AttentionOptions options = causal();
  options.len_k = used;
  REQUIRE(fovea::moba_select(x.q.view(), view, options, {8, 3, means.view()}).ok());
  // The own block is listed whole; causality cuts it in the attention.
  CHECK(selection_of(lists, 3, 8, 60) == fovea::reference::moba_selection(x.q.view(), x.k.view(), options, {8, 3}));
  std::fill(x.k.data.begin(), x.k.data.end(), 1.f);
  const Values equal = means_of(x, 8);
  REQUIRE(fovea::moba_select(x.q.view(), view, options, {8, 3, equal.view()}).ok());
  CHECK(std::vector<std::int32_t>(lists.begin() + 12, lists.begin() + 15) == std::vector<std::int32_t>{0, 1, 7});
}

TEST_CASE("moba: means, at once and block by block", "[moba]") {
  const Dense x(55, 2, 2, 2, 1, 45, 12, 8);
  const Values all = means_of(x, 10);
  for (index_t block = 0; block < 5; ++block) {
    for (index_t d = 0; d < 12; ++d) {
      double sum = 0;
      const index_t end = std::min<index_t>(45, 10 * block + 10);
      for (index_t j = 10 * block; j < end; ++j) sum += double{x.k.view()(1, 1, j, d)};
      CHECK(double{all.view()(1, 1, block, d)} == Approx(sum / static_cast<double>(end - 10 * block)).margin(1e-6));
    }
  }
  Values steps(2, 2, 5, 12, canary());
  for (index_t len = 1; len <= 45; ++len) {
    if (len % 10 != 0 && len != 45) continue;
    const std::vector<index_t> used{len, len};
    AttentionOptions options;
    options.len_k = used;
    REQUIRE(
        fovea::moba_means<F32>(fovea::dense_kv(x.k.view(), x.v.view()), steps.view(), options, {10, 3, {}}, (len - 1) / 10)
            .ok());
  }
  CHECK(same_bits(all.data, steps.data));
  // Given means are those that a call makes itself.
  const Dense y = Dense(56, 2, 4, 2, 66, 80, 16, 8);
  const Values given = means_of(y, 16);
  Result a = unwritten(y.q.view(), y.v.view());
  AttentionOptions options = causal();
  options.lse = a.lse_view();
  REQUIRE(fovea::moba_attention<F32>(y.q.view(), fovea::dense_kv(y.k.view(), y.v.view()), a.out.view(), options,
                                     {16, 3, given.view()})
              .ok());
  CHECK(same_bits(a, run_selector(moba(16, 3), y, causal())));
}

TEST_CASE("moba: all blocks is dense, one block is block-diagonal", "[moba]") {
  const Dense x(61, 1, 4, 2, 70, 90, 16, 8);
  for (const Regime regime : {Regime::decode, Regime::prefill}) {
    check_all_is_dense(moba(16, 6), x, causal(regime));
    check_all_is_dense(moba(16, 100), x, causal(regime));
    check_all_is_dense(moba(128, 1), x, causal(regime));
    check_mass_bound(moba(16, 2), x, causal(regime));
    Selection own(static_cast<std::size_t>(4 * 70 * 90), 0);
    for (index_t row = 0; row < 280; ++row) {
      for (index_t j = 0; j < 90; ++j) own[static_cast<std::size_t>(row * 90 + j)] = j / 16 == (row % 70 + 20) / 16 ? 1 : 0;
    }
    CHECK(error_over(run_selector(moba(16, 1), x, causal(regime)), x, causal(regime), own) <= 1);
  }
}

TEST_CASE("moba: regret on random numbers", "[moba]") {
  const Dense x(65, 1, 2, 1, 40, 200, 32, 8);
  const Values means = means_of(x, 10);
  std::vector<std::int32_t> lists(2 * 40 * 5);
  const std::vector<index_t> used{200};
  AttentionOptions options = causal();
  options.len_k = used;
  REQUIRE(
      fovea::moba_select(x.q.view(), {lists.data(), {1, 2, 40, 5}, {400, 200, 5, 1}}, options, {10, 5, means.view()}).ok());
  const Selection got = selection_of(lists, 5, 10, 200);
  const Selection best = fovea::reference::moba_selection(x.q.view(), x.k.view(), options, {10, 5});
  for (index_t row = 0; row < 80; ++row) {
    double sum = 0, most = 0, sizes = 0;
    for (index_t j = 0; j < (row % 40 + 160) / 10; ++j) {
      double gate = 0;
      for (index_t key = 10 * j; key < 10 * j + 10; ++key) {
        for (index_t d = 0; d < 32; ++d) {
          const double product = double{x.q.view()(0, row / 40, row % 40, d)} * double{x.k.view()(0, 0, key, d)} / 10;
          gate += product;
          sizes += std::abs(product);
        }
      }
      sum += got[static_cast<std::size_t>(row * 200 + 10 * j)] != 0 ? gate : 0;
      most += best[static_cast<std::size_t>(row * 200 + 10 * j)] != 0 ? gate : 0;
    }
    CHECK(sum >= most - 64 * kUnit * sizes);
  }
}

TEST_CASE("moba: chunks, decode, future, lanes, workspace", "[moba]") {
  const Dense x = integer_problem(71, 1, 4, 2, 90, 120, 16, 8, 3);
  const SelectorCase c = moba(16, 3);
  check_decode(c, x, causal());
  for (const Regime regime : {Regime::decode, Regime::prefill}) {
    check_chunks(c, x, causal(regime), 7);
    check_chunks(c, x, causal(regime), 64);
    check_future(c, x, causal(regime), 77);
    check_lanes(c, x, causal(regime));
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions options = causal(regime);
    options.lse = r.lse_view();
    const std::size_t bytes =
        fovea::moba_workspace_bytes(x.q.view(), fovea::dense_kv(x.k.view(), x.v.view()), r.out.view(), options, {16, 3, {}});
    CHECK(bytes > 0);
    // Grouped calls need no more than is said.
    check_workspace(c, x, causal(regime), bytes + (regime == Regime::decode ? std::size_t{4} << 20 : 64));
  }
}

TEST_CASE("moba: keys that are not selected are not read", "[moba]") {
  for (const Regime regime : {Regime::decode, Regime::prefill}) {
    const Dense x = integer_problem(81, 2, 4, 2, 3, 96, 16, 8, 3);
    const Selection keep = moba(8, 3).select(x, causal());
    const Dense bad = poisoned_elsewhere(x, keep);
    const Values means = means_of(x, 8);
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions options = causal(regime);
    options.lse = r.lse_view();
    REQUIRE(fovea::moba_attention<F32>(bad.q.view(), fovea::dense_kv(bad.k.view(), bad.v.view()), r.out.view(), options,
                                       {8, 3, means.view()})
                .ok());
    CHECK(std::any_of(bad.k.data.begin(), bad.k.data.end(), is_canary));
    CHECK(error_over(r, x, causal(), keep) <= 1);
  }
}

TEST_CASE("moba: queries and outputs in 16 bits and with strides", "[moba]") {
  const Dense x = integer_problem(85, 1, 4, 2, 70, 90, 16, 8, 3);
  std::vector<fovea::bf16> q(x.q.data.size()), out(static_cast<std::size_t>(4 * 70 * 8));
  for (index_t h = 0; h < 4; ++h) {
    for (index_t i = 0; i < 70; ++i) {
      for (index_t d = 0; d < 16; ++d)
        q[static_cast<std::size_t>((i * 4 + h) * 16 + d)] = fovea::convert<fovea::bf16>(x.q.view()(0, h, i, d));
    }
  }
  for (const Regime regime : {Regime::decode, Regime::prefill}) {
    const Result want = run_selector(moba(16, 3), x, causal(regime));
    REQUIRE(fovea::moba_attention<F32>(fovea::bshd<const fovea::bf16>(q.data(), 1, 70, 4, 16),
                                       fovea::dense_kv(x.k.view(), x.v.view()), fovea::bshd(out.data(), 1, 70, 4, 8),
                                       causal(regime), {16, 3, {}})
                .ok());
    bool equal = true;
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 0; i < 70; ++i) {
        for (index_t d = 0; d < 8; ++d)
          equal = equal && out[static_cast<std::size_t>((i * 4 + h) * 8 + d)].bits ==
                               fovea::convert<fovea::bf16>(want.at(0, h, i, d)).bits;
      }
    }
    CHECK(equal);
  }
}

TEST_CASE("moba: refusals write nothing", "[moba][errors]") {
  const Dense x(91, 2, 4, 2, 3, 40, 16, 8);
  const Values means = means_of(x, 8);
  Values out(2, 4, 3, 8, canary());
  const auto refused = [&](const MobaOptions& rule, const char* words, const AttentionOptions& options = causal()) {
    const Status status =
        fovea::moba_attention<F32>(x.q.view(), fovea::dense_kv(x.k.view(), x.v.view()), out.view(), options, rule);
    INFO(status.message());
    CHECK(!status.ok());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  refused({0, 3, {}}, "block 0, k 3");
  refused({8, 0, {}}, "block 8, k 0");
  refused({8, 3, {}}, "must be causal", {});
  refused({4, 3, means.view()}, "means are [2, 2, 5, 16], must be [2, 2, at least 10, 16]");
  refused({8, 3, cut(means.view(), 3, 0, 8)}, "means are [2, 2, 5, 8]");
  refused({8, 3, fovea::bhsd<const float>(out.data.data(), 2, 2, 5, 16)}, "overlaps means");
  AttentionOptions options = causal();
  options.softcap = -1;
  refused({8, 3, {}}, "softcap", options);
  const fovea::Tensor<float> nowhere;
  CHECK(!fovea::moba_means<F32>(fovea::dense_kv(x.k.view(), x.v.view()), nowhere, {}, {8, 3, {}}).ok());
  std::vector<std::int32_t> lists(2 * 4 * 3 * 3);
  CHECK(!fovea::moba_select(x.q.view(), {lists.data(), {2, 4, 3, 3}, {36, 9, 3, 1}}, causal(), {8, 3, {}}).ok());
}
