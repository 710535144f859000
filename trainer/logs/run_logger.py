"""Everything that is written of a run while it goes on: its lines on disk, its summary, its loggers
and its pictures."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.analysis.attention_maps import AttentionMap
from trainer import run_dir as directories
from trainer.config.instantiate import instantiate
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.files.limited_reader import json_object
from trainer.logs import summary
from trainer.logs.alerts import Alerts
from trainer.logs.console import Console
from trainer.logs.event_command import EventCommand, tell_of_hang
from trainer.logs.figures import read_figures
from trainer.logs.jsonl import EVALUATION, METRICS, Evaluations, Metrics, MetricsRow, read
from trainer.logs.loggers.base import Logger, RunEnd, RunStart
from trainer.logs.loggers.guarded import GuardedLogger
from trainer.logs.loggers.wandb import Wandb
from trainer.logs.plots import attention, grades, plots
from trainer.logs.redact import without_secrets, word_without_secrets
from trainer.watchdog import Hang, claim

NO_MAPS = "attention maps: none, no softmax of this model sees a whole row"
FAILED = "failed"
ALERT_S = 10.0  # a run that failed waits so long for its alert to be sent


class RunLogger:
    """Made on every rank, and written on rank 0 alone.

    Args:
        directory: of the run. writes: whether this rank is the one.
        notes: folder of the heartbeat notes of this attempt; None where there is one rank.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        console: Console,
        *,
        writes: bool,
        notes: Path | None = None,
    ):
        self.notes = notes
        self.directory = directory
        self.config = config
        self.console = console
        self.writes = writes
        self.loggers: dict[str, GuardedLogger] = {}
        self.wandb: Wandb | None = None
        self.alerts: Alerts | None = None
        self.on_event: EventCommand | None = None
        self.drawn: list[Path] = []

    def open(self, step: int, identity: str | None, **facts: Any) -> str | None:
        """Open everything, cut back to where the run stands; the id of its W&B run, if it has one.

        Args:
            step: the last one that was taken. identity: of the W&B run, from a checkpoint.
            facts: of the whole run, for summary.json.
        """
        if not self.writes:
            return identity
        self.metrics = Metrics(self.directory)
        self.evaluations = Evaluations(self.directory)
        for lines in (self.metrics, self.evaluations):
            lines.truncate_after(step)
        summary.note(self.directory, **facts)
        run = RunStart(
            directory=self.directory,
            name=self.config.name,
            step=step,
            settings=self.config,
            config=without_secrets({**directories.plain_config(self.config), "code": self._code()}),
            evaluations=tuple(read(self.directory / EVALUATION)),
            identity=identity,
            say=self.console.warn,
        )
        for name, node in self.config.logger.nodes.items():
            logger = instantiate(node, {}, f"logger.{name}")
            self._add(name, logger)
            self.loggers[name].open(run)
        self._open_alerts(step)
        if self.wandb is None or self.wandb.run is None:
            return identity
        return self.wandb.run.identity

    def _open_alerts(self, step: int) -> None:
        """Begins to look for events, where anybody is told of them."""
        command = self.config.log.on_event
        sends = self.wandb is not None and self.wandb.run is not None
        if command is None and not sends:
            return
        if command is not None:
            self.on_event = EventCommand(
                command, self.directory, self.config.name, self.console.warn
            )
            self.on_event.tell("start", step=step, steps=self.config.steps)
        self.alerts = Alerts(
            self.config.wandb.alerts if sends else False,
            self.config.name,
            self.config.optim.skip_above,
            self.wandb.alert if self.wandb is not None else lambda title, text: None,
            self._tell_event,
        )

    def _tell_event(self, kind: str, **facts: Any) -> None:
        """Tells the user's command; of a hang and a failure another rank may have told before."""
        if self.on_event is None:
            return
        is_shared = kind == "hang" or facts.get("outcome") == FAILED
        if is_shared and self.notes is not None and not claim(self.notes, kind):
            return
        self.on_event.tell(kind, **facts)

    def _add(self, name: str, logger: Logger) -> None:
        self.loggers[name] = GuardedLogger(name, logger, self.console.warn)
        if isinstance(logger, Wandb):
            self.wandb = logger

    @contextmanager
    def alerting(self) -> Iterator[None]:
        """Tell W&B when what happens inside ends the run otherwise than in order."""
        try:
            yield
        except Exception as error:
            self._alert_of(error)
            raise

    def _alert_of(self, error: Exception) -> None:
        if not self.writes:
            if isinstance(error, Hang) and self.notes is not None:
                tell_of_hang(self.config, self.directory, self.notes, str(error))
            return
        waits = False
        if self.alerts is not None:
            if isinstance(error, Hang):
                self.alerts.hung(str(error))
            is_ours = isinstance(error, UserError)
            text = str(error) if is_ours else f"{type(error).__name__}: {error}"
            self.alerts.ended(FAILED, text, why=text)
            waits = self.alerts.wants("end") or (
                isinstance(error, Hang) and self.alerts.wants("hang")
            )
        for logger in self.loggers.values():
            # W&B is waited for where it has a message to send, which would go with this process.
            if logger.logger is not self.wandb or waits:
                logger.close(RunEnd(failed=True, wait_s=ALERT_S))
        self._close_on_event()

    def _close_on_event(self) -> None:
        if self.on_event is not None:
            self.on_event.close()

    def _code(self) -> dict[str, Any]:
        """Returns the code, machine and command that the run recorded.

        The diff to the commit is left out and stays on this machine.
        """
        path = self.directory / directories.ENVIRONMENT
        if not path.is_file():
            return {}
        try:
            told = json_object(path, follow=False)
        except ValueError as error:
            self.console.warn(f"{error}: W&B is not told of the code")
            return {}
        known = {
            key: told.get(key) for key in ("commit", "python", "packages", "platform", "devices")
        }
        command = [word_without_secrets(word) for word in told.get("command") or []]
        return without_secrets({**known, "changed": bool(told.get("diff")), "command": command})

    def note(self, **facts: Any) -> None:
        """Facts of the whole run."""
        if self.writes:
            summary.note(self.directory, **facts)

    def step(self, row: MetricsRow) -> None:
        """A step is done."""
        self.console.step(row)
        if self.writes:
            self.metrics.add(row)
        for logger in self.loggers.values():
            logger.step(row)
        if self.alerts is not None:
            self.alerts.step(row)

    def evaluation(self, step: int, name: str, value: float, **made_of: Any) -> None:
        """One value of an evaluation, and what it is made of."""
        if self.writes:
            self.evaluations.add(step, name, value, **made_of)
        for logger in self.loggers.values():
            logger.evaluation(step, name, value, made_of)

    def drop_evaluation(self, step: int, parts: Sequence[str]) -> None:
        """Drop what is written of parts of this step's evaluation, which are done again."""
        if self.writes:
            self.evaluations.drop(step, parts)
            for logger in self.loggers.values():
                logger.drop_evaluation(step, parts)

    def maps(self, step: int, maps: Sequence[AttentionMap], left_out: int) -> None:
        """Draw attention maps, of all softmaxes but so many; W&B gets the picture at the end, with
        the others."""
        if not maps:
            self.console.say(NO_MAPS)
        elif self.writes:
            self.drawn = [
                attention(
                    maps, self.directory, f"{self.config.name}: attention at step {step}", left_out
                )
            ]

    def close(
        self, step: int, tokens: int, best: dict[str, float], *, goes_on: bool = False
    ) -> str | None:
        """Close everything and draw the pictures; where the W&B run is.

        Args:
            step: the last one that was taken. tokens: trained on. best: values by name.
            goes_on: another stage follows, which draws the pictures and sends them.
        """
        if not self.writes:
            return None
        self.metrics.close()
        self.evaluations.close()
        graded = grades(self.directory)
        lasts = {
            f"held_out_{name}": value
            for name, value in (graded[-1] if graded else {}).items()
            if name != "step"
        } | _named_figures(self.directory)
        came_to = {"step": step, "tokens": tokens, **self._came_to(best), **lasts}
        summary.note(self.directory, **came_to)
        images = [] if goes_on else self._pictures()
        if self.alerts is not None and not goes_on:
            head = (
                "finished"
                if step >= self.config.steps
                else f"stopped at step {step} of {self.config.steps}"
            )
            self.alerts.ended(
                head,
                ", ".join(f"{name} {value:.6g}" for name, value in came_to.items()),
                **came_to,
            )
        saved = (
            sorted((self.directory / "checkpoints").glob("step_*"))
            if self.config.wandb.artifacts and not goes_on
            else []
        )
        end = RunEnd(
            summary={**summary.read(self.directory), **came_to},
            images=images,
            tables={"held_out_grades": graded} if graded else {},
            checkpoint=saved[-1] if saved else None,
            goes_on=goes_on,
        )
        for logger in self.loggers.values():
            logger.close(end)
        self._close_on_event()
        return None if self.wandb is None else self.wandb.place

    def places(self) -> list[tuple[str, str]]:
        """Returns where each logger but W&B has what it was given."""
        found = []
        for name, logger in self.loggers.items():
            if logger.logger is not self.wandb and (place := logger.place) is not None:
                found.append((name, place))
        return found

    def _pictures(self) -> list[Path]:
        """Draws the pictures of the whole run; the attention maps are drawn already."""
        drawn = plots(self.directory, self.config.name) if self.config.log.plots else []
        return [*drawn, *self.drawn]

    def _came_to(self, best: dict[str, float]) -> dict[str, float]:
        """Over all steps, those before a resume as well."""
        found = read_figures(self.directory)
        losses = [
            row["loss"] for row in read(self.directory / METRICS) if row.get("loss") is not None
        ]
        values = {
            "best_loss": min(losses, default=math.nan),
            **{f"best_{name}": value for name, value in best.items()},
            "tokens_per_second": found.tokens_per_second,
            "peak_memory_bytes": found.peak_bytes,
        }
        return {name: value for name, value in values.items() if not math.isnan(value)}


def _named_figures(directory: Path) -> dict[str, float]:
    """Returns the last value of every figure of the named evaluations."""
    last = {}
    for row in read(directory / EVALUATION):
        if row.get("part") and row.get("value") is not None:
            last[row["name"]] = row["value"]
    return last
