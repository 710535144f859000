"""Measures of the heads of an attention map: patterns, entropy, and the share of the sink.

Letters: H heads, T queries, S keys; the first T keys are the tokens of the row itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.analysis.attention_maps import AttentionMap

PATTERNS = ("previous_token", "duplicate", "induction", "sink")
CLEAR = 0.4  # share of the weight from which on a head is named after a pattern


class HeadScores(NamedTuple):
    """Means over the queries of one head; shares of its weight unless said otherwise.

    Attributes:
        layer: name of the softmax.
        head: number of the head.
        previous_token: on the token just before.
        duplicate: on earlier tokens that equal the query's own.
        induction: on tokens just after an earlier token that equals the query's own; on repeated
            random tokens this is the prefix-matching score.
        sink: on the first token of the document, and on a learned sink.
        entropy: of the weights, in nats.
        pattern: the largest of the four shares where it is clear, else "other".
    """

    layer: str
    head: int
    previous_token: float
    duplicate: float
    induction: float
    sink: float
    entropy: float
    pattern: str


def head_scores(attention: AttentionMap, tokens: Sequence[int]) -> list[HeadScores]:
    """Returns the scores of every head that the map holds.

    A query counts for a pattern where a key of that pattern exists.

    Args:
        attention: of one row.
        tokens: [T] of the row, without padding, in the order of the map's queries.

    Raises:
        ValueError: the map has other tokens than these.

    Source: prefix matching and previous token of Olsson et al. 2022 (arXiv:2209.11895), on any
    text; sinks of Xiao et al. 2023 (arXiv:2309.17453).
    """
    row = attention.weight[:, :, : len(tokens)].double()
    if row.shape[1:] != (len(tokens), len(tokens)):
        raise ValueError(f"a map of {tuple(row.shape[1:])} is none of {len(tokens)} tokens")
    pos = attention.span.pos[0]
    doc = attention.span.doc[0]
    token = torch.tensor(list(tokens))
    same_document = (doc[:, None] == doc[None, :]) & (pos[None, :] <= pos[:, None])
    equal = token[:, None] == token[None, :]
    follows_equal = torch.zeros_like(equal)
    follows_equal[:, 1:] = equal[:, :-1] & (pos[None, :-1] < pos[:, None]) & (pos[None, 1:] > 0)
    patterns = {
        "previous_token": pos[None, :] == pos[:, None] - 1,
        "duplicate": equal & (pos[None, :] < pos[:, None]),
        "induction": follows_equal,
        "sink": (pos[None, :] == 0) & (pos[:, None] > 0),
    }
    shares = {name: _share(row, keys & same_document) for name, keys in patterns.items()}
    # What a learned sink takes is missing from the sum of a row of weights.
    shares["sink"] = shares["sink"] + _learned_sink(attention.weight.double())
    spread = entropy(attention.weight)
    scores = []
    for head in range(len(row)):
        own = {name: float(share[head]) for name, share in shares.items()}
        best = max(own, key=lambda name: own[name])
        pattern = best if own[best] >= CLEAR else "other"
        scores.append(
            HeadScores(attention.name, head, **own, entropy=float(spread[head]), pattern=pattern)
        )
    return scores


def entropy(weight: Tensor) -> Tensor:
    """[..., T, S] -> [...]: the entropy of weights in nats, averaged over queries."""
    wide = weight.double()
    return -torch.xlogy(wide, wide).sum(-1).mean(-1)


def _share(weight: Tensor, keys: Tensor) -> Tensor:
    """Returns [H]: the weight on some keys [T, S], averaged over queries that have such a key."""
    has_key = keys.any(1)
    if not has_key.any():
        return torch.zeros(len(weight), dtype=torch.float64)
    return (weight * keys).sum(-1)[:, has_key].mean(-1)


def _learned_sink(weight: Tensor) -> Tensor:
    """Returns [H]: the share that goes to no key, averaged over queries that see something."""
    total = weight.sum(-1)
    sees = total > 0
    missing = torch.where(sees, 1 - total, 0.0).sum(-1)
    # Rounding must not look like a sink.
    return torch.where(missing > 1e-6, missing / sees.sum(-1).clamp_min(1), 0.0)
