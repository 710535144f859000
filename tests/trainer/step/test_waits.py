"""Places where a step of the loop reads tensors, and would wait for a device: all are known."""

import sys
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.support.pool import ranks
from tests.trainer.test_plans_ahead import COMMON, HEADS
from tests.trainer.verify.test_whole_runs import in_rank
from trainer.loop import Loop
from trainer.run_dir import make_run_dir
from trainer.verify.whole_runs import write_documents

ROOT = Path(__file__).parents[3]
READERS = ["item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"]
READERS += ["__index__"]
ALLOWED = {
    "trainer/step/sums.py read": "the read of sums and norm",
}
ON_THE_CPU = {
    "trainer/loop.py <dictcomp>": "sums that were read",
    "trainer/step/pipeline.py row": "memory of the fullest rank, told from host to host",
    "parallel/engines/gradients.py used_anywhere": "flags that go from host to host",
    "trainer/step/skip.py verdict": "figures that were read",
    "parallel/drivers/scan.py _origins": "a plan, which lies on the CPU",
    "parallel/engines/gradients.py clip_gradients": "elsewhere the factor stays on the device",
    "models/kernels/nonfinite.py all_finite": "elsewhere nobody looks",
    "parallel/engines/base.py step_unless": "elsewhere a fused optimiser looks on the device",
    "parallel/collectives.py _carried": "only where a backend sends from the CPU alone",
}


def watched(env, words, directory):
    """Takes a run; returns the places of the repository that read tensors in its later steps."""
    found = []
    step = Loop.take_step

    def watch(name):
        method = getattr(torch.Tensor, name)

        def reading(self, *args, **settings):
            frame = sys._getframe(1)
            path = Path(frame.f_code.co_filename)
            is_ours = ROOT in path.parents and ".venv" not in path.parts
            if is_ours and threading.current_thread() is threading.main_thread():
                found.append(f"{path.relative_to(ROOT)} {frame.f_code.co_name}")
            return method(self, *args, **settings)

        return mock.patch.object(torch.Tensor, name, reading)

    def watched_step(self, progress, given):
        if progress.step < 3:
            return step(self, progress, given)
        with ExitStack() as stack:
            for name in READERS:
                stack.enter_context(watch(name))
            step(self, progress, given)

    with mock.patch.object(Loop, "take_step", watched_step):
        assert in_rank(env, words, directory) == 0
    return Counter(found)


CASES = {
    "ring": ("parallel.method=ring", HEADS),
    "fetched keys": ("parallel.method=allgather", "model=sliding", HEADS),
    "scans": ("model=gated_delta", HEADS),
    "figures that lag": ("engine=fsdp", "log.lag=1", HEADS),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_tensors_where_it_must_and_nowhere_else(case, tmp_path):
    directory = tmp_path / "run"
    make_run_dir(directory)
    data = f"data.path={write_documents(tmp_path / 'text')}", f"data.cache={tmp_path / 'cache'}"
    words = (*COMMON, *data, *CASES[case], "parallel.context=2", f"run_dir={directory}")
    for found in ranks(2, watched, words, str(directory)):
        assert set(found) <= set(ALLOWED) | set(ON_THE_CPU)
        # Two steps are watched: each reads its figures once, and takes the norm out.
        assert found["trainer/step/sums.py read"] == 4
        assert found["parallel/engines/gradients.py used_anywhere"] == 2
