// SPDX-License-Identifier: Apache-2.0
// fovea::attention and fovea::cascade_attention for every format that is measured: compiled once, in stored_calls.cpp.
#pragma once
#include <span>

#include "fovea/attention.hpp"
#include "fovea/cascade.hpp"

namespace fovea_bench {

fovea::Status stored_attention(const fovea::Plan& plan, const fovea::Operand& q, const fovea::Kv& kv,
                               const fovea::Result& out, const fovea::AttentionOptions& options);
fovea::Status stored_cascade(const fovea::Operand& q, std::span<const fovea::CascadeLevel> levels, const fovea::Result& out,
                             const fovea::AttentionOptions& options);

}   // namespace fovea_bench
