"""The attention blocks of sets: SAB, ISAB and PMA, on tokens whose documents are the sets.

No block has positions: tokens of a set in another order give the same outputs in that order.

Letters: B rows, T tokens, D sets of a row, M points of a set, N = D M.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.init import Rule, normal
from models.layer import Layer
from models.primitives.pooled_attention import (
    SAME_DOCUMENT,
    PointAttention,
    Points,
    PooledAttention,
)
from models.primitives.softmax import Softmax
from models.ranges import Few
from models.scores import Score
from models.span import Span

LogitScale = Literal["head", "width"]


class MultiheadAttentionBlock(Layer):
    """MAB(X, Y) = LN(H + rFF(H)), H = LN(X + Multihead(X, Y, Y)), rFF(H) = relu(W H + b).

    Args:
        width: channels of X and Y.
        heads: they divide width.
        attention: the class of the primitive through which X reads Y: Softmax, PooledAttention or
            PointAttention.
        norm: whether there are the two layer norms.
        logit_scale: what logits are divided by the root of: the width of a head (Vaswani et al.
            2017, arXiv:1706.03762) or of all channels (equation 2 of the paper, and its code).

    Source: Lee et al. 2019 (arXiv:1810.00825), equations 6 and 7. The residual is X itself; their
    code adds the projected X.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        attention: type[Softmax] | type[PooledAttention] | type[PointAttention],
        *,
        norm: bool = True,
        logit_scale: LogitScale = "head",
    ):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"model.width={width} does not divide among model.heads={heads}; choose a multiple"
                f" of {heads}"
            )
        self.head_width = width // heads
        self.q = nn.Linear(width, width)
        # A bias of keys would add the same to all logits of a query, and move no softmax.
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.feedforward = nn.Linear(width, width)
        score = Score(width**-0.5) if logit_scale == "width" else Score()
        if issubclass(attention, Softmax):
            self.attention = attention(SAME_DOCUMENT, score)
        else:
            self.attention = attention(score)
        self.norm_attention = nn.LayerNorm(width) if norm else nn.Identity()
        self.norm_feedforward = nn.LayerNorm(width) if norm else nn.Identity()

    def init_rules(self) -> dict[str, Rule]:
        """Starts matrices at variance 1 / width: blocks with norms behind them learn from there."""
        names = ("q", "k", "v", "out", "feedforward")
        return {f"{name}.weight": normal(self.q.in_features**-0.5) for name in names}

    def forward(self, x: Tensor, y: Tensor, *, span: Span, kv_span: Span) -> Tensor:
        """x [B, T, width] addressed by `span`, y [B, S, width] by `kv_span` -> [B, T, width]."""
        query = self.q(x).unflatten(-1, (-1, self.head_width))
        key = self.k(y).unflatten(-1, (-1, self.head_width))
        value = self.v(y).unflatten(-1, (-1, self.head_width))
        mean = self.attention((query,), (key, value), span=span, kv_span=kv_span)
        hidden = self.norm_attention(x + self.out(mean.flatten(-2)))
        return self.norm_feedforward(hidden + self.feedforward(hidden).relu())


class SetAttentionBlock(Layer):
    """SAB(X) = MAB(X, X): every element reads every element of its set.

    Args:
        width, heads: see MultiheadAttentionBlock.
        settings: `norm` and `logit_scale`, likewise.
    """

    def __init__(self, width: int, heads: int, **settings: Any):
        super().__init__()
        self.block = MultiheadAttentionBlock(width, heads, Softmax, **settings)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.block(x, x, span=span, kv_span=span)


class InducedSetAttentionBlock(Layer):
    """ISAB(X) = MAB(X, MAB(I, X)): elements read M learned points, which read all elements.

    The cost is linear in the elements. Over ranks the points are one merged partial result.

    Args:
        width, heads: see MultiheadAttentionBlock.
        points: M.
        settings: `norm` and `logit_scale`, likewise.
    """

    def __init__(self, width: int, heads: int, points: Few, **settings: Any):
        super().__init__()
        if points < 1:
            raise ValueError(f"model.points={points}: a set needs points to read; use 1 or more")
        self.points = nn.Parameter(torch.empty(points, width))
        self.inward = MultiheadAttentionBlock(width, heads, PooledAttention, **settings)
        self.outward = MultiheadAttentionBlock(width, heads, PointAttention, **settings)

    def init_rules(self) -> dict[str, Rule]:
        """Starts points at unit variance: points that start alike stay alike."""
        return {"points": normal(1.0)}

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        points = points_at(self.inward, span, len(self.points))
        hidden = self.inward(points.copies(self.points), x, span=points.span, kv_span=span)
        return self.outward(x, hidden, span=span, kv_span=points.span)


class PoolingByMultiheadAttention(Layer):
    """PMA(Z) = MAB(S, rFF(Z)): M learned seeds read all elements of a set.

    Args:
        width, heads: see MultiheadAttentionBlock.
        seeds: M.
        settings: `norm` and `logit_scale`, likewise.
    """

    def __init__(self, width: int, heads: int, seeds: Few, **settings: Any):
        super().__init__()
        if seeds < 1:
            raise ValueError(f"model.seeds={seeds}: a set is pooled by seeds; use 1 or more")
        self.feedforward = nn.Linear(width, width)
        self.seeds = nn.Parameter(torch.empty(seeds, width))
        self.block = MultiheadAttentionBlock(width, heads, PooledAttention, **settings)

    def init_rules(self) -> dict[str, Rule]:
        """Starts seeds at unit variance, as points."""
        deviation = self.feedforward.in_features**-0.5
        return {"seeds": normal(1.0), "feedforward.weight": normal(deviation)}

    def forward(self, x: Tensor, span: Span) -> tuple[Tensor, Points]:
        """[B, T, width] -> ([B, N, width], the addresses of the seeds)."""
        points = points_at(self.block, span, len(self.seeds))
        seeds = points.copies(self.seeds)
        hidden = self.feedforward(x).relu()
        return self.block(seeds, hidden, span=points.span, kv_span=span), points


class SeedAttentionBlock(Layer):
    """SAB over the seeds that PMA returned, which lie on every rank.

    Args:
        width, heads: see MultiheadAttentionBlock.
        settings: `norm` and `logit_scale`, likewise.
    """

    def __init__(self, width: int, heads: int, **settings: Any):
        super().__init__()
        self.block = MultiheadAttentionBlock(width, heads, PointAttention, **settings)

    def forward(self, x: Tensor, points: Points) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        return self.block(x, x, span=points.span, kv_span=points.span)


def points_at(block: MultiheadAttentionBlock, span: Span, count: int) -> Points:
    """Returns the points of the rows for a block that pools, computed once for all layers."""
    pool = block.attention
    assert isinstance(pool, PooledAttention), "the block pools"
    return span.cache.get(("points", count), lambda: pool.points(span, count))
