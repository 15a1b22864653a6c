// SPDX-License-Identifier: Apache-2.0
// Up to how many tokens of a sequence a form is the fastest. Made by `scripts/bench forms` (bench/forms/), a line for every
// number of lanes of a vector, kind of update and state of dim x dim; not edited by hand. One core of an Intel Xeon of the
// Sapphire Rapids generation, g++ 12.2 -O3 with -march=native, -mavx2 -mfma, -msse2.
#pragma once
#include "chunk_policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct FormLimits {
  index_t lanes;
  Written written;
  bool by_key;
  index_t dim;
  index_t step_up_to;    // where the state may be worked on in its place
  index_t fused_up_to;   // where it may not
  index_t chunk;         // tokens in a chunk of more
};

inline constexpr FormLimits kFormLimits[] = {
    {16, Written::additive, false, 32, 7, 8, 32},
    {16, Written::additive, false, 64, 12, 8, 32},
    {16, Written::additive, false, 128, 10, 6, 32},
    {16, Written::additive, false, 256, 8, 5, 32},
    {16, Written::additive, true, 32, 10, 12, 32},
    {16, Written::additive, true, 64, 24, 10, 32},
    {16, Written::additive, true, 128, 12, 6, 32},
    {16, Written::additive, true, 256, 10, 6, 32},
    {16, Written::delta, false, 32, 8, 8, 32},
    {16, Written::delta, false, 64, 10, 7, 32},
    {16, Written::delta, false, 128, 6, 5, 32},
    {16, Written::delta, false, 256, 6, 4, 32},
    {16, Written::delta, true, 32, 8, 10, 16},
    {16, Written::delta, true, 64, 12, 8, 32},
    {16, Written::delta, true, 128, 7, 6, 32},
    {16, Written::delta, true, 256, 6, 5, 32},
    {16, Written::dplr, true, 32, 12, 32, 16},
    {16, Written::dplr, true, 64, 24, 12, 16},
    {16, Written::dplr, true, 128, 8, 7, 16},
    {16, Written::dplr, true, 256, 7, 6, 32},
    {8, Written::additive, false, 32, 12, 6, 32},
    {8, Written::additive, false, 64, 12, 4, 32},
    {8, Written::additive, false, 128, 12, 3, 32},
    {8, Written::additive, false, 256, 12, 3, 32},
    {8, Written::additive, true, 32, 14, 6, 32},
    {8, Written::additive, true, 64, 20, 6, 32},
    {8, Written::additive, true, 128, 12, 4, 32},
    {8, Written::additive, true, 256, 12, 5, 32},
    {8, Written::delta, false, 32, 10, 6, 32},
    {8, Written::delta, false, 64, 6, 4, 32},
    {8, Written::delta, false, 128, 5, 3, 32},
    {8, Written::delta, false, 256, 5, 3, 32},
    {8, Written::delta, true, 32, 20, 12, 16},
    {8, Written::delta, true, 64, 12, 5, 32},
    {8, Written::delta, true, 128, 6, 4, 32},
    {8, Written::delta, true, 256, 5, 3, 32},
    {8, Written::dplr, true, 32, 32, 32, 16},
    {8, Written::dplr, true, 64, 32, 6, 32},
    {8, Written::dplr, true, 128, 6, 4, 16},
    {8, Written::dplr, true, 256, 6, 4, 32},
    {4, Written::additive, false, 32, 32, 6, 32},
    {4, Written::additive, false, 64, 32, 5, 32},
    {4, Written::additive, false, 128, 20, 2, 32},
    {4, Written::additive, false, 256, 14, 2, 32},
    {4, Written::additive, true, 32, 32, 32, 32},
    {4, Written::additive, true, 64, 24, 6, 32},
    {4, Written::additive, true, 128, 32, 6, 32},
    {4, Written::additive, true, 256, 32, 6, 32},
    {4, Written::delta, false, 32, 32, 6, 16},
    {4, Written::delta, false, 64, 14, 5, 16},
    {4, Written::delta, false, 128, 10, 2, 32},
    {4, Written::delta, false, 256, 10, 2, 32},
    {4, Written::delta, true, 32, 32, 14, 16},
    {4, Written::delta, true, 64, 32, 2, 32},
    {4, Written::delta, true, 128, 14, 5, 32},
    {4, Written::delta, true, 256, 10, 2, 32},
    {4, Written::dplr, true, 32, 32, 32, 16},
    {4, Written::dplr, true, 64, 32, 14, 16},
    {4, Written::dplr, true, 128, 32, 6, 32},
    {4, Written::dplr, true, 256, 14, 5, 32},
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
