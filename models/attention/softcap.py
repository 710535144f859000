"""Attention with a soft cap on its logits."""

from models.attention.full import Attention
from models.positions.base import Position
from models.primitives.softmax import Softmax
from models.scores import SoftcapScore


class Softcap(Attention):
    """Bends logits into (-cap, cap) by cap tanh(logits / cap), before the mask.

    Args:
        cap: in nats; logits far below it hardly change.

    Source: Gemma 2 (arXiv:2408.00118). Computed by the reference kernel: the fast kernels do not
    support a cap.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, position: Position, *, cap: float = 50.0
    ):
        if cap <= 0:
            raise ValueError(
                f"cap={cap} would flatten all logits; use a positive number such as 50, or"
                " mixer=full"
            )
        super().__init__(width, heads, kv_heads, position)
        self.mix = Softmax(self.mix.mask, SoftcapScore(self.mix.score, cap))
