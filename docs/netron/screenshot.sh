#!/usr/bin/env bash
# Opens an exported decoder in Netron (headless Chromium) and saves two pictures:
# OUT.png, the graph with the attributes of one SplitQLinear, and body.png beside it, the inside of that function.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
model=${1:-$root/build/demo/easyvqa-tiny-W4A8/decoder.onnx}
out=${2:-$root/docs/netron/decoder.png}
netron_version=9.3.3 # pinned: capture.py relies on how this version's page is built
venv=$root/build/netron-venv

[ -f "$model" ] || { echo "$model is missing: run 'make demo' first, or pass the path of a decoder.onnx" >&2; exit 1; }
browser=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
[ -x "$browser" ] || {
  echo "Chromium is missing: 'apt-get install chromium fonts-dejavu-core', or set CHROMIUM=/path/to/the/browser" >&2
  exit 1
}
if command -v fc-list >/dev/null && [ -z "$(fc-list ':charset=3008')" ]; then
  echo "no font has the brackets around tensor shapes, they will be boxes: 'apt-get install fonts-sawarabi-gothic'" >&2
fi

# Its own environment: Netron is only needed for these pictures.
if [ "$(cat "$venv/.netron-version" 2>/dev/null || true)" != "$netron_version" ]; then
  "${PYTHON:-python3}" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "netron==$netron_version"
  echo "$netron_version" >"$venv/.netron-version"
fi

# exec: a signal to this script reaches capture.py, which stops Netron's server and the browser however it ends.
exec nice "$venv/bin/python" "$root/docs/netron/capture.py" "$browser" "$model" "$out" "$(dirname "$out")/body.png"
