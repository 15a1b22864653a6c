// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/vertical_slash.hpp"

#include "fovea/reference/vertical_slash.hpp"
#include "fovea/sparse.hpp"
#include "selected_lists.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;
using fovea::VerticalSlash;
using fovea::VerticalSlashLists;
using F32 = fovea::Formats<fovea::Format::f32>;
namespace reference = fovea::reference;

const AttentionOptions kCausal{.causal = fovea::Causal::bottom_right};

fovea::Kv kv_of(const Dense& x) { return fovea::dense_kv(x.k.view(), x.v.view()); }

void select(VerticalSlashLists& lists, const Dense& x, const VerticalSlash& rule,
            const AttentionOptions& options = kCausal) {
  const fovea::Status status = lists.select<F32>(x.q.view(), kv_of(x), rule, options);
  INFO(status.message());
  REQUIRE(status.ok());
}

Result attend_with(const Dense& x, const VerticalSlash& rule, AttentionOptions options = kCausal) {
  Result r = unwritten(x.q.view(), x.v.view());
  options.lse = r.lse_view();
  const fovea::Status status = fovea::vertical_slash_attention<F32>(x.q.view(), kv_of(x), r.out.view(), rule, options);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

struct Piece {
  index_t b, first_q, first_k, len_q, len_k, pos;   // of one sequence, in the views
};
std::vector<Piece> pieces_of(const Dense& x, const AttentionOptions& options) {
  std::vector<Piece> pieces;
  for (index_t n = 0; n < reference::softmax_sequences(options, x.q.batch); ++n) {
    const auto s = reference::softmax_sequence(n, x.q.view(), x.k.view(), options);
    pieces.push_back({s.batch, s.first_q, s.first_k, s.len_q, s.len_k, s.q_offset});
  }
  return pieces;
}
double scale_of(const Dense& x) { return 1 / std::sqrt(static_cast<double>(x.q.dim)); }

reference::VerticalSlashSums sums_of(const Dense& x, const Piece& p, index_t head) {
  return reference::vertical_slash_sums(head_of(x.q.view(), p.b, head, p.first_q, p.len_q),
                                        head_of(x.k.view(), p.b, head * x.k.heads / x.q.heads, p.first_k, p.len_k),
                                        scale_of(x), p.pos, 64);
}

// The lists are what the chosen lines cover, no key twice.
void check_lists(const VerticalSlashLists& lists, const Dense& x, const AttentionOptions& options) {
  const std::vector<Piece> pieces = pieces_of(x, options);
  index_t longest = 0, most = 0;
  for (const Piece& p : pieces) longest = std::max(longest, p.len_q), most = std::max(most, p.len_k);
  Named named = named_by(lists.lists(), static_cast<index_t>(pieces.size()), x.q.heads, longest, most);
  CHECK(named.most() <= 1);
  index_t wrong = 0;
  for (std::size_t n = 0; n < pieces.size(); ++n) {
    const Piece& p = pieces[n];
    for (index_t h = 0; h < x.q.heads; ++h) {
      const auto b = static_cast<index_t>(n);
      const auto verticals = lists.verticals(b, h), slashes = lists.slashes(b, h);
      const reference::VerticalSlashLines lines{{verticals.begin(), verticals.end()}, {slashes.begin(), slashes.end()}};
      for (index_t i = 0; i < p.len_q; ++i) {
        const std::vector<bool> seen = reference::vertical_slash_keys(lines, p.pos + i / 64 * 64, p.len_k);
        for (index_t j = 0; j < p.len_k && j <= p.pos + i; ++j)
          wrong += (named.at(b, h, i, j) != 0) != seen[static_cast<std::size_t>(j)];
      }
    }
  }
  CHECK(wrong == 0);
}

// Heavy columns and a heavy diagonal, integers throughout: exp of the scores leaves gaps that rounding does not close.
Dense integer_data(index_t heads, index_t len_q, index_t len_k) {
  Dense x(7, 1, heads, heads, len_q, len_k, 4, 8);
  std::fill(x.q.data.begin(), x.q.data.end(), 0.f);
  std::fill(x.k.data.begin(), x.k.data.end(), 0.f);
  for (index_t h = 0; h < heads; ++h) {
    for (index_t i = 0; i < len_q; ++i) x.q.view()(0, h, i, 0) = 2;
    for (index_t j = 0; j < len_k; j += 7) x.k.view()(0, h, j, 0) = static_cast<float>(1 + (j / 7 + h) % 4);
  }
  return x;
}

const VerticalSlash kSmall{.verticals = 45, .slashes = 120};

}   // namespace

TEST_CASE("vertical_slash: the lists are the lines' keys", "[vertical_slash][sparse]") {
  VerticalSlashLists lists;
  struct Shape {
    index_t q_heads, kv_heads, len_q, len_k;
  };
  for (const Shape& s :
       {Shape{2, 2, 330, 330}, {4, 2, 130, 333}, {1, 1, 10, 400}, {2, 1, 64, 64}, {1, 1, 70, 20}, {1, 1, 1, 1}}) {
    const Dense x(11, 1, s.q_heads, s.kv_heads, s.len_q, s.len_k, 16, 8);
    INFO("queries " << s.len_q << ", keys " << s.len_k);
    for (const VerticalSlash& rule : {kSmall, VerticalSlash{0, 0}, VerticalSlash{60, 300}}) {
      select(lists, x, rule);
      check_lists(lists, x, kCausal);
    }
  }
  const Dense x(12, 1, 2, 1, 200, 250, 16, 8);
  for (const index_t offset : {index_t{-90}, index_t{13}, index_t{51}, index_t{200}}) {
    AttentionOptions options = kCausal;
    options.q_offset = {&offset, 1};
    select(lists, x, kSmall, options);
    check_lists(lists, x, options);
  }
}

TEST_CASE("vertical_slash: lines by the total order", "[vertical_slash][sparse]") {
  VerticalSlashLists lists;
  const auto expect_lines = [&](const Dense& x, const VerticalSlash& rule) {
    select(lists, x, rule);
    for (index_t h = 0; h < x.q.heads; ++h) {
      const auto want =
          reference::vertical_slash_lines(sums_of(x, pieces_of(x, kCausal)[0], h), rule.verticals, rule.slashes);
      const auto verticals = lists.verticals(0, h), slashes = lists.slashes(0, h);
      CHECK(std::vector(verticals.begin(), verticals.end()) == want.verticals);
      CHECK(std::vector(slashes.begin(), slashes.end()) == want.slashes);
    }
  };
  // All scores equal: every column sum is the same sequence of additions, so ties are ties in fp32 too.
  Dense flat(13, 1, 1, 1, 300, 300, 4, 8);
  std::fill(flat.q.data.begin(), flat.q.data.end(), 0.f);
  expect_lines(flat, {.verticals = 40, .slashes = 110});
  expect_lines(flat, {.verticals = 5000, .slashes = 5000});
  // The 45 heavier of the columns with weight, whatever the diagonals: those are taken by regret below.
  const Dense x = integer_data(2, 260, 260);
  select(lists, x, kSmall);
  for (index_t h = 0; h < 2; ++h) {
    const auto want = reference::vertical_slash_lines(sums_of(x, pieces_of(x, kCausal)[0], h), 45, 120);
    const auto verticals = lists.verticals(0, h);
    CHECK(std::vector(verticals.begin(), verticals.end()) == want.verticals);
  }
}

TEST_CASE("vertical_slash: no better lines on random data", "[vertical_slash][sparse]") {
  Dense x(14, 1, 4, 2, 280, 300, 16, 8);
  for (float& value : x.q.data) value *= 3;
  VerticalSlashLists lists;
  select(lists, x, kSmall);
  for (index_t h = 0; h < 4; ++h) {
    const auto sums = sums_of(x, pieces_of(x, kCausal)[0], h);
    const auto best = reference::vertical_slash_lines(sums, 45, 120);
    const auto total = [](const std::vector<double>& score, const auto& lines) {
      double sum = 0;
      for (const std::int32_t line : lines) sum += score[static_cast<std::size_t>(line)];
      return sum;
    };
    CHECK(lists.verticals(0, h).size() == 45);
    CHECK(lists.slashes(0, h).size() == 120);
    // Sums of at most 64 weights, each within 2^-18 of itself: 16 products of up to 40, and exp.
    CHECK(total(sums.vertical, lists.verticals(0, h)) >= total(sums.vertical, best.verticals) * (1 - 0x1p-17));
    CHECK(total(sums.slash, lists.slashes(0, h)) >= total(sums.slash, best.slashes) * (1 - 0x1p-17));
  }
}

TEST_CASE("vertical_slash: forced columns and diagonals", "[vertical_slash][sparse]") {
  const Dense x(15, 1, 1, 1, 400, 400, 8, 8);
  VerticalSlashLists lists;
  select(lists, x, {.verticals = 30, .slashes = 100});
  Named named = named_by(lists.lists(), 1, 1, 400, 400);
  index_t missing = 0;
  for (index_t i = 0; i < 400; ++i) {
    for (index_t j = 0; j <= i; ++j) missing += (j < 30 || i - j < 100) && named.at(0, 0, i, j) == 0;
  }
  CHECK(missing == 0);
  // Fewer than 50 wanted diagonals are 50, the nearest of those that tie at infinity.
  select(lists, x, {.verticals = 0, .slashes = 0});
  CHECK(lists.verticals(0, 0).size() == 30);
  REQUIRE(lists.slashes(0, 0).size() == 50);
  CHECK(lists.slashes(0, 0).back() == 49);
}

TEST_CASE("vertical_slash: attention over the lists", "[vertical_slash][sparse]") {
  VerticalSlashLists lists;
  const auto check = [&](const Dense& x, const AttentionOptions& options, index_t longest, index_t most) {
    select(lists, x, kSmall, options);
    const index_t sequences = reference::softmax_sequences(options, x.q.batch);
    const Named named = named_by(lists.lists(), sequences, x.q.heads, longest, most);
    AttentionOptions kept = options;
    kept.keep = named.keep();
    const Result r = attend_with(x, kSmall, options);
    CHECK(distance(r, expect(x.q.view(), x.k.view(), x.v.view(), kept)) <= 1);
  };
  check(Dense(16, 2, 4, 2, 210, 210, 16, 20), kCausal, 210, 210);
  AttentionOptions dressed = kCausal;
  const std::vector<float> slopes{0.1f, 0.f}, sinks{0.5f, -1.f};
  dressed.alibi_slopes = slopes;
  dressed.sink = sinks;
  dressed.softcap = 5.f;
  dressed.window = {150, -1};
  check(Dense(17, 1, 2, 1, 150, 260, 16, 8), dressed, 150, 260);
  AttentionOptions ragged = kCausal;
  const std::vector<index_t> cu_q{0, 140, 140, 205}, cu_k{0, 160, 170, 300};
  ragged.cu_len_q = cu_q;
  ragged.cu_len_k = cu_k;
  check(Dense(18, 1, 2, 2, 205, 300, 8, 8), ragged, 140, 160);
}

namespace {

using fovea::vertical_slash::Apart;

bool runs_apart(const VerticalSlashLists& lists, const Dense& x, const AttentionOptions& options = kCausal) {
  Apart apart;
  apart.lists = &lists;
  return apart.serves(x.q.view(), kv_of(x), options);
}

}   // namespace

TEST_CASE("vertical_slash: columns and diagonals as two calls", "[vertical_slash][sparse]") {
  VerticalSlashLists lists;
  const auto check = [&](const Dense& x, const AttentionOptions& options, index_t longest, index_t most) {
    select(lists, x, kSmall, options);
    REQUIRE(runs_apart(lists, x, options));
    const index_t sequences = reference::softmax_sequences(options, x.q.batch);
    const Named named = named_by(lists.lists(), sequences, x.q.heads, longest, most);
    AttentionOptions kept = options;
    kept.keep = named.keep();
    const auto e = expect(x.q.view(), x.k.view(), x.v.view(), kept);
    const Result r = attend_with(x, kSmall, options);
    CHECK(distance(r, e) <= 1);
    // Without an LSE, narrower, strided, head by head.
    Result again = unwritten(x.q.view(), x.v.view());
    again.lse = r.lse;
    REQUIRE(fovea::vertical_slash_attention<F32>(x.q.view(), kv_of(x), again.out.view(), kSmall, options).ok());
    CHECK(same_bits(again, r));
    const auto size = static_cast<std::size_t>(x.q.batch * x.q.heads * x.q.len * x.v.dim);
    std::vector<fovea::bf16> narrow(size, fovea::convert<fovea::bf16>(canary())), want;
    for (const float value : r.out.data) want.push_back(fovea::convert<fovea::bf16>(value));
    AttentionOptions with_lse = options;
    again.lse.assign(r.lse.size(), canary());
    with_lse.lse = again.lse_view();
    REQUIRE(fovea::vertical_slash_attention<F32>(
                x.q.view(), kv_of(x), fovea::bhsd(narrow.data(), x.q.batch, x.q.heads, x.q.len, x.v.dim), kSmall, with_lse)
                .ok());
    CHECK(std::memcmp(narrow.data(), want.data(), size * sizeof(fovea::bf16)) == 0);
    CHECK(same_bits(again.lse, r.lse));
    std::vector<float> wide(2 * size, canary());
    REQUIRE(fovea::vertical_slash_attention<F32>(
                x.q.view(), kv_of(x),
                fovea::Tensor<float>{wide.data(),
                                     {x.q.batch, x.q.heads, x.q.len, x.v.dim},
                                     {x.q.heads * x.q.len * x.v.dim * 2, x.v.dim * 2, x.q.heads * x.v.dim * 2, 2}},
                kSmall, options)
                .ok());
    index_t wrong = 0;
    for (index_t b = 0; b < x.q.batch; ++b) {
      for (index_t h = 0; h < x.q.heads; ++h) {
        for (index_t i = 0; i < x.q.len; ++i) {
          for (index_t d = 0; d < x.v.dim; ++d) {
            const auto at = static_cast<std::size_t>(((b * x.q.len + i) * x.q.heads + h) * x.v.dim + d) * 2;
            const float value = r.at(b, h, i, d);
            wrong += std::memcmp(&wide[at], &value, sizeof value) != 0 || !is_canary(wide[at + 1]);
          }
        }
      }
    }
    CHECK(wrong == 0);
    for (const bool narrow_out : {false, true}) {
      Apart apart;
      apart.lists = &lists;
      apart.most_bytes = 1;
      REQUIRE(apart.serves(x.q.view(), kv_of(x), options));
      again = unwritten(x.q.view(), x.v.view());
      with_lse.lse = again.lse_view();
      std::fill(narrow.begin(), narrow.end(), fovea::bf16{});
      const auto bf16_out = fovea::bhsd(narrow.data(), x.q.batch, x.q.heads, x.q.len, x.v.dim);
      const fovea::Result to = narrow_out ? fovea::Result(bf16_out) : fovea::Result(again.out.view());
      REQUIRE(apart.run<F32>(x.q.view(), kv_of(x), to, with_lse).ok());
      CHECK(same_bits(again.lse, r.lse));
      if (narrow_out) {
        CHECK(std::memcmp(narrow.data(), want.data(), size * sizeof(fovea::bf16)) == 0);
      } else {
        CHECK(same_bits(again, r));
      }
    }
  };
  check(Dense(25, 2, 4, 2, 330, 330, 16, 20), kCausal, 330, 330);
  AttentionOptions dressed = kCausal;
  const std::vector<float> sinks{0.5f, -1.f, 2.f, -kInfinity, 0.f, 40.f};
  dressed.sink = sinks;
  dressed.softcap = 5.f;
  dressed.scale = 0.3f;
  check(Dense(26, 1, 6, 1, 300, 400, 16, 8), dressed, 300, 400);
  AttentionOptions ragged = kCausal;
  const std::vector<index_t> cu_q{0, 140, 140, 440, 450}, cu_k{0, 160, 170, 500, 500};
  ragged.cu_len_q = cu_q;
  ragged.cu_len_k = cu_k;
  check(Dense(27, 1, 2, 2, 450, 500, 8, 8), ragged, 300, 330);
  const index_t before = -90;
  AttentionOptions early = kCausal;
  early.q_offset = {&before, 1};
  check(Dense(28, 1, 2, 1, 400, 350, 8, 8), early, 400, 350);
}

TEST_CASE("vertical_slash: columns of keys with scales per channel", "[vertical_slash][sparse]") {
  using Mixed = fovea::Formats<fovea::Format::f32, fovea::Format::i8_channel>;
  Dense x(31, 1, 4, 2, 320, 320, 16, 8);
  const index_t dim = 16;
  std::vector<std::int8_t> codes;
  std::vector<float> scale;
  for (index_t n = 0; n < 2 * dim; ++n) scale.push_back(0.01f * static_cast<float>(1 + n));
  for (index_t h = 0; h < 2; ++h) {
    for (index_t j = 0; j < 320; ++j) {
      for (index_t d = 0; d < dim; ++d) {
        const float step = scale[static_cast<std::size_t>(h * dim + d)];
        codes.push_back(static_cast<std::int8_t>(std::clamp(std::round(x.k.view()(0, h, j, d) / step), -127.f, 127.f)));
        x.k.view()(0, h, j, d) = static_cast<float>(codes.back()) * step;
      }
    }
  }
  fovea::Kv kv = kv_of(x);
  kv.k = fovea::stored_rows(codes.data(), fovea::Format::i8_channel, dim, 2, 320);
  kv.k_channel_scale = scale.data();
  VerticalSlashLists lists;
  REQUIRE(lists.select<Mixed>(x.q.view(), kv, kSmall, kCausal).ok());
  const Named named = named_by(lists.lists(), 1, 4, 320, 320);
  AttentionOptions kept = kCausal;
  kept.keep = named.keep();
  const auto e = expect(x.q.view(), x.k.view(), x.v.view(), kept);
  Result first = unwritten(x.q.view(), x.v.view());
  for (const index_t most_bytes : {index_t{1} << 26, index_t{1}}) {
    Apart apart;
    apart.lists = &lists;
    apart.most_bytes = most_bytes;
    REQUIRE(apart.serves(x.q.view(), kv, kCausal));
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions options = kCausal;
    options.lse = r.lse_view();
    REQUIRE(apart.run<Mixed>(x.q.view(), kv, r.out.view(), options).ok());
    CHECK(distance(r, e) <= 1);
    if (most_bytes == 1) {
      CHECK(same_bits(r, first));
    } else {
      first = r;
    }
  }
}

TEST_CASE("vertical_slash: when the columns are a call of their own", "[vertical_slash][sparse]") {
  VerticalSlashLists lists;
  const Dense x(29, 1, 2, 1, 300, 300, 8, 8);
  select(lists, x, kSmall);
  CHECK(runs_apart(lists, x));
  const auto refused = [&](const auto& change) {
    AttentionOptions options = kCausal;
    change(options);
    return !runs_apart(lists, x, options);
  };
  const std::vector<float> slopes{0.1f, 0.f};
  const std::vector<std::uint64_t> tree(300, ~std::uint64_t{0});
  const float bias[300] = {};
  const std::uint8_t keep[300] = {};
  CHECK(refused([&](AttentionOptions& o) { o.alibi_slopes = slopes; }));
  CHECK(refused([&](AttentionOptions& o) { o.window.left = 100; }));
  CHECK(refused([&](AttentionOptions& o) { o.window.right = 0; }));
  CHECK(refused([&](AttentionOptions& o) { o.tree = tree; }));
  CHECK(refused([&](AttentionOptions& o) { o.bias = {bias, {1, 1, 1, 300}, {0, 0, 0, 1}}; }));
  CHECK(refused([&](AttentionOptions& o) { o.keep = {keep, {1, 1, 1, 300}, {0, 0, 0, 1}}; }));
  CHECK(refused([&](AttentionOptions& o) { o.regime = fovea::Regime::decode; }));
  // No column outside of the diagonals; a short prompt; decode.
  select(lists, x, {.verticals = 30, .slashes = 300});
  CHECK(!runs_apart(lists, x));
  const Dense brief(29, 1, 2, 1, 250, 350, 8, 8), step(29, 1, 2, 1, 1, 300, 8, 8);
  select(lists, brief, kSmall);
  CHECK(!runs_apart(lists, brief));
  select(lists, step, kSmall);
  CHECK(!runs_apart(lists, step));

  // The workspace of a plan over the diagonals serves both calls.
  select(lists, x, kSmall);
  const Result want = attend_with(x, kSmall);
  fovea::SparsePlan plan;
  REQUIRE(fovea::make_sparse_plan(plan, {1, 2, 1, 300, 300, 8, 8}, lists.lists().first(1), kCausal).ok());
  CHECK(plan.together);
  std::vector<std::byte> bytes(plan.workspace_bytes(1));
  AttentionOptions options = kCausal;
  options.workspace = bytes;
  CHECK(same_bits(attend_with(x, kSmall, options), want));
  options.workspace = std::span(bytes).first(bytes.size() - 1);
  Values out(1, 2, 300, 8, canary());
  CHECK(!fovea::vertical_slash_attention<F32>(x.q.view(), kv_of(x), out.view(), kSmall, options).ok());
  CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
}

TEST_CASE("vertical_slash: a key leaves its trace where it is listed", "[vertical_slash][sparse][nan]") {
  Dense x(30, 1, 1, 1, 420, 420, 8, 8);
  VerticalSlashLists lists;
  select(lists, x, kSmall);
  REQUIRE(runs_apart(lists, x));
  Named named = named_by(lists.lists(), 1, 1, 420, 420);
  fovea::vertical_slash::Apart apart;
  apart.lists = &lists;
  REQUIRE(apart.serves(x.q.view(), kv_of(x), kCausal));
  const auto attend_listed = [&] {
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions options = kCausal;
    options.lse = r.lse_view();
    REQUIRE(apart.run<F32>(x.q.view(), kv_of(x), r.out.view(), options).ok());
    return r;
  };
  const Result clean = attend_listed();
  const auto verticals = lists.verticals(0, 0);
  for (const std::int32_t key : {std::int32_t{3}, verticals[32], verticals[40]}) {
    for (const bool in_keys : {false, true}) {
      float& number = in_keys ? x.k.view()(0, 0, key, 2) : x.v.view()(0, 0, key, 2);
      const float kept = number;
      number = kNan;
      const Result r = attend_listed();
      number = kept;
      index_t wrong = 0;
      for (index_t i = 0; i < 420; ++i) {
        const bool listed = key <= i && named.at(0, 0, i, key) != 0;
        const float old = clean.at(0, 0, i, 2), now = r.at(0, 0, i, 2);
        wrong += listed != std::isnan(now) || (!listed && old != now);
      }
      INFO("key " << key << (in_keys ? " of K" : " of V"));
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("vertical_slash: all lines are dense attention", "[vertical_slash][sparse]") {
  const Dense x(19, 1, 2, 1, 150, 230, 16, 8);
  const VerticalSlash all{.verticals = 230, .slashes = 230};
  CHECK(distance(attend_with(x, all), expect(x.q.view(), x.k.view(), x.v.view(), kCausal)) <= 1);
  VerticalSlashLists lists;
  select(lists, x, all);
  CHECK(lists.share() == 1);
  select(lists, Dense(19, 1, 1, 1, 600, 600, 8, 8), {.verticals = 30, .slashes = 100});
  CHECK(lists.share() > 0.2);
  CHECK(lists.share() < 0.6);
}

TEST_CASE("vertical_slash: counts per head", "[vertical_slash][sparse]") {
  const Dense x(20, 1, 2, 2, 260, 260, 8, 8);
  const std::vector<index_t> verticals{30, 50}, slashes{150, 101};
  VerticalSlashLists lists;
  select(lists, x, {.head_verticals = verticals, .head_slashes = slashes});
  for (const index_t h : {index_t{0}, index_t{1}}) {
    CHECK(static_cast<index_t>(lists.verticals(0, h).size()) == verticals[static_cast<std::size_t>(h)]);
    CHECK(static_cast<index_t>(lists.slashes(0, h).size()) == slashes[static_cast<std::size_t>(h)]);
  }
  check_lists(lists, x, kCausal);
}

TEST_CASE("vertical_slash: what is not looked at leaves no trace", "[vertical_slash][sparse]") {
  Dense x(21, 1, 1, 1, 400, 440, 8, 8);
  const index_t in_use = 400;
  AttentionOptions options = kCausal;
  options.len_k = {&in_use, 1};
  const VerticalSlash rule{.verticals = 30, .slashes = 100};
  const Result clean = attend_with(x, rule, options);
  for (index_t j = in_use; j < 440; ++j) {
    for (index_t d = 0; d < 8; ++d) x.k.view()(0, 0, j, d) = x.v.view()(0, 0, j, d) = canary();
  }
  CHECK(same_bits(attend_with(x, rule, options), clean));
  // A value that no list of the last rows names: those rows keep their bits.
  VerticalSlashLists lists;
  select(lists, x, rule, options);
  Named named = named_by(lists.lists(), 1, 1, 400, 400);
  index_t unseen = -1;
  for (index_t j = 0; j < 300; ++j) {
    if (named.at(0, 0, 399, j) == 0) unseen = j;
  }
  REQUIRE(unseen >= 0);
  for (index_t d = 0; d < 8; ++d) x.v.view()(0, 0, unseen, d) = canary();
  const Result poisoned = attend_with(x, rule, options);
  CHECK(same_bits(std::span(poisoned.out.data).subspan(384 * 8), std::span(clean.out.data).subspan(384 * 8)));
  // With the lists held fixed, the future changes nothing.
  Result before = unwritten(x.q.view(), x.v.view()), after = before;
  x = Dense(21, 1, 1, 1, 400, 440, 8, 8);
  REQUIRE(fovea::sparse_attention<F32>(x.q.view(), kv_of(x), lists.lists(), before.out.view(), options).ok());
  for (index_t j = 200; j < 400; ++j) {
    for (index_t d = 0; d < 8; ++d) x.k.view()(0, 0, j, d) = x.v.view()(0, 0, j, d) = x.q.view()(0, 0, j, d) = 3;
  }
  REQUIRE(fovea::sparse_attention<F32>(x.q.view(), kv_of(x), lists.lists(), after.out.view(), options).ok());
  CHECK(same_bits(std::span(before.out.data).first(200 * 8), std::span(after.out.data).first(200 * 8)));
}

TEST_CASE("vertical_slash: any number of lanes, any home of the keys", "[vertical_slash][sparse]") {
  const index_t len_q = GENERATE(130, 300), len = len_q + 60;   // one call, two
  const Dense x(22, 2, 4, 2, len_q, len, 16, 8);
  const Result one = attend_with(x, kSmall);
  ThreadPerLane threads;
  Reversed reversed;
  AttentionOptions options = kCausal;
  options.executor = fovea::Executor(threads, 3);
  CHECK(same_bits(attend_with(x, kSmall, options), one));
  options.executor = fovea::Executor(reversed, 3);
  CHECK(same_bits(attend_with(x, kSmall, options), one));

  // The same keys in pages of 48, backwards.
  constexpr index_t kPage = 48, kPages = 8;
  std::vector<float> k(static_cast<std::size_t>(2 * kPages * 2 * kPage * 16), canary());
  std::vector<float> v(static_cast<std::size_t>(2 * kPages * 2 * kPage * 8), canary());
  std::vector<std::int32_t> table;
  for (index_t n = 0; n < 2 * kPages; ++n) table.push_back(static_cast<std::int32_t>(2 * kPages - 1 - n));
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 2; ++h) {
      for (index_t j = 0; j < len; ++j) {
        const index_t row = (index_t{table[static_cast<std::size_t>(b * kPages + j / kPage)]} * 2 + h) * kPage + j % kPage;
        for (index_t d = 0; d < 16; ++d) k[static_cast<std::size_t>(row * 16 + d)] = x.k.view()(b, h, j, d);
        for (index_t d = 0; d < 8; ++d) v[static_cast<std::size_t>(row * 8 + d)] = x.v.view()(b, h, j, d);
      }
    }
  }
  fovea::Kv paged = fovea::dense_kv(fovea::bhsd<const float>(k.data(), 2 * kPages, 2, kPage, 16),
                                    fovea::bhsd<const float>(v.data(), 2 * kPages, 2, kPage, 8));
  paged.home = fovea::Home::paged;
  paged.block_table = {table.data(), {2, kPages}, {kPages, 1}};
  const std::vector<index_t> len_k{len, len};
  options = kCausal;
  options.len_k = len_k;
  Result r = unwritten(x.q.view(), x.v.view());
  options.lse = r.lse_view();
  REQUIRE(fovea::vertical_slash_attention<F32>(x.q.view(), paged, r.out.view(), kSmall, options).ok());
  CHECK(same_bits(r, one));
}

TEST_CASE("vertical_slash: nothing to look at", "[vertical_slash][sparse]") {
  check_nothing_to_look_at(23, kCausal,
                           [](const Dense& x, const AttentionOptions& options) { return attend_with(x, kSmall, options); });
}

TEST_CASE("vertical_slash: refusals write nothing", "[vertical_slash][sparse][errors]") {
  const Dense x(24, 1, 2, 1, 20, 30, 8, 8);
  Values out(1, 2, 20, 8, canary());
  const auto refused = [&](const VerticalSlash& rule, const AttentionOptions& options, const char* words) {
    check_refused(fovea::vertical_slash_attention<F32>(x.q.view(), kv_of(x), out.view(), rule, options), out, words);
  };
  refused({}, {}, "causal");
  const std::vector<index_t> three(3, 100);
  refused({.head_verticals = three}, kCausal, "counts for 3 heads, q has 2");
  refused({.head_slashes = three}, kCausal, "counts for 3 heads, q has 2");
  AttentionOptions bad = kCausal;
  bad.softcap = -1.f;
  refused({}, bad, "softcap");
  std::vector<std::byte> little(64);
  bad = kCausal;
  bad.workspace = little;
  refused({}, bad, "workspace");
  const Values wrong(1, 2, 20, 9);
  CHECK(!fovea::vertical_slash_attention<F32>(wrong.view(), kv_of(x), out.view()).ok());
  VerticalSlashLists lists;
  CHECK(!lists.select<F32>(wrong.view(), kv_of(x), {}, kCausal).ok());
  CHECK(!lists.select<fovea::Formats<fovea::Format::bf16>>(x.q.view(), kv_of(x), {}, kCausal).ok());
}
