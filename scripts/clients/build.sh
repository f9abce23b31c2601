#!/usr/bin/env bash
# Build build/clients: five apps' libraries as their makers ship them, each in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/../.."
pins=scripts/clients
for name in openai llm langchain; do
  home=build/clients/$name
  cmp -s "$pins/$name.txt" "$home/built.txt" && continue
  rm -rf "$home"
  "${PYTHON:-python3}" -m venv "$home"
  "$home/bin/pip" install -q -r "$pins/$name.txt"
  cp "$pins/$name.txt" "$home/built.txt"
done
if ! command -v npm > /dev/null; then
  echo "npm is not installed, so the two clients for Node are left out" >&2
  exit 0
fi
for name in npm-openai npm-ai; do
  home=build/clients/$name
  cmp -s "$pins/$name/package-lock.json" "$home/built.json" && continue
  rm -rf "$home" && mkdir -p "$home"
  cp "$pins/$name"/package*.json "$home/"
  (cd "$home" && npm ci --no-audit --no-fund --ignore-scripts --loglevel=error)
  cp "$home/package-lock.json" "$home/built.json"
done
