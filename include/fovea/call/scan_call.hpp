// SPDX-License-Identifier: Apache-2.0
// What the front doors of the elementwise scans (engine/scan.hpp) share: checks of their operands, workspace and lanes.
#pragma once
#include "../engine/scan.hpp"
#include "in_memory.hpp"
#include "recurrent_call.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

inline constexpr index_t kMaxScanChannels = 1 << 20;

// [batch, heads, pos, width] of a plain format, noted as read.
inline Status check_scan_input(const char* name, const Operand& x, const std::array<index_t, 4>& want, const char* against,
                               Memory& memory) {
  if (Status s = check_plain(name, x.format); !s.ok()) return s;
  if (Status s = check_extents(name, x, want, against); !s.ok()) return s;
  return memory.reads(name, x);
}

inline Status check_scan_output(const char* name, const Result& x, const std::array<index_t, 4>& want, const char* against,
                                Memory& memory) {
  if (Status s = check_plain(name, x.format); !s.ok()) return s;
  if (Status s = check_extents(name, x, want, against); !s.ok()) return s;
  return memory.writes(name, x);
}

inline Status check_scan_channels(const char* name, index_t channels) {
  if (channels >= 1 && channels <= kMaxScanChannels) return {};
  return unsupported("fovea: %s has %td channels, 1 to %td are supported", name, channels, kMaxScanChannels);
}

// A parameter that may not be absent.
template <class T, int Rank>
Status check_parameter(const char* name, const View<T, Rank>& view, const decltype(View<T, Rank>::extent)& want,
                       Memory& memory) {
  if (view.data == nullptr) return invalid("fovea: %s has null data", name);
  return check_like(name, view, want, memory);
}

template <class Scan>
std::size_t scan_slice(const Scan& scan) {   // of a lane
  Bump bump;
  scan.carve(bump);
  return bump.used();
}
template <class Scan>
std::size_t scan_bytes(const Scan& scan, int lanes) {
  return scan_slice(scan) * static_cast<std::size_t>(lanes) + kAlignment;
}

template <class Scan>
Status run_scan(Scan scan, const RecurrentOptions<float>& options) {
  const int lanes = options.executor.lanes();
  scan.width = scan.width_for(lanes);
  if (options.plan != nullptr)   // a scan has one form
    *options.plan = {.form = RecurrentForm::fused, .chunk = 1, .tasks = scan.tasks()};
  return deal_in_memory<LocalBytes>(options.executor, lanes, scan.tasks(), options.workspace, scan_slice(scan),
                                    [&](Bump bump, index_t task) { scan.run(task, scan.carve(bump)); });
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
