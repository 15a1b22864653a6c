// SPDX-License-Identifier: Apache-2.0
// Executor: a non-owning reference to "call f(0) ... f(lanes - 1), concurrently or one after the other, and return when all
// are done". The library never starts a thread; adapters/ wraps OpenMP, oneTBB, Eigen's pool and std::thread, and a pool of
// your own needs three lines (examples/04_own_threads.cpp).
#pragma once
#include <type_traits>

#include "types.hpp"

namespace fovea {
inline namespace v0 {

// A borrowed callable of one lane index.
class LaneFunction {
 public:
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, LaneFunction>)
  FOVEA_DATA_INLINE LaneFunction(F& f)
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, int lane) { (*static_cast<F*>(object))(lane); }) {}
  FOVEA_DATA_INLINE void operator()(int lane) const { call_(object_, lane); }

 private:
  void* object_;
  void (*call_)(void*, int);
};

class Executor {
 public:
  // Serial: one lane, on the calling thread.
  FOVEA_DATA_INLINE Executor() {}   // a defaulted one would be a symbol without an instruction set in its name

  // `pool` is anything with run(int lanes, LaneFunction f); it must outlive the executor. `lanes` is how many slices of the
  // workspace a call may use, normally the number of threads.
  template <class Pool>
  FOVEA_DATA_INLINE Executor(Pool& pool, int lanes)
      : pool_(&pool), run_([](void* self, int n, LaneFunction f) { static_cast<Pool*>(self)->run(n, f); }), lanes_(lanes) {}

  FOVEA_DATA_INLINE int lanes() const { return lanes_; }
  FOVEA_DATA_INLINE void run(LaneFunction f) const { run(lanes_, f); }
  FOVEA_DATA_INLINE void run(int lanes, LaneFunction f) const {
    if (run_ != nullptr) return run_(pool_, lanes, f);
    for (int lane = 0; lane < lanes; ++lane) f(lane);
  }

 private:
  void* pool_ = nullptr;
  void (*run_)(void*, int, LaneFunction) = nullptr;
  int lanes_ = 1;
};

}   // namespace v0
}   // namespace fovea
