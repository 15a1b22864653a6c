// SPDX-License-Identifier: Apache-2.0
// The code of docs/caches.md: the four ways to write lead to the same rows. And of docs/mechanisms/streaming_llm.md.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include <fovea/attention.hpp>
#include <fovea/cache/append.hpp>
#include <fovea/cache/contiguous_cache.hpp>
#include <fovea/cache/turned_sinks.hpp>

// 1100 tokens, so that the ring drops some. All keys are alike and a value is the number of its token, so the last output is the
// mean of the tokens in reach.
bool streams_text() {
  const fovea::index_t dim = 8, len = 1100;
  using Stored = fovea::Formats<fovea::Format::f32>;
  const fovea::CacheRows rows{.dim_qk = dim, .dim_v = 1, .k = fovea::Format::f32, .v = fovea::Format::f32};
  std::vector<double> inv_freq(dim / 2);
  float factor = 0;
  fovea::rope_frequencies({.rotary_dim = dim}, inv_freq, factor).or_throw();
  std::vector<float> memory(static_cast<std::size_t>(fovea::rope_table_floats(len, dim)));
  fovea::RopeTable table;
  fovea::make_rope_table(table, inv_freq, factor, 0, len, memory).or_throw();

  fovea::RingCache ring;   // of a layer
  ring.create({.rows = rows, .sinks = 4, .window = 1020}).or_throw();
  fovea::TurnedSinks sinks;
  sinks.create(ring, fovea::RopeLayout::half_split).or_throw();

  float key[dim] = {}, query[dim], value = 0, mean = 0;
  for (; value < static_cast<float>(len); ++value) {
    std::fill_n(query, dim, 1.f);
    const auto k = fovea::bhsd<const float>(key, 1, 1, 1, dim), v = fovea::bhsd<const float>(&value, 1, 1, 1, 1);
    const auto q = fovea::bhsd(query, 1, 1, 1, dim), out = fovea::bhsd(&mean, 1, 1, 1, 1);
    // Keys are rotated on the way in by their places in the text, which ring.seen(0) counts.
    const fovea::index_t position = ring.seen(0);
    sinks.append(ring, 0, k, v, table).or_throw();
    sinks.turn(ring, 0, table).or_throw();
    fovea::rotate(q, {.start = position}, table, fovea::RopeLayout::half_split).or_throw();
    fovea::attention<Stored>(q, ring.batch().kv, out, {.len_k = ring.lengths()}).or_throw();
  }
  // 0 to 3 and 80 to 1099.
  return std::abs(mean - (6 + 1020 * 589.5f) / 1024) < 0.01f;
}

int main() {
  if (!streams_text()) return 1;
  const fovea::index_t kv_heads = 2, dim = 64, count = 5, sequence = 0;
  std::vector<float> numbers(static_cast<std::size_t>(kv_heads * count * dim));
  for (std::size_t n = 0; n < numbers.size(); ++n) numbers[n] = std::sin(static_cast<float>(n));
  const auto k = fovea::bshd<const float>(numbers.data(), 1, count, kv_heads, dim), v = k;   // [1, kv_head, token, dim]

  fovea::ContiguousCache cache;
  cache.create({.rows = {.kv_heads = kv_heads, .dim_qk = dim, .dim_v = dim, .k = fovea::Format::i8_token}, .slots = 64})
      .or_throw();

  // Numbers: encoded in the cache's formats, keys rotated on the way if a RoPE table is given (cache/append.hpp).
  fovea::append_tokens(cache, sequence, k, v).or_throw();

  // Each row filled where it will stay: encode, rotate, copy.
  const auto write = [&](fovea::index_t token, fovea::index_t kv_head, std::byte* k_row, std::byte* v_row) {
    fovea::quantise_row(cache.rows().k, &k(0, kv_head, token, 0), 1, dim, nullptr, k_row);
    fovea::quantise_row(cache.rows().v, &v(0, kv_head, token, 0), 1, dim, nullptr, v_row);
  };
  cache.append(sequence, count, write).or_throw();

  // Ready rows of the cache's formats, wherever they are: stored_rows(...), dense_kv(k, v).k, another cache's.
  const fovea::Kv ready = cache.batch().kv;
  cache.append(sequence, count, ready.k, ready.v).or_throw();

  // Contiguous and paged: room only. Any number of threads may then write the rows.
  const fovea::index_t first = cache.len(sequence);
  cache.extend(sequence, count).or_throw();
  for (fovea::index_t token = 0; token < count; ++token) {
    for (fovea::index_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      write(token, kv_head, cache.writable_k_row(sequence, kv_head, first + token),
            cache.writable_v_row(sequence, kv_head, first + token));
    }
  }

  std::vector<float> out_data(static_cast<std::size_t>(kv_heads * dim));
  const auto q = fovea::bhsd<const float>(numbers.data(), 1, kv_heads, 1, dim);   // [1, q_head, 1, dim]
  const auto out = fovea::bhsd(out_data.data(), 1, kv_heads, 1, dim);             // [1, q_head, 1, dim]
  using Stored = fovea::Formats<fovea::Format::i8_token, fovea::Format::bf16>;
  const fovea::KvBatch batch = cache.batch();
  fovea::attention<Stored>(q, batch.kv, out, {.len_k = batch.len_k}).or_throw();

  const auto bytes = static_cast<std::size_t>(fovea::row_bytes(cache.rows().k, dim));
  for (fovea::index_t token = count; token < 4 * count; ++token) {
    for (fovea::index_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      const std::byte* const row = cache.k_row(sequence, kv_head, token);
      if (std::memcmp(row, cache.k_row(sequence, kv_head, token % count), bytes) != 0) {
        std::printf("token %td differs from token %td\n", token, token % count);
        return 1;
      }
    }
  }
  return cache.len(sequence) == 4 * count && cache.check().ok() ? 0 : 1;
}
