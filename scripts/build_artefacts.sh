#!/usr/bin/env bash
# The artefacts that ship, for smollm2: cloud/perfit_cloud/artefacts/NAME, from the data folder beside the
# checkout. Only people of `user_others.json` are trained on. An interrupted run goes on where it stopped.
#
#   bash scripts/build_artefacts.sh [NAME…]        default: all
#
# Layers, ranks and rates were chosen on held-out collective users: docs/results/search.md.
set -euo pipefail
cd "$(dirname "$0")/.."
data=../shared/data out=cloud/perfit_cloud/artefacts runs=runs/artefacts
attribution="
**Source.** Articles of the News Category Dataset by Rishabh Misra (CC BY 4.0); no text of it is in this folder."
shift_of=(--layers "5;8;11" --positions l7 --collective-rank 32 --personal-rank 16)

trained() { # name, folder of the data, options…
  .venv/bin/perfit-cloud collective train --task "$1" --data "$data/$2" --model smollm2 --out "$runs/$1" \
    --prompts builtin "${shift_of[@]}" --lr 1e-3 --seed 0 --threads "${THREADS:-0}" "${@:3}"
}

blank() { # name
  .venv/bin/perfit-cloud collective blank --task "$1" --model smollm2 --out "$runs/$1" --lr 5e-3
}

names=("$@")
[ $# -gt 0 ] || names=(commit_message news_headline news_categorize chat reply)
for name in "${names[@]}"; do
  [ -e "$runs/$name/artefact.json" ] || case $name in
    commit_message) trained "$name" commits --epochs 3 --device-lr 3e-3 ;;
    news_headline | news_categorize) trained "$name" "lamp_news/$name" --epochs 1 --device-lr 5e-3 ;;
    chat | reply) blank "$name" ;;
    *) echo "no artefact $name" >&2 && exit 2 ;;
  esac
  mkdir -p "$out/$name"
  cp "$runs/$name"/{artefact.json,collective.safetensors,seed.safetensors} "$out/$name/"
  sed "/loss.png/d" "$runs/$name/CARD.md" >"$out/$name/CARD.md"
  case $name in news_*) echo "$attribution" >>"$out/$name/CARD.md" ;; esac
done
