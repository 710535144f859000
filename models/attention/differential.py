"""Differential attention: the difference of two softmaxes, which cancels their common noise.

Letters: B rows, T queries, S keys, G pairs of key heads, r pairs of query heads that share one, D
head width.
"""

from math import exp

import torch
from torch import Tensor, nn

from models.attention.base import SplitAttention
from models.attention.full import CAUSAL
from models.init import Rule, constant, normal
from models.norms import RMSNorm
from models.positions.base import Position
from models.primitives.softmax import Softmax
from models.scores import SharedValueScore
from models.span import Span

LAMBDAS = "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"


class Differential(SplitAttention):
    """Computes (softmax(q1 k1) - lambda softmax(q2 k2)) v for each pair of heads.

    The result of a pair is RMS-normed and multiplied by 1 - lambda_init.

    Args:
        width: channels of input and output.
        heads: softmaxes; an even number, since two make a pair. With equal heads this layer has as
            many weights as full attention.
        kv_heads: key heads, two to a pair; a pair shares one head of values, twice as wide as its
            keys.
        position: how queries and keys learn their positions.
        layer: index of the layer, from 0; lambda starts at 0.8 - 0.6 exp(-0.3 layer).

    The leaf computes every softmax as a head of its own and the pairs are subtracted afterwards, so
    a driver that distributes heads may separate a pair. Heads lie in order (G, 2, r): query head h
    then reads key head h // r and value head h // 2r. Both maps of a pair share one position bias.

    Source: Ye et al. 2024 (arXiv:2410.05258).
    """

    lambda_q1: nn.Parameter
    lambda_k1: nn.Parameter
    lambda_q2: nn.Parameter
    lambda_k2: nn.Parameter

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position, layer: int):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"model.width={width} does not divide among model.heads={heads}; choose a multiple"
                f" of {heads}"
            )
        if heads % 2 or kv_heads % 2:
            raise ValueError(
                f"model.heads={heads}, model.kv_heads={kv_heads}: differential attention pairs its"
                " heads; use even numbers of both"
            )
        if heads % kv_heads:
            raise ValueError(
                f"model.kv_heads={kv_heads} does not divide model.heads={heads}; choose an even"
                " divisor"
            )
        self.groups = kv_heads // 2
        self.queries_per_key = heads // kv_heads
        self.head_width = width // heads
        self.position = position
        self.start = 0.8 - 0.6 * exp(-0.3 * layer)
        self.q = nn.Linear(width, heads * self.head_width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        for name in LAMBDAS:
            self.register_parameter(name, nn.Parameter(torch.zeros(self.head_width)))
        self.norm = RMSNorm(2 * self.head_width, eps=1e-5)
        score, self.tables = position.score(heads // 2, self.head_width)
        self.table_pair_dims = score.param_heads  # the dim of each table that counts pairs
        self.mix = Softmax(CAUSAL, SharedValueScore(score))

    def init_rules(self) -> dict[str, Rule]:
        """Lambda's vectors start near zero, so that lambda starts near lambda_init."""
        rules = {name: normal(0.1) for name in LAMBDAS}
        rules["norm.weight"] = constant(1.0)
        return rules

    def pairs(self, device: torch.device) -> Tensor:
        """[heads] int64: the pair that each softmax belongs to."""
        shape = (self.groups, 1, self.queries_per_key)
        pairs = torch.arange(self.groups * self.queries_per_key, device=device).view(shape)
        return pairs.expand(self.groups, 2, self.queries_per_key).flatten()

    def weight(self) -> Tensor:
        """Lambda, in at least float32: the weight of the softmax that is subtracted."""
        dtype = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        first = self.lambda_q1.to(dtype) * self.lambda_k1.to(dtype)
        second = self.lambda_q2.to(dtype) * self.lambda_k2.to(dtype)
        return first.sum().exp() - second.sum().exp() + self.start

    def payload(self, hidden: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Keys [B, S, 2 G, D] and values [B, S, G, 2 D]."""
        key = self.k(hidden).unflatten(-1, (-1, self.head_width))
        value = self.v(hidden).unflatten(-1, (self.groups, 2 * self.head_width))
        return self.position.rotate(key, span), value

    def attend(
        self, hidden: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, width] -> [B, T, width], given keys and values of the tokens of `kv_span`."""
        pairs = self.pairs(hidden.device)
        query = self.q(hidden).unflatten(-1, (-1, self.head_width))
        query = self.position.rotate(query, span)
        means = self.mix(
            (query,), payload, self._params(pairs), span=span, kv_span=kv_span, heads=pairs
        )
        means = means.unflatten(2, (self.groups, 2, self.queries_per_key))
        first, second = means.unbind(3)
        difference = self.norm(first - self.weight().to(hidden.dtype) * second)
        # keeps the size of the gradients that full attention has, as in the paper
        difference = difference * (1 - self.start)
        return self.out(difference.flatten(2))

    def _params(self, pairs: Tensor) -> tuple[Tensor, ...]:
        """The position's tables, with the entry of its pair for every head."""
        if self.tables is None:
            return ()
        params = []
        for table, dim in zip(self.tables(), self.table_pair_dims, strict=True):
            params.append(table if dim is None else table.index_select(dim, pairs))
        return tuple(params)
