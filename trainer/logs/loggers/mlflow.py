"""A run of MLflow that receives the settings, figures and pictures of a run."""

import importlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.files.safe_files import make_inside, read_inside, replace_inside
from trainer.logs.jsonl import MetricsRow
from trainer.logs.loggers.base import (
    Logger,
    Needs,
    RunEnd,
    RunStart,
    flat,
    numbers,
    rows_before,
)

MODULE = "mlflow"  # imported when wanted: the package is optional, and its import takes seconds
URI = "MLFLOW_TRACKING_URI"
EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"
FOLDER = "mlflow"
IDENTITY = f"{FOLDER}/run_id"
DEFAULT = "longspan"
LONGEST_PARAMETER = 500  # characters of a setting; the least that a version of the server takes
PARAMETERS_AT_ONCE = 100
FOREIGN = re.compile(r"[^\w\-. /]", re.ASCII)  # characters that every version refuses in a name


class MLflow(Logger):
    """Sends to MLflow; names are those of metrics.jsonl and evaluation/NAME, as `metric_name` has
    them.

    A run that goes on goes on in the same MLflow run. MLflow cannot take a figure back, so figures
    of steps that it has already are not sent again when those steps are taken again; what it lacks
    of the steps before is sent from the record.

    Args:
        uri: of the tracking server or store; None = MLFLOW_TRACKING_URI, else mlflow/ in the run
            directory.
        experiment: that the run is shown under; None = MLFLOW_EXPERIMENT_NAME, else longspan.
    """

    needs = Needs("mlflow", "mlflow-skinny")

    def __init__(self, uri: str | None = None, experiment: str | None = None):
        self.uri = uri
        self.experiment = experiment
        self.identity: str | None = None
        self.store = ""
        self.sent_step = 0
        self.sent: set[tuple[str, int]] = set()

    def open(self, run: RunStart) -> None:
        """Begins an MLflow run, or goes on in that of the run directory."""
        # Its statistics about itself would wait for a network.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self.store = self.uri or os.environ.get(URI) or _own_store(run.directory)
        if self.store.startswith("file:"):
            # Newer versions ask whether a folder is really wanted; it is, and needs no database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow = importlib.import_module(MODULE)
        self.entities = importlib.import_module(f"{MODULE}.entities")
        self.client = mlflow.MlflowClient(self.store)
        if not self._goes_on(run.directory):
            self._begin(run)
        for row in rows_before(run):
            self.step(row)
        for record in run.evaluations:
            if record.get("value") is not None:
                self.evaluation(record["step"], record["name"], record["value"], record)

    def _goes_on(self, directory: Path) -> bool:
        """Tells whether the run directory has a run on this server, and notes what it has."""
        try:
            lines = read_inside(directory, IDENTITY).decode("utf-8").splitlines()
        except FileNotFoundError:
            return False
        if len(lines) != 2 or lines[1] != self.store:
            return False
        found = self.client.get_run(lines[0])
        self.identity = lines[0]
        self.client.update_run(self.identity, status="RUNNING")
        self.sent_step = int(found.data.metrics.get("step", 0))
        for name in found.data.metrics:
            if name.startswith("evaluation/"):
                for point in self.client.get_metric_history(self.identity, name):
                    self.sent.add((name, point.step))
        return True

    def _begin(self, run: RunStart) -> None:
        name = self.experiment or os.environ.get(EXPERIMENT) or DEFAULT
        known = self.client.get_experiment_by_name(name)
        if known is None:
            experiment = self.client.create_experiment(name)
        else:
            experiment = known.experiment_id
        made = self.client.create_run(experiment, run_name=run.name)
        self.identity = made.info.run_id
        replace_inside(run.directory, IDENTITY, f"{self.identity}\n{self.store}\n")
        parameters = [
            self.entities.Param(key, value[:LONGEST_PARAMETER])
            for key, value in _leaves(run.config)
        ]
        for begin in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self.client.log_batch(
                self.identity, params=parameters[begin : begin + PARAMETERS_AT_ONCE]
            )

    def step(self, row: MetricsRow) -> None:
        """Sends the figures of a step; nothing where the server has them."""
        if row.step <= self.sent_step:
            return
        figures = numbers(flat(row))
        # Last: a store that was cut off within a row does not count that row as sent.
        figures["step"] = figures.pop("step")
        self._send(row.step, figures)
        self.sent_step = row.step

    def evaluation(self, step: int, name: str, value: float, made_of: Mapping[str, Any]) -> None:
        """Sends a value of an evaluation; nothing where the server has it."""
        key = metric_name(f"evaluation/{name}")
        if (key, step) not in self.sent:
            self._send(step, {key: value})
            self.sent.add((key, step))

    def _send(self, step: int, figures: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = []
        for name, value in figures.items():
            metrics.append(self.entities.Metric(metric_name(name), value, now, step))
        self.client.log_batch(self.identity, metrics=metrics)

    def close(self, end: RunEnd) -> None:
        """Sends the pictures, and ends the MLflow run."""
        for image in end.images:
            self.client.log_artifact(self.identity, str(image), "report")
        if not end.goes_on:
            self.client.set_terminated(self.identity, "FAILED" if end.failed else "FINISHED")

    @property
    def place(self) -> str | None:
        """The store and the run in it."""
        return None if self.identity is None else f"{self.store} run {self.identity}"


def metric_name(name: str) -> str:
    """Returns the name of a figure as MLflow takes it.

    A store of files has a folder for what stands before each `/`: the figure `refusal` and the
    figure `refusal/over_refusal` cannot be both, so that only the first `/` stays one.
    """
    group, slash, rest = FOREIGN.sub("_", name).partition("/")
    return f"{group}{slash}{rest.replace('/', '.')}"


def _own_store(directory: Path) -> str:
    return make_inside(directory, FOLDER).resolve().as_uri()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields every setting by its dotted key, as text."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
