"""Softmax attention in plain functions, every intermediate value by its name.

All other forms are tested against these:

    scores = attention_scores(q, k)               products of queries and keys
    scores = scaled_scores(scores, q.shape[-1])   variance 1 where q and k have it
    scores = masked_scores(scores, seen, bias)    minus infinity where a key is not seen
    weights = attention_weights(scores)           weights of a query sum to 1, or are all 0
    context = context_vector(weights, v)          weighted means of values

[T, S] matrices are built whole: for tests, small models and plots. Source: Vaswani et al. 2017
(arXiv:1706.03762).

Letters: B rows, T queries, S keys, H query heads, G key heads (they divide H), D key width, E value
width.
"""

import torch
from torch import Tensor

from models.kernels.reference import accumulation_dtype


def _repeat_heads(grouped: Tensor, heads: int) -> Tensor:
    """[B, S, G, ...] -> [B, S, H, ...]: query head h reads key head h // (H / G)."""
    key_heads = grouped.shape[2]
    if heads % key_heads:
        raise ValueError(
            f"{key_heads} key heads do not divide {heads} query heads; choose a divisor of {heads}"
        )
    return grouped.repeat_interleave(heads // key_heads, 2)


def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """Multiplies every query with every key: q [B, T, H, D], k [B, S, G, D] -> [B, H, T, S].

    The variance of a score is D where the entries of q and k are independent and of variance 1.
    """
    return torch.einsum("bthd,bshd->bhts", q, _repeat_heads(k, q.shape[2]))


def scaled_scores(scores: Tensor, width: int) -> Tensor:
    """Divides scores by sqrt(width), so that the softmax does not saturate in wide heads.

    Args:
        width: D.
    """
    return scores * width**-0.5


def masked_scores(scores: Tensor, seen: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Adds `bias` to scores and sets those of invisible keys to minus infinity.

    Args:
        scores: [B, H, T, S].
        seen: bool, broadcast to the scores; see models.masks.algebra.visible. None: everything is
            seen.
        bias: broadcast to the scores; None: nothing is added.

    The mask comes before the softmax: zeroing weights afterwards would leave each query's weights
    not summing to 1.
    """
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores


def attention_weights(scores: Tensor) -> Tensor:
    """Softmax over keys, [B, H, T, S] -> [B, H, T, S], in at least float32.

    A query that sees nothing gets zeros, not NaN.
    """
    scores = scores.to(accumulation_dtype(scores.dtype))
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    # filled before the softmax too: zeroing a NaN afterwards would leave NaN gradients
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


def attention_lse(scores: Tensor) -> Tensor:
    """Log of the sum of exp(scores), in nats: [B, H, T, S] -> [B, H, T].

    Minus infinity for a query that sees nothing. Two attentions over disjoint keys are merged with
    it (models.kernels.blockwise.merge_partials).
    """
    return scores.to(accumulation_dtype(scores.dtype)).logsumexp(-1)


def context_vector(weights: Tensor, v: Tensor) -> Tensor:
    """Weighted means of values, in the dtype of v.

    Args:
        weights: [B, H, T, S].
        v: [B, S, G, E].

    Returns:
        [B, T, H, E].
    """
    values = _repeat_heads(v, weights.shape[1]).to(weights.dtype)
    means = torch.einsum("bhts,bshe->bthe", weights, values)
    return means.to(v.dtype)
