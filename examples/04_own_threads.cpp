// SPDX-License-Identifier: Apache-2.0
// The library never starts a thread. Two ways to lend it yours: an executor (three lines around your pool), or run_lane from
// inside a parallel region you already stand in. The result has the same bits either way, with any number of threads.
#include <cstddef>
#include <thread>

#include "example.hpp"

// A pool is anything with run(lanes, f) that calls f(0) ... f(lanes - 1) and returns when all are done. This one starts
// threads on every call, which costs tens of microseconds: real ones are in fovea/adapters.
struct OwnPool {
  void run(int lanes, fovea::LaneFunction f) {
    std::vector<std::thread> threads;
    for (int lane = 1; lane < lanes; ++lane) threads.emplace_back([=] { f(lane); });
    f(0);
    for (std::thread& thread : threads) thread.join();
  }
};

int main() {
  const fovea::index_t heads = 6, len = 200, dim = 64, size = heads * len * dim;
  const std::vector<float> q_data = example::random_values(size, 1), k_data = example::random_values(size, 2),
                           v_data = example::random_values(size, 3);
  std::vector<float> serial_data(q_data.size()), pooled_data(q_data.size()), region_data(q_data.size());
  const auto q = fovea::bhsd(q_data.data(), 1, heads, len, dim), k = fovea::bhsd(k_data.data(), 1, heads, len, dim),
             v = fovea::bhsd(v_data.data(), 1, heads, len, dim);
  const auto serial = fovea::bhsd(serial_data.data(), 1, heads, len, dim);
  fovea::AttentionOptions options{.causal = fovea::Causal::top_left};
  if (example::refused(fovea::attention(q, k, v, serial, options))) return 1;

  OwnPool pool;
  options.executor = {pool, 3};
  if (example::refused(fovea::attention(q, k, v, fovea::bhsd(pooled_data.data(), 1, heads, len, dim), options))) return 1;

  // Inside a region of your own: one plan serves every layer with these lengths, each call is prepared once, and every
  // thread takes one lane. The workspace is yours, so nothing is allocated.
  const int lanes = 2;
  fovea::Plan plan;
  const fovea::AttentionShape shape{
      .q_heads = heads, .kv_heads = heads, .len_q = len, .len_k = len, .dim_qk = dim, .dim_v = dim};
  if (example::refused(fovea::make_plan(plan, shape, options))) return 1;
  std::vector<std::byte> workspace(fovea::workspace_bytes(plan, lanes));
  options.workspace = workspace;
  options.executor = {pool, lanes};
  fovea::AttentionRun run;
  const auto out = fovea::bhsd(region_data.data(), 1, heads, len, dim);
  if (example::refused(fovea::prepare(run, plan, q, k, v, out, options))) return 1;
  std::thread other([&run] { fovea::run_lane(run, 1); });
  fovea::run_lane(run, 0);
  other.join();

  std::printf("workspace for %d lanes: %zu bytes\n", lanes, workspace.size());
  if (pooled_data != serial_data || region_data != serial_data) {
    std::printf("serial, pool and own region differ: WRONG\n");
    return 1;
  }
  return example::verdict("one result from three ways to run", example::error_of(q, k, v, serial, options));
}
