"""Checks that the parts of a config can be built: each node by itself, then the whole model."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from models.construction import never_filled
from models.layer import hook
from models.pieces.cuttable import cannot_be_cut
from parallel.context_parallel import refusals, unreachable
from parallel.engines.expert_sharding import unshared
from trainer.config import build_model, instantiate
from trainer.config.finding import Finding
from trainer.config.groups import files
from trainer.config.node_checks import node_errors
from trainer.config.schema import ComponentConfig, Config
from trainer.config.size_limits import check_model_memory
from trainer.config.values import TARGET
from trainer.errors import UserError
from trainer.init_from.adapters import check_adapters
from trainer.init_from.fit import check_init_from
from trainer.objectives.contradictions import check_objective_model, vocabulary
from trainer.optim.selection import check_selection
from trainer.preflight.check_engine import check_deepspeed_model
from trainer.preflight.check_evaluation import check_evaluation_nodes, check_evaluations
from trainer.preflight.check_lag import check_lag_model
from trainer.preflight.check_memory import check_memory
from trainer.preflight.check_model import (
    check_block_settings,
    check_cache,
    check_layer_settings,
    check_sample_length,
    check_streams,
)
from trainer.preflight.foreign import check_foreign_layers
from trainer.preflight.reach import unreached
from trainer.preflight.same_gradients import check_same_gradients


def check_nodes(config: Config) -> Iterator[Finding | str]:
    """Checks that every node's settings are those of its class."""
    sizes = build_model.offered_sizes(config, 1)
    offers = dict.fromkeys(sizes)
    layer_offers = {**offers, "position": None, "layer": None}
    parts = ("mixers", "feedforwards", "memory", "encoder_mixers", "encoder_feedforwards")
    model_offers = {**layer_offers, **dict.fromkeys(parts), "encoder_position": None}
    yield from node_errors(config.position, offers, "position")
    if config.model.encoder_position is not None:
        yield from node_errors(config.model.encoder_position, offers, "model.encoder_position")
    yield from _check_layer_nodes(config, layer_offers)
    for layer_labels in (
        build_model.mixer_labels,
        build_model.feedforward_labels,
        build_model.encoder_labels,
    ):
        try:
            layer_labels(config)
        except UserError as error:
            yield str(error)
    yield from check_layer_settings(config)
    yield from check_streams(config)
    yield from node_errors(build_model.model_node(config), model_offers, "model")
    yield from check_memory_name(config)
    yield from _check_by_building(config.optim, {}, "optim")
    yield from _check_by_building(config.schedule, {}, "schedule")
    yield from _check_by_building(config.objective, {}, "objective")
    yield from _check_by_building(build_model.memory_node(config), sizes, "memory")
    yield from _check_by_building(config.cache, {}, "cache")
    yield from check_evaluation_nodes(config)


def _check_layer_nodes(config: Config, offers: Mapping[str, Any]) -> Iterator[str]:
    if config.mixer is not None:
        yield from node_errors(config.mixer, offers, "mixer")
    for label, node in config.model.mixers.items():
        yield from node_errors(node, offers, f"model.mixers.{label}")
    if config.model.feedforward is not None:
        yield from node_errors(config.model.feedforward, offers, "model.feedforward")
    for label, node in config.model.feedforwards.items():
        yield from node_errors(node, offers, f"model.feedforwards.{label}")


def _check_by_building(
    node: ComponentConfig | Mapping[str, Any], offers: Mapping[str, Any], path: str
) -> Iterator[str]:
    """Checks a node that is cheap enough to build, so that its constructor has a say as well."""
    sentences = node_errors(node, offers, path)
    if sentences:
        yield from sentences
        return
    try:
        instantiate.instantiate(node, offers, path)
    except (UserError, ValueError) as error:
        yield str(error)


def check_memory_name(config: Config) -> Iterator[Finding]:
    """Checks that the name and the class of the memory belong together.

    The name decides whether rows carry a state, so a wrong pair would change how the data is read.
    A class of the user's own may have any name that is not taken, which then says that it carries.
    """
    memory = config.memory
    targets: dict[str, str] = {}
    for path in files("memory"):
        targets[path.stem] = str(OmegaConf.load(path)[TARGET])  # pyright: ignore
    own_names = [name for name, target in targets.items() if target == memory.target]
    fact = f"does not belong to memory._target_={memory.target}"
    if own_names and own_names[0] != memory.name:
        choice = memory.name if memory.name in targets else own_names[0]
        yield Finding("memory.name", memory.name, fact, f"use memory={choice}")
    elif not own_names and not memory.carries:
        yield Finding("memory.name", memory.name, fact, "give it a name of its own")


def check_built_model(config: Config, given: Collection[str]) -> Iterator[Finding | str]:
    """Checks that the model can be built and takes what was set; it is built without memory.

    Args:
        config: a config whose nodes were checked.
        given: keys and groups that the user set by hand.
    """
    tokens, vocabulary_errors = vocabulary(config)
    yield from vocabulary_errors
    try:
        offers = build_model.offered_sizes(config, tokens)
        position = instantiate.instantiate(config.position, offers, "position")
        with torch.device("meta"):
            model = build_model.build_model(config, tokens)
    except UserError as error:
        yield str(error)
        return
    too_large = list(check_model_memory(config, model))
    yield from too_large or check_memory(config, model)
    yield from never_filled(model, config.seed)
    yield from check_block_settings(config, model)
    yield from check_objective_model(config, model)
    yield from check_foreign_layers(config)
    yield from check_lag_model(config, model)
    yield from check_same_gradients(config)
    if config.engine.name == "deepspeed":
        yield from check_deepspeed_model(config, model)
    if config.parallel.context > 1:
        yield from refusals(model, config.parallel.method)
    yield from check_time(config, model)
    if config.parallel.experts > 1:
        yield from unshared(model, config.parallel.experts)
        yield from unreachable(model)
    yield from check_init_from(config, model)
    yield from check_selection(config, model)
    yield from check_adapters(config, model)
    yield from _check_max_length(config, position, model)
    yield from check_sample_length(config, model)
    yield from check_cache(config, model)
    yield from check_evaluations(config, model, position, tokens)
    yield from _check_takers(config, position, model, tokens)
    yield from unreached(config, given, tokens).values()


def check_time(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Checks that the rows of this model can be cut in time."""
    pieces = config.parallel.time
    if pieces > config.context_length:
        yield Finding(
            "parallel.time",
            pieces,
            f"a row has {config.context_length} tokens, fewer than pieces",
            f"use parallel.time={config.context_length} or less",
            causes=("context_length",),
        )
    for sentence in cannot_be_cut(model) if pieces > 1 else ():
        yield Finding("parallel.time", pieces, sentence, "use parallel.time=1")


def _check_max_length(config: Config, position: Any, model: nn.Module) -> Iterator[Finding]:
    for part in (position, model):
        limit = hook(part, "max_length")
        if limit is not None and limit < config.context_length:
            yield context_too_long(config, limit, f"{type(part).__name__} (max_length={limit})")


def _check_takers(
    config: Config, position: Any, model: nn.Module, vocabulary_size: int
) -> Iterator[Finding]:
    """Checks that some part takes the limit of length and the memory that were set."""
    sizes_by_part = build_model.sizes_taken(config, vocabulary_size)
    taken = {name for sizes in sizes_by_part.values() for name in sizes}
    memory = config.memory
    longest = hook(position, "max_length")
    if memory.carries and longest is not None:
        yield Finding(
            "memory",
            memory.name,
            f"positions go on from row to row, but position.max_length={longest}",
            "use position=rope or position=relative, which have no limit",
        )
    # Other sizes are offers, and the log lists who took them; a limit that is not kept is a fault.
    if config.model.max_length is not None and "max_length" not in taken:
        yield Finding(
            "model.max_length",
            config.model.max_length,
            "nothing in this model takes it",
            "use model.max_length=null",
        )
    if memory.carries and "memory" not in taken:
        yield Finding(
            "memory",
            memory.name,
            f"{type(model).__name__} takes no memory",
            "leave memory= out",
        )


def context_too_long(
    config: Config, limit: int, owner: str, causes: tuple[str, ...] = ()
) -> Finding:
    """Returns the finding about rows that are longer than a part of the model allows."""
    return Finding(
        "context_length",
        config.context_length,
        f"is longer than {owner} allows",
        f"use context_length={limit}, or position=rope, which has no limit",
        causes=causes,
    )
