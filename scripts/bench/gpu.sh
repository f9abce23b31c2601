#!/usr/bin/env bash
# All that is measured on a card, in under ten minutes: bash scripts/bench/gpu.sh [--small] [OUT]
# It wants an environment with perfit[cloud,vllm] as PYTHON. --small tries the script itself on a CPU, in .vllm.
# Not run on a card yet: its first figures are for whoever has one.
set -euo pipefail
cd "$(dirname "$0")/../.."
small=()
if [ "${1:-}" = --small ]; then
  small=(--small)
  shift
fi
out="${1:-build/gpu}"
python="${PYTHON:-.vllm/bin/python}"
mkdir -p "$out"
if [ ${#small[@]} -eq 0 ]; then
  model=(--model random-7b --dtype bfloat16 --device cuda --pairs 3)
else
  model=(--small)
fi
"$python" -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no card')"
timeout 300 "$python" scripts/bench/vllm_serving.py "${model[@]}" --json "$out/serving.json"
timeout 240 "$python" scripts/bench/update.py "${model[@]}" --json "$out/update.json"
