"""Terms of a score: what the kernels do to a scaled product before the softmax.

Letters: H heads, N distances, K buckets.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.positions.alibi import AlibiScore
from models.positions.t5 import T5Score
from models.scores import Score, SharedValueScore, SinkScore, SoftcapScore, Tensors, WrappedScore
from models.span import Span, to_device

PASSED = SinkScore, SharedValueScore
NO_BIAS, SLOPES, DISTANCES = 0, 1, 2  # what is added


class Terms(NamedTuple):
    """Numbers that are added to the scaled product, and what the sum is bent by.

    Attributes:
        bias: NO_BIAS, SLOPES (times the distance, subtracted) or DISTANCES (a number for each).
        cap: bound of the logits; 0 = none.
        source: the score that adds; DISTANCES are read from its first param.
    """

    bias: int
    cap: float
    source: Score


def translate_score(score: Score) -> Terms | None:
    """Returns what a score does; None where it does more than the kernels can.

    A sink is added to the whole row afterwards, and shared values are repeated by the score's
    operands: neither concerns a pair.
    """
    cap = 0.0
    while True:
        # The exact class: one derived from it may do something else.
        if type(score) is SoftcapScore and not cap:
            cap = score.cap
            score = score.inner
        elif isinstance(score, WrappedScore) and type(score) in PASSED:
            score = score.inner
        else:
            break
    if type(score) is AlibiScore:
        return Terms(SLOPES, cap, score)
    if type(score) is T5Score:
        return Terms(DISTANCES, cap, score)
    own = type(score)
    if own.logits is Score.logits and own.bias is Score.bias:
        return Terms(NO_BIAS, cap, score)
    return None


def is_heavy(bias: int, capped: bool) -> bool:
    """Tells whether a block keeps more numbers alive than slopes need."""
    return bias == DISTANCES or capped


class BiasValues(NamedTuple):
    """The numbers of a bias for the heads at hand.

    Attributes:
        values: [H] slopes or [H, N] float32, of the distances from `nearest` on; all smaller ones
            share the first, all larger ones the last.
        nearest: the distance pos_q - pos_k of the first.
    """

    values: Tensor
    nearest: int = 0


def bias_numbers(terms: Terms, params: Tensors, heads: Tensor) -> BiasValues:
    """Returns the numbers that a kernel adds; one zero where it adds none."""
    score = terms.source
    if isinstance(score, AlibiScore):
        return BiasValues(_on_device(tuple(score.slopes), heads.device)[heads])
    if isinstance(score, T5Score):
        nearest, bucket = distance_buckets(score, heads.device)
        table = params[0].float()
        return BiasValues(table[bucket].transpose(0, 1).contiguous(), nearest)
    return BiasValues(torch.zeros(1, device=heads.device))


def distance_buckets(score: T5Score, device: torch.device) -> tuple[int, Tensor]:
    """Returns (the nearest distance, the bucket of it and of all up to the furthest [N] int64)."""
    furthest = score.starts[-1]
    nearest = -furthest if score.bidirectional else 0
    return nearest, _buckets(score.starts, score.bidirectional, device)


@lru_cache(maxsize=64)
def _buckets(starts: tuple[int, ...], bidirectional: bool, device: torch.device) -> Tensor:
    furthest = starts[-1]
    nearest = -furthest if bidirectional else 0
    distances = torch.arange(nearest, furthest + 1, device=device)
    zero = torch.zeros_like(distances[:1])
    query = Span.of(distances[:, None], torch.zeros_like(distances)[:, None])
    key = Span.of(zero.expand(len(distances))[:, None], torch.zeros_like(distances)[:, None])
    return T5Score(starts, bidirectional, None).bucket(query, key).flatten()


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    return to_device(values, device)


def add_table_gradient(terms: Terms, gradient: Tensor, into: Sequence[Tensor]) -> None:
    """Adds the gradient of the distances [H, N] to that of the buckets [K, H]."""
    score = terms.source
    assert isinstance(score, T5Score)
    _, bucket = distance_buckets(score, gradient.device)
    total = into[0]
    total.index_add_(0, bucket, gradient.transpose(0, 1).to(total.dtype))
