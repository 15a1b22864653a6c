// SPDX-License-Identifier: Apache-2.0
// The engine over plain f32 tensors, compiled once for all test files (shared_kernels.cpp) and declared in the precompiled
// header: a file that calls fovea::attention compiles in 4 instead of 10 s.
#pragma once
#include "fovea/sparse.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

extern template Status kernels_of<SoftmaxLanes, Formats<Format::f32>>(AttentionRun& run);
extern template Status kernels_of<SoftmaxLanes, Formats<Format::f32, Format::f32>>(AttentionRun& run);
extern template Status kernels_of<ListSoftmaxLanes, Formats<Format::f32>>(AttentionRun& run);
extern template Status kernels_of<ListSoftmaxLanes, Formats<Format::f32, Format::f32>>(AttentionRun& run);

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
