#!/usr/bin/env bash
# Every family with other releases of transformers than the pinned one: adapters, calibration's inputs, float exports.
set -euo pipefail
python=$(realpath -s "$1")
shift
root=$(git rev-parse --show-toplevel 2>/dev/null || pwd)
cd "$root"
for version in "$@"; do
  place=$root/build/transformers-$version
  [ -d "$place/transformers" ] || "$python" -m pip install --quiet --no-deps --target "$place" "transformers==$version.*"
  echo "transformers $(PYTHONPATH=$place "$python" -c 'import transformers; print(transformers.__version__)')"
  PYTHONPATH=$place OMP_NUM_THREADS=1 "$python" -m pytest -q tests/unit/test_adapters.py tests/unit/test_block_inputs.py \
    tests/unit/test_patches.py tests/unit/test_anyres.py
  PYTHONPATH=$place OMP_NUM_THREADS=1 "$python" -m pytest -q tests/parity/test_families.py -k "none"
done
