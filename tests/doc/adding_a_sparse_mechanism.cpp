// SPDX-License-Identifier: Apache-2.0
// The code of docs/adding-a-sparse-mechanism.md: blocks of keys by pooled queries and keys, from the parts alone.
#include <cmath>
#include <cstdio>
#include <vector>

#include "fovea/call/column_sums.hpp"
#include "fovea/engine/parts/pooling.hpp"
#include "fovea/engine/parts/select.hpp"
#include "fovea/sparse.hpp"

namespace {

using fovea::index_t;
using F32 = fovea::Formats<fovea::Format::f32>;

constexpr index_t kBlock = 16;

struct PooledLists {
  fovea::door::LocalBytes sequences, memory;
  fovea::KeyLists lists;

  fovea::Status select(const fovea::Operand& q, const fovea::Kv& kv, float gamma, const fovea::AttentionOptions& options) {
    // 1. What the call is: checked, its rows and keys readable whatever they are stored as.
    fovea::door::Selection s;
    fovea::KeyRows keys;
    if (fovea::Status e = fovea::door::open_selection<F32>(s, sequences, q, kv, options); !e.ok()) return e;
    if (fovea::Status e = fovea::KeyRows::open(s.source, F32{}, keys); !e.ok()) return e;
    const index_t dim = s.shape.dim_qk, q_heads = s.shape.q_heads;
    const index_t q_blocks = (s.longest + kBlock - 1) / kBlock, k_blocks = (s.most_keys + kBlock - 1) / kBlock;
    const index_t all_lists = s.sequences * q_heads * q_blocks;

    // 2. Memory: laid out once to count, once to have it.
    float *row = nullptr, *query = nullptr, *means = nullptr, *weights = nullptr;
    std::int32_t *entries = nullptr, *counts = nullptr;
    std::byte* scratch = nullptr;
    const auto carve = [&](fovea::Bump& bump) {
      row = bump.take<float>(dim);
      query = bump.take<float>(dim);
      means = bump.take<float>(k_blocks * dim);
      weights = bump.take<float>(k_blocks);
      entries = bump.take<std::int32_t>(all_lists * k_blocks);
      counts = bump.take<std::int32_t>(all_lists);
      scratch = bump.take<std::byte>(static_cast<index_t>(fovea::top_p_scratch_bytes()));
    };
    if (fovea::Status e = fovea::door::carve_local(memory, carve); !e.ok()) return e;
    std::fill_n(counts, all_lists, 0);

    for (index_t b = 0; b < s.sequences; ++b) {
      for (index_t head = 0; head < q_heads; ++head) {
        // 3. Score: the mean of a block of queries against the mean of each block of keys.
        const fovea::Sequence& sequence = s.sequence(b);
        const auto each_key = [&](index_t begin, index_t end, const auto& f) {
          keys.each(b, s.kv_head(head), begin, end, row, f);
        };
        const auto each_query = [&](index_t begin, index_t end, const auto& f) {
          for (index_t i = begin; i < end; ++i) s.read_query(b, head, i, row), f(i, row);
        };
        fovea::pool_mean(each_key, 0, sequence.len_k, kBlock, dim, means);
        for (index_t first = 0; first < sequence.len_q; first += kBlock) {
          const index_t last = std::min(first + kBlock, sequence.len_q);
          const index_t visible = std::min(sequence.pos + last, sequence.len_k);   // keys before the block's last query
          const auto blocks = static_cast<std::size_t>((visible + kBlock - 1) / kBlock);
          fovea::pool_mean(each_query, first, last, kBlock, dim, query);
          for (std::size_t j = 0; j < blocks; ++j) {
            float dot = 0;
            for (index_t d = 0; d < dim; ++d) dot += query[d] * means[static_cast<index_t>(j) * dim + d];
            weights[j] = dot * fovea::scale_of(options, dim);
          }

          // 4. Select: the smallest set of blocks that has `gamma` of the estimated weight.
          const index_t list = (b * q_heads + head) * q_blocks + first / kBlock;
          fovea::softmax_row({weights, blocks});
          counts[list] =
              static_cast<std::int32_t>(fovea::top_p({weights, blocks}, static_cast<double>(gamma),
                                                     entries + list * k_blocks, {scratch, fovea::top_p_scratch_bytes()}));
        }
      }
    }

    // 5. Lists: what the attention takes.
    lists = {};
    lists.entries = entries;
    lists.capacity = k_blocks;
    lists.count = {counts, static_cast<std::size_t>(all_lists)};
    lists.batch = s.sequences;
    lists.heads = q_heads;
    lists.q_blocks = q_blocks;
    lists.q_block = lists.k_block = kBlock;
    return {};
  }
};

}   // namespace

int main() {
  constexpr index_t kHeads = 2, kLen = 100, kDim = 8;
  std::vector<float> numbers(kHeads * kLen * kDim), chosen(numbers.size()), dense(numbers.size());
  for (std::size_t n = 0; n < numbers.size(); ++n) numbers[n] = std::sin(static_cast<float>(n * n % 97));
  const auto x = fovea::bhsd<const float>(numbers.data(), 1, kHeads, kLen, kDim);
  const fovea::AttentionOptions options{.causal = fovea::Causal::bottom_right};
  const fovea::Kv kv = fovea::dense_kv(x, x);
  fovea::attention<F32>(x, kv, fovea::bhsd(dense.data(), 1, kHeads, kLen, kDim), options).or_throw();

  int wrong = 0;
  for (const float gamma : {0.5f, 1.f}) {
    const auto out = fovea::bhsd(chosen.data(), 1, kHeads, kLen, kDim);
    // 6. Attend.
    PooledLists pooled;
    pooled.select(x, kv, gamma, options).or_throw();
    fovea::sparse_attention<F32>(x, kv, pooled.lists, out, options).or_throw();
    float largest = 0;
    for (std::size_t n = 0; n < dense.size(); ++n) largest = std::max(largest, std::abs(dense[n] - chosen[n]));
    std::printf("gamma %.1f: at most %.1e from dense attention\n", static_cast<double>(gamma), static_cast<double>(largest));
    wrong += gamma == 1.f ? !(largest < 1e-5f) : !(largest > 1e-3f);
  }
  return wrong;
}
