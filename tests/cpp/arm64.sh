#!/usr/bin/env bash
# Cross-compiles the kernel tests for ARM64 and runs them under qemu's user emulation as three
# processors. A processor fails if a check fails or if it did not choose its best kernels; one that
# ran a kernel it lacks would die of an illegal instruction. Says nothing about speed.
#
#   bash tests/cpp/arm64.sh [build folder]
#
# Debian: apt-get install cmake g++-aarch64-linux-gnu qemu-user
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${1:-build/arm64}
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static) ||
  { echo "qemu-aarch64 is not installed; on Debian it is in qemu-user" >&2; exit 1; }

cmake -S "$here" -B "$build" -DCMAKE_EXE_LINKER_FLAGS=-static \
  -DCMAKE_TOOLCHAIN_FILE="$here/../../cmake/aarch64-linux-gnu.cmake" > /dev/null
cmake --build "$build" > /dev/null

for pair in cortex-a53:neon cortex-a76:dotprod max:i8mm; do
  processor=${pair%:*} expected=${pair#*:}
  echo "processor $processor"
  printed=$(env -u SPLITQ_ISA "$qemu" -cpu "$processor" "$build/kernel_test") ||
    { echo "$printed"; echo "$processor: the tests failed" >&2; exit 1; }
  echo "$printed"
  grep -qE "^isa $expected: [0-9]{5,} checks, 0 failures$" <<< "$printed" ||
    { echo "$processor: expected isa $expected and 10000 checks or more" >&2; exit 1; }
done
