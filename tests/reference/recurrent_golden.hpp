// SPDX-License-Identifier: Apache-2.0
// One small problem, one head, and what every recurrent mechanism makes of it: 9 decimals, computed in double by two programs
// that share nothing (the recurrence, and a parallel, chunkwise or unrolled form).
#pragma once
#include <array>
#include <cmath>

namespace test {

inline constexpr int kGoldenLen = 13, kGoldenDimK = 4, kGoldenDimV = 3;

inline double golden_q(double t, double i) { return std::sin(0.7 * t + 1.3 * i + 0.2); }
inline double golden_raw_k(double t, double i) { return std::cos(0.9 * t + 0.5 * i + 0.4); }
inline double golden_k(double t, double i) {
  double squares = 0;
  for (int x = 0; x < kGoldenDimK; ++x) squares += golden_raw_k(t, x) * golden_raw_k(t, x);
  return golden_raw_k(t, i) / std::sqrt(squares);
}
inline double golden_v(double t, double j) { return std::sin(1.1 * t + 0.8 * j + 0.6); }
inline double golden_beta(double t) { return 0.5 + 0.4 * std::sin(0.6 * t); }
// The gate of a token is that of its channel 0.
inline double golden_gate(double t, double i) { return -0.2 - 0.15 * std::sin(0.8 * t + 0.3 * i); }
inline double golden_initial(double i, double j) { return 0.1 * std::cos(i + 2 * j); }
inline double golden_lambda(double t, double level) { return 1 + 0.5 * std::sin(0.3 * t + 0.7 * level); }

struct RecurrentGolden {
  const char* name;
  std::array<double, 3> last;   // output of the last token
  double out_squares;           // sum over all outputs
  double state_squares;         // sum over the final state; -1 = not given
};

// Of the golden numbers: half a unit of the last decimal, and room for the sum of some hundred roundings.
inline constexpr double kGoldenError = 0.5e-9 + 1e-12;

// The mechanisms run with scale 0.5 unless the test says otherwise.
inline constexpr RecurrentGolden kRecurrentGoldens[] = {
    {"linear", {0.194225170, -1.249356185, -2.020624351}, 60.191130896, 81.227359362},
    {"simple_gla", {-0.425217727, -0.851421422, -0.765690445}, 16.317197481, 12.878994186},
    {"gla", {-0.478566156, -0.918493068, -0.806144763}, 16.852566596, 14.932313843},
    {"elu", {0.233523443, 0.295464715, 0.178181055}, 5.527380326, 138.095432169},
    {"retention", {-0.023376985, -1.205096773, -1.712427787}, 45.912586545, 57.079374244},
    {"mamba2", {0.063625872, -0.037219967, -0.115494048}, 13.406315147, 1.536651387},
    {"mamba1", {0.147095248, -0.037400764, -0.153338908}, 13.009270345, 1.404248266},
    {"delta", {-0.216069271, -0.306712142, -0.278816399}, 5.084081644, 2.181793340},
    {"gated_delta", {-0.274267223, -0.349116678, -0.215769142}, 2.951260854, 1.755379184},
    {"kda", {-0.279304102, -0.348127170, -0.209558332}, 2.964021341, 1.814193098},
    {"kda, beta doubled", {-0.451029334, -0.516578454, -0.272473677}, 6.732133425, 4.109730347},
    {"comba", {-0.282727901, -0.366833365, -0.231932951}, 3.230734011, 1.922745997},
    {"delta_product", {-0.155662978, -0.224754466, -0.158464355}, 2.674113267, 1.178634994},
    {"gdn2", {-0.107985892, -0.204769728, -0.170806533}, 2.324075535, 0.849985616},
    {"rwkv7", {-0.414932585, -0.812747120, -0.722761120}, 30.678840765, 3.153106846},
    {"rwkv6", {-0.590700639, -1.622471858, -1.680690386}, 67.385621883, 14.932313843},
    {"rwkv4", {0.769825163, 0.844380459, 0.383488901}, 18.409878723, -1},
    {"mlstm", {-0.011594577, -0.632908040, -0.870307978}, 24.507142501, -1},
    {"log_linear_mamba2", {-0.581435655, -1.309814013, -1.243676768}, 57.216743131, 12.863869539},
    {"log_linear_gated_delta", {-0.419261758, -0.532976107, -0.323394302}, 13.034161895, 1.755351869},
    {"short_conv", {0.089239966, 0.289614840, 0.304388395}, 1.529497398, -1},
};
inline constexpr double kGoldenMlstmStabiliser = 1.233154867;   // m after the last token

}   // namespace test
