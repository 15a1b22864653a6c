// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/block_local.hpp"

#include "fovea/reference/block_local.hpp"
#include "pattern_support.hpp"

namespace {

using namespace test;
using fovea::BlockLocal;

PatternCall call_with(const BlockLocal& blocks) {
  return [blocks](Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out,
                  const AttentionOptions& options) { return fovea::block_local_attention(q, k, v, out, blocks, options); };
}
PatternReference reference_with(const BlockLocal& p) {
  return [p](const Dense& x, const AttentionOptions& options, Tensor<double> out, View<double, 3> lse) {
    fovea::reference::block_local(x.q.view(), x.k.view(), x.v.view(), out, p.block, p.look_back, p.look_ahead, options, lse);
  };
}
Sees sees_with(const BlockLocal& p, bool causal) {
  return [p, causal](index_t, index_t, index_t pos, index_t key) {
    if (causal && key > pos) return false;
    // The first and the last key of the blocks around the query's.
    index_t begin = 0;
    while (begin > pos) begin -= p.block;
    while (begin + p.block <= pos) begin += p.block;
    return key >= begin - p.look_back * p.block && key < begin + (1 + p.look_ahead) * p.block;
  };
}

}   // namespace

TEST_CASE("block_local: against the reference", "[block_local]") {
  for (const BlockLocal& p : {BlockLocal{16, 0, 0}, BlockLocal{7, 1, 0}, BlockLocal{24, 1, 2}, BlockLocal{1, 0, 0}}) {
    for (const Causal causal : {Causal::none, Causal::bottom_right, Causal::top_left}) {
      AttentionOptions options;
      options.causal = causal;
      const std::string what = "block " + std::to_string(p.block) + ", causal " + name(causal);
      for (const auto& [len_q, len_k] : {std::pair<index_t, index_t>{50, 50}, {13, 61}, {1, 33}})
        check_pattern(call_with(p), reference_with(p), sees_with(p, causal != Causal::none),
                      Dense(300, 2, 4, 2, len_q, len_k, 8, 12), options, what);
    }
  }
}

TEST_CASE("block_local: ragged sequences, lengths, positions", "[block_local]") {
  const BlockLocal p{8, 1, 0};
  const std::vector<index_t> cu_q{0, 3, 3, 21}, cu_k{0, 17, 40, 75}, used{9, 30}, offsets{4, -2};
  AttentionOptions ragged;
  ragged.causal = Causal::bottom_right;
  ragged.cu_len_q = cu_q;
  ragged.cu_len_k = cu_k;
  const Dense packed(310, 1, 4, 2, 21, 75, 8, 8);
  CHECK(distance(run_pattern(call_with(p), packed, ragged), expect_seen(packed, ragged, sees_with(p, true))) <= 1);
  AttentionOptions lengths;
  lengths.len_k = used;
  lengths.q_offset = offsets;   // the first two rows of sequence 1 stand before key 0 and see nothing
  lengths.causal = Causal::top_left;
  check_pattern(call_with(p), reference_with(p), sees_with(p, true), Dense(311, 2, 4, 2, 5, 33, 8, 8), lengths, "lengths");
}

TEST_CASE("block_local: one block is dense, blocks of one are the values", "[block_local]") {
  const Dense x(320, 1, 2, 2, 37, 37, 8, 8);
  AttentionOptions options;
  const Expected dense = expect(x.q.view(), x.k.view(), x.v.view(), options);
  CHECK(distance(run_pattern(call_with({64, 0, 0}), x, options), dense) <= 1);
  CHECK(distance(run_pattern(call_with({5, 8, 8}), x, options), dense) <= 1);
  // A weight times a value times the weight's inverse: three roundings.
  const Result one = run_pattern(call_with({1, 0, 0}), x, options);
  for (std::size_t n = 0; n < one.out.data.size(); ++n)
    CHECK(std::abs(double{one.out.data[n]} - double{x.v.data[n]}) <= 3 * kUnit * std::abs(double{x.v.data[n]}));
}

TEST_CASE("block_local: chunks and decode are rows of the whole, the future leaves no trace", "[block_local]") {
  const Dense x(330, 1, 4, 2, 45, 45, 8, 8);
  for (const BlockLocal& p : {BlockLocal{16, 0, 0}, BlockLocal{12, 1, 0}}) {
    check_pattern_chunks(call_with(p), sees_with(p, true), x, {7, 16, 1, 1, 19, 1});
    AttentionOptions options;
    options.causal = Causal::top_left;
    check_pattern_future(call_with(p), x, 20, options);
  }
}

TEST_CASE("block_local: blocks that several lists share", "[block_local]") {
  for (const BlockLocal& p : {BlockLocal{192, 0, 0}, BlockLocal{160, 1, 0}, BlockLocal{131, 1, 0}}) {
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    check_pattern(call_with(p), reference_with(p), sees_with(p, true), Dense(336, 1, 2, 1, 300, 430, 8, 8), options,
                  "block " + std::to_string(p.block));
  }
}

TEST_CASE("block_local: a poisoned workspace of the caller", "[block_local]") {
  const Dense x(335, 1, 2, 1, 20, 40, 8, 8);
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  const Result want = run_pattern(call_with({16, 1, 0}), x, options);
  PoisonedBytes workspace(std::size_t{1} << 20);
  options.workspace = workspace.bytes();
  CHECK(same_bits(want, run_pattern(call_with({16, 1, 0}), x, options)));
  CHECK(workspace.guards_intact());
}

TEST_CASE("block_local: refusals write nothing", "[block_local][errors]") {
  const Dense x(340, 1, 2, 2, 5, 8, 8, 6);
  Result r = unwritten(x.q.view(), x.v.view());
  const auto with = [&](const BlockLocal& p, AttentionOptions options = {}) {
    options.lse = r.lse_view();
    return [&r, &x, p, options] {
      return fovea::block_local_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), p, options);
    };
  };
  check_refused(r, "block 0", with({0, 0, 0}));
  check_refused(r, "look_back -1", with({4, -1, 0}));
  check_refused(r, "look_ahead -2", with({4, 0, -2}));
  const std::vector<index_t> too_long{9};
  AttentionOptions options;
  options.len_k = too_long;
  check_refused(r, "len_k[0] = 9", with({4, 0, 0}, options));
}
