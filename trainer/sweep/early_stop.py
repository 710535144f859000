"""Successive halving over the jobs of a sweep, through Optuna's pruner.

After its first evaluation a job stays if its held-out loss is among the best 1/factor of those
that came so far, then again after evaluation number factor, factor^2, ... (asynchronous successive
halving, Li et al. 2020, arXiv:1810.05934). Jobs that were stopped, or ended, before count as well.
"""

import importlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.logs.jsonl import EVALUATION, read

MODULE = "optuna"  # imported when wanted: the package is optional
FIGURE = "held_out_loss"


class EarlyStop:
    """Names the jobs that are to be stopped.

    Args:
        factor: one in so many jobs goes on after each rung; 2 or more.
        directories: of all jobs, by number, in their order.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(self, factor: int, directories: Mapping[int, Path]):
        try:
            optuna = importlib.import_module(MODULE)
        except ImportError as error:
            raise UserError(
                f"hydra.launcher.stop_early={factor}: it needs the package optuna, which is not"
                " installed; pip install 'longspan[sweep]'"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
        study = optuna.create_study(direction="minimize", pruner=pruner)
        self.directories = directories
        self.trials: dict[int, Any] = {number: study.ask() for number in directories}
        self.seen = dict.fromkeys(directories, 0)
        self.losers: set[int] = set()

    def look(self, numbers: Collection[int]) -> Iterator[int]:
        """Reads the evaluations of some jobs; yields those that are to be stopped, each once."""
        for number in numbers:
            if number not in self.losers and self._loses(number):
                self.losers.add(number)
                yield number

    def _loses(self, number: int) -> bool:
        """Reports the evaluations that are new, one after another, as the rungs need them."""
        losses = []
        try:
            for row in read(self.directories[number] / EVALUATION):
                if row.get("name") == FIGURE and row.get("value") is not None:
                    losses.append(row["value"])
        except (ValueError, OSError):
            # The file is replaced where a job goes on; the next look reads it.
            return False
        trial = self.trials[number]
        while self.seen[number] < len(losses):
            loss = losses[self.seen[number]]
            self.seen[number] += 1
            trial.report(loss, self.seen[number])
            if trial.should_prune():
                return True
        return False
