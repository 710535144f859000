"""The peak memory and the seconds of `python -m scripts.plan` beside those of real steps."""

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import torch

from scripts.gpu_checks.card import card
from scripts.gpu_checks.rehearsed import (
    VOCABULARY,
    config_of,
    free,
    peak_of_a_step,
    rehearse,
    seconds_of_a_step,
)
from trainer.planning.devices import read_device
from trainer.planning.step_plan import plan_step

SIZES = (
    "model.width=2048 model.layers=8 model.heads=16 model.kv_heads=4 model.vocabulary=32000"
    " context_length=32768 batch_tokens=32768 precision=bfloat16"
)
CASES = (
    "model=full engine=single engine.checkpointing=full engine.tile_tokens=4096",
    "model=full engine=fsdp engine.checkpointing=selective",
    "model=sliding mixer.window=4096 engine=single",
)
TINY_SIZES = (
    "model.width=16 model.layers=1 model.heads=2 model.kv_heads=1 context_length=32 batch_tokens=32"
)
TINY = ("model=full engine=single",)
WITHIN = 0.10  # of the measured peak


class PlannedFigures(NamedTuple):
    """The planned bytes at the peak, and seconds of a step."""

    peak_bytes: int
    seconds: float


class PeakCheck(NamedTuple):
    """The device, and the plan of each case that another process makes meanwhile."""

    device: torch.device
    sizes: str
    plans: dict[str, "Future[PlannedFigures]"]


def device_name(device: torch.device) -> str:
    """Returns the name of a device in the planner's table."""
    if device.type != "cuda":
        return "cpu"
    full = torch.cuda.get_device_name(device).lower()
    known = [name for name in ("h200", "h100", "b200", "a100") if name in full]
    return known[0] if known else "h100"


def planned(words: str, device: str) -> PlannedFigures:
    """Plans one rank; in a process of its own, whose process group is a fake one."""
    torch.set_num_threads(1)
    plan = plan_step(config_of(words.split()), VOCABULARY, 0, read_device(device))
    return PlannedFigures(plan.peak_bytes, plan.costs.total_seconds)


def prepare(dry: bool) -> PeakCheck:
    """Begins to plan the cases."""
    device = card(dry)
    sizes = TINY_SIZES if dry else SIZES
    cases = TINY if dry else CASES
    planner = ProcessPoolExecutor(len(cases), multiprocessing.get_context("spawn"))
    plans = {}
    for case in cases:
        plans[case] = planner.submit(planned, f"{sizes} {case}", device_name(device))
    torch.zeros(1, device=device)
    return PeakCheck(device, sizes, plans)


def check(prepared: PeakCheck, seconds: float) -> Iterator[dict[str, object]]:
    """Yields a row for each case: its second step is measured."""
    began = time.monotonic()
    device = prepared.device
    for case, plan in prepared.plans.items():
        left = began + seconds - time.monotonic()
        if left < 2:
            return
        run = rehearse(config_of(f"{prepared.sizes} {case}".split()), device)
        run.step()
        measured = peak_of_a_step(run, device)
        taken = seconds_of_a_step(run, device)
        del run
        free(device)
        told = plan.result(timeout=max(1.0, began + seconds - time.monotonic()))
        row: dict[str, object] = {"case": case, "planned GiB": told.peak_bytes / 2**30}
        row["measured GiB"] = None if measured is None else measured / 2**30
        row["planned / measured"] = None
        row["planned s"] = told.seconds
        row["measured s"] = taken
        if measured is not None:
            row["planned / measured"] = told.peak_bytes / measured
            row["passed"] = abs(told.peak_bytes / measured - 1) <= WITHIN
        yield row
