// SPDX-License-Identifier: Apache-2.0
// The named layouts put every element where their comments say.
#include "fovea/core/view.hpp"

#include <vector>

#include "catch_compat.hpp"

namespace {

using fovea::index_t;
using fovea::Tensor;

constexpr index_t kBatch = 2, kLen = 5, kHeads = 3, kKvHeads = 1, kDim = 4;

template <class T, class Where>
void check_offsets(const Tensor<T>& view, const T* base, Where where) {
  for (index_t b = 0; b < view.extent[0]; ++b) {
    for (index_t h = 0; h < view.extent[1]; ++h) {
      for (index_t s = 0; s < view.extent[2]; ++s) {
        for (index_t d = 0; d < view.extent[3]; ++d) REQUIRE(&view(b, h, s, d) - base == where(b, h, s, d));
      }
    }
  }
}

}  // namespace

TEST_CASE("bshd and bhsd", "[view]") {
  std::vector<float> data(static_cast<std::size_t>(kBatch * kLen * kHeads * kDim));
  const auto a = fovea::bshd(data.data(), kBatch, kLen, kHeads, kDim);
  CHECK(a.extent == std::array<index_t, 4>{kBatch, kHeads, kLen, kDim});
  check_offsets(a, data.data(),
                [](index_t b, index_t h, index_t s, index_t d) { return ((b * kLen + s) * kHeads + h) * kDim + d; });
  const auto c = fovea::bhsd(data.data(), kBatch, kHeads, kLen, kDim);
  CHECK(c.extent == std::array<index_t, 4>{kBatch, kHeads, kLen, kDim});
  check_offsets(c, data.data(),
                [](index_t b, index_t h, index_t s, index_t d) { return ((b * kHeads + h) * kLen + s) * kDim + d; });
}

TEST_CASE("ragged is one batch of all tokens", "[view]") {
  std::vector<float> data(static_cast<std::size_t>(kLen * kHeads * kDim));
  const auto view = fovea::ragged(data.data(), kLen, kHeads, kDim);
  CHECK(view.extent == std::array<index_t, 4>{1, kHeads, kLen, kDim});
  check_offsets(view, data.data(), [](index_t, index_t h, index_t s, index_t d) { return (s * kHeads + h) * kDim + d; });
}

TEST_CASE("packed QKV and interleaved KV", "[view]") {
  constexpr index_t token = (kHeads + 2 * kKvHeads) * kDim;
  std::vector<float> data(static_cast<std::size_t>(kBatch * kLen * token));
  const auto qkv = fovea::packed_qkv(data.data(), kBatch, kLen, kHeads, kKvHeads, kDim);
  CHECK(qkv.q.extent == std::array<index_t, 4>{kBatch, kHeads, kLen, kDim});
  CHECK(qkv.k.extent == std::array<index_t, 4>{kBatch, kKvHeads, kLen, kDim});
  CHECK(qkv.v.extent == qkv.k.extent);
  const auto at = [](index_t first) {
    return [first](index_t b, index_t h, index_t s, index_t d) { return (b * kLen + s) * token + (first + h) * kDim + d; };
  };
  check_offsets(qkv.q, data.data(), at(0));
  check_offsets(qkv.k, data.data(), at(kHeads));
  check_offsets(qkv.v, data.data(), at(kHeads + kKvHeads));

  std::vector<float> pair(static_cast<std::size_t>(2 * kBatch * kLen * kHeads * kDim));
  const auto kv = fovea::interleaved_kv(pair.data(), kBatch, kLen, kHeads, kDim);
  check_offsets(kv.k, pair.data(),
                [](index_t b, index_t h, index_t s, index_t d) { return ((b * kLen + s) * 2 * kHeads + h) * kDim + d; });
  check_offsets(kv.v, pair.data(), [](index_t b, index_t h, index_t s, index_t d) {
    return (((b * kLen + s) * 2 + 1) * kHeads + h) * kDim + d;
  });
}

TEST_CASE("null data stays null in every view", "[view]") {
  float* const none = nullptr;
  CHECK_FALSE(fovea::packed_qkv(none, 1, 2, 3, 1, 4).k);
  CHECK_FALSE(fovea::packed_qkv(none, 1, 2, 3, 1, 4).v);
  CHECK_FALSE(fovea::interleaved_kv(none, 1, 2, 3, 4).v);
  CHECK_FALSE(fovea::bshd(none, 1, 2, 3, 4));
}

TEST_CASE("a writable view converts to a readable one", "[view]") {
  float one = 3;
  const Tensor<float> view = fovea::bhsd(&one, 1, 1, 1, 1);
  const Tensor<const float> same = view;
  CHECK(same(0, 0, 0, 0) == 3);
  view(0, 0, 0, 0) = 4;
  CHECK(same(0, 0, 0, 0) == 4);
}
