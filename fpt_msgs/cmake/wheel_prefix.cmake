# SPDX-License-Identifier: MIT
# Included by project() when fpt_msgs is built as a wheel (see pyproject.toml); colcon never reads it.

# rosidl finds its type supports through the ament index of the environment the build runs in.
find_package(ament_cmake_core REQUIRED)
get_filename_component(wheel_prefix "${ament_cmake_core_DIR}/../../.." ABSOLUTE)
set(ENV{AMENT_PREFIX_PATH} "${wheel_prefix}")

# Imported targets of the ROS wheels name include folders of the machine those wheels were built on.
# CMake refuses to generate with them, so drop the absolute ones that do not exist here. Deferred to
# the end of the configure step, when every find_package() has made its targets.
function(fpt_drop_missing_include_folders)
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(folders ${target} INTERFACE_INCLUDE_DIRECTORIES)
    if(folders)
      set(kept "")
      foreach(folder IN LISTS folders)
        if(NOT IS_ABSOLUTE "${folder}" OR EXISTS "${folder}")
          list(APPEND kept "${folder}")
        endif()
      endforeach()
      set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${kept}")
    endif()
  endforeach()
endfunction()

cmake_language(DEFER CALL fpt_drop_missing_include_folders)
