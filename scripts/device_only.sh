#!/usr/bin/env bash
# A device-only install in a clean virtual environment: its size in wheels, then enrol, ask and update
# against a cloud that runs from .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" wheel -q -c constraints.txt -w "$work/wheels" .
kb=$(du -sk "$work/wheels" | cut -f1)
echo "device-only install: $((kb / 1024)) MB of wheels"
[ "$kb" -lt $((45 * 1024)) ] || { echo "over 45 MB" >&2; exit 1; }
"$work/venv/bin/pip" install -q --no-index --find-links "$work/wheels" perfit
if "$work/venv/bin/python" -c 'import torch' 2>/dev/null; then echo "torch came along" >&2; exit 1; fi
PERFIT_DEVICE_BIN="$work/venv/bin" .venv/bin/python scripts/device_only.py
