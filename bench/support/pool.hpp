// SPDX-License-Identifier: Apache-2.0
// Threads that stay where they are: lane i always runs on the i-th core. Unpinned, two threads were seen on one core for
// whole runs. Workers spin between calls, so a call of a few microseconds is not charged for waking a thread.
#pragma once
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "fovea/core/executor.hpp"

namespace fovea_bench {

// One CPU per physical core, of those this process may use.
inline std::vector<int> usable_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  sched_getaffinity(0, sizeof allowed, &allowed);
  std::vector<int> cores;
  std::vector<std::string> seen;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::string siblings = std::to_string(cpu);
    const std::string path = "/sys/devices/system/cpu/cpu" + siblings + "/topology/thread_siblings_list";
    if (std::FILE* const file = std::fopen(path.c_str(), "r")) {
      char text[256] = "";
      if (std::fgets(text, sizeof text, file) != nullptr) siblings = text;
      std::fclose(file);
    }
    bool known = false;
    for (const std::string& other : seen) known = known || other == siblings;
    if (known) continue;
    seen.push_back(siblings);
    cores.push_back(cpu);
  }
  return cores;
}

class PinnedPool {
 public:
  // The calling thread becomes lane 0.
  explicit PinnedPool(int threads) {
    const std::vector<int> cores = usable_cores();
    for (int lane = 1; lane < threads; ++lane) workers_.push_back(std::make_unique<Worker>());
    for (int lane = 1; lane < threads; ++lane) {
      Worker& worker = *workers_[static_cast<std::size_t>(lane - 1)];
      const int core = cores[static_cast<std::size_t>(lane) % cores.size()];
      worker.thread = std::thread([&worker, lane, core] { serve(worker, lane, core); });
    }
    pin(cores[0]);
  }
  ~PinnedPool() {
    for (const auto& worker : workers_) {
      worker->stop.store(true);
      worker->job.store(&worker->nothing);
      worker->job.notify_one();
      worker->thread.join();
    }
  }
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  // The shape fovea::Executor asks for. Lanes beyond the threads of the pool run on lane 0's thread.
  void run(int lanes, fovea::LaneFunction f) {
    const int helped = std::min(lanes - 1, static_cast<int>(workers_.size()));
    for (int lane = 1; lane <= helped; ++lane) {
      Worker& worker = *workers_[static_cast<std::size_t>(lane - 1)];
      worker.job.store(&f, std::memory_order_release);
      worker.job.notify_one();
    }
    f(0);
    for (int lane = helped + 1; lane < lanes; ++lane) f(lane);
    for (int lane = 1; lane <= helped; ++lane) {
      while (workers_[static_cast<std::size_t>(lane - 1)]->job.load(std::memory_order_acquire) != nullptr) pause();
    }
  }

 private:
  struct alignas(64) Worker {
    std::atomic<const fovea::LaneFunction*> job{nullptr};   // null = idle; the worker clears it when the lane is done
    std::atomic<bool> stop{false};
    static void do_nothing(int) {}
    void (*nothing_body)(int) = do_nothing;
    fovea::LaneFunction nothing{nothing_body};
    std::thread thread;
  };

  static void pin(int core) {
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(core, &only);
    sched_setaffinity(0, sizeof only, &only);
  }

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  static void serve(Worker& worker, int lane, int core) {
    pin(core);
    for (;;) {
      const fovea::LaneFunction* job = nullptr;
      // About a millisecond awake: rows with one thread let the others sleep, rows with more never wait that long.
      for (int spin = 0; spin < 30000 && (job = worker.job.load(std::memory_order_acquire)) == nullptr; ++spin) pause();
      if (job == nullptr) {
        worker.job.wait(nullptr, std::memory_order_acquire);
        continue;
      }
      if (worker.stop.load()) return;
      (*job)(lane);
      worker.job.store(nullptr, std::memory_order_release);
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace fovea_bench
