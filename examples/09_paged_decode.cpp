// SPDX-License-Identifier: Apache-2.0
// One decode step of three requests whose K and V stand in bf16 pages of one pool. Two requests have a prompt in common:
// they share its pages, and keep apart what follows.
#include <fovea/cache/append.hpp>
#include <fovea/cache/paged_cache.hpp>
#include <fovea/reference/stored.hpp>

#include "example.hpp"

int main() {
  const fovea::index_t q_heads = 8, kv_heads = 2, dim = 64, token = (q_heads + 2 * kv_heads) * dim;
  const fovea::CacheRows rows{.kv_heads = kv_heads, .dim_qk = dim, .dim_v = dim};   // bf16 unless told otherwise
  fovea::PagedCache cache;
  if (example::refused(cache.create({.rows = rows, .pages = 40, .page_size = 16, .sequences = 3}))) return 1;

  // Tokens as a fused projection gives them, [q heads | k heads | v heads]; appending encodes K and V.
  unsigned seed = 1;
  const auto append = [&](fovea::index_t sequence, fovea::index_t count) {
    const std::vector<float> projected = example::random_values(count * token, seed++);
    const auto fresh = fovea::packed_qkv(projected.data(), 1, count, q_heads, kv_heads, dim);
    return fovea::append_tokens(cache, sequence, fresh.k, fresh.v);
  };
  fovea::index_t first, second, third;
  if (example::refused(cache.create_sequence(&first)) || example::refused(append(first, 200)) ||   // a prompt of 200 tokens
      example::refused(cache.share_prefix(first, 200, &second)) ||   // 12 full pages shared, the last one copied
      example::refused(cache.create_sequence(&third)) || example::refused(append(third, 37))) {
    return 1;
  }

  // The step: a new token of each request goes into the cache, then its query sees all keys of the request.
  const std::vector<float> step = example::random_values(3 * token, seed++);
  const auto fresh = fovea::packed_qkv(step.data(), 3, 1, q_heads, kv_heads, dim);
  for (const fovea::index_t s : {first, second, third}) {
    const auto own = fovea::packed_qkv(step.data() + s * token, 1, 1, q_heads, kv_heads, dim);
    if (example::refused(fovea::append_tokens(cache, s, own.k, own.v))) return 1;
  }
  const fovea::KvBatch batch = cache.batch();
  std::vector<float> out_data(static_cast<std::size_t>(3 * q_heads * dim));
  const auto out = fovea::bhsd(out_data.data(), 3, q_heads, 1, dim);
  using Stored = fovea::Formats<fovea::Format::bf16>;   // kernels for the formats in use, and no others
  if (example::refused(fovea::attention<Stored>(fresh.q, batch.kv, out, {.len_k = batch.len_k}))) return 1;

  for (const fovea::index_t s : {first, second, third}) {
    std::printf("request %td: %td tokens in %zu pages\n", s, cache.len(s), cache.pages_of(s).size());
  }
  std::printf("%td of %td pages in use, %td bytes per token\n", cache.pages() - cache.free_pages(), cache.pages(),
              fovea::token_bytes(rows));

  // The same on what the pages hold, read number by number.
  const fovea::index_t longest = cache.len(first);
  std::vector<float> k_data(static_cast<std::size_t>(3 * kv_heads * longest * dim)), v_data(k_data.size());
  const auto k = fovea::bhsd(k_data.data(), 3, kv_heads, longest, dim),
             v = fovea::bhsd(v_data.data(), 3, kv_heads, longest, dim);
  for (const fovea::index_t s : {first, second, third}) {
    for (fovea::index_t at = 0; at < cache.len(s) * kv_heads * dim; ++at) {
      const fovea::index_t key = at / dim / kv_heads, head = at / dim % kv_heads, d = at % dim;
      k(s, head, key, d) = static_cast<float>(fovea::reference::stored_value(rows.k, cache.k_row(s, head, key), dim, d));
      v(s, head, key, d) = static_cast<float>(fovea::reference::stored_value(rows.v, cache.v_row(s, head, key), dim, d));
    }
  }
  return example::verdict("paged decode step", example::error_of(fresh.q, k, v, out, {.len_k = batch.len_k}));
}
