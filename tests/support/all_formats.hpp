// SPDX-License-Identifier: Apache-2.0
// fovea::attention and fovea::cascade_attention for every storage format, compiled once for all test files: 11 s, where a
// test file without kernels of its own takes 4 s.
#pragma once
#include <span>

#include "fovea/attention.hpp"
#include "fovea/cascade.hpp"

namespace test {

fovea::Status attend_all(const fovea::Operand& q, const fovea::Kv& kv, const fovea::Result& out,
                         const fovea::AttentionOptions& options = {});
fovea::Status attend_all(const fovea::Plan& plan, const fovea::Operand& q, const fovea::Kv& kv, const fovea::Result& out,
                         const fovea::AttentionOptions& options);
fovea::Status cascade_all(const fovea::Operand& q, std::span<const fovea::CascadeLevel> levels, const fovea::Result& out,
                          const fovea::AttentionOptions& options);
fovea::Status cascade_all(const fovea::CascadePlan& plan, const fovea::Operand& q,
                          std::span<const fovea::CascadeLevel> levels, const fovea::Result& out,
                          const fovea::AttentionOptions& options);

}   // namespace test
