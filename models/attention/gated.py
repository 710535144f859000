"""Attention behind a gate: what a head found passes only as far as the token lets it."""

from torch import Tensor, nn

from models.attention.full import Attention
from models.positions.base import Position
from models.span import Span


class Gated(Attention):
    """out(sigmoid(gate(x)) * attention(x)), a gate for every channel of every head.

    Source: Qiu et al. 2025 (arXiv:2505.06708), the elementwise gate after the weighted mean; also
    in Qwen3-Next. It takes away the need for sinks, since a head may give nothing. Not part of it
    here: Qwen3-Next's norm of queries and keys.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position):
        super().__init__(width, heads, kv_heads, position)
        self.gate = nn.Linear(width, heads * self.head_width, bias=False)

    def attend_heads(
        self, x: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, H D]: what passes the gate."""
        return super().attend_heads(x, span, payload, kv_span) * self.gate(x).sigmoid()
