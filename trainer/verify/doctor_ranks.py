"""Runs the doctor's examination of one stage over processes, and gives what rank 0 found.

`python -m trainer.verify.doctor_ranks` reads stages from standard input and writes the lines of the
tables as JSON: so that a process that is no script with a `__main__` of its own can ask for them.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from parallel.mesh import build_mesh
from trainer.config.schema import Config
from trainer.run_dir import plain_config
from trainer.verify.diagnosis import Diagnosis
from trainer.verify.doctor import Examination

# For a config that does not share its sequence. With two ranks, left and right are the same
# neighbour, and a wrong direction would go unnoticed.
RANKS = 3


def ranks_of(config: Config) -> int:
    """Returns the number of ranks that a config is examined on."""
    return config.parallel.context if config.parallel.context > 1 else RANKS


def examine_stage(config: Config, sabotage: str | None = None) -> list[Diagnosis]:
    """Examines the settings of one stage on ranks of its own.

    Args:
        config: of the stage.
        sabotage: the fault that one driver is given, by a name of trainer/verify/sabotage.py.
    """
    ranks = ranks_of(config)
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        arguments = (plain_config(config), ranks, meeting, sabotage, results)
        spawn(_examine, arguments, nprocs=ranks)
    return results.get()


def _examine(
    rank: int, tree: dict, ranks: int, meeting: str, sabotage: str | None, results: Any
) -> None:
    """Runs one rank of the examination; rank 0 puts the findings into `results`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    config = Config.model_validate(tree)
    mesh = build_mesh(ranks, 1, ulysses=config.parallel.ulysses, ring=config.parallel.ring)
    findings = list(Examination(config, mesh, sabotage).findings())
    if rank == 0:
        results.put(findings)
    dist.destroy_process_group()


def main() -> None:
    # A layer of the user's may print; the answer is on the output that was there at the start.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    stages = [Config.model_validate(tree) for tree in json.load(sys.stdin)]
    lines = [asdict(finding) for stage in stages for finding in examine_stage(stage)]
    json.dump(lines, answer)
    answer.close()


if __name__ == "__main__":
    main()
