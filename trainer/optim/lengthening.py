"""Runs that go on with other `steps`: where that leaves the learning rate as it was, or what
schedule.extend makes of it.

A run remembers how long it was to be, and from which step on: a list of stretches {"after",
"steps", "extend"}, kept in its checkpoints. The factor of a step is that of the last stretch that
had begun before it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from trainer import run_dir
from trainer.config.instantiate import instantiate
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.progress import Stretch

Factor = Callable[[int, int], float]  # (step, steps) -> the learning rate as a fraction of its peak
Stretches = Sequence[Stretch]
Extend = Literal["hold", "restart", "stretch"]
HOLD = "hold"
RESTART = "restart"
STRETCH = "stretch"
COMPARED = (
    4096  # steps at which two lengths are compared; where a run has more, so many spread over them
)
NEAR = 1e-9
WAYS = (
    "schedule.extend=hold (it stays as it is), restart (the schedule once more, over the steps that"
    " are new) or stretch (as if the run had been so long from the beginning; it may leap)"
)


def factor(schedule: Factor, stretches: Stretches, step: int) -> float:
    """The learning rate of a step as a fraction of its peak."""
    number = max(
        number for number, each in enumerate(stretches) if each["after"] < step or number == 0
    )
    stretch = stretches[number]
    if number and stretch["extend"] == HOLD:
        return factor(schedule, stretches[:number], stretch["after"])
    if number and stretch["extend"] == RESTART:
        return schedule(step - stretch["after"], stretch["steps"] - stretch["after"])
    return schedule(step, stretch["steps"])


def go_on(
    schedule: Factor, stretches: Stretches, step: int, steps: int, extend: Extend | None
) -> tuple[list[Stretch], str]:
    """The stretches of a run that goes on after `step` and is to have `steps`, and one line where
    that changes them.

    Args:
        stretches: of the run so far; none at its beginning.

    Raises:
        Fault: the learning rate depends on `steps`, and `extend` does not say what is to become of
            it.
    """
    first: Stretch = {"after": 0, "steps": steps, "extend": None}
    if not stretches:
        return [first], ""
    before = stretches[-1]["steps"]
    if before == steps:
        return list(stretches), ""
    kept = [
        stretch for stretch in stretches if stretch["after"] < step
    ]  # a longer run may have been left for an older checkpoint
    if not kept:
        return [first], ""
    plain = len(kept) == 1
    if plain and extend is None and agrees(schedule, step, before, steps):
        return [
            first
        ], f"steps={before} became {steps}: the learning rate so far does not depend on it"
    if extend is None:
        raise UserError(refusal(schedule, step, before, steps))
    fresh: Stretch = {"after": step, "steps": steps, "extend": extend}
    following = [*kept, fresh]
    now = factor(schedule, kept, step)
    then = factor(schedule, following, step + 1)
    return (
        following,
        (
            f"steps={before} became {steps} after step {step}: schedule.extend={extend}, the"
            f" learning rate goes from {now:.4g} to {then:.4g} of its peak"
        ),
    )


def agrees(schedule: Factor, step: int, before: int, steps: int) -> bool:
    """Whether all steps up to `step` have the same learning rate in runs of either length."""
    numbers = (
        np.unique(np.linspace(1, step, min(step, COMPARED)).round().astype(int)) if step else []
    )
    return all(abs(schedule(int(n), before) - schedule(int(n), steps)) <= NEAR for n in numbers)


def refusal(schedule: Factor, step: int, before: int, steps: int) -> str:
    """The message about `steps` that cannot change without a word on the learning rate."""
    now = schedule(step, before)
    then = schedule(min(step + 1, steps), steps)
    kind = type(schedule).__name__
    return (
        f"steps={steps}: the run was made for steps={before} and has taken {step}; the learning"
        f" rate of {kind} depends on that and would go from {now:.4g} to {then:.4g} of its peak;"
        f" use steps={before}, or say how: {WAYS}"
    )


def check_lengthening(config: Config) -> Iterator[str]:
    """What keeps a config from going on with a run of another length, as far as the folders
    tell."""
    place = _place(config)
    if place is None:
        return
    taken = steps_taken(place)
    run = place.parent.parent if place.name.startswith("step_") else place
    try:
        before = run_dir.read_config(run).steps
        schedule = instantiate(config.schedule, {}, "schedule")
    except (UserError, OSError, ValueError, yaml.YAMLError):  # said elsewhere
        return
    if taken > config.steps:
        yield (
            f"steps={config.steps}: the run in {run} has taken {taken} already; use steps={taken}"
            " or more, another run_dir, or resume=PATH of an earlier checkpoint"
        )
        return
    changes = taken > 0 and before != config.steps and config.schedule.extend is None
    if changes and not agrees(schedule, taken, before, config.steps):
        yield refusal(schedule, taken, before, config.steps)


def _place(config: Config) -> Path | None:
    """The run directory or checkpoint that a run would go on from; None where it begins."""
    if config.run_dir is not None and steps_taken(Path(config.run_dir)):
        return Path(config.run_dir)
    if config.resume not in ("auto", "never"):
        return Path(config.resume).resolve()
    return None


def steps_taken(place: Path) -> int:
    """The step of a checkpoint, or of the newest in a run directory; 0 where there is none."""
    if place.name.startswith("step_"):
        names = [place.name]
    else:
        names = [path.name for path in (place / "checkpoints").glob("step_*") if path.is_dir()]
    numbers = [name.removeprefix("step_") for name in names]
    return max((int(number) for number in numbers if number.isdigit()), default=0)
