// SPDX-License-Identifier: Apache-2.0
// fovea_onnx DIRECTORY: runs the backend node tests in it (docs/onnx.md), one line per case, and counts them in the last.
#include "onnx_case.hpp"

int main(int count, char** words) {
  if (count != 2) {
    std::fprintf(stderr, "usage: fovea_onnx DIRECTORY of cases, or of one\n");
    return 2;
  }
  return onnx_tool::run_folder(words[1], stdout, stderr);
}
