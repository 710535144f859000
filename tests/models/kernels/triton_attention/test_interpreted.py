"""Runs interpreted_attention.py in a process of its own: whether a kernel is interpreted is decided
when Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import ROOT

FILE = Path(__file__).with_name("interpreted_attention.py")
OPTIONS = (
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-o",
    "addopts=--import-mode=importlib",
)
FEW = "T5-both or segments or (gpu and True)"


@pytest.mark.parametrize("chosen", [FEW, pytest.param("", marks=pytest.mark.full)])
def test_the_kernels_in_the_interpreter(chosen):
    told = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, "-k", chosen, str(FILE)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert told.returncode == 0, told.stdout[-4000:]
    assert re.search(r"^\d+ passed", told.stdout, re.M), told.stdout[-1000:]
