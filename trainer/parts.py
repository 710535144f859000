"""Whether the parts that a config names can be built: every node's class and settings, then the whole model."""

from collections.abc import Callable, Collection, Iterator

import torch
from omegaconf import OmegaConf

from models.construction import never_filled
from parallel.engines.experts import unshared
from parallel.spread import refusals, unreachable
from trainer import build, foreign, room, zero
from trainer.compose import CONF
from trainer.config import Config, Fault
from trainer.objectives.contradictions import unlearnable, vocabulary
from trainer.reach import unreached
from trainer.unmet import too_short, unplaced, whole_only
from trainer.values import TARGET


def nodes(config: Config) -> Iterator[str]:
    """Whether every node's settings are those of its class."""
    offers = dict.fromkeys(build.offered(config, 1), None)
    within = {**offers, "position": None, "layer": None}
    yield from build.judge(config.position, offers, "position")
    if config.mixer is not None:
        yield from build.judge(config.mixer, within, "mixer")
    for label, node in config.model.mixers.items():
        yield from build.judge(node, within, f"model.mixers.{label}")
    if config.model.feedforward is not None:
        yield from build.judge(config.model.feedforward, within, "model.feedforward")
    for label, node in config.model.feedforwards.items():
        yield from build.judge(node, within, f"model.feedforwards.{label}")
    for labels in (build.labels, build.feedforward_labels):
        try:
            labels(config)
        except Fault as fault:
            yield str(fault)
    yield from unplaced(config)
    within |= {"mixers": None, "feedforwards": None, "memory": None}
    yield from build.judge(build.model_node(config), within, "model")
    yield from _memory_name(config)
    sizes = build.offered(config, 1)
    for where, node, given in (
        ("optim", config.optim, {}),
        ("schedule", config.schedule, {}),
        ("objective", config.objective, {}),
        ("memory", build.memory_node(config), sizes),
    ):
        if faults := build.judge(node, given, where):
            yield from faults
        else:
            yield from _tried(lambda where=where, node=node, given=given: build.build(node, given, where))


def _memory_name(config: Config) -> Iterator[str]:
    """Whether a memory's name and class are one of conf/memory's pairs; of a user's class the name says if it carries."""
    asked = config.memory
    pairs = {path.stem: str(OmegaConf.load(path)[TARGET]) for path in (CONF / "memory").glob("*.yaml")}  # pyright: ignore
    named = next((name for name, target in pairs.items() if target == asked.target), None)
    if named and named != asked.name:
        use = asked.name if asked.name in pairs else named
        yield f"memory.name={asked.name}, but memory._target_={asked.target}; use memory={use}"
    elif not named and not asked.carries:
        yield f"memory.name={asked.name}, but memory._target_={asked.target}; give it a name of its own"


def _tried(attempt: Callable[[], object]) -> Iterator[str]:
    try:
        attempt()
    except (Fault, ValueError) as error:
        yield str(error)


def model(config: Config, given: Collection[str]) -> Iterator[str]:
    """Whether the model can be built, and takes what was asked for; it is built without memory."""
    tokens, small = vocabulary(config)
    yield from small
    try:
        place = build.build(config.position, build.offered(config, tokens), "position")
        with torch.device("meta"):
            built_model = build.build_model(config, tokens)
    except Fault as fault:
        yield str(fault)
        return
    yield from room.parameters(config, built_model)
    yield from never_filled(built_model, config.seed)
    yield from whole_only(config, built_model)
    yield from unlearnable(config, built_model)
    yield from foreign.judge(config)
    if config.engine.name == "deepspeed":
        yield from zero.handed_on(config, built_model)
    if config.parallel.context > 1:
        yield from refusals(built_model, config.parallel.method)
    if config.parallel.experts > 1:
        yield from unshared(built_model, config.parallel.experts) + unreachable(built_model)
    for who in (place, built_model):
        limit = getattr(who, "max_length", None)
        if limit is not None and limit < config.context_length:
            yield too_long(config, limit, f"{type(who).__name__} (max_length={limit})")
    yield from too_short(config, built_model)
    if config.memory.carries and (limit := getattr(place, "max_length", None)) is not None:
        yield (
            f"memory={config.memory.name}: positions go on from row to row, but position.max_length={limit}; "
            "use position=rope or position=relative, which have no limit"
        )
    taken = [name for each in build.sizes_taken(config, tokens).values() for name in each]
    if config.model.max_length is not None and "max_length" not in taken:  # a limit; sizes are offers, which the log lists
        yield f"model.max_length={config.model.max_length}, but nothing in this model takes it; use model.max_length=null"
    if config.memory.carries and "memory" not in taken:
        yield f"memory={config.memory.name}, but {type(built_model).__name__} takes no memory; leave memory= out"
    yield from unreached(config, given, tokens).values()


def too_long(config: Config, limit: int, who: str) -> str:
    return (
        f"context_length={config.context_length} is longer than {who} allows; "
        f"use context_length={limit}, or position=rope, which has no limit"
    )
