// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/flex_prefill.hpp"

#include "fovea/reference/flex_prefill.hpp"
#include "fovea/sparse.hpp"
#include "selected_lists.hpp"

namespace {

using namespace test;
using fovea::FlexPrefill;
using fovea::FlexPrefillLists;
using F32 = fovea::Formats<fovea::Format::f32>;
namespace reference = fovea::reference;

const AttentionOptions kCausal{.causal = fovea::Causal::bottom_right};
constexpr float kColumns = 0.f, kPooled = 1.f;   // tau: every head by columns and diagonals, or by pooled keys

fovea::Kv kv_of(const Dense& x) { return fovea::dense_kv(x.k.view(), x.v.view()); }

void select(FlexPrefillLists& lists, const Dense& x, const FlexPrefill& rule, const AttentionOptions& options = kCausal) {
  const fovea::Status status = lists.select<F32>(x.q.view(), kv_of(x), rule, options);
  INFO(status.message());
  REQUIRE(status.ok());
}

Result attend_with(const Dense& x, const FlexPrefill& rule, AttentionOptions options = kCausal) {
  Result r = unwritten(x.q.view(), x.v.view());
  options.lse = r.lse_view();
  const fovea::Status status = fovea::flex_prefill<F32>(x.q.view(), kv_of(x), r.out.view(), rule, options);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

reference::FlexPrefillChoice choice_of(const Dense& x, index_t b, index_t h, const FlexPrefill& rule) {
  return reference::flex_prefill_choice(head_of(x.q.view(), b, h, 0, x.q.len),
                                        head_of(x.k.view(), b, h * x.k.heads / x.q.heads, 0, x.k.len),
                                        1 / std::sqrt(static_cast<double>(x.q.dim)), x.k.len - x.q.len, rule.block,
                                        double{rule.gamma}, double{rule.tau}, rule.min_blocks);
}

std::vector<bool> row_of(const KeyLists& lists, index_t list, index_t k_blocks) {
  std::vector<bool> kept(static_cast<std::size_t>(k_blocks));
  for (index_t n = 0; n < lists.count[static_cast<std::size_t>(list)]; ++n)
    kept[static_cast<std::size_t>(lists.entries[list * lists.capacity + n])] = true;
  return kept;
}

void check_choice(const Dense& x, const FlexPrefill& rule) {
  FlexPrefillLists lists;
  select(lists, x, rule);
  const index_t k_blocks = (x.k.len + rule.block - 1) / rule.block;
  for (index_t b = 0; b < x.q.batch; ++b) {
    for (index_t h = 0; h < x.q.heads; ++h) {
      const auto want = choice_of(x, b, h, rule);
      CHECK(lists.is_query_aware(b, h) == (want.distance < double{rule.tau}));
      for (std::size_t i = 0; i < want.kept.size(); ++i) {
        INFO("head " << h << ", block of queries " << i);
        CHECK(row_of(lists.lists(), (b * x.q.heads + h) * lists.lists().q_blocks + static_cast<index_t>(i), k_blocks) ==
              want.kept[i]);
      }
    }
  }
}

}   // namespace

TEST_CASE("flex_prefill: the distance of two distributions", "[flex_prefill][sparse]") {
  const std::vector<float> a{1, 0}, b{0, 1}, even{0.5f, 0.5f};
  CHECK(fovea::flex::distance(a, b) == Catch::Approx(std::sqrt(std::log(2.))));
  CHECK(fovea::flex::distance(even, even) == 0);
  // 1/2 ln(4/3) + 1/4 ln(2/3) + 1/4 ln 2
  CHECK(fovea::flex::distance(a, even) == Catch::Approx(std::sqrt(0.2157615543388357)));
}

TEST_CASE("flex_prefill: the reference's blocks", "[flex_prefill][sparse]") {
  for (const auto& [len_q, len_k] : {std::pair<index_t, index_t>{200, 200}, {70, 198}, {16, 16}, {1, 1}, {5, 133}}) {
    Dense x(51, 2, 4, 2, len_q, len_k, 16, 8);
    for (float& value : x.q.data) value *= 4;
    INFO("queries " << len_q << ", keys " << len_k);
    for (const float gamma : {0.3f, 0.62f, 0.93f}) {
      for (const float tau : {kColumns, 0.35f, kPooled}) {
        check_choice(x, {.block = 16, .gamma = gamma, .tau = tau, .min_blocks = 2});
        if (len_q != 70 && len_q != 5) check_choice(x, {.block = 8, .gamma = gamma, .tau = tau});
      }
    }
  }
}

TEST_CASE("flex_prefill: equal scores go by the index", "[flex_prefill][sparse]") {
  Dense x(52, 1, 1, 1, 96, 96, 4, 8);
  std::fill(x.q.data.begin(), x.q.data.end(), 0.f);
  FlexPrefillLists lists;
  select(lists, x, {.block = 16, .gamma = 0.5f, .tau = kPooled});
  // All 21 causal blocks weigh 1 / (their row + 1); half of the mass of 6 rows are the three heaviest rows' blocks, from row
  // 0 down: 1 + 2/2 + 3/3.
  for (index_t i = 0; i < 6; ++i) {
    const std::vector<bool> kept = row_of(lists.lists(), i, 6);
    for (index_t j = 0; j < 6; ++j) CHECK(kept[static_cast<std::size_t>(j)] == (j <= i && (i < 3 || j == 0 || j == i)));
  }
}

TEST_CASE("flex_prefill: gamma 1 is dense attention", "[flex_prefill][sparse]") {
  const Dense x(53, 1, 2, 1, 72, 200, 16, 8);
  FlexPrefillLists lists;
  for (const float tau : {kColumns, kPooled}) {
    const FlexPrefill rule{.block = 32, .gamma = 1.f, .tau = tau};
    select(lists, x, rule);
    CHECK(lists.share() == 1);
    CHECK(distance(attend_with(x, rule), expect(x.q.view(), x.k.view(), x.v.view(), kCausal)) <= 1);
  }
  select(lists, x, {.block = 32, .gamma = 0.f, .tau = kPooled});   // block 0 and the own one
  for (index_t list = 0; list < 2 * 3; ++list) CHECK(lists.lists().count[static_cast<std::size_t>(list)] == 2);
}

TEST_CASE("flex_prefill: attention over the blocks, any number of lanes", "[flex_prefill][sparse]") {
  Dense x(54, 2, 4, 2, 112, 240, 16, 20);
  const std::vector<index_t> len_k{240, 176};
  AttentionOptions options = kCausal;
  options.len_k = len_k;
  for (index_t j = 176; j < 240; ++j) {
    for (index_t h = 0; h < 2; ++h) {
      for (index_t d = 0; d < 16; ++d) x.k.view()(1, h, j, d) = x.v.view()(1, h, j, d) = canary();
    }
  }
  for (const float tau : {kColumns, kPooled}) {
    const FlexPrefill rule{.block = 16, .gamma = 0.5f, .tau = tau};
    FlexPrefillLists lists;
    select(lists, x, rule, options);
    Named named{2, 4, 112, 240, std::vector<std::uint8_t>(2 * 4 * 112 * 240)};
    const KeyLists& all = lists.lists();
    for (index_t list = 0; list < 2 * 4 * all.q_blocks; ++list) {
      const std::vector<bool> kept = row_of(all, list, 15);
      for (index_t i = list % all.q_blocks * 16; i < std::min<index_t>(list % all.q_blocks * 16 + 16, 112); ++i) {
        for (index_t j = 0; j < 240; ++j)
          named.at(list / (4 * all.q_blocks), list / all.q_blocks % 4, i, j) = kept[static_cast<std::size_t>(j / 16)];
      }
    }
    AttentionOptions kept = options;
    kept.keep = named.keep();
    const Result one = attend_with(x, rule, options);
    CHECK(distance(one, expect(x.q.view(), x.k.view(), x.v.view(), kept)) <= 1);
    ThreadPerLane threads;
    AttentionOptions three = options;
    three.executor = fovea::Executor(threads, 3);
    CHECK(same_bits(attend_with(x, rule, three), one));
  }
}

TEST_CASE("flex_prefill: nothing to look at", "[flex_prefill][sparse]") {
  const Dense x(55, 1, 1, 1, 16, 32, 8, 8);
  const index_t none = 0, start = 0;
  AttentionOptions options = kCausal;
  options.len_k = {&none, 1};
  options.q_offset = {&start, 1};
  const Result r = attend_with(x, {.block = 16}, options);
  for (index_t i = 0; i < 16; ++i) {
    CHECK(r.at(0, 0, i, 3) == 0);
    CHECK(r.lse_at(0, 0, i) == -std::numeric_limits<float>::infinity());
  }
  CHECK(attend_with(Dense(55, 1, 1, 1, 0, 32, 8, 8), {.block = 16}).lse.empty());
}

TEST_CASE("flex_prefill: refusals write nothing", "[flex_prefill][sparse][errors]") {
  const Dense x(56, 1, 2, 1, 20, 52, 8, 8);
  Values out(1, 2, 20, 8, canary());
  const auto refused = [&](const FlexPrefill& rule, const AttentionOptions& options, const char* words) {
    check_refused(fovea::flex_prefill<F32>(x.q.view(), kv_of(x), out.view(), rule, options), out, words);
  };
  refused({.block = 16}, {}, "causal");
  refused({.block = 64}, kCausal, "start with a block of 64; those of sequence 0 start at 32");
  refused({.block = 0}, kCausal, "block 0");
  refused({.block = 16, .gamma = canary()}, kCausal, "gamma nan");
  refused({.block = 16, .tau = -1.f}, kCausal, "tau -1");
  AttentionOptions ragged = kCausal;
  const std::vector<index_t> cu{0, 20}, cu_k{0, 52};
  ragged.cu_len_q = cu;
  ragged.cu_len_k = cu_k;
  refused({.block = 16}, ragged, "no ragged batch");
}
