// SPDX-License-Identifier: Apache-2.0
// The library without exceptions and without RTTI: each door opened once, each kind of call made once, one call refused. Front
// door 2 stands before the others here, after them in fovea.hpp and tests/doc/umbrella.cpp: both orders must do.
#include <fovea/recurrent.hpp>

#include <fovea/adapters/std_threads.hpp>
#include <fovea/fovea.hpp>

#include <cstring>

#include "../consumers/one_call.hpp"

#if defined(__cpp_exceptions) || defined(__GXX_RTTI)
#error "this program is about -fno-exceptions -fno-rtti"
#endif

namespace {

using fovea::index_t;
using Only = fovea::Formats<fovea::Format::f32>;   // kernels for f32 and no other format

// 4 queries at the end of 40 keys, 2 heads.
constexpr index_t heads = 2, len_q = 4, len_k = 40, dim = 8, page = 16;

struct Problem {
  std::vector<float> q_data = waves(heads * len_q * dim, 0.37), k_data = waves(heads * len_k * dim, 0.71),
                     v_data = waves(heads * len_k * dim, 1.13);
  fovea::Tensor<const float> q = fovea::bhsd<const float>(q_data.data(), 1, heads, len_q, dim),
                             k = fovea::bhsd<const float>(k_data.data(), 1, heads, len_k, dim),
                             v = fovea::bhsd<const float>(v_data.data(), 1, heads, len_k, dim);

  static std::vector<float> waves(index_t count, double frequency) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (std::size_t n = 0; n < values.size(); ++n) values[n] = static_cast<float>(std::sin(frequency * static_cast<double>(n + 1)));
    return values;
  }
};

struct Output {
  std::vector<float> out_data = std::vector<float>(heads * len_q * dim, NAN), lse_data = std::vector<float>(heads * len_q, NAN);
  fovea::Tensor<float> out = fovea::bhsd(out_data.data(), 1, heads, len_q, dim);
  fovea::View<float, 3> lse{lse_data.data(), {1, heads, len_q}, {heads * len_q, len_q, 1}};
};

bool told(const char* what, bool good) {
  std::printf("noexcept: %s: %s\n", what, good ? "right" : "WRONG");
  return good;
}

// Means of 40 values below 1 that differ by the order of their sums only.
bool close(const std::vector<float>& a, const std::vector<float>& b) {
  for (std::size_t n = 0; n < a.size(); ++n) {
    if (!(std::fabs(a[n] - b[n]) <= 1e-5f)) return false;
  }
  return true;
}

fovea::Tensor<const float> keys(fovea::Tensor<const float> x, index_t begin, index_t end) {
  x.data += begin * x.stride[2];
  x.extent[2] = end - begin;
  return x;
}

bool planned(const Problem& p, const Output& expected) {
  fovea::StdThreads pool(2);
  fovea::AttentionOptions options{.causal = fovea::Causal::bottom_right, .executor = {pool, pool.threads()}};
  Output pooled, by_hand;
  fovea::attention(p.q, p.k, p.v, pooled.out, options).or_throw();

  fovea::Plan plan;
  const fovea::AttentionShape shape{
      .q_heads = heads, .kv_heads = heads, .len_q = len_q, .len_k = len_k, .dim_qk = dim, .dim_v = dim};
  fovea::make_plan(plan, shape, options).or_throw();
  std::vector<std::byte> workspace(fovea::workspace_bytes(plan, 2));
  options.workspace = workspace;
  fovea::AttentionRun run;
  fovea::prepare(run, plan, p.q, p.k, p.v, by_hand.out, options).or_throw();
  fovea::run_lane(run, 1);
  fovea::run_lane(run, 0);
  const bool good = told("a pool", pooled.out_data == expected.out_data);
  return told("a plan and its lanes", by_hand.out_data == expected.out_data && !plan.describe().empty()) && good;
}

bool merged(const Problem& p, const Output& expected) {
  const index_t cut = len_k - len_q - 5;
  Output old_keys, new_keys;
  fovea::attention(p.q, keys(p.k, 0, cut), keys(p.v, 0, cut), old_keys.out, {.lse = old_keys.lse}).or_throw();
  fovea::attention(p.q, keys(p.k, cut, len_k), keys(p.v, cut, len_k), new_keys.out,
                   {.causal = fovea::Causal::bottom_right, .lse = new_keys.lse})
      .or_throw();
  fovea::merge(old_keys.out, old_keys.lse, new_keys.out, new_keys.lse).or_throw();
  return told("merge", close(old_keys.out_data, expected.out_data) && close(old_keys.lse_data, expected.lse_data));
}

// The weights times the values are the output they belong to.
bool weighed(const Problem& p, const Output& expected) {
  const fovea::WeightRow row{0, 1, 2};
  std::vector<float> weights(len_k, NAN), again(dim, 0.f);
  fovea::attention_weights(p.q, p.k, expected.lse, {&row, 1}, {weights.data(), {1, len_k}, {len_k, 1}},
                           {.causal = fovea::Causal::bottom_right})
      .or_throw();
  for (index_t j = 0; j < len_k; ++j) {
    for (index_t d = 0; d < dim; ++d) again[static_cast<std::size_t>(d)] += weights[static_cast<std::size_t>(j)] * p.v(0, row.q_head, j, d);
  }
  const float* const out = &expected.out(0, row.q_head, row.q_index, 0);
  return told("attention_weights", close(again, std::vector<float>(out, out + dim)));
}

// The same keys in three pages, the last page first.
bool paged(const Problem& p, const Output& expected) {
  constexpr index_t pages = (len_k + page - 1) / page;
  std::vector<float> k_pages(pages * heads * page * dim, NAN), v_pages(k_pages);
  std::int32_t table[pages];
  for (index_t n = 0; n < pages; ++n) table[n] = static_cast<std::int32_t>(pages - 1 - n);
  for (index_t h = 0; h < heads; ++h) {
    for (index_t j = 0; j < len_k; ++j) {
      const index_t to = ((table[j / page] * heads + h) * page + j % page) * dim;
      std::memcpy(k_pages.data() + to, &p.k(0, h, j, 0), dim * sizeof(float));
      std::memcpy(v_pages.data() + to, &p.v(0, h, j, 0), dim * sizeof(float));
    }
  }
  fovea::Kv kv;
  kv.k = fovea::stored_rows(k_pages.data(), fovea::Format::f32, dim, heads, page);
  kv.v = fovea::stored_rows(v_pages.data(), fovea::Format::f32, dim, heads, page);
  kv.kv_heads = heads;
  kv.dim_qk = kv.dim_v = dim;
  kv.batch = pages;
  kv.len = page;
  kv.home = fovea::Home::paged;
  kv.block_table = {table, {1, pages}, {pages, 1}};
  Output result;
  const index_t used[] = {len_k};
  fovea::attention<Only>(p.q, kv, result.out, {.causal = fovea::Causal::bottom_right, .len_k = used}).or_throw();
  return told("pages", result.out_data == expected.out_data);
}

bool listed(const Problem& p, const Output& expected) {
  const std::int32_t blocks[] = {0, 1, 2, 3, 4};
  fovea::KeyLists lists;
  lists.entries = blocks;
  lists.capacity = 5;
  lists.q_block = len_q;
  lists.k_block = 8;
  Output result;
  fovea::sparse_attention(p.q, p.k, p.v, lists, result.out, {.causal = fovea::Causal::bottom_right}).or_throw();
  return told("a list of all keys", close(result.out_data, expected.out_data));
}

// Without decay and scale, the last token's output is the sum of (q . k_j) v_j.
bool recurrent(const Problem& p) {
  std::vector<float> out_data(heads * len_k * dim, NAN);
  const float gamma[heads] = {1.f, 1.f};
  const auto out = fovea::bhsd(out_data.data(), 1, heads, len_k, dim);
  fovea::retention(p.k, p.k, p.v, gamma, out, {.scale = 1.f}).or_throw();
  bool good = true;
  for (index_t h = 0; h < heads; ++h) {
    for (index_t e = 0; e < dim; ++e) {
      double sum = 0, size = 0;
      for (index_t j = 0; j < len_k; ++j) {
        for (index_t d = 0; d < dim; ++d) {
          const double term = double{p.k(0, h, len_k - 1, d)} * double{p.k(0, h, j, d)} * double{p.v(0, h, j, e)};
          sum += term;
          size += std::fabs(term);
        }
      }
      // Each term takes part in at most len_k + dim sums and two products.
      good = good && std::fabs(double{out(0, h, len_k - 1, e)} - sum) <= (len_k + dim + 2) * 0x1p-24 * size;
    }
  }
  return told("a recurrence", good);
}

bool refused() {
  float q[3 * 8] = {}, k[2 * 8] = {}, v[2 * 8] = {}, out[3 * 8] = {};
  const fovea::Status status =
      fovea::attention(fovea::bhsd<const float>(q, 1, 3, 1, 8), fovea::bhsd<const float>(k, 1, 2, 1, 8),
                       fovea::bhsd<const float>(v, 1, 2, 1, 8), fovea::bhsd(out, 1, 3, 1, 8));
  const bool named = std::strchr(status.message(), '3') != nullptr && std::strchr(status.message(), '2') != nullptr;
  std::printf("noexcept: 3 query heads on 2 kv heads: %s\n", status.message());
  return !status.ok() && named;
}

}   // namespace

int main() {
  if (one_call("noexcept") != 0) return 1;
  fovea::Status().or_throw();   // of an error it would abort

  const Problem problem;
  const Output expected;
  fovea::attention(problem.q, problem.k, problem.v, expected.out, {.causal = fovea::Causal::bottom_right, .lse = expected.lse})
      .or_throw();
  const bool right[] = {planned(problem, expected), merged(problem, expected), weighed(problem, expected), paged(problem, expected),
                        listed(problem, expected),  recurrent(problem),        refused()};
  for (const bool one : right) {
    if (!one) return 1;
  }
  return 0;
}
