#!/usr/bin/env bash
# The runs behind the tables of kernels and whole models on a GPU in experiments/README.md and docs/kernels.md.
#   bash experiments/gpu.sh            all parts, in their order
#   bash experiments/gpu.sh ops        one of: tests ops gradients crossovers lengths short prompt decode
#                                     modes train pretrain seven; authors, where REFERENCE is set
# PYTHON is the interpreter; REFERENCE, a checkout of the RAT+ authors' code, is timed beside ours; SOURCE is a folder
# of Python sources to train on.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} runs=runs/gpu
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.94}

ops_bench() { "$python" -m experiments.bench_ops --workdir="$runs/$1" "${@:2}"; }
model_bench() { "$python" -m experiments.bench_model --workdir="$runs/$1" --dtype=bfloat16 "${@:2}"; }

tests() { "$python" -m pytest tests/kernels/test_suite.py tests/kernels/test_gpu.py; }
ops() { ops_bench ops ${REFERENCE:+--torch_reference="$REFERENCE"}; }
gradients() { ops_bench gradients --gradient ${REFERENCE:+--torch_reference="$REFERENCE"}; }
crossovers() {  # of values, and of values with gradients
  ops_bench crossovers --crossovers
  ops_bench crossovers --crossovers --gradient
}
lengths() {  # time of a prompt against its length
  ops_bench lengths --op=prefill --implementation="mosaic_gpu, cudnn" --implementation=mosaic_gpu --rounds=3 \
    --dilation=16 --dilation=64 \
    --length=4096 --length=16384 --length=65536 --length=131072 --length=262144 --length=524288
}
short() {  # the same where rows are short: dense attention beside every implementation
  ops_bench short --op=prefill --dilation=16 --dilation=64 --batch_size=32 --length=128 --length=512 --length=2048 \
    --implementation=xla --implementation="mosaic_gpu, cudnn_masked" --implementation="mosaic_gpu, cudnn" \
    --implementation=mosaic_gpu
}
decode() {  # tokens/s of the 1.4B model against batch and context
  local size=(--preset=ratplus-1b --mode=dilated:64)
  model_bench decode "${size[@]}" --context=16384 --batch_size=1 --batch_size=32 --batch_size=256 --batch_size=1024
  model_bench decode-context "${size[@]}" --context=4096 --context=16384 --context=65536 --batch_size=16
}
prompt() {  # prefill of the 1.4B model
  model_bench prompt --preset=ratplus-1b --part=prefill --mode=dilated:16 --mode=dilated:64 --batch_size=4 \
    --context=4096 --context=16384 --context=65536
}
modes() {  # a decode step of every mode, plain heads and grouped ones
  local size=(--layers=4 --width=2048 --heads=16 --batch_size=64) modes=()
  for mode in dense dilated:16 dilated:64 quest:0.0625 quest:0.0625,block=16 moba:0.0625 dilated_topk:64,0.0625 snapkv:0.0625; do
    modes+=(--mode=$mode)
  done
  model_bench modes "${size[@]}" "${modes[@]}"
  model_bench modes-grouped "${size[@]}" "${modes[@]}" --kv_heads=2
}
authors() {  # the 1.4B model beside the authors' own
  local size=(--preset=ratplus-1b --mode=dilated:64 --torch_reference="${REFERENCE:?a checkout of the RAT+ authors code}")
  model_bench authors-decode "${size[@]}" --context=16384 --batch_size=32 --batch_size=1024
  model_bench authors-train "${size[@]}" --part=train --context=4096 --batch_size=8 --rounds=3 --unroll
}
train() {  # a step of the 1.4B model: active recurrence learning, and two dense updates
  model_bench train --preset=ratplus-1b --part=train --mode=dilated:64 --context=4096 --batch_size=8 --rounds=3 --unroll
}
pretrain() {  # some hundred steps of it on real text
  local data=$runs/data
  [ -f $data/train.bin ] || "$python" -m experiments.prepare_data --workdir=$data ${SOURCE:+--source="$SOURCE" --pattern="*.py"}
  "$python" -m experiments.pretrain --preset=ratplus-1b --dtype=bfloat16 --data=$data --length=4096 --batch_size=8 \
    --steps=200 --learning_rate=3e-4 --unroll --save_every=0 --log_every=10 --workdir=$runs/pretrain
}

seven() {  # models of seven billion parameters, written and loaded as files, under four modes
  local modes=(--mode=dense --mode=dilated:64 --mode=quest:0.0625,block=64 --mode=snapkv:0.0625)
  for preset in olmo2-7b ratplus-7b; do
    model_bench $preset --preset=$preset --through_files --part=prefill --part=decode "${modes[@]}"
  done
}

parts=("$@")
[ $# -gt 0 ] || parts=(tests ops gradients crossovers lengths short prompt decode modes train pretrain seven ${REFERENCE:+authors})
for part in "${parts[@]}"; do
  declare -F "$part" >/dev/null || { echo "unknown part $part; see the head of $0" >&2; exit 1; }
  "$part"
done
