"""From a node of the config to an object: find the class, bind the settings to its signature, build it.

A size on offer (width, heads, position, ...) is given to every constructor whose signature has it, unless the node
sets it itself. So a mixer asks for what it needs by naming it, and a new mixer needs no edit here.
"""

import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.construction import Origin
from models.memory.memory import Memory
from models.mixing.relay import misfits
from models.past import name_carriers
from trainer.config import Config, Fault, Model, Node
from trainer.judging import find_class, judge, nearest, parameters, plain
from trainer.values import TARGET, is_node


def taken(node: Node | Mapping[str, Any], offers: Mapping[str, Any], where: str = "node") -> dict[str, Any]:
    """The sizes on offer that the node's constructor takes and the node does not set itself."""
    asked = plain(node)
    known = parameters(find_class(asked[TARGET], where))
    return {key: value for key, value in offers.items() if key in known and key not in asked}


def build(node: Node | Mapping[str, Any], offers: Mapping[str, Any], where: str = "node") -> Any:
    """Build what a node says.

    Args:
        node: `_target_` and settings; a setting that is itself a node, or a list with nodes, is built first.
        offers: sizes given to those constructors that have a parameter of that name.
        where: the node's place in the config, for messages.

    Raises:
        Fault: unknown class or setting, or the constructor's own ValueError, with `where` in front.
    """
    if faults := judge(node, offers, where):
        raise Fault("\n".join(faults))
    asked = plain(node)
    kind = find_class(asked.pop(TARGET), where)
    settings = {key: _value(value, offers, f"{where}.{key}") for key, value in asked.items()}
    try:
        return kind(**taken(node, offers, where), **settings)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise Fault(f"{where}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What a constructor complains of; of an error that is no judgement of its settings also the kind and the place."""
    if isinstance(error, ValueError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}{place}; change what its constructor was given"


def _value(value: Any, offers: Mapping[str, Any], where: str) -> Any:
    if is_node(value):
        return build(value, offers, where)
    if isinstance(value, list | tuple):
        return [_value(each, offers, f"{where}.{i}") for i, each in enumerate(value)]
    return value


def takes(config: Config, part: str) -> bool:
    """Whether the model's constructor has a parameter of that name; one without mixers has no layers to build here."""
    return part in parameters(find_class(config.model.target, "model"))


def labels(config: Config) -> list[str]:
    """The label of every layer's mixer; 'mixer' where `mixer=` replaces the pattern; none where the model takes none."""
    if not takes(config, "mixers"):
        return []
    if config.mixer is not None:
        return ["mixer"] * config.model.layers
    return _dealt(config, "pattern", "mixers", "mixer= is not set; choose one, for example mixer=full")


def feedforward_labels(config: Config) -> list[str]:
    """The label of every layer's feed-forward; 'feedforward' where `model.feedforward` replaces the pattern; likewise."""
    if not takes(config, "feedforwards"):
        return []
    if config.model.feedforward is not None:
        return ["feedforward"] * config.model.layers
    way = "model.feedforward is not set; name a class, as model.feedforward._target_=models.feedforward.SwiGLU"
    return _dealt(config, "feedforward_pattern", "feedforwards", way)


def _dealt(config: Config, pattern: str, group: str, way: str) -> list[str]:
    """A pattern of labels, repeated or cut to the layers."""
    asked, known = getattr(config.model, pattern), getattr(config.model, group)
    if not asked:
        raise Fault(f"model.{pattern} is empty and {way}")
    for label in asked:
        if label not in known:
            raise Fault(f"model.{pattern} names {label}, which model.{group} lacks{nearest(label, known)}")
    return [asked[layer % len(asked)] for layer in range(config.model.layers)]


def mixer_node(config: Config, label: str) -> tuple[str, Node]:
    """Where the node of a mixer's label stands in the config, and the node."""
    if config.mixer is not None:
        return "mixer", config.mixer
    return f"model.mixers.{label}", config.model.mixers[label]


def feedforward_node(config: Config, label: str) -> tuple[str, Node]:
    """Where the node of a feed-forward's label stands in the config, and the node."""
    if config.model.feedforward is not None:
        return "model.feedforward", config.model.feedforward
    return f"model.feedforwards.{label}", config.model.feedforwards[label]


def offered(config: Config, vocabulary: int) -> dict[str, Any]:
    """The sizes that every constructor of the model may take, by name."""
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


def ffn_width(config: Config) -> int:
    """The width of the feed-forward layers: model.ffn itself, or that multiple of the width, rounded up to eights."""
    asked, width = config.model.ffn, config.model.width
    if asked is None:
        asked = 4.0
    if isinstance(asked, int):
        return asked
    return -(-round(asked * width) // 8) * 8


def model_node(config: Config) -> dict[str, Any]:
    """The model's node without what is offered to it: its sizes, mixers and feed-forward layers."""
    return {key: value for key, value in plain(config.model).items() if key not in Model.model_fields}


def build_model(config: Config, vocabulary: int) -> nn.Module:
    """The model of a run, for one device; under `torch.device("meta")` it takes no memory.

    Every layer gets a position object of its own, so that no module is shared between layers.

    Raises:
        Fault: any setting that no constructor takes, or that a constructor refuses.
    """
    model = _assembled(config, vocabulary)
    others = (model_node(config), plain(config.position), memory_node(config))
    Origin(partial(_assembled, config, vocabulary, layers_on="meta"), _foreign(others)).hang_on(model)
    if faults := misfits(model):
        raise Fault("\n".join(faults))
    name_carriers(model)
    return model


def _assembled(config: Config, vocabulary: int, layers_on: str | None = None) -> nn.Module:
    """The model; its mixers and feed-forward layers are on the device in force, or on `layers_on`."""
    offers = offered(config, vocabulary)
    memory = build_memory(config, offers)
    with torch.device(layers_on) if layers_on else nullcontext():
        mixers, feedforwards = _layers(config, vocabulary)
        mixers = [_around(memory, mixer, {**offers, "layer": layer}) for layer, mixer in enumerate(mixers)]
    try:
        memory.judge(mixers)
    except ValueError as error:
        raise Fault(f"memory: {error}") from error
    for layer, (label, mixer) in enumerate(zip(labels(config), mixers, strict=True)):
        nodes = (mixer_node(config, label)[1], config.position, memory_node(config))
        Origin(partial(_mixer, config, vocabulary, layer), _foreign(nodes)).hang_on(mixer)
    for layer, (label, feedforward) in enumerate(zip(feedforward_labels(config), feedforwards, strict=True)):
        nodes = (feedforward_node(config, label)[1], config.position)
        Origin(partial(_feedforward, config, vocabulary, layer), _foreign(nodes)).hang_on(feedforward)
    place = build(config.position, offers, "position")
    parts = {"mixers": mixers, "feedforwards": feedforwards}
    return build(model_node(config), {**offers, "position": place, "memory": memory, **parts}, "model")


def _layers(config: Config, vocabulary: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """The mixers, before a memory is put around them, and the feed-forward layers."""
    pairs = list(zip(labels(config), feedforward_labels(config)))
    offers = offered(config, vocabulary)
    mixers = [_layer(config, offers, layer, mixer_node(config, label)) for layer, (label, _) in enumerate(pairs)]
    feedforwards = [_layer(config, offers, layer, feedforward_node(config, label)) for layer, (_, label) in enumerate(pairs)]
    return mixers, feedforwards


def _layer(config: Config, offers: Mapping[str, Any], layer: int, placed: tuple[str, Node]) -> nn.Module:
    """A mixer or a feed-forward layer, from (where its node stands, the node)."""
    where, node = placed
    place = build(config.position, offers, "position")
    return build(node, {**offers, "position": place, "layer": layer}, where)


def _mixer(config: Config, vocabulary: int, layer: int) -> nn.Module:
    """The mixer of a layer with its memory, alone."""
    offers = offered(config, vocabulary)
    mixer = _layer(config, offers, layer, mixer_node(config, labels(config)[layer]))
    return _around(build_memory(config, offers), mixer, {**offers, "layer": layer})


def _feedforward(config: Config, vocabulary: int, layer: int) -> nn.Module:
    """The feed-forward layer of a layer, alone."""
    return _layer(config, offered(config, vocabulary), layer, feedforward_node(config, feedforward_labels(config)[layer]))


def _foreign(nodes: Any) -> bool:
    """Whether a node among these, or inside them, names a class that is not ours."""
    if isinstance(nodes, Node):
        nodes = plain(nodes)
    if isinstance(nodes, Mapping):
        own = str(nodes.get(TARGET, "models.")).startswith("models.")
        return not own or any(_foreign(value) for value in nodes.values())
    return isinstance(nodes, list | tuple) and any(_foreign(value) for value in nodes)


def memory_node(config: Config) -> dict[str, Any]:
    """The node of the memory, without its name."""
    return {key: value for key, value in plain(config.memory).items() if key != "name"}


def build_memory(config: Config, offers: Mapping[str, Any]) -> Memory:
    """What `memory=` names; one for the whole model."""
    return build(memory_node(config), offers, "memory")


def _around(memory: Memory, mixer: nn.Module, sizes: Mapping[str, Any]) -> nn.Module:
    try:
        return memory.around(mixer, **sizes)
    except ValueError as error:
        raise Fault(f"memory: {error}") from error


def sizes_taken(config: Config, vocabulary: int) -> dict[str, dict[str, Any]]:
    """For the log: by place in the config, the sizes on offer that the class there takes."""
    offers = offered(config, vocabulary)
    inside = {**offers, "position": config.position.target.rpartition(".")[2]}
    places = dict(mixer_node(config, label) for label in labels(config))
    places |= dict(feedforward_node(config, label) for label in feedforward_labels(config))
    return {
        "position": taken(config.position, offers, "position"),
        **{where: taken(node, inside, where) for where, node in places.items()},
        "model": taken(model_node(config), {**inside, "memory": config.memory.name}, "model"),
    }


def build_engine(config: Config, mesh: Any, optimiser: Any) -> Any:
    """The engine of a run, with those of its settings that are set."""
    apart = ("name", "offload_activations")  # what place() is told
    settings = {key: value for key, value in plain(config.engine).items() if key not in apart and value is not None}
    offers = {"mesh": mesh, "optimiser": optimiser, "precision": config.precision, "seed": config.seed}
    return build(settings, offers, "engine")
