#!/usr/bin/env bash
# Build .peers/pyreft, the environment in which tests run pyreft itself; 1.5 GB, about two minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
pins=scripts/peers/pyreft.txt
peer=.peers/pyreft
if cmp -s "$pins" "$peer/built.txt"; then
  exit 0
fi
rm -rf "$peer"
mkdir -p .peers
echo '*' > .peers/.gitignore
"${PYTHON:-python3}" -m venv "$peer"
"$peer/bin/pip" install -q -c "$pins" torch==2.13.0
"$peer/bin/pip" install -q -c "$pins" transformers accelerate datasets matplotlib
# Without their requirements, most of which they never import.
"$peer/bin/pip" install -q --no-deps -c "$pins" pyreft pyvene
"$peer/bin/python" -W ignore -c "import pyreft" > /dev/null
cp "$pins" "$peer/built.txt"
