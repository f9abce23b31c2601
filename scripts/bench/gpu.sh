#!/usr/bin/env bash
# What is measured on a card, in under ten minutes: bash scripts/bench/gpu.sh [--small] [OUT]
# It wants an environment with perfit[cloud,vllm] as PYTHON, and a card of 80 GB for a model of Llama-2-7B's
# shape, of which vLLM has two copies there (with hooks and without) and we one. --small tries the script itself
# on a CPU, in .vllm. Not run on a card yet: its first figures are for whoever has one.
set -uo pipefail
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
  loads=(--loads 32:1,32:8,32:32 --without-own)
else
  model=(--small)
  loads=()
fi
failed=0
"$python" -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no card')"
timeout 240 "$python" scripts/bench/vllm_serving.py "${model[@]}" "${loads[@]}" --json "$out/serving.json" || failed=1
timeout 150 "$python" scripts/bench/card.py "${model[@]}" --serving "$out/serving.json" --json "$out/card.json" || failed=1
timeout 180 "$python" scripts/bench/update.py "${model[@]}" --json "$out/update.json" || failed=1
exit $failed
