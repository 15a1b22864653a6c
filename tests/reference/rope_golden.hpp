// SPDX-License-Identifier: Apache-2.0
// Frequencies computed elsewhere: Hugging Face transformers 5.23, modeling_rope_utils.py, run in fp64 (it runs in fp32 by
// default), with the parameters of well-known models. Fixed NTK: its formula in Python. Cosines and sines of large angles: with 60
// digits (mpmath).
#pragma once
#include <cmath>
#include <utility>
#include <vector>

#include "fovea/core/rope.hpp"

namespace test {

struct RopeGolden {
  const char* name;
  fovea::RopeOptions options;
  double attention_factor;
  std::vector<std::pair<std::size_t, double>> inv_freq;   // (pair, radians per position)
};

inline std::vector<double> rope_pair_factors(double slope) {
  std::vector<double> factors;
  for (int m = 0; m < 48; ++m) factors.push_back(1 + slope * m);
  return factors;
}

inline std::vector<RopeGolden> rope_goldens() {
  using fovea::RopeScaling;
  static const std::vector<double> short_list = rope_pair_factors(0.01), long_list = rope_pair_factors(0.5);
  return {
      {"base 1e7, a quarter of 256",
       {.rotary_dim = 64, .base = 1e7},
       1,
       {{0, 1.}, {1, 0.60429639023813275}, {15, 0.00052329911468149473}, {31, 1.6548170999431816e-07}}},
      {"linear",
       {.rotary_dim = 64, .scaling = RopeScaling::linear, .factor = 4},
       1,
       {{0, 0.25}, {1, 0.18747355233311397}, {15, 0.0033338035804083102}, {31, 3.3338035804083099e-05}}},
      {"NTK",
       {.rotary_dim = 64, .scaling = RopeScaling::ntk, .factor = 4},
       1,
       {{0, 1.}, {1, 0.71709832810481255}, {15, 0.0068183713307479821}, {31, 3.3338035804083106e-05}}},
      {"dynamic NTK at four times the length",
       {.rotary_dim = 64, .scaling = RopeScaling::dynamic_ntk, .factor = 4, .original_len = 4096, .current_len = 16384},
       1,
       {{0, 1.}, {1, 0.69034525395817814}, {15, 0.0038547405471816561}, {31, 1.025785717048711e-05}}},
      {"dynamic NTK at 6000 of 4096",
       {.rotary_dim = 64, .scaling = RopeScaling::dynamic_ntk, .factor = 2, .original_len = 4096, .current_len = 6000},
       1,
       {{0, 1.}, {1, 0.73416004017874181}, {15, 0.0097019970214952747}, {31, 6.9105564095913152e-05}}},
      {"dynamic NTK within the length of training",
       {.rotary_dim = 64, .scaling = RopeScaling::dynamic_ntk, .factor = 2, .original_len = 4096, .current_len = 100},
       1,
       {{0, 1.}, {1, 0.74989420933245587}, {15, 0.013335214321633241}, {31, 0.0001333521432163324}}},
      {"YaRN of DeepSeek-V3",
       {.rotary_dim = 64, .scaling = RopeScaling::yarn, .factor = 40, .original_len = 4096, .attention_factor = 1},
       1,
       {{0, 1.},
        {10, 0.056234132519034905},
        {11, 0.039006926567143857},
        {15, 0.0083345089510207769},
        {16, 0.0055},
        {22, 0.00017782794100389219},
        {23, 3.3338035804083099e-05},
        {31, 3.3338035804083101e-06}}},
      {"YaRN of gpt-oss",
       {.rotary_dim = 64,
        .base = 150000,
        .scaling = RopeScaling::yarn,
        .factor = 32,
        .original_len = 4096,
        .round_range = false},
       1.3465735902799727,
       {{0, 1.},
        {8, 0.050813274815461475},
        {9, 0.031705696184663769},
        {12, 0.0067949594897322189},
        {15, 0.0010526021013863359},
        {17, 0.00012931870124506317},
        {18, 3.8308812373753384e-05},
        {31, 3.0235114281192144e-07}}},
      {"YaRN of Qwen2.5",
       {.rotary_dim = 128, .base = 1e6, .scaling = RopeScaling::yarn, .factor = 4, .original_len = 32768},
       1.1386294361119891,
       {{0, 1.},
        {23, 0.0069783058485986633},
        {24, 0.0053753214907901019},
        {30, 0.0010643609812470017},
        {35, 0.00024625840690893869},
        {39, 6.4903943208370293e-05},
        {40, 4.4456985250973067e-05},
        {63, 3.1023444018792988e-07}}},
      {"Llama 3.1",
       {.rotary_dim = 128, .base = 5e5, .scaling = RopeScaling::llama3, .factor = 8, .original_len = 8192},
       1,
       {{0, 1.},
        {28, 0.0032114459947525913},
        {29, 0.0021665707635033591},
        {32, 0.00052484616099295468},
        {35, 9.5562123539646833e-05},
        {36, 7.7846552739324498e-05},
        {63, 3.0689259889145111e-07}}},
      {"LongRoPE, short list",
       {.rotary_dim = 96, .scaling = RopeScaling::longrope, .factor = 32, .original_len = 4096, .pair_factors = short_list},
       1.1902380714238083,
       {{0, 1.}, {1, 0.81723186660199842}, {20, 0.017953622416932359}, {47, 8.2416847525754335e-05}}},
      {"LongRoPE, long list",
       {.rotary_dim = 96, .scaling = RopeScaling::longrope, .factor = 32, .original_len = 4096, .pair_factors = long_list},
       1.1902380714238083,
       {{0, 1.}, {1, 0.55026945684534567}, {20, 0.0019585769909380756}, {47, 4.9450108515452603e-06}}},
  };
}

struct RopeAngle {
  fovea::index_t pos, rotary_dim;
  double base;
  fovea::index_t pair;
  double cos, sin;
};

inline constexpr RopeAngle kRopeAngles[] = {
    {1, 128, 10000, 0, 0.54030230586813972, 0.84147098480789651},
    {1, 128, 10000, 1, 0.64790587226684075, 0.76172040847160203},
    {1, 128, 10000, 17, 0.99625287145658152, 0.0864882426374595},
    {1, 128, 500000, 63, 0.99999999999698614, 2.4551407911291424e-6},
    {1, 64, 150000, 5, 0.98796161609065073, 0.15469920856794863},
    {1000003, 128, 10000, 0, -0.87798649158500287, 0.4786854087960669},
    {1000003, 128, 10000, 1, 0.86414955207490692, -0.50323508586816334},
    {1000003, 128, 10000, 17, -0.25845780928370272, 0.96602254674529681},
    {1000003, 128, 500000, 63, -0.7735043451796953, 0.63379099708668218},
    {1000003, 64, 150000, 5, -0.99963733730936067, 0.02692942363013883},
    {-777777, 128, 10000, 0, 0.94262781877770301, -0.33384546614622444},
    {-777777, 128, 10000, 1, 0.46733100849036806, -0.88408242178168859},
    {-777777, 128, 10000, 17, -0.99412476904023225, 0.10824021240142169},
    {-777777, 128, 500000, 63, -0.33231377625665974, -0.94316888949436765},
    {-777777, 64, 150000, 5, 0.98799471792285187, 0.15448766085530704},
    {16777217, 128, 10000, 0, 0.99438396391365224, 0.10583256734754364},
    {16777217, 128, 10000, 1, 0.97770549627152139, 0.20998086236716446},
    {16777217, 128, 10000, 17, 0.32906645765341488, -0.9443067650120025},
    {16777217, 128, 500000, 63, -0.93946686399626242, -0.34263976922276284},
    {16777217, 64, 150000, 5, 0.71468006260608931, -0.69945150519057164},
};

// An angle computed in double is off by this much at most: the power's exponent is rounded (times ln base, below 20), the
// power, the stretching and the product are within a few units each.
inline double rope_angle_error(double angle) { return std::abs(angle) * 64 * 0x1p-53; }

}   // namespace test
