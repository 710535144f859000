"""T5's relative positions: a learned bias for each head and each bucket of distances.

Letters: B rows, T queries, S keys, H heads, N buckets.
"""

from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Rule, ScaledNormal
from models.positions.base import Position
from models.ranges import Many, Positive
from models.scores import Score, Tensors
from models.span import Span


class T5(Position):
    """Logits gain table[bucket(distance)]; near distances have buckets of their own, far ones share
    wider and wider ones.

    Args:
        buckets: in all; half are for single distances.
        max_distance: all distances from here on share the last bucket.
        bidirectional: half of the buckets are for keys that come later (attention without a causal
            mask); else those count as 0.
        scale: what dot products are multiplied by; null: 1 / sqrt(D). T5 itself has 1.0, with
            smaller initial weights.

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
        each = buckets // 2 if bidirectional else buckets
        if each < 2 or buckets % (2 if bidirectional else 1):
            kind = "an even number from 4 (both ways)" if bidirectional else "2 or more"
            raise ValueError(f"position.buckets={buckets} cannot be shared out; use {kind}")
        if max_distance <= each // 2:
            raise ValueError(
                f"position.max_distance={max_distance}, but {each // 2} buckets hold single"
                " distances; use more than that"
            )
        self.buckets = buckets
        self.bidirectional = bidirectional
        self.scale = scale
        self.starts = edges(each, max_distance)

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """The score, and a module that gives its one param [N, H]."""
        return T5Score(self.starts, self.bidirectional, self.scale), T5Table(self.buckets, heads)


def edges(buckets: int, reach: int) -> tuple[int, ...]:
    """The distance at which each bucket but the first begins: 1, 2, ... and then growing by a
    constant factor up to reach.

    Whole numbers, so that no device's logarithm decides on which side of an edge a distance falls.
    """
    single = buckets // 2
    grown = (
        single * (reach / single) ** (i / (buckets - single)) for i in range(1, buckets - single)
    )
    return (*range(1, single + 1), *(ceil(edge - 1e-9) for edge in grown))


class T5Table(nn.Module):
    """Owns the biases [N, H]."""

    def __init__(self, buckets: int, heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(buckets, heads))

    def initial(self) -> dict[str, Rule]:
        return {"table": ScaledNormal()}

    def forward(self) -> tuple[Tensor, ...]:
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
        """[B, T, S] int64."""
        apart = span.pos[:, :, None] - kv_span.pos[:, None, :]
        starts = torch.tensor(self.starts, device=apart.device)
        if not self.bidirectional:
            return torch.bucketize(apart.clamp_min(0), starts, right=True)
        return torch.bucketize(apart.abs(), starts, right=True) + (apart < 0) * (
            len(self.starts) + 1
        )

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
