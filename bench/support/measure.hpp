// SPDX-License-Identifier: Apache-2.0
// Times the rows of a group in turns and holds every window against the machine's limits, probed just before and after it.
#pragma once
#include <string>
#include <vector>

#include "bandwidth.hpp"
#include "memory.hpp"
#include "peak.hpp"
#include "rows.hpp"

namespace fovea_bench {

struct Limits {
  double gflops = 0, gbps = 0, bf16_gflops = 0;
};

struct Effort {
  int repetitions = 5;
  double window_scale = 1;

  int windows(const Group& group) const { return repetitions * group.turns; }
};

// One window of one row.
struct Sample {
  double seconds = 0;   // per call
  Limits limit;         // gbps only for streamed rows, bf16_gflops only for rows with that limit
};

struct Result {
  std::string name, refusal;
  double flops = 0, bytes = 0, max_error = 0;
  bool streamed = false, bf16_limit = false;
  double allocations = 0;   // per call, after the first one
  std::vector<Sample> samples;

  double gflops(const Sample& sample) const { return flops / sample.seconds * 1e-9; }
  double gbps(const Sample& sample) const { return bytes / sample.seconds * 1e-9; }
  double of_peak(const Sample& sample) const { return gflops(sample) / sample.limit.gflops; }
  double of_bf16_peak(const Sample& sample) const { return bf16_limit ? gflops(sample) / sample.limit.bf16_gflops : 0; }
  double of_bandwidth(const Sample& sample) const { return streamed ? gbps(sample) / sample.limit.gbps : 0; }
};

double median(std::vector<double> values);

class Machine {
 public:
  explicit Machine(int threads) : threads_(threads), pool_(threads) {}

  int threads() const { return threads_; }
  PinnedPool& pool() { return pool_; }

  // The best of several long windows: what the machine can do in a good moment.
  Limits careful_limits(int threads);
  // Next to a measurement: two FMA windows of so many seconds, as many of bf16 dot products where rows are held against
  // them, and some 10 ms of reading where rows stream.
  Limits near_limits(int threads, const Result& row, double seconds);

  // Valid until the next call.
  RowMemory memory_for(std::size_t input_floats, std::size_t output_floats);

 private:
  int threads_;
  PinnedPool pool_;
  BandwidthProbe bandwidth_;
  HugeBuffer inputs_, outputs_;
};

// Results in the order of the rows.
std::vector<Result> measure(Machine& machine, const Group& group, const Effort& effort);

}  // namespace fovea_bench
