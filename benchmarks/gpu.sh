#!/usr/bin/env bash
# Everything that docs/results.md says awaits a GPU, one measurement after the other, the quickest first.
#
#     bash benchmarks/gpu.sh FOLDER                                  # results, base models and completions are kept there
#     TEACHER=code STEPS="20 40" CUDA=cpu bash benchmarks/gpu.sh FOLDER    # a trial on a CPU
#
# It goes on where it was stopped: what is trained and measured is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?say where results are to be kept: bash benchmarks/gpu.sh FOLDER}
teacher=${TEACHER:-code-34M}
steps=${STEPS:-1250 2500 5000}
device=${CUDA:-cuda}
python=${PYTHON:-python}
batch=${BATCH:-32}
mkdir -p "$folder"
export OMP_WAIT_POLICY=PASSIVE

echo "== $(date): tokens per call over training tokens, $teacher"
for number in $steps; do
    "$python" benchmarks/recipe.py "$folder" "train.batch_size=$batch" --teacher "$teacher" --arms recipe paper \
        --steps "$number" --seeds 1 | tee -a "$folder/recipe.md"
done

echo "== $(date): speed over the loop that is compiled too"
last=${steps##* }
"$python" -m ptp.cli.main train "$folder/$teacher" "train.max_steps=$last" "train.batch_size=$batch"
dtype=$([ "$device" = cuda ] && echo bfloat16 || echo float32)
"$python" benchmarks/budget.py "$folder/$teacher" --compile --dtype "$dtype" --budgets 0 6 8 12 24 \
    | tee -a "$folder/budget.txt"

echo "== $(date): steps of training, and sampling"
if [ "$device" = cuda ]; then
    "$python" benchmarks/train_step.py --device cuda | tee -a "$folder/train_step.txt"
    "$python" benchmarks/pregenerate.py --model "$folder/$teacher/teacher" --prompts "$folder/$teacher/prompts.jsonl" \
        --device cuda | tee -a "$folder/pregenerate.txt"
fi
echo "== $(date): done"
