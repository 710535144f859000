"""Trains a run from Python: in ranks of its own, or as a rank that torchrun started."""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.__main__ import join_run, launch_run
from trainer.config.schema import Config
from trainer.data.folders import furnish
from trainer.errors import DONE, UserError
from trainer.launch import starters
from trainer.library.load import load
from trainer.library.loaded_model import LoadedModel
from trainer.library.words import settings_of
from trainer.logs.jsonl import METRICS, read
from trainer.preflight.prepare import load_config


@dataclass(frozen=True)
class TrainedRun:
    """A run that came to its end.

    Attributes:
        directory: of the run.
    """

    directory: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, one for each logged step."""
        return list(read(self.directory / METRICS))

    @property
    def losses(self) -> list[float]:
        """Loss of every logged step in nats per token; nan where nothing was predicted."""
        losses = []
        for row in self.metrics:
            loss = row.get("loss")
            losses.append(math.nan if loss is None else loss)
        return losses

    def load(self, *, trust: bool = False) -> LoadedModel:
        """Opens the newest checkpoint; see longspan.load."""
        return load(self.directory, trust=trust)


def train(words: str | Sequence[str]) -> TrainedRun:
    """Trains a run to its end; it resumes where run_dir= holds one.

    In a process that is no rank it starts the ranks and waits for them; this process stays as it
    was. Under torchrun, srun or mpirun every process calls it with the same settings and is a rank.

    Args:
        words: "experiment=quickstart steps=20", or a list of such settings.

    Raises:
        UserError: settings that cannot be honoured, or a run that failed or was stopped; `code` is
            the exit status that the command would have had.
    """
    furnish()
    with settings_of(words) as settings:
        return _train(settings)


def _train(settings: Sequence[str]) -> TrainedRun:
    try:
        start = starters.started()
    except starters.Incomplete as error:
        raise UserError(str(error)) from error
    if start is None:
        return _train_in_ranks(settings)
    if dist.is_initialized():
        raise UserError(
            "the process group is there already, and a run makes one of its own; call"
            " torch.distributed.destroy_process_group() first"
        )
    with environment_of_ranks():
        code, directory = join_run(settings, start)
    if code != DONE:
        raise UserError(f"the run in {directory} ended with status {code}", code)
    return TrainedRun(directory)


def _train_in_ranks(settings: Sequence[str]) -> TrainedRun:
    config = load_config(settings)
    _demand_run_here(config)
    with environment_of_ranks():
        report, directory = launch_run(config)
    if report.code != DONE:
        raise UserError(report.message or f"the run in {directory} was stopped", report.code)
    return TrainedRun(directory)


def _demand_run_here(config: Config) -> None:
    if config.launch.name == "slurm":
        raise UserError(
            "launch=slurm: a batch job outlives this process; give the settings to"
            " `python -m trainer`"
        )
    if config.launch.dry_run:
        raise UserError("launch.dry_run=true: nothing would be trained; use longspan.check")


@contextmanager
def environment_of_ranks() -> Iterator[None]:
    """Lets the ranks find what this process finds, and undoes what starting them leaves behind."""
    before = dict(os.environ)
    own = [folder for folder in sys.path if folder and not _belongs_to_python(folder)]
    inherited = [folder for folder in before.get("PYTHONPATH", "").split(os.pathsep) if folder]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*own, *inherited]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _belongs_to_python(folder: str) -> bool:
    """Tells whether every Python of this installation has the folder on its path anyway."""
    place = Path(folder).absolute()
    return any(place.is_relative_to(root) for root in (sys.prefix, sys.base_prefix))
