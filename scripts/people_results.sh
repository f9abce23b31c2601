#!/usr/bin/env bash
# Real people on smollm2 with the artefacts that ship: every figure of docs/results/people, from the data folder
# beside the checkout (hours on two cores). What is finished is kept, so it may be stopped and started again.
#
#   bash scripts/people_results.sh [RUNS]        default: runs/people
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/people} data=../shared/data ours=cloud/perfit_cloud/artefacts

lamp() { # artefact, folder of the data, options…
  echo "== $*"
  .venv/bin/perfit-cloud lamp run --data "$data/$2" --model smollm2 --artefact "$ours/$1" --schedule device \
    --temperature 0 --threads "${THREADS:-0}" "${@:3}"
}

lamp commit_message commits --out "$runs/commit_message"
lamp news_headline lamp_news/news_headline --out "$runs/news_headline"
lamp news_categorize lamp_news/news_categorize --out "$runs/news_categorize"
lamp commit_message commits --users 16 --sweep examples=5,10,25,50 --out "$runs/curve"
.venv/bin/python scripts/real_input.py --data "$data/commits" --artefact "$ours/commit_message" \
  --users 12 --out "$runs/devices"

mapfile -t all < <(find "$runs" -name summary.json -printf '%h\n' | sort)
.venv/bin/perfit-cloud lamp report "${all[@]}" --out docs/results/people
