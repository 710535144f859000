"""Estimates of the time and the disk that a run takes, for launch.dry_run=true.

Disk is computed from the sizes of the parameters and of the optimiser's state, which the model has
on the meta device as well. Time cannot be computed: it is that of an earlier run of the same model
and step, if one lies beside this one, and otherwise said to be unknown.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer import run_dir
from trainer.checkpoint.keep_rules import retention_of
from trainer.config.build_model import build_model
from trainer.config.instantiate import instantiate
from trainer.config.schema import Config
from trainer.config.stages import Stage, plan_of
from trainer.logs.console import duration
from trainer.logs.jsonl import METRICS, read
from trainer.objectives.contradictions import vocabulary
from trainer.optim.selection import count_trained

# Settings on which the time of a step depends; those of a machine are not compared.
OF_A_STEP = (
    "model",
    "mixer",
    "position",
    "memory",
    "objective",
    "optim",
    "parallel",
    "engine",
    "precision",
    "context_length",
    "batch_tokens",
)
MANIFEST_BYTES = 330  # of a tensor in manifest.json and in the header of its shard
ROW_BYTES = 330  # of a step in metrics.jsonl
MOST_RUNS = 50  # earlier runs that are looked at, the newest first
TIMED = "timed"  # a run that is made to measure its steps
RUNS = Path("runs")  # where runs lie that were given no directory


class EarlierRun(NamedTuple):
    """A run whose steps are like those of another: its directory, and seconds of each step."""

    directory: Path
    seconds: list[float]


def estimate_lines(config: Config) -> Iterator[str]:
    """Yields the lines of the dry run about time and disk."""
    plan = plan_of(config)
    yield f"time     {_time(config, plan)}"
    yield f"disk     {_disk(config, plan)}"


def _time(config: Config, plan: Sequence[Stage]) -> str:
    total = 0.0
    sources = []
    beside = _home(config)
    for stage in plan:
        earlier = _earlier_run(config, stage.config)
        if earlier is None:
            return (
                f"not known: no run in {beside} has such steps; the same command with steps=5"
                f" checkpoint.every=0 evaluation.every=0 run_dir={beside / TIMED} takes a few, and"
                " this one then goes by them"
            )
        total += median(earlier.seconds) * (stage.config.steps - stage.after)
        sources.append(f"{earlier.directory} ({len(earlier.seconds)} steps)")
    told = ", ".join(dict.fromkeys(sources))
    return (
        f"{duration(total)} for all steps without evaluations, by the median step of {told};"
        " on this machine, if that ran here"
    )


def _home(config: Config) -> Path:
    """Returns the folder that this run and its neighbours lie in."""
    return Path(config.run_dir).parent if config.run_dir else RUNS


def _earlier_run(config: Config, step: Config) -> EarlierRun | None:
    """Returns the newest run with the same steps, in this run's directory or beside it."""
    home = Path(config.run_dir) if config.run_dir else None
    folders = [home] if home is not None else []
    root = _home(config)
    if root.is_dir():
        beside = [path for path in root.iterdir() if run_dir.holds_run(path)]
        folders += sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True)
    wanted = _of_a_step(step)
    for folder in folders[:MOST_RUNS]:
        try:
            if not run_dir.holds_run(folder) or run_dir.linked(folder):
                continue
            if _of_a_step(run_dir.read_config(folder)) != wanted:
                continue
            seconds = [row["step_seconds"] for row in read(folder / METRICS)]
        except (OSError, ValueError, KeyError):
            # A broken neighbour is no fault of this run.
            continue
        # The first step also warms up.
        known = [each for each in seconds[1:] if each is not None]
        if known:
            return EarlierRun(folder, known)
    return None


def _of_a_step(config: Config) -> dict[str, Any]:
    tree = run_dir.plain_config(config)
    return {key: tree[key] for key in OF_A_STEP}


def _disk(config: Config, plan: Sequence[Stage]) -> str:
    last = plan[-1].config
    rows = plan[-1].run_steps // config.log.every * ROW_BYTES
    if not config.checkpoint.every:
        return f"{size(rows)}, no checkpoint (checkpoint.every=0)"
    one = checkpoint_bytes(last)
    many = checkpoints_kept(config, plan)
    carried = ", the carried state not counted" if config.memory.carries else ""
    return (
        f"{size(one * many + rows)}: {many} {'checkpoint' if many == 1 else 'checkpoints'} of"
        f" {size(one)} stay; one more while it is written{carried}"
    )


def checkpoint_bytes(config: Config) -> int:
    """Returns the bytes of one checkpoint of a run, or of a stage."""
    with torch.device("meta"):
        model = build_model(config, vocabulary(config)[0])
    if config.precision == "float64":
        model = model.double()
    # Frozen parameters have no state in the optimiser.
    count_trained(model, config.optim.freeze)
    state: list[Tensor] = list(model.state_dict().values())
    optimiser = instantiate(config.optim, {}, "optim")(model, dict(model.named_parameters()))
    for moments in optimiser.state.values():
        state += [value for value in moments.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() + MANIFEST_BYTES for tensor in state)


def checkpoints_kept(config: Config, plan: Sequence[Stage]) -> int:
    """Returns the number of checkpoints that are there after the last step, at most.

    Which ones are the best is not known before; none of the others may be among them.
    """
    wish = config.checkpoint
    ends = plan[-1].ends
    steps = sorted({*range(wish.every, ends[-1] + 1, wish.every), *ends})
    rule = retention_of(wish.model_copy(update={"keep_best": 0}), ends, Path(os.curdir))
    others = len(rule.steps_to_keep(steps))
    return min(others + wish.keep_best, len(steps))


def size(count: float) -> str:
    """Formats bytes for people: 950 B, 12.3 kB, 4.56 GB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.3g} B"
