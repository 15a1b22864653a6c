// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/adamas.hpp"

#include "fovea/cache/code_cache.hpp"
#include "fovea/reference/adamas.hpp"
#include "query_selectors.hpp"

namespace {

using namespace test;
using fovea::AdamasOptions;
using fovea::CodeCache;
using fovea::CodeDistance;
using F32 = fovea::Formats<fovea::Format::f32>;

CodeCache codes_of(const Values& k, std::span<const index_t> len_k = {}) {
  CodeCache cache;
  REQUIRE(cache.create({k.batch, k.len, k.heads, k.dim, 10.f}).ok());
  for (index_t b = 0; b < k.batch; ++b) {
    const index_t len = len_k.empty() ? k.len : len_k[static_cast<std::size_t>(b)];
    REQUIRE(cache.append(b, only_pos(only_batch(k.view(), b), 0, len)).ok());
  }
  return cache;
}

AdamasOptions budget(index_t keys, bool current = true, CodeDistance distance = CodeDistance::exact) {
  return {keys, current, 10.f, distance};
}

SelectorCase adamas(const AdamasOptions& options) {
  return {[=](const Dense& x, const AttentionOptions& o, const fovea::Result& out) {
            const CodeCache cache = codes_of(x.k, o.len_k);
            return fovea::adamas_attention<F32>(x.q.view(), fovea::dense_kv(x.k.view(), x.v.view()), cache.codes(), out, o,
                                                options);
          },
          [=](const Dense& x, const AttentionOptions& o) {
            return fovea::reference::adamas_selection(
                x.q.view(), x.k.view(), o,
                {options.budget, options.current, options.distance == CodeDistance::xor_popcount, 10});
          }};
}

AttentionOptions causal() {
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  options.scale = 0.01f;   // rows of large integers
  return options;
}

}   // namespace

TEST_CASE("adamas: exact selection and attention on integers", "[adamas]") {
  for (const CodeDistance distance : {CodeDistance::exact, CodeDistance::xor_popcount}) {
    for (const bool current : {true, false}) {
      for (const index_t keys : {index_t{1}, index_t{9}, index_t{40}}) {
        const SelectorCase c = adamas(budget(keys, current, distance));
        const Dense x = integer_problem(20 + static_cast<std::uint64_t>(keys), 2, 4, 2, 5, 75, 16, 8, 12);
        INFO("budget " << keys << ", current " << current);
        check_selected(c, x, causal());
        AttentionOptions options = causal();
        options.causal = Causal::none;
        check_selected(c, x, options);
        options = causal();
        options.window.left = 41;
        check_selected(c, x, options);
      }
    }
  }
  const std::vector<index_t> used{0, 43}, offsets{7, -2};
  const Dense x = integer_problem(31, 2, 4, 1, 6, 60, 64, 8, 12);
  AttentionOptions options = causal();
  options.len_k = used;
  check_selected(adamas(budget(12)), x, options);
  options.q_offset = offsets;   // a query before all keys sees nothing: 0 and -inf
  check_selected(adamas(budget(12)), x, options);
}

TEST_CASE("adamas: the lists themselves, ties to the lower key", "[adamas]") {
  Dense x = integer_problem(41, 2, 4, 2, 3, 50, 16, 8, 12);
  std::vector<std::int32_t> lists(2 * 4 * 3 * 9, 99);
  const fovea::View<std::int32_t, 4> view{lists.data(), {2, 4, 3, 9}, {108, 27, 9, 1}};
  const CodeCache cache = codes_of(x.k);
  REQUIRE(fovea::adamas_select(x.q.view(), cache.codes(), view, causal(), budget(9)).ok());
  CHECK(selection_of(lists, 9, 1, 50) == fovea::reference::adamas_selection(x.q.view(), x.k.view(), causal(), {9}));
  std::fill(x.k.data.begin(), x.k.data.end(), 0.f);   // all codes 1: all distances are equal
  const CodeCache equal = codes_of(x.k);
  CHECK(equal.codes()(0, 0, 0, 0) == 0x55);
  REQUIRE(fovea::adamas_select(x.q.view(), equal.codes(), view, causal(), budget(9)).ok());
  CHECK(std::vector<std::int32_t>(lists.begin() + 18, lists.begin() + 27) ==
        std::vector<std::int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 49});
}

TEST_CASE("adamas: regret on random numbers, and where the released kernel goes astray", "[adamas]") {
  Dense x(45, 1, 2, 1, 1, 300, 128, 8);
  for (float& v : x.k.data) v *= 9;
  for (float& v : x.q.data) v *= 9;
  const CodeCache cache = codes_of(x.k);
  std::vector<std::int32_t> lists(2 * 32);
  int misses[2];
  for (const CodeDistance kind : {CodeDistance::exact, CodeDistance::xor_popcount}) {
    REQUIRE(fovea::adamas_select(x.q.view(), cache.codes(), {lists.data(), {1, 2, 1, 32}, {64, 32, 32, 1}}, {},
                                 budget(32, false, kind))
                .ok());
    const Selection got = selection_of(lists, 32, 1, 300);
    const Selection exact = fovea::reference::adamas_selection(x.q.view(), x.k.view(), {}, {32, false});
    misses[static_cast<int>(kind)] = 0;
    for (index_t h = 0; h < 2; ++h) {
      const std::vector<int> query = fovea::reference::adamas_codes(&x.q.view()(0, h, 0, 0), 128, 10);
      int sum = 0, best = 0;
      for (index_t j = 0; j < 300; ++j) {
        const auto at = static_cast<std::size_t>(h * 300 + j);
        const int distance = fovea::reference::adamas_distance(
            query, fovea::reference::adamas_codes(&x.k.view()(0, 0, j, 0), 128, 10), false);
        sum += got[at] != 0 ? distance : 0;
        best += exact[at] != 0 ? distance : 0;
      }
      misses[static_cast<int>(kind)] += sum - best;
    }
  }
  CHECK(misses[0] <= 2);   // a number within rounding of a threshold may have either code
  CHECK(misses[1] > 32);
}

TEST_CASE("adamas: a budget of all keys is dense", "[adamas]") {
  const Dense x(51, 1, 4, 2, 7, 70, 16, 8);
  check_all_is_dense(adamas(budget(70)), x, causal());
  check_all_is_dense(adamas(budget(1000)), x, causal());
  check_mass_bound(adamas(budget(24)), x, causal());
}

TEST_CASE("adamas: chunks, decode, future, lanes, workspace", "[adamas]") {
  const Dense x = integer_problem(61, 1, 4, 2, 40, 90, 16, 8, 12);
  const SelectorCase c = adamas(budget(20));
  AttentionOptions options = causal();
  check_decode(c, x, options);
  options.regime = Regime::decode;
  check_chunks(c, x, options, 7);
  check_future(c, x, options, 70);
  check_lanes(c, x, options);
  check_workspace(c, x, options,
                  fovea::adamas_workspace_bytes({1, 4, 2, 40, 90, 16, 8}, options, budget(20)) + (std::size_t{4} << 20));
}

TEST_CASE("adamas: keys that are not selected are not read", "[adamas]") {
  const Dense x = integer_problem(71, 2, 4, 2, 2, 96, 16, 8, 12);
  const Selection keep = adamas(budget(12)).select(x, causal());
  const Dense bad = poisoned_elsewhere(x, keep);
  const CodeCache cache = codes_of(x.k);
  Result r = unwritten(x.q.view(), x.v.view());
  AttentionOptions options = causal();
  options.lse = r.lse_view();
  REQUIRE(fovea::adamas_attention<F32>(bad.q.view(), fovea::dense_kv(bad.k.view(), bad.v.view()), cache.codes(),
                                       r.out.view(), options, budget(12))
              .ok());
  CHECK(std::any_of(bad.k.data.begin(), bad.k.data.end(), is_canary));
  CHECK(error_over(r, x, causal(), keep) <= 1);
}

TEST_CASE("adamas: codes of a tensor are those of the cache", "[adamas]") {
  const Dense x = integer_problem(81, 2, 2, 2, 1, 20, 32, 8, 12);
  std::vector<std::uint8_t> codes(2 * 2 * 20 * 8);
  REQUIRE(fovea::adamas_encode(x.k.view(), fovea::bhsd(codes.data(), 2, 2, 20, 8)).ok());
  const CodeCache cache = codes_of(x.k);
  CHECK(std::memcmp(codes.data(), cache.codes().data, codes.size()) == 0);
  CHECK(!fovea::adamas_encode(x.k.view(), fovea::bhsd(codes.data(), 2, 2, 20, 4)).ok());
  CHECK(!fovea::adamas_encode(cut(x.k.view(), 3, 0, 12), fovea::bhsd(codes.data(), 2, 2, 20, 3)).ok());
  CHECK(!fovea::adamas_encode(x.k.view(), fovea::bhsd(codes.data(), 2, 2, 20, 8), -1.f).ok());
}

TEST_CASE("adamas: refusals write nothing", "[adamas][errors]") {
  const Dense x(91, 2, 4, 2, 3, 40, 16, 8);
  const CodeCache cache = codes_of(x.k);
  Values out(2, 4, 3, 8, canary());
  const auto refused = [&](const fovea::View<const std::uint8_t, 4>& codes, const AdamasOptions& rule, const char* words,
                           const AttentionOptions& options = causal()) {
    const Status status =
        fovea::adamas_attention<F32>(x.q.view(), fovea::dense_kv(x.k.view(), x.v.view()), codes, out.view(), options, rule);
    INFO(status.message());
    CHECK(!status.ok());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  refused(cache.codes(), budget(0), "budget is 0");
  refused(cache.codes(), {8, true, 0.f, CodeDistance::exact}, "threshold is 0");
  refused(cache.codes(), {8, true, 10.f, static_cast<CodeDistance>(7)}, "distance is 7");
  auto other = cache.codes();
  other.extent[2] = 39;
  refused(other, budget(8), "codes are [2, 2, 39, 4], must be [2, 2, at least 40, 4]");
  other = cache.codes();
  other.data = nullptr;
  refused(other, budget(8), "codes has null data");
  other = cache.codes();
  other.data = reinterpret_cast<const std::uint8_t*>(out.data.data());
  refused(other, budget(8), "overlaps codes");
  const Dense odd(92, 1, 1, 1, 1, 8, 12, 8);
  Values odd_out(1, 1, 1, 8, canary());
  CHECK(
      fovea::adamas_attention<F32>(odd.q.view(), fovea::dense_kv(odd.k.view(), odd.v.view()), cache.codes(), odd_out.view())
          .code() == fovea::Code::unsupported);
  AttentionOptions options = causal();
  options.softcap = -1;
  refused(cache.codes(), budget(8), "softcap", options);
}
