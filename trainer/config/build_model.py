"""Builds the model of a run from its config, layer by layer."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from models.cache.base import KVCacheFactory
from models.carried_state import name_stateful_modules
from models.construction import Origin
from models.lora import add_adapters
from models.memory.base import Memory
from models.primitives.sequential import misfits
from trainer.config.instantiate import instantiate, taken_offers
from trainer.config.node_checks import as_node, find_class, nearest, parameters
from trainer.config.schema import ComponentConfig, Config, ModelConfig
from trainer.config.values import TARGET
from trainer.errors import UserError


def model_takes(config: Config, part: str) -> bool:
    """Tells whether the model's constructor has a parameter of that name.

    A model that takes no mixers has no layers to be built here.
    """
    return part in parameters(find_class(config.model.target, "model"))


def mixer_labels(config: Config) -> list[str]:
    """Returns the label of every layer's mixer; none where the model takes no mixers.

    Where `mixer=` replaces the pattern every label is 'mixer'.
    """
    if not model_takes(config, "mixers"):
        return []
    if config.mixer is not None:
        return ["mixer"] * config.model.layers
    return _repeated_pattern(
        config, "pattern", "mixers", "mixer= is not set; choose one, for example mixer=full"
    )


def feedforward_labels(config: Config) -> list[str]:
    """Returns the label of every layer's feed-forward; none where the model takes none.

    Where `model.feedforward` replaces the pattern every label is 'feedforward'.
    """
    if not model_takes(config, "feedforwards"):
        return []
    if config.model.feedforward is not None:
        return ["feedforward"] * config.model.layers
    way = (
        "model.feedforward is not set; name a class, as"
        " model.feedforward._target_=models.feedforward.SwiGLU"
    )
    return _repeated_pattern(config, "feedforward_pattern", "feedforwards", way)


def encoder_labels(config: Config) -> tuple[list[str], list[str]]:
    """Returns the labels of mixers and feed-forwards over the source; none without an encoder."""
    if not model_takes(config, "encoder_mixers"):
        return [], []
    layers = config.model.encoder_layers or config.model.layers
    way = "names no mixer of the encoder; use model.encoder_pattern=[bidirectional]"
    mixers = _repeated_pattern(config, "encoder_pattern", "mixers", way, layers)
    if config.model.feedforward is not None:
        return mixers, ["feedforward"] * layers
    # Their fault is reported with the decoder's.
    pattern = config.model.feedforward_pattern or ["feedforward"]
    return mixers, [pattern[layer % len(pattern)] for layer in range(layers)]


def _repeated_pattern(
    config: Config, pattern: str, group: str, way: str, layers: int | None = None
) -> list[str]:
    """Returns a pattern of labels, repeated or cut to the number of layers."""
    asked = getattr(config.model, pattern)
    known = getattr(config.model, group)
    if not asked:
        raise UserError(f"model.{pattern} is empty and {way}")
    for label in asked:
        if label not in known:
            raise UserError(
                f"model.{pattern} names {label}, which model.{group} lacks{nearest(label, known)}"
            )
    return [asked[layer % len(asked)] for layer in range(layers or config.model.layers)]


def mixer_node(config: Config, label: str) -> tuple[str, ComponentConfig]:
    """Returns the place in the config and the node of a mixer's label."""
    if config.mixer is not None:
        return "mixer", config.mixer
    return f"model.mixers.{label}", config.model.mixers[label]


def encoder_mixer_node(config: Config, label: str) -> tuple[str, ComponentConfig]:
    """Returns the place and the node of a mixer over the source; `mixer=` leaves it alone."""
    return f"model.mixers.{label}", config.model.mixers[label]


def encoder_position_node(config: Config) -> tuple[str, ComponentConfig]:
    """Returns the place and the node of the positions of the source."""
    if config.model.encoder_position is not None:
        return "model.encoder_position", config.model.encoder_position
    return "position", config.position


def feedforward_node(config: Config, label: str) -> tuple[str, ComponentConfig]:
    """Returns the place in the config and the node of a feed-forward's label."""
    if config.model.feedforward is not None:
        return "model.feedforward", config.model.feedforward
    return f"model.feedforwards.{label}", config.model.feedforwards[label]


def offered_sizes(config: Config, vocabulary: int) -> dict[str, Any]:
    """Returns the sizes that every constructor of the model may take, by name."""
    model = config.model
    return {
        "width": model.width,
        "ffn": ffn_width(config),
        "layers": model.layers,
        "heads": model.heads,
        "kv_heads": model.kv_heads or model.heads,
        "vocabulary": model.vocabulary or vocabulary,
        "max_length": model.max_length,
        "context_length": config.context_length,
        "seed": config.seed,
    }


def source_length(config: Config) -> int:
    """Returns the tokens of a row of sources, as the data says."""
    return as_node(config.data).get("source_length") or config.context_length


def ffn_width(config: Config) -> int:
    """Returns the feed-forward width: model.ffn, or that multiple of the width in eights."""
    asked = config.model.ffn
    width = config.model.width
    if asked is None:
        asked = 4.0
    if isinstance(asked, int):
        return asked
    return -(-round(asked * width) // 8) * 8


def model_node(config: Config) -> dict[str, Any]:
    """Returns the model's node without the sizes and layers that are offered to it."""
    return {
        key: value
        for key, value in as_node(config.model).items()
        if key not in ModelConfig.model_fields
    }


def build_model(config: Config, vocabulary: int) -> nn.Module:
    """Builds the model of a run for one device; under `torch.device("meta")` without memory.

    Every layer gets a position object of its own, so that no module is shared between layers.

    Raises:
        UserError: any setting that no constructor takes, or that a constructor refuses.
    """
    model = _assembled_model(config, vocabulary)
    others = (model_node(config), as_node(config.position), memory_node(config))
    Origin(
        partial(_assembled_model, config, vocabulary, layers_on="meta"), _is_foreign(others)
    ).hang_on(model)
    if config.lora.rank:
        lora = config.lora
        try:
            add_adapters(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
        except ValueError as error:
            raise UserError(str(error)) from error
    if faults := misfits(model):
        raise UserError("\n".join(faults))
    name_stateful_modules(model)
    return model


def _assembled_model(config: Config, vocabulary: int, layers_on: str | None = None) -> nn.Module:
    """Builds the model, with its layers on the device in force or on `layers_on`."""
    offers = offered_sizes(config, vocabulary)
    memory = build_memory(config, offers)
    with torch.device(layers_on) if layers_on else nullcontext():
        mixers, feedforwards = _layers(config, vocabulary)
        mixers = [
            _with_memory(memory, mixer, {**offers, "layer": layer})
            for layer, mixer in enumerate(mixers)
        ]
    try:
        memory.validate_mixers(mixers)
    except ValueError as error:
        raise UserError(f"memory: {error}") from error
    for layer, (label, mixer) in enumerate(zip(mixer_labels(config), mixers, strict=True)):
        nodes = (mixer_node(config, label)[1], config.position, memory_node(config))
        Origin(partial(_mixer, config, vocabulary, layer), _is_foreign(nodes)).hang_on(mixer)
    for layer, (label, feedforward) in enumerate(
        zip(feedforward_labels(config), feedforwards, strict=True)
    ):
        nodes = (feedforward_node(config, label)[1], config.position)
        Origin(partial(_feedforward, config, vocabulary, layer), _is_foreign(nodes)).hang_on(
            feedforward
        )
    place = instantiate(config.position, offers, "position")
    parts = {"mixers": mixers, "feedforwards": feedforwards}
    if model_takes(config, "encoder_mixers"):
        parts |= _encoder_parts(config, vocabulary, layers_on)
    return instantiate(
        model_node(config), {**offers, "position": place, "memory": memory, **parts}, "model"
    )


def _encoder_parts(config: Config, vocabulary: int, layers_on: str | None) -> dict[str, Any]:
    """Builds what an encoder is offered: its mixers, feed-forward layers and positions."""
    offers = {**offered_sizes(config, vocabulary), "context_length": source_length(config)}
    mixer_names, feedforward_names = encoder_labels(config)
    mixers = []
    feedforwards = []
    for layer, (mixer_name, feedforward_name) in enumerate(
        zip(mixer_names, feedforward_names, strict=True)
    ):
        makers = []
        for node in (
            encoder_mixer_node(config, mixer_name),
            feedforward_node(config, feedforward_name),
        ):
            makers.append(partial(_layer, config, offers, layer, node, of_source=True))
        with torch.device(layers_on) if layers_on else nullcontext():
            mixer = makers[0]()
            feedforward = makers[1]()
        position = encoder_position_node(config)[1]
        nodes = (encoder_mixer_node(config, mixer_name)[1], position)
        Origin(makers[0], _is_foreign(nodes)).hang_on(mixer)
        nodes = (feedforward_node(config, feedforward_name)[1], position)
        Origin(makers[1], _is_foreign(nodes)).hang_on(feedforward)
        mixers.append(mixer)
        feedforwards.append(feedforward)
    where, node = encoder_position_node(config)
    return {
        "encoder_mixers": mixers,
        "encoder_feedforwards": feedforwards,
        "encoder_position": instantiate(node, offers, where),
    }


def _layers(config: Config, vocabulary: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """Builds the mixers, without a memory around them, and the feed-forward layers."""
    pairs = list(zip(mixer_labels(config), feedforward_labels(config)))
    offers = offered_sizes(config, vocabulary)
    mixers = [
        _layer(config, offers, layer, mixer_node(config, label))
        for layer, (label, _) in enumerate(pairs)
    ]
    feedforwards = [
        _layer(config, offers, layer, feedforward_node(config, label))
        for layer, (_, label) in enumerate(pairs)
    ]
    return mixers, feedforwards


def _layer(
    config: Config,
    offers: Mapping[str, Any],
    layer: int,
    placed: tuple[str, ComponentConfig],
    *,
    of_source: bool = False,
) -> nn.Module:
    """Builds a mixer or a feed-forward layer from the place of its node and the node.

    Args:
        of_source: it stands in the encoder, which may have positions of its own.
    """
    where, node = placed
    key, position = encoder_position_node(config) if of_source else ("position", config.position)
    place = instantiate(position, offers, key)
    return instantiate(node, {**offers, "position": place, "layer": layer}, where)


def _mixer(config: Config, vocabulary: int, layer: int) -> nn.Module:
    """Builds the mixer of one layer with its memory."""
    offers = offered_sizes(config, vocabulary)
    mixer = _layer(config, offers, layer, mixer_node(config, mixer_labels(config)[layer]))
    return _with_memory(build_memory(config, offers), mixer, {**offers, "layer": layer})


def _feedforward(config: Config, vocabulary: int, layer: int) -> nn.Module:
    """Builds the feed-forward of one layer."""
    return _layer(
        config,
        offered_sizes(config, vocabulary),
        layer,
        feedforward_node(config, feedforward_labels(config)[layer]),
    )


def _is_foreign(nodes: Any) -> bool:
    """Tells whether a node among these, or inside them, names a class that is not ours."""
    if isinstance(nodes, ComponentConfig):
        nodes = as_node(nodes)
    if isinstance(nodes, Mapping):
        own = str(nodes.get(TARGET, "models.")).startswith("models.")
        return not own or any(_is_foreign(value) for value in nodes.values())
    return isinstance(nodes, list | tuple) and any(_is_foreign(value) for value in nodes)


def memory_node(config: Config) -> dict[str, Any]:
    """Returns the node of the memory, without its name."""
    return {key: value for key, value in as_node(config.memory).items() if key != "name"}


def build_memory(config: Config, offers: Mapping[str, Any]) -> Memory:
    """Builds the memory that `memory=` names, one for the whole model."""
    return instantiate(memory_node(config), offers, "memory")


def build_cache(config: Config) -> KVCacheFactory:
    """Builds what holds keys and values while the model generates, which `cache=` names."""
    return instantiate(config.cache, {}, "cache")


def _with_memory(memory: Memory, mixer: nn.Module, sizes: Mapping[str, Any]) -> nn.Module:
    try:
        return memory.around(mixer, **sizes)
    except ValueError as error:
        raise UserError(f"memory: {error}") from error


def sizes_taken(config: Config, vocabulary: int) -> dict[str, dict[str, Any]]:
    """Returns for the log the sizes on offer that each class takes, by place in the config."""
    offers = offered_sizes(config, vocabulary)
    inside = {**offers, "position": config.position.target.rpartition(".")[2]}
    places = dict(mixer_node(config, label) for label in mixer_labels(config))
    places |= dict(encoder_mixer_node(config, label) for label in encoder_labels(config)[0])
    places |= dict(feedforward_node(config, label) for label in feedforward_labels(config))
    return {
        "position": taken_offers(config.position, offers, "position"),
        **{where: taken_offers(node, inside, where) for where, node in places.items()},
        "model": taken_offers(
            model_node(config), {**inside, "memory": config.memory.name}, "model"
        ),
    }


def build_engine(config: Config, mesh: Any, optimiser: Any) -> Any:
    """Builds the engine of a run, with those of its settings that are not null."""
    # what place() is told
    apart = ("name", "offload_activations", "tile_tokens", "head_groups")
    settings = {
        key: value
        for key, value in as_node(config.engine).items()
        if key not in apart and value is not None
    }
    offers = {
        "mesh": mesh,
        "optimiser": optimiser,
        "precision": config.precision,
        "seed": config.seed,
    }
    return instantiate(settings, offers, "engine")
