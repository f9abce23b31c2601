#!/usr/bin/env bash
# The evidence of docs/research.md: methods, cold start, ablations, layers, ranks, few users, news, analyses,
# with SmolLM2 and the data folder beside the checkout. Steps run in order of worth. What is finished is kept
# and skipped, so it may be stopped and started again; a step that fails is named at the end.
#
#   bash scripts/research.sh [PART...]    of methods cold ablations layers ranks few groups tasks seeds news analyze report
#   PEOPLE=6 QUERIES=8 OTHERS=40 bash scripts/research.sh methods report
#
# RUNS       where runs lie; another scale wants another folder       runs/research
# RESULTS    where the report lies                                    docs/results/research
# DATA       the data folder                                          ../shared/data
# MODEL      the base model                                           smollm2
# THREADS    of each command                                          1
# PEOPLE     people of the main table and the cold start              48
# SOME       people of everything else                                12, at most PEOPLE
# QUERIES    first queries of each person                             all
# OTHERS     collective users of every stage 1 that is trained        all; FEW_OTHERS of the other parts: 60
# EXAMPLES   latest examples of each history                          all
# SIZES      lengths of history of the cold start                     10 0 25 5 50 all
# STAGE_1    options of every stage 1, as "--collective-epochs 1"     --collective-lr 1e-3
# LORA       the same of the collective LoRA                          the paper's epochs, the rate by trials
# METHODS    which of methods and news, as "none rag/4"               all, in the order below
# BUDGET     no step begins after so many seconds                     none
set -uo pipefail
cd "$(dirname "$0")/.."
runs=${RUNS:-runs/research} results=${RESULTS:-docs/results/research} data=${DATA:-../shared/data}
model=${MODEL:-smollm2} ours=cloud/perfit_cloud/artefacts people=${PEOPLE:-48} some=${SOME:-12}
((some <= people)) || some=$people
rate_of() { sed -n 's/^ "learning_rate": \(.*\),$/\1/p' "$ours/$1/artefact.json"; } # of a shipped artefact's updates
rate=$(rate_of commit_message)
common=(--model "$model" --temperature 0 --threads "${THREADS:-1}")
[ -z "${QUERIES:-}" ] || common+=(--queries "$QUERIES")
memory=(--keep-gib 2)
history=()
[ -z "${EXAMPLES:-}" ] || history=(--examples "$EXAMPLES")
read -ra stage_1 <<<"${STAGE_1---collective-lr 1e-3}"
read -ra lora <<<"${LORA:-}"
[ -z "${OTHERS:-}" ] || lora+=(--collective-users "$OTHERS")
few=(--collective-users "${FEW_OTHERS:-${OTHERS:-60}}")
failed=()
TIMEFORMAT=%U # of seconds.tsv: folder, seconds of wall clock, of processor time, command

step() { # folder, command…: unless the same command has finished there
  local out="$runs/$1" began=$SECONDS
  shift
  if [ -f "$out/.finished" ] && [ "$(<"$out/.finished")" = "$*" ]; then return 0; fi
  if ((SECONDS > ${BUDGET:-999999999})); then
    failed+=("$out (no time left)")
    return 0
  fi
  echo "== $out: $*"
  mkdir -p "$out"
  local cpu status
  cpu=$({ time "$@" 1>&3 2>&4; } 2>&1)
  status=$?
  ((status != 130)) || exit 130
  if ((status != 0)); then
    failed+=("$out")
    return 0
  fi
  printf '%s' "$*" >"$out/.finished"
  printf '%s\t%s\t%s\t%s\n' "$out" "$((SECONDS - began))" "$cpu" "$*" >>"$runs/seconds.tsv"
} 3>&1 4>&2

lamp() { # folder, data, options…
  step "$1" .venv/bin/perfit-cloud lamp run --out "$runs/$1" --data "$data/$2" "${common[@]}" "${@:3}"
}

# Every method on the same people, asked in the shipped artefact's words. What the untouched model answers is
# computed once.
every_method() { # folder, data, artefact, people, rate
  local of=$1 task=$2 shipped="$ours/$3" method
  local same=(--users "$4" "${history[@]}" --artefact "$shipped") base=(--reuse "$runs/$1/none")
  local adapter=(--lora "$runs/$of/lora-c") known=(--reuse "$runs/$of/lora-c")
  for method in ${METHODS:-none perfit perfit/device lora-p lora-c oppu rag/1 rag/2 rag/4 perfit+rag reft stylevector pag lofit lora-c+perfit}; do
    local options=(--method "${method%%/*}" "${same[@]}")
    # Somebody else's state answers too where it shows that the method is personal: in PerFit's own rows.
    [[ "$method" == perfit ]] || options+=(--modes base,collective,seed,personal)
    case "$method" in
      none) ;;
      perfit) options+=("${base[@]}" "${memory[@]}") ;;
      perfit/device) options+=(--schedule device --reuse "$runs/$of/perfit" "${memory[@]}") ;;
      rag/*) options+=(--k "${method#*/}" "${base[@]}") ;;
      perfit+rag) options+=(--reuse "$runs/$of/perfit" "${memory[@]}") ;;
      reft) options+=(--lr "$5" "${base[@]}" "${memory[@]}") ;;
      lora-c) options+=("${lora[@]}" "${base[@]}") ;;
      oppu) options+=("${adapter[@]}" "${known[@]}") ;;
      lora-c+perfit) options+=(--lr "$5" "${adapter[@]}" "${base[@]}" "${memory[@]}") ;;
      *) options+=("${base[@]}") ;;
    esac
    lamp "$of/$method" "$task" "${options[@]}"
  done
}

methods() { every_method methods commits commit_message "$people" "$rate"; }

# A newcomer: plain seed, the seed of a community, retrieval; each with histories of several lengths.
cold() {
  local plain=$ours/commit_message first="" size
  local same=(--users "$people" --schedule device --modes base,seed,personal "${memory[@]}")
  step cold/artefact .venv/bin/perfit-cloud collective communities --artefact "$plain" --data "$data/commits" \
    --model "$model" --communities 4 ${OTHERS:+--users "$OTHERS"} --threads "${THREADS:-1}" --force --out "$runs/cold/artefact"
  for size in ${SIZES:-10 0 25 5 50 all}; do
    local cut=(--examples "$size") known=()
    [ "$size" != all ] || cut=()
    [ -z "$first" ] || known=(--reuse "$first")
    lamp "cold/seed/$size" commits --artefact "$plain" "${same[@]}" "${cut[@]}" "${known[@]}"
    first=${first:-$runs/cold/seed/$size}
    lamp "cold/communities/$size" commits --artefact "$runs/cold/artefact" "${same[@]}" "${cut[@]}" --reuse "$first"
    lamp "cold/rag/$size" commits --method perfit+rag --artefact "$plain" "${same[@]}" "${cut[@]}" --reuse "$runs/cold/seed/$size"
  done
}

words=(--prompts builtin) # those of the artefacts that ship
part=(--users "$some" "${words[@]}" "${history[@]}" "${few[@]}" "${stage_1[@]}" --lr "$rate" "${memory[@]}")
base_of_some() { lamp some/none commits --method none --users "$some" "${words[@]}" "${history[@]}"; }
known=(--reuse "$runs/some/none")
ablations() { base_of_some; lamp ablations commits "${part[@]}" "${known[@]}" --sweep ablations; }
layers() { base_of_some; lamp layers commits "${part[@]}" "${known[@]}" --sweep "layers=${LAYERS:-2,5,8,11,15,19,23,27}"; }
ranks() { base_of_some; lamp ranks commits "${part[@]}" "${known[@]}" --sweep "ranks=${RANKS:-4,16,32}"; }
few() {
  base_of_some
  lamp few commits --users "$some" "${words[@]}" "${history[@]}" "${stage_1[@]}" --lr "$rate" "${memory[@]}" "${known[@]}" \
    --sweep "collective-users=${USERS:-10,50,219}"
}
groups() {
  base_of_some
  lamp groups commits --users "$some" "${words[@]}" "${history[@]}" "${stage_1[@]}" --lr "$rate" "${memory[@]}" "${known[@]}" --sweep groups
}
tasks() { # the shifts of other tasks that ship; the task's own is that of the ablations
  ablations
  lamp tasks commits --users "$some" "${history[@]}" --artefact "$runs/ablations/full/artefact" --lr "$rate" \
    "${memory[@]}" "${known[@]}" --sweep "artefacts=$ours/news_headline,$ours/reply"
}
seeds() { # seed 0 is that of the ablations
  ablations
  lamp seeds commits "${part[@]}" --sweep seeds=1,2
}

news() {
  every_method news_headline lamp_news/news_headline news_headline "$some" "$(rate_of news_headline)"
  every_method news_categorize lamp_news/news_categorize news_categorize "$some" "$(rate_of news_categorize)"
}

analyze() {
  local same=(--model "$model" --threads "${THREADS:-1}" --users "$people" --queries "${QUERIES:-4}" --no-texts)
  step analyze/commits .venv/bin/perfit-cloud analyze "${same[@]}" --data "$data/commits" \
    --artefact $ours/commit_message --out "$runs/analyze/commits"
  step analyze/news .venv/bin/perfit-cloud analyze "${same[@]}" --data "$data/lamp_news/news_headline" \
    --data "$data/lamp_news/news_categorize" --out "$runs/analyze/news"
}

report() { # of what has finished so far
  local all
  mapfile -t all < <(find "$runs" -name summary.json -printf '%h\n' | sort)
  .venv/bin/perfit-cloud lamp report "${all[@]}" --no-texts --out "$results" || failed+=("$results")
}

parts=("$@")
((${#parts[@]})) || parts=(methods cold ablations layers ranks few groups tasks seeds news analyze report)
mkdir -p "$runs"
for each in "${parts[@]}"; do
  case "$each" in
    methods | cold | ablations | layers | ranks | few | groups | tasks | seeds | news | analyze | report) "$each" ;;
    *) echo "no part $each" >&2; exit 2 ;;
  esac
done
((${#failed[@]} == 0)) || { printf 'not finished: %s\n' "${failed[@]}" >&2; exit 1; }
