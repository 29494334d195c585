#!/usr/bin/env bash
# Runs the kernel tests, and two sessions of ONNX Runtime used by four threads, under
# AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer. Any finding is a
# failure.
#
#   bash tests/cpp/sanitize.sh [build folder [python]]
#
# python: has splitq-edge and onnxruntime; without it the sessions are left out.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${1:-build/sanitize}
python=${2:-}

if [ -n "$python" ]; then
  mkdir -p "$build"
  "$python" "$here/sessions/make_model.py" "$build/sessions.onnx"
  runtime=$("$python" -c 'import glob, onnxruntime, os
print(glob.glob(os.path.join(os.path.dirname(onnxruntime.__file__), "capi", "libonnxruntime.so.*"))[0])')
fi

for sanitizers in address,undefined thread; do
  echo "sanitizers $sanitizers"
  flags="-fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
  cmake -S "$here" -B "$build/$sanitizers" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS="$flags" > /dev/null
  cmake --build "$build/$sanitizers" --target kernel_test > /dev/null
  "$build/$sanitizers/kernel_test"
  [ -n "$python" ] || continue
  library="$build/$sanitizers/library"
  cmake -S "$here/../.." -B "$library" -DSPLITQ_NATIVE=ON -DSPLITQ_SESSIONS_TEST=ON \
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS="$flags" > /dev/null
  cmake --build "$library" > /dev/null
  # The runtime itself is not compiled for the sanitizer, which would not see what its atomics order.
  TSAN_OPTIONS=ignore_noninstrumented_modules=1 "$library/tests/cpp/sessions/sessions_test" \
    "$runtime" "$library/runtime_ops/libsplitq_ops.so" "$build/sessions.onnx"
done
