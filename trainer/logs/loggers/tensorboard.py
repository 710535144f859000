"""Figures and pictures of a run as event files for TensorBoard, through torch's own writer."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from trainer.files.safe_files import make_inside
from trainer.logs.jsonl import MetricsRow
from trainer.logs.loggers.base import (
    Logger,
    Needs,
    RunEnd,
    RunStart,
    flat,
    is_dropped,
    numbers,
    rows_before,
)

MODULE = "torch.utils.tensorboard"  # imported when wanted: it needs the package tensorboard
SUMMARIES = "tensorboard.compat.proto.summary_pb2"
FOLDER = "tensorboard"
EVENTS = "events.out.tfevents.*"
FLUSH_S = 5


class TensorBoard(Logger):
    """Writes event files; names are those of metrics.jsonl, and evaluation/NAME.

    A run that goes on writes its earlier rows anew from the record: a killed run may have rows of
    steps that are taken again, and may lack the last ones before.

    Args:
        folder: of the event files, for this run alone; None = tensorboard/ in the run directory.
    """

    needs = Needs("tensorboard", "tensorboard")

    def __init__(self, folder: str | None = None):
        self.given = folder
        self.folder: Path | None = None

    def open(self, run: RunStart) -> None:
        """Replaces the event files of earlier starts."""
        if self.given is None:
            folder = make_inside(run.directory, FOLDER)
        else:
            folder = Path(self.given)
            folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(EVENTS):
            old.unlink()
        self.folder = folder
        self.summaries = importlib.import_module(SUMMARIES)
        self.writer = importlib.import_module(MODULE).SummaryWriter(str(folder), flush_secs=FLUSH_S)
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        # Indented, which markdown shows as it is.
        self.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), 0)
        self.start = run
        for row in rows_before(run):
            self.step(row)
        for record in run.evaluations:
            if record.get("value") is not None:
                self.evaluation(record["step"], record["name"], record["value"], record)

    def step(self, row: MetricsRow) -> None:
        """Writes the figures of a step, as one event."""
        figures = numbers(flat(row))
        del figures["step"]
        self._add(row.step, figures)

    def evaluation(self, step: int, name: str, value: float, made_of: Mapping[str, Any]) -> None:
        """Writes a value of an evaluation."""
        self._add(step, {f"evaluation/{name}": value})

    def drop_evaluation(self, step: int, parts: Sequence[str]) -> None:
        """Writes the event file anew without those values: nothing is taken out of one."""
        self.writer.close()
        kept = [row for row in self.start.evaluations if not is_dropped(row, step, parts)]
        self.open(replace(self.start, evaluations=kept))

    def _add(self, step: int, figures: Mapping[str, float]) -> None:
        values = [
            self.summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in figures.items()
        ]
        self.writer.file_writer.add_summary(self.summaries.Summary(value=values), step)

    def close(self, end: RunEnd) -> None:
        """Writes the pictures, and closes the file."""
        step = int(end.summary.get("step", 0))
        for image in end.images:
            picture = self.summaries.Summary.Image(encoded_image_string=image.read_bytes())
            value = self.summaries.Summary.Value(tag=f"report/{image.stem}", image=picture)
            self.writer.file_writer.add_summary(self.summaries.Summary(value=[value]), step)
        self.writer.close()

    @property
    def place(self) -> str | None:
        """The folder for `tensorboard --logdir`."""
        return None if self.folder is None else str(self.folder)
