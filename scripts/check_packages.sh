#!/usr/bin/env bash
# Source distribution and wheel, each in a fresh environment: built, installed away from the clone, the demo, the kernels, and
# nothing left after an uninstall. Takes some minutes: torch is unpacked twice.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/build"
"$place/build/bin/pip" install -q build
FASTRCNN_BUILD="${FASTRCNN_BUILD:-cpu}" "$place/build/bin/python" -m build --outdir "$place/dist" "$root"
ls -l "$place/dist"
if tar tf "$place"/dist/*.tar.gz | grep -E '^[^/]+/benchmarks/|\.so$'; then echo "these do not belong into the source distribution"; exit 1; fi

cd "$place"
for package in "$place"/dist/*.whl "$place"/dist/*.tar.gz; do
  echo "+ $package"
  rm -rf "$place/venv" && python3 -m venv "$place/venv"
  FASTRCNN_BUILD="${FASTRCNN_BUILD:-cpu}" "$place/venv/bin/pip" install -q torch torchvision "$package"
  "$place/venv/bin/fastrcnn" demo --out "$place/demo"
  "$place/venv/bin/fastrcnn" info --json | "$place/venv/bin/python" -c '
import json, sys
ops = json.load(sys.stdin)["ops"]
slow = [name for name, devices in ops.items() if devices["cpu"] != "kernel"]
sys.exit(f"references answer for {slow}" if slow else 0)'
  "$place/venv/bin/pip" uninstall -q -y fastrcnn
  left="$(find "$place/venv" -iname '*fastrcnn*')"
  if [ -n "$left" ]; then echo "left after the uninstall: $left"; exit 1; fi
done
echo "source distribution and wheel: installed, demo found its cells, uninstalled"
