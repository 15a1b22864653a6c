# SPDX-License-Identifier: Apache-2.0
# fovea_xsimd_target(NAME DIRECTORIES...): an imported target with xsimd's include directories and nothing else. Debian's own
# xsimd target also links `xtl`, a library that is not needed here, has no file and would end as a failing -lxtl.
function(fovea_xsimd_target name)
  list(REMOVE_DUPLICATES ARGN)
  add_library(${name} INTERFACE IMPORTED GLOBAL)
  set_target_properties(${name} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${ARGN}")
endfunction()

# fovea_find_xsimd(NAME): NAME from the xsimd package of this machine, if there is one.
function(fovea_find_xsimd name)
  find_package(xsimd CONFIG QUIET)
  if(TARGET xsimd)
    get_target_property(directories xsimd INTERFACE_INCLUDE_DIRECTORIES)
    fovea_xsimd_target(${name} ${directories})
  endif()
endfunction()
