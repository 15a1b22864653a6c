// SPDX-License-Identifier: Apache-2.0
// What the units of different instruction sets share with main.cpp: floor 0 data and two functions each.
#pragma once
#include <fovea/attention.hpp>

struct Problem {
  fovea::Tensor<const float> q, k, v;
  fovea::Tensor<float> out;
  fovea::AttentionOptions options;
};

bool odr_baseline_run(const Problem& problem);
const char* odr_baseline_arch();
bool odr_other_run(const Problem& problem);
const char* odr_other_arch();
