#!/usr/bin/env bash
# The evidence of docs/research.md: methods, cold start, ablations, layers, ranks, few users, news, analyses,
# with SmolLM2 and the data folder beside the checkout. Steps run in order of worth. What is finished is kept
# and skipped, so it may be stopped and started again; a step that fails is named at the end. What a run
# measured is also kept without its texts, in RESULTS/runs, so that another machine can go on from there: it
# runs again only what a step to come reads texts or weights of.
#
#   bash scripts/research.sh [PART...]    of methods cold ablations layers ranks few groups tasks seeds
#                                              headlines categories analyze report
#   PEOPLE=6 QUERIES=8 OTHERS=40 bash scripts/research.sh methods report
#
# RUNS       where runs lie; another scale wants another folder       runs/research
# RESULTS    where the report, figures of runs and steps.tsv lie      docs/results/research
# DATA       the data folder                                          ../shared/data
# MODEL      the base model                                           smollm2
# THREADS    of each command                                          1
# PEOPLE     people of the main table                                 48
# SOME       people of everything else, and of lofit                  12, at most PEOPLE
# QUERIES    first queries of each person                             all
# OTHERS     collective users of every stage 1 that is trained        all; FEW_OTHERS of the other parts: 60
# EXAMPLES   latest examples of each history                          all
# SIZES      lengths of history of the cold start                     10 0 25 5 50 all
# STARTS     and its starts                                           seed communities rag behind first
# COLD       people of the cold start                                 PEOPLE
# BY         schedule by which they train; paper takes a tenth of the time  device
# RATE       personal rate of the sweeps                              that which trials chose for perfit's main run
# MODES      what sweeps measure, as "base,seed,personal"             all
# STAGE_1    options of every stage 1, as "--collective-epochs 1"     --collective-lr 1e-3
# LORA       the same of the collective LoRA                          the paper's epochs, the rate by trials
# METHODS    which of methods, headlines and categories, as "none rag/4"               all, in the order below
# BUDGET     no step begins after so many seconds                     none
set -uo pipefail
cd "$(dirname "$0")/.."
runs=${RUNS:-runs/research} results=${RESULTS:-docs/results/research} data=${DATA:-../shared/data}
model=${MODEL:-smollm2} ours=cloud/perfit_cloud/artefacts people=${PEOPLE:-48} some=${SOME:-12}
((some <= people)) || some=$people
common=(--model "$model" --temperature 0 --frequency-penalty 0 --threads "${THREADS:-1}")
[ -z "${QUERIES:-}" ] || common+=(--queries "$QUERIES")
memory=(--keep-gib 2)
history=()
[ -z "${EXAMPLES:-}" ] || history=(--examples "$EXAMPLES")
read -ra stage_1 <<<"${STAGE_1---collective-lr 1e-3}"
read -ra lora <<<"${LORA:-}"
[ -z "${OTHERS:-}" ] || lora+=(--collective-users "$OTHERS")
few=(--collective-users "${FEW_OTHERS:-${OTHERS:-60}}")
failed=()
TIMEFORMAT=%U # of steps.tsv: folder, seconds of wall clock, of processor time, command

finished() { # folder, command…: whether that has run and its figures are kept, and with `whole` its texts lie here
  [ -n "${whole:-}" ] && [ ! -f "$runs/$1/.finished" ] && return 1
  if [[ "$*" == *" lamp run "* ]]; then
    local kept=("$results/runs/$1/figures.json")
    [[ "$*" != *" --sweep "* ]] || kept=("$results/runs/$1"/*/figures.json)
    [ -f "${kept[0]}" ] || return 1
  fi
  # No pipe: grep may end first, and with pipefail the step would seem unfinished.
  [ -f "$results/steps.tsv" ] && grep -qxF "$1"$'\t'"${*:2}" < <(cut -f 1,4 "$results/steps.tsv")
}

step() { # folder, command…: unless the same command has finished there
  local name=$1 out="$runs/$1" began=$SECONDS
  finished "$@" && return 0
  shift
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
  keep "$name" || { failed+=("$out (its figures)"); return 0; }
  touch "$out/.finished"
  whole= finished "$name" "$@" || record "$name" "$((SECONDS - began))" "$cpu" "$*"
} 3>&1 4>&2

record() { # folder, seconds, of the processor, command: in place of another command's there, whose figures are gone
  local others
  others=$(awk -F '\t' -v folder="$1" '$1 != folder' "$results/steps.tsv" 2>/dev/null)
  { [ -z "$others" ] || printf '%s\n' "$others"; printf '%s\t%s\t%s\t%s\n' "$@"; } >"$results/steps.tsv"
}

keep() { # folder of a run, of a sweep, or of something else: what was measured, without texts
  local each
  mkdir -p "$results"
  find "$runs/$1" -maxdepth 2 -name summary.json -printf '%h\n' | while read -r each; do
    .venv/bin/perfit-cloud lamp figures "$each" --out "$results/runs/${each#"$runs/"}" >&3 || exit 1
  done
}

lamp() { # folder, data, options…
  local command
  read -ra command <<<"$(lamp_command "$@")"
  step "$1" "${command[@]}"
}

lamp_after() { # command, folder, data, options…: what the command makes, this reads, so it lies here whole
  [ -z "$1" ] || finished "$2" "$(lamp_command "${@:2}")" || whole=1 $1
  lamp "${@:2}"
}

lamp_command() { echo .venv/bin/perfit-cloud lamp run --out "$runs/$1" --data "$data/$2" "${common[@]}" "${@:3}"; }

# Every method on the same people, asked in the shipped artefact's words. What the untouched model answers is
# computed once.
every_method() { # folder, data, artefact, people
  local method
  for method in ${METHODS:-none perfit perfit-device lora-p lora-c oppu rag/1 rag/2 rag/4 perfit+rag perfit_behind+rag perfit_stage1+rag reft stylevector pag lofit lora-c+perfit}; do
    one_method "$method" "$@"
  done
}

one_method() { # method, and what every_method is given
  local method=$1 of=$2 task=$3 reused=none
  local name=${method%%/*}
  [[ "$method" != perfit-device ]] || name=perfit
  local of_all=$5
  [[ "$method" != lofit ]] || of_all=$some # twice as long as LoRA
  local options=(--method "$name" --users "$of_all" "${history[@]}" --artefact "$ours/$4")
  # Somebody else's state answers too where it shows that the method is personal: in PerFit's own rows.
  [[ "$method" == perfit ]] || options+=(--modes base,collective,seed,personal)
  case "$method" in
    none) reused= ;;
    perfit) options+=("${memory[@]}") ;;
    perfit-device) reused=perfit options+=(--schedule device "${memory[@]}") ;;
    rag/*) options+=(--k "${method#*/}") ;;
    *+rag) reused=perfit options+=("${memory[@]}") ;;
    reft) options+=("${memory[@]}") ;;
    lora-c) options+=("${lora[@]}") ;;
    oppu) reused=lora-c options+=(--lora "$runs/$of/lora-c") ;;
    lora-c+perfit) reused=lora-c options+=(--lora "$runs/$of/lora-c" "${memory[@]}") ;;
  esac
  [ -z "$reused" ] || options+=(--reuse "$runs/$of/$reused")
  lamp_after "${reused:+one_method $reused ${*:2}}" "$of/$method" "$task" "${options[@]}"
}

methods() { every_method methods commits commit_message "$people"; }

# A newcomer: plain seed, the seed of a community, retrieval; each with histories of several lengths.
schedule=${BY:-device} newcomers=cold
[ "$schedule" = device ] || newcomers=cold_$schedule
cold() {
  local size start
  for size in ${SIZES:-10 0 25 5 50 all}; do
    for start in ${STARTS:-seed communities rag behind first}; do cold_run "$start" "$size"; done
  done
}

cold_run() { # start, examples
  local plain=(--artefact "$ours/commit_message") first=${SIZES:-10} seed="$newcomers/seed/$2"
  local same=(--users "${COLD:-$people}" --schedule "$schedule" --modes base,seed,personal "${memory[@]}")
  first=${first%% *}
  [ "$2" = all ] || same+=(--examples "$2")
  case "$1" in
    seed)
      if [ "$2" = "$first" ]; then
        lamp "$seed" commits "${plain[@]}" "${same[@]}"
      else # what does not depend on a history is taken from there
        lamp_after "cold_run seed $first" "$seed" commits "${plain[@]}" "${same[@]}" --reuse "$runs/$newcomers/seed/$first"
      fi ;;
    communities)
      lamp_after "communities $2" "$newcomers/communities/$2" commits --artefact "$runs/cold/artefact" "${same[@]}" \
        --reuse "$runs/$seed" ;;
    rag | behind | first) # with the update, with one behind them, or before it
      local -A method=([rag]=perfit+rag [behind]=perfit_behind+rag [first]=perfit_stage1+rag)
      lamp_after "cold_run seed $2" "$newcomers/$1/$2" commits --method "${method[$1]}" \
        "${plain[@]}" "${same[@]}" --reuse "$runs/$seed" ;;
  esac
}

communities() { # and the plain seed's run with so many examples
  cold_run seed "$1"
  step cold/artefact .venv/bin/perfit-cloud collective communities --artefact "$ours/commit_message" \
    --data "$data/commits" --model "$model" --communities 4 ${OTHERS:+--users "$OTHERS"} \
    --threads "${THREADS:-1}" --force --out "$runs/cold/artefact"
}

words=(--prompts builtin) # those of the artefacts that ship
swept=("${words[@]}" "${history[@]}" "${stage_1[@]}" "${memory[@]}" ${MODES:+--modes "$MODES"})
part=(--users "$some" "${few[@]}" "${swept[@]}")
base_of_some() { lamp some/none commits --method none --users "$some" "${words[@]}" "${history[@]}"; }
known=(--reuse "$runs/some/none")
sweep() { # folder, of what
  with_rate "$1" && lamp_after base_of_some "$1" commits "${part[@]}" --lr "$rate" "${known[@]}" --sweep "$2"
}
on_all() { # the same, with a stage 1 on whom the sweep says
  with_rate "$1" && lamp_after base_of_some "$1" commits --users "$some" "${swept[@]}" --lr "$rate" \
    "${known[@]}" --sweep "$2"
}
with_rate() { # folder: sets `rate`
  rate=${RATE:-}
  [ -z "$rate" ] || return 0
  local figures="$results/runs/methods/perfit/figures.json"
  [ -f "$figures" ] || METHODS=perfit methods
  rate=$(.venv/bin/python -c 'import json, sys; print(json.load(open(sys.argv[1]))["settings"]["learning_rate"])' \
    "$figures") && return 0
  failed+=("$runs/$1 (no rate of perfit's run)")
  return 1
}
ablations() { sweep ablations ablations; }
layers() { sweep layers "layers=${LAYERS:-2,5,8,11,15,19,23,27}"; }
ranks() { sweep ranks "ranks=${RANKS:-4,16,32}"; }
few() { on_all few "collective-users=${USERS:-10,50,219}"; }
groups() { on_all groups groups; }
tasks() { # the shifts of other tasks that ship; the task's own is that of the ablations
  with_rate tasks || return 0
  lamp_after ablations tasks commits --users "$some" "${history[@]}" --artefact "$runs/ablations/full/artefact" --lr "$rate" \
    "${memory[@]}" ${MODES:+--modes "$MODES"} "${known[@]}" --sweep "artefacts=$ours/news_headline,$ours/reply"
}
seeds() { # seed 0 is that of the ablations
  ablations
  with_rate seeds && lamp seeds commits "${part[@]}" --lr "$rate" --sweep seeds=1,2
}

headlines() { every_method news_headline lamp_news/news_headline news_headline "$some"; }
categories() { every_method news_categorize lamp_news/news_categorize news_categorize "$some"; }

analyze() {
  local same=(--model "$model" --threads "${THREADS:-1}" --users "$people" --queries "${QUERIES:-4}" --no-texts)
  step analyze/commits .venv/bin/perfit-cloud analyze "${same[@]}" --data "$data/commits" \
    --artefact $ours/commit_message --out "$runs/analyze/commits"
  step analyze/news .venv/bin/perfit-cloud analyze "${same[@]}" --data "$data/lamp_news/news_headline" \
    --data "$data/lamp_news/news_categorize" --out "$runs/analyze/news"
}

report() { # of what has finished so far
  local all
  mapfile -t all < <(find "$results/runs" -name figures.json -printf '%h\n' | sort)
  .venv/bin/perfit-cloud lamp report "${all[@]}" --no-texts --out "$results" || failed+=("$results")
}

parts=("$@")
((${#parts[@]})) || parts=(methods cold ablations layers ranks few groups tasks seeds headlines categories analyze report)
mkdir -p "$runs"
for each in "${parts[@]}"; do
  case "$each" in
    methods | cold | ablations | layers | ranks | few | groups | tasks | seeds | headlines | categories | analyze | report) "$each" ;;
    *) echo "no part $each" >&2; exit 2 ;;
  esac
done
((${#failed[@]} == 0)) || { printf 'not finished: %s\n' "${failed[@]}" >&2; exit 1; }
