"""Attention with an output gate: every token decides how much of each channel passes.

Letters: B rows, T tokens, H heads, D head width.
"""

from torch import Tensor, nn

from models.attention.full import Attention
from models.positions.base import Position
from models.span import Span


class Gated(Attention):
    """out(sigmoid(gate(x)) * attention(x)), with a gate for every channel of every head.

    Source: Qiu et al. 2025 (arXiv:2505.06708), the elementwise gate after the weighted mean; also
    in Qwen3-Next, whose norm of queries and keys is not part of this layer. A head that may give
    nothing needs no attention sink.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position):
        super().__init__(width, heads, kv_heads, position)
        self.gate = nn.Linear(width, heads * self.head_width, bias=False)

    def attend_heads(
        self, hidden: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, H D]: the output of all heads, times the gate."""
        output = super().attend_heads(hidden, span, payload, kv_span)
        return output * self.gate(hidden).sigmoid()
