"""Softmax attention spelled out: every intermediate value by its name, in plain functions. What all
else is tested against.

    scores = attention_scores(q, k)           products of queries and keys
    scores = scaled(scores, q.shape[-1])      of variance 1 where q and k have it
    scores = masked(scores, seen, bias)       minus infinity where a key is not seen
    weights = attention_weights(scores)       each query's weights sum to 1, or are all 0 where it sees nothing
    context = context_vector(weights, v)      weighted means of values

[T, S] matrices are built whole: for tests, small models and pictures. Source: Vaswani et al. 2017
(arXiv:1706.03762).

Letters: B rows, T queries, S keys, H query heads, G key heads (they divide H), D key width, E value
width.
"""

import torch
from torch import Tensor

from models.kernels.reference import accumulation_dtype


def _shared(x: Tensor, heads: int) -> Tensor:
    """[B, S, G, ...] -> [B, S, H, ...]: query head h reads key head h // (H / G)."""
    if heads % x.shape[2]:
        raise ValueError(
            f"{x.shape[2]} key heads do not divide {heads} query heads; choose a divisor of {heads}"
        )
    return x.repeat_interleave(heads // x.shape[2], 2)


def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """How well every query matches every key: q [B, T, H, D], k [B, S, G, D] -> [B, H, T, S].

    The variance of a score is D where the entries of q and k are independent and of variance 1.
    """
    return torch.einsum("bthd,bshd->bhts", q, _shared(k, q.shape[2]))


def scaled_scores(scores: Tensor, width: int) -> Tensor:
    """Scores over sqrt(width), so that the softmax does not saturate as heads grow wider; width is
    D."""
    return scores * width**-0.5


def masked_scores(scores: Tensor, seen: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Scores with `bias` added and minus infinity at keys that a query may not see.

    Args:
        scores: [B, H, T, S].
        seen: bool, broadcast to the scores; see models.masks.algebra.visible. None: everything is
            seen.
        bias: broadcast to the scores; None: nothing is added.

    The mask comes before the softmax: zeroing weights afterwards would leave each query's weights
    not summing to 1.
    """
    scores = scores if bias is None else scores + bias
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def attention_weights(scores: Tensor) -> Tensor:
    """Softmax over keys, [B, H, T, S] -> [B, H, T, S], in float32 at least; a query that sees
    nothing gets zeros, not NaN."""
    scores = scores.to(accumulation_dtype(scores.dtype))
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


def attention_lse(scores: Tensor) -> Tensor:
    """[B, H, T, S] -> [B, H, T]: log of the sum of exp(scores), in nats; minus infinity for a query
    that sees nothing.

    Two attentions over disjoint keys merge by it (models.kernels.blockwise.merge_partials).
    """
    return scores.to(accumulation_dtype(scores.dtype)).logsumexp(-1)


def context_vector(weights: Tensor, v: Tensor) -> Tensor:
    """Weighted means of values: weights [B, H, T, S], v [B, S, G, E] -> [B, T, H, E], in the dtype
    of v."""
    return torch.einsum(
        "bhts,bshe->bthe", weights, _shared(v, weights.shape[1]).to(weights.dtype)
    ).to(v.dtype)
