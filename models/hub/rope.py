"""Rotary positions as a config.json gives them, and back.

Since transformers 5 they are one entry, rope_parameters; before, rope_theta and rope_scaling.
"""

from collections.abc import Mapping
from math import log
from typing import Any

from models.hub.keys import MISSING, Keys

HOME = "models.positions."
TARGET = "_target_"


def rope_entry(keys: Keys) -> dict[str, Any]:
    """Returns the rotary settings of a config.json in the newer form."""
    scaling = keys.take("rope_scaling", None) or {}
    theta = keys.take("rope_theta", None)
    newer = keys.take("rope_parameters", None)
    entry = dict(newer) if newer else dict(scaling)
    if "type" in entry:
        entry.setdefault("rope_type", entry.pop("type"))
    if theta is not None:
        entry.setdefault("rope_theta", theta)
    share = keys.take("partial_rotary_factor", None)
    if share is not None:
        entry.setdefault("partial_rotary_factor", share)
    return entry


def position_of(entry: Mapping[str, Any], keys: Keys, theta: float = 10_000.0) -> dict[str, Any]:
    """Returns the node of our position.

    Args:
        entry: rotary settings, in the newer form.
        keys: of the whole config.json.
        theta: where the entry gives none.

    Raises:
        ValueError: a kind or a key that is not offered.
    """
    inner = Keys(entry)
    kind = inner.take("rope_type", "default")
    base = {"theta": inner.real("rope_theta", theta)}
    share = inner.take("partial_rotary_factor", 1.0)
    if kind != "default" and share != 1.0:
        raise ValueError(
            f"config.json has partial_rotary_factor={share} with rope_type={kind}, which is not"
            " offered together"
        )
    if kind not in _KINDS:
        raise ValueError(
            f"config.json has rope_type={kind!r}, which is not offered; known: {', '.join(_KINDS)}"
        )
    node = _KINDS[kind](inner, keys, base)
    if share != 1.0:
        node["rotated_share"] = share
    try:
        inner.finish()
    except ValueError as error:
        raise ValueError(f"in rope_parameters: {error}") from error
    return node


def _default(inner: Keys, keys: Keys, base: dict[str, Any]) -> dict[str, Any]:
    # Some files leave these beside a kind that does not read them.
    inner.take("factor", None)
    inner.take("original_max_position_embeddings", None)
    return {TARGET: f"{HOME}rope.Rope", **base}


def _linear(inner: Keys, keys: Keys, base: dict[str, Any]) -> dict[str, Any]:
    return {TARGET: f"{HOME}interpolated.Interpolated", "factor": inner.real("factor"), **base}


def _dynamic(inner: Keys, keys: Keys, base: dict[str, Any]) -> dict[str, Any]:
    inner.take("original_max_position_embeddings", None)
    return {
        TARGET: f"{HOME}ntk.Ntk",
        "factor": inner.real("factor"),
        "original_length": keys.size("max_position_embeddings"),
        **base,
    }


def _yarn(inner: Keys, keys: Keys, base: dict[str, Any]) -> dict[str, Any]:
    original = inner.take("original_max_position_embeddings", None)
    longest = keys.size("max_position_embeddings")
    factor = inner.take("factor", None)
    if original is None:
        original = longest
    if factor is None:
        factor = longest / original
    node = {
        TARGET: f"{HOME}yarn.Yarn",
        "factor": float(factor),
        "original_length": int(original),
        **base,
        "beta_fast": float(inner.take("beta_fast", None) or 32),
        "beta_slow": float(inner.take("beta_slow", None) or 1),
    }
    node["attention_factor"] = _yarn_attention_factor(inner, float(factor))
    if not inner.flag("truncate", True):
        node["truncate"] = False
    return node


def _yarn_attention_factor(inner: Keys, factor: float) -> float | None:
    """Returns what queries and keys are multiplied by; None for the usual 0.1 ln(factor) + 1."""
    given = inner.take("attention_factor", None)
    mscale = inner.take("mscale", None)
    mscale_all = inner.take("mscale_all_dim", None)
    if given is not None:
        return float(given)
    if mscale and mscale_all:
        return magnitude(factor, mscale) / magnitude(factor, mscale_all)
    return None


def magnitude(factor: float, mscale: float) -> float:
    """Returns by how much YaRN multiplies for a length that is `factor` times as long."""
    return 0.1 * mscale * log(factor) + 1 if factor > 1 else 1.0


def _llama3(inner: Keys, keys: Keys, base: dict[str, Any]) -> dict[str, Any]:
    return {
        TARGET: f"{HOME}llama3.Llama3",
        "factor": inner.real("factor"),
        "original_length": inner.size("original_max_position_embeddings"),
        **base,
        "low_freq_factor": inner.real("low_freq_factor"),
        "high_freq_factor": inner.real("high_freq_factor"),
    }


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}


def rope_parameters(node: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rope_parameters of a config.json from the node of one of our positions.

    Args:
        node: with the defaults of its class filled in.

    Raises:
        ValueError: transformers has no such rotary positions.
    """
    kind = str(node[TARGET]).removeprefix(HOME)
    base = {"rope_theta": node.get("theta", MISSING)}
    if kind == "rope.Rope":
        share = node["rotated_share"]
        partial = {} if share == 1 else {"partial_rotary_factor": share}
        return {"rope_type": "default", **base, **partial}
    if kind == "interpolated.Interpolated":
        return {"rope_type": "linear", **base, "factor": node["factor"]}
    if kind == "ntk.Ntk" and node["original_length"] is not None:
        return {"rope_type": "dynamic", **base, "factor": node["factor"]}
    if kind == "llama3.Llama3":
        return {
            "rope_type": "llama3",
            **base,
            "factor": node["factor"],
            "original_max_position_embeddings": node["original_length"],
            "low_freq_factor": node["low_freq_factor"],
            "high_freq_factor": node["high_freq_factor"],
        }
    if kind == "yarn.Yarn":
        entry = {
            "rope_type": "yarn",
            **base,
            "factor": node["factor"],
            "original_max_position_embeddings": node["original_length"],
            "beta_fast": node["beta_fast"],
            "beta_slow": node["beta_slow"],
        }
        if node["attention_factor"] is not None:
            entry["attention_factor"] = node["attention_factor"]
        if not node["truncate"]:
            entry["truncate"] = False
        return entry
    raise ValueError(f"position._target_={node[TARGET]}: transformers has no such positions")
