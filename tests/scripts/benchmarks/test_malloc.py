"""A kept heap: large tensors come from it, and not from the system."""

import subprocess
import sys

import pytest

from tests.test_architecture import ROOT

PLACES = """
import ctypes, sys
import torch
from scripts.benchmarks.malloc import LIBC, keep_heap

kept = keep_heap() if "keep" in sys.argv else None
if kept is not False:
    LIBC.sbrk.restype = ctypes.c_void_p
    tensor = torch.ones(16 << 20)
    top = LIBC.sbrk(0)
    inside = top - (128 << 20) < tensor.data_ptr() < top
    print("found", kept, inside)
"""


def told(*words: str) -> list[str]:
    """[what keep_heap said, was a large tensor in the heap]; [] where there is no glibc."""
    run = subprocess.run(
        [sys.executable, "-c", PLACES, *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return next(
        (line.split()[1:] for line in run.stdout.splitlines() if line.startswith("found")), []
    )


@pytest.mark.full
def test_large_tensors_come_from_the_heap():
    kept = told("keep")
    if kept:
        assert kept == ["True", "True"]
        assert told() == ["None", "False"], "else there is nothing to gain"
