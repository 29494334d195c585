#!/usr/bin/env bash
# Exports easyvqa-tiny here, packed, and lets ARM64's onnxruntime answer with it under qemu's user
# emulation: every token must be the one that this processor's kernels give.
#
#   bash tests/cpp/arm64_model/run.sh [build folder [python]]
#
# python: has splitq-edge with its extras and pip. Fetches Debian's Python for ARM64 and the wheels
# of numpy and onnxruntime into the build folder. Debian: apt-get install cmake
# g++-aarch64-linux-gnu qemu-user
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$here/../../.." && pwd)
mkdir -p "${1:-build/arm64-model}"
build=$(cd "${1:-build/arm64-model}" && pwd)
python=${2:-python3}
root="$build/root" library="$build/library" model="$build/model"
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static) ||
  { echo "qemu-aarch64 is not installed; on Debian it is in qemu-user" >&2; exit 1; }

# onnxruntime reads the processor's description while it is imported, and dies without one.
describe_processor() {
  local cpu cache index number level type size
  mkdir -p "$root/proc"
  for cpu in 0 1; do
    printf '%s\t: %s\n' processor "$cpu" Features 'fp asimd' 'CPU implementer' 0x41 \
      'CPU architecture' 8 'CPU variant' 0x1 'CPU part' 0xd03 'CPU revision' 1
    echo
    cache="$root/sys/devices/system/cpu/cpu$cpu/cache"
    for index in 0:1:Data:32K 1:1:Instruction:32K 2:2:Unified:512K; do
      IFS=: read -r number level type size <<< "$index"
      mkdir -p "$cache/index$number"
      printf '%s\n' "$level" > "$cache/index$number/level"
      printf '%s\n' "$type" > "$cache/index$number/type"
      printf '%s\n' "$size" > "$cache/index$number/size"
      printf '%s\n' "$cpu" > "$cache/index$number/shared_cpu_list"
      printf '64\n' > "$cache/index$number/coherency_line_size"
      printf '64\n' > "$cache/index$number/number_of_sets"
      printf '8\n' > "$cache/index$number/ways_of_associativity"
    done
  done > "$root/proc/cpuinfo"
  printf '0-1\n' > "$root/sys/devices/system/cpu/possible"
  printf '0-1\n' > "$root/sys/devices/system/cpu/present"
}

if [ ! -e "$build/root.done" ]; then
  sh "$checkout/cmake/fetch_debian.sh" "$root" bookworm arm64 python3.11-minimal \
    libpython3.11-minimal libpython3.11-stdlib libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libffi8 \
    libssl3 libbz2-1.0 liblzma5 > "$build/fetch.log" 2>&1 || { cat "$build/fetch.log" >&2; exit 1; }
  describe_processor
  version=$("$python" -c 'import onnxruntime; print(onnxruntime.__version__)')
  "$python" -m pip download --quiet --no-deps --only-binary :all: --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 --python-version 3.11 \
    --dest "$build/wheels" "onnxruntime==$version" numpy
  mkdir -p "$root/site"
  for wheel in "$build"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$root/site"; done
  touch "$build/root.done"
fi

cmake -S "$checkout" -B "$library" -DSPLITQ_NATIVE=ON \
  -DCMAKE_TOOLCHAIN_FILE="$checkout/cmake/aarch64-linux-gnu.cmake" > /dev/null
cmake --build "$library" > /dev/null

rm -rf "$model" "$model.calibration"
"$python" -m splitq_edge.cli export "$checkout/models/easyvqa-tiny" "$model" \
  --recipe "$here/recipe.yaml" --calib easyvqa --calib-samples 16 --flavour packed \
  > "$build/export.log" 2>&1 || { cat "$build/export.log" >&2; exit 1; }
"$python" "$here/answers.py" record "$model" "$build/answers.npz"

# The package as it is installed, without a build.
rm -rf "$root/site/splitq_edge"
cp -r "$checkout/splitq_edge" "$root/site/splitq_edge"
cp -r "$checkout/runtime_ops" "$root/site/splitq_edge/runtime_ops"

lib="$root/usr/lib/python3.11"
for pair in cortex-a53:neon cortex-a76:dotprod max:i8mm; do
  processor=${pair%:*} expected=${pair#*:}
  echo "processor $processor"
  printed=$(env -i "$qemu" -cpu "$processor" -L "$root" \
    -E "LD_LIBRARY_PATH=$root/usr/lib/aarch64-linux-gnu:$root/lib/aarch64-linux-gnu" \
    -E PYTHONHOME=/usr -E "PYTHONPATH=$lib:$lib/lib-dynload:$root/site" -E PYTHONDONTWRITEBYTECODE=1 \
    -E OPENBLAS_NUM_THREADS=1 -E "SPLITQ_LIBRARY=$library/runtime_ops/libsplitq_ops.so" \
    "$root/usr/bin/python3.11" -S "$here/answers.py" compare "$model" "$build/answers.npz") ||
    { echo "$printed"; echo "$processor: the answers differ" >&2; exit 1; }
  echo "$printed"
  grep -q "^$expected kernels:" <<< "$printed" ||
    { echo "$processor: expected $expected kernels" >&2; exit 1; }
done
