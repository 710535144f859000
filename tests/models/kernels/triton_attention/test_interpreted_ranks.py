"""Runs interpreted_ranks.py: attention cut over three ranks, whose blocks our Triton kernels
compute, is that of one process in float64, forward and all gradients.

Rows of uneven documents; the last of contiguous ranks has none but padding. A ring's backward takes
the lse over ALL keys to the blocks of each rank.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.parity import EXACT
from tests.test_architecture import ROOT

PROGRAM = "tests.models.kernels.triton_attention.interpreted_ranks"
FEW = ("t5/ring/contiguous", "by-head/ulysses/contiguous")
CASES = 4 * 3 * 2


@pytest.mark.parametrize("chosen", [FEW, pytest.param((), marks=pytest.mark.full)], ids=len)
def test_kernels_over_ranks_compute_the_attention_of_one_process(chosen):
    told = subprocess.run(
        [sys.executable, "-m", PROGRAM, *chosen],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert told.returncode == 0, told.stderr[-4000:]
    cases = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(cases) == (len(chosen) or CASES)
    for case in cases:
        tokens = [rank["tokens"] for rank in case["ranks"]]
        assert min(tokens) == 0 or case["case"].endswith("zigzag")
        for rank in case["ranks"]:
            figure = max(rank["differences"].values())
            assert figure < EXACT[torch.float32], (case["case"], rank)
            # A rank of padding alone may have no block to compute.
            assert not rank["tokens"] or {"forward", "backward"} == set(rank["called"])
