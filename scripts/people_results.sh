#!/usr/bin/env bash
# Real people on smollm2 with the artefacts that ship: every figure of docs/results/people, from the data folder
# beside the checkout (hours on two cores). What is finished is kept, so it may be stopped and started again.
#
#   bash scripts/people_results.sh [RUNS]        default: runs/people
#   PEOPLE=16 THREADS=1 bash scripts/people_results.sh      the first 16 of each task, on one core
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/people} data=../shared/data ours=cloud/perfit_cloud/artefacts

lamp() { # artefact, folder of the data, options…
  echo "== $*"
  .venv/bin/perfit-cloud lamp run --data "$data/$2" --model smollm2 --artefact "$ours/$1" --schedule device \
    --temperature 0 --threads "${THREADS:-0}" --keep-gib 4 ${PEOPLE:+--users "$PEOPLE"} "${@:3}"
}

lamp commit_message commits --out "$runs/commit_message"
lamp news_headline lamp_news/news_headline --out "$runs/news_headline"
# The activations of eight people's long prompts do not fit what is kept, and would be computed in every step.
lamp news_categorize lamp_news/news_categorize --users-together 4 --out "$runs/news_categorize"
PEOPLE=16 lamp commit_message commits --sweep examples=5,10,25,50 --out "$runs/curve"
.venv/bin/python scripts/real_input.py --data "$data/commits" --artefact "$ours/commit_message" \
  --users 12 --out "$runs/devices"

mapfile -t all < <(find "$runs" -name summary.json -printf '%h\n' | sort)
.venv/bin/perfit-cloud lamp report "${all[@]}" --out docs/results/people
for run in "${all[@]}"; do
  folder="docs/results/people/runs/${run#"$runs/"}"
  mkdir -p "$folder" && cp "$run/summary.json" "$folder/"
done
