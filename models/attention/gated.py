"""Attention behind a gate: what a head found passes only as far as the token lets it."""

from torch import Tensor, nn

from models.attention.full import Attention
from models.positions.position import Position
from models.span import Span


class Gated(Attention):
    """out(sigmoid(gate(x)) * attention(x)), a gate for every channel of every head.

    Source: Qiu et al. 2025 (arXiv:2505.06708), the elementwise gate after the weighted mean; also in Qwen3-Next. It takes
    away the need for sinks, since a head may give nothing. Not part of it here: Qwen3-Next's norm of queries and keys.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position):
        super().__init__(width, heads, kv_heads, position)
        self.gate = nn.Linear(width, heads * self.head_width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_width)) for project in (self.q, self.k, self.v))
        q, k = self.placing.turn(q, span), self.placing.turn(k, span)
        params = self.tables() if self.tables is not None else ()
        return self.out(self.mix((q,), (k, v), params, at=span).flatten(-2) * self.gate(x).sigmoid())
