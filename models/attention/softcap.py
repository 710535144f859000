"""Attention whose logits cannot run away: a soft cap."""

from models.attention.full import Attention
from models.positions.base import Position
from models.primitives.softmax import Softmax
from models.scores import SoftcapScore


class Softcap(Attention):
    """Logits go through cap tanh(. / cap) before the mask, and so stay inside (-cap, cap).

    Args:
        cap: in nats; far below it logits are left as they are.

    Source: Gemma 2 (arXiv:2408.00118). Computed by the general tile: no fast kernel here knows the
    cap.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, position: Position, *, cap: float = 50.0
    ):
        if cap <= 0:
            raise ValueError(
                f"softcap cap={cap} would flatten all logits; use a positive number such as 50, or"
                " mixer=full"
            )
        super().__init__(width, heads, kv_heads, position)
        self.mix = Softmax(self.mix.mask, SoftcapScore(self.mix.score, cap))
