// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/sparse_transformer.hpp"

#include <set>

#include "fovea/reference/sparse_transformer.hpp"
#include "pattern_support.hpp"

namespace {

using namespace test;
using fovea::SparsePattern;
using fovea::SparseTransformer;

SparseTransformer local(index_t bandwidth) {
  SparseTransformer p;
  p.pattern = SparsePattern::local;
  p.bandwidth = bandwidth;
  return p;
}
SparseTransformer strided(index_t stride) {
  SparseTransformer p;
  p.pattern = SparsePattern::strided;
  p.stride = stride;
  return p;
}
SparseTransformer fixed(index_t block, index_t stride_blocks, index_t vertsize, index_t num_verts) {
  SparseTransformer p;
  p.pattern = SparsePattern::fixed;
  p.block = block;
  p.stride_blocks = stride_blocks;
  p.vertsize = vertsize;
  p.num_verts = num_verts;
  return p;
}

PatternCall call_with(const SparseTransformer& p) {
  return [p](Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out,
             const AttentionOptions& options) { return fovea::sparse_transformer_attention(q, k, v, out, p, options); };
}
PatternReference reference_with(const SparseTransformer& p) {
  return [p](const Dense& x, const AttentionOptions& options, Tensor<double> out, View<double, 3> lse) {
    using namespace fovea::reference;
    if (p.pattern == SparsePattern::local) {
      sparse_transformer_local(x.q.view(), x.k.view(), x.v.view(), out, p.bandwidth, options, lse);
    } else if (p.pattern == SparsePattern::strided) {
      sparse_transformer_strided(x.q.view(), x.k.view(), x.v.view(), out, p.stride, options, lse);
    } else {
      sparse_transformer_fixed(x.q.view(), x.k.view(), x.v.view(), out, p.block, p.stride_blocks, p.vertsize, p.num_verts,
                               options, lse);
    }
  };
}
Sees sees_with(const SparseTransformer& p) {
  return [p](index_t, index_t head, index_t pos, index_t key) {
    const index_t back = pos - key;
    if (back < 0) return false;
    if (p.pattern == SparsePattern::local) return back <= p.bandwidth - 1;
    if (p.pattern == SparsePattern::strided) return back == back / p.stride * p.stride;
    const index_t tokens = p.block * p.stride_blocks, summary = p.vertsize * p.block;
    const index_t stride_begin = pos / tokens * tokens, end_of_summary = tokens - head % p.num_verts * summary;
    const index_t place = key - key / tokens * tokens;
    return key >= stride_begin || (place < end_of_summary && place >= end_of_summary - summary);
  };
}

const std::vector<SparseTransformer>& patterns() {
  static const std::vector<SparseTransformer> all{local(1),          local(9),          strided(1),
                                                  strided(5),        strided(64),       fixed(4, 3, 1, 1),
                                                  fixed(8, 2, 1, 2), fixed(5, 4, 2, 2), fixed(1, 1, 1, 1)};
  return all;
}

}   // namespace

TEST_CASE("sparse_transformer: against the reference", "[sparse_transformer]") {
  for (std::size_t n = 0; n < patterns().size(); ++n) {
    const SparseTransformer& p = patterns()[n];
    for (const Causal causal : {Causal::bottom_right, Causal::top_left}) {
      AttentionOptions options;
      options.causal = causal;
      for (const auto& [len_q, len_k] : {std::pair<index_t, index_t>{47, 47}, {13, 61}, {1, 33}})
        check_pattern(call_with(p), reference_with(p), sees_with(p), Dense(400 + n, 2, 4, 2, len_q, len_k, 8, 12), options,
                      "pattern " + std::to_string(n) + ", causal " + name(causal));
    }
  }
}

TEST_CASE("sparse_transformer: strides that several lists share", "[sparse_transformer]") {
  const SparseTransformer p = fixed(32, 6, 1, 2);
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  check_pattern(call_with(p), reference_with(p), sees_with(p), Dense(415, 1, 2, 1, 300, 430, 8, 8), options, "stride 192");
}

TEST_CASE("sparse_transformer: positions, lengths, ragged sequences", "[sparse_transformer]") {
  const std::vector<index_t> used{9, 30}, offsets{4, -2}, cu_q{0, 3, 3, 21}, cu_k{0, 17, 40, 75};
  for (const SparseTransformer& p : {local(6), strided(4), fixed(4, 2, 1, 2)}) {
    AttentionOptions lengths;
    lengths.len_k = used;
    lengths.q_offset = offsets;   // the first two rows of sequence 1 stand before key 0 and see nothing
    lengths.causal = Causal::top_left;
    check_pattern(
        call_with(p), reference_with(p),
        [&](index_t b, index_t h, index_t pos, index_t key) { return pos >= 0 && sees_with(p)(b, h, pos, key); },
        Dense(420, 2, 4, 2, 5, 33, 8, 8), lengths, "lengths");

    const Dense packed(421, 1, 4, 2, 21, 75, 8, 8);
    AttentionOptions ragged;
    ragged.causal = Causal::bottom_right;
    ragged.cu_len_q = cu_q;
    ragged.cu_len_k = cu_k;
    const Result r = run_pattern(call_with(p), packed, ragged);
    std::vector<double> want(static_cast<std::size_t>(4 * 21 * 8)), lse(4 * 21);
    reference_with(p)(packed, ragged, fovea::bhsd(want.data(), 1, 4, 21, 8), {lse.data(), {1, 4, 21}, {84, 21, 1}});
    const Expected budget = expect_seen(packed, ragged, sees_with(p));
    CHECK(distance(r, budget) <= 1);
    for (std::size_t n = 0; n < lse.size(); ++n) CHECK(in_budgets(lse[n], budget.lse[n], 1e-12) <= 1);
    for (std::size_t n = 0; n < want.size(); ++n) CHECK(in_budgets(want[n], budget.out[n], 1e-12) <= 1);
  }
}

TEST_CASE("sparse_transformer: identities", "[sparse_transformer]") {
  const Dense x(430, 1, 4, 2, 40, 40, 8, 8);
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  const Expected dense = expect(x.q.view(), x.k.view(), x.v.view(), options);
  for (const SparseTransformer& p : {local(40), strided(1), fixed(8, 5, 1, 1), fixed(8, 2, 2, 1)})
    CHECK(distance(run_pattern(call_with(p), x, options), dense) <= 1);
  // Not causal in the options is causal all the same.
  CHECK(distance(run_pattern(call_with(strided(1)), x, {}), dense) <= 1);

  // strided(s) and local(s) in two hops reach all positions: the sum of the first hop's sets over the second's.
  constexpr index_t kLen = 40, kStride = 7;
  const Values one(1, 1, kLen, 1, 1.f), weights = identity_values(1, 1, kLen);
  const Result near = run_pattern(call_with(local(kStride)), one.view(), one.view(), weights.view(), options);
  const Result far = run_pattern(call_with(strided(kStride)), one.view(), one.view(), weights.view(), options);
  for (index_t t = 0; t < kLen; ++t) {
    std::set<index_t> reached;
    for (index_t m = 0; m < kLen; ++m) {
      for (index_t s = 0; far.at(0, 0, t, m) > 0 && s < kLen; ++s) {
        if (near.at(0, 0, m, s) > 0) reached.insert(s);
      }
    }
    CHECK(static_cast<index_t>(reached.size()) == t + 1);
  }
}

TEST_CASE("sparse_transformer: chunks and decode are rows of the whole, the future leaves no trace",
          "[sparse_transformer]") {
  const Dense x(440, 1, 4, 2, 45, 45, 8, 8);
  for (const SparseTransformer& p : patterns()) {
    check_pattern_chunks(call_with(p), sees_with(p), x, {7, 16, 1, 1, 19, 1});
    if (p.pattern == SparsePattern::local && p.bandwidth == 1) continue;
    check_pattern_future(call_with(p), x, 20, {});
  }
}

TEST_CASE("sparse_transformer: strides of any layout", "[sparse_transformer]") {
  const Dense x(450, 2, 4, 2, 23, 23, 8, 8);
  const Result want = run_pattern(call_with(strided(4)), x, {});
  // Token-major inputs and outputs: between two tokens of a class lie those of other heads and classes.
  const auto token_major = [](const Values& from, std::vector<float>& data) {
    data.resize(from.data.size());
    const Tensor<float> to = fovea::bshd(data.data(), from.batch, from.len, from.heads, from.dim);
    for (index_t b = 0; b < from.batch; ++b) {
      for (index_t h = 0; h < from.heads; ++h) {
        for (index_t i = 0; i < from.len; ++i) {
          for (index_t d = 0; d < from.dim; ++d) to(b, h, i, d) = from.view()(b, h, i, d);
        }
      }
    }
    return Tensor<const float>(to);
  };
  std::vector<float> q, k, v, out(want.out.data.size(), canary());
  const Tensor<float> to = fovea::bshd(out.data(), 2, 23, 4, 8);
  REQUIRE(fovea::sparse_transformer_attention(token_major(x.q, q), token_major(x.k, k), token_major(x.v, v), to, strided(4))
              .ok());
  bool same = true;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 0; i < 23; ++i) {
        for (index_t d = 0; d < 8; ++d) same = same && to(b, h, i, d) == want.at(b, h, i, d);
      }
    }
  }
  CHECK(same);
}

TEST_CASE("sparse_transformer: refusals write nothing", "[sparse_transformer][errors]") {
  const Dense x(460, 1, 2, 2, 5, 8, 8, 6);
  Result r = unwritten(x.q.view(), x.v.view());
  const auto with = [&](const SparseTransformer& p, AttentionOptions options = {}) {
    options.lse = r.lse_view();
    return [&r, &x, p, options] {
      return fovea::sparse_transformer_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), p, options);
    };
  };
  check_refused(r, "bandwidth 0", with(local(0)));
  check_refused(r, "stride -3", with(strided(-3)));
  check_refused(r, "num_verts 3 times vertsize 2", with(fixed(4, 5, 2, 3)));
  AttentionOptions window;
  window.window.left = 3;
  check_refused(r, "the window 3", with(strided(2), window));
  AttentionOptions capped;
  capped.softcap = 3.f;
  check_refused(r, "softcap", with(local(4), capped));
  const std::vector<index_t> too_long{9};
  AttentionOptions lengths;
  lengths.len_k = too_long;
  for (const SparseTransformer& p : {local(4), strided(4), fixed(4, 2, 1, 1)})
    check_refused(r, "len_k[0] = 9", with(p, lengths));
  SparseTransformer wrong;
  wrong.pattern = static_cast<SparsePattern>(7);
  check_refused(r, "pattern is 7", with(wrong));
  fovea::Kv paged = fovea::dense_kv(x.k.view(), x.v.view());
  paged.home = fovea::Home::paged;
  check_refused(r, "needs contiguous", [&] {
    return fovea::sparse_transformer_attention<fovea::Formats<fovea::Format::f32>>(x.q.view(), paged, r.out.view(),
                                                                                   strided(2));
  });
}
