// SPDX-License-Identifier: Apache-2.0
// Memory of a known size for a call: the caller's workspace, or the library's own per thread.
#pragma once
#include "../core/workspace.hpp"
#include "../engine/deal.hpp"
#include "local.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

// f(the aligned part of at least `wanted` bytes, kAlignment of them to spare). Calls that run inside of each other have a
// Local each, or the inner one allocates every time.
template <class Local, class F>
Status in_memory(std::span<std::byte> given, std::size_t wanted, const F& f) {
  const auto run = [&](std::span<std::byte> bytes) -> Status {
    if (Status s = check_workspace(bytes, wanted); !s.ok()) return s;
    return f(aligned(bytes));
  };
  if (!given.empty()) return run(given);
  return with_memory<Local>([&](Local& local) { return run(local.workspace(wanted)); });
}

// f(memory, task) once for every task: `slice` bytes of the lane that runs it, as Bump counts them. lanes: those of the executor, or
// fewer.
template <class Local, class F>
Status deal_in_memory(const Executor& executor, int lanes, index_t tasks, std::span<std::byte> given, std::size_t slice,
                      const F& f) {
  if (Status s = check_lanes(executor); !s.ok()) return s;
  const std::size_t wanted = slice * static_cast<std::size_t>(lanes) + kAlignment;
  return in_memory<Local>(given, wanted, [&](std::span<std::byte> bytes) -> Status {
    deal(executor, lanes, tasks, [&](int lane, index_t task) {
      f(Bump(bytes.data() + slice * static_cast<std::size_t>(lane)), task);
    });
    return {};
  });
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
