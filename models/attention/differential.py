"""Differential attention: the difference of two softmaxes, so that what both see everywhere cancels
as noise.

Letters: B rows, T queries, S keys, G pairs of key heads, r pairs of query heads that share one, D
head width.
"""

from math import exp

import torch
from torch import Tensor, nn

from models.attention.base import SplitAttention
from models.attention.full import CAUSAL
from models.init import Rule, constant, normal
from models.positions.base import Position
from models.primitives.softmax import Softmax
from models.scores import SharedValueScore
from models.span import Span

LAMBDAS = "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"


class Differential(SplitAttention):
    """(softmax(q1 k1) - lambda softmax(q2 k2)) v, then each pair's RMS norm times 1 - lambda_init.

    Args:
        heads: softmaxes; two make a pair, so they are even. With equal heads this has as many
            weights as full attention.
        kv_heads: key heads, two to a pair; a pair shares one head of values, twice as wide as its
            keys.
        layer: number of the layer, from 0; lambda starts at 0.8 - 0.6 exp(-0.3 layer).

    The leaf computes every softmax as a head of its own and the pairs are subtracted afterwards, so
    any driver that deals heads out may part a pair. Heads lie in order (G, 2, r): query head h then
    reads key head h // r and value head h // 2r. Both maps of a pair share one position bias.

    Source: Ye et al. 2024 (arXiv:2410.05258).
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position, layer: int):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"model.width={width} does not divide among model.heads={heads}; choose a multiple"
                f" of {heads}"
            )
        if heads % 2 or kv_heads % 2:
            raise ValueError(
                f"differential attention pairs its heads, but model.heads={heads} and"
                f" model.kv_heads={kv_heads}; use even numbers of both"
            )
        if heads % kv_heads:
            raise ValueError(
                f"model.kv_heads={kv_heads} does not divide model.heads={heads}; choose an even"
                " divisor"
            )
        self.groups = kv_heads // 2
        self.share = heads // kv_heads
        self.head_width = width // heads
        self.position = position
        self.start = 0.8 - 0.6 * exp(-0.3 * layer)
        self.q = nn.Linear(width, heads * self.head_width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        for name in LAMBDAS:
            self.register_parameter(name, nn.Parameter(torch.zeros(self.head_width)))
        self.norm = nn.RMSNorm(2 * self.head_width, eps=1e-5)
        score, self.tables = position.score(heads // 2, self.head_width)
        self.counted = score.param_heads  # of each table, the dim that counts pairs
        self.mix = Softmax(CAUSAL, SharedValueScore(score))

    def initial(self) -> dict[str, Rule]:
        """Lambda's vectors start near zero, so that lambda starts near lambda_init."""
        return {**{name: normal(0.1) for name in LAMBDAS}, "norm.weight": constant(1.0)}

    def pairs(self, device: torch.device) -> Tensor:
        """[heads] int64: the pair that each softmax belongs to."""
        pairs = torch.arange(self.groups * self.share, device=device).view(
            self.groups, 1, self.share
        )
        return pairs.expand(self.groups, 2, self.share).flatten()

    def weight(self) -> Tensor:
        """Lambda, of at least float32: how much of the second softmax is taken away."""
        q1, k1, q2, k2 = (getattr(self, name) for name in LAMBDAS)
        wide = torch.promote_types(q1.dtype, torch.float32)
        return (
            (q1.to(wide) * k1.to(wide)).sum().exp()
            - (q2.to(wide) * k2.to(wide)).sum().exp()
            + self.start
        )

    def payload(self, x: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Keys [B, S, 2 G, D] and values [B, S, G, 2 D]."""
        k = self.k(x).unflatten(-1, (-1, self.head_width))
        v = self.v(x).unflatten(-1, (self.groups, 2 * self.head_width))
        return self.position.rotate(k, span), v

    def attend(self, x: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width], given the keys and values of the tokens `of`."""
        pairs = self.pairs(x.device)
        q = self.position.rotate(self.q(x).unflatten(-1, (-1, self.head_width)), span)
        tables = self.tables() if self.tables is not None else ()
        params = tuple(
            t if dim is None else t.index_select(dim, pairs)
            for t, dim in zip(tables, self.counted, strict=True)
        )
        means = self.mix((q,), payload, params, span=span, kv_span=kv_span, heads=pairs)
        one, two = means.unflatten(2, (self.groups, 2, self.share)).unbind(3)
        difference = self.norm(one - self.weight().to(x.dtype) * two) * (1 - self.start)
        return self.out(difference.flatten(2))
