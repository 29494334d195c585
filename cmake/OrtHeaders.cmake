# Finds onnxruntime_c_api.h, the only file of ONNX Runtime that the native kernels are built with.
# They do not link to the runtime: one build serves every runtime from 1.21 on.
#
# Looked for in this order:
#   1. ORT_INCLUDE_DIR, a CMake or an environment variable
#   2. the system's include folders
#   3. the Debian package libonnxruntime-dev, fetched by apt-get into the build folder
#   4. the public repository of ONNX Runtime, tag v1.21.0
# What is fetched is checked against a SHA-256 and stays in the build folder.

set(SPLITQ_ORT_API 21)
set(SPLITQ_ORT_HEADER onnxruntime_c_api.h)
set(SPLITQ_ORT_SHA256 7783e9664bdb0b1b36145b5c8587dd1bc9a399aa000edf2e3dd03003cafc6882)
set(SPLITQ_ORT_URL
  https://raw.githubusercontent.com/microsoft/onnxruntime/v1.21.0/include/onnxruntime/core/session/onnxruntime_c_api.h)
set(SPLITQ_ORT_SUFFIXES onnxruntime onnxruntime/core/session include include/onnxruntime
  include/onnxruntime/core/session)
set(SPLITQ_ORT_SCRIPTS ${CMAKE_CURRENT_LIST_DIR})

# Sets `result` to the folder, or to an empty string.
function(splitq_find_ort_headers result)
  set(cache ${CMAKE_BINARY_DIR}/ort_headers)
  _splitq_given_headers(folder)
  if(NOT folder)
    _splitq_system_headers(folder)
  endif()
  if(NOT folder AND EXISTS ${cache}/${SPLITQ_ORT_HEADER})
    set(folder ${cache})
  endif()
  if(NOT folder)
    _splitq_debian_headers(${cache} folder)
  endif()
  if(NOT folder)
    _splitq_repository_headers(${cache} folder)
  endif()
  if(folder)
    message(STATUS "ONNX Runtime headers: ${folder}")
  endif()
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()

# A folder that the user names must be right: a typing error must not lead to another header.
function(_splitq_given_headers result)
  set(given "${ORT_INCLUDE_DIR}")
  if(NOT given)
    set(given "$ENV{ORT_INCLUDE_DIR}")
  endif()
  set(${result} "" PARENT_SCOPE)
  if(given)
    find_path(SPLITQ_ORT_GIVEN ${SPLITQ_ORT_HEADER} PATHS ${given}
      PATH_SUFFIXES ${SPLITQ_ORT_SUFFIXES} NO_DEFAULT_PATH NO_CACHE)
    _splitq_api_version("${SPLITQ_ORT_GIVEN}" version)
    if(version LESS SPLITQ_ORT_API)
      message(FATAL_ERROR "ORT_INCLUDE_DIR: expected a folder with ${SPLITQ_ORT_HEADER} of API "
        "${SPLITQ_ORT_API} or newer, got ${given} with API ${version}; correct or unset it.")
    endif()
    set(${result} "${SPLITQ_ORT_GIVEN}" PARENT_SCOPE)
  endif()
endfunction()

function(_splitq_system_headers result)
  find_path(SPLITQ_ORT_SYSTEM ${SPLITQ_ORT_HEADER} PATH_SUFFIXES ${SPLITQ_ORT_SUFFIXES} NO_CACHE)
  _splitq_api_version("${SPLITQ_ORT_SYSTEM}" version)
  set(${result} "" PARENT_SCOPE)
  if(NOT version LESS SPLITQ_ORT_API)
    set(${result} "${SPLITQ_ORT_SYSTEM}" PARENT_SCOPE)
  endif()
endfunction()

# Debian trixie ships the header in a package that apt-get can fetch on any Debian, also by a user
# without rights, and from the mirror that the machine is set up with.
function(_splitq_debian_headers cache result)
  set(${result} "" PARENT_SCOPE)
  find_program(SPLITQ_APT_GET apt-get NO_CACHE)
  find_program(SPLITQ_DPKG_DEB dpkg-deb NO_CACHE)
  if(NOT SPLITQ_APT_GET OR NOT SPLITQ_DPKG_DEB)
    return()
  endif()
  set(work ${CMAKE_BINARY_DIR}/ort_debian)
  execute_process(COMMAND sh ${SPLITQ_ORT_SCRIPTS}/fetch_debian.sh ${work} trixie amd64 libonnxruntime-dev
    RESULT_VARIABLE failed OUTPUT_VARIABLE log ERROR_VARIABLE log)
  if(failed)
    message(STATUS "ONNX Runtime headers: not from Debian\n${log}")
    return()
  endif()
  _splitq_accept(${work}/usr/include/onnxruntime/${SPLITQ_ORT_HEADER} ${cache} accepted)
  set(${result} "${accepted}" PARENT_SCOPE)
endfunction()

function(_splitq_repository_headers cache result)
  set(${result} "" PARENT_SCOPE)
  set(file ${CMAKE_BINARY_DIR}/ort_repository/${SPLITQ_ORT_HEADER})
  file(DOWNLOAD ${SPLITQ_ORT_URL} ${file} STATUS status TIMEOUT 60)
  list(GET status 0 failed)
  if(failed)
    message(STATUS "ONNX Runtime headers: not from ${SPLITQ_ORT_URL}: ${status}")
    return()
  endif()
  _splitq_accept(${file} ${cache} accepted)
  set(${result} "${accepted}" PARENT_SCOPE)
endfunction()

# Copies a fetched header to the cache if it is the expected file.
function(_splitq_accept file cache result)
  set(${result} "" PARENT_SCOPE)
  if(NOT EXISTS ${file})
    return()
  endif()
  file(SHA256 ${file} actual)
  if(NOT actual STREQUAL SPLITQ_ORT_SHA256)
    message(STATUS "ONNX Runtime headers: expected SHA-256 ${SPLITQ_ORT_SHA256}, got ${actual}")
    return()
  endif()
  file(COPY ${file} DESTINATION ${cache})
  set(${result} "${cache}" PARENT_SCOPE)
endfunction()

# 0 without a header.
function(_splitq_api_version folder result)
  set(version 0)
  if(folder AND EXISTS ${folder}/${SPLITQ_ORT_HEADER})
    file(STRINGS ${folder}/${SPLITQ_ORT_HEADER} line REGEX "^#define ORT_API_VERSION [0-9]+" LIMIT_COUNT 1)
    if(line MATCHES "ORT_API_VERSION ([0-9]+)")
      set(version ${CMAKE_MATCH_1})
    endif()
  endif()
  set(${result} ${version} PARENT_SCOPE)
endfunction()
