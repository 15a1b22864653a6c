// SPDX-License-Identifier: Apache-2.0
// fovea_onnx DIRECTORY: runs the backend node tests in it (docs/onnx.md), one line per case, and counts them in the last.
#include <cstdio>

#include "onnx_case.hpp"

int main(int count, char** words) {
  if (count != 2) {
    std::fprintf(stderr, "usage: fovea_onnx DIRECTORY of cases, or of one\n");
    return 2;
  }
  std::filesystem::path root = std::filesystem::absolute(words[1]).lexically_normal();
  if (!root.has_filename()) root = root.parent_path();   // "cases/"
  std::vector<std::filesystem::path> cases = onnx_tool::folders(root, "");
  if (onnx_tool::is_case(root)) cases = {root};
  if (cases.empty()) {
    std::fprintf(stderr, "fovea_onnx: %s is no folder of cases\n", words[1]);
    return 2;
  }
  constexpr const char* kWords[] = {"passed", "failed", "unsupported"};
  int counts[] = {0, 0, 0};
  for (const std::filesystem::path& directory : cases) {
    const onnx_tool::Outcome outcome = onnx_tool::run_case(directory);
    const auto verdict = static_cast<std::size_t>(outcome.verdict);
    ++counts[verdict];
    const std::string name = directory.filename().string();
    if (outcome.verdict == onnx_tool::Verdict::passed) {
      std::printf("%-12s %s  (largest error %.1e)\n", kWords[verdict], name.c_str(), outcome.worst);
    } else {
      std::printf("%-12s %s: %s\n", kWords[verdict], name.c_str(), outcome.reason.c_str());
    }
  }
  std::printf("%d passed, %d failed, %d unsupported\n", counts[0], counts[1], counts[2]);
  return counts[1] == 0 ? 0 : 1;
}
