// SPDX-License-Identifier: Apache-2.0
// What every front door checks of the views it is given, whatever they mean: extents, null data, address space, overlap.
#pragma once
#include <array>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "../core/kv.hpp"
#include "../core/status.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

template <class... Values>
Status invalid(const char* format, Values... values) {
  return Status::error(Code::invalid_argument, format, values...);
}
template <class... Values>
Status unsupported(const char* format, Values... values) {
  return Status::error(Code::unsupported, format, values...);
}

// cu[0] = 0, never falling, ending inside the stored length.
inline Status check_cumulative(const char* name, std::span<const index_t> cu, index_t stored) {
  if (cu.front() != 0) return invalid("fovea: %s[0] is %td, must be 0", name, cu.front());
  for (std::size_t i = 1; i < cu.size(); ++i) {
    if (cu[i] < cu[i - 1])
      return invalid("fovea: %s[%zu] = %td is less than %s[%zu] = %td", name, i, cu[i], name, i - 1, cu[i - 1]);
  }
  if (cu.back() > stored) return invalid("fovea: %s ends at %td, the tensor has %td positions", name, cu.back(), stored);
  return {};
}

// The bytes a strided block touches, as a range; false if an offset overflows. Strides in units of `unit` bytes.
struct Bytes {
  std::uintptr_t begin = 0, end = 0;
  bool overlaps(const Bytes& other) const { return begin < other.end && other.begin < end; }
};
template <std::size_t Rank>
bool bytes_of(const void* data, const std::array<index_t, Rank>& extent, const std::array<index_t, Rank>& stride, index_t unit,
              index_t last, Bytes& bytes) {
  index_t low = 0, high = 0;
  bytes = {};
  if (data == nullptr) return true;
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    if (extent[axis] == 0) return true;
    index_t reach = 0;
    if (__builtin_mul_overflow(extent[axis] - 1, stride[axis], &reach)) return false;
    if (__builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high)) return false;
  }
  const index_t limit = PTRDIFF_MAX / unit - last;
  if (low < -limit || high > limit) return false;
  const auto base = reinterpret_cast<std::uintptr_t>(data);
  bytes = {base + static_cast<std::uintptr_t>(low * unit), base + static_cast<std::uintptr_t>(high * unit + last)};
  return true;
}

template <class T, int Rank>
index_t number_bytes(const View<T, Rank>&) {
  return static_cast<index_t>(sizeof(T));
}
inline index_t number_bytes(const Operand& operand) { return row_bytes(operand.format, 1); }
inline index_t number_bytes(const Result& result) { return row_bytes(result.format, 1); }

template <class Shaped>
bool is_empty(const Shaped& view) {
  for (const index_t extent : view.extent) {
    if (extent == 0) return true;
  }
  return false;
}

// Two indices of an output never name the same element: sorted by stride, each axis steps over all smaller ones.
template <class Shaped>
bool writes_apart(const Shaped& view) {
  constexpr std::size_t kRank = std::tuple_size_v<decltype(view.extent)>;
  const auto size = [&](std::size_t axis) { return view.extent[axis] <= 1 ? 0 : std::abs(view.stride[axis]); };
  std::array<std::size_t, kRank> order;
  for (std::size_t axis = 0; axis < kRank; ++axis) {   // insertion: the call of a library sort costs more than the work
    std::size_t at = axis;
    for (; at > 0 && size(order[at - 1]) > size(axis); --at) order[at] = order[at - 1];
    order[at] = axis;
  }
  index_t covered = 0;
  if (is_empty(view)) return true;
  for (const std::size_t axis : order) {
    if (view.extent[axis] <= 1) continue;
    if (size(axis) <= covered) return false;
    covered += (view.extent[axis] - 1) * size(axis);
  }
  return true;
}

template <class Shaped>
Status check_extents(const char* name, const Shaped& view, const std::array<index_t, 4>& want, const char* against) {
  if (view.extent == want) return {};
  return invalid("fovea: %s is [%td, %td, %td, %td], must be [%td, %td, %td, %td] to fit %s", name, view.extent[0],
                 view.extent[1], view.extent[2], view.extent[3], want[0], want[1], want[2], want[3], against);
}

template <class Shaped>
Status check_data(const char* name, const Shaped& view, Bytes& bytes) {
  for (std::size_t axis = 0; axis < view.extent.size(); ++axis) {
    if (view.extent[axis] < 0) return invalid("fovea: %s has extent %td on axis %zu", name, view.extent[axis], axis);
  }
  if (view.data == nullptr && !is_empty(view)) return invalid("fovea: %s has null data", name);
  const index_t number = number_bytes(view);
  if (!bytes_of(view.data, view.extent, view.stride, number, number, bytes))
    return invalid("fovea: %s reaches beyond the address space, check its strides", name);
  return {};
}

inline Status check_innermost(const char* name, const Operand& tensor) {
  if (tensor.stride[3] == 1 || tensor.extent[3] <= 1) return {};
  return unsupported("fovea: %s has innermost stride %td, must be 1: kernels read its vectors in place; copy it first", name,
                     tensor.stride[3]);
}

// The stride of an axis of extent 1 is never used, and other libraries leave anything there.
template <class Shaped>
Shaped tidy_operand(Shaped operand) {
  for (std::size_t axis = 0; axis < 4; ++axis) {
    if (operand.extent[axis] <= 1) operand.stride[axis] = 0;
  }
  return operand;
}
struct OutputBytes {
  const char* name;
  Bytes bytes;
};

inline Status check_apart(const OutputBytes& output, const char* name, const Bytes& bytes) {
  if (!output.bytes.overlaps(bytes)) return {};
  return invalid("fovea: %s [%#zx, %#zx) overlaps %s [%#zx, %#zx)", output.name,
                 static_cast<std::size_t>(output.bytes.begin), static_cast<std::size_t>(output.bytes.end), name,
                 static_cast<std::size_t>(bytes.begin), static_cast<std::size_t>(bytes.end));
}

inline Status check_plain(const char* name, Format format) {
  if (is_plain(format)) return {};
  return unsupported("fovea: %s has format %s; queries and outputs are f32, f64, bf16 or f16", name,
                     static_cast<int>(format) < kFormats ? name_of(format) : "outside the enum");
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
