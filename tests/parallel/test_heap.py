"""A kept heap: what a large tensor gave back serves the next one, so no page of it is asked for twice."""

import subprocess
import sys

from tests.test_architecture import ROOT

FAULTS = """
import resource, sys
import torch
from parallel.heap import keep_heap

kept = keep_heap() if "keep" in sys.argv else None

def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

touch()
print(kept, touch())
"""


def told(*words: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", FAULTS, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    return run.stdout.split()[-2:]


def test_large_temporaries_cost_their_pages_once():
    kept, faults = told("keep")
    if kept == "True":  # glibc
        assert int(faults) < 100 < 1000 < int(told()[1])
    else:
        assert kept == "False"
