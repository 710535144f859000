"""Describes a run's model layer by layer, so that it can be compared with a config.json's.

Mixers of the catalogue that HubAttention can be are described as that; every setting stands there
with its default, so two descriptions are equal exactly if the models are.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from models.attention.latent import latent_sizes
from models.hub.description import LATENT, LEARNED, MIXER, MIXTURE, TARGET, Description

MIXERS: dict[str, dict[str, Any]] = {  # what HubAttention needs to be a mixer of the catalogue
    "models.attention.full.Attention": {},
    "models.attention.full.MultiQuery": {"kv_heads": 1},
    "models.attention.sliding.Sliding": {},
    "models.attention.softcap.Softcap": {},
    "models.attention.qk_norm.QKNorm": {"qk_norm": "rms"},
    "models.attention.sink_logit.SinkLogit": {"sink": True},
}
RENAMED = {"eps": "qk_norm_eps"}
SIZES = ("width", "layers", "heads", "kv_heads", "ffn", "vocabulary", "context_length")
# Of mixtures: they act in training alone, or on the first weights.
TRAINED_WITH = ("balance", "bias_speed", "expert_dropout", "jitter", "router_scale", "z")
# said apart, or no part of the finished model
PLACED = ("mixers", "feedforwards", "position", "memory", "init_std")


def describe(
    sizes: Mapping[str, Any],
    stack: Mapping[str, Any],
    mixers: Sequence[Mapping[str, Any]],
    feedforwards: Sequence[Mapping[str, Any]],
    position: Mapping[str, Any],
) -> Description:
    """Returns the description of a model from the nodes of its config.

    Args:
        sizes: see SIZES; others are left out.
        stack: the node `model` without sizes and layers.
        mixers, feedforwards: one node for each layer.
        position: the node `position`.
    """
    kept = {key: sizes[key] for key in SIZES if key in sizes}
    settings = with_defaults(stack)
    for key in (*PLACED, *SIZES):
        settings.pop(key, None)
    place = with_defaults(position)
    if place[TARGET] == LEARNED and place["max_length"] is None:
        place["max_length"] = kept["context_length"]
    layers = [_mixer(node, kept, place) for node in mixers]
    dense = [_feedforward(node, kept) for node in feedforwards]
    for key, nodes in (("kv_heads", layers), ("ffn", dense)):
        if not any(key in node for node in nodes):
            # No layer has that size, whatever the config says.
            kept.pop(key, None)
    return Description(kept, settings, layers, dense, place)


def with_defaults(node: Mapping[str, Any], offers: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Returns a node with the defaults of its class and the sizes that it takes filled in."""
    home, _, name = str(node[TARGET]).rpartition(".")
    kind = getattr(importlib.import_module(home), name)
    filled: dict[str, Any] = {TARGET: node[TARGET]}
    for key, parameter in inspect.signature(kind).parameters.items():
        if key in node:
            filled[key] = node[key]
        elif key in offers:
            filled[key] = offers[key]
        elif parameter.default is not inspect.Parameter.empty:
            filled[key] = parameter.default
    return filled


def _mixer(
    node: Mapping[str, Any], sizes: Mapping[str, Any], position: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a mixer as a node of HubAttention where it can be one."""
    known = MIXERS.get(str(node[TARGET]))
    if known is not None:
        settings = {RENAMED.get(key, key): value for key, value in with_defaults(node).items()}
        settings.pop("mask", None)
        node = {**settings, **known, TARGET: MIXER}
    filled = with_defaults(node, {**sizes, "position": dict(position)})
    own = filled.get("position")
    if isinstance(own, Mapping):
        filled["position"] = with_defaults(own)
    width = sizes["width"] // sizes["heads"]
    if filled.get("head_width") is None and filled[TARGET] == MIXER:
        filled["head_width"] = width
    if filled[TARGET] == LATENT:
        names = ("kv_latent", "nope_dim", "rope_dim", "value_dim")
        asked = [filled[name] for name in names]
        filled |= latent_sizes(sizes["width"], sizes["heads"], *asked)
    return filled


def _feedforward(node: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a feed-forward layer as a node; of a mixture what the finished model has."""
    filled = with_defaults(node, sizes)
    if filled[TARGET] != MIXTURE:
        return filled
    filled["choice_bias"] = filled["choice_bias"] or filled["bias_speed"] > 0
    if filled["hidden"] is None:
        filled["hidden"] = max(1, filled["ffn"] // (filled["top"] + filled["shared"]))
    if filled["activation"] == "clamped_swiglu":
        filled["swiglu_alpha"] = filled["swiglu_alpha"] or 1.702
        filled["swiglu_limit"] = filled["swiglu_limit"] or 7.0
    for key in (*TRAINED_WITH, "ffn", "layers", "seed"):
        filled.pop(key, None)
    return filled


def differences(one: Description, other: Description) -> list[str]:
    """Returns what differs, as `key: value of one, value of other`; empty for equal models."""
    found = _unequal("", one.sizes, other.sizes) + _unequal("model.", one.stack, other.stack)
    for name in ("mixers", "feedforwards"):
        pairs = zip(getattr(one, name), getattr(other, name), strict=False)
        for layer, (mine, theirs) in enumerate(pairs):
            found += _unequal(f"layer {layer} {name[:-1]} ", mine, theirs)
    return found


def _unequal(prefix: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns the settings that differ; of another class only that."""
    if one.get(TARGET) != other.get(TARGET):
        return [f"{prefix}{_short(one.get(TARGET))}, not {_short(other.get(TARGET))}"]
    keys = sorted(one.keys() | other.keys())
    found = []
    for key in keys:
        mine = one.get(key)
        theirs = other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += _unequal(f"{prefix}{key}.", mine, theirs)
        elif mine != theirs:
            found.append(f"{prefix}{key}={mine}, not {theirs}")
    return found


def _short(target: Any) -> str:
    return str(target).rpartition(".")[2]
