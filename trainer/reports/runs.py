"""What the directories of runs tell: every run of a folder as one record, however far it got."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from trainer.errors import UserError
from trainer.limited_reader import json_object, yaml_file
from trainer.logs import summary
from trainer.logs.jsonl import EVALUATION, METRICS, read
from trainer.logs.redact import redacted, word_without_secrets
from trainer.run_dir import CONFIG, ENVIRONMENT
from trainer.sweep.batch import JOB_OF
from trainer.sweep.jobs import DONE, FAILED, OUTCOME, OUTPUT, Job, essence, varied
from trainer.sweep.sweep import RECORD

HELD_OUT = "held_out_loss"
SIGNS = (CONFIG, METRICS, OUTCOME, OUTPUT)  # any of them makes a folder that of a run
UNKNOWN = math.nan
OF_SWEEP = (
    "wandb.group=",
    "wandb.name=",
    "wandb.tags=",
)  # what a sweep may add to the settings of a job


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes: name: of its folder. label: the settings in which it differs from the others.
        settings: all that were given. finished: whether it got to its last step in order. state:
        how it ended, or how far it got, in words. command: what starts the same run. parameters;
        flops_per_token: of training; loss, held_out: the last ones, nats per token; tokens: trained
        on. tokens_per_second: of the middle step. seconds: of training, without evaluation and
        saving. ranks. peak_bytes: most on one rank. sent_bytes: by the rank that sends most, each
        step. curve: [(tokens, loss)]. checks: [(tokens, held-out loss)]. by_position: the last
        evaluation's, by (begin, end). graded: the last value of every other evaluation. grades: its
        [(tokens, value)]. What is not known is NaN, or empty.
    """

    name: str
    label: str = ""
    settings: tuple[str, ...] = ()
    finished: bool = False
    state: str = "not started"
    command: str = ""
    parameters: float = UNKNOWN
    flops_per_token: float = UNKNOWN
    loss: float = UNKNOWN
    held_out: float = UNKNOWN
    tokens: float = UNKNOWN
    tokens_per_second: float = UNKNOWN
    seconds: float = UNKNOWN
    ranks: float = UNKNOWN
    peak_bytes: float = UNKNOWN
    sent_bytes: float = UNKNOWN
    curve: list[tuple[float, float]] = field(default_factory=list)
    checks: list[tuple[float, float]] = field(default_factory=list)
    by_position: dict[tuple[int, int], float] = field(default_factory=dict)
    graded: dict[str, float] = field(default_factory=dict)
    grades: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def collect(directory: Path) -> list[RunRecord]:
    """The run in a directory, or every run below it.

    Raises:
        Fault: there is no such directory, or no run in it.
    """
    if not directory.is_dir():
        raise UserError(
            f"{directory}: there is no such directory; name that of a run, or of a sweep"
        )
    places = sorted(_places(directory), key=_in_order)
    if not places:
        raise UserError(
            f"{directory} holds no run and no sweep: no {CONFIG} or {METRICS} in it or below it;"
            " name another"
        )
    own = directory.resolve().name  # of a single run
    runs = [
        _told(place, own if place == directory else str(place.relative_to(directory)))
        for place in places
    ]
    jobs = [Job(number, run.settings, directory) for number, run in enumerate(runs) if run.settings]
    names = varied(jobs) if len(jobs) > 1 else {}
    return [
        replace(run, label=names.get(number) or run.label or run.name)
        for number, run in enumerate(runs)
    ]


def _places(directory: Path) -> Iterator[Path]:
    """Folders of runs, not looked into further; of a sweep also those whose job did not begin."""
    if any((directory / sign).is_file() for sign in SIGNS):
        yield directory
        return
    within = [
        path
        for path in directory.iterdir()
        if path.is_dir() and path.name != "report" and path.name[0] != "."
    ]
    for path in within:
        empty = not any(path.iterdir()) and (directory / RECORD).is_file()
        yield from [path] if empty else _places(path)


def _in_order(path: Path) -> list[tuple[bool, int, str]]:
    """Folders by their numbers where they are numbers, so that 10 comes after 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.parts]


def _told(directory: Path, name: str) -> RunRecord:
    """Everything that can be read of one run; what cannot be read is said in its state."""
    run = RunRecord(name)
    troubles = []
    for reader in (_began, _summed, _trained, _evaluated, _ended):
        try:
            run = replace(run, **reader(directory, run))
        except (ValueError, TypeError, KeyError, AttributeError, OSError, OverflowError) as error:
            troubles.append(" ".join(str(error).split()) or type(error).__name__)
    return replace(
        run, state=f"{run.state} ({'; '.join(dict.fromkeys(troubles))})" if troubles else run.state
    )


def _began(directory: Path, run: RunRecord) -> dict[str, Any]:
    """What was asked for: of a job as its sweep noted it, else of the command."""
    settings = ()
    label = run.name
    if (directory / OUTCOME).is_file():
        settings = tuple(json_object(directory / OUTCOME, follow=False)["settings"])
    if (directory / ENVIRONMENT).is_file() and not settings:
        words = json_object(directory / ENVIRONMENT, follow=False).get("command") or []
        ours = ("run_dir=", *(OF_SWEEP if JOB_OF in words else ()))
        settings = tuple(word for word in words[1:] if "=" in word and not word.startswith(ours))
    if (directory / CONFIG).is_file():
        label = yaml_file(directory / CONFIG, follow=False)["name"]
    plain = [word_without_secrets(word.lstrip("+")) for word in settings]
    asked = bool(settings) or (directory / ENVIRONMENT).is_file()
    command = shlex.join(["python", "-m", "trainer", *plain]) if asked else ""
    return {
        "settings": tuple(essence(plain)),
        "label": label,
        "command": command,
        "state": "started",
    }


def _summed(directory: Path, run: RunRecord) -> dict[str, Any]:
    facts = summary.read(directory)
    names = {"parameters": "parameters", "flops_per_token": "flops_per_token", "ranks": "ranks"}
    names |= {"sent_bytes": "sent_bytes_per_step"}
    return {name: float(facts[key]) for name, key in names.items() if facts.get(key) is not None}


def _trained(directory: Path, run: RunRecord) -> dict[str, Any]:
    rows = list(read(directory / METRICS))
    if not rows:
        return {}
    speeds = [
        _number(row.get("tokens_per_second")) for row in rows[1:] or rows
    ]  # the first step also warms up
    steps = [0, *(row["step"] for row in rows)]
    seconds = [
        (b - a) * _number(row.get("step_seconds")) for a, b, row in zip(steps, steps[1:], rows)
    ]
    return {
        "loss": _number(rows[-1].get("loss")),
        "tokens": _number(rows[-1].get("tokens")),
        "tokens_per_second": median(speeds),
        "seconds": sum(seconds),
        "peak_bytes": max(_number(row.get("peak_memory_bytes")) for row in rows),
        "curve": [(row["tokens"], row["loss"]) for row in rows if row.get("loss") is not None],
        "state": f"step {rows[-1]['step']}",
    }


def _evaluated(directory: Path, run: RunRecord) -> dict[str, Any]:
    rows = [row for row in read(directory / EVALUATION) if row.get("value") is not None]
    tokens = {row["step"]: row["tokens"] for row in read(directory / METRICS)}
    held_out = [row for row in rows if row.get("name") == HELD_OUT]
    found: dict[str, Any] = {
        "graded": {row["name"]: float(row["value"]) for row in rows if row["name"] != HELD_OUT}
    }
    found["grades"] = {}
    for row in rows:
        if row["name"] != HELD_OUT and row["step"] in tokens:
            found["grades"].setdefault(row["name"], []).append(
                (tokens[row["step"]], float(row["value"]))
            )
    if held_out:
        found["held_out"] = float(held_out[-1]["value"])
        found["checks"] = [
            (tokens[row["step"]], row["value"]) for row in held_out if row["step"] in tokens
        ]
        bars = held_out[-1].get("by_position") or []
        found["by_position"] = {
            (bar["begin"], bar["end"]): bar["loss"] for bar in bars if bar["loss"] is not None
        }
    return found


def _ended(directory: Path, run: RunRecord) -> dict[str, Any]:
    """How the sweep saw it end; a run of its own, or one that has not ended, by its last step."""
    reached = run.state.startswith("step ")
    if (directory / OUTCOME).is_file():
        told = json_object(directory / OUTCOME, follow=False)
        if told["outcome"] == FAILED:
            return {"state": f"failed with exit status {told['code']}: {redacted(told['message'])}"}
        if told["outcome"] == DONE:
            return {"state": DONE, "finished": True}
        return {"state": f"{told['outcome']}, {run.state}" if reached else told["outcome"]}
    if not reached:
        return {"state": "no step yet" if (directory / CONFIG).is_file() else "not started"}
    wanted = (
        yaml_file(directory / CONFIG, follow=False)["steps"]
        if (directory / CONFIG).is_file()
        else None
    )
    finished = run.state == f"step {wanted}"
    return {
        "state": (
            DONE if finished else f"unfinished, {run.state} of {wanted or 'an unknown number'}"
        ),
        "finished": finished,
    }


def _number(value: Any) -> float:
    return UNKNOWN if value is None else float(value)
