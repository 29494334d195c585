#!/usr/bin/env bash
# The wheel in a fresh environment without torch answers a question with an exported folder, natively and without.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$root/build/wheel-check
export_folder=$root/build/demo/easyvqa-tiny-W4A8
rm -rf "$work"
mkdir -p "$work"
[ -f "$export_folder/export.json" ] || { echo "run 'make demo' first: $export_folder is missing" >&2; exit 1; }
"$root/.venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$root"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" "$work"/splitq_edge-*.whl
cd "$work" # not the checkout: the installed package must answer
"$work/venv/bin/python" -c "
import importlib.util, sys
import splitq_edge.runtime_ops as ops
assert importlib.util.find_spec('torch') is None, 'torch is installed'
assert ops.library_path() is not None, 'the wheel has no native library'
"
image=$("$root/.venv/bin/python" -c "
from splitq_edge.evaluate.tasks import load_task
print(load_task('easyvqa', 'test')[0].image)")
question=$("$root/.venv/bin/python" -c "
from splitq_edge.evaluate.tasks import load_task
print(load_task('easyvqa', 'test')[0].text)")
native=$("$work/venv/bin/splitq-edge" run "$export_folder" --image "$image" --prompt "$question" --native)
bodies=$("$work/venv/bin/splitq-edge" run "$export_folder" --image "$image" --prompt "$question" --functions)
echo "wheel without torch: '$question' -> native '$native', function bodies '$bodies'"
[ -n "$native" ] && [ "$native" = "$bodies" ]
"$work/venv/bin/splitq-edge" verify "$export_folder"
