#!/usr/bin/env bash
# Everything that a machine with a GPU should check, in one call of at most five minutes from the root of the repository:
#
#     PYTHON=.venv/bin/python OUT=. LIMIT=300 scripts/gpu_check.sh
#
# Writes $OUT/gpu_check.txt (the ends of what the steps printed, and a table) and $OUT/gpu_check.log (all of it). A step that
# fails or is cut off at its own limit does not stop the others; the exit status is the number of steps that did not pass.
# What LIMIT seconds leave no time for is said as not run. Steps of a group run at once: starting takes longer than computing.
# It does not run attention with several ranks on one card: NCCL refuses that, and gloo carries no GPU tensors round a ring.
# In its place the blocks of 4 and 8 ranks are computed in turn on the card.
set -u -o pipefail

PYTHON=${PYTHON:-python}
OUT=${OUT:-.}
LIMIT=${LIMIT:-300}
KILL=10  # seconds from SIGINT, at which pytest names what failed, to SIGKILL
mkdir -p "$OUT" || exit 1
REPORT=$OUT/gpu_check.txt
LOG=$OUT/gpu_check.log
SCRATCH=$(mktemp -d) || exit 1
trap 'rm -rf "$SCRATCH"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
export WANDB_MODE=${WANDB_MODE:-disabled}
FAILED=0
TABLE=()
GROUP=()
LINES_OF=()
: > "$REPORT" && : > "$LOG" || exit 1

say() { printf '%s\n' "$@" | tee -a "$REPORT"; }

begin() {  # begin SECONDS LINES NAME COMMAND...: into the group; the report shows the last LINES of its output
    local limit=$1 lines=$2 name=$3 left=$((LIMIT - SECONDS - KILL))
    shift 3
    GROUP+=("$name")
    LINES_OF+=("$lines")
    [ "$left" -ge "$limit" ] || limit=$left
    say "" "=== $name (at most $limit s)" "    $*"
    if [ "$limit" -lt 5 ]; then return; fi
    (
        began=$SECONDS  # below: what runs beside a shell is born deaf to SIGINT, which is given back here
        timeout --signal=INT --kill-after=$KILL "$limit" env --default-signal=INT "$@" > "$SCRATCH/$name.out" 2>&1
        echo "$? $((SECONDS - began))" > "$SCRATCH/$name.end"
    ) &
}

finish() {  # wait for the group and report it
    local at name code took word
    wait
    for at in "${!GROUP[@]}"; do
        name=${GROUP[$at]} code=none took=0
        if [ -f "$SCRATCH/$name.end" ]; then read -r code took < "$SCRATCH/$name.end"; fi
        case $code in none) word="not run" ;; 0) word=ok ;; 124 | 137) word="cut off" ;; *) word="FAILED $code" ;; esac
        [ "$code" = 0 ] || FAILED=$((FAILED + 1))
        TABLE+=("$(printf '%-10s %4s s  %s' "$word" "$took" "$name")")
        say "" "--- $name: $word, $took s"
        if [ -f "$SCRATCH/$name.out" ]; then
            { echo "=== $name"; cat "$SCRATCH/$name.out"; } >> "$LOG"
            { grep -aE ' (FAILED|ERROR)( |$)' "$SCRATCH/$name.out"; tail -n "${LINES_OF[$at]}" "$SCRATCH/$name.out"; } | cut -c1-300 |
                tee -a "$REPORT"
        fi
    done
    GROUP=() LINES_OF=()
}

step() {
    begin "$@"
    finish
}

ENVIRONMENT='
import platform, sys, torch
count = torch.cuda.device_count()
cards = [f"{torch.cuda.get_device_name(i)} sm{torch.cuda.get_device_capability(i)}" for i in range(count)]
print(f"{platform.platform()}; Python {platform.python_version()}; torch {torch.__version__}; CUDA {torch.version.cuda}; {cards}")
import models, trainer.launch.elastic, trainer.run, scripts
sys.exit(0 if cards else "there is no GPU here, or this torch was built without CUDA")'
QUICKSTART=("$PYTHON" -m trainer experiment=quickstart steps=10 parallel.context=1 wandb.mode=disabled evaluation.every=0)
TESTS=("$PYTHON" -m pytest -v -p no:cacheprovider -o "addopts=--strict-markers --import-mode=importlib" -rfE --tb=short)
# kernels are compiled by the processor, which takes longer than the tests themselves
if "$PYTHON" -c 'import xdist' 2> /dev/null; then TESTS+=(-n "${WORKERS:-4}"); fi

step 40 5 "environment" "$PYTHON" -c "$ENVIRONMENT"
begin 60 6 "quickstart single bfloat16" "${QUICKSTART[@]}" engine=single precision=bfloat16 "run_dir=$SCRATCH/a"
begin 60 6 "quickstart fsdp bfloat16" "${QUICKSTART[@]}" engine=fsdp precision=bfloat16 "run_dir=$SCRATCH/b"
begin 60 6 "quickstart single float32" "${QUICKSTART[@]}" engine=single precision=float32 "run_dir=$SCRATCH/c"
begin 60 6 "quickstart fsdp float32" "${QUICKSTART[@]}" engine=fsdp precision=float32 "run_dir=$SCRATCH/d"
begin 60 6 "activations on the host" "${QUICKSTART[@]}" engine.offload_activations=true precision=bfloat16 "run_dir=$SCRATCH/e"
begin 40 12 "which kernels scans have" "$PYTHON" -c 'from models.kernels.scan_fla import report; print(report())'
finish
step 80 60 "kernel tests of attention on the card" "${TESTS[@]}" tests/models/kernels/test_sdpa_cuda.py
step 90 60 "kernel tests of scans on the card" "${TESTS[@]}" tests/models/kernels/test_scan_fla.py
# these are timed or measured in bytes: nothing beside them
step 35 10 "blocks of a ring of 4 and 8" "$PYTHON" -m scripts.blocks 32768
step 60 10 "a step with and without offload" "$PYTHON" -m scripts.offload
step 60 60 "other kernel tests" "${TESTS[@]}" tests/models/kernels --ignore=tests/models/kernels/test_sdpa_cuda.py \
    --ignore=tests/models/kernels/test_scan_fla.py

say "" "${TABLE[@]}" "$FAILED of ${#TABLE[@]} did not pass, $SECONDS s in all; report in $REPORT"
exit "$FAILED"
