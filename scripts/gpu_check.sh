#!/usr/bin/env bash
# Everything that a machine with a GPU should check, in one call from the root of the repository:
#
#     PYTHON=.venv/bin/python OUT=. scripts/gpu_check.sh
#
# Writes a text report to $OUT/gpu_check.txt, goes on after a step that fails, and exits with the number of those.
# It does not run attention with several ranks on one card: NCCL refuses that, and gloo carries no GPU tensors round a ring.
# In its place the blocks of 4 and 8 ranks are computed in turn on the card, and ranks are compared on the CPU.
set -u -o pipefail

PYTHON=${PYTHON:-python}
OUT=${OUT:-.}
mkdir -p "$OUT" || exit 1
REPORT=$OUT/gpu_check.txt
SCRATCH=$(mktemp -d) || exit 1
trap 'rm -rf "$SCRATCH"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export WANDB_MODE=${WANDB_MODE:-disabled}
FAILED=0
: > "$REPORT" || exit 1

say() { printf '%s\n' "$@" | tee -a "$REPORT"; }

step() {  # step NAME COMMAND...
    local name=$1 began=$SECONDS code
    shift
    say "" "=== $name" "    $*"
    "$@" 2>&1 | tee -a "$REPORT"
    code=${PIPESTATUS[0]}
    if [ "$code" -eq 0 ]; then
        say "--- ok, $((SECONDS - began)) s: $name"
    else
        FAILED=$((FAILED + 1))
        say "!!! FAILED with status $code, $((SECONDS - began)) s: $name"
    fi
}

environment() {
    "$PYTHON" - <<'PY'
import platform, sys
import torch
count = torch.cuda.device_count()
cards = [f"{torch.cuda.get_device_name(i)} sm{''.join(map(str, torch.cuda.get_device_capability(i)))}" for i in range(count)]
print(f"{platform.platform()}; Python {platform.python_version()}; torch {torch.__version__}; CUDA {torch.version.cuda}; cards {cards}")
sys.exit(0 if cards else "there is no GPU here, or this torch was built without CUDA")
PY
}

CARDS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || CARDS=0
CHOICE='(full or sliding or packed or alibi or gqa) and (2 or 3) and (ring or fetch)'
quickstart=("$PYTHON" -m trainer experiment=quickstart steps=20 precision=bfloat16 parallel.context=1
    wandb.mode=disabled)

step "environment" environment
step "kernels, against the general tile" "$PYTHON" -m pytest tests/models/kernels
step "2 and 3 ranks on the CPU, against one" env CUDA_VISIBLE_DEVICES= "$PYTHON" -m pytest tests/parallel/test_parity.py \
    -m "not full" -k "$CHOICE"
step "quickstart, 20 steps in bfloat16 on one card" "${quickstart[@]}" "run_dir=$SCRATCH/quickstart"
step "the same with activations on the host" "${quickstart[@]}" engine.offload_activations=true "run_dir=$SCRATCH/offload"
step "a step with and without its activations on the host" "$PYTHON" -m scripts.offload
step "which kernels scans have" "$PYTHON" -c 'from models.kernels.scan_cuda import report; print(report())'
step "the linear-time family on one card" "$PYTHON" -m scripts.bench mixers ranks=1 device=cuda
step "blocks of a ring of 4 and 8 on one device" "$PYTHON" -m scripts.blocks 32768
if [ "$CARDS" -ge 2 ]; then
    step "bench of attention" "$PYTHON" -m scripts.bench attention device=cuda
else  # a rank takes the card of its number, and there are two ranks
    step "bench of attention, on the CPU" env CUDA_VISIBLE_DEVICES= "$PYTHON" -m scripts.bench attention
fi

say "" "$FAILED steps failed; report in $REPORT"
exit "$FAILED"
