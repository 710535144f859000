"""Traces of chosen steps by torch's profiler, which Perfetto opens, and snapshots of memory.

    RUN_DIR/profile/step_00000003_rank_0.json      operators and kernels of the step, on a time line
    RUN_DIR/profile/step_00000003_rank_0.memory.pickle   allocations of an accelerator, for
                                                   pytorch.org/memory_viz

A profiled step is slower than others, and its row in metrics.jsonl says so by its seconds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from parallel.mesh import Mesh
from trainer.config.finding import Finding
from trainer.config.schema import Config
from trainer.config.schemas.log_schema import ProfileConfig
from trainer.config.stages import plan_of
from trainer.files.safe_files import make_inside

FOLDER = "profile"


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
        with profile(activities=activities, record_shapes=True, profile_memory=self.memory) as seen:
            yield
        seen.export_chrome_trace(str(trace))
        self.say(f"profile: {trace} opens in https://ui.perfetto.dev")
        if on_gpu and self.memory:
            snapshot = trace.with_suffix(".memory.pickle")
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            self.say(f"profile: {snapshot} opens in https://pytorch.org/memory_viz")


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
