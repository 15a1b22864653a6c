// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/xattention.hpp"

#include "fovea/reference/xattention.hpp"
#include "fovea/sparse.hpp"
#include "selected_lists.hpp"

namespace {

using namespace test;
using fovea::XAttention;
using fovea::XAttentionLists;
using F32 = fovea::Formats<fovea::Format::f32>;
namespace reference = fovea::reference;

const AttentionOptions kCausal{.causal = fovea::Causal::bottom_right};
const XAttention kSmall{.block = 32, .stride = 8, .threshold = 0.6f};

fovea::Kv kv_of(const Dense& x) { return fovea::dense_kv(x.k.view(), x.v.view()); }

void select(XAttentionLists& lists, const Dense& x, const XAttention& rule, const AttentionOptions& options = kCausal) {
  const fovea::Status status = lists.select<F32>(x.q.view(), kv_of(x), rule, options);
  INFO(status.message());
  REQUIRE(status.ok());
}

Result attend_with(const Dense& x, const XAttention& rule, AttentionOptions options = kCausal) {
  Result r = unwritten(x.q.view(), x.v.view());
  options.lse = r.lse_view();
  const fovea::Status status = fovea::xattention<F32>(x.q.view(), kv_of(x), r.out.view(), rule, options);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

// A row of blocks against the reference's masses.
struct ChosenRow {
  std::vector<double> mass;
  index_t first_own, visible;
  std::vector<bool> kept;
};
template <class F>
void for_each_row(const XAttentionLists& lists, const Dense& x, const XAttention& rule, const AttentionOptions& options,
                  const F& f) {
  for (index_t b = 0; b < reference::softmax_sequences(options, x.q.batch); ++b) {
    const auto s = reference::softmax_sequence(b, x.q.view(), x.k.view(), options);
    for (index_t h = 0; h < x.q.heads; ++h) {
      const auto masses = reference::xattention_block_scores(
          head_of(x.q.view(), s.batch, h, s.first_q, s.len_q),
          head_of(x.k.view(), s.batch, h * x.k.heads / x.q.heads, s.first_k, s.len_k),
          1 / std::sqrt(static_cast<double>(x.q.dim)), s.q_offset, rule.block, rule.stride);
      for (std::size_t block = 0; block < masses.size(); ++block) {
        const index_t first = s.q_offset + static_cast<index_t>(block) * rule.block;
        const index_t last = std::min(first + rule.block, s.q_offset + s.len_q) - 1;
        ChosenRow row{masses[block], std::max<index_t>(first, 0) / rule.block, 0, std::vector<bool>(masses[block].size())};
        row.visible = last < 0 ? 0 : std::min(last / rule.block + 1, static_cast<index_t>(row.mass.size()));
        const fovea::KeyLists& all = lists.lists();
        const auto list = static_cast<std::size_t>((b * all.heads + h) * all.q_blocks) + block;
        for (index_t n = all.begin[list]; n < all.begin[list + 1]; ++n)
          row.kept[static_cast<std::size_t>(all.entries[n])] = true;
        f(row, h);
      }
    }
  }
}

// What is kept is forced, or no worse than what is not; it reaches the threshold, and without its worst it does not. The
// masses of fp32 are within `slack` of the reference's.
void check_choice(const XAttentionLists& lists, const Dense& x, const XAttention& rule,
                  const AttentionOptions& options = kCausal) {
  constexpr double slack = 0x1p-16;
  index_t rows = 0;
  for_each_row(lists, x, rule, options, [&](const ChosenRow& row, index_t) {
    double total = 0, kept = 0, worst_kept = 1e30, best_left = 0;
    for (index_t b = 0; b < static_cast<index_t>(row.mass.size()); ++b) {
      const auto at = static_cast<std::size_t>(b);
      if (b >= row.visible) {
        CHECK(!row.kept[at]);
        continue;
      }
      total += row.mass[at];
      if (b == 0 || b >= row.first_own) CHECK(row.kept[at]);
      if (row.kept[at]) kept += row.mass[at];
      if (row.kept[at] && b != 0 && b < row.first_own) worst_kept = std::min(worst_kept, row.mass[at]);
      if (!row.kept[at]) best_left = std::max(best_left, row.mass[at]);
    }
    ++rows;
    CHECK(worst_kept >= best_left - slack * total);
    CHECK(kept >= (double{rule.threshold} - slack) * total);
    if (worst_kept < 1e30) CHECK(kept - worst_kept < (double{rule.threshold} + slack) * total);
  });
  CHECK(rows > 0);
}

}   // namespace

TEST_CASE("xattention: antidiagonals of the published example", "[xattention][sparse]") {
  const std::vector<float> q{1, 2, 3, 4}, k{1, 0, 2, 1};
  const View<const float, 2> q_rows{q.data(), {4, 1}, {1, 1}}, k_rows{k.data(), {4, 1}, {1, 1}};
  CHECK(reference::xattention_strided_score(q_rows, k_rows, 2, 0, 0) == 2);
  CHECK(reference::xattention_strided_score(q_rows, k_rows, 2, 0, 1) == 5);
  CHECK(reference::xattention_strided_score(q_rows, k_rows, 2, 1, 0) == 4);
  CHECK(reference::xattention_strided_score(q_rows, k_rows, 2, 1, 1) == 11);
}

TEST_CASE("xattention: stride 1 sums the softmax map", "[xattention][sparse]") {
  const Dense x(31, 1, 1, 1, 40, 40, 8, 8);
  std::vector<double> want(3 * 3), out(40 * 8);
  reference::softmax(x.q.view(), x.k.view(), x.v.view(), fovea::bhsd(out.data(), 1, 1, 40, 8), kCausal, {},
                     [&](const reference::SoftmaxRow& row) {
                       for (const auto& term : row.terms)
                         want[static_cast<std::size_t>(row.q_index / 16 * 3 + term.key / 16)] += term.weight;
                     });
  const auto masses = reference::xattention_block_scores(head_of(x.q.view(), 0, 0, 0, 40), head_of(x.k.view(), 0, 0, 0, 40),
                                                         1 / std::sqrt(8.), 0, 16, 1);
  for (std::size_t i = 0; i < 3; ++i) {
    for (std::size_t j = 0; j < 3; ++j) CHECK(masses[i][j] == Catch::Approx(want[i * 3 + j]).margin(1e-12));
  }
  XAttentionLists lists;
  const XAttention rule{.block = 16, .stride = 1, .threshold = 0.7f};
  select(lists, x, rule);
  check_choice(lists, x, rule);
}

TEST_CASE("xattention: the smallest sets of blocks", "[xattention][sparse]") {
  XAttentionLists lists;
  struct Shape {
    index_t q_heads, kv_heads, len_q, len_k;
  };
  for (const Shape& s :
       {Shape{2, 2, 256, 256}, {4, 2, 130, 290}, {1, 1, 7, 250}, {2, 1, 203, 203}, {1, 1, 1, 1}, {1, 1, 70, 40}}) {
    Dense x(32, 1, s.q_heads, s.kv_heads, s.len_q, s.len_k, 16, 8);
    for (float& value : x.q.data) value *= 6;
    INFO("queries " << s.len_q << ", keys " << s.len_k);
    for (const XAttention& rule : {kSmall,
                                   XAttention{.block = 32, .stride = 4, .threshold = 0.8f},
                                   {.block = 48, .stride = 16, .threshold = 0.3f},
                                   {.block = 24, .stride = 8, .threshold = 0.95f},
                                   {.block = 400, .stride = 1, .threshold = 0.5f}}) {
      select(lists, x, rule);
      check_choice(lists, x, rule);
    }
  }
  Dense x(33, 1, 1, 1, 150, 230, 16, 8);
  for (const index_t offset : {index_t{-70}, index_t{16}, index_t{37}, index_t{150}}) {
    AttentionOptions options = kCausal;
    options.q_offset = {&offset, 1};
    select(lists, x, kSmall, options);
    check_choice(lists, x, kSmall, options);
  }
  // Longer than one tile of strided columns and one task of strided rows.
  Dense tall(34, 1, 1, 1, 900, 900, 8, 8);
  for (float& value : tall.q.data) value *= 5;
  const XAttention fine{.block = 16, .stride = 2, .threshold = 0.7f};
  select(lists, tall, fine);
  check_choice(lists, tall, fine);
}

TEST_CASE("xattention: keys of more numbers than one panel sums", "[xattention][sparse]") {
  const Dense x(35, 1, 1, 1, 70, 90, 300, 8);
  XAttentionLists lists;
  select(lists, x, kSmall);
  check_choice(lists, x, kSmall);
}

TEST_CASE("xattention: equal blocks go by their index", "[xattention][sparse]") {
  Dense x(36, 1, 1, 1, 256, 256, 4, 8);
  std::fill(x.q.data.begin(), x.q.data.end(), 0.f);   // integer scores, all 0: 1 / (row + 1) for every strided column
  XAttentionLists lists;
  for (const float threshold : {0.f, 0.3f, 0.55f, 0.85f}) {
    const XAttention rule{.block = 32, .stride = 8, .threshold = threshold};
    select(lists, x, rule);
    for_each_row(lists, x, rule, kCausal, [&](const ChosenRow& row, index_t) {
      CHECK(row.kept == reference::xattention_choose(row.mass, row.first_own, row.visible, double{threshold}));
    });
  }
  // Integers with gaps: block b of keys is heavy where b is a multiple of 3.
  for (index_t i = 0; i < 256; ++i) x.q.view()(0, 0, i, 1) = 1;
  for (index_t j = 0; j < 256; ++j) x.k.view()(0, 0, j, 1) = j / 32 % 3 == 0 ? static_cast<float>(2 + j / 32) : 0.f;
  const XAttention rule{.block = 32, .stride = 8, .threshold = 0.8f};
  select(lists, x, rule);
  for_each_row(lists, x, rule, kCausal, [&](const ChosenRow& row, index_t) {
    CHECK(row.kept == reference::xattention_choose(row.mass, row.first_own, row.visible, double{rule.threshold}));
  });
}

TEST_CASE("xattention: thresholds of 0 and 1", "[xattention][sparse]") {
  const Dense x(37, 1, 2, 1, 150, 230, 16, 8);
  XAttentionLists lists;
  XAttention rule = kSmall;
  for (const float all : {1.f, 7.f}) {
    rule.threshold = all;
    select(lists, x, rule);
    CHECK(lists.share() == 1);
    CHECK(distance(attend_with(x, rule), expect(x.q.view(), x.k.view(), x.v.view(), kCausal)) <= 1);
  }
  rule.threshold = 0;
  select(lists, x, rule);
  for_each_row(lists, x, rule, kCausal, [](const ChosenRow& row, index_t) {
    for (std::size_t b = 0; b < row.kept.size(); ++b)
      CHECK(row.kept[b] == (b == 0 || (static_cast<index_t>(b) >= row.first_own && static_cast<index_t>(b) < row.visible)));
  });
  CHECK(lists.share() < 0.6);
  const std::vector<float> per_head{0.f, 1.f};
  rule.head_thresholds = per_head;
  select(lists, x, rule);
  for_each_row(lists, x, rule, kCausal, [](const ChosenRow& row, index_t h) {
    const auto kept = std::count(row.kept.begin(), row.kept.end(), true);
    CHECK(kept ==
          (h == 1 ? row.visible : std::min<index_t>(row.visible, 1 + row.visible - std::max<index_t>(row.first_own, 1))));
  });
}

TEST_CASE("xattention: attention over the blocks", "[xattention][sparse]") {
  XAttentionLists lists;
  const auto check = [&](const Dense& x, const AttentionOptions& options, index_t longest, index_t most) {
    select(lists, x, kSmall, options);
    const Named named =
        named_by({&lists.lists(), 1}, reference::softmax_sequences(options, x.q.batch), x.q.heads, longest, most);
    CHECK(named.most() == 1);
    AttentionOptions kept = options;
    kept.keep = named.keep();
    CHECK(distance(attend_with(x, kSmall, options), expect(x.q.view(), x.k.view(), x.v.view(), kept)) <= 1);
    // The mass that is left out bounds the error: |O - O_S| <= 2 (1 - p) max|V|.
    std::vector<double> out(static_cast<std::size_t>(x.q.batch * x.q.heads * x.q.len * x.v.dim)), chosen = out;
    const auto view = [&](std::vector<double>& to) {
      return fovea::bhsd(to.data(), x.q.batch, x.q.heads, x.q.len, x.v.dim);
    };
    std::vector<double> left;
    reference::softmax(x.q.view(), x.k.view(), x.v.view(), view(out), options, {}, [&](const reference::SoftmaxRow& row) {
      double missing = 0;
      for (const auto& term : row.terms)
        missing += fovea::reference::softmax_broadcast(kept.keep, row.sequence, row.q_head, row.q_index, term.key) == 0
                       ? term.weight
                       : 0;
      left.push_back(missing);
    });
    double largest = 0;
    for (const float value : x.v.data) largest = std::max(largest, std::abs(double{value}));
    std::size_t row_number = 0;
    reference::softmax(x.q.view(), x.k.view(), x.v.view(), view(chosen), kept, {}, [&](const reference::SoftmaxRow& row) {
      for (index_t d = 0; d < x.v.dim; ++d) {
        const double error =
            std::abs(view(out)(row.batch, row.q_head, row.pos_q, d) - view(chosen)(row.batch, row.q_head, row.pos_q, d));
        if (error > 2 * left[row_number] * largest + 1e-12) FAIL("row " << row_number << " is off by " << error);
      }
      ++row_number;
    });
  };
  check(Dense(38, 2, 4, 2, 210, 210, 16, 20), kCausal, 210, 210);
  AttentionOptions windowed = kCausal;
  windowed.window = {90, -1};
  check(Dense(39, 1, 2, 1, 75, 260, 16, 8), windowed, 75, 260);
  AttentionOptions ragged = kCausal;
  const std::vector<index_t> cu_q{0, 140, 140, 205}, cu_k{0, 160, 170, 300};
  ragged.cu_len_q = cu_q;
  ragged.cu_len_k = cu_k;
  check(Dense(40, 1, 2, 2, 205, 300, 8, 8), ragged, 140, 160);
}

TEST_CASE("xattention: chunks that start with a block choose what one call chooses", "[xattention][sparse]") {
  const Dense x(41, 1, 2, 1, 256, 256, 16, 8);
  const Result whole = attend_with(x, kSmall);
  for (const index_t first : {index_t{64}, index_t{160}}) {
    const index_t count = 64, end = first + count;
    AttentionOptions options = kCausal;
    Result part = unwritten(only_pos(x.q.view(), first, count), x.v.view());
    options.lse = part.lse_view();
    const fovea::Kv keys = fovea::dense_kv(only_pos(x.k.view(), 0, end), only_pos(x.v.view(), 0, end));
    REQUIRE(fovea::xattention<F32>(only_pos(x.q.view(), first, count), keys, part.out.view(), kSmall, options).ok());
    CHECK(same_rows(whole, 0, first, part));
  }
}

TEST_CASE("xattention: what is not looked at leaves no trace", "[xattention][sparse]") {
  Dense x(42, 1, 1, 1, 250, 300, 8, 8);
  const index_t in_use = 250;
  AttentionOptions options = kCausal;
  options.len_k = {&in_use, 1};
  const Result clean = attend_with(x, kSmall, options);
  for (index_t j = in_use; j < 300; ++j) {
    for (index_t d = 0; d < 8; ++d) x.k.view()(0, 0, j, d) = x.v.view()(0, 0, j, d) = canary();
  }
  CHECK(same_bits(attend_with(x, kSmall, options), clean));
  // Tokens of later blocks change nothing before them: a block of queries is chosen for by itself.
  for (index_t j = 128; j < 250; ++j) {
    for (index_t d = 0; d < 8; ++d) x.k.view()(0, 0, j, d) = x.v.view()(0, 0, j, d) = x.q.view()(0, 0, j, d) = 3;
  }
  const Result changed = attend_with(x, kSmall, options);
  CHECK(same_bits(std::span(changed.out.data).first(128 * 8), std::span(clean.out.data).first(128 * 8)));
}

TEST_CASE("xattention: any number of lanes, 16 bit keys", "[xattention][sparse]") {
  Dense x(43, 2, 4, 2, 130, 190, 16, 8);
  const Result one = attend_with(x, kSmall);
  ThreadPerLane threads;
  Reversed reversed;
  AttentionOptions options = kCausal;
  options.executor = fovea::Executor(threads, 3);
  CHECK(same_bits(attend_with(x, kSmall, options), one));
  options.executor = fovea::Executor(reversed, 3);
  CHECK(same_bits(attend_with(x, kSmall, options), one));

  std::vector<fovea::bf16> k(x.k.data.size()), v(x.v.data.size());
  for (std::size_t n = 0; n < k.size(); ++n)
    x.k.data[n] = fovea::convert<float>(k[n] = fovea::convert<fovea::bf16>(x.k.data[n]));
  for (std::size_t n = 0; n < v.size(); ++n)
    x.v.data[n] = fovea::convert<float>(v[n] = fovea::convert<fovea::bf16>(x.v.data[n]));
  Result r = unwritten(x.q.view(), x.v.view());
  options = kCausal;
  options.lse = r.lse_view();
  REQUIRE(fovea::xattention(x.q.view(), fovea::bhsd(k.data(), 2, 2, 190, 16), fovea::bhsd(v.data(), 2, 2, 190, 8),
                            r.out.view(), kSmall, options)
              .ok());
  CHECK(same_bits(r, attend_with(x, kSmall)));
}

TEST_CASE("xattention: nothing to look at", "[xattention][sparse]") {
  check_nothing_to_look_at(44, kCausal,
                           [](const Dense& x, const AttentionOptions& options) { return attend_with(x, kSmall, options); });
}

TEST_CASE("xattention: refusals write nothing", "[xattention][sparse][errors]") {
  const Dense x(45, 1, 2, 1, 20, 30, 8, 8);
  Values out(1, 2, 20, 8, canary());
  const auto refused = [&](const XAttention& rule, const AttentionOptions& options, const char* words) {
    check_refused(fovea::xattention<F32>(x.q.view(), kv_of(x), out.view(), rule, options), out, words);
  };
  refused({}, {}, "causal");
  refused({.block = 100, .stride = 16}, kCausal, "stride 16 must divide its block 100");
  refused({.block = 16, .stride = 0}, kCausal, "stride 0");
  refused({.threshold = -0.5f}, kCausal, "threshold of head 0 is -0.5");
  refused({.threshold = canary()}, kCausal, "threshold of head 0");
  const std::vector<float> three(3, 0.5f);
  refused({.head_thresholds = three}, kCausal, "thresholds for 3 heads, q has 2");
  std::vector<std::byte> little(64);
  AttentionOptions bad = kCausal;
  bad.workspace = little;
  refused({}, bad, "workspace");
}
