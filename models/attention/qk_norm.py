"""Attention with normed queries and keys, so that logits do not grow with the weights.

Letters: B rows, T queries, S keys, H query heads, G key heads, D head width.
"""

from torch import Tensor

from models.attention.full import Attention
from models.norms import RMSNorm
from models.positions.base import Position
from models.ranges import Positive


class QKNorm(Attention):
    """Norms each head's queries and keys (RMS, one learned gain per channel) before rotation.

    Args:
        eps: added to the mean square.

    Source: Henry et al. 2020 (arXiv:2010.04245), as in Qwen 3 (arXiv:2505.09388). The form of 2020
    has unit length and a learned scale; this one keeps 1 / sqrt(D).
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, position: Position, *, eps: Positive = 1e-6
    ):
        super().__init__(width, heads, kv_heads, position)
        if eps <= 0:
            raise ValueError(
                f"eps={eps} would divide by zero where a query is zero; use a positive number such"
                " as 1e-6"
            )
        self.q_norm = RMSNorm(self.head_width, eps=eps)
        self.k_norm = RMSNorm(self.head_width, eps=eps)

    def project_query(self, hidden: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, H, D], normed."""
        return self.q_norm(super().project_query(hidden))

    def project_payload(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, normed, and values [B, S, G, D]."""
        key, value = super().project_payload(hidden)
        return self.k_norm(key), value
