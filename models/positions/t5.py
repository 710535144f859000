"""T5's relative positions: a learned bias for each head and each bucket of distances.

Letters: B rows, T queries, S keys, H heads, N buckets.
"""

from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Rule, ScaledNormal
from models.layer import Layer
from models.positions.base import Position
from models.ranges import Many, Positive
from models.scores import Score, Tensors
from models.span import Span, to_device


class T5(Position):
    """Adds table[bucket(distance)] to logits; far distances share wider and wider buckets.

    Args:
        buckets: number of buckets; half of them are for single distances.
        max_distance: all distances from here on share the last bucket.
        bidirectional: half of the buckets are for later keys (attention without a causal mask);
            otherwise later keys count as distance 0.
        scale: factor of the dot products; null: 1 / sqrt(D). T5 itself has 1.0, with smaller
            initial weights.

    Every layer has a table of its own; T5 shares the first layer's. Source: Raffel et al. 2019
    (arXiv:1910.10683).
    """

    def __init__(
        self,
        buckets: Many = 32,
        max_distance: int = 128,
        *,
        bidirectional: bool = False,
        scale: Positive | None = None,
    ):
        directions = 2 if bidirectional else 1
        per_direction = buckets // directions
        if per_direction < 2 or buckets % directions:
            remedy = "an even number from 4 (both directions)" if bidirectional else "2 or more"
            raise ValueError(f"position.buckets={buckets} cannot be divided; use {remedy}")
        single = per_direction // 2
        if max_distance <= single:
            raise ValueError(
                f"position.max_distance={max_distance}, but {single} buckets hold single distances;"
                " use more than that"
            )
        self.buckets = buckets
        self.bidirectional = bidirectional
        self.scale = scale
        self.starts = edges(per_direction, max_distance)

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """The score, and a module that gives its one param [N, H]."""
        return T5Score(self.starts, self.bidirectional, self.scale), T5Table(self.buckets, heads)


def edges(buckets: int, max_distance: int) -> tuple[int, ...]:
    """The distance at which each bucket but the first begins.

    1, 2, ... and then growing by a constant factor up to `max_distance`. Whole numbers, because the
    logarithms of two devices may put a distance on different sides of an edge.
    """
    single = buckets // 2
    starts = list(range(1, single + 1))
    for index in range(1, buckets - single):
        edge = single * (max_distance / single) ** (index / (buckets - single))
        # an edge that is whole but for rounding must not move up by one
        starts.append(ceil(edge - 1e-9))
    return tuple(starts)


class T5Table(Layer):
    """Owns the biases [N, H]."""

    def __init__(self, buckets: int, heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(buckets, heads))

    def init_rules(self) -> dict[str, Rule]:
        """Biases start like projections."""
        return {"table": ScaledNormal()}

    def forward(self) -> tuple[Tensor, ...]:
        """(biases,)."""
        return (self.table,)


class T5Score(Score):
    """Params: biases [N, H], added to the scaled logits."""

    param_heads = (1,)
    plain = False

    def __init__(self, starts: tuple[int, ...], bidirectional: bool, scale: float | None):
        super().__init__(scale)
        self.starts = starts
        self.bidirectional = bidirectional
        self.two_sided = bidirectional
        self.one_sided = not bidirectional

    def bucket(self, span: Span, kv_span: Span) -> Tensor:
        """[B, T, S] int64: the bucket of each pair's distance."""
        distance = span.pos[:, :, None] - kv_span.pos[:, None, :]
        starts = to_device(self.starts, distance.device)
        if not self.bidirectional:
            return torch.bucketize(distance.clamp_min(0), starts, right=True)
        bucket = torch.bucketize(distance.abs(), starts, right=True)
        # later keys have the second half of the buckets
        return bucket + (distance < 0) * (len(self.starts) + 1)

    def logits(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        span: Span,
        kv_span: Span,
        heads: Tensor,
    ) -> Tensor:
        """[B, H, T, S]."""
        bias = F.embedding(self.bucket(span, kv_span), params[0])
        return super().logits(query, payload, (), span, kv_span, heads) + bias.permute(0, 3, 1, 2)
