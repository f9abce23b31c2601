#!/usr/bin/env bash
# Every LaMP figure of docs/results.md, from the data folder beside the checkout (hours on two cores).
# What is finished is kept, so it may be interrupted and started again.
#
#   bash scripts/lamp_results.sh [RUNS]        default: runs/lamp
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/lamp}
data=../shared/data/lamp_news newslm=../shared/models/newslm starter=cloud/perfit_cloud/starter
threads=${THREADS:-0}
# The base model has read the collective users' headlines, so trial updates on them tell nothing about
# people it has not read: 5e-3 is the rate of the yardstick, for both tasks.
common=(--lr 5e-3 --threads "$threads")

lamp() { # task, model, out, options…
  echo "== $*"
  .venv/bin/perfit-cloud lamp run --task "$1" --data "$data/$1" --model "$2" --out "$runs/$3" \
    "${common[@]}" "${@:4}"
}

for task in news_headline news_categorize; do
  lamp "$task" "$newslm" "$task/seeds" --sweep seeds
  lamp "$task" "$newslm" "$task/stage1" --ablation stage1 --artefact "$runs/$task/seeds/seed-0/artefact"
  lamp "$task" "$newslm" "$task/stage2" --ablation stage2
  lamp "$task" "$newslm" "$task/stage2_sum" --ablation stage2_sum
  lamp "$task" "$newslm" "$task/other-histories" --histories other \
    --artefact "$runs/$task/seeds/seed-0/artefact"
  lamp "$task" "$starter/perfit-starter" "$task/starter" --artefact "$starter/$task"
done

few=(--users 8 --epochs 2 --collective-epochs 1 --collective-lr 3e-4)
lamp news_categorize "$newslm" sweeps/full "${few[@]}"
lamp news_categorize "$newslm" sweeps/layers --sweep layers "${few[@]}"
lamp news_categorize "$newslm" sweeps/ranks --sweep ranks "${few[@]}"
lamp news_categorize "$newslm" sweeps/few --sweep collective-users "${few[@]}"

mapfile -t all < <(find "$runs" -name summary.json -printf '%h\n' | sort)
.venv/bin/perfit-cloud lamp report "${all[@]}" --out docs/results/lamp
for run in "${all[@]}"; do
  folder="docs/results/lamp/runs/${run#"$runs/"}"
  mkdir -p "$folder" && cp "$run/summary.json" "$folder/"
done
