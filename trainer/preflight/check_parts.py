"""Whether the parts that a config names can be built: every node's class and settings, then the
whole model."""

from collections.abc import Callable, Collection, Iterator

import torch
from omegaconf import OmegaConf

from models.construction import never_filled
from parallel.context_parallel import refusals, unreachable
from parallel.engines.expert_sharding import unshared
from trainer import foreign
from trainer.config import build_model, instantiate, size_limits
from trainer.config.compose import CONF
from trainer.config.node_checks import node_errors
from trainer.config.schema import Config
from trainer.config.values import TARGET
from trainer.errors import UserError
from trainer.objectives.contradictions import unlearnable, vocabulary
from trainer.preflight import check_engine
from trainer.preflight.check_model import check_lengths, check_position_places, check_whole_only
from trainer.reach import unreached


def check_nodes(config: Config) -> Iterator[str]:
    """Whether every node's settings are those of its class."""
    offers = dict.fromkeys(build_model.offered_sizes(config, 1), None)
    within = {**offers, "position": None, "layer": None}
    yield from node_errors(config.position, offers, "position")
    if config.mixer is not None:
        yield from node_errors(config.mixer, within, "mixer")
    for label, node in config.model.mixers.items():
        yield from node_errors(node, within, f"model.mixers.{label}")
    if config.model.feedforward is not None:
        yield from node_errors(config.model.feedforward, within, "model.feedforward")
    for label, node in config.model.feedforwards.items():
        yield from node_errors(node, within, f"model.feedforwards.{label}")
    for labels in (build_model.mixer_labels, build_model.feedforward_labels):
        try:
            labels(config)
        except UserError as fault:
            yield str(fault)
    yield from check_position_places(config)
    within |= {"mixers": None, "feedforwards": None, "memory": None}
    yield from node_errors(build_model.model_node(config), within, "model")
    yield from _memory_name(config)
    sizes = build_model.offered_sizes(config, 1)
    for where, node, given in (
        ("optim", config.optim, {}),
        ("schedule", config.schedule, {}),
        ("objective", config.objective, {}),
        ("memory", build_model.memory_node(config), sizes),
    ):
        if faults := node_errors(node, given, where):
            yield from faults
        else:
            yield from _tried(
                lambda where=where, node=node, given=given: instantiate.instantiate(
                    node, given, where
                )
            )


def _memory_name(config: Config) -> Iterator[str]:
    """Whether a memory's name and class are one of conf/memory's pairs; of a user's class the name
    says if it carries."""
    asked = config.memory
    pairs = {
        path.stem: str(OmegaConf.load(path)[TARGET]) for path in (CONF / "memory").glob("*.yaml")
    }  # pyright: ignore
    named = next((name for name, target in pairs.items() if target == asked.target), None)
    if named and named != asked.name:
        use = asked.name if asked.name in pairs else named
        yield f"memory.name={asked.name}, but memory._target_={asked.target}; use memory={use}"
    elif not named and not asked.carries:
        yield (
            f"memory.name={asked.name}, but memory._target_={asked.target}; give it a name of"
            " its own"
        )


def _tried(attempt: Callable[[], object]) -> Iterator[str]:
    try:
        attempt()
    except (UserError, ValueError) as error:
        yield str(error)


def check_built_model(config: Config, given: Collection[str]) -> Iterator[str]:
    """Whether the model can be built, and takes what was asked for; it is built without memory."""
    tokens, small = vocabulary(config)
    yield from small
    try:
        place = instantiate.instantiate(
            config.position, build_model.offered_sizes(config, tokens), "position"
        )
        with torch.device("meta"):
            built_model = build_model.build_model(config, tokens)
    except UserError as fault:
        yield str(fault)
        return
    yield from size_limits.parameters(config, built_model)
    yield from never_filled(built_model, config.seed)
    yield from check_whole_only(config, built_model)
    yield from unlearnable(config, built_model)
    yield from foreign.judge(config)
    if config.engine.name == "deepspeed":
        yield from check_engine.check_deepspeed_model(config, built_model)
    if config.parallel.context > 1:
        yield from refusals(built_model, config.parallel.method)
    if config.parallel.experts > 1:
        yield from unshared(built_model, config.parallel.experts) + unreachable(built_model)
    for who in (place, built_model):
        limit = getattr(who, "max_length", None)
        if limit is not None and limit < config.context_length:
            yield too_long(config, limit, f"{type(who).__name__} (max_length={limit})")
    yield from check_lengths(config, built_model)
    if config.memory.carries and (limit := getattr(place, "max_length", None)) is not None:
        yield (
            f"memory={config.memory.name}: positions go on from row to row, but"
            f" position.max_length={limit}; use position=rope or position=relative, which have no"
            " limit"
        )
    taken = [name for each in build_model.sizes_taken(config, tokens).values() for name in each]
    if (
        config.model.max_length is not None and "max_length" not in taken
    ):  # a limit; sizes are offers, which the log lists
        yield (
            f"model.max_length={config.model.max_length}, but nothing in this model takes it; use"
            " model.max_length=null"
        )
    if config.memory.carries and "memory" not in taken:
        yield (
            f"memory={config.memory.name}, but {type(built_model).__name__} takes no memory; leave"
            " memory= out"
        )
    yield from unreached(config, given, tokens).values()


def too_long(config: Config, limit: int, who: str) -> str:
    return (
        f"context_length={config.context_length} is longer than {who} allows; "
        f"use context_length={limit}, or position=rope, which has no limit"
    )
