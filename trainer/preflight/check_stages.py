"""Checks the stages of a run: each can follow the one before, and a launcher can start its ranks.

What is wrong within one stage is found by the checks of a whole run, applied to its effective
config; `in_stage` names the setting by its place in the list then.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from trainer.config import build_model
from trainer.config.finding import FIRST_KEY, Finding
from trainer.config.schema import Config
from trainer.config.stage_schema import StageConfig
from trainer.config.stages import Stage
from trainer.errors import UserError
from trainer.objectives.stream import vocabulary_of

RENAMED = {"optim.learning_rate": "learning_rate", "engine.checkpointing": "checkpointing"}
GROUPS = ("position", "data", "parallel")


def check_stages(
    config: Config, plan: Sequence[Stage], started: int | None, starter: str
) -> Iterator[Finding]:
    """Checks what concerns the stages together and needs no model."""
    if not config.stages:
        return
    if config.checkpoint.every == 0 and len(plan) > 1:
        yield Finding(
            "checkpoint.every",
            0,
            "a stage hands its state over to the next in a checkpoint",
            "use checkpoint.every=1000000 for checkpoints between stages alone",
        )
    names: set[str] = set()
    for stage in plan:
        if stage.name in names:
            yield Finding(
                f"stages.{stage.number - 1}.name",
                stage.name,
                "another stage has that name",
                "give each its own, or none",
            )
        names.add(stage.name)
    yield from _check_ranks(config, plan, started, starter)


def _check_ranks(
    config: Config, plan: Sequence[Stage], started: int | None, starter: str
) -> Iterator[Finding]:
    """Checks that whoever starts the ranks can start other numbers of them between stages."""
    first = plan[0].config.parallel.ranks
    other = next((stage for stage in plan if stage.config.parallel.ranks != first), None)
    if other is None:
        return
    place = f"stages.{other.number - 1}.parallel"
    parallel = other.config.parallel
    shape = f"context={parallel.context} x data={parallel.data}"
    fact = f"{shape} is {parallel.ranks} ranks, but stages.0 has {first}"
    if started is not None:
        yield Finding(
            place,
            parallel.ranks,
            f"{fact}, and {starter} starts no others between stages",
            "use python -m trainer, which does, or the same number of ranks in every stage",
        )
    elif config.launch.name != "local":
        yield Finding(
            place,
            parallel.ranks,
            f"{fact}, and launch={config.launch.name} starts no others between stages",
            "use launch=local on one machine, or the same number of ranks in every stage",
        )


def in_stage(finding: Finding, stages: Sequence[StageConfig], number: int) -> Finding:
    """Returns a finding about an effective config, with its setting named as the user wrote it.

    Args:
        finding: of the checks of a whole run.
        stages: as in the config; empty where the run has no stages.
        number: of the stage, from 1 on.
    """
    if not stages:
        return finding
    place = f"stages.{number - 1}"
    own = _keys_of(stages[number - 1])
    key = finding.key
    if finding.sentence:
        first = FIRST_KEY.match(finding.sentence)
        key = first[0] if first else ""
    named = f"{place}.{RENAMED.get(key, key)}"
    if not _is_among(key, own):
        if not any(_is_among(cause, own) for cause in finding.causes):
            return finding
        named = f"{place}: {key}"
    if finding.sentence:
        return replace(finding, sentence=named + finding.sentence[len(key) :])
    return replace(finding, key=named)


def _keys_of(stage: StageConfig) -> set[str]:
    """Returns the keys of the run in whose place a stage has settings of its own."""
    asked = stage.model_dump(exclude_none=True, exclude={"name"})
    keys: set[str] = set()
    for key, value in asked.items():
        if key in GROUPS and isinstance(value, dict):
            keys |= {f"{key}.{inner}" for inner in value}
        else:
            keys.add(key)
    for long, short in RENAMED.items():
        if short in keys:
            keys.add(long)
    return keys


def _is_among(key: str, keys: Collection[str]) -> bool:
    return any(key == own or key.startswith(f"{own}.") or own.startswith(f"{key}.") for own in keys)


def check_handover(plan: Sequence[Stage]) -> Iterator[Finding]:
    """Checks that every stage has the tensors of the first; each model is built without memory."""
    first: dict[str, Any] = {}
    for stage in plan:
        try:
            shapes = _shapes(stage.config)
        except (UserError, ValueError):  # said by the checks of that stage
            return
        first = first or shapes
        differing = sorted(
            name for name in first.keys() | shapes.keys() if first.get(name) != shapes.get(name)
        )
        if differing:
            name = differing[0]
            yield Finding(
                f"stages.{stage.number - 1}",
                fact=(
                    f"{len(differing)} tensors of its model are not those of stages.0, {name} is"
                    f" {_shown(first.get(name))} there and {_shown(shapes.get(name))} here, so it"
                    " cannot go on from that state"
                ),
                remedy=(
                    "lengthen with position=rope, yarn, ntk or interpolated, or fix the size that"
                    " follows from context_length or data"
                ),
            )


def _shapes(config: Config) -> dict[str, Any]:
    with torch.device("meta"):
        model = build_model.build_model(config, vocabulary_of(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
