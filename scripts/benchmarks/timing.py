"""Measures the time, peak memory and traffic of a step on all ranks together."""

import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from parallel.heap import trim_heap

StepCall = Callable[[], None]
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


class Duration(NamedTuple):
    """One run of a step: seconds until the last rank was done, and this rank's processor
    seconds."""

    seconds: float
    processor_seconds: float


class BenchmarkEntry(NamedTuple):
    """One entry of a benchmark.

    Attributes:
        name: of the row.
        facts: columns that are known beforehand.
        step: this rank's part of a step.
        alone: rank 0 runs it with the threads of all ranks, while the others wait.
    """

    name: str
    facts: dict
    step: StepCall
    alone: bool = False


def timed(entry: BenchmarkEntry, threads: int) -> Duration:
    """Runs a step on all ranks at once; the clock stops when the last one is done."""
    size = dist.get_world_size()
    rank = dist.get_rank()
    torch.set_num_threads(threads * size if entry.alone and rank == 0 else threads)
    gc.collect()
    dist.barrier()
    start = time.perf_counter()
    processor = time.process_time()
    if rank == 0 or not entry.alone:
        entry.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    spent = time.process_time() - processor
    dist.barrier()
    torch.set_num_threads(threads)
    return Duration(time.perf_counter() - start, spent)


def peak_bytes(step: StepCall) -> int | None:
    """Most memory that a step holds beyond what was held before it; None where the system does not
    say (not Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    # else what earlier steps freed still counts as held, and hides what this one takes
    trim_heap()
    try:
        CLEAR.write_text("5")  # the high-water mark starts again at what is held now
    except OSError:
        step()
        return None
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    return int(found[1]) * 1024 if found else 0


def alternate(entries: list[BenchmarkEntry], repeats: int, threads: int) -> list[list[Duration]]:
    """Runs every entry `repeats` times in turn, so that a busy minute slows all of them."""
    taken: list[list[Duration]] = [[] for _ in entries]
    for _ in range(repeats):
        for runs, entry in zip(taken, entries):
            runs.append(timed(entry, threads))
    return taken


def middle(runs: list[Duration]) -> Duration:
    """Returns the median of each figure."""
    return Duration(*(median(some) for some in zip(*runs)))


def gathered(value: object) -> list:
    """Returns the value of every rank, in rank order."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
