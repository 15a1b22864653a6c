// SPDX-License-Identifier: Apache-2.0
// The grid of storage: every pair of K and V formats in every home, each against the double reference on what the rows mean.
//   FOVEA_GRID_CASES=200   only 200 cases, spread evenly over the grid
//   FOVEA_GRID_ONLY=1234   only that case
#include <cstdlib>
#include <optional>
#include <set>

#include "catch_compat.hpp"
#include "support/problem.hpp"
#include "support/stored.hpp"

namespace {

using namespace test;

constexpr Format kPlainFormats[] = {Format::f32, Format::f64, Format::bf16, Format::f16};

const std::vector<index_t>& dims() {
  static const std::vector<index_t> all = [] {
    std::vector<index_t> values(33);
    std::iota(values.begin(), values.end(), 1);
    for (const index_t dim : {40, 64, 72, 80, 96, 112, 128, 192, 256, 576}) values.push_back(dim);
    return values;
  }();
  return all;
}

// Around the vector widths, row groups, key tiles and the splits of a decode.
const std::vector<index_t> kKeys{0,  1,  2,  3,  5,   7,   8,   15,  16,  17,  31,  32,  33,  47,   48,   63,   64,
                                 65, 95, 96, 97, 127, 128, 129, 200, 255, 256, 257, 300, 511, 1023, 1024, 1025, 1100};
const std::vector<index_t> kQueries{1, 1, 1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16, 17, 24, 25, 33, 48, 64, 65, 70};

struct Case {
  std::uint64_t seed = 1;
  Format q = Format::f32, out = Format::f32, k = Format::f32, v = Format::f32;
  index_t q_heads = 1, kv_heads = 1, dim_qk = 8, dim_v = 8, gap = 0;
  bool ragged = false;
  std::vector<index_t> len_q{1}, len_k{1};
  Lodging home{};

  // A mixed cache: keys < exact_first and >= exact_from[sequence] in other formats and another home.
  bool mixed = false;
  Format exact_k = Format::bf16, exact_v = Format::bf16;
  Lodging exact_home{};
  index_t exact_first = 0;
  std::vector<index_t> exact_from{};

  std::optional<float> scale{};
  Causal causal = Causal::none;
  Window window{};
  float softcap = 0;
  bool sink = false, alibi = false, offset = false;
  bool bias = false, keep = false;
  Regime regime = Regime::automatic;
  Panels panels = Panels::f32;
  int lanes = 1;

  index_t sequences() const { return static_cast<index_t>(len_q.size()); }
  double macs() const {
    double pairs = 0;
    for (std::size_t s = 0; s < len_q.size(); ++s) pairs += static_cast<double>(len_q[s]) * static_cast<double>(len_k[s]);
    return pairs * static_cast<double>(q_heads) * static_cast<double>(dim_qk + dim_v);
  }
  // What encoding and decoding the rows costs.
  double rows() const {
    return static_cast<double>(cumulative(len_k).back()) * static_cast<double>(kv_heads) *
           static_cast<double>(dim_qk + dim_v);
  }
  Regime regime_of(std::size_t s) const {
    if (regime != Regime::automatic) return regime;
    const index_t count = len_q[s] * q_heads / kv_heads;
    return count <= fovea::decode_rows(panels) ? Regime::decode
           : count <= fovea::kWideRows         ? Regime::wide_decode
                                               : Regime::prefill;
  }
};

std::string describe(const Case& c) {
  char text[400];
  std::snprintf(
      text, sizeof text,
      "seed %llu, q %s, K %s, V %s, out %s, heads %td/%td, dims %td/%td, len_q %s%s, len_k %s, regime %s, %s panels, "
      "%d lanes; ",
      static_cast<unsigned long long>(c.seed), name_of(c.q), name_of(c.k), name_of(c.v), name_of(c.out), c.q_heads,
      c.kv_heads, c.dim_qk, c.dim_v, list(c.len_q).c_str(), c.ragged ? " ragged" : "", list(c.len_k).c_str(),
      regime_name(c.regime), c.panels == Panels::bf16 ? "bf16" : "f32", c.lanes);
  std::string all = text + describe(c.home);
  if (c.mixed) {
    std::snprintf(text, sizeof text, "; exact K %s, V %s below %td and from %s, ", name_of(c.exact_k), name_of(c.exact_v),
                  c.exact_first, list(c.exact_from).c_str());
    all += text + describe(c.exact_home);
  }
  std::snprintf(text, sizeof text,
                "; scale %s, causal %s, window %td..%td, softcap %g, sink %d, alibi %d, offset %d, bias %d, keep %d",
                c.scale ? std::to_string(*c.scale).c_str() : "default", name(c.causal), c.window.left, c.window.right,
                double{c.softcap}, c.sink, c.alibi, c.offset, c.bias, c.keep);
  return all + text;
}

bool is_narrow_format(Format format) { return format != Format::f32 && format != Format::f64; }

constexpr index_t kPairs = 13 * 12, kCases = kPairs * 18;

// Case n depends on n alone.
Case grid_case(index_t n) {
  Random random(static_cast<std::uint64_t>(n) * 6007 + 5);
  Case c;
  c.seed = static_cast<std::uint64_t>(n) + 7000;
  c.k = kAllFormats[at(n % 13)];
  c.v = kAllFormats[at(n / 13 % 12)];
  if (c.v >= Format::i8_channel) c.v = kAllFormats[at(n / 13 % 12 + 1)];   // values have no scales per channel
  c.q = kPlainFormats[random.below(4)];
  c.out = kPlainFormats[random.below(4)];
  c.dim_qk = dims()[at((n + n / kPairs * 29) % 43)];
  c.dim_v = random.one_in(2) ? c.dim_qk : random.pick(dims());
  if (c.k == Format::latent_fp8) c.dim_qk = fovea::kLatentFp8Dim;
  if (c.v == Format::latent_fp8) c.dim_v = fovea::kLatentFp8Values;
  c.kv_heads = random.pick<index_t>({1, 1, 2, 3});
  c.q_heads = c.kv_heads * random.pick<index_t>({1, 1, 2, 3, 4, 8});
  c.gap = random.pick<index_t>({0, 0, 3});

  const auto sequences = static_cast<std::size_t>(random.between(1, 4));
  c.ragged = random.one_in(2);
  c.len_q.assign(sequences, random.pick(kQueries));
  for (std::size_t s = 0; c.ragged && s < sequences; ++s) c.len_q[s] = random.one_in(8) ? 0 : random.pick(kQueries);
  c.len_k.clear();
  for (std::size_t s = 0; s < sequences; ++s) c.len_k.push_back(random.pick(kKeys));
  c.regime = random.pick({Regime::automatic, Regime::prefill, Regime::decode, Regime::wide_decode});

  const double most_macs = n % 16 == 0 ? 1e6 : 1e5, most_rows = n % 16 == 0 ? 6e4 : 2e4;
  while (c.macs() > most_macs || c.rows() > most_rows) {
    if (c.q_heads > c.kv_heads && random.one_in(3)) {
      c.q_heads = c.kv_heads;
    } else if (c.kv_heads > 1 && random.one_in(3)) {
      c.q_heads /= c.kv_heads;
      c.kv_heads = 1;
    } else if (c.macs() > most_macs && *std::max_element(c.len_q.begin(), c.len_q.end()) > 1) {
      for (index_t& len : c.len_q) len = (len + 1) / 2;
    } else if (random.one_in(2)) {
      index_t& len = c.len_k[at(random.below(static_cast<index_t>(sequences)))];
      len = random.between(0, len);
    } else if (!random.one_in(4) && is_plain(c.k) && is_plain(c.v)) {
      c.dim_qk = std::min(c.dim_qk, random.pick(dims()));
      c.dim_v = std::min(c.dim_v, random.pick(dims()));
    } else {
      c.len_k.back() = std::min<index_t>(c.len_k.back(), random.between(1, 40));
    }
  }

  const auto lodge = [&](Lodging& home, Format k, Format v) {
    home.weave = random.pick({Weave::head_major, Weave::head_major, Weave::token_major, Weave::interleaved});
    home.spare = random.between(0, 4);
    home.gap = random.pick<index_t>({0, 0, 1, 5});
    home.page_size = random.pick<index_t>({1, 2, 3, 5, 8, 16, 16, 31, 64, 128, 256});
    home.csr = random.one_in(2);
    home.sinks = random.pick<index_t>({0, 1, 4, 7});
    home.seed = c.seed * 3 + 1;
    home.behind = random.pick<std::int32_t>({2147480000, -1});
    if (k == v && (is_plain(k) ? c.dim_v <= c.dim_qk : k == Format::latent_fp8) && random.one_in(3))
      home.weave = Weave::v_in_k;
  };
  c.home.home = std::array{Home::contiguous, Home::paged, Home::paged, Home::ring}[at(n / kPairs % 4)];
  lodge(c.home, c.k, c.v);
  c.mixed = c.home.weave != Weave::v_in_k && random.one_in(3);
  c.home.ragged = c.home.home == Home::contiguous && c.ragged && !c.mixed && random.one_in(2);
  if (c.mixed) {
    c.exact_k = c.k == Format::latent_fp8 ? random.pick({Format::latent_fp8, Format::bf16})
                                          : random.pick({Format::bf16, Format::f16, Format::f32, Format::e4m3});
    if (c.k == Format::i8_channel && random.one_in(4)) c.exact_k = Format::i8_channel;
    c.exact_v = random.pick({Format::bf16, Format::f16, Format::f32, Format::i8_token});
    c.exact_home.home = random.pick({Home::contiguous, Home::ring});
    lodge(c.exact_home, c.exact_k, c.exact_v);
    if (c.exact_home.weave == Weave::v_in_k) c.exact_home.weave = Weave::interleaved;
    c.exact_first = random.pick<index_t>({0, 1, 4, 9});
    for (const index_t len : c.len_k) c.exact_from.push_back(random.one_in(4) ? len : random.between(0, len));
  }

  const bool narrow = is_narrow_format(c.k) && is_narrow_format(c.v) &&
                      (!c.mixed || (is_narrow_format(c.exact_k) && is_narrow_format(c.exact_v)));
  if (fovea::kHasBf16Dot && narrow && random.one_in(2)) c.panels = Panels::bf16;
  if (random.one_in(4)) c.scale = random.pick({0.f, -0.2f, 0.05f});
  c.causal = random.pick({Causal::none, Causal::top_left, Causal::bottom_right, Causal::bottom_right});
  if (random.one_in(4)) c.window = {random.pick<index_t>({-1, 0, 3, 31, 100}), random.pick<index_t>({-1, 0, 2, 40})};
  if (random.one_in(4)) c.softcap = random.pick({1.f, 5.f, 30.f});
  c.sink = random.one_in(4);
  c.alibi = random.one_in(6);
  c.offset = random.one_in(5);
  c.bias = random.one_in(5);
  c.keep = random.one_in(5);
  c.lanes = static_cast<int>(random.between(1, 3));
  return c;
}

// A case in memory.
struct Staged {
  Case c;
  index_t total;
  Tokens q;
  Rows k, v, exact_k, exact_v;
  std::vector<float> k_values, v_values;   // [token, kv_head, dim]: what the call reads, whichever part it is in
  std::vector<index_t> cu_q, cu_k, offsets;
  std::vector<float> sinks, slopes;
  Dense4<float> bias;
  Dense4<std::uint8_t> keep;
  std::optional<Housed> home, exact_home;
  Kv exact;

  Staged(const Staged&) = delete;
  Staged& operator=(const Staged&) = delete;
  explicit Staged(const Case& c_) : c(c_), cu_q(cumulative(c_.len_q)), cu_k(cumulative(c_.len_k)) {
    Random random(c.seed);
    total = cu_q.back();
    q = Tokens(c.q, total, c.q_heads, c.dim_qk, c.gap);
    q.fill(random_numbers(c.seed + 1, total * c.q_heads * c.dim_qk));
    const index_t keys = cu_k.back();
    const auto k_numbers = random_numbers(c.seed + 2, keys * c.kv_heads * c.dim_qk);
    const auto v_numbers = random_numbers(c.seed + 3, keys * c.kv_heads * c.dim_v);
    k = Rows(c.k, c.kv_heads, c.dim_qk, k_numbers);
    v = c.home.weave == Weave::v_in_k ? head_of(k, c.dim_v) : Rows(c.v, c.kv_heads, c.dim_v, v_numbers, false);
    k_values = k.values, v_values = v.values;
    Placement tokens = consecutive(c.len_k), exact_tokens;
    if (c.mixed) {
      exact_k = beside(k, c.exact_k, k_numbers);
      exact_v = Rows(c.exact_v, c.kv_heads, c.dim_v, v_numbers, false);
      for (std::size_t s = 0; s < tokens.size(); ++s) {
        exact_tokens.emplace_back();
        for (index_t j = 0; j < c.len_k[s]; ++j) {
          if (j >= c.exact_first && j < c.exact_from[s]) continue;
          const index_t token = tokens[s][at(j)];
          exact_tokens.back().push_back(token);
          tokens[s][at(j)] = -1;
          std::copy_n(exact_k.values.begin() + token * c.kv_heads * c.dim_qk, c.kv_heads * c.dim_qk,
                      k_values.begin() + token * c.kv_heads * c.dim_qk);
          std::copy_n(exact_v.values.begin() + token * c.kv_heads * c.dim_v, c.kv_heads * c.dim_v,
                      v_values.begin() + token * c.kv_heads * c.dim_v);
        }
        tokens[s].resize(at(c.exact_from[s]));   // nothing is kept behind
      }
      exact_home.emplace(exact_k, exact_v, exact_tokens, c.exact_home);
      exact = exact_home->kv();
    }
    home.emplace(k, v, tokens, c.home);

    for (index_t h = 0; h < c.q_heads; ++h) {
      if (c.sink) sinks.push_back(random.uniform(-2.f, 3.f));
      if (c.alibi) slopes.push_back(random.pick({0.f, 0.02f, 0.25f}));
    }
    for (std::size_t s = 0; c.offset && s < c.len_q.size(); ++s) offsets.push_back(random.between(-2, c.len_k[s] + 2));
    const index_t longest_q = *std::max_element(c.len_q.begin(), c.len_q.end());
    const index_t longest_k = *std::max_element(c.len_k.begin(), c.len_k.end());
    const auto fill = [&](auto& mask, bool wanted, auto beyond, const auto& draw) {
      if (!wanted) return;
      mask.extent = {random.one_in(2) ? 1 : c.sequences(), random.one_in(2) ? 1 : c.q_heads, longest_q, longest_k};
      mask.values.assign(at(std::max<index_t>(mask.extent[0] * mask.extent[1] * longest_q * longest_k, 1)), beyond);
      for (index_t s = 0; s < c.sequences(); ++s) {
        for (index_t h = 0; h < mask.extent[1]; ++h) {
          for (index_t i = 0; i < c.len_q[at(s)]; ++i) {
            for (index_t j = 0; j < c.len_k[at(s)]; ++j) mask.at(s, h, i, j) = draw();
          }
        }
      }
    };
    fill(bias, c.bias, kNan, [&] { return random.one_in(5) ? -kInfinity : random.normal(); });
    fill(keep, c.keep, std::uint8_t{255}, [&] { return static_cast<std::uint8_t>(random.one_in(3) ? 0 : 1); });
  }

  Kv kv() const {
    Kv all = home->kv();
    if (c.mixed) {
      all.exact = &exact;
      all.exact_first = c.exact_first;
      all.exact_from = c.exact_from;
    }
    return all;
  }
  index_t batch() const { return c.ragged ? 1 : c.sequences(); }

  AttentionOptions common() const {
    AttentionOptions o;
    o.scale = c.scale;
    o.causal = c.causal;
    o.window = c.window;
    o.softcap = c.softcap;
    o.q_offset = offsets;
    o.sink = sinks;
    o.alibi_slopes = slopes;
    o.bias = bias.view();
    o.keep = keep.view();
    return o;
  }
  AttentionOptions options() const {
    AttentionOptions o = common();
    if (c.ragged) o.cu_len_q = cu_q;
    if (c.home.ragged) {
      o.cu_len_k = home->cu_len;
    } else {
      o.len_k = c.len_k;
    }
    o.regime = c.regime;
    o.panels = c.panels;
    return o;
  }
  Expected expected() const {
    AttentionOptions o = common();
    o.cu_len_q = cu_q;
    o.cu_len_k = cu_k;
    std::vector<bool> packed;
    for (std::size_t s = 0; c.panels == Panels::bf16 && s < c.len_q.size(); ++s)
      packed.push_back(c.regime_of(s) != Regime::decode);
    Rounded rounded;
    rounded.q = c.q != Format::bf16 || c.k == Format::i8_channel;
    rounded.k = c.k != Format::bf16 || (c.mixed && c.exact_k != Format::bf16);
    rounded.v = c.v != Format::bf16 || (c.mixed && c.exact_v != Format::bf16);
    const index_t keys = cu_k.back();
    return expect_stored(q.floats(), fovea::ragged(k_values.data(), keys, c.kv_heads, c.dim_qk),
                         fovea::ragged(v_values.data(), keys, c.kv_heads, c.dim_v), o, packed, rounded);
  }
};

// The worst elements seen, in budgets, where the rounding of the output does not hide them.
struct Seen {
  double f32_panels = 0, bf16_panels = 0;
};

std::string check(const Case& c, Seen& seen) {
  Staged x(c);
  Answer answer(c.out, x.total, c.q_heads, c.dim_v, c.gap);
  AttentionOptions options = x.options();
  options.lse = answer.lse_view(x.batch());
  Pools pools;
  options.executor = pools.get(Pool::reversed, c.lanes);
  const fovea::Status status = attend_all(x.q.operand(x.batch()), x.kv(), answer.out.result(x.batch()), options);
  if (!status.ok()) return status.message();
  if (!answer.out.gaps_intact()) return "wrote between the rows of out";
  const WorstOf found = worst_of(answer, x.expected());
  if (!is_narrow_format(c.out)) {
    double& worst = c.panels == Panels::bf16 ? seen.bf16_panels : seen.f32_panels;
    worst = std::max(worst, found.budgets);
  }
  return found.budgets <= 1 ? "" : found.where;
}

index_t number(const char* variable, index_t otherwise) {
  const char* const text = std::getenv(variable);
  return text == nullptr ? otherwise : static_cast<index_t>(std::strtoll(text, nullptr, 10));
}

}   // namespace

TEST_CASE("the grid of storage covers every pair of formats in every home and regime", "[grid][storage]") {
  std::set<std::pair<Format, Format>> pairs, of_q_and_out;
  std::set<std::tuple<Format, Home, Regime>> k_in_home;
  std::set<std::tuple<Home, bool, Regime, Panels>> homes;
  std::set<std::tuple<Format, Regime, Panels>> k_in_panels, v_in_panels;
  std::set<index_t> all_dims, pages;
  std::set<Format> k_in_mixed;
  index_t mixed = 0, v_in_k = 0, unequal = 0, ragged_keys = 0;
  for (index_t n = 0; n < kCases; ++n) {
    const Case c = grid_case(n);
    pairs.insert({c.k, c.v});
    of_q_and_out.insert({c.q, c.out});
    all_dims.insert(c.dim_qk);
    if (c.home.home == Home::paged) pages.insert(c.home.page_size);
    for (std::size_t s = 0; s < c.len_q.size(); ++s) {
      if (c.len_q[s] == 0 || c.len_k[s] == 0) continue;
      k_in_home.insert({c.k, c.home.home, c.regime_of(s)});
      homes.insert({c.home.home, c.mixed, c.regime_of(s), c.panels});
      k_in_panels.insert({c.k, c.regime_of(s), c.panels});
      v_in_panels.insert({c.v, c.regime_of(s), c.panels});
    }
    if (c.mixed) k_in_mixed.insert(c.k);
    mixed += c.mixed, v_in_k += c.home.weave == Weave::v_in_k, unequal += c.dim_qk != c.dim_v, ragged_keys += c.home.ragged;
  }
  CHECK(pairs.size() == kPairs);
  CHECK(of_q_and_out.size() == 16);
  CHECK(all_dims.size() == 43);
  CHECK(pages.size() == 10);
  CHECK(k_in_home.size() == 13 * 3 * 3);
  // 11 of 13 formats are narrow enough for bf16 panels, 10 of 12 of values.
  CHECK(k_in_panels.size() == (fovea::kHasBf16Dot ? 13 + 11 : 13) * 3);
  CHECK(v_in_panels.size() == (fovea::kHasBf16Dot ? 12 + 10 : 12) * 3);
  CHECK(homes.size() == (fovea::kHasBf16Dot ? 2 : 1) * 3 * 2 * 3);
  CHECK(mixed > kCases / 5);
  CHECK(k_in_mixed.size() == 13);
  CHECK(v_in_k > 10);
  CHECK(unequal > kCases / 4);
  CHECK(ragged_keys > 50);
}

TEST_CASE("attention over stored rows = the reference over what they mean", "[grid][storage]") {
  const index_t only = number("FOVEA_GRID_ONLY", -1),
                wanted = std::clamp<index_t>(number("FOVEA_GRID_CASES", kCases), 1, kCases);
  Seen seen;
  for (index_t n = 0; n < wanted; ++n) {
    const index_t chosen = only >= 0 ? only : n * kCases / wanted;
    const Case c = grid_case(chosen);
    INFO("case " << chosen << ": " << describe(c));
    CHECK(check(c, seen) == "");
    if (only >= 0) return;
  }
  // Roundings that cancel use less than the whole budget; a comparison of something with itself would use none of it.
  INFO("worst elements: " << seen.f32_panels << " and " << seen.bf16_panels << " budgets");
  CHECK(seen.f32_panels > 0.02);
  CHECK((seen.bf16_panels > 0.1 || !fovea::kHasBf16Dot));
}
