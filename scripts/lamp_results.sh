#!/usr/bin/env bash
# Every LaMP figure of docs/results.md, from the data folder beside the checkout (hours on two cores).
# What is finished is kept, so it may be interrupted and started again.
#
#   bash scripts/lamp_results.sh [RUNS]        default: runs/lamp
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/lamp}
data=../shared/data/lamp_news newslm=../shared/models/newslm
threads=${THREADS:-0}

lamp() { # task, model, out, options…
  echo "== $*"
  .venv/bin/perfit-cloud lamp run --task "$1" --data "$data/$1" --model "$2" --out "$runs/$3" \
    --threads "$threads" "${@:4}"
}

# The base model has read the collective users' headlines, so trial updates on them tell nothing about
# people it has not read: 5e-3 is the rate that suits newslm. On categories the trials choose 3e-4.
for task in news_headline news_categorize; do
  rate=() alone=(--lr 3e-4)
  if [ "$task" = news_headline ]; then rate=(--lr 5e-3) alone=(--lr 5e-3); fi
  lamp "$task" "$newslm" "$task/seeds" --sweep seeds "${rate[@]}"
  lamp "$task" "$newslm" "$task/stage1" --method perfit_stage1 "${rate[@]}" \
    --artefact "$runs/$task/seeds/seed-0/artefact"
  lamp "$task" "$newslm" "$task/stage2" --method perfit_stage2 "${alone[@]}"
  lamp "$task" "$newslm" "$task/stage2_sum" --method perfit_stage2_sum "${alone[@]}"
done
# What a rate too high costs.
lamp news_categorize "$newslm" high_rate/seeds --sweep seeds --lr 5e-3
lamp news_categorize "$newslm" high_rate/stage2 --method perfit_stage2 --lr 5e-3
lamp news_categorize "$newslm" high_rate/stage2_sum --method perfit_stage2_sum --lr 5e-3

few=(--users 8 --epochs 1 --lr 1e-3 --collective-epochs 1 --collective-lr 3e-4)
lamp news_categorize "$newslm" sweeps/layers --sweep layers "${few[@]}"
lamp news_categorize "$newslm" sweeps/ranks --sweep ranks "${few[@]}"
lamp news_categorize "$newslm" sweeps/few --sweep collective-users "${few[@]}"

mapfile -t all < <(find "$runs" -name summary.json -printf '%h\n' | sort)
mapfile -t told < <(printf '%s\n' "${all[@]}" | grep -v high_rate)
.venv/bin/perfit-cloud lamp report "${told[@]}" --out docs/results/lamp
for run in "${all[@]}"; do
  folder="docs/results/lamp/runs/${run#"$runs/"}"
  mkdir -p "$folder" && cp "$run/summary.json" "$folder/"
done
