#!/usr/bin/env bash
# What docs/results.md says awaits a GPU, but for the longest trainings: one measurement after the other, the quickest
# first, each printed and kept in FOLDER.
#
#     bash benchmarks/gpu.sh FOLDER
#     DEVICE=cpu TEACHER=code STEPS="2 4" BATCH=8 bash benchmarks/gpu.sh FOLDER    # a trial on a CPU
#
# Base models, completions and trainings in FOLDER are not made again; the measurements are.
# TEACHER, STEPS, BATCH: a base model of benchmarks/recipe.py, trainings of so many steps, sequences of a step.
set -euo pipefail
folder=$(realpath "${1:?say where results are to be kept: bash benchmarks/gpu.sh FOLDER}")
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
teacher=${TEACHER:-code-34M}
steps=${STEPS:-1250 2500 5000}
batch=${BATCH:-32}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
mkdir -p "$folder"
export OMP_WAIT_POLICY=PASSIVE
dtype=bfloat16
if [ "$device" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=
    dtype=float32
fi

if [ "$device" = cuda ]; then
    echo "== steps of training"
    "$python" benchmarks/train_step.py --device cuda | tee "$folder/train_step.txt"
fi

echo "== tokens per call over training tokens: $teacher"
for number in $steps; do
    "$python" benchmarks/recipe.py "$folder" "train.batch_size=$batch" --teacher "$teacher" --arms recipe paper \
        --steps "$number" --seeds 1 | tee "$folder/recipe-$number.md"
done

echo "== sampling"
"$python" benchmarks/pregenerate.py --model "$folder/$teacher/teacher" --prompts "$folder/$teacher/prompts.jsonl" \
    --device "$device" | tee "$folder/pregenerate.txt"

echo "== speed over a loop that is compiled too"
"$python" -m ptp.cli.main train "$folder/$teacher" "train.max_steps=${steps##* }" "train.batch_size=$batch"
"$python" benchmarks/budget.py "$folder/$teacher" --compile --dtype "$dtype" --budgets 0 6 8 12 24 \
    | tee "$folder/budget.txt"
