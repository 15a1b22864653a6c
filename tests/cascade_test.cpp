// SPDX-License-Identifier: Apache-2.0
// Shared prefixes: the same as attention over each request's keys written out one after the other.
#include "fovea/cascade.hpp"

#include <optional>

#include "catch_compat.hpp"
#include "fovea/adapters/std_threads.hpp"
#include "fovea/cache/paged_cache.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/stored.hpp"

namespace {

using namespace test;
using fovea::CascadeLevel;
using fovea::CascadePlan;
using fovea::Code;

// Groups of neighbouring requests, and the keys each group shares.
struct LevelShape {
  std::vector<index_t> group_begin, len_k;
  FormatPair pair{Format::bf16, Format::bf16};
  Lodging how{};
};

struct Problem {
  std::vector<index_t> len_q;
  std::vector<LevelShape> levels;
  index_t q_heads = 4, kv_heads = 2, dim_qk = 24, dim_v = 40;
  Causal causal = Causal::none;
  bool sink = false;
  float softcap = 0;
  std::vector<std::uint64_t> tree{};
  Way way{Regime::automatic, Panels::f32};
  Format q = Format::f32, out = Format::f32;
};

class Cascade {
 public:
  Problem p;
  std::vector<index_t> cu_q;
  Tokens q;
  std::vector<std::unique_ptr<Keys>> keys;
  std::vector<std::unique_ptr<Housed>> homes;
  std::vector<CascadeLevel> levels;
  std::vector<float> sinks;

  explicit Cascade(const Problem& problem, std::uint64_t seed)
      : p(problem), cu_q(cumulative(problem.len_q)), q(random_queries(seed, cu_q.back(), p.q_heads, p.dim_qk, p.q)) {
    for (std::size_t l = 0; l < p.levels.size(); ++l) {
      const LevelShape& level = p.levels[l];
      keys.push_back(std::make_unique<Keys>(seed + 10 * (l + 1), level.pair.k, level.pair.v, p.kv_heads, p.dim_qk, p.dim_v,
                                            level.len_k));
      homes.push_back(std::make_unique<Housed>(keys[l]->k, keys[l]->v, consecutive(level.len_k), level.how));
    }
    for (std::size_t l = 0; l < p.levels.size(); ++l)
      levels.push_back({homes[l]->kv(), p.levels[l].group_begin, p.levels[l].len_k});
    if (p.sink) {
      for (index_t h = 0; h < p.q_heads; ++h) sinks.push_back(0.5f * static_cast<float>(h) - 0.5f);
    }
  }

  AttentionOptions options() const {
    AttentionOptions o;
    o.cu_len_q = cu_q;
    o.causal = p.causal;
    o.softcap = p.softcap;
    o.sink = sinks;
    o.tree = p.tree;
    o.regime = p.way.regime;
    o.panels = p.way.panels;
    return o;
  }
  Answer attend(AttentionOptions o) {
    Answer answer(p.out, cu_q.back(), p.q_heads, p.dim_v);
    o.lse = answer.lse_view();
    const fovea::Status status = cascade_all(q.operand(), levels, answer.out.result(), o);
    INFO(status.message());
    REQUIRE(status.ok());
    return answer;
  }
  Answer attend() { return attend(options()); }
  Answer attend(const CascadePlan& plan, AttentionOptions o) {
    Answer answer(p.out, cu_q.back(), p.q_heads, p.dim_v);
    o.lse = answer.lse_view();
    const fovea::Status status = cascade_all(plan, q.operand(), levels, answer.out.result(), o);
    INFO(status.message());
    REQUIRE(status.ok());
    return answer;
  }
  // Lengths and groups alone: of what is no part of a plan there is nothing here.
  CascadePlan plan(const AttentionOptions& o) const {
    std::vector<CascadeLevel> lengths = levels;
    for (CascadeLevel& level : lengths) level.kv = {};
    CascadePlan made;
    const fovea::Status status = make_plan(made, {1, p.q_heads, p.kv_heads, cu_q.back(), 0, p.dim_qk, p.dim_v}, lengths, o);
    INFO(status.message());
    REQUIRE(status.ok());
    return made;
  }

  index_t group_of(std::size_t level, index_t request) const {
    const auto& begin = p.levels[level].group_begin;
    index_t group = 0;
    while (!(begin[at(group)] <= request && request < begin[at(group + 1)])) ++group;
    return group;
  }

  // Each request's keys of the levels [first, last), one level after the other.
  struct Flat {
    std::vector<float> k, v;
    std::vector<index_t> len, cu;
  };
  Flat flat(std::size_t first, std::size_t last) const {
    Flat all;
    for (index_t request = 0; request < static_cast<index_t>(p.len_q.size()); ++request) {
      all.len.push_back(0);
      for (std::size_t l = first; l < last; ++l) {
        const index_t group = group_of(l, request), begin = cumulative(p.levels[l].len_k)[at(group)];
        const index_t len = p.levels[l].len_k[at(group)], k_row = p.kv_heads * p.dim_qk, v_row = p.kv_heads * p.dim_v;
        const auto k = keys[l]->k.values.begin() + begin * k_row;
        const auto v = keys[l]->v.values.begin() + begin * v_row;
        all.k.insert(all.k.end(), k, k + len * k_row);
        all.v.insert(all.v.end(), v, v + len * v_row);
        all.len.back() += len;
      }
    }
    all.cu = cumulative(all.len);
    return all;
  }

  // Attention over the levels [first, last), with what acts on the last level only where that is among them.
  Expected expect_levels(std::size_t first, std::size_t last, const std::vector<bool>& packed = {}) const {
    const Flat keys_of = flat(first, last);
    AttentionOptions o = options();
    o.cu_len_k = keys_of.cu;
    o.tree = {};
    std::vector<std::uint8_t> mask;
    if (last < p.levels.size()) {
      o.sink = {};
      o.causal = Causal::none;
    } else if (!p.tree.empty()) {
      const auto requests = static_cast<index_t>(p.len_q.size());
      const index_t width = std::max<index_t>(*std::max_element(keys_of.len.begin(), keys_of.len.end()), 1),
                    rows = *std::max_element(p.len_q.begin(), p.len_q.end());
      mask.assign(at(requests * rows * width), 1);
      for (index_t r = 0; r < requests; ++r) {
        const index_t len = p.len_q[at(r)];
        for (index_t i = 0; i < len; ++i) {
          for (index_t j = 0; j < len; ++j) {
            const bool seen = (p.tree[at(cu_q[at(r)] + i)] >> j & 1) != 0;
            mask[at((r * rows + i) * width + keys_of.len[at(r)] - len + j)] = seen;
          }
        }
      }
      o.keep = {mask.data(), {requests, 1, rows, width}, {rows * width, rows * width, width, 1}};
    }
    const index_t total = keys_of.cu.back();
    return expect_stored(q.floats(), fovea::ragged(keys_of.k.data(), total, p.kv_heads, p.dim_qk),
                         fovea::ragged(keys_of.v.data(), total, p.kv_heads, p.dim_v), o, packed);
  }

  // The budget of merged levels. A level's share of a row is exp(lse_l - LSE), off relatively by its own LSE's budget and by
  // their mean, which moves LSE; each merge rounds both shares, both products, their sum and the new LSE.
  Expected expected() const {
    Expected whole = expect_levels(0, p.levels.size());
    std::vector<Expected> parts;
    const index_t group = p.q_heads / p.kv_heads;
    for (std::size_t l = 0; l < p.levels.size(); ++l) {
      std::vector<bool> packed;
      for (index_t r = 0; r < static_cast<index_t>(p.len_q.size()); ++r) {
        const index_t g = group_of(l, r);
        const auto& begin = p.levels[l].group_begin;
        const index_t rows = group * (cu_q[at(begin[at(g + 1)])] - cu_q[at(begin[at(g)])]);
        packed.push_back(p.way.panels == Panels::bf16 &&
                         (p.way.regime == Regime::automatic ? rows > fovea::decode_rows(p.way.panels) : p.way.regime != Regime::decode));
      }
      parts.push_back(expect_levels(l, l + 1, packed));
    }
    const auto merges = static_cast<double>(p.levels.size() - 1);
    double disagreement = 0;
    for (std::size_t row = 0; row < whole.lse.size(); ++row) {
      const double lse = whole.lse[row];
      if (!std::isfinite(lse)) continue;
      double mean = 0;
      for (const Expected& part : parts) mean += std::exp(part.lse[row] - lse) * std::expm1(part.lse_error[row]);
      const double steps = merges * kUnit * (8 + 4 * std::abs(lse));
      whole.lse_error[row] = mean + steps;
      for (index_t d = 0; d < p.dim_v; ++d) {
        const std::size_t n = row * at(p.dim_v) + at(d);
        double merged = 0;
        whole.out_error[n] = 1e-30;
        for (const Expected& part : parts) {
          const double share = std::exp(part.lse[row] - lse), own = std::expm1(part.lse_error[row] + mean + steps);
          merged += share * part.out[n];
          whole.out_error[n] += share * ((1 + own) * part.out_error[n] + own * std::abs(part.out[n]));
        }
        disagreement = std::max(disagreement, std::abs(merged - whole.out[n]));
      }
    }
    CHECK(disagreement < 1e-9);   // of the flat reference and the merged ones, in double
    return whole;
  }
};

// Requests of 1 to 9 queries, groups of any size, homes and formats of any kind.
Problem random_problem(Random& random, std::size_t level_count) {
  Problem p;
  const index_t requests = random.between(1, 7);
  for (index_t r = 0; r < requests; ++r) p.len_q.push_back(random.one_in(8) ? 0 : random.between(1, 9));
  p.q_heads = p.kv_heads * random.pick<index_t>({1, 2, 4});
  p.dim_qk = random.pick<index_t>({8, 24, 33}), p.dim_v = random.pick<index_t>({8, 17, 40});
  p.causal = random.pick({Causal::none, Causal::bottom_right});
  p.sink = random.one_in(2);
  if (random.one_in(4)) p.softcap = 6;
  p.q = random.pick({Format::f32, Format::bf16});
  p.out = random.pick({Format::f32, Format::f64, Format::bf16});
  const bool narrow = random.one_in(2);
  if (narrow && fovea::kHasBf16Dot) p.way.panels = Panels::bf16;
  if (random.one_in(2)) p.way.regime = random.pick({Regime::prefill, Regime::decode, Regime::wide_decode});
  for (std::size_t l = 0; l < level_count; ++l) {
    LevelShape level;
    level.group_begin = {0};
    const bool last = l + 1 == level_count;
    // Groups may be empty; the last level has one per request, where causal asks for it.
    while (level.group_begin.back() < requests) {
      const index_t count =
          last && p.causal != Causal::none ? 1 : random.between(l == 0 ? 1 : 0, requests - level.group_begin.back());
      level.group_begin.push_back(level.group_begin.back() + count);
    }
    const bool empty = !last && random.one_in(6);
    for (std::size_t g = 0; g + 1 < level.group_begin.size(); ++g) {
      const index_t own = last ? p.len_q[at(std::min(level.group_begin[g], requests - 1))] : 0;
      level.len_k.push_back(empty ? 0 : own + random.pick<index_t>({0, 1, 7, 40, 90, 260}));
    }
    level.pair = narrow ? kFormatPairs[1 + 2 * random.below(2) + 4 * random.below(2)] : kFormatPairs[random.below(8)];
    if (p.way.panels == Panels::bf16 && level.pair.v == Format::f64) level.pair = kFormatPairs[1];
    level.how.home = random.pick({Home::contiguous, Home::paged, Home::ring});
    level.how.page_size = random.pick<index_t>({1, 16, 64});
    level.how.csr = random.one_in(2);
    level.how.sinks = random.pick<index_t>({0, 4});
    level.how.seed = random.bits();
    p.levels.push_back(level);
  }
  return p;
}

// Three requests that share one prefix.
Problem small_problem() {
  Problem p;
  p.len_q = {2, 1, 3};
  LevelShape prefix, own;
  prefix.group_begin = {0, 3}, prefix.len_k = {37};
  own.group_begin = {0, 1, 2, 3}, own.len_k = {5, 9, 3};
  p.levels = {prefix, own};
  return p;
}

}   // namespace

TEST_CASE("cascades of one to three levels = flat attention over the levels' keys", "[cascade]") {
  Random random(201);
  for (int n = 0; n < 150; ++n) {
    const Problem p = random_problem(random, static_cast<std::size_t>(n % 3 + 1));
    Cascade x(p, 1000 + static_cast<std::uint64_t>(n) * 100);
    std::string shape;
    for (const LevelShape& level : p.levels) {
      shape += "; groups at";
      for (const index_t begin : level.group_begin) shape += " " + std::to_string(begin);
      shape += ", keys";
      for (const index_t len : level.len_k) shape += " " + std::to_string(len);
      shape += ", " + describe(level.pair) + ", " + describe(level.how);
    }
    INFO("case " << n << ", " << p.len_q.size() << " requests, " << p.q_heads << " heads, " << describe(p.way) << ", causal "
                 << static_cast<int>(p.causal) << ", sink " << p.sink << shape);
    const WorstOf worst = worst_of(x.attend(), x.expected());
    INFO(worst.where);
    CHECK(worst.budgets <= 1);
  }
}

TEST_CASE("a cascade of one level is attention, bit for bit", "[cascade][bits]") {
  for (const FormatPair& pair : kFormatPairs) {
    Problem p;
    p.len_q = {3, 1, 5};
    LevelShape own;
    own.group_begin = {0, 1, 2, 3}, own.len_k = {40, 1030, 5};
    own.pair = pair;
    own.how.home = Home::paged;
    p.levels = {own};
    p.causal = Causal::bottom_right;
    p.sink = true;
    Cascade x(p, 31);
    AttentionOptions options = x.options();
    options.len_k = own.len_k;
    CHECK(x.attend() == attend_stored(x.q, x.homes[0]->kv(), options));
  }
}

TEST_CASE("requests of a cascade do not see each other, threads change no bit", "[cascade][bits]") {
  Problem p = small_problem();
  p.causal = Causal::bottom_right;
  p.sink = true;
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    p.way.regime = regime;
    Cascade x(p, 32);
    const Answer together = x.attend();
    for (int lanes = 2; lanes <= 4; ++lanes) {
      fovea::StdThreads pool(lanes);
      AttentionOptions options = x.options();
      options.executor = {pool, lanes};
      CHECK(x.attend(options) == together);
    }
    // Other queries and own keys for request 1: the bits of 0 and 2 stay.
    Cascade changed(p, 32);
    for (index_t n = 2 * p.q_heads * p.dim_qk; n < 3 * p.q_heads * p.dim_qk; ++n) changed.q.values[at(n)] += 1;
    changed.q.fill(std::vector<float>(changed.q.values));
    for (index_t j = 0; j < 9; ++j) std::fill_n(changed.homes[1]->k_at(1, 0, j), changed.keys[1]->k.bytes, std::byte{0x11});
    const Answer other = changed.attend();
    const auto same_request = [&](index_t token, index_t count) {
      for (index_t i = token; i < token + count; ++i) {
        for (index_t h = 0; h < p.q_heads; ++h) {
          for (index_t d = 0; d < p.dim_v; ++d) {
            if (together.out.value(i * p.q_heads + h, d) != other.out.value(i * p.q_heads + h, d)) return false;
          }
        }
      }
      return true;
    };
    CHECK(same_request(0, 2));
    CHECK_FALSE(same_request(2, 1));
    CHECK(same_request(3, 3));
  }
}

TEST_CASE("one plan of a cascade gives the bits of calls without, for every layer's K and V", "[cascade][bits][plan]") {
  Random random(203);
  for (int n = 0; n < 9; ++n) {
    Problem p = random_problem(random, static_cast<std::size_t>(n % 3 + 1));
    const auto seed = 5000 + static_cast<std::uint64_t>(n) * 100;
    ThreadPerLane threads;
    const int lanes = n % 2 == 0 ? 1 : 3;
    std::optional<CascadePlan> plan;
    for (const std::uint64_t layer : {std::uint64_t{0}, std::uint64_t{50}}) {
      // Another layer has other numbers in other places, and in other formats where the panels allow all.
      for (LevelShape& level : p.levels) {
        level.how.home = layer == 0 ? level.how.home : Home::contiguous;
        if (layer != 0 && p.way.panels == Panels::f32) level.pair = kFormatPairs[random.below(8)];
      }
      Cascade x(p, seed + layer);
      AttentionOptions options = x.options();
      options.executor = {threads, lanes};
      if (!plan) plan = x.plan(options);
      const Answer wanted = x.attend(options);
      CHECK(x.attend(*plan, options) == wanted);
      PoisonedBytes workspace(fovea::workspace_bytes(*plan, lanes), static_cast<std::uint64_t>(n));
      options.workspace = workspace.bytes();
      CHECK(x.attend(*plan, options) == wanted);
      CHECK(x.attend(options) == wanted);
      CHECK(workspace.guards_intact());
    }
  }
}

// Requests that begin alike in the pool of a cache: the pages they share are one level, what follows them the next.
TEST_CASE("the levels of a paged cache's shared prefix = flat attention over its sequences", "[cascade][paged]") {
  const index_t prefix = 37, page_size = 8, shared = 32, tail = prefix - shared;
  Problem p = small_problem();
  p.causal = Causal::bottom_right;
  p.levels[0].len_k = {shared};
  p.levels[1].len_k = {tail + 2, tail + 30, tail + 3};
  for (const FormatPair& pair : {kFormatPairs[1], kFormatPairs[3]}) {
    p.levels[0].pair = p.levels[1].pair = pair;
    Cascade x(p, 36);
    // Every request's own keys begin with the end of the prefix, which fills no page.
    Keys& keys = *x.keys[1];
    const auto begins = cumulative(keys.len);
    for (Rows* rows : {&keys.k, &keys.v}) {
      for (std::size_t r = 1; r < 3; ++r)
        std::copy_n(rows->data.begin(), tail * rows->heads * rows->bytes,
                    rows->data.begin() + begins[r] * rows->heads * rows->bytes);
      rows->read();
    }
    x.homes[1] = std::make_unique<Housed>(keys.k, keys.v, consecutive(keys.len), Lodging{});
    x.levels[1].kv = x.homes[1]->kv();

    fovea::PagedCache cache;
    REQUIRE(cache
                .create({.rows = {.kv_heads = p.kv_heads, .dim_qk = p.dim_qk, .dim_v = p.dim_v, .k = pair.k, .v = pair.v},
                         .pages = 20,
                         .page_size = page_size,
                         .sequences = 4,
                         .poison = true})
                .ok());
    const auto rows_from = [](const fovea::Stored& stored, index_t entry, index_t first) {
      return fovea::Stored{stored.data + entry * stored.stride[0] + first * stored.stride[2], stored.format, stored.stride};
    };
    const auto append = [&](index_t sequence, index_t count, const Kv& kv, index_t entry, index_t first) {
      const fovea::Status status =
          cache.append(sequence, count, rows_from(kv.k, entry, first), rows_from(kv.v, entry, first));
      INFO(status.message());
      REQUIRE(status.ok());
    };
    index_t first = -1;
    REQUIRE(cache.create_sequence(&first).ok());
    append(first, shared, x.levels[0].kv, 0, 0);
    append(first, tail, x.levels[1].kv, 0, 0);
    std::vector<index_t> requests(3), total;
    for (index_t r = 0; r < 3; ++r) {
      REQUIRE(cache.share_prefix(first, prefix, &requests[at(r)]).ok());
      append(requests[at(r)], keys.len[at(r)] - tail, x.levels[1].kv, r, tail);
      total.push_back(shared + keys.len[at(r)]);
    }

    const index_t whole[] = {first};
    fovea::PageLists lists;
    fovea::KvBatch prefix_of, own;
    REQUIRE(cache.csr(requests, shared, lists, &own).ok());
    REQUIRE(cache.csr(whole, &prefix_of).ok());
    CHECK(std::equal(own.len_k.begin(), own.len_k.end(), keys.len.begin(), keys.len.end()));
    const Answer wanted = x.attend();
    x.levels[0].kv = prefix_of.kv;   // 37 keys in 5 pages, of which the level has 32
    x.levels[1] = {own.kv, p.levels[1].group_begin, own.len_k};
    const Answer answer = x.attend();
    CHECK(answer == wanted);
    const WorstOf worst = worst_of(answer, x.expected());
    INFO(describe(pair) << ": " << worst.where);
    CHECK(worst.budgets <= 1);

    fovea::KvBatch flat;
    REQUIRE(cache.csr(requests, &flat).ok());
    AttentionOptions options = x.options();
    options.len_k = flat.len_k;
    CHECK(std::equal(flat.len_k.begin(), flat.len_k.end(), total.begin(), total.end()));
    const WorstOf apart = worst_of(attend_stored(x.q, flat.kv, options), x.expect_levels(0, 2));
    INFO(describe(pair) << ", flat: " << apart.where);
    CHECK(apart.budgets <= 1);
  }
}

TEST_CASE("a draft tree acts on the last level of a cascade", "[cascade][tree]") {
  Random random(202);
  for (int n = 0; n < 12; ++n) {
    Problem p = small_problem();
    p.len_q = {random.between(1, 16), random.between(1, 16), random.between(1, 16)};
    for (std::size_t r = 0; r < 3; ++r) {
      p.levels[1].len_k[r] = p.len_q[r] + random.below(30);
      for (index_t i = 0; i < p.len_q[r]; ++i)
        p.tree.push_back((random.bits() & ((std::uint64_t{1} << i) - 1)) | std::uint64_t{1} << i);
    }
    p.causal = random.pick({Causal::none, Causal::bottom_right});
    p.levels[1].how.home = Home::paged;
    Cascade x(p, 300 + static_cast<std::uint64_t>(n));
    const WorstOf worst = worst_of(x.attend(), x.expected());
    INFO(worst.where);
    CHECK(worst.budgets <= 1);
  }
}

TEST_CASE("an empty row of a cascade is 0 with LSE -inf, or the sink", "[cascade]") {
  for (const bool sink : {false, true}) {
    Problem p = small_problem();
    p.levels[0].len_k = {0};
    p.levels[1].len_k = {4, 0, 3};
    p.sink = sink;
    Cascade x(p, 33);
    const Answer answer = x.attend();
    for (index_t h = 0; h < p.q_heads; ++h) {
      for (index_t d = 0; d < p.dim_v; ++d) CHECK(answer.out.value(2 * p.q_heads + h, d) == 0);
      const float lse = answer.lse[at(h * 6 + 2)];
      CHECK(lse == (sink ? x.sinks[at(h)] : -std::numeric_limits<float>::infinity()));
      CHECK(std::isfinite(answer.lse[at(h * 6)]));
    }
  }
}

TEST_CASE("queries behind the last request belong to nobody", "[cascade]") {
  Problem p = small_problem();
  Cascade x(p, 34);
  const Answer plain = x.attend();
  Tokens more(Format::f32, 8, p.q_heads, p.dim_qk);
  std::vector<float> numbers = x.q.values;
  numbers.resize(at(8 * p.q_heads * p.dim_qk), 1.f);
  more.fill(numbers);
  Answer answer(Format::f32, 8, p.q_heads, p.dim_v);
  AttentionOptions options = x.options();
  options.lse = answer.lse_view();
  const fovea::Status status = cascade_all(more.operand(), x.levels, answer.out.result(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  CHECK(same_tokens(answer, 0, plain));
  // A tree has words for them too, as in a call without levels.
  const std::vector<std::uint64_t> all_seen(8, ~std::uint64_t{0});
  Answer again(Format::f32, 8, p.q_heads, p.dim_v);
  options.lse = again.lse_view();
  options.tree = all_seen;
  const fovea::Status with_tree = cascade_all(more.operand(), x.levels, again.out.result(), options);
  INFO(with_tree.message());
  CHECK(with_tree.ok());
  CHECK(again == answer);
  for (index_t row = 6 * p.q_heads; row < 8 * p.q_heads; ++row)
    CHECK(std::all_of(answer.out.place(row, 0), answer.out.place(row, 0) + p.dim_v * 4,
                      [](std::byte b) { return b == kPoison; }));
}

namespace {

struct Call {
  Cascade x{small_problem(), 35};
  Answer answer{Format::f32, 8, 4, 40};   // room for shapes that are too large
  fovea::Operand q = x.q.operand();
  fovea::Result out;
  AttentionOptions options = x.options();
  std::vector<index_t> numbers, others;
  std::vector<float> floats = std::vector<float>(64, 0.f);
  std::vector<std::uint8_t> bytes = std::vector<std::uint8_t>(1024, 1);
  std::vector<std::uint64_t> words;

  Call() {
    out = answer.out.result();
    out.extent[2] = 6;
    options.lse = {answer.lse.data(), {1, 4, 6}, {24, 6, 1}};
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

template <class Spoil>
void refused(const char* what, Code code, std::initializer_list<const char*> words, const Spoil& spoil) {
  Call call;
  spoil(call);
  const fovea::Status status = cascade_all(call.q, call.x.levels, call.out, call.options);
  INFO(what << ": \"" << status.message() << "\"");
  CHECK(status.code() == code);
  for (const char* word : words) CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(word));
  CHECK(call.answer.untouched());
}

}   // namespace

TEST_CASE("what a cascade refuses", "[cascade][errors]") {
  Call good;
  REQUIRE(cascade_all(good.q, good.x.levels, good.out, good.options).ok());
  const Code invalid = Code::invalid_argument, unsupported = Code::unsupported;
  refused("no level", invalid, {"at least one level"}, [](Call& c) { c.x.levels.clear(); });
  refused("no cu_len_q", invalid, {"got 0 entries"}, [](Call& c) { c.options.cu_len_q = {}; });
  refused("a batch", invalid, {"got 2"}, [](Call& c) { c.q.extent[0] = 2; });
  refused("cu_len_q that falls", invalid, {"cu_len_q[2]", "1", "2"}, [](Call& c) {
    c.numbers = {0, 2, 1, 6};
    c.options.cu_len_q = c.numbers;
  });
  refused("cu_len_q beyond q", invalid, {"7", "6"}, [](Call& c) {
    c.numbers = {0, 2, 3, 7};
    c.options.cu_len_q = c.numbers;
  });
  refused("len_k", invalid, {"len_k"}, [](Call& c) {
    c.numbers = {1, 1, 1};
    c.options.len_k = c.numbers;
  });
  refused("cu_len_k", invalid, {"cu_len_k"}, [](Call& c) {
    c.numbers = {0, 1, 2, 3};
    c.options.cu_len_k = c.numbers;
  });
  refused("q_offset", invalid, {"q_offset"}, [](Call& c) {
    c.numbers = {0, 0, 0};
    c.options.q_offset = c.numbers;
  });
  refused("a window", unsupported, {"window"}, [](Call& c) { c.options.window.left = 3; });
  refused("a window to the right", unsupported, {"window"}, [](Call& c) { c.options.window.right = 0; });
  refused("ALiBi", unsupported, {"alibi"}, [](Call& c) { c.options.alibi_slopes = std::span(c.floats).first(4); });
  refused("bias", unsupported, {"bias"}, [](Call& c) { c.options.bias = {c.floats.data(), {1, 1, 1, 64}, {0, 0, 0, 1}}; });
  refused("keep", unsupported, {"keep"}, [](Call& c) { c.options.keep = {c.bytes.data(), {1, 1, 1, 64}, {0, 0, 0, 1}}; });
  refused("causal top_left", unsupported, {"top_left"}, [](Call& c) { c.options.causal = Causal::top_left; });
  refused("no groups", invalid, {"level 1", "0 group borders"}, [](Call& c) { c.x.levels[1].group_begin = {}; });
  refused("lengths that do not fit the groups", invalid, {"level 1", "4", "2"},
          [](Call& c) { c.x.levels[1].len_k = c.x.levels[1].len_k.first(2); });
  refused("groups that do not start at 0", invalid, {"group_begin[0] is 1"}, [](Call& c) {
    c.numbers = {1, 3};
    c.x.levels[0].group_begin = c.numbers;
  });
  refused("groups that fall", invalid, {"group_begin[2] = 1", "2"}, [](Call& c) {
    c.numbers = {0, 2, 1, 3};
    c.x.levels[1].group_begin = c.numbers;
  });
  refused("groups that leave requests out", invalid, {"level 0", "2 of 3"}, [](Call& c) {
    c.numbers = {0, 2};
    c.x.levels[0].group_begin = c.numbers;
  });
  refused("groups beyond the requests", invalid, {"group_begin", "4", "3"}, [](Call& c) {
    c.numbers = {0, 4};
    c.x.levels[0].group_begin = c.numbers;
  });
  refused("causal over shared last keys", invalid, {"one group per request", "1 for 3"}, [](Call& c) {
    c.options.causal = Causal::bottom_right;
    c.x.levels.pop_back();
  });
  refused("causal over requests that are not one by one", invalid, {"group 1 of the last level is request 1", "starts at 2"},
          [](Call& c) {
            static const index_t groups[] = {0, 2, 2, 3}, lengths[] = {5, 5, 5};
            c.x.levels[1].group_begin = groups;
            c.x.levels[1].len_k = lengths;
            c.options.causal = Causal::bottom_right;
          });
  refused("a tree over shared last keys", invalid, {"one group per request", "1 for 3"}, [](Call& c) {
    c.words.assign(6, ~std::uint64_t{0});
    c.options.tree = c.words;
    c.x.levels.pop_back();
  });
  refused("a tree of another length", invalid, {"5", "6"}, [](Call& c) {
    c.words.assign(5, ~std::uint64_t{0});
    c.options.tree = c.words;
  });
  refused("out of another dim", invalid, {"41", "40"}, [](Call& c) { c.out.extent[3] = 41; });
  refused("out of another length", invalid, {"8", "6"}, [](Call& c) { c.out.extent[2] = 8; });
  refused("dims that differ between levels", invalid, {"24", "40"}, [](Call& c) { c.x.levels[1].kv.dim_v = 24; });
  refused("kv heads that differ between levels", invalid, {"level 1", "1 kv heads", "2"},
          [](Call& c) { c.x.levels[1].kv.kv_heads = 1; });
  refused("a level that attention refuses", invalid, {"len_k[0] = 41", "40"}, [](Call& c) {
    c.numbers = {41};
    c.x.levels[0].len_k = c.numbers;
  });
}

TEST_CASE("a plan for another cascade is refused", "[cascade][plan][errors]") {
  Call planned;
  const CascadePlan plan = planned.x.plan(planned.options);
  const auto refused = [&](const char* what, std::initializer_list<const char*> words, const auto& change,
                           Code code = Code::invalid_argument) {
    Call c;
    change(c);
    const fovea::Status status = cascade_all(plan, c.q, c.x.levels, c.out, c.options);
    INFO(what << ": \"" << status.message() << "\"");
    CHECK(status.code() == code);
    for (const char* word : words) CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(word));
    CHECK(c.answer.untouched());
  };
  {
    Call c;
    REQUIRE(cascade_all(plan, c.q, c.x.levels, c.out, c.options).ok());
  }
  refused("one level", {"2 levels", "has 1"}, [](Call& c) { c.x.levels.pop_back(); });
  refused("other lengths", {"sequence 1 is planned as 1 queries", "9 keys", "1, 0, 8"}, [](Call& c) {
    c.numbers = {5, 8, 3};
    c.x.levels[1].len_k = c.numbers;
  });
  refused("other queries", {"group 2 of level 1 is planned from query 3 on", "starts at 5"}, [](Call& c) {
    c.numbers = {0, 2, 5, 6};
    c.options.cu_len_q = c.numbers;
  });
  refused("other groups", {"level 0", "1 groups", "has 2"}, [](Call& c) {
    c.numbers = {0, 1, 3};
    c.others = {37, 37};
    c.x.levels[0].group_begin = c.numbers;
    c.x.levels[0].len_k = c.others;
  });
  refused("causal", {"keys"}, [](Call& c) { c.options.causal = Causal::bottom_right; });
  refused("another regime", {"regime"}, [](Call& c) { c.options.regime = Regime::prefill; });
  refused("other dims", {"24/40", "24/39"}, [](Call& c) {
    c.out.extent[3] = 39;
    for (CascadeLevel& level : c.x.levels) level.kv.dim_v = 39;
  });
  refused("other heads", {"4/2 heads", "4/1"}, [](Call& c) {
    for (CascadeLevel& level : c.x.levels) level.kv.kv_heads = 1;
  });
  std::vector<std::byte> little(fovea::workspace_bytes(plan) - 1);
  refused("a small workspace", {"workspace has", "the plan needs"}, [&](Call& c) { c.options.workspace = little; },
          Code::workspace_too_small);
  refused("a workspace in out", {"workspace", "out"}, [](Call& c) { c.options.workspace = c.answer.out.bytes; });
  CascadePlan of_batch;
  const fovea::Status unplanned = make_plan(of_batch, {2, 4, 2, 6, 0, 24, 40}, planned.x.levels, planned.options);
  CHECK_THAT(std::string(unplanned.message()), Catch::Matchers::ContainsSubstring("got 2"));
}

// The errors of fovea::attention, in words about the cascade's own outputs.
TEST_CASE("a cascade checks its outputs like attention", "[cascade][errors]") {
  const Code invalid = Code::invalid_argument, unsupported = Code::unsupported;
  refused("out without data", invalid, {"out", "null"}, [](Call& c) { c.out.data = nullptr; });
  refused("out of a format without numbers", unsupported, {"out", "i8_token"},
          [](Call& c) { c.out.format = Format::i8_token; });
  refused("out that overlaps itself", invalid, {"out overlaps itself"}, [](Call& c) { c.out.stride[2] = 1; });
  refused("out that overlaps lse", invalid, {"out", "lse"},
          [](Call& c) { c.options.lse.data = reinterpret_cast<float*>(c.out.data); });
  refused("lse of another shape", invalid, {"lse", "5", "6"}, [](Call& c) { c.options.lse.extent[2] = 5; });
  refused("lse of other heads", invalid, {"lse", "3", "4"}, [](Call& c) { c.options.lse.extent[1] = 3; });
  refused("lse that overlaps itself", invalid, {"lse overlaps itself"}, [](Call& c) { c.options.lse.stride[1] = 1; });
  {
    Call c;
    c.out.data = c.x.q.bytes.data();
    const std::vector<std::byte> before = c.x.q.bytes;
    c.out.extent[3] = 24;
    c.out.stride = {6 * 4 * 24, 24, 4 * 24, 1};
    for (CascadeLevel& level : c.x.levels) level.kv.dim_v = 24;
    const fovea::Status status = cascade_all(c.q, c.x.levels, c.out, c.options);
    INFO("out over q: \"" << status.message() << "\"");
    CHECK(status.code() == invalid);
    CHECK(c.x.q.bytes == before);
  }
  {
    Call c;
    c.out.data = c.x.homes[0]->k_pool.data();
    c.out.extent[3] = 2;
    c.out.stride = {48, 2, 8, 1};
    for (CascadeLevel& level : c.x.levels) level.kv.dim_v = 2;
    const std::vector<std::byte> before = c.x.homes[0]->k_pool;
    const fovea::Status status = cascade_all(c.q, c.x.levels, c.out, c.options);
    INFO("out over shared keys: \"" << status.message() << "\"");
    CHECK(status.code() == invalid);
    CHECK(c.x.homes[0]->k_pool == before);
  }
}
