"""The chunk kernels of flash-linear-attention, called as models/kernels/scan_fla.py calls them,
answer as our own scan does.

They run in Triton's interpreter, in float32 and without TF32, so differences are those of sums:
1e-5.
"""

import os
import subprocess
import sys

import pytest

from tests.test_architecture import ROOT

COSTLY = (["scalar"], ["vector"], ["vector", "before"], ["vector delta"])
KINDS = [["scalar delta"], *(pytest.param(words, marks=pytest.mark.full) for words in COSTLY)]


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("words", KINDS, ids=" ".join)
def test_a_kernel_answers_as_our_own_scan(words):
    told = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_interpreter", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert float(told.stdout.split()[-1]) < 1e-5
