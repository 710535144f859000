"""Base class of loggers: programs and services that receive the figures of a run as it goes on.

A logger is one class, here or in a package of the user, and one file of conf/logger/ that names
it; `logger=[NAME,NAME]` chooses some. Only rank 0 makes one. metrics.jsonl and evaluation.jsonl are
always written, so a logger that fails loses nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from trainer.config.schema import Config
from trainer.logs.jsonl import BESIDE, METRICS, MetricsRow, read


@dataclass(frozen=True)
class RunStart:
    """The run that a logger is opened for.

    Attributes:
        directory: of the run.
        name: of the run.
        step: that the run goes on from; 0 at its beginning.
        evaluations: rows of evaluation.jsonl up to that step.
        settings: of the run.
        config: the settings as plain data, without secrets, and under "code" what ran: commit,
            packages, machine, command.
        identity: that the checkpoint records of the run in a service; None at its beginning.
        say: takes a line for the user; only for a logger that runs on no thread.
    """

    directory: Path
    name: str
    step: int
    settings: Config
    config: dict[str, Any]
    evaluations: Sequence[Mapping[str, Any]] = ()
    identity: str | None = None
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class RunEnd:
    """The end of a run, or of one of its stages.

    Attributes:
        summary: figures of the whole run by name.
        images: pictures that were drawn.
        tables: rows by name.
        checkpoint: the newest one, where the user asked for it to be sent.
        failed: the run ended by an error.
        goes_on: another stage follows, in which the logger is opened again.
        wait_s: the longest wait for a network; None = the logger's own.
    """

    summary: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[Path] = ()
    tables: Mapping[str, Sequence[dict[str, Any]]] = field(default_factory=dict)
    checkpoint: Path | None = None
    failed: bool = False
    goes_on: bool = False
    wait_s: float | None = None


class Needs(NamedTuple):
    """A package that does not come with Longspan: the name to import and the name to install."""

    module: str
    package: str


class Logger(ABC):
    """Receives every row of metrics.jsonl and of evaluation.jsonl, in order.

    Methods may raise: the first error is said in one line, the logger is not called again, and the
    run goes on. Where `background` is true they are called on a thread of their own, so that a
    slow disk or server does not hold up training.

    Attributes:
        needs: a package that has to be installed; None = no further one.
        background: called on a thread.
    """

    needs: ClassVar[Needs | None] = None
    background: ClassVar[bool] = True

    @abstractmethod
    def open(self, run: RunStart) -> None:
        """Begins, or goes on after `run.step`: rows of later steps come again and count once."""

    @abstractmethod
    def step(self, row: MetricsRow) -> None:
        """Receives the row of a step, as metrics.jsonl has it."""

    @abstractmethod
    def evaluation(self, step: int, name: str, value: float, made_of: Mapping[str, Any]) -> None:
        """Receives one value of an evaluation.

        Args:
            step: of the run.
            name: of the figure.
            value: a loss in nats per token, or a share of 1.
            made_of: the further keys of its row of evaluation.jsonl, as by_position or cells.
        """

    def drop_evaluation(self, step: int, parts: Sequence[str]) -> None:  # noqa: B027
        """Forgets values of a step whose evaluation is done again; called right after `open`."""

    def close(self, end: RunEnd) -> None:  # noqa: B027
        """Ends the run, or a stage of it; nothing is sent afterwards."""

    @property
    def place(self) -> str | None:
        """Address or path of what was logged, for the last screen; None = there is none."""
        return None


def rows_before(run: RunStart) -> Iterator[MetricsRow]:
    """Yields the rows of metrics.jsonl up to the step that the run goes on from.

    Later ones may be in the file already where a thread reads it, and are given to the logger too.
    """
    for record in read(run.directory / METRICS):
        if record["step"] > run.step:
            return
        known = {name: record.get(name) for name in MetricsRow._fields}
        yield MetricsRow(**known)  # pyright: ignore[reportArgumentType]


def is_dropped(record: Mapping[str, Any], step: int, parts: Sequence[str]) -> bool:
    """Tells whether a row of evaluation.jsonl is of parts of a step that are done again."""
    return record["step"] == step and (record.get("part") or "held_out") in parts


def flat(row: MetricsRow) -> dict[str, Any]:
    """Returns the figures of a row by name, those beside it as auxiliary/NAME, without gaps."""
    parts = row._asdict()
    values: dict[str, Any] = {}
    for name, value in parts.items():
        if name not in BESIDE and value is not None:
            values[name] = value
    for part in BESIDE:
        for name, value in (parts[part] or {}).items():
            values[f"{part}/{name}"] = value
    return values


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the values that are numbers; a logger of curves has no place for the others."""
    figures: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            figures[name] = float(value)
    return figures
