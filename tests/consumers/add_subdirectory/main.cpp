// SPDX-License-Identifier: Apache-2.0
#include "../one_call.hpp"

int main() { return one_call("add_subdirectory"); }
