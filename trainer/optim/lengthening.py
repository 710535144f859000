"""The learning rate of a run that resumes with another number of `steps`.

A run records the lengths that it was given, and from which step on: a list of stretches {"after",
"steps", "extend"} in its checkpoints. The factor of a step is that of the last stretch that began
before it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from trainer import run_dir
from trainer.config.instantiate import instantiate
from trainer.config.schema import Config
from trainer.config.stages import schedule_over, total_steps
from trainer.errors import UserError
from trainer.progress import Stretch

Factor = Callable[[int, int], float]  # (step, steps) -> the learning rate as a fraction of its peak
Stretches = Sequence[Stretch]
Extend = Literal["hold", "restart", "stretch"]
HOLD = "hold"
RESTART = "restart"
COMPARED = 4096  # steps at which two lengths are compared, spread evenly over a longer run
NEAR = 1e-9
WAYS = (
    "schedule.extend=hold (it stays as it is), restart (the schedule once more, over the steps that"
    " are new) or stretch (as if the run had been so long from the beginning; it may leap)"
)


def factor(schedule: Factor, stretches: Stretches, step: int) -> float:
    """Returns the learning rate of a step as a fraction of its peak.

    Args:
        schedule: of a run of one length.
        stretches: of the run, at least one.
        step: from 1 on.
    """
    number = 0
    for candidate, stretch in enumerate(stretches):
        if stretch["after"] < step:
            number = candidate
    stretch = stretches[number]
    # The first stretch is the run as it began; there is nothing that it could extend.
    if number and stretch["extend"] == HOLD:
        return factor(schedule, stretches[:number], stretch["after"])
    if number and stretch["extend"] == RESTART:
        return schedule(step - stretch["after"], stretch["steps"] - stretch["after"])
    return schedule(step, stretch["steps"])


def go_on(
    schedule: Factor, stretches: Stretches, step: int, steps: int, extend: Extend | None
) -> tuple[list[Stretch], str]:
    """Extends a run that resumes after `step` to `steps` in all.

    Args:
        schedule: of a run of one length.
        stretches: of the run so far; empty at its beginning.
        step: that the checkpoint was written after.
        steps: the new length.
        extend: schedule.extend.

    Returns:
        (stretches from now on, one line for the log where they changed).

    Raises:
        UserError: the learning rate depends on `steps`, and `extend` is None.
    """
    unchanged: Stretch = {"after": 0, "steps": steps, "extend": None}
    if not stretches:
        return [unchanged], ""
    before = stretches[-1]["steps"]
    if before == steps:
        return list(stretches), ""
    # Later stretches exist where a longer run was left for an older checkpoint.
    begun = [stretch for stretch in stretches if stretch["after"] < step]
    if not begun:
        return [unchanged], ""
    has_one_length = len(begun) == 1
    if has_one_length and extend is None and agrees(schedule, step, before, steps):
        line = f"steps={before} became {steps}: the learning rate so far does not depend on it"
        return [unchanged], line
    if extend is None:
        raise UserError(refusal(schedule, step, before, steps))
    extension: Stretch = {"after": step, "steps": steps, "extend": extend}
    extended = [*begun, extension]
    now = factor(schedule, begun, step)
    then = factor(schedule, extended, step + 1)
    line = (
        f"steps={before} became {steps} after step {step}: schedule.extend={extend}, the"
        f" learning rate goes from {now:.4g} to {then:.4g} of its peak"
    )
    return extended, line


def agrees(schedule: Factor, step: int, before: int, steps: int) -> bool:
    """Tells if all steps up to `step` have the same learning rate in runs of either length."""
    if not step:
        return True
    samples = np.linspace(1, step, min(step, COMPARED)).round().astype(int)
    for sample in np.unique(samples):
        if abs(schedule(int(sample), before) - schedule(int(sample), steps)) > NEAR:
            return False
    return True


def refusal(schedule: Factor, step: int, before: int, steps: int) -> str:
    """Returns the message that refuses other `steps` without schedule.extend."""
    now = schedule(step, before)
    then = schedule(min(step + 1, steps), steps)
    kind = type(schedule).__name__
    return (
        f"steps={steps}: the run was made for steps={before} and has taken {step}; the learning"
        f" rate of {kind} depends on that and would go from {now:.4g} to {then:.4g} of its peak;"
        f" use steps={before}, or say how: {WAYS}"
    )


def check_lengthening(config: Config) -> Iterator[str]:
    """Yields the reasons why a config cannot continue a run of another length.

    Only names of folders and the run's config are read, so this can run before any rank starts.
    """
    place = resumed_from(config)
    if place is None:
        return
    taken = steps_taken(place)
    run = place.parent.parent if place.name.startswith("step_") else place
    try:
        before = total_steps(run_dir.read_config(run))
        schedule = schedule_over(config, instantiate(config.schedule, {}, "schedule"))
    # Other checks report these; a second message would only hide the first.
    except (UserError, OSError, ValueError, yaml.YAMLError):
        return
    steps = total_steps(config)
    if taken > steps:
        yield (
            f"steps={steps}: the run in {run} has taken {taken} already; use steps={taken}"
            " or more, another run_dir, or resume=PATH of an earlier checkpoint"
        )
        return
    changes = taken > 0 and before != steps and config.schedule.extend is None
    if changes and not agrees(schedule, taken, before, steps):
        yield refusal(schedule, taken, before, steps)


def resumed_from(config: Config) -> Path | None:
    """Returns the run directory or checkpoint to resume from; None for a new run."""
    if config.run_dir is not None and steps_taken(Path(config.run_dir)):
        return Path(config.run_dir)
    if config.resume not in ("auto", "never"):
        return Path(config.resume).resolve()
    return None


def steps_taken(place: Path) -> int:
    """Returns the step of a checkpoint, or of the newest in a run directory; 0 without any."""
    if place.name.startswith("step_"):
        names = [place.name]
    else:
        names = [path.name for path in (place / "checkpoints").glob("step_*") if path.is_dir()]
    numbers = [name.removeprefix("step_") for name in names]
    return max((int(number) for number in numbers if number.isdigit()), default=0)
