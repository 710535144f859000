"""Attention with normed queries and keys, so that logits do not grow with the weights."""

from torch import Tensor, nn

from models.attention.full import Attention
from models.positions.position import Position
from models.span import Span


class QKNorm(Attention):
    """Each head's queries and keys are normed (RMS, one learned gain for each channel) before they are turned.

    Args:
        eps: added to the mean square.

    Source: Henry et al. 2020 (arXiv:2010.04245), as in Qwen 3 (arXiv:2505.09388). Theirs of 2020 has unit length and a
    learned scale; this one keeps 1 / sqrt(D).
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position, *, eps: float = 1e-6):
        super().__init__(width, heads, kv_heads, position)
        if eps <= 0:
            raise ValueError(
                f"qk_norm eps={eps} would divide by zero where a query is zero; use a positive number such as 1e-6"
            )
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_width, eps=eps) for _ in range(2))

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_width)) for project in (self.q, self.k, self.v))
        q, k = self.placing.turn(self.q_norm(q), span), self.placing.turn(self.k_norm(k), span)
        params = self.tables() if self.tables is not None else ()
        return self.out(self.mix((q,), (k, v), params, at=span).flatten(-2))
