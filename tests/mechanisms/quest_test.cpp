// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/quest.hpp"

#include "fovea/cache/page_bounds.hpp"
#include "fovea/reference/quest.hpp"
#include "query_selectors.hpp"

namespace {

using namespace test;
using fovea::Format;
using fovea::Operand;
using fovea::PageBounds;
using fovea::QuestOptions;
using F32 = fovea::Formats<Format::f32>;

PageBounds bounds_of(const Values& k, index_t page, Format format, std::span<const index_t> len_k = {}) {
  PageBounds bounds;
  REQUIRE(bounds.create({k.batch, k.len, k.heads, k.dim, page, format}).ok());
  for (index_t b = 0; b < k.batch; ++b) {
    const index_t len = len_k.empty() ? k.len : len_k[static_cast<std::size_t>(b)];
    REQUIRE(bounds.append(b, only_pos(only_batch(k.view(), b), 0, len)).ok());
  }
  return bounds;
}

SelectorCase quest(const QuestOptions& options, Format format = Format::f32) {
  return {[=](const Dense& x, const AttentionOptions& o, const fovea::Result& out) {
            const PageBounds bounds = bounds_of(x.k, options.page, format, o.len_k);
            return fovea::quest_attention<F32>(x.q.view(), fovea::dense_kv(x.k.view(), x.v.view()), bounds.bounds(), out, o,
                                               options);
          },
          [=](const Dense& x, const AttentionOptions& o) {
            return fovea::reference::quest_selection(x.q.view(), x.k.view(), o,
                                                     {options.page, fovea::quest_pages(options), options.current_page});
          }};
}

QuestOptions small(index_t page, index_t budget, bool current = true) { return {page, budget, 1, current}; }

AttentionOptions causal() {
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  return options;
}

}   // namespace

TEST_CASE("quest: the bound of a page, by hand", "[quest]") {
  const std::vector<float> keys{1, -2, 3, 0, -1, 4, 0, 1}, query{2, -1};
  PageBounds bounds;
  REQUIRE(bounds.create({1, 4, 1, 2, 4, Format::f32}).ok());
  REQUIRE(bounds.append(0, fovea::bhsd(keys.data(), 1, 1, 4, 2)).ok());
  const auto* const row = reinterpret_cast<const float*>(bounds.bounds().data);
  CHECK(std::vector<float>(row, row + 4) == std::vector<float>{3, 4, -1, -2});
  CHECK(fovea::reference::quest_bound(query.data(), fovea::bhsd(keys.data(), 1, 1, 4, 2), 0, 0, 0, 4) == 8);
  alignas(64) float parts[64] = {2, 0, 0, -1};
  float score = 0;
  fovea::quest_bounds::scores<4, fovea::load_f32, fovea::load_f32_some>(parts, 4, bounds.bounds().data, 16, 1, &score);
  CHECK(score == 8.f);
}

TEST_CASE("quest: bounds are bounds, in both formats and any dim", "[quest]") {
  for (const Format format : {Format::f32, Format::bf16}) {
    for (const index_t dim : {index_t{5}, index_t{16}, index_t{40}}) {
      const Dense x(11 + static_cast<std::uint64_t>(dim), 1, 1, 1, 1, 50, dim, 4);
      const PageBounds bounds = bounds_of(x.k, 8, format);
      const fovea::quest_bounds::Selector select =
          fovea::quest_bounds::selector(x.q.view(), bounds.bounds(), {1, 1, 1, 1, 50, dim, dim}, {}, small(8, 16));
      std::vector<std::byte> memory(select.lane_bytes() + 64);
      fovea::Bump bump(fovea::aligned(memory).data());
      const auto scratch = fovea::quest_bounds::carve(bump, dim, 7, 2);
      select.bounds_of({0, 0, 0, 0, 0, 0, 0, 50}, 0, 7, scratch);
      for (index_t j = 0; j < 50; ++j) {
        double dot = 0, sizes = 0;
        for (index_t d = 0; d < dim; ++d) {
          const double product = double{x.q.data[static_cast<std::size_t>(d)]} * double{x.k.view()(0, 0, j, d)};
          dot += product;
          sizes += std::abs(product);
        }
        CHECK(double{scratch.scores[j / 8]} >= dot - 4 * static_cast<double>(dim) * kUnit * sizes);
      }
      for (index_t page = 0; page < 7; ++page) {
        const double want =
            fovea::reference::quest_bound(x.q.data.data(), x.k.view(), 0, 0, page * 8, std::min<index_t>(50, page * 8 + 8));
        const double unit = format == Format::bf16 ? 0x1p-7 : 1e-6;   // a bf16 step outwards at most
        CHECK(std::abs(double{scratch.scores[page]} - want) <= unit * 4 * static_cast<double>(dim));
      }
    }
  }
}

TEST_CASE("quest: exact selection and attention on integers", "[quest]") {
  for (const bool current : {true, false}) {
    for (const index_t page : {index_t{1}, index_t{4}, index_t{16}}) {
      for (const index_t budget : {index_t{8}, index_t{32}}) {
        const SelectorCase c = quest(small(page, budget, current));
        const Dense x = integer_problem(20 + static_cast<std::uint64_t>(page + budget), 2, 4, 2, 5, 75, 16, 8, 3);
        INFO("page " << page << ", budget " << budget << ", current " << current);
        check_selected(c, x, causal());
        check_selected(c, x, {});
        AttentionOptions window = causal();
        window.window.left = 41;
        check_selected(c, x, window);
      }
    }
  }
  const std::vector<index_t> used{0, 43}, offsets{7, -2};
  const Dense x = integer_problem(31, 2, 4, 1, 6, 60, 20, 8, 3);
  AttentionOptions options = causal();
  options.len_k = used;
  check_selected(quest(small(4, 12)), x, options);
  options.q_offset = offsets;   // a query before all keys sees nothing: 0 and -inf
  check_selected(quest(small(4, 12)), x, options);
}

TEST_CASE("quest: the lists themselves, ties to the lower page", "[quest]") {
  Dense x = integer_problem(41, 2, 4, 2, 3, 50, 16, 8, 1);
  const QuestOptions rule = small(4, 16);
  const PageBounds bounds = bounds_of(x.k, 4, Format::bf16);
  std::vector<std::int32_t> lists(2 * 4 * 3 * 4, 99);
  const std::vector<index_t> used{50, 50};
  AttentionOptions options = causal();
  options.len_k = used;
  REQUIRE(
      fovea::quest_select(x.q.view(), bounds.bounds(), {lists.data(), {2, 4, 3, 4}, {48, 12, 4, 1}}, options, rule).ok());
  CHECK(selection_of(lists, 4, 4, 50) == fovea::reference::quest_selection(x.q.view(), x.k.view(), options, {4, 4, true}));
  // All bounds equal: the first pages, and the current one.
  std::fill(x.k.data.begin(), x.k.data.end(), 1.f);
  const PageBounds equal = bounds_of(x.k, 4, Format::f32);
  REQUIRE(fovea::quest_select(x.q.view(), equal.bounds(), {lists.data(), {2, 4, 3, 4}, {48, 12, 4, 1}}, options, rule).ok());
  CHECK(std::vector<std::int32_t>(lists.begin() + 8, lists.begin() + 12) == std::vector<std::int32_t>{0, 1, 2, 12});
}

TEST_CASE("quest: never fewer than least_pages", "[quest]") {
  CHECK(fovea::quest_pages({16, 2048, 1, true}) == 128);
  CHECK(fovea::quest_pages({16, 16, 3, true}) == 3);
  CHECK(fovea::quest_pages({16, 4, 0, true}) == 1);
}

TEST_CASE("quest: all pages is dense, a page of one key is exact top-k", "[quest]") {
  const Dense x(51, 1, 4, 2, 7, 70, 16, 8);
  for (const AttentionOptions& options : {causal(), AttentionOptions{}}) {
    check_all_is_dense(quest(small(16, 4096), Format::bf16), x, options);
    check_mass_bound(quest(small(8, 24)), x, options);
  }
  // Page 1: the keys with the largest scores. Regret on random numbers: what is missed is within rounding.
  const Selection got = quest(small(1, 9, false)).select(x, causal());
  const PageBounds bounds = bounds_of(x.k, 1, Format::f32);
  std::vector<std::int32_t> lists(4 * 7 * 9);
  const std::vector<index_t> used{70};
  AttentionOptions options = causal();
  options.len_k = used;
  REQUIRE(fovea::quest_select(x.q.view(), bounds.bounds(), {lists.data(), {1, 4, 7, 9}, {252, 63, 9, 1}}, options,
                              small(1, 9, false))
              .ok());
  const Selection chosen = selection_of(lists, 9, 1, 70);
  for (index_t row = 0; row < 28; ++row) {
    double sum = 0, best = 0, sizes = 0;
    for (index_t j = 0; j < 70; ++j) {
      double dot = 0;
      for (index_t d = 0; d < 16; ++d) {
        const double product = double{x.q.view()(0, row / 7, row % 7, d)} * double{x.k.view()(0, row / 14, j, d)};
        dot += product;
        sizes += std::abs(product);
      }
      const auto at = static_cast<std::size_t>(row * 70 + j);
      sum += chosen[at] != 0 ? dot : 0;
      best += got[at] != 0 ? dot : 0;
    }
    CHECK(sum >= best - 32 * kUnit * sizes);
  }
}

TEST_CASE("quest: chunks, decode, future, lanes, workspace", "[quest]") {
  const Dense x = integer_problem(61, 1, 4, 2, 40, 90, 16, 8, 3);
  const SelectorCase c = quest(small(8, 32));
  AttentionOptions options = causal();
  check_decode(c, x, options);
  options.regime = Regime::decode;
  check_chunks(c, x, options, 7);
  check_future(c, x, options, 70);
  check_lanes(c, x, options);
  check_workspace(c, x, options,
                  fovea::quest_workspace_bytes({1, 4, 2, 40, 90, 16, 8}, options, small(8, 32)) + (std::size_t{4} << 20));
}

TEST_CASE("quest: keys that are not selected are not read", "[quest]") {
  const Dense x = integer_problem(71, 2, 4, 2, 2, 96, 16, 8, 3);
  const QuestOptions rule = small(8, 24);
  const Selection keep = quest(rule).select(x, causal());
  const Dense bad = poisoned_elsewhere(x, keep);
  const PageBounds bounds = bounds_of(x.k, 8, Format::bf16);
  Result r = unwritten(x.q.view(), x.v.view());
  AttentionOptions options = causal();
  options.lse = r.lse_view();
  REQUIRE(fovea::quest_attention<F32>(bad.q.view(), fovea::dense_kv(bad.k.view(), bad.v.view()), bounds.bounds(),
                                      r.out.view(), options, rule)
              .ok());
  CHECK(std::any_of(bad.k.data.begin(), bad.k.data.end(), is_canary));
  CHECK(error_over(r, x, causal(), keep) <= 1);
}

TEST_CASE("quest: ragged queries against one cache entry each", "[quest]") {
  const Dense x = integer_problem(81, 2, 4, 2, 4, 64, 16, 8, 3);
  const QuestOptions rule = small(8, 24);
  const Result padded = run_selector(quest(rule), x, causal());
  Values q(1, 4, 8, 16);
  for (index_t h = 0; h < 4; ++h) {
    for (index_t i = 0; i < 8; ++i) {
      for (index_t d = 0; d < 16; ++d) q.view()(0, h, i, d) = x.q.view()(i / 4, h, i % 4, d);
    }
  }
  const std::vector<index_t> cu{0, 4, 8};
  AttentionOptions options = causal();
  options.cu_len_q = cu;
  Result r = unwritten(q.view(), only_batch(x.v.view(), 0));
  options.lse = r.lse_view();
  const PageBounds bounds = bounds_of(x.k, 8, Format::f32);
  REQUIRE(fovea::quest_attention<F32>(q.view(), fovea::dense_kv(x.k.view(), x.v.view()), bounds.bounds(), r.out.view(),
                                      options, rule)
              .ok());
  for (index_t b = 0; b < 2; ++b) {
    bool same = true;
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 0; i < 4; ++i) {
        for (index_t d = 0; d < 8; ++d) same = same && padded.at(b, h, i, d) == r.at(0, h, 4 * b + i, d);
      }
    }
    CHECK(same);
  }
}

TEST_CASE("quest: refusals write nothing", "[quest][errors]") {
  const Dense x(91, 2, 4, 2, 3, 40, 16, 8);
  const PageBounds bounds = bounds_of(x.k, 8, Format::f32);
  Values out(2, 4, 3, 8, canary());
  const auto refused = [&](const Operand& of_pages, const QuestOptions& rule, const char* words,
                           const AttentionOptions& options = causal()) {
    const Status status = fovea::quest_attention<F32>(x.q.view(), fovea::dense_kv(x.k.view(), x.v.view()), of_pages,
                                                      out.view(), options, rule);
    INFO(status.message());
    CHECK(!status.ok());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  refused(bounds.bounds(), small(4, 16), "must be [2, 2, at least 10, 32]");
  refused(bounds.bounds(), small(0, 16), "page 0");
  refused(bounds.bounds(), small(8, 0), "budget 0");
  Operand other = bounds.bounds();
  other.format = Format::f16;
  refused(other, small(8, 16), "f32 or bf16");
  other = bounds.bounds();
  other.extent[1] = 4;
  refused(other, small(8, 16), "bounds are [2, 4, 5, 32]");
  other = bounds.bounds();
  other.data = nullptr;
  refused(other, small(8, 16), "bounds has null data");
  other = bounds.bounds();
  other.data = reinterpret_cast<const std::byte*>(out.data.data());
  refused(other, small(8, 16), "overlaps bounds");
  AttentionOptions options = causal();
  options.softcap = -1;
  refused(bounds.bounds(), small(8, 16), "softcap", options);
}
