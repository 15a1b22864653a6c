# SPDX-License-Identifier: Apache-2.0
# What fovea's own tests, benches and examples are compiled with. None of it reaches a user of fovea::fovea.
add_library(fovea_warnings INTERFACE)
target_compile_options(fovea_warnings INTERFACE -Wall -Wextra -Wconversion -Wshadow)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # g++ 12 reports the deliberately undefined operand inside its own AVX-512 intrinsics, thousands of times through Eigen.
  target_compile_options(fovea_warnings INTERFACE -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
if(FOVEA_WERROR)
  target_compile_options(fovea_warnings INTERFACE -Werror)
endif()

if(FOVEA_ARCH_FLAGS)
  separate_arguments(fovea_arch_flags UNIX_COMMAND "${FOVEA_ARCH_FLAGS}")
elseif(FOVEA_NATIVE)
  set(fovea_arch_flags -march=native)
endif()
add_library(fovea_own INTERFACE)
target_link_libraries(fovea_own INTERFACE fovea::fovea fovea_warnings)
target_compile_options(fovea_own INTERFACE ${fovea_arch_flags})

if(FOVEA_CCACHE)
  find_program(FOVEA_CCACHE_PROGRAM ccache)
  if(FOVEA_CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
    # Without these, ccache refuses every file that is compiled with a precompiled header.
    set(CMAKE_CXX_COMPILER_LAUNCHER
        # A precompiled header knows its files by their whole content, so comments count.
        "${CMAKE_COMMAND}" -E env CCACHE_SLOPPINESS=pch_defines,time_macros CCACHE_COMMENTS=1 "${FOVEA_CCACHE_PROGRAM}")
  endif()
endif()

set(CMAKE_THREAD_PREFER_PTHREAD ON)
find_package(Threads REQUIRED)
fovea_provide_eigen()
