"""A profile of a step of a decoder at 32K: what takes its time, and how long the card idles."""

import gzip
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.gpu_checks.card import card
from scripts.gpu_checks.rehearsed import config_of, free, rehearse, seconds_of_a_step
from trainer.planning.rehearsal import Rehearsal

SIZES = (
    "experiment=quickstart parallel.context=1 model.width=1024 model.layers=8 model.heads=8"
    " model.kv_heads=2 context_length=32768 batch_tokens=32768 engine=single precision=bfloat16"
)
TINY = (
    "experiment=quickstart parallel.context=1 model.width=16 model.layers=1 model.heads=2"
    " model.kv_heads=1 context_length=32 batch_tokens=32 engine=single"
)
TOP = 12  # kernels that are listed
TRACE = "gpu_check_trace.json.gz"
MOST_BYTES = 12 << 20  # of the trace; a larger one is left out


class ProfileCheck(NamedTuple):
    """The device, and a run after its first steps."""

    device: torch.device
    run: Rehearsal


class Work(NamedTuple):
    """One kernel on the card, in microseconds."""

    name: str
    began: float
    took: float


def prepare(dry: bool) -> ProfileCheck:
    """Returns the run after two steps, when its kernels are chosen."""
    device = card(dry)
    run = rehearse(config_of((TINY if dry else SIZES).split()), device)
    run.step()
    run.step()
    free(device)
    return ProfileCheck(device, run)


def check(prepared: ProfileCheck, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields a row of the whole step, and one for each of its most expensive kernels."""
    device, run = prepared
    plain = min(seconds_of_a_step(run, device) for _ in range(3))
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        seconds_of_a_step(run, device)
    work = _work(profiler, "kernel" if device.type == "cuda" else "cpu_op")
    busy = busy_microseconds(work)
    span = max(each.began + each.took for each in work) - min(each.began for each in work)
    yield {
        "step, ms": 1e3 * plain,
        "step with the profiler, ms": span / 1e3,
        "card busy, ms": busy / 1e3,
        "idle share": 1 - busy / span,
        "idle share without the profiler": max(0.0, 1 - busy / 1e6 / plain),
        "kernels": len(work),
    }
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for each in work:
        times[each.name] += int(1e3 * each.took)
        calls[each.name] += 1
    for name, nanoseconds in times.most_common(TOP):
        taken = nanoseconds / 1e6
        share = taken / (busy / 1e3)
        yield {"kernel": name[:90], "ms": taken, "share": share, "calls": calls[name]}


def busy_microseconds(work: list[Work]) -> float:
    """Returns the time in which at least one kernel ran."""
    busy = 0.0
    until = -1.0
    for each in sorted(work, key=lambda one: one.began):
        end = each.began + each.took
        busy += max(0.0, end - max(until, each.began))
        until = max(until, end)
    return busy


def _work(profiler: Any, category: str) -> list[Work]:
    """Reads the kernels from the trace, which is kept beside the other files where it is small."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        packed = Path(folder) / TRACE
        with path.open("rb") as source, gzip.open(packed, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target)
        if packed.stat().st_size <= MOST_BYTES:
            shutil.copy(packed, Path(os.environ.get("OUT", ".")) / TRACE)
    found = []
    for event in events:
        if event.get("cat") == category:
            found.append(Work(event["name"], float(event["ts"]), float(event["dur"])))
    return found
