// SPDX-License-Identifier: Apache-2.0
#include "shared_kernels.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

template Status kernels_of<SoftmaxLanes, Formats<Format::f32>>(AttentionRun& run);
template Status kernels_of<SoftmaxLanes, Formats<Format::f32, Format::f32>>(AttentionRun& run);
template Status kernels_of<ListSoftmaxLanes, Formats<Format::f32>>(AttentionRun& run);
template Status kernels_of<ListSoftmaxLanes, Formats<Format::f32, Format::f32>>(AttentionRun& run);

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
