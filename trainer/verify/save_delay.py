"""Measures how much an asynchronous save slows the steps beside it, and its memory."""

import os
import time
from pathlib import Path
from statistics import fmean

from trainer.errors import DONE
from trainer.logs.jsonl import METRICS, read
from trainer.verify.fault_injection import FaultInjection, FaultOutcome

LARGEST_DELAY = 0.1  # of the time of a step without a save
WARM_UP = 2  # steps left out: kernels are chosen and memory is allocated in them


def measure_save_delay(
    injection: FaultInjection, width: int = 512, layers: int = 5, saves: int = 10, every: int = 6
) -> FaultOutcome:
    """Compares steps during a save with steps without one, and reads the memory of a save per rank.

    Steps are grouped by their distance from the start of the save; the slowest group counts.

    Args:
        injection: starts the run.
        width: of the model, which decides the size of a checkpoint.
        layers: of the model.
        saves: number of checkpoints.
        every: steps from one checkpoint to the next.
    """
    steps = saves * every + 1
    process = injection.start(
        "delay",
        f"model.width={width}",
        f"model.layers={layers}",
        f"steps={steps}",
        f"checkpoint.every={every}",
        "model.heads=8",
        "context_length=512",
        "batch_tokens=2048",
        "evaluation.every=0",
        "checkpoint.keep=1",
    )
    metrics = injection.folder / "delay" / METRICS
    checkpoints = injection.folder / "delay" / "checkpoints"
    step_ends: list[float] = []
    save_ends: dict[int, float] = {}
    size = 0
    while process.poll() is None:
        time.sleep(0.005)
        # Rows are parsed only when the file has grown, so that polling does not slow the run.
        if metrics.exists() and metrics.stat().st_size != size:
            size = metrics.stat().st_size
            new_rows = len(list(read(metrics))) - len(step_ends)
            step_ends += [time.monotonic()] * new_rows
        due = len(step_ends) // every * every
        if due and due not in save_ends and _only_checkpoint(checkpoints, due):
            save_ends[due] = time.monotonic()

    usual_seconds, saving_seconds = _split_steps(step_ends, save_ends, steps, every)
    means = [fmean(saving_seconds[distance]) for distance in sorted(saving_seconds)]
    delay = max(means) / fmean(usual_seconds) - 1

    rows = list(read(metrics))
    bytes_written = 0
    for path in checkpoints.glob("step_*/shard_00000.*"):
        bytes_written += path.stat().st_size
    memory = rows[-1]["peak_memory_bytes"] - rows[every - 1]["peak_memory_bytes"]
    seconds = ", ".join(f"{mean:.2f}" for mean in means)
    shown = (
        f"{bytes_written / 1e6:.0f} MB a rank: {len(usual_seconds)} steps without a save take"
        f" {fmean(usual_seconds):.2f} s, the first, second and so on after it began"
        f" {seconds} s (at most {delay:+.0%}); the save's memory is {memory / 1e6:.0f} MB a rank"
    )
    as_promised = process.returncode == DONE and delay < LARGEST_DELAY
    return FaultOutcome("a checkpoint is saved (asynchronous)", shown, "nothing", as_promised)


def _only_checkpoint(checkpoints: Path, step: int) -> bool:
    """Reports that the checkpoint of a step is whole: older and unfinished ones are gone."""
    return os.listdir(checkpoints) == [f"step_{step:08d}"]


def _split_steps(
    step_ends: list[float], save_ends: dict[int, float], steps: int, every: int
) -> tuple[list[float], dict[int, list[float]]]:
    """Separates the seconds of steps without a save from those during one.

    Returns:
        The seconds of usual steps, and those during a save by steps since the save began.
    """
    usual_seconds: list[float] = []
    saving_seconds: dict[int, list[float]] = {}
    for step in range(WARM_UP + 1, steps + 1):
        # Counts from 1 for the step in which the latest save began.
        distance = (step - 1) % every + 1
        step_began = step_ends[step - 2]
        seconds = step_ends[step - 1] - step_began
        if save_ends.get(step - distance, 0.0) > step_began:
            saving_seconds.setdefault(distance, []).append(seconds)
        else:
            usual_seconds.append(seconds)
    return usual_seconds, saving_seconds
