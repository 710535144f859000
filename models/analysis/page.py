"""One HTML page of attention maps and states: heads as heat maps, tokens and lines on hover, no
network.

Texts of tokens come from data: they reach the page as JSON without a "<", and the script writes
them with textContent alone, so that no text becomes markup.
"""

import base64
import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from models.analysis.attention_maps import AttentionMap, MapStreams
from models.analysis.heads import entropy, head_scores
from models.analysis.page_script import SCRIPT, STYLE
from models.analysis.rollout import rollout, weighted_by_values
from models.analysis.state_maps import StateMap

NOTE = (
    "A weight says where a head looks, not why the model answers: a key with a small value may hold"
    " a large weight, which is why weights times the norms of values stand beside them, and later"
    " layers may undo what a head brings. Weights are shown in steps of 1/255."
)
STATES_NOTE = (
    "A recurrent layer has no weights but a state. Its output is a sum over the values of earlier"
    " tokens, whose factors are shown as reads: their sizes, as shares of a row, because factors"
    " may be negative. Kept is the share of the state that is left before a token writes (mean over"
    " its channels), written the size of what the token writes, corrected the size of what it takes"
    " away along its key; the half-life is that of the mean decay, in tokens."
)
READS = "reads of the state"


def attention_page(
    title: str,
    maps: Sequence[AttentionMap],
    texts: Sequence[str],
    without: Sequence[str] = (),
    source: Sequence[str] = (),
    states: Sequence[StateMap] = (),
) -> str:
    """Returns the page of the maps of one row.

    Args:
        title: of the page.
        maps: in the order of the layers.
        texts: of the tokens of the row, without padding, in the order of the maps' queries.
        without: layers that mix tokens and have neither a map of weights nor a state to show.
        source: texts of the tokens of the row's source, likewise.
        states: of the same row, in the order of the layers.
    """
    data: dict[str, Any] = {"tokens": list(texts), "source": list(source), "layers": []}
    without = list(without)
    by_streams: dict[MapStreams, list[AttentionMap]] = {"row": [], "source": [], "alignment": []}
    for attention in maps:
        queries = source if attention.streams == "source" else texts
        # A softmax over summaries, or one that is called again, has other queries than the row.
        if attention.weight.shape[1] == len(queries):
            by_streams[attention.streams].append(attention)
        else:
            without.append(attention.name)
    flows: dict[str, Tensor] = {}
    for streams in ("row", "source"):
        whole = by_streams[streams]
        for attention, flow in zip(whole, rollout(whole), strict=True):
            flows[attention.name] = flow
    for attention in maps:
        if attention.name not in without:
            queries = source if attention.streams == "source" else texts
            data["layers"].append(_layer(attention, flows.get(attention.name), queries))
    for state in states:
        if state.reads.shape[1] == len(texts):
            data["layers"].append(_state(state, texts))
        else:
            without.append(state.name)
    # Inside <script> only "<" could end the script or open a comment.
    safe = json.dumps(data).replace("<", "\\u003c")
    safe = safe.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    about_states = f"<p>{escape(STATES_NOTE)}</p>" if states else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{escape(NOTE)}</p>\n{about_states}\n{_without(without)}\n"
        '<p><label>layer <select id="layer"></select></label> '
        '<label>show <select id="mode"></select></label></p>\n'
        '<div id="heads"></div>\n<div id="detail"></div>\n'
        '<h2>Heads by pattern</h2>\n<div class="wide" id="patterns"></div>\n'
        f'<script type="application/json" id="data">{safe}</script>\n'
        f"<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _without(names: Sequence[str]) -> str:
    """Returns the paragraph about layers that have no map; nothing where there are none."""
    if not names:
        return ""
    listed = ", ".join(escape(name) for name in names)
    return f"<p>These layers have no weights of the row's tokens, and so no map: {listed}.</p>"


def _layer(attention: AttentionMap, flow: Tensor | None, queries: Sequence[str]) -> dict[str, Any]:
    """Returns the data of one softmax: its maps in each mode, and the scores of its heads."""
    modes = {"weights": attention.weight}
    if attention.value_norm is not None:
        modes["weights x value norms"] = weighted_by_values(attention)
    heads = []
    for head, figures in enumerate(_figures(attention, queries)):
        shown = {mode: _packed(weight[head]) for mode, weight in modes.items()}
        heads.append({"maps": shown, **figures})
    return {
        "name": attention.name,
        "down": "source" if attention.streams == "source" else "tokens",
        "right": "tokens" if attention.streams == "row" else "source",
        "queries": attention.weight.shape[1],
        "keys": attention.weight.shape[2],
        "hidden": attention.heads - len(attention.weight),
        "rollout": None if flow is None else _packed(flow),
        "heads": heads,
    }


def _state(state: StateMap, texts: Sequence[str]) -> dict[str, Any]:
    """Returns the data of one recurrent layer: what its heads read, and their state by token."""
    shares = state.shares()
    layer = _layer(shares, None, texts)
    for head, shown in enumerate(layer["heads"]):
        shown["maps"] = {READS: shown["maps"]["weights"]}
        kept = state.kept[head].double()
        # The mean of the logarithms, because decays multiply.
        rate = -float(kept.clamp_min(1e-12).log().mean())
        shown["half_life"] = math.log(2) / rate if rate > 0 else None
        tracks = {"kept": _rounded(kept), "written": _rounded(state.written[head])}
        if state.corrected is not None:
            tracks["corrected"] = _rounded(state.corrected[head])
        shown["tracks"] = tracks
    return layer


def _rounded(figures: Tensor) -> list[float]:
    return [round(value, 4) for value in figures.tolist()]


def _figures(attention: AttentionMap, queries: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the scores of every head; patterns of one row mean nothing between two."""
    figures: list[dict[str, Any]] = []
    if attention.streams == "alignment":
        for head, weight in enumerate(attention.weight):
            figures.append(
                {"head": head, "pattern": "alignment", "entropy": float(entropy(weight))}
            )
        return figures
    numbers = {text: number for number, text in enumerate(dict.fromkeys(queries))}
    for score in head_scores(attention, [numbers[text] for text in queries]):
        own = score._asdict()
        del own["layer"]
        figures.append(own)
    return figures


def _packed(weight: Tensor) -> str:
    """Returns weights from 0 to 1 as bytes in base64, row after row."""
    steps = (weight.double().clamp(0, 1) * 255).round().to(torch.uint8)
    return base64.b64encode(steps.numpy().tobytes()).decode()
