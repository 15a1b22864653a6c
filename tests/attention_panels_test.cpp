// SPDX-License-Identifier: Apache-2.0
// Panels::bf16 and the promise of equal bits, whatever multiplies them: rows alone and together, chunks, lanes, keys that hold NaN and
// are not seen, and calls inside a call.
#include <string>
#include <vector>

#include "fovea/core/convert.hpp"
#include "fovea/simd/panels.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"

namespace {

using namespace test;

// Queries in fp32, keys and values in bf16.
struct Narrow {
  Dense x;
  std::vector<fovea::bf16> k, v;
  Narrow(std::uint64_t seed, index_t heads, index_t kv_heads, index_t len_q, index_t len_k, index_t dim_qk, index_t dim_v)
      : x(seed, 1, heads, kv_heads, len_q, len_k, dim_qk, dim_v) {
    for (const float f : x.k.data) k.push_back(fovea::convert<fovea::bf16>(f));
    for (const float f : x.v.data) v.push_back(fovea::convert<fovea::bf16>(f));
  }
  index_t kv_heads() const { return x.k.view().extent[1]; }
  index_t len_k() const { return x.k.view().extent[2]; }
  Tensor<const fovea::bf16> keys() const {
    return fovea::bhsd<const fovea::bf16>(k.data(), 1, kv_heads(), len_k(), x.k.view().extent[3]);
  }
  Tensor<const fovea::bf16> values() const {
    return fovea::bhsd<const fovea::bf16>(v.data(), 1, kv_heads(), len_k(), x.v.view().extent[3]);
  }
  void break_value(index_t key) {
    const index_t dim = x.v.view().extent[3];
    for (index_t h = 0; h < kv_heads(); ++h)
      for (index_t d = 0; d < dim; ++d) v[static_cast<std::size_t>((h * len_k() + key) * dim + d)] = fovea::bf16{0x7fc1};
  }
};

Result attend(const Narrow& n, Tensor<const float> q, fovea::AttentionOptions options) {
  Result result = unwritten(q, n.x.v.view());
  options.panels = fovea::Panels::bf16;
  options.lse = result.lse_view();
  const fovea::Status status = fovea::attention(q, n.keys(), n.values(), result.out.view(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  return result;
}

constexpr fovea::Regime kPacked[] = {fovea::Regime::prefill, fovea::Regime::wide_decode};

}   // namespace

TEST_CASE("bf16 panels: chunks of any size, any lanes and a row alone have the bits of the whole", "[bits][panels]") {
  if (!fovea::kHasBf16Dot) return;
  const index_t len = 150, past = 171, total = len + past;
  for (const index_t dim : {24, 64}) {
    const Narrow n(71, 4, 2, len, total, dim, 40);
    for (const fovea::Regime regime : kPacked) {
      for (const fovea::Window window : {fovea::Window{}, fovea::Window{70, -1}}) {
        fovea::AttentionOptions options;
        options.regime = regime;
        options.causal = fovea::Causal::bottom_right;
        options.window = window;
        const Result whole = attend(n, n.x.q.view(), options);
        ThreadPerLane threads;
        fovea::AttentionOptions parallel = options;
        parallel.executor = fovea::Executor(threads, 3);
        CHECK(same_bits(whole, attend(n, n.x.q.view(), parallel)));
        for (const index_t chunk : {1, 7, 33, 149}) {
          for (index_t begin = 0; begin < len; begin += chunk) {
            const index_t count = std::min(chunk, len - begin);
            const std::vector<index_t> offset{past + begin}, keys{past + begin + count};
            fovea::AttentionOptions part = options;
            part.causal = fovea::Causal::top_left;
            part.q_offset = offset;
            part.len_k = keys;
            INFO("dim " << dim << ", chunk " << chunk << " at " << begin << ", window " << window.left);
            REQUIRE(same_rows(whole, 0, begin, attend(n, only_pos(n.x.q.view(), begin, count), part)));
          }
        }
      }
    }
  }
}

TEST_CASE("bf16 panels: NaN in values changes no bit of a row that does not see them", "[bits][panels][poison]") {
  if (!fovea::kHasBf16Dot) return;
  // 2 heads: a group of rows is 16 positions, its tiles partial. 32 heads: one position, full tiles that end anywhere.
  for (const index_t heads : {2, 32}) {
    const index_t len = heads == 2 ? 130 : 75;
    const Narrow clean(72, heads, 1, len, len, 32, 24);
    for (const fovea::Regime regime : kPacked) {
      for (const fovea::Window window : {fovea::Window{}, fovea::Window{20, -1}, fovea::Window{3, 5}}) {
        fovea::AttentionOptions options;
        options.regime = regime;
        options.window = window;
        options.causal = window.right < 0 ? fovea::Causal::top_left : fovea::Causal::none;
        const Result before = attend(clean, clean.x.q.view(), options);
        for (const index_t key : {index_t{0}, index_t{1}, index_t{31}, index_t{32}, index_t{64}, len - 1}) {
          Narrow broken = clean;
          broken.break_value(key);
          const Result after = attend(broken, broken.x.q.view(), options);
          index_t wrong = 0, missed = 0;
          for (index_t h = 0; h < heads; ++h) {
            for (index_t i = 0; i < len; ++i) {
              const bool sees =
                  (window.left < 0 || key >= i - window.left) && key <= (window.right < 0 ? i : i + window.right);
              for (index_t d = 0; d < 24; ++d) {
                if (sees) {
                  missed += after.at(0, h, i, d) == after.at(0, h, i, d);
                } else {
                  wrong += !(after.at(0, h, i, d) == before.at(0, h, i, d));
                }
              }
            }
          }
          INFO("key " << key << ", window " << window.left << "/" << window.right);
          CHECK(wrong == 0);
          CHECK(missed == 0);
        }
      }
    }
  }
}

TEST_CASE("bf16 panels: a score may attend by itself", "[panels]") {
  if (!fovea::kHasBf16Dot) return;
  const Narrow n(73, 1, 1, 40, 40, 32, 32), inner(74, 1, 1, 3, 9, 32, 32);
  fovea::AttentionOptions options;
  options.regime = fovea::Regime::prefill;
  options.panels = fovea::Panels::bf16;
  const auto call = [&](bool nested) {
    Result result = unwritten(n.x.q.view(), n.x.v.view());
    const auto score = [&](auto s, int, int, int, auto) {
      if (nested) attend(inner, inner.x.q.view(), options);
      return s;
    };
    REQUIRE(
        fovea::attention(n.x.q.view(), n.keys(), n.values(), result.out.view(), options, fovea::variant().with_score(score))
            .ok());
    return result;
  };
  const Result plain = call(false), nested = call(true);
  CHECK(plain.out.data == nested.out.data);
}
