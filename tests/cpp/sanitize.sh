#!/usr/bin/env bash
# Runs the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer, then under
# ThreadSanitizer. Any finding is a failure.
#
#   bash tests/cpp/sanitize.sh [build folder]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${1:-build/sanitize}

for sanitizers in address,undefined thread; do
  echo "sanitizers $sanitizers"
  flags="-fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
  cmake -S "$here" -B "$build/$sanitizers" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS="$flags" > /dev/null
  cmake --build "$build/$sanitizers" --target kernel_test > /dev/null
  "$build/$sanitizers/kernel_test"
done
