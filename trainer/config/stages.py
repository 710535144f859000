"""The stages of a run: one effective config each, resolved before anything starts.

A run without `stages` has one stage, the run itself. A stage takes every setting that it does not
name from the run. Steps are counted over the whole run: the effective config of a stage has the
number of its last step as `steps`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.machine_schema import ParallelConfig
from trainer.config.node_checks import as_node, normalise_node
from trainer.config.nodes import ComponentConfig
from trainer.config.schema import Config, DataConfig
from trainer.config.stage_schema import StageConfig
from trainer.config.values import TARGET


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        number: from 1 on.
        count: stages of the run.
        name: for the log.
        after: steps that the stages before it take.
        ends: number of the last step of every stage of the run.
        config: the effective settings; `config.steps` is the number of the stage's last step.
    """

    number: int
    count: int
    name: str
    after: int
    ends: tuple[int, ...]
    config: Config

    @property
    def run_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.ends[-1]

    def schedule(self, schedule: Any) -> Any:
        """Returns the schedule of the run; under schedule.over=stage it begins in every stage."""
        if self.config.schedule.over == "run" or self.count == 1:
            return schedule
        return StageSchedule(schedule, self.ends)

    @property
    def is_last(self) -> bool:
        return self.number == self.count

    @property
    def label(self) -> str:
        """For messages and the console."""
        return f"stage {self.number}/{self.count} ({self.name})"


def plan_of(config: Config) -> list[Stage]:
    """Returns the stages of a run in their order, at least one."""
    asked = config.stages or [StageConfig()]
    ends = tuple(itertools.accumulate(stage.steps or config.steps for stage in asked))
    plan: list[Stage] = []
    after = 0
    for number, (stage, last) in enumerate(zip(asked, ends, strict=True), 1):
        effective = _effective(config, stage, last)
        name = stage.name or str(number)
        plan.append(Stage(number, len(asked), name, after, ends, effective))
        after = last
    return plan


def describe_stage(stage: Stage) -> Iterator[str]:
    """Yields a line for the log about a stage; none where the run has one."""
    if stage.count == 1:
        return
    config = stage.config
    position = config.position.target.rpartition(".")[2]
    yield (
        f"{stage.label}: steps {stage.after + 1} to {config.steps} of {stage.run_steps},"
        f" {config.rows} rows of {config.context_length}, {position}, learning rate"
        f" {config.optim.learning_rate:g}, parallel.context={config.parallel.context} x"
        f" parallel.data={config.parallel.data}"
    )


def total_steps(config: Config) -> int:
    """Returns the optimiser steps of the whole run."""
    if not config.stages:
        return config.steps
    return sum(stage.steps or config.steps for stage in config.stages)


def whole_run(config: Config) -> Config:
    """Returns the config with the steps of all stages, for what is written of the whole run."""
    return config.model_copy(update={"steps": total_steps(config)})


def stage_of_step(plan: Sequence[Stage], step: int) -> Stage:
    """Returns the stage that takes a step, counted from 1; behind the end the last stage."""
    for stage in plan:
        if step <= stage.config.steps:
            return stage
    return plan[-1]


def config_at(config: Config, step: int) -> Config:
    """Returns the effective settings under which a checkpoint of that step was trained."""
    if not config.stages:
        return config
    return stage_of_step(plan_of(config), step).config


def schedule_over(config: Config, schedule: Any) -> Any:
    """Returns the schedule of the run: schedule.over=stage begins it again in every stage."""
    return plan_of(config)[0].schedule(schedule)


@dataclass(frozen=True)
class StageSchedule:
    """A schedule that begins again in every stage.

    Args:
        schedule: factor of the learning rate of (step, steps).
        ends: number of the last step of each stage.
    """

    schedule: Any
    ends: tuple[int, ...]

    def __call__(self, step: int, steps: int) -> float:
        """Returns the factor of this step; `steps` is the length of the run and decides nothing."""
        begin = 0
        for end in self.ends:
            if step <= end or end == self.ends[-1]:
                return self.schedule(step - begin, end - begin)
            begin = end
        raise AssertionError("a run has at least one stage")


def _effective(config: Config, stage: StageConfig, last: int) -> Config:
    """Returns the run's settings with those of a stage in their place."""
    changes: dict[str, Any] = {"stages": [], "steps": last}
    for key in ("context_length", "batch_tokens"):
        value = getattr(stage, key)
        if value is not None:
            changes[key] = value
    if stage.learning_rate is not None:
        optim = {"learning_rate": stage.learning_rate}
        changes["optim"] = config.optim.model_copy(update=optim)
    if stage.position is not None:
        position = _merged(as_node(config.position), stage.position)
        changes["position"] = ComponentConfig.model_validate(position)
    if stage.data is not None:
        changes["data"] = DataConfig.model_validate(_merged(as_node(config.data), stage.data))
    if stage.parallel is not None:
        ranks = config.parallel.model_dump() | stage.parallel.model_dump(exclude_unset=True)
        changes["parallel"] = ParallelConfig.model_validate(ranks)
    if stage.checkpointing is not None:
        engine = {"checkpointing": stage.checkpointing}
        changes["engine"] = config.engine.model_copy(update=engine)
    return config.model_copy(update=changes)


def _merged(node: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a node with settings in place of its own; another class takes none of them over."""
    if over.get(TARGET, node.get(TARGET)) != node.get(TARGET):
        merged = dict(over)
    else:
        merged = dict(node)
        for key, value in over.items():
            inner = merged.get(key)
            if isinstance(inner, Mapping) and isinstance(value, Mapping):
                merged[key] = _merged(inner, value)
            else:
                merged[key] = value
    normalise_node(merged)
    return merged
