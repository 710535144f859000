"""Describes the initial weights of a model for the log, one line for each layer."""

import re
from collections.abc import Iterator, Mapping


def weight_lines(how: Mapping[str, str]) -> Iterator[str]:
    """Yields lines such as "weights: blocks.0-3: normal(0.02) mixer.q, mixer.k; 1 mixer_norm".

    Neighbouring layers that start alike share a line.

    Args:
        how: the description of the start of each parameter and buffer, by its full name.
    """
    layers: dict[str, dict[str, list[str]]] = {}
    for name, text in how.items():
        layer, rest = _split(name)
        layers.setdefault(layer, {}).setdefault(text, []).append(rest)
    texts = {
        layer: "; ".join(f"{text} {', '.join(names)}" for text, names in found.items())
        for layer, found in layers.items()
    }
    for first, last in _runs(texts):
        span = first if first == last else f"{first}-{last.rpartition('.')[2]}"
        yield f"weights: {span}: {texts[first]}"


def _split(name: str) -> tuple[str, str]:
    """Splits a full name: blocks.3.mixer.q.weight is mixer.q of the layer blocks.3."""
    inside = re.match(r"(.*?\.\d+)\.(.+)", name)
    layer, rest = (
        (inside[1], inside[2])
        if inside
        else (name.partition(".")[0], name.partition(".")[2] or name)
    )
    return layer, rest.removesuffix(".weight") if rest != "weight" else "weight"


def _runs(texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields the first and the last layer of every run of neighbours with the same text."""
    begun: list[str] = []
    for layer, text in texts.items():
        same_list = bool(begun) and layer.rpartition(".")[0] == begun[0].rpartition(".")[0] != ""
        if begun and not (same_list and texts[begun[0]] == text):
            yield begun[0], begun[-1]
            begun = []
        begun.append(layer)
    if begun:
        yield begun[0], begun[-1]
