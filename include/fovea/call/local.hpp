// SPDX-License-Identifier: Apache-2.0
// The library's own memory for callers who bring none: one set per thread, kept between calls. A call from inside a call (a
// work-stealing pool may do that) finds it busy and takes memory of its own.
#pragma once
#include <memory>
#include <new>
#include <span>

#include "../core/status.hpp"
#include "../core/types.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

struct LocalBytes {
  std::unique_ptr<std::byte[]> bytes;
  std::size_t size = 0;
  bool busy = false;

  // Shorter than wanted where there is no memory: check_workspace says so.
  std::span<std::byte> workspace(std::size_t wanted) {
    if (size < wanted) {
      bytes.reset();
      bytes.reset(new (std::nothrow) std::byte[wanted]);
      size = bytes ? wanted : 0;
    }
    return {bytes.get(), size};
  }
};

template <class Local>
Local& thread_local_memory() {
  thread_local Local local;
  return local;
}

// f(Local&), Local derived from LocalBytes.
template <class Local, class F>
auto with_memory(const F& f) {
  Local& shared = thread_local_memory<Local>();
  if (shared.busy) {
    Local own;
    return f(own);
  }
  struct Busy {   // also when a pool throws
    bool& flag;
    explicit Busy(bool& to) : flag(to) { flag = true; }
    ~Busy() { flag = false; }
  } busy(shared.busy);
  return f(shared);
}

inline Status check_workspace(std::span<std::byte> workspace, std::size_t wanted) {
  if (workspace.size() >= wanted) return {};
  return Status::error(Code::workspace_too_small, "fovea: workspace has %zu bytes, the plan needs %zu", workspace.size(),
                       wanted);
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
