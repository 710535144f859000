"""What the weights of each layer start from, in one line a layer for the log."""

import re
from collections.abc import Iterator, Mapping


def weight_lines(how: Mapping[str, str]) -> Iterator[str]:
    """Lines such as "weights: blocks.0-3: normal(0.02) mixer.q, mixer.k; 1 mixer_norm"; equal
    neighbours share one.

    Args:
        how: by full name of a parameter or buffer, what it starts from.
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
    """(layer, name in it): blocks.3.mixer.q.weight is mixer.q of blocks.3, embed.weight all of
    embed."""
    inside = re.match(r"(.*?\.\d+)\.(.+)", name)
    layer, rest = (
        (inside[1], inside[2])
        if inside
        else (name.partition(".")[0], name.partition(".")[2] or name)
    )
    return layer, rest.removesuffix(".weight") if rest != "weight" else "weight"


def _runs(texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """First and last of neighbours in a list of layers that say the same."""
    begun: list[str] = []
    for layer, text in texts.items():
        same_list = bool(begun) and layer.rpartition(".")[0] == begun[0].rpartition(".")[0] != ""
        if begun and not (same_list and texts[begun[0]] == text):
            yield begun[0], begun[-1]
            begun = []
        begun.append(layer)
    if begun:
        yield begun[0], begun[-1]
