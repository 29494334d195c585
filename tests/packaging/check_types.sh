#!/usr/bin/env bash
# mypy does not follow the editable install's mapping of the sibling folders, so it sees the package through links.
set -euo pipefail
mypy=$(realpath "$1")
root=$(git rev-parse --show-toplevel 2>/dev/null || pwd)
stage=$root/build/types
rm -rf "$stage"
mkdir -p "$stage/splitq_edge"
for item in "$root"/splitq_edge/* "$root/exporters" "$root/runtime_ops"; do
  ln -s "$item" "$stage/splitq_edge/$(basename "$item")"
done
cd "$stage"
"$mypy" --config-file "$root/pyproject.toml" -p splitq_edge
