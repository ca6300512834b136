#!/usr/bin/env bash
# Every run behind the needle tables of experiments/README.md, on one GPU; `make needles` is the first of them.
#   bash experiments/needles.sh            all parts, in their order
#   bash experiments/needles.sh controls   one of: main controls answer adapted long hypotheses
#                                        spaced near topk retrofit
# Stopped, a part goes on where it was; runs/times.jsonl has the seconds. PYTHON is the interpreter, WORKERS the
# processes of an evaluation, SEEDS the seeds of both main arms (5).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} runs=runs/niah
pair=(--checkpoint=$runs/ratplus --checkpoint=$runs/attention)
short=(--seeds=3 --warmup=100 --save_every=500)
spare=(--seeds=5 --stragglers=2)  # three of five: without a memory some seeds never learn to match a key, as in `main`

train() { "$python" -m experiments.sft_niah --arm="$1" --workdir="$runs/$2" "${@:3}"; }
table() { "$python" -m experiments.eval_niah --workdir="runs/tables/$1" ${WORKERS:+--workers=$WORKERS} "${@:2}"; }
rows() { for row in "$@"; do echo "--only=$row"; done; }
begin_with() {  # table, and that whose cells it shares
  mkdir -p "runs/tables/$1"
  [ -f "runs/tables/$1/results.json" ] || cp "runs/tables/$2/results.json" "runs/tables/$1/"
}

main() {  # both arms, some of attention's seeds to spare, and the table
  local seeds=${SEEDS:-5}
  train ratplus ratplus --seeds="$seeds"
  train attention attention --seeds=$((2 * seeds + 2)) --stragglers=$((seeds + 2))
  table main "${pair[@]}"
}

controls() {  # the other arms, beside the main ones
  local arms=(sparse_branch ratplus_dense ratplus_mixed)
  train sparse_branch sparse_branch "${spare[@]}"
  for arm in ratplus_dense ratplus_mixed; do train $arm $arm; done
  begin_with controls main
  table controls --skip=first --skip=random --skip=oracle "${pair[@]}" "${arms[@]/#/--checkpoint=$runs/}"
}

answer() {  # prompts that end at the answer, for every mode; in the main table some do
  begin_with answer main
  table answer "${pair[@]}" --prompt_end=answer
}

spaced() {  # at most half a needle per window of 16 on average, then of 32
  mapfile -t only < <(rows dense "dilated:8 e" "dilated:16 e" "dilated:32 e")
  for spacing in 32 64; do table spaced-$spacing "${pair[@]}" --spacing=$spacing "${only[@]}"; done
}

near() {  # a symbol away from the asked key: about half of multikey_3's needles and 48 of multikey_2's 145
  mapfile -t only < <(rows dense "Quest 16, 1/8" "Quest 16, 1/16" "MoBA 16 decode, 1/16" "SnapKV aware, 1/16")
  table near "${pair[@]}" --near_miss=0.5 "${only[@]}"
}

topk() {  # the best single keys beside the blocks of Quest
  local only=()
  for share in 1/4 1/8 1/16 1/32; do only+=("--only=TopK, $share" "--only=Quest 16, $share"); done
  table topk "${pair[@]}" --only=dense "${only[@]}" --skip=first --skip=random --skip=oracle
}

adapted() {  # 1000 updates under one dilated mode
  local folders=()
  for arm in ratplus attention; do
    for mode in dilated:16,window=32 dilated:16 dilated:8 dilated:32; do
      name=${arm}-${mode//[:,=]/_}
      train $arm "$name" --init=$runs/$arm --mode=$mode --stages=1024x32 --steps=1000 "${short[@]}"
      folders+=(--checkpoint=$runs/"$name")
    done
  done
  mapfile -t only < <(rows dense "dilated:8 e" "dilated:16 e" "dilated:32 e" "dilated:16,w")
  table adapted "${pair[@]}" "${folders[@]}" --nomatch "${only[@]}"
}

long() {  # T = 4096 and the paper's budgets, from the parameters of T = 1024
  local models=(--checkpoint=$runs/ratplus-4096 --checkpoint=$runs/attention-4096) how=(--length=4096 --batch_size=8)
  train ratplus ratplus-4096 --init=$runs/ratplus --stages=4096x32 --steps=2000 "${short[@]}"
  train attention attention-4096 --init=$runs/attention --stages=4096x32 --steps=4000 "${short[@]}"
  table long "${models[@]}" --table=paper --count=128 "${how[@]}"
  table long-answer "${models[@]}" --table=paper --count=128 "${how[@]}" --prompt_end=answer --only=dense \
    --only=Quest
}

retrofit() {  # attention trained on text and needles, then the same updates with a memory added or without one
  local data=runs/data text=(--lm_data=runs/data --lm_rows=16) extra=(--init=$runs/text --stages=1024x32 "${short[@]}")
  [ -f $data/train.bin ] || "$python" -m experiments.prepare_data --workdir=$data
  train attention text "${text[@]}" "${spare[@]}"
  train attention text-attention "${extra[@]}" "${text[@]}" --steps=4000
  train ratplus text-memory "${extra[@]}" "${text[@]}" --steps=2000 --memory_rate=10
  train ratplus text-memory-dense "${extra[@]}" "${text[@]}" --steps=4000 --memory_rate=10 --mode=dense
  mapfile -t only < <(rows dense "Quest 16, 1/8" "Quest 16, 1/16" "MoBA 16 decode, 1/8" "MoBA 16 decode, 1/16" \
    "MoBA 16 prompt, 1/8" "MoBA 16 prompt, 1/16" "SnapKV aware, 1/8" "SnapKV aware, 1/16")
  local arms=(text text-attention text-memory text-memory-dense)
  table retrofit "${arms[@]/#/--checkpoint=$runs/}" "${only[@]}"
  for arm in "${arms[@]}"; do
    for seed in $runs/"$arm"/seed-*; do
      "$python" -m experiments.eval_lm --checkpoint="$seed" --data=$data --mode=dense \
        --workdir=runs/tables/retrofit-lm/"$arm"-"${seed##*-}"
    done
  done
}

hypotheses() { "$python" -m experiments.hypotheses "${pair[@]}" --workdir=runs/hypotheses ${WORKERS:+--workers=$WORKERS}; }

time_of() {
  printf '{"part": "%s", "began": %d, "seconds": %d}\n' "$part" "$began" $(($(date +%s) - began)) >> runs/times.jsonl
}

parts=("$@") failed=()
[ $# -gt 0 ] || parts=(main controls answer adapted long hypotheses spaced near topk retrofit)
mkdir -p runs
for part in "${parts[@]}"; do
  declare -F "$part" >/dev/null || { echo "unknown part $part; see the head of $0" >&2; exit 1; }
  began=$(date +%s)
  trap time_of EXIT
  set +e  # the others are still made
  (set -e; "$part")
  [ $? = 0 ] || failed+=("$part")
  set -e
  time_of
  trap - EXIT
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
