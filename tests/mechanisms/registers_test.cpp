// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/registers.hpp"

#include "around_softmax.hpp"
#include "fovea/reference/registers.hpp"

namespace {

using namespace test;

struct Kind {
  index_t count;
  bool per_sequence, sink;
};

index_t sequences(const Dense& x, const AttentionOptions& o) {
  return o.cu_len_q.empty() ? x.q.batch : static_cast<index_t>(o.cu_len_q.size()) - 1;
}
// K and V of the registers.
struct Tokens {
  Values k, v;
  Tokens(const Dense& x, const AttentionOptions& o, const Kind& kind)
      : k(random_values(131, kind.per_sequence ? sequences(x, o) : 1, x.k.heads, kind.count, x.k.dim)),
        v(random_values(132, k.batch, x.k.heads, kind.count, x.v.dim)) {}
  fovea::RegisterTokens tokens() const { return {k.view(), v.view()}; }
};
const std::vector<float>& sinks() {
  static const std::vector<float> all(12, 0.75f);
  return all;
}
AttentionOptions with_sink(const Dense& x, AttentionOptions options, const Kind& kind) {
  if (kind.sink) options.sink = std::span(sinks()).first(static_cast<std::size_t>(x.q.heads));
  return options;
}

Run run_with(const Kind& kind) {
  return [kind](const Dense& x, const AttentionOptions& options) {
    const Tokens tokens(x, options, kind);
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions all = with_sink(x, options, kind);
    all.lse = r.lse_view();
    const fovea::Status status =
        fovea::register_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), tokens.tokens(), all);
    INFO(status.message());
    REQUIRE(status.ok());
    return r;
  };
}

// The row is the registers' part and the sequence's, in the shares of their LSE; errors of these move weight between the
// parts.
Ask ask_with(const Kind& kind) {
  return [kind](const Dense& x, const AttentionOptions& options) {
    const Tokens tokens(x, options, kind);
    Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
    const Expected own = e;
    fovea::reference::registers(x.q.view(), x.k.view(), x.v.view(),
                                fovea::bhsd(e.out.data(), x.q.batch, x.q.heads, x.q.len, x.v.dim), tokens.k.view(),
                                tokens.v.view(), with_sink(x, options, kind),
                                {e.lse.data(), {x.q.batch, x.q.heads, x.q.len}, {x.q.heads * x.q.len, x.q.len, 1}});
    // Every sequence with registers of its own, as a ragged or a padded batch.
    AttentionOptions first;
    first.scale = options.scale;
    first.cu_len_q = options.cu_len_q;
    first = with_sink(x, first, kind);
    Expected part = e;
    if (options.cu_len_q.empty()) {
      Values k(x.q.batch, x.k.heads, kind.count, x.k.dim), v(x.q.batch, x.k.heads, kind.count, x.v.dim);
      for (index_t b = 0; b < x.q.batch; ++b) {
        const auto copy = [&](const Values& from, Values& to) {
          const index_t count = from.heads * from.len * from.dim, entry = from.batch == 1 ? 0 : b;
          std::copy_n(from.data.begin() + entry * count, count, to.data.begin() + b * count);
        };
        copy(tokens.k, k), copy(tokens.v, v);
      }
      part = expect(x.q.view(), std::as_const(k).view(), std::as_const(v).view(), first);
    } else {
      std::vector<index_t> cu(1, 0);
      Values k(1, x.k.heads, kind.count * sequences(x, options), x.k.dim), v(1, x.k.heads, k.len, x.v.dim);
      for (index_t s = 0; s < sequences(x, options); ++s) {
        cu.push_back(kind.count * (s + 1));
        for (index_t h = 0; h < x.k.heads; ++h) {
          for (index_t r = 0; r < kind.count; ++r) {
            const index_t entry = kind.per_sequence ? s : 0;
            for (index_t d = 0; d < x.k.dim; ++d) k.view()(0, h, s * kind.count + r, d) = tokens.k.view()(entry, h, r, d);
            for (index_t d = 0; d < x.v.dim; ++d) v.view()(0, h, s * kind.count + r, d) = tokens.v.view()(entry, h, r, d);
          }
        }
      }
      first.cu_len_k = cu;
      part = expect(x.q.view(), std::as_const(k).view(), std::as_const(v).view(), first);
    }
    for (std::size_t row = 0; row < e.lse.size(); ++row) {
      const double share = std::exp(part.lse[row] - e.lse[row]),
                   own_error = std::isfinite(own.lse[row]) ? own.lse_error[row] : 0;
      const double moved = share * (1 - share) * (part.lse_error[row] + own_error + kUnit * 2) + 4 * kUnit;
      e.lse_error[row] = std::max(part.lse_error[row], own_error) + kUnit * (2 * std::abs(e.lse[row]) + 4);
      for (std::size_t d = 0; d < static_cast<std::size_t>(x.v.dim); ++d) {
        const std::size_t n = row * static_cast<std::size_t>(x.v.dim) + d;
        e.out_error[n] = share * part.out_error[n] + (1 - share) * own.out_error[n] +
                         moved * (std::abs(part.out[n]) + std::abs(own.out[n])) + 1e-30;
      }
    }
    return e;
  };
}

}   // namespace

TEST_CASE("registers: against the reference", "[registers]") {
  for (const Kind kind : {Kind{4, false, false}, Kind{33, true, true}})
    check_around_softmax(run_with(kind), ask_with(kind), {{4, 2}, {1, 1}, {6, 2}});
}

TEST_CASE("registers: more keys before the others are the same", "[registers]") {
  const Dense x(133, 2, 4, 2, 17, 40, 16, 20);
  const Kind kind{3, true, false};
  const Tokens tokens(x, {}, kind);
  Dense longer(134, 2, 4, 2, 17, 43, 16, 20);
  longer.q = x.q;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 2; ++h) {
      for (index_t j = 0; j < 43; ++j) {
        for (index_t d = 0; d < 16; ++d)
          longer.k.view()(b, h, j, d) = j < 3 ? tokens.k.view()(b, h, j, d) : x.k.view()(b, h, j - 3, d);
        for (index_t d = 0; d < 20; ++d)
          longer.v.view()(b, h, j, d) = j < 3 ? tokens.v.view()(b, h, j, d) : x.v.view()(b, h, j - 3, d);
      }
    }
  }
  // Causal over the sequence, and a window that has long left the registers behind.
  for (const index_t left : {-1, 5}) {
    Dense masked = longer;
    std::vector<std::uint8_t> keep(17 * 43);
    for (index_t i = 0; i < 17; ++i) {
      const index_t pos = i + 40 - 17;
      for (index_t j = 0; j < 43; ++j)
        keep[static_cast<std::size_t>(i * 43 + j)] = j < 3 || (j - 3 <= pos && (left < 0 || pos - (j - 3) <= left));
    }
    AttentionOptions joined;
    joined.keep = {keep.data(), {1, 1, 17, 43}, {17 * 43, 17 * 43, 43, 1}};
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    options.window.left = left;
    const Expected e = expect(masked.q.view(), masked.k.view(), masked.v.view(), joined), own = ask_with(kind)(x, options);
    const Result want = attend(masked, joined), r = run_with(kind)(x, options);
    for (std::size_t n = 0; n < r.out.data.size(); ++n)
      CHECK(std::abs(double{r.out.data[n]} - double{want.out.data[n]}) <= e.out_error[n] + own.out_error[n]);
    for (std::size_t n = 0; n < r.lse.size(); ++n)
      CHECK(std::abs(double{r.lse[n]} - double{want.lse[n]}) <= e.lse_error[n] + own.lse_error[n]);
  }
}

TEST_CASE("registers: golden sinks", "[registers][golden]") {
  const float one = 1.f, scores[] = {1.f, 0.f, -1.f};
  const Values v = identity_values(1, 1, 3), zero(1, 1, 1, 3);
  Values out(1, 1, 1, 3), lse(1, 1, 1, 1);
  AttentionOptions options;
  options.scale = 1.f;
  options.lse = {lse.data.data(), {1, 1, 1}, {1, 1, 1}};
  for (const auto& [logit, want] : {std::pair{2.f, std::array{0.2368828, 0.0871443, 0.0320586}},
                                    std::pair{0.f, std::array{0.5344466, 0.1966119, 0.0723295}}}) {
    const fovea::RegisterTokens tokens{fovea::bhsd(&logit, 1, 1, 1, 1), zero.view()};
    REQUIRE(fovea::register_attention(fovea::bhsd(&one, 1, 1, 1, 1), fovea::bhsd(scores, 1, 1, 3, 1), v.view(), out.view(),
                                      tokens, options)
                .ok());
    for (std::size_t d = 0; d < 3; ++d) CHECK(out.data[d] == Catch::Approx(want[d]).margin(1e-7));
    CHECK(lse.data[0] == Catch::Approx(std::log(std::exp(1.4076060) + std::exp(double{logit}))).margin(1e-6));
  }
}

TEST_CASE("registers: in front of a paged cache", "[registers]") {
  constexpr index_t kPage = 8, kPages = 6;
  const Dense x(136, 2, 4, 2, 3, kPage * kPages / 2, 16, 16);
  const std::vector<std::int32_t> table{4, 0, 2, 5, 3, 1};   // [sequence, page]
  Values k(kPages, 2, kPage, 16), v(kPages, 2, kPage, 16);
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 2; ++h) {
      for (index_t j = 0; j < x.k.len; ++j) {
        const index_t page = table[static_cast<std::size_t>(b * 3 + j / kPage)];
        for (index_t d = 0; d < 16; ++d) {
          k.view()(page, h, j % kPage, d) = x.k.view()(b, h, j, d);
          v.view()(page, h, j % kPage, d) = x.v.view()(b, h, j, d);
        }
      }
    }
  }
  fovea::Kv paged = fovea::dense_kv(std::as_const(k).view(), std::as_const(v).view());
  paged.home = fovea::Home::paged;
  paged.block_table = {table.data(), {2, 3}, {3, 1}};
  const std::vector<index_t> used{19, 24};
  const Kind kind{4, false, false};
  AttentionOptions options;
  options.len_k = used;
  options.causal = Causal::bottom_right;
  for (const Regime regime : kRegimes) {
    options.regime = regime;
    const Result want = run_with(kind)(x, options);
    const Tokens tokens(x, options, kind);
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions with_lse = options;
    with_lse.lse = r.lse_view();
    REQUIRE(fovea::register_attention<fovea::Formats<fovea::Format::f32>>(x.q.view(), paged, r.out.view(), tokens.tokens(),
                                                                          with_lse)
                .ok());
    CHECK(same_bits(r, want));
  }
}

TEST_CASE("registers: refusals write nothing", "[registers][errors]") {
  const Dense x(135, 2, 4, 2, 5, 8, 8, 6);
  const Tokens good(x, {}, {4, false, false});
  Result r = unwritten(x.q.view(), x.v.view());
  const auto refused = [&](const fovea::RegisterTokens& tokens, const char* words, AttentionOptions options = {},
                           bool lse = true) {
    if (lse) options.lse = r.lse_view();
    const fovea::Status status =
        fovea::register_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), tokens, options);
    INFO(status.message());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(r.out.data.begin(), r.out.data.end(), is_canary));
    CHECK(std::all_of(r.lse.begin(), r.lse.end(), is_canary));
  };
  refused(good.tokens(), "needs options.lse", {}, false);
  refused({only_head(good.k.view(), 0), only_head(good.v.view(), 0)}, "registers are k [1, 1, 4, 8]");
  refused({only_pos(good.k.view(), 0, 0), only_pos(good.v.view(), 0, 0)}, "at least 1");
  refused({good.k.view(), good.k.view()}, "values of dim 8, the sequence of 6");
  AttentionOptions capped;
  capped.softcap = 3.f;
  refused(good.tokens(), "softcap", capped);
  const std::vector<index_t> too_long{9, 8};
  AttentionOptions lengths;
  lengths.len_k = too_long;
  refused(good.tokens(), "len_k[0] = 9", lengths);
  // The call over the sequence needs more than the one over the registers.
  const Dense decode(137, 1, 1, 1, 1, 3000, 8, 6);
  Result one = unwritten(decode.q.view(), decode.v.view());
  const Tokens few(decode, {}, {4, false, false});
  AttentionOptions tight;
  tight.lse = one.lse_view();
  fovea::Plan plan;
  REQUIRE(fovea::make_plan(plan, {1, 1, 1, 1, 3000, 8, 6}, {}, fovea::variant()).ok());
  std::vector<std::byte> bytes(fovea::workspace_bytes(plan) - 1);
  tight.workspace = bytes;
  const fovea::Status status =
      fovea::register_attention(decode.q.view(), decode.k.view(), decode.v.view(), one.out.view(), few.tokens(), tight);
  INFO(status.message());
  CHECK(status.code() == fovea::Code::workspace_too_small);
  CHECK(std::all_of(one.out.data.begin(), one.out.data.end(), is_canary));
  const fovea::Status other = fovea::register_attention<fovea::Formats<fovea::Format::bf16>>(
      x.q.view(), fovea::dense_kv(x.k.view(), x.v.view()), r.out.view(), good.tokens(), [&] {
        AttentionOptions o;
        o.lse = r.lse_view();
        return o;
      }());
  CHECK(other.code() == fovea::Code::unsupported);
  CHECK(std::all_of(r.out.data.begin(), r.out.data.end(), is_canary));
  refused({good.k.view(), fovea::bhsd<const float>(r.out.data.data(), 1, 2, 4, 6)}, "overlaps");
}
