#!/usr/bin/env bash
# Everything that a machine with a GPU should check, in one call of at most five minutes from the root of the repository:
#
#     PYTHON=.venv/bin/python OUT=. LIMIT=300 scripts/gpu_check.sh
#
# Writes $OUT/gpu_check.txt and one file a step, goes on after a step that fails or is cut off at its own limit, ends with a
# table, and exits with the number of steps that did not pass. What LIMIT seconds leave no time for is said as not run.
# It does not run attention with several ranks on one card: NCCL refuses that, and gloo carries no GPU tensors round a ring.
# In its place the blocks of 4 and 8 ranks are computed in turn on the card.
set -u -o pipefail

PYTHON=${PYTHON:-python}
OUT=${OUT:-.}
LIMIT=${LIMIT:-300}
mkdir -p "$OUT" || exit 1
REPORT=$OUT/gpu_check.txt
SCRATCH=$(mktemp -d) || exit 1
trap 'rm -rf "$SCRATCH"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
export WANDB_MODE=${WANDB_MODE:-disabled}
FAILED=0
TABLE=()
: > "$REPORT" || exit 1

say() { printf '%s\n' "$@" | tee -a "$REPORT"; }

step() {  # step SECONDS LINES NAME COMMAND...: shows the last LINES of its output
    local limit=$1 lines=$2 name=$3 began=$SECONDS code word output
    shift 3
    output=$OUT/gpu_check.${name// /_}.txt
    if [ $((LIMIT - SECONDS - 6)) -lt "$limit" ]; then limit=$((LIMIT - SECONDS - 6)); fi
    if [ "$limit" -lt 5 ]; then
        FAILED=$((FAILED + 1))
        TABLE+=("$(printf '%-10s %4s s  %s' 'not run' 0 "$name")")
        return
    fi
    say "" "=== $name (at most $limit s)" "    $*"
    timeout --signal=INT --kill-after=5 "$limit" "$@" > "$output" 2>&1  # at SIGINT pytest still names what failed
    code=$?
    tail -n "$lines" "$output" | cut -c1-300 | tee -a "$REPORT"
    case $code in 0) word=ok ;; 124 | 137) word="cut off" ;; *) word="FAILED $code" ;; esac
    [ "$code" -eq 0 ] || FAILED=$((FAILED + 1))
    TABLE+=("$(printf '%-10s %4s s  %s' "$word" $((SECONDS - began)) "$name")")
}

ENVIRONMENT='
import platform, sys, torch
count = torch.cuda.device_count()
cards = [f"{torch.cuda.get_device_name(i)} sm{torch.cuda.get_device_capability(i)}" for i in range(count)]
print(f"{platform.platform()}; Python {platform.python_version()}; torch {torch.__version__}; CUDA {torch.version.cuda}; {cards}")
import models, trainer.launch.elastic, trainer.run, scripts
sys.exit(0 if cards else "there is no GPU here, or this torch was built without CUDA")'
QUICKSTART=("$PYTHON" -m trainer experiment=quickstart steps=10 parallel.context=1 wandb.mode=disabled evaluation.every=0)
TESTS=("$PYTHON" -m pytest -p no:cacheprovider -o "addopts=-q --strict-markers --import-mode=importlib" -rfE --tb=short)

step 25 5 "environment" "$PYTHON" -c "$ENVIRONMENT"
step 25 6 "quickstart single bfloat16" "${QUICKSTART[@]}" engine=single precision=bfloat16 "run_dir=$SCRATCH/a"
step 25 6 "quickstart fsdp bfloat16" "${QUICKSTART[@]}" engine=fsdp precision=bfloat16 "run_dir=$SCRATCH/b"
step 90 60 "kernel tests on the card" "${TESTS[@]}" tests/models/kernels/test_sdpa_cuda.py tests/models/kernels/test_scan_fla.py
step 25 6 "quickstart single float32" "${QUICKSTART[@]}" engine=single precision=float32 "run_dir=$SCRATCH/c"
step 25 6 "quickstart fsdp float32" "${QUICKSTART[@]}" engine=fsdp precision=float32 "run_dir=$SCRATCH/d"
step 25 6 "activations on the host" "${QUICKSTART[@]}" engine.offload_activations=true precision=bfloat16 "run_dir=$SCRATCH/e"
step 25 10 "blocks of a ring of 4 and 8" "$PYTHON" -m scripts.blocks 32768
step 30 10 "a step with and without offload" "$PYTHON" -m scripts.offload
step 15 12 "which kernels scans have" "$PYTHON" -c 'from models.kernels.scan_fla import report; print(report())'
step 90 60 "other kernel tests" "${TESTS[@]}" tests/models/kernels --ignore=tests/models/kernels/test_sdpa_cuda.py \
    --ignore=tests/models/kernels/test_scan_fla.py

say "" "${TABLE[@]}" "$FAILED of ${#TABLE[@]} did not pass, $SECONDS s in all; report in $REPORT"
exit "$FAILED"
