"""Launcher plugin hydra/launcher=torchrun: takes jobs from Hydra's sweepers."""

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.plugin import Plugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.errors import UserError
from trainer.sweep.jobs import Job

PACKAGE = "hydra_plugins"  # where Hydra looks for plugins; ours needs no folder of that name
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
ESCAPED_SIGN = r"\1"
NUMBERED = "${hydra.job.num}"  # Hydra's own name for the folder of a job


@dataclass(frozen=True)
class SweepPlan:
    """Hydra's part of the config of a sweep.

    Attributes:
        directory: of the sweep.
        settings: with several values each.
        ranks: of all jobs that run at once; None = as many as the machine has.
        searches: the values that jobs return decide which jobs come next.
        stop_early: see TorchrunLauncher.
    """

    directory: Path
    settings: list[str]
    ranks: int | None
    searches: bool
    stop_early: int | None = None


class SweepHandler(Protocol):
    """Runs the jobs: receives the plan once, then one batch after the other."""

    def begin(self, plan: SweepPlan) -> None: ...

    def batch(self, jobs: Sequence[Job]) -> Sequence[float | Exception]: ...


class TorchrunLauncher(Launcher):
    """Hands batches of jobs to the Sweep that stands in the place of Hydra's task function.

    Args:
        ranks: of all jobs that run at once; None = one a GPU, or one a core.
        stop_early: after evaluations 1, N, N^2, ... one in N jobs goes on, those with the lowest
            held-out loss (trainer/sweep/early_stop.py); None = all jobs end by themselves.

    Raises:
        UserError: stop_early is below 2.
    """

    def __init__(self, ranks: int | None = None, stop_early: int | None = None):
        if stop_early is not None and (not isinstance(stop_early, int) or stop_early < 2):
            raise UserError(
                f"hydra.launcher.stop_early={stop_early}: one in so many jobs goes on; use 2 or"
                " more, or null"
            )
        self.ranks = ranks
        self.stop_early = stop_early

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by the sweeper, before it makes any job."""
        self.sweep: SweepHandler = task_function  # pyright: ignore[reportAttributeAccessIssue]
        self.loader = hydra_context.config_loader
        self.config = config
        sweeper = config.hydra.sweeper
        more = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        searches = not sweeper._target_.endswith(".BasicSweeper")
        written = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        assert isinstance(written, list)
        settings = [*written, *more]
        self.sweep.begin(
            SweepPlan(Path(config.hydra.sweep.dir), settings, self.ranks, searches, self.stop_early)
        )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a batch; a job that failed carries its exception, and the sweeper decides what to
        make of it."""
        jobs = [
            Job(
                number,
                tuple(settings),
                Path(self.config.hydra.sweep.dir) / self._folder(number, settings),
            )
            for number, settings in enumerate(
                (list(map(_as_typed, job_override)) for job_override in job_overrides),
                initial_job_idx,
            )
        ]
        return [self._told(job, value) for job, value in zip(jobs, self.sweep.batch(jobs))]

    def _folder(self, number: int, settings: Sequence[str]) -> str:
        """hydra.sweep.subdir; composing a job takes a second, so the usual name is made without."""
        if OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["subdir"] == NUMBERED:  # pyright: ignore
            return str(number)
        config = self.loader.load_sweep_config(self.config, list(settings))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return str(config.hydra.sweep.subdir)

    def _told(self, job: Job, value: float | Exception) -> JobReturn:
        told: Any = JobReturn()
        told.overrides = job.settings
        told.working_dir = str(job.directory)
        told.task_name = "trainer"
        told.status = JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED
        told.return_value = value
        return told


def _as_typed(setting: str) -> str:
    """Returns a setting of a job as a user types it.

    Optuna's sweeper writes Python's None for a null, and Hydra's sweepers escape the signs of its
    grammar in a text without quotes, as in launch.time=2\\:00\\:00.
    """
    if setting.endswith("=None"):
        return f"{setting.removesuffix('None')}null"
    key, equals, value = setting.partition("=")
    if value[:1] in ("'", '"', "[", "{"):
        return setting
    return f"{key}{equals}{ESCAPED.sub(ESCAPED_SIGN, value)}"


def register(plugin: type[Plugin], module: str = "longspan") -> None:
    """Make a plugin known to Hydra, as hydra_plugins.MODULE.NAME: it takes plugins from that
    package only."""
    plugins = Plugins.instance()  # first, for it searches the package
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    name = plugin.__module__ = f"{PACKAGE}.{module}"
    home = sys.modules.setdefault(name, ModuleType(name))
    setattr(home, plugin.__name__, plugin)
    setattr(package, module, home)
    plugins.register(plugin)
