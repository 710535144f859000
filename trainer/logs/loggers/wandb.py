"""Weights & Biases as a logger; trainer/logs/wandb.py does the work, and is imported if wanted."""

import importlib
from collections.abc import Mapping
from typing import Any

from trainer.logs import scratch
from trainer.logs.jsonl import MetricsRow
from trainer.logs.labels import labels
from trainer.logs.loggers.base import Logger, RunEnd, RunStart

MODULE = "trainer.logs.wandb"  # its import takes a second, and is not needed by every run


class Wandb(Logger):
    """The W&B run of a run directory; its settings are the group `wandb` of the config."""

    # W&B has threads of its own, and its alerts must not wait behind rows.
    background = False

    def __init__(self) -> None:
        self.run: Any = None
        self.address: str | None = None

    def open(self, run: RunStart) -> None:
        """Opens the W&B run; nothing under wandb.mode=disabled."""
        wish = run.settings.wandb
        if wish.mode == "disabled":
            return
        # W&B makes temporary folders when it is imported.
        with scratch.inside(run.directory):
            self.run = importlib.import_module(MODULE).WandbLogger(
                run.directory,
                mode=wish.mode,
                labels=labels(run.settings),
                config=run.config,
                init_timeout_s=wish.init_timeout_s,
                identity=run.identity,
                say=run.say,
            )

    def step(self, row: MetricsRow) -> None:
        """Sends the row of a step."""
        if self.run is not None:
            self.run.step(row)

    def evaluation(self, step: int, name: str, value: float, made_of: Mapping[str, Any]) -> None:
        """Sends one value, and what it is made of as a table at the end."""
        if self.run is not None:
            self.run.evaluation(
                step,
                name,
                value,
                by_position=made_of.get("by_position"),
                cells=made_of.get("cells"),
            )

    def alert(self, title: str, text: str) -> None:
        """Has the server send a message to the user."""
        if self.run is not None:
            self.run.alert(title, text)

    def close(self, end: RunEnd) -> None:
        """Sends the summary, pictures, tables and the checkpoint, and closes the W&B run."""
        if self.run is None:
            return
        if end.failed:
            self.run.finish({}, exit_code=1, wait_s=end.wait_s)
            return
        self.address = self.run.place
        self.run.finish(
            dict(end.summary), list(end.images), tables=end.tables, checkpoint=end.checkpoint
        )

    @property
    def place(self) -> str | None:
        """The run's address, or the directory that `wandb sync` takes."""
        return self.address
