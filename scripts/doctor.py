"""python -m scripts.doctor KEY=VALUE ...: prove on your own config, before step 1, that cutting the
sequence changes nothing.

Takes the overrides of the run. Prints a table; exit status 1 when a line of it fails, 2 for a wish
that cannot be honoured. doctor.break=mask|scale|leak|order sabotages one driver for the occasion:
the doctor must then find a fault.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from parallel.mesh import build_mesh
from trainer.config.schema import Config
from trainer.entry import run_command
from trainer.errors import BAD_CONFIG, UserError
from trainer.preflight.prepare import load_config
from trainer.run_dir import plain_config
from trainer.verify.doctor import BREAKS, Diagnosis, Examination

BREAK = "doctor.break="
# where the config does not share its sequence; with fewer, left and right are the same neighbour
RANKS = 3


def examine(
    rank: int, config: dict, ranks: int, meeting: str, sabotage: str | None, told: object
) -> None:
    """One rank of the examination."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    wished = Config.model_validate(config)
    mesh = build_mesh(ranks, 1, ulysses=wished.parallel.ulysses, ring=wished.parallel.ring)
    found = list(Examination(wished, mesh, sabotage).findings())
    if rank == 0:
        told.put(found)  # type: ignore[attr-defined]
    dist.destroy_process_group()


def show(findings: Sequence[Diagnosis], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("check", "what", "figure", "bound", "", "note"):
        table.add_column(name, justify="right" if name in ("figure", "bound") else "left")
    for f in findings:
        sign = ">" if f.check == "reach" else "<"
        table.add_row(
            f.check,
            f.what,
            f"{f.figure:.1e}",
            f"{sign} {f.bound:.0e}",
            "ok" if f.fine else "FAULT",
            f.note,
        )
    Console(width=None if sys.stdout.isatty() else 132).print(table)


def main(words: Sequence[str]) -> int:
    sabotage = next((word.removeprefix(BREAK) for word in words if word.startswith(BREAK)), None)
    try:
        if sabotage is not None and sabotage not in BREAKS:
            raise UserError(f"{BREAK}{sabotage}: the doctor knows how to break {', '.join(BREAKS)}")
        config = load_config([word for word in words if not word.startswith(BREAK)])
    except UserError as fault:
        print(fault, file=sys.stderr)
        return BAD_CONFIG
    ranks = config.parallel.context if config.parallel.context > 1 else RANKS
    told = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (plain_config(config), ranks, os.path.join(folder, "meeting"), sabotage, told)
        spawn(examine, arguments, nprocs=ranks)
    findings = told.get()
    method = f"{config.parallel.method}, {config.parallel.layout}"
    show(findings, f"{config.name}: one device against {ranks} ranks ({method}), float64")
    return 0 if all(f.fine for f in findings) else 1


if __name__ == "__main__":
    run_command(main, __doc__)
