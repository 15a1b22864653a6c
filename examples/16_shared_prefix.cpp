// SPDX-License-Identifier: Apache-2.0
// Four requests that begin with one prompt, in pages of one pool: a decode step that reads the prompt's keys once for all of
// them. The pages they share are one level of a cascade, what follows is the other; one plan serves every layer.
#include <fovea/cache/append.hpp>
#include <fovea/cache/paged_cache.hpp>
#include <fovea/cascade.hpp>
#include <fovea/reference/stored.hpp>

#include "example.hpp"

int main() {
  const fovea::index_t q_heads = 8, kv_heads = 2, dim = 64, token = (q_heads + 2 * kv_heads) * dim;
  const fovea::index_t count = 4, prompt_tokens = 201, layers = 2;
  const fovea::CacheRows rows{.kv_heads = kv_heads, .dim_qk = dim, .dim_v = dim};   // bf16 unless told otherwise
  fovea::PagedCache caches[layers];
  unsigned seed = 1;
  const auto append = [&](fovea::PagedCache& cache, fovea::index_t sequence, fovea::index_t tokens) {
    const std::vector<float> projected = example::random_values(tokens * token, seed++);
    const auto fresh = fovea::packed_qkv(projected.data(), 1, tokens, q_heads, kv_heads, dim);
    return fovea::append_tokens(cache, sequence, fresh.k, fresh.v);
  };

  // The prompt stays in the pool as a sequence of its own; 12 full pages are shared, each request copies the tokens behind them.
  fovea::index_t prompt = 0;
  std::vector<fovea::index_t> requests(count);
  for (fovea::PagedCache& cache : caches) {
    if (example::refused(cache.create({.rows = rows, .pages = 40, .page_size = 16, .sequences = count + 1})) ||
        example::refused(cache.create_sequence(&prompt)) || example::refused(append(cache, prompt, prompt_tokens))) {
      return 1;
    }
    for (fovea::index_t n = 0; n < count; ++n) {
      fovea::index_t& request = requests[static_cast<std::size_t>(n)];
      if (example::refused(cache.share_prefix(prompt, prompt_tokens, &request))) return 1;
      if (example::refused(append(cache, request, 5 + 9 * n))) return 1;   // the step's own token is the last of them
    }
  }

  // One query a request. Every level says which requests share its sequences of keys.
  const std::vector<fovea::index_t> cu_len_q{0, 1, 2, 3, 4}, everyone{0, count}, each{0, 1, 2, 3, 4};
  const fovea::AttentionOptions options{.causal = fovea::Causal::bottom_right, .cu_len_q = cu_len_q};
  using Stored = fovea::Formats<fovea::Format::bf16>;
  fovea::CascadePlan plan;
  fovea::PageLists lists;
  for (fovea::index_t layer = 0; layer < layers; ++layer) {
    fovea::PagedCache& cache = caches[layer];
    const fovea::index_t prompts[] = {prompt}, shared[] = {prompt_tokens / cache.page_size() * cache.page_size()};   // whole pages
    fovea::KvBatch first, own;
    if (example::refused(cache.csr(prompts, &first)) || example::refused(cache.csr(requests, shared[0], lists, &own))) return 1;
    const fovea::CascadeLevel levels[] = {{first.kv, everyone, shared}, {own.kv, each, own.len_k}};

    const std::vector<float> q_data = example::random_values(count * q_heads * dim, seed++);
    std::vector<float> out_data(q_data.size());
    const auto q = fovea::ragged(q_data.data(), count, q_heads, dim);   // [1, q_head, request, dim]
    const auto out = fovea::ragged(out_data.data(), count, q_heads, dim);
    const fovea::AttentionShape shape{1, q_heads, kv_heads, count, 0, dim, dim};
    if (layer == 0 && example::refused(fovea::make_plan(plan, shape, levels, options))) return 1;
    if (example::refused(fovea::cascade_attention<Stored>(plan, q, levels, out, options))) return 1;

    double worst = 0;   // of each request alone, on what its pages hold, read number by number.
    for (fovea::index_t n = 0; n < count; ++n) {
      const fovea::index_t request = requests[static_cast<std::size_t>(n)], len = cache.len(request);
      std::vector<float> k_data(static_cast<std::size_t>(kv_heads * len * dim)), v_data(k_data.size());
      const auto k = fovea::bhsd(k_data.data(), 1, kv_heads, len, dim), v = fovea::bhsd(v_data.data(), 1, kv_heads, len, dim);
      for (fovea::index_t at = 0; at < len * kv_heads * dim; ++at) {
        const fovea::index_t key = at / dim / kv_heads, head = at / dim % kv_heads, d = at % dim;
        k(0, head, key, d) = static_cast<float>(fovea::reference::stored_value(rows.k, cache.k_row(request, head, key), dim, d));
        v(0, head, key, d) = static_cast<float>(fovea::reference::stored_value(rows.v, cache.v_row(request, head, key), dim, d));
      }
      const auto own_q = fovea::ragged(q_data.data() + n * q_heads * dim, 1, q_heads, dim);
      const auto own_out = fovea::ragged(out_data.data() + n * q_heads * dim, 1, q_heads, dim);
      const double error = example::error_of(own_q, k, v, own_out);
      if (!(error <= worst)) worst = error;   // a NaN stays
    }
    std::printf("layer %td: %td keys read once, %td + %td + %td + %td apart, %td of %td pages in use\n", layer, shared[0],
                own.len_k[0], own.len_k[1], own.len_k[2], own.len_k[3], cache.pages() - cache.free_pages(), cache.pages());
    if (example::verdict("shared prefix", worst) != 0) return 1;
  }
  return 0;
}
