"""A training step with engine.compile=true beside one without."""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

import torch

from scripts.gpu_checks.card import card
from scripts.gpu_checks.rehearsed import config_of, free, rehearse, seconds_of_a_step
from trainer.planning.rehearsal import Rehearsal

SIZES = (
    "model=full model.width=1024 model.layers=8 model.heads=8 model.kv_heads=2 context_length=8192"
    " batch_tokens=16384 parallel.micro_batch=2 engine=single precision=bfloat16"
)
TINY = (
    "model=full model.width=16 model.layers=1 model.heads=2 context_length=32 batch_tokens=32"
    " engine=single"
)
STEPS = 5


class CompileCheck(NamedTuple):
    """The device, the two runs, and the seconds of the first steps of each."""

    device: torch.device
    runs: dict[str, Rehearsal]
    first: dict[str, float]


def prepare(dry: bool) -> CompileCheck:
    """Returns both runs after two steps: the first of one compiles."""
    device = card(dry)
    runs = {}
    first = {}
    # The processors of a rehearsal are too few to compile anything for it.
    for compiled in (False,) if dry else (False, True):
        words = [*(TINY if dry else SIZES).split(), f"engine.compile={str(compiled).lower()}"]
        name = "compiled" if compiled else "as it is"
        run = rehearse(config_of(words), device)
        first[name] = seconds_of_a_step(run, device) + seconds_of_a_step(run, device)
        runs[name] = run
    free(device)
    return CompileCheck(device, runs, first)


def check(prepared: CompileCheck, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each of the two, whose steps are taken in turn."""
    began = time.monotonic()
    taken: dict[str, list[float]] = {name: [] for name in prepared.runs}
    for _ in range(STEPS):
        for name, run in prepared.runs.items():
            taken[name].append(seconds_of_a_step(run, prepared.device))
        if time.monotonic() - began > seconds - 1:
            break
    plain = median(next(iter(taken.values())))
    for name, each in taken.items():
        tokens = prepared.runs[name].config.batch_tokens
        yield {
            "form": name,
            "ms": round(1e3 * median(each), 2),
            "tokens/s": round(tokens / median(each)),
            "speed": round(plain / median(each), 3),
            "first two steps, s": round(prepared.first[name], 1),
        }
