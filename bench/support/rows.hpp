// SPDX-License-Identifier: Apache-2.0
// What a suite is made of. A row is one thing to measure; the rows of a group are measured in turns, one window each, so
// that a minute in which the machine is slow falls on all of them. Mechanisms hand in groups and do not know how they are
// timed.
#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "memory.hpp"
#include "pool.hpp"

namespace fovea_bench {

// What a row is given to work on. `inputs` holds random numbers in [-1, 1), always the same ones.
struct RowMemory {
  std::span<const float> inputs;
  std::span<float> outputs;
  PinnedPool* pool = nullptr;
  GroupBuffers* buffers = nullptr;
};

// A row that is ready to run: memory placed, plan made.
class PreparedRow {
 public:
  virtual ~PreparedRow() = default;
  virtual void call() = 0;
  virtual double max_error() = 0;      // of the last call against the double reference, on sampled rows
  virtual std::string refusal() = 0;   // empty, or why the last call was refused
};

// Which memory limit a row is held against.
enum class Memory { cached, streamed };

// The suites a row belongs to, as a sum.
inline constexpr unsigned kCore = 1, kDecode = 2, kStorage = 4, kVariants = 8, kRecurrent = 16, kSparse = 32;

struct Row {
  std::string name;   // the problem, then threads and implementation; unique among all suites
  unsigned suites = kCore;
  int threads = 1;
  double flops = 0, bytes = 0;   // of one call
  Memory memory = Memory::cached;
  bool bf16_limit = false;   // held against the peak of bf16 dot products as well
  std::size_t input_floats = 0, output_floats = 0;
  std::function<std::unique_ptr<PreparedRow>(const RowMemory&)> prepare;
};

struct Group {
  std::string title;
  std::vector<Row> rows;
  double window = 0.05;   // seconds of one window; a row that takes longer is called once per window
  int turns = 1;          // windows per repetition of the suite; short ones are many, an interrupt spoils one whole
  bool slow = false;      // left out by --quick
};

// The tables of the mechanisms; each lives in mechanisms/<name>_bench.cpp.
std::vector<Group> softmax_groups(int max_threads);
std::vector<Group> softmax_stored_groups(int max_threads);
std::vector<Group> variant_groups(int max_threads);
std::vector<Group> block_mask_groups(int max_threads);
std::vector<Group> differential_groups(int max_threads);
std::vector<Group> elu_groups(int max_threads);
std::vector<Group> entmax_groups(int max_threads);
std::vector<Group> gated_groups(int max_threads);
std::vector<Group> head_mixtures_groups(int max_threads);
std::vector<Group> hydra_groups(int max_threads);
std::vector<Group> kv_bias_groups(int max_threads);
std::vector<Group> multi_token_groups(int max_threads);
std::vector<Group> off_by_one_groups(int max_threads);
std::vector<Group> registers_groups(int max_threads);
std::vector<Group> relative_bias_groups(int max_threads);
std::vector<Group> relu_groups(int max_threads);
std::vector<Group> shaw_groups(int max_threads);
std::vector<Group> sigmoid_groups(int max_threads);
std::vector<Group> softpick_groups(int max_threads);
std::vector<Group> transformer_xl_groups(int max_threads);
std::vector<Group> select_groups(int max_threads);
std::vector<Group> sparse_groups(int max_threads);
std::vector<Group> nsa_groups(int max_threads);
std::vector<Group> dsa_groups(int max_threads);
std::vector<Group> quest_groups(int max_threads);
std::vector<Group> adamas_groups(int max_threads);
std::vector<Group> moba_groups(int max_threads);
std::vector<Group> sparse_transformer_groups(int max_threads);
std::vector<Group> longformer_groups(int max_threads);
std::vector<Group> bigbird_groups(int max_threads);
std::vector<Group> block_local_groups(int max_threads);
std::vector<Group> star_groups(int max_threads);
std::vector<Group> vertical_slash_groups(int max_threads);
std::vector<Group> xattention_groups(int max_threads);
std::vector<Group> flex_prefill_groups(int max_threads);
std::vector<Group> mosa_groups(int max_threads);
std::vector<Group> reformer_groups(int max_threads);
std::vector<Group> routing_groups(int max_threads);
std::vector<Group> eviction_groups(int max_threads);
std::vector<Group> linear_groups(int max_threads);
std::vector<Group> log_linear_groups(int max_threads);
std::vector<Group> short_conv_groups(int max_threads);
std::vector<Group> performer_groups(int max_threads);
std::vector<Group> lolcats_groups(int max_threads);
std::vector<Group> s4d_groups(int max_threads);
std::vector<Group> rwkv4_groups(int max_threads);
std::vector<Group> mamba1_groups(int max_threads);
std::vector<Group> retention_groups(int max_threads);
std::vector<Group> lightning_groups(int max_threads);
std::vector<Group> simple_gla_groups(int max_threads);
std::vector<Group> gla_groups(int max_threads);
std::vector<Group> mamba2_groups(int max_threads);
std::vector<Group> rwkv6_groups(int max_threads);
std::vector<Group> rwkv7_groups(int max_threads);
std::vector<Group> mlstm_groups(int max_threads);
std::vector<Group> delta_groups(int max_threads);
std::vector<Group> gated_delta_groups(int max_threads);
std::vector<Group> kda_groups(int max_threads);

// All of them. Stops the program where two rows have the same name.
std::vector<Group> all_groups(int max_threads);

}  // namespace fovea_bench
