# SPDX-License-Identifier: Apache-2.0
# fovea_xsimd_target(NAME DIRECTORIES...): an imported target with xsimd's include directories and nothing else. Debian's own
# xsimd target also links `xtl`, a library that is not needed here, has no file and would end as a failing -lxtl.
function(fovea_xsimd_target name)
  list(REMOVE_DUPLICATES ARGN)
  add_library(${name} INTERFACE IMPORTED GLOBAL)
  set_target_properties(${name} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${ARGN}")
endfunction()

# fovea_find_xsimd(NAME): NAME from the xsimd package of this machine, if there is one and it is not too old. The version is not
# asked of find_package: xsimd's own version file refuses every other major version than the one asked for. A package that names
# no version is taken; simd/vectors.hpp looks at the headers themselves.
function(fovea_find_xsimd name)
  find_package(xsimd CONFIG QUIET)
  if(xsimd_VERSION AND xsimd_VERSION VERSION_LESS 8.1)
    message(STATUS "fovea: xsimd ${xsimd_VERSION} in ${xsimd_DIR} is too old, 8.1 or newer is needed")
  elseif(TARGET xsimd)
    get_target_property(directories xsimd INTERFACE_INCLUDE_DIRECTORIES)
    fovea_xsimd_target(${name} ${directories})
  endif()
endfunction()
