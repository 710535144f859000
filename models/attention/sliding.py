"""Sliding-window attention."""

from models.attention.full import CAUSAL, Attention
from models.masks.basic import SlidingWindow
from models.positions.base import Position


class Sliding(Attention):
    """Shows a token only the last `window` tokens, itself among them.

    Source: Beltagy et al. 2020 (arXiv:2004.05150), Jiang et al. 2023 (arXiv:2310.06825). `window`
    counts the query itself, as in Mistral; the left window of flash-attn is window - 1.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position, *, window: int):
        super().__init__(width, heads, kv_heads, position, mask=CAUSAL & SlidingWindow(window))
