"""Traces of chosen steps by torch's profiler, which Perfetto opens, and snapshots of memory.

    RUN_DIR/profile/step_00000003_rank_0.json      operators and kernels of the step, on a time line
    RUN_DIR/profile/step_00000003_rank_0.memory.pickle   allocations of an accelerator, for
                                                   pytorch.org/memory_viz

A profiled step is slower than others, and its row in metrics.jsonl says so by its seconds. The
console says how much of it was exposed communication: the time in which a rank waits for others and
computes nothing. On a CPU those are the waits of exchanges, which get a name in the trace; what
travels while something is computed is in none of them. On an accelerator nobody waits on the host:
there it is the time in which kernels of communication run and no other.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from parallel.mesh import Mesh
from trainer.config.finding import Finding
from trainer.config.schema import Config
from trainer.config.schemas.log_schema import ProfileConfig
from trainer.config.stages import plan_of
from trainer.files.safe_files import make_inside

FOLDER = "profile"
WAIT = "exposed communication"
TimeInterval = tuple[float, float]


class StepProfiler:
    """Profiles the steps that `log.profile` names, on the ranks that it names.

    Args:
        directory: of the run.
        settings: log.profile.
        mesh: the ranks.
        say: takes a line for the console.
    """

    def __init__(
        self, directory: Path, settings: ProfileConfig, mesh: Mesh, say: Callable[[str], None]
    ):
        self.directory = directory
        self.device = mesh.device
        self.rank = mesh.world.rank
        self.memory = settings.memory
        self.say = say
        self.steps = frozenset(settings.steps if self.rank in settings.ranks else ())

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Profiles what happens inside, where the step is a chosen one."""
        if step not in self.steps:
            yield
            return
        make_inside(self.directory, FOLDER)
        trace = self.directory / FOLDER / f"step_{step:08d}_rank_{self.rank}.json"
        activities = [ProfilerActivity.CPU]
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            activities.append(ProfilerActivity.CUDA)
        if on_gpu and self.memory:
            torch.cuda.memory._record_memory_history()
        profiling = profile(activities=activities, record_shapes=True, profile_memory=self.memory)
        with profiling as seen, named_waits():
            began = time.perf_counter()
            yield
            took = time.perf_counter() - began
        seen.export_chrome_trace(str(trace))
        self.say(f"profile: {trace} opens in https://ui.perfetto.dev")
        exposed = exposed_seconds(seen.events() or (), on_gpu)
        self.say(
            f"profile: step {step} of rank {self.rank} took {took:.3f} s, {exposed:.3f} s of them"
            f" {WAIT}"
        )
        if on_gpu and self.memory:
            snapshot = trace.with_suffix(".memory.pickle")
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            self.say(f"profile: {snapshot} opens in https://pytorch.org/memory_viz")


@contextmanager
def named_waits() -> Iterator[None]:
    """Gives every wait for an exchange a name in the trace that is being recorded."""
    wait = dist.Work.wait

    def named(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        with record_function(WAIT):
            return wait(work, *args, **kwargs)

    setattr(dist.Work, "wait", named)  # noqa: B010
    try:
        yield
    finally:
        setattr(dist.Work, "wait", wait)  # noqa: B010


def exposed_seconds(events: Iterable[Any], on_gpu: bool) -> float:
    """Returns the exposed communication in a profiler's events."""
    if not on_gpu:
        return covered(_interval(event) for event in events if event.name == WAIT)
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    other = [event for event in kernels if "nccl" not in event.name.lower()]
    return covered(map(_interval, kernels)) - covered(map(_interval, other))


def _interval(event: Any) -> TimeInterval:
    return event.time_range.start / 1e6, event.time_range.end / 1e6


def covered(intervals: Iterable[TimeInterval]) -> float:
    """Returns the length of the union of intervals."""
    total = 0.0
    until = -float("inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def check_profile(config: Config) -> Iterator[Finding]:
    """Checks that the run has the steps and the ranks that log.profile names."""
    asked = config.log.profile
    plan = plan_of(config)
    last = plan[-1].config.steps
    if asked.steps and max(asked.steps) > last:
        yield Finding(
            "log.profile.steps", asked.steps, f"the run has {last} steps", "name steps from 1 on"
        )
    ranks = max(stage.config.parallel.ranks for stage in plan)
    if asked.ranks and max(asked.ranks) >= ranks:
        yield Finding(
            "log.profile.ranks",
            asked.ranks,
            f"the run has {ranks} ranks",
            f"name ranks from 0 to {ranks - 1}",
        )
    if asked.memory and not asked.steps:
        yield Finding(
            "log.profile.memory",
            True,
            "there are no steps to profile",
            "name some in log.profile.steps, as [3,4]",
        )
