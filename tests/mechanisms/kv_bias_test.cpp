// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/kv_bias.hpp"

#include "around_softmax.hpp"
#include "fovea/reference/kv_bias.hpp"

namespace {

using namespace test;

struct Kind {
  int key_heads;   // 0: one for all, 1: per kv head, 2: per query head
  bool with_value;
};

// The learned rows as [1, head, 1, dim], and as the views of the call.
struct Learned {
  Values key, value;
  bool with_value;
  Learned(const Dense& x, const Kind& kind)
      : key(random_values(121, 1, heads(x, kind), 1, x.q.dim)),
        value(random_values(122, 1, heads(x, kind), 1, x.v.dim)),
        with_value(kind.with_value) {}
  static index_t heads(const Dense& x, const Kind& kind) {
    return kind.key_heads == 0 ? 1 : kind.key_heads == 1 ? x.k.heads : x.q.heads;
  }
  fovea::KvBias bias() const {
    fovea::KvBias b{{key.data.data(), {key.heads, key.dim}, {key.dim, 1}}, {}};
    if (with_value) b.value = {value.data.data(), {value.heads, value.dim}, {value.dim, 1}};
    return b;
  }
};

Run run_with(const Kind& kind) {
  return [kind](const Dense& x, const AttentionOptions& options) {
    const Learned learned(x, kind);
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions with_lse = options;
    with_lse.lse = r.lse_view();
    const fovea::Status status =
        fovea::kv_bias_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), learned.bias(), with_lse);
    INFO(status.message());
    REQUIRE(status.ok());
    return r;
  };
}

// The row is (1 - w) of the bare one and w of the learned value. Errors of the logit and of the bare LSE move the share, w
// is made from the LSE of both.
Ask ask_with(const Kind& kind) {
  return [kind](const Dense& x, const AttentionOptions& options) {
    const Learned learned(x, kind);
    const fovea::KvBias bias = learned.bias();
    const Expected bare = expect(x.q.view(), x.k.view(), x.v.view(), options);
    Expected e = bare;
    fovea::reference::kv_bias(x.q.view(), x.k.view(), x.v.view(),
                              fovea::bhsd(e.out.data(), x.q.batch, x.q.heads, x.q.len, x.v.dim), bias.key, bias.value,
                              options, {e.lse.data(), {x.q.batch, x.q.heads, x.q.len}, {x.q.heads * x.q.len, x.q.len, 1}});
    const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(x.q.dim));
    for (std::size_t row = 0; row < e.lse.size(); ++row) {
      const index_t i = static_cast<index_t>(row) % x.q.len, h = static_cast<index_t>(row) / x.q.len % x.q.heads,
                    b = static_cast<index_t>(row) / x.q.len / x.q.heads, head = h * learned.key.heads / x.q.heads;
      double logit = 0, dots = 0;
      for (index_t d = 0; d < x.q.dim; ++d) {
        const double product = scale * double{x.q.view()(b, h, i, d)} * double{learned.key.view()(0, head, 0, d)};
        logit += product;
        dots += std::abs(product);
      }
      const double logit_error = kUnit * ((static_cast<double>(x.q.dim) + 6) * dots + 4 * std::abs(logit));
      const double bare_error = std::isfinite(bare.lse[row]) ? bare.lse_error[row] : 0;
      const double w = std::exp(logit - e.lse[row]), share_error = w * (1 - w) * (logit_error + bare_error) + 8 * kUnit;
      e.lse_error[row] =
          std::max(logit_error, bare_error) + kUnit * (kLogUnits * 16 + 4 * (std::abs(logit) + std::abs(e.lse[row])));
      const double w_error =
          e.lse_error[row] + logit_error + kUnit * (4 * (std::abs(logit) + std::abs(e.lse[row])) + kExpUnits + 4);
      for (index_t d = 0; d < x.v.dim; ++d) {
        const std::size_t n = row * static_cast<std::size_t>(x.v.dim) + static_cast<std::size_t>(d);
        const double value = kind.with_value ? std::abs(double{learned.value.view()(0, head, 0, d)}) : 0;
        e.out_error[n] =
            (1 - w) * bare.out_error[n] + share_error * (std::abs(bare.out[n]) + value) + w * value * w_error + 1e-30;
      }
    }
    return e;
  };
}

}   // namespace

TEST_CASE("kv_bias: against the reference", "[kv_bias]") {
  for (const Kind kind : {Kind{1, true}, Kind{2, false}})
    check_around_softmax(run_with(kind), ask_with(kind), {{4, 2}, {1, 1}, {6, 2}});
}

TEST_CASE("kv_bias: shared, per kv head and per query head", "[kv_bias]") {
  const Dense x(123, 2, 4, 2, 17, 40, 16, 20);
  for (const int heads : {0, 1, 2}) {
    for (const bool with_value : {false, true})
      check_case(run_with({heads, with_value}), ask_with({heads, with_value}), x, {});
  }
}

TEST_CASE("kv_bias: one more key before the others is the same", "[kv_bias]") {
  const Dense x(124, 2, 4, 2, 17, 40, 16, 20);
  for (const bool with_value : {false, true}) {
    const Kind kind{1, with_value};
    const Learned learned(x, kind);
    Dense longer(125, 2, 4, 2, 17, 41, 16, 20);
    longer.q = x.q;
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 2; ++h) {
        for (index_t j = 0; j < 41; ++j) {
          for (index_t d = 0; d < 16; ++d)
            longer.k.view()(b, h, j, d) = j == 0 ? learned.key.view()(0, h, 0, d) : x.k.view()(b, h, j - 1, d);
          for (index_t d = 0; d < 20; ++d)
            longer.v.view()(b, h, j, d) = j > 0        ? x.v.view()(b, h, j - 1, d)
                                          : with_value ? learned.value.view()(0, h, 0, d)
                                                       : 0.f;
        }
      }
    }
    const Expected e = expect(longer.q.view(), longer.k.view(), longer.v.view(), {}), own = ask_with(kind)(x, {});
    const Result joined = attend(longer), r = run_with(kind)(x, {});
    for (std::size_t n = 0; n < r.out.data.size(); ++n)
      CHECK(std::abs(double{r.out.data[n]} - double{joined.out.data[n]}) <= e.out_error[n] + own.out_error[n]);
    for (std::size_t n = 0; n < r.lse.size(); ++n)
      CHECK(std::abs(double{r.lse[n]} - double{joined.lse[n]}) <= e.lse_error[n] + own.lse_error[n]);
  }
}

TEST_CASE("kv_bias: golden sinks", "[kv_bias][golden]") {
  // Scores 1, 0, -1 and a learned key of logit 2 or 0: the values are unit vectors, so that rows are weights.
  const float one = 1.f, scores[] = {1.f, 0.f, -1.f};
  Values v = identity_values(1, 1, 3), out(1, 1, 1, 3);
  AttentionOptions options;
  options.scale = 1.f;
  for (const auto& [logit, want] : {std::pair{2.f, std::array{0.2368828, 0.0871443, 0.0320586}},
                                    std::pair{0.f, std::array{0.5344466, 0.1966119, 0.0723295}}}) {
    const fovea::KvBias bias{{&logit, {1, 1}, {1, 1}}, {}};
    REQUIRE(fovea::kv_bias_attention(fovea::bhsd(&one, 1, 1, 1, 1), fovea::bhsd(scores, 1, 1, 3, 1), std::as_const(v).view(),
                                     out.view(), bias, options)
                .ok());
    for (std::size_t d = 0; d < 3; ++d) CHECK(out.data[d] == Catch::Approx(want[d]).margin(1e-7));
  }
}

TEST_CASE("kv_bias: rows that see nothing else, and keys that weigh nothing", "[kv_bias][empty]") {
  const Dense x(126, 1, 2, 1, 3, 5, 8, 6);
  const Kind kind{1, true};
  const Learned learned(x, kind);
  AttentionOptions options;
  const std::vector<index_t> before{-3};
  options.causal = Causal::top_left;
  options.q_offset = before;
  const Result r = run_with(kind)(x, options);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 3; ++i) {
      for (index_t d = 0; d < 6; ++d)
        CHECK(r.at(0, h, i, d) == Catch::Approx(learned.value.view()(0, 0, 0, d)).epsilon(1e-6));
    }
  }
  // A learned key of -inf is none.
  const Values q(1, 2, 3, 8, 1.f);
  std::vector<float> key(8, -kInfinity);
  Result a = unwritten(q.view(), x.v.view());
  AttentionOptions with_lse;
  with_lse.lse = a.lse_view();
  const fovea::KvBias none{{key.data(), {1, 8}, {8, 1}}, learned.bias().value};
  REQUIRE(fovea::kv_bias_attention(q.view(), x.k.view(), x.v.view(), a.out.view(), none, with_lse).ok());
  CHECK(same_bits(a, attend(q.view(), x.k.view(), x.v.view())));
}

TEST_CASE("kv_bias: 16-bit queries", "[kv_bias]") {
  Dense x(127, 1, 4, 2, 9, 20, 21, 6);
  std::vector<fovea::bf16> q(x.q.data.size());
  for (std::size_t n = 0; n < q.size(); ++n) {
    q[n] = fovea::convert<fovea::bf16>(x.q.data[n]);
    x.q.data[n] = fovea::convert<float>(q[n]);
  }
  const Kind kind{2, true};
  const Learned learned(x, kind);
  const Result want = run_with(kind)(x, {});
  Result r = unwritten(x.q.view(), x.v.view());
  AttentionOptions with_lse;
  with_lse.lse = r.lse_view();
  REQUIRE(fovea::kv_bias_attention(fovea::bhsd(q.data(), 1, 4, 9, 21), x.k.view(), x.v.view(), r.out.view(), learned.bias(),
                                   with_lse)
              .ok());
  CHECK(same_bits(r, want));
}

TEST_CASE("kv_bias: K and V in 16 bits", "[kv_bias]") {
  const Dense x(129, 1, 4, 2, 9, 20, 16, 12);
  std::vector<fovea::bf16> k(x.k.data.size()), v(x.v.data.size());
  for (std::size_t n = 0; n < k.size(); ++n) k[n] = fovea::convert<fovea::bf16>(x.k.data[n]);
  for (std::size_t n = 0; n < v.size(); ++n) v[n] = fovea::convert<fovea::bf16>(x.v.data[n]);
  Dense rounded = x;
  for (std::size_t n = 0; n < k.size(); ++n) rounded.k.data[n] = fovea::convert<float>(k[n]);
  for (std::size_t n = 0; n < v.size(); ++n) rounded.v.data[n] = fovea::convert<float>(v[n]);
  const Kind kind{1, true};
  const Learned learned(x, kind);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions with_lse = options;
    with_lse.lse = r.lse_view();
    const fovea::Kv kv = fovea::dense_kv(fovea::bhsd(k.data(), 1, 2, 20, 16), fovea::bhsd(v.data(), 1, 2, 20, 12));
    REQUIRE(
        fovea::kv_bias_attention<fovea::Formats<fovea::Format::bf16>>(x.q.view(), kv, r.out.view(), learned.bias(), with_lse)
            .ok());
    CHECK(worst_of(r, ask_with(kind)(rounded, options)) <= 1);
  }
}

TEST_CASE("kv_bias: refusals write nothing", "[kv_bias][errors]") {
  const Dense x(128, 1, 4, 2, 5, 8, 8, 6);
  Values out(1, 4, 5, 6, canary());
  std::vector<float> rows(64, 1.f), sink(4, 0.f);
  const auto refused = [&](const fovea::KvBias& bias, const char* words, const AttentionOptions& options = {}) {
    const fovea::Status status = fovea::kv_bias_attention(x.q.view(), x.k.view(), x.v.view(), out.view(), bias, options);
    INFO(status.message());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  const View<const float, 2> good{rows.data(), {1, 8}, {8, 1}};
  refused({{rows.data(), {3, 8}, {8, 1}}, {}}, "learned key is [3, 8], must be [1 | 2 | 4, 8]");
  refused({{nullptr, {1, 8}, {8, 1}}, {}}, "key has null data");
  refused({good, {rows.data(), {1, 8}, {8, 1}}}, "learned value is [1, 8], must be [1 | 2 | 4, 6]");
  refused({good, {out.data.data(), {1, 6}, {6, 1}}}, "overlaps the learned value");
  AttentionOptions with_sink;
  with_sink.sink = sink;
  refused({good, {}}, "sink", with_sink);
  AttentionOptions capped;
  capped.softcap = 3.f;
  refused({good, {}}, "softcap", capped);
}
