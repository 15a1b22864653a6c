// SPDX-License-Identifier: Apache-2.0
// The promise of equal bits: an output row depends on its query, its visible keys, the options and the regime only.
#include <string>

#include "support/dense.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;

// Prefill and decode shapes with every option on somewhere; small enough to run 40 times each.
std::vector<Problem> problems() {
  std::vector<Problem> all;
  const auto add = [&](auto change) {
    Problem p;
    p.seed = 100 + all.size();
    p.q_heads = 4, p.kv_heads = 2, p.dim_qk = p.dim_v = 32;
    change(p);
    for (const Regime regime : {Regime::automatic, Regime::prefill, Regime::decode, Regime::wide_decode}) {
      p.regime = regime;
      all.push_back(p);
    }
  };
  add([](Problem& p) { p.len_q = {150, 150}, p.stored_k = {150, 150}, p.causal = Causal::top_left; });
  add([](Problem& p) { p.len_q = {1, 1, 1}, p.stored_k = {1500, 1500, 1500}, p.len_k = {1500, 600, 7}; });
  add([](Problem& p) {
    p.is_ragged = true, p.len_q = {1, 0, 70, 33, 2}, p.stored_k = {900, 5, 70, 0, 300}, p.causal = Causal::bottom_right;
    p.sink = true, p.layout = Layout::bshd;
  });
  add([](Problem& p) {
    p.len_q = {40}, p.stored_k = {700}, p.softcap = 5, p.alibi = true, p.bias = Share::full, p.bias_masks = true;
    p.dim_qk = 19, p.dim_v = 45, p.layout = Layout::padded;
  });
  add([](Problem& p) {
    p.len_q = {5}, p.stored_k = {2200}, p.keep = Share::heads, p.window = {1200, 3}, p.q_offset = {2100}, p.q_spread = 6;
    p.q_heads = 6, p.kv_heads = 1;
  });
  return all;
}

}  // namespace

TEST_CASE("lanes and executors change no bit", "[bits]") {
  for (const Problem& p : problems()) {
    const Instance x(p);
    INFO(describe(p));
    Output serial(x, true);
    REQUIRE(run(x, serial, 1, Pool::serial) == "");
    const Worst worst = compare(x.expected(), serial.out, serial.lse);
    INFO(worst.where);
    CHECK(worst.budgets <= 1);
    for (const int lanes : {1, 2, 3, 4, 8}) {
      for (const Pool pool : {Pool::serial, Pool::threads, Pool::reversed, Pool::one_after_other}) {
        Output other(x, true);
        REQUIRE(run(x, other, lanes, pool) == "");
        INFO(lanes << " lanes, " << name(pool));
        CHECK(other == serial);
      }
    }
  }
}

TEST_CASE("fifty runs on four threads give the same bits", "[bits]") {
  Problem p;
  p.len_q = {10, 10}, p.stored_k = {2100, 2100}, p.q_heads = 8, p.kv_heads = 2, p.dim_qk = p.dim_v = 16;
  for (const Regime regime : kRegimes) {
    p.regime = regime;
    const Instance x(p);
    Output first(x, true);
    REQUIRE(run(x, first, 4, Pool::threads) == "");
    for (int n = 0; n < 50; ++n) {
      Output again(x, true);
      REQUIRE(run(x, again, 4, Pool::threads) == "");
      REQUIRE(again == first);
    }
  }
}

TEST_CASE("what the planner knows of the machine changes no bit", "[bits]") {
  for (const Problem& p : problems()) {
    const Instance x(p);
    Result results[3] = {unwritten(x.q, x.v), unwritten(x.q, x.v), unwritten(x.q, x.v)};
    const index_t l2[] = {index_t{64} << 10, index_t{1} << 20, index_t{16} << 20};
    for (std::size_t n = 0; n < 3; ++n) {
      AttentionOptions options = x.options();
      options.cpu.l2_bytes = l2[n];
      options.lse = results[n].lse_view();
      REQUIRE(fovea::attention(x.q, x.k, x.v, results[n].out.view(), options).ok());
    }
    INFO(describe(p));
    CHECK(same_bits(results[0], results[1]));
    CHECK(same_bits(results[0], results[2]));
  }
}

TEST_CASE("a sequence alone = inside a batch = inside a ragged batch", "[bits]") {
  const index_t batch = 3, len_q = 21, len_k = 1333;
  const Dense x(31, batch, 6, 2, len_q, len_k, 24, 40);
  for (const Regime regime : {Regime::automatic, Regime::prefill, Regime::decode, Regime::wide_decode}) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    const Result together = attend(x, options);

    // The same tokens one after the other in token-major storage.
    std::vector<float> q(x.q.data.size()), k(x.k.data.size()), v(x.v.data.size());
    const auto rq = fovea::ragged(q.data(), batch * len_q, 6, 24), rk = fovea::ragged(k.data(), batch * len_k, 2, 24),
               rv = fovea::ragged(v.data(), batch * len_k, 2, 40);
    const auto copy = [](Tensor<const float> from, Tensor<float> to) {
      for (index_t b = 0; b < from.extent[0]; ++b) {
        for (index_t h = 0; h < from.extent[1]; ++h) {
          for (index_t i = 0; i < from.extent[2]; ++i) {
            for (index_t d = 0; d < from.extent[3]; ++d) to(0, h, b * from.extent[2] + i, d) = from(b, h, i, d);
          }
        }
      }
    };
    copy(x.q.view(), rq), copy(x.k.view(), rk), copy(x.v.view(), rv);
    const std::vector<index_t> cu_q{0, len_q, 2 * len_q, 3 * len_q}, cu_k{0, len_k, 2 * len_k, 3 * len_k};
    AttentionOptions as_ragged = options;
    as_ragged.cu_len_q = cu_q;
    as_ragged.cu_len_k = cu_k;
    const Result flat = attend(rq, rk, rv, as_ragged);

    for (index_t b = 0; b < batch; ++b) {
      const Result alone = attend(only_batch(x.q.view(), b), only_batch(x.k.view(), b), only_batch(x.v.view(), b), options);
      INFO("regime " << name(regime) << ", sequence " << b);
      CHECK(same_rows(together, b, 0, alone));
      CHECK(same_rows(flat, 0, b * len_q, alone));
    }
  }
}

TEST_CASE("heads alone = heads together, shared K and V = repeated K and V", "[bits][gqa]") {
  for (const index_t q_heads : {1, 3, 8}) {
    for (const index_t len_q : {1, 2, 19}) {
      const index_t len_k = 1270, dim = 20;
      const Dense x(32, 1, q_heads, 1, len_q, len_k, dim, dim);   // MQA
      Values k(1, q_heads, len_k, dim), v(1, q_heads, len_k, dim);
      for (index_t h = 0; h < q_heads; ++h) {
        std::copy(x.k.data.begin(), x.k.data.end(), k.data.begin() + h * len_k * dim);
        std::copy(x.v.data.begin(), x.v.data.end(), v.data.begin() + h * len_k * dim);
      }
      for (const Regime regime : kRegimes) {
        AttentionOptions options;
        options.regime = regime;
        options.causal = Causal::bottom_right;
        const Result shared = attend(x, options);
        INFO(q_heads << " heads, " << len_q << " queries, regime " << name(regime));
        CHECK(same_bits(shared, attend(x.q.view(), k.view(), v.view(), options)));
        for (index_t h = 0; h < q_heads; ++h) {
          const Result alone = attend(only_head(x.q.view(), h), x.k.view(), x.v.view(), options);
          for (index_t i = 0; i < len_q; ++i) {
            for (index_t d = 0; d < dim; ++d) CHECK(alone.at(0, 0, i, d) == shared.at(0, h, i, d));
          }
        }
      }
    }
  }
}

TEST_CASE("a row does not depend on its neighbours", "[bits]") {
  const index_t len_q = 37, len_k = 1150;
  const Dense x(33, 1, 2, 1, len_q, len_k, 33, 17);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const Result before = attend(x, options);
    for (const index_t row : {index_t{0}, index_t{11}, index_t{12}, len_q - 1}) {
      Dense changed = x;
      for (index_t i = 0; i < len_q; ++i) {
        for (index_t d = 0; d < 33 && i != row; ++d) changed.q.view()(0, 0, i, d) = i % 2 == 0 ? kNan : 1e30f;
      }
      const Result after = attend(changed, options);
      CHECK(same_rows(before, 0, row, [&] {
        Result one{Values(1, 1, 1, 17), {after.lse_at(0, 0, row)}};
        for (index_t d = 0; d < 17; ++d) one.out.view()(0, 0, 0, d) = after.at(0, 0, row, d);
        return one;
      }()));
      // One query alone.
      const Result alone = attend(only_pos(x.q.view(), row, 1), x.k.view(), x.v.view(), options);
      CHECK(same_rows(before, 0, row, alone));
    }
  }
}

TEST_CASE("chunked prefill = whole prefill in one forced regime", "[bits][chunks]") {
  const index_t len = 130, past = 1100, total = len + past;
  const Dense x(34, 1, 4, 2, len, total, 24, 24);
  // Every row, the first ones only and every row sees two KV splits; windows move a chunk's first key, and a border may not follow.
  for (const Window window : {Window{}, Window{150, -1}, Window{1060, -1}}) {
    for (const Regime regime : kRegimes) {
      for (const bool by_alignment : {false, true}) {
        AttentionOptions options;
        options.regime = regime;
        options.causal = Causal::bottom_right;
        options.window = window;
        const Result whole = attend(x, options);
        for (const index_t chunk : {1, 7, 64, 129}) {
          if (chunk == 1 && regime != Regime::decode && by_alignment) continue;   // 130 calls that pack K; once is enough
          for (index_t begin = 0; begin < len; begin += chunk) {
            const index_t count = std::min(chunk, len - begin);
            const std::vector<index_t> offset{past + begin}, keys{past + begin + count};
            AttentionOptions part = options;
            part.len_k = keys;
            if (!by_alignment) part.q_offset = offset, part.causal = Causal::top_left;
            const Result rows = attend(only_pos(x.q.view(), begin, count), x.k.view(), x.v.view(), part);
            INFO("regime " << name(regime) << ", chunk " << chunk << " at " << begin << ", window " << window.left);
            REQUIRE(same_rows(whole, 0, begin, rows));
          }
        }
      }
    }
  }
}

TEST_CASE("decode step by step = many rows in a forced decode regime", "[bits][chunks]") {
  const index_t steps = 9, past = 1020, total = past + steps;   // the fifth step is the first with a second split
  const Dense x(35, 2, 8, 2, steps, total, 64, 64);
  for (const Regime regime : {Regime::decode, Regime::wide_decode}) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    const Result whole = attend(x, options);
    for (index_t step = 0; step < steps; ++step) {
      const std::vector<index_t> keys{past + step + 1, past + step + 1};
      AttentionOptions one = options;
      one.len_k = keys;
      const Result row = attend(only_pos(x.q.view(), step, 1), x.k.view(), x.v.view(), one);
      for (index_t b = 0; b < 2; ++b) {
        Result part{Values(1, 8, 1, 64), {}};
        std::copy_n(row.out.data.begin() + b * 8 * 64, 8 * 64, part.out.data.begin());
        part.lse.assign(row.lse.begin() + b * 8, row.lse.begin() + (b + 1) * 8);
        INFO("regime " << name(regime) << ", step " << step << ", sequence " << b);
        CHECK(same_rows(whole, b, step, part));
      }
    }
  }
}

TEST_CASE("a growing cache does not change a row that sees the same keys", "[bits]") {
  const Dense x(36, 1, 2, 1, 3, 5000, 16, 16);
  for (const index_t visible : {100, 1030}) {
    const std::vector<index_t> keys{visible};
    for (const Regime regime : kRegimes) {
      AttentionOptions options;
      options.regime = regime;
      const Result small = attend(x.q.view(), only_pos(x.k.view(), 0, visible), only_pos(x.v.view(), 0, visible), options);
      options.len_k = keys;
      for (const index_t stored : {visible + 1, visible + 28, visible + 1000, index_t{5000}}) {
        CHECK(same_bits(small, attend(x.q.view(), only_pos(x.k.view(), 0, stored), only_pos(x.v.view(), 0, stored), options)));
      }
    }
  }
}

TEST_CASE("layouts change no bit", "[bits][layout]") {
  const index_t batch = 2, heads = 4, kv_heads = 2, len = 75, dim = 20;
  const Dense x(37, batch, heads, kv_heads, len, len, dim, dim);
  const auto copy = [](Tensor<const float> from, Tensor<float> to) {
    for (index_t b = 0; b < from.extent[0]; ++b) {
      for (index_t h = 0; h < from.extent[1]; ++h) {
        for (index_t i = 0; i < from.extent[2]; ++i) {
          for (index_t d = 0; d < from.extent[3]; ++d) to(b, h, i, d) = from(b, h, i, d);
        }
      }
    }
  };
  std::vector<float> packed(static_cast<std::size_t>(batch * len * (heads + 2 * kv_heads) * dim));
  std::vector<float> pair(static_cast<std::size_t>(2 * batch * len * kv_heads * dim));
  const auto qkv = fovea::packed_qkv(packed.data(), batch, len, heads, kv_heads, dim);
  const auto kv = fovea::interleaved_kv(pair.data(), batch, len, kv_heads, dim);
  copy(x.q.view(), qkv.q), copy(x.k.view(), qkv.k), copy(x.v.view(), qkv.v);
  copy(x.k.view(), kv.k), copy(x.v.view(), kv.v);
  // Rows stored last to first.
  Values mirrored_k = x.k, mirrored_v = x.v;
  const auto mirror = [&](Values& values) {
    Tensor<float> view = values.view();
    view.data += (len - 1) * view.stride[2];
    view.stride[2] = -view.stride[2];
    return view;
  };
  copy(x.k.view(), mirror(mirrored_k)), copy(x.v.view(), mirror(mirrored_v));
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::top_left;
    const Result plain = attend(x, options);
    CHECK(same_bits(plain, attend(qkv.q, qkv.k, qkv.v, options)));
    CHECK(same_bits(plain, attend(x.q.view(), kv.k, kv.v, options)));
    CHECK(same_bits(plain, attend(x.q.view(), mirror(mirrored_k), mirror(mirrored_v), options)));
  }
}

TEST_CASE("a batch stride of 0 shares K and V between sequences", "[bits][layout]") {
  const Dense x(38, 3, 2, 1, 5, 140, 16, 16);
  Tensor<const float> k = only_batch(x.k.view(), 0), v = only_batch(x.v.view(), 0);
  k.extent[0] = v.extent[0] = 3;
  k.stride[0] = v.stride[0] = 0;
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const Result together = attend(x.q.view(), k, v, options);
    for (index_t b = 0; b < 3; ++b) {
      const Result alone = attend(only_batch(x.q.view(), b), only_batch(x.k.view(), 0), only_batch(x.v.view(), 0), options);
      CHECK(same_rows(together, b, 0, alone));
    }
  }
}

TEST_CASE("NaN and Inf in masked K and V leave every other row's bits alone", "[bits][poison]") {
  const index_t len_q = 90, len_k = 90;
  const Dense x(39, 1, 2, 1, len_q, len_k, 24, 24);
  for (const Regime regime : kRegimes) {
    for (const float poison : {kNan, kInfinity, -kInfinity, 3e38f}) {
      for (const bool in_key : {false, true}) {
        for (const index_t j : {1, 50, 64, 89}) {
          AttentionOptions options;
          options.regime = regime;
          options.causal = Causal::top_left;
          const Result clean = attend(x, options);
          Dense bad = x;
          for (index_t d = 0; d < 24; ++d) (in_key ? bad.k : bad.v).view()(0, 0, j, d) = poison;
          const Result dirty = attend(bad, options);
          INFO("poison " << poison << (in_key ? " in K" : " in V") << " at key " << j << ", regime " << name(regime));
          bool same = true;
          for (index_t h = 0; h < 2; ++h) {
            for (index_t i = 0; i < j; ++i) {
              for (index_t d = 0; d < 24; ++d) same = same && clean.at(0, h, i, d) == dirty.at(0, h, i, d);
              same = same && clean.lse_at(0, h, i) == dirty.lse_at(0, h, i);
            }
            // Who does see it says so.
            for (index_t i = j; i < len_q && poison != poison; ++i) {
              for (index_t d = 0; d < 24; ++d) CHECK(std::isnan(dirty.at(0, h, i, d)));
              CHECK(std::isnan(dirty.lse_at(0, h, i)) == in_key);
            }
          }
          CHECK(same);
        }
      }
    }
  }
}

TEST_CASE("slots beyond the keys in use are never read into a result", "[bits][poison]") {
  const Dense x(40, 1, 2, 1, 40, 128, 20, 20);
  for (const index_t used : {0, 1, 63, 64, 65, 127}) {
    const std::vector<index_t> keys{used};
    for (const Regime regime : kRegimes) {
      AttentionOptions options;
      options.regime = regime;
      options.len_k = keys;
      const Result clean = attend(x, options);
      Dense bad = x;
      for (index_t j = used; j < 128; ++j) {
        for (index_t d = 0; d < 20; ++d) bad.k.view()(0, 0, j, d) = kNan, bad.v.view()(0, 0, j, d) = kInfinity;
      }
      CHECK(same_bits(clean, attend(bad, options)));
    }
  }
}
