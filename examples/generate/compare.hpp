// SPDX-License-Identifier: Apache-2.0
// The same engine with three attentions: fovea, the Eigen baseline (two matrix products and a softmax per block of queries)
// and three scalar loops.
#pragma once
#include <optional>
#include <string>

#include "engine.hpp"

namespace generate {

// "fovea", "eigen" or "scalar".
std::optional<Attention> attention_named(const std::string& name);

// Prints the tables; the exit status says whether all attentions agreed.
int compare(const Model& model, fovea::Executor executor);

}   // namespace generate
