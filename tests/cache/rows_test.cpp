// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/rows.hpp"

#include <vector>

#include "cache_rows.hpp"
#include "catch_compat.hpp"

using namespace test;
using fovea::CacheRows;
using fovea::Code;
using fovea::Format;

TEST_CASE("bytes per token", "[cache]") {
  // The table of docs/caches.md: 8 heads of 128 numbers.
  const auto bytes = [](Format k, Format v) {
    return fovea::token_bytes({.kv_heads = 8, .dim_qk = 128, .dim_v = 128, .k = k, .v = v});
  };
  CHECK(bytes(Format::f32, Format::f32) == 8192);
  CHECK(bytes(Format::bf16, Format::f16) == 4096);
  CHECK(bytes(Format::i8_token, Format::i8_token) == 2112);
  CHECK(bytes(Format::i8_channel, Format::i8_token) == 2080);
  CHECK(bytes(Format::e4m3, Format::e5m2) == 2112);
  CHECK(bytes(Format::i4_g32, Format::i4_g32) == 1152);
  CHECK(bytes(Format::i4_g64, Format::i4_g64) == 1088);
  CHECK(bytes(Format::i4_g32_zero, Format::i4_g64_zero) == 8 * (80 + 72));
  CHECK(fovea::token_bytes(
            {.dim_qk = 576, .dim_v = 512, .k = Format::latent_fp8, .v = Format::latent_fp8, .v_in_k = true}) == 656);
  CHECK(fovea::token_bytes({.dim_qk = 576, .dim_v = 512, .v_in_k = true}) == 1152);
}

TEST_CASE("rows no cache can hold are refused with their numbers", "[cache]") {
  const std::vector<float> scale(64, 1.f);
  const auto refused = [](const CacheRows& rows, Code code, const char* words) {
    const fovea::Status status = fovea::check_rows(rows);
    CHECK(status.code() == code);
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
  };
  refused({.kv_heads = 0, .dim_qk = 1, .dim_v = 1}, Code::invalid_argument, "kv_heads 0");
  refused({.dim_qk = -5, .dim_v = 1}, Code::invalid_argument, "dim_qk -5");
  refused({.dim_qk = 8, .dim_v = fovea::index_t{1} << 40}, Code::invalid_argument, "dim_v 1099511627776");
  refused({.dim_qk = 8, .dim_v = 8, .k = static_cast<Format>(77)}, Code::invalid_argument, "77");
  refused({.dim_qk = 8, .dim_v = 8, .k = Format::i8_channel}, Code::invalid_argument, "missing");
  refused({.dim_qk = 8, .dim_v = 8, .k_channel_scale = scale.data()}, Code::invalid_argument, "bf16");
  refused({.dim_qk = 8, .dim_v = 8, .v = Format::i8_channel}, Code::unsupported, "i8_channel");
  refused({.dim_qk = 8, .dim_v = 512, .v = Format::latent_fp8}, Code::unsupported, "latent_fp8");
  refused({.dim_qk = 512, .dim_v = 512, .k = Format::latent_fp8}, Code::invalid_argument, "576");
  refused({.dim_qk = 8, .dim_v = 9, .v_in_k = true}, Code::invalid_argument, "at most 8");
  refused({.dim_qk = 8, .dim_v = 8, .v = Format::f16, .v_in_k = true}, Code::invalid_argument, "f16");
  refused({.dim_qk = 576, .dim_v = 576, .k = Format::latent_fp8, .v = Format::latent_fp8, .v_in_k = true},
          Code::invalid_argument, "at most 512");
  refused({.dim_qk = 8,
           .dim_v = 8,
           .k = Format::i8_channel,
           .v = Format::i8_channel,
           .v_in_k = true,
           .k_channel_scale = scale.data()},
          Code::unsupported, "V cannot be stored as i8_channel");
  // Scales that stand behind all numbers of a row are not found behind its first ones.
  for (const Format format : {Format::i8_token, Format::i4_g32, Format::i4_g64, Format::i4_g32_zero, Format::i4_g64_zero,
                              Format::e4m3, Format::e5m2}) {
    refused({.dim_qk = 64, .dim_v = 48, .k = format, .v = format, .v_in_k = true}, Code::unsupported,
            "rows of K has all of their 64 numbers, dim_v is 48");
    CHECK(fovea::check_rows({.dim_qk = 64, .dim_v = 64, .k = format, .v = format, .v_in_k = true}).ok());
  }
  CHECK(fovea::check_rows({.dim_qk = 8, .dim_v = 8, .k = Format::i8_channel, .k_channel_scale = scale.data()}).ok());
  CHECK(fovea::check_rows({.dim_qk = 576, .dim_v = 512, .k = Format::latent_fp8, .v = Format::latent_fp8, .v_in_k = true})
            .ok());
}

TEST_CASE("products of sizes stop at the largest cache", "[cache]") {
  CHECK(fovea::limited_product({3, 5, 7}) == 105);
  CHECK(fovea::limited_product({0, fovea::kLargestCache, 9}) == 0);
  CHECK(fovea::limited_product({fovea::kLargestCache, 2}) == fovea::kLargestCache);
  const fovea::index_t most = PTRDIFF_MAX;
  CHECK(fovea::limited_product({most, most, most}) == fovea::kLargestCache);
  CHECK(fovea::limited_product({fovea::kLargestCache / 2, 2}) == fovea::kLargestCache);
  CHECK(fovea::limited_product({fovea::kLargestCache / 2 - 1, 2}) == fovea::kLargestCache - 2);
}

TEST_CASE("a row store: every slot has its own bytes, in both layouts", "[cache]") {
  const std::vector<float> scale(3 * 16, 0.5f);
  for (const fovea::KvLayout layout : {fovea::KvLayout::head_major, fovea::KvLayout::token_major}) {
    for (const bool v_in_k : {false, true}) {
      CacheRows rows{.kv_heads = 3, .dim_qk = 16, .dim_v = 7, .v_in_k = v_in_k};
      if (!v_in_k) {
        rows.k = Format::i8_channel;
        rows.v = Format::i4_g32;
        rows.k_channel_scale = scale.data();
      }
      const index_t blocks = 2, slots = 5;
      fovea::Bump counting;
      fovea::RowStore(counting, rows, blocks, slots, layout, true);
      fovea::MemoryBlock block;
      REQUIRE(block.allocate(counting.used()).ok());
      fovea::Bump taking(block.data());
      const fovea::RowStore store(taking, rows, blocks, slots, layout, true);
      CHECK(store.is_poison(0, 0, slots));
      CHECK(store.is_poison(1, 0, slots));

      std::vector<std::uint64_t> ids(static_cast<std::size_t>(blocks * slots));
      for (std::size_t n = 0; n < ids.size(); ++n) ids[n] = 100 + n;
      const WriteTokens write{ids, rows};
      for (index_t n = 0; n < blocks * slots; ++n) {
        for (index_t kv_head = 0; kv_head < 3; ++kv_head) {
          write(n, kv_head, store.k(n / slots, kv_head, n % slots), store.v(n / slots, kv_head, n % slots));
        }
      }
      const fovea::Kv kv = store.kv();
      CHECK(kv.kv_heads == 3);
      CHECK(kv.dim_qk == 16);
      CHECK(kv.dim_v == 7);
      CHECK(kv.batch == blocks);
      CHECK(kv.len == slots);
      CHECK(kv.k.format == rows.k);
      CHECK(kv.v.format == rows.v);
      for (index_t n = 0; n < blocks * slots; ++n) {
        CHECK(holds(kv, n / slots, n % slots, ids[static_cast<std::size_t>(n)], rows));
      }
      if (v_in_k) {
        CHECK(kv.k_channel_scale == nullptr);
      } else {
        REQUIRE(kv.k_channel_scale != nullptr);
        CHECK(kv.k_channel_scale != scale.data());
        CHECK(std::vector<float>(kv.k_channel_scale, kv.k_channel_scale + 48) == scale);
      }

      store.copy(0, 1, 1, 2, 3);
      for (index_t slot = 0; slot < slots; ++slot) {
        CHECK(holds(kv, 0, slot, ids[static_cast<std::size_t>(slot)], rows));
        CHECK(holds(kv, 1, slot, ids[static_cast<std::size_t>(slot < 2 ? slots + slot : slot - 1)], rows));
      }
      store.poison(0, 3, 2);
      CHECK(store.is_poison(0, 3, 2));
      CHECK_FALSE(store.is_poison(0, 2, 1));
      CHECK(holds(kv, 0, 2, ids[2], rows));
      CHECK(holds(kv, 1, 0, ids[5], rows));
    }
  }
}
