"""python -m scripts.doctor KEY=VALUE ...: proves that sharing the sequence changes nothing.

Takes the overrides of a run and examines that very config before step 1. Prints a table; exit
status 1 when a line of it fails, 2 for a config that is refused. doctor.break=mask|scale|leak|order
sabotages one driver, so that a fault must be reported.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence

import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from parallel.mesh import build_mesh
from trainer.config.schema import Config
from trainer.config.stages import Stage, plan_of
from trainer.entry import run_command
from trainer.errors import BAD_CONFIG, UserError
from trainer.preflight.prepare import load_config
from trainer.run_dir import plain_config
from trainer.verify.diagnosis_table import show
from trainer.verify.doctor import Examination
from trainer.verify.sabotage import BREAKS

BREAK = "doctor.break="
# For a config that does not share its sequence. With two ranks, left and right are the same
# neighbour, and a wrong direction would go unnoticed.
RANKS = 3


def examine(
    rank: int, tree: dict, ranks: int, meeting: str, sabotage: str | None, results: object
) -> None:
    """Runs one rank of the examination; rank 0 puts the findings into `results`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    config = Config.model_validate(tree)
    mesh = build_mesh(ranks, 1, ulysses=config.parallel.ulysses, ring=config.parallel.ring)
    findings = list(Examination(config, mesh, sabotage).findings())
    if rank == 0:
        results.put(findings)  # type: ignore[attr-defined]
    dist.destroy_process_group()


def main(words: Sequence[str]) -> int:
    sabotage = None
    overrides = []
    for word in words:
        if not word.startswith(BREAK):
            overrides.append(word)
        elif sabotage is None:
            sabotage = word.removeprefix(BREAK)
    try:
        if sabotage is not None and sabotage not in BREAKS:
            choices = ", ".join(BREAKS)
            raise UserError(f"unknown {BREAK}{sabotage}; choose one of {choices}")
        config = load_config(overrides)
    except UserError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    passed = [diagnose(stage, sabotage) for stage in plan_of(config)]
    return int(not all(passed))


def diagnose(stage: Stage, sabotage: str | None) -> bool:
    """Examines the settings of one stage and prints the table; returns whether all is well."""
    config = stage.config
    ranks = config.parallel.context if config.parallel.context > 1 else RANKS
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        arguments = (plain_config(config), ranks, meeting, sabotage, results)
        spawn(examine, arguments, nprocs=ranks)
    findings = results.get()
    method = f"{config.parallel.method}, {config.parallel.layout}"
    name = config.name if stage.count == 1 else f"{config.name}, {stage.label}"
    show(findings, f"{name}: one device against {ranks} ranks ({method}), float64")
    return all(finding.passed for finding in findings)


if __name__ == "__main__":
    run_command(main, __doc__)
