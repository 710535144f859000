"""Attention sinks: a sliding window, and the first tokens of the document beside it."""

from models.attention.full import CAUSAL, Attention
from models.masks import First, Reach
from models.positions.position import Position


class Sinks(Attention):
    """See the last `reach` tokens, oneself among them, and the document's first `first` tokens, however far.

    Args:
        reach: tokens of the window.
        first: tokens that stay visible; 4 are enough for a model that was trained without sinks.

    Source: Xiao et al. 2023, StreamingLLM (arXiv:2309.17453). Positions are those in the text; theirs, made for decoding
    past the trained length, are those inside the cache.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position, *, reach: int, first: int = 4):
        if first < 1:
            raise ValueError(f"sinks first={first} leaves no token to park on; use 1 or more, or mixer=sliding")
        super().__init__(width, heads, kv_heads, position, mask=CAUSAL & (Reach(reach) | First(first)))
