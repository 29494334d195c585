#!/usr/bin/env bash
# Fetches llama.cpp's sources (they come with the PyPI package llama-cpp-python) and builds the
# benchmark's peers for this processor.
#
#   bash tests/bench/peers/build.sh PYTHON BUILD_FOLDER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$1
mkdir -p "$2"
build=$(cd "$2" && pwd)
version=0.3.36

sources=$build/llama_cpp_python-$version
if [ ! -d "$sources" ]; then
  "$python" -m pip download --quiet --no-deps --no-binary :all: --dest "$build" "llama-cpp-python==$version"
  tar -xzf "$build/llama_cpp_python-$version.tar.gz" -C "$build"
fi
cmake -S "$here" -B "$build/cmake" -DCMAKE_BUILD_TYPE=Release \
  -DGGML_DIR="$sources/vendor/llama.cpp/ggml" > "$build/cmake.log"
cmake --build "$build/cmake" --parallel "$(nproc)" --target bench_peers >> "$build/cmake.log"
