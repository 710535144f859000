#!/usr/bin/env bash
# Everything that a machine with a GPU should check, in one call of LIMIT seconds from the root of the repository:
#
#     PYTHON=.venv/bin/python OUT=check LIMIT=800 scripts/gpu_check.sh
#
# Writes $OUT/gpu_check.jsonl (a line for each figure, as they come), $OUT/gpu_check.md (tables, for LOG.md) and
# $OUT/gpu_check.log (everything else that was printed). A step that fails, or takes longer than its share, does not stop the
# others; the exit status is the number of steps that did not pass. The order is that in which a cut-off leaves the most.
# ONLY="drivers ring" runs some steps; DRY=1 rehearses all of them with tiny sizes on the CPU. What has to be installed stands
# in scripts/gpu_checks/wheels.txt; docs/gpus.md says what the figures mean.
set -u

export OUT=${OUT:-.} LIMIT=${LIMIT:-800} DRY=${DRY:-} ONLY=${ONLY:-}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
export WANDB_MODE=${WANDB_MODE:-disabled}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python}" -m scripts.gpu_checks
