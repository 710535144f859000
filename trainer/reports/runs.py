"""Reads the directories of runs: each run of a folder as one record, however far it got."""

import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from trainer.errors import UserError
from trainer.files.limited_reader import json_object, yaml_file
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
OF_SWEEP = ("wandb.group=", "wandb.name=", "wandb.tags=")  # a sweep may add them to a job
# Field of a record by the key of summary.json.
SUMMARY_FIELDS = {
    "parameters": "parameters",
    "flops_per_token": "flops_per_token",
    "ranks": "ranks",
    "sent_bytes_per_step": "sent_bytes",
}
# Errors of a file that is damaged, or that another version wrote.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OSError, OverflowError)


@dataclass(frozen=True)
class RunRecord:
    """One run; a figure that is not known is NaN, or empty.

    Attributes:
        name: of its folder.
        label: the settings in which it differs from the other runs.
        settings: all that were given.
        seed: of the run; None where it is not known.
        config: as it was recorded.
        finished: it reached its last step in order.
        state: how it ended, or how far it got, in words.
        command: starts the same run.
        parameters: number of parameters.
        flops_per_token: of training.
        loss: the last training loss, nats per token.
        held_out: the last held-out loss, nats per token.
        tokens: trained on.
        tokens_per_second: of the median step.
        seconds: of training, without evaluation and saving.
        ranks: number of ranks.
        peak_bytes: of the rank that uses most memory.
        sent_bytes: per step, by the rank that sends most.
        curve: training loss, as (tokens, loss).
        checks: held-out loss, as (tokens, loss).
        by_position: loss of the last evaluation by (begin, end).
        graded: the last value of every other evaluation.
        grades: all values of every other evaluation, as (tokens, value).
        cells: what the last value of a named evaluation is made of, by the name of the figure.
    """

    name: str
    label: str = ""
    settings: tuple[str, ...] = ()
    seed: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
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
    cells: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def collect(directory: Path) -> list[RunRecord]:
    """Reads the run in a directory, or every run below it.

    Raises:
        UserError: the directory is missing, or holds no run.
    """
    if not os.path.isdir(directory):
        raise UserError(
            f"{directory}: there is no such directory; name that of a run, or of a sweep"
        )
    run_folders = sorted(_run_folders(directory), key=_numeric_order)
    if not run_folders:
        raise UserError(
            f"{directory} holds no run and no sweep: no {CONFIG} or {METRICS} in it or below it;"
            " name another"
        )
    runs = []
    for folder in run_folders:
        if folder == directory:
            # resolve, because the directory may be given as "."
            name = directory.resolve().name
        else:
            name = str(folder.relative_to(directory))
        runs.append(_read_run(folder, name))
    jobs = []
    for number, run in enumerate(runs):
        if run.settings:
            jobs.append(Job(number, run.settings, directory))
    labels = varied(jobs) if len(jobs) > 1 else {}
    labelled = []
    for number, run in enumerate(runs):
        label = labels.get(number) or run.label or run.name
        labelled.append(replace(run, label=label))
    return labelled


def _run_folders(directory: Path) -> Iterator[Path]:
    """Yields the folders of runs; of a sweep also those of jobs that did not begin."""
    if any((directory / sign).is_file() for sign in SIGNS):
        yield directory
        return
    is_sweep = (directory / RECORD).is_file()
    for path in list(directory.iterdir()):
        if not path.is_dir() or path.name == "report" or path.name.startswith("."):
            continue
        is_empty = not any(path.iterdir())
        if is_sweep and is_empty:
            yield path
        else:
            yield from _run_folders(path)


def _numeric_order(path: Path) -> list[tuple[bool, int, str]]:
    """Sorts numbered folders by number, so that 10 comes after 9."""
    keys = []
    for part in path.parts:
        number = int(part) if part.isdigit() else 0
        keys.append((not part.isdigit(), number, part))
    return keys


def _read_run(directory: Path, name: str) -> RunRecord:
    """Reads all that is readable of a run; its state names what is not."""
    run = RunRecord(name)
    problems = []
    for reader in (_read_settings, _read_summary, _read_metrics, _read_evaluations, _read_end):
        try:
            run = replace(run, **reader(directory, run))
        except UNREADABLE as error:
            problems.append(" ".join(str(error).split()) or type(error).__name__)
    if not problems:
        return run
    # Several readers may stumble over the same file.
    unique_problems = dict.fromkeys(problems)
    return replace(run, state=f"{run.state} ({'; '.join(unique_problems)})")


def _read_settings(directory: Path, run: RunRecord) -> dict[str, Any]:
    """Reads the settings of a job from its sweep's note, else from the recorded command."""
    settings = ()
    label = run.name
    config: dict[str, Any] = {}
    has_environment = (directory / ENVIRONMENT).is_file()
    if (directory / OUTCOME).is_file():
        settings = tuple(json_object(directory / OUTCOME, follow=False)["settings"])
    if has_environment and not settings:
        words = json_object(directory / ENVIRONMENT, follow=False).get("command") or []
        added = ("run_dir=",)
        if JOB_OF in words:
            added += OF_SWEEP
        settings = tuple(word for word in words[1:] if "=" in word and not word.startswith(added))
    if (directory / CONFIG).is_file():
        config = yaml_file(directory / CONFIG, follow=False)
        label = config["name"]
    public_settings = [word_without_secrets(word.lstrip("+")) for word in settings]
    command = ""
    if settings or has_environment:
        command = shlex.join(["python", "-m", "trainer", *public_settings])
    return {
        "settings": tuple(essence(public_settings)),
        "label": label,
        "config": config,
        "seed": _seed(config, public_settings),
        "command": command,
        "state": "started",
    }


def _seed(config: Mapping[str, Any], settings: Sequence[str]) -> int | None:
    """Returns the seed of a run; of one without a config, that of its settings."""
    if "seed" in config:
        return int(config["seed"])
    seeds = [word.removeprefix("seed=") for word in settings if word.startswith("seed=")]
    return int(seeds[-1]) if seeds and seeds[-1].isdecimal() else None


def _read_summary(directory: Path, run: RunRecord) -> dict[str, Any]:
    facts = summary.read(directory)
    fields = {}
    for key, name in SUMMARY_FIELDS.items():
        if facts.get(key) is not None:
            fields[name] = float(facts[key])
    return fields


def _read_metrics(directory: Path, run: RunRecord) -> dict[str, Any]:
    rows = list(read(directory / METRICS))
    if not rows:
        return {}
    # The first step also warms up, and is left out where there are others.
    timed_rows = rows[1:] or rows
    speeds = [_number(row.get("tokens_per_second")) for row in timed_rows]
    peaks = [_number(row.get("peak_memory_bytes")) for row in rows]
    seconds = []
    curve = []
    previous_step = 0
    for row in rows:
        # A row stands for the steps since the row before (log.every).
        steps = row["step"] - previous_step
        previous_step = row["step"]
        seconds.append(steps * _number(row.get("step_seconds")))
        if row.get("loss") is not None:
            curve.append((row["tokens"], row["loss"]))
    return {
        "loss": _number(rows[-1].get("loss")),
        "tokens": _number(rows[-1].get("tokens")),
        "tokens_per_second": median(speeds),
        "seconds": sum(seconds),
        "peak_bytes": max(peaks),
        "curve": curve,
        "state": f"step {rows[-1]['step']}",
    }


def _read_evaluations(directory: Path, run: RunRecord) -> dict[str, Any]:
    tokens_at_step = {row["step"]: row["tokens"] for row in read(directory / METRICS)}
    held_out = []
    graded: dict[str, float] = {}
    cells: dict[str, list[dict[str, Any]]] = {}
    grades: dict[str, list[tuple[float, float]]] = {}
    for row in read(directory / EVALUATION):
        if row.get("value") is None:
            continue
        if row["name"] == HELD_OUT:
            held_out.append(row)
            continue
        value = float(row["value"])
        graded[row["name"]] = value
        if row.get("cells"):
            cells[row["name"]] = [dict(cell) for cell in row["cells"]]
        if row["step"] in tokens_at_step:
            point = (tokens_at_step[row["step"]], value)
            grades.setdefault(row["name"], []).append(point)
    fields: dict[str, Any] = {"graded": graded, "grades": grades, "cells": cells}
    if held_out:
        last = held_out[-1]
        checks = []
        for row in held_out:
            if row["step"] in tokens_at_step:
                checks.append((tokens_at_step[row["step"]], row["value"]))
        by_position = {}
        for bar in last.get("by_position") or []:
            if bar["loss"] is not None:
                by_position[bar["begin"], bar["end"]] = bar["loss"]
        fields["held_out"] = float(last["value"])
        fields["checks"] = checks
        fields["by_position"] = by_position
    return fields


def _read_end(directory: Path, run: RunRecord) -> dict[str, Any]:
    """Reads how the sweep saw a job end; of other runs compares the last step with the config."""
    has_steps = run.state.startswith("step ")
    has_config = (directory / CONFIG).is_file()
    if (directory / OUTCOME).is_file():
        record = json_object(directory / OUTCOME, follow=False)
        outcome = record["outcome"]
        if outcome == FAILED:
            message = redacted(record["message"])
            return {"state": f"failed with exit status {record['code']}: {message}"}
        if outcome == DONE:
            return {"state": DONE, "finished": True}
        return {"state": f"{outcome}, {run.state}" if has_steps else outcome}
    if not has_steps:
        return {"state": "no step yet" if has_config else "not started"}
    steps = None
    if has_config:
        steps = _run_steps(yaml_file(directory / CONFIG, follow=False))
    if run.state == f"step {steps}":
        return {"state": DONE, "finished": True}
    state = f"unfinished, {run.state} of {steps or 'an unknown number'}"
    return {"state": state, "finished": False}


def _run_steps(config: dict[str, Any]) -> int:
    """Returns the steps of a recorded run: those of all its stages, where it has some."""
    stages = config.get("stages") or [{}]
    return sum(stage.get("steps") or config["steps"] for stage in stages)


def _number(value: Any) -> float:
    return UNKNOWN if value is None else float(value)
