"""Attention sinks: a sliding window, and the first tokens of the document beside it."""

from models.attention.full import CAUSAL, Attention
from models.masks.basic import FirstTokens, SlidingWindow
from models.positions.base import Position


class Sinks(Attention):
    """See the last `reach` tokens, oneself among them, and the document's first `first` tokens,
    however far.

    Args:
        window: tokens of the window.
        sink_tokens: tokens that stay visible; 4 are enough for a model that was trained without
            sinks.

    Source: Xiao et al. 2023, StreamingLLM (arXiv:2309.17453). Positions are those in the text;
    theirs, made for decoding past the trained length, are those inside the cache.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        position: Position,
        *,
        window: int,
        sink_tokens: int = 4,
    ):
        if sink_tokens < 1:
            raise ValueError(
                f"sinks sink_tokens={sink_tokens} leaves no token to park on; use 1 or more, or"
                " mixer=sliding"
            )
        super().__init__(
            width,
            heads,
            kv_heads,
            position,
            mask=CAUSAL & (SlidingWindow(window) | FirstTokens(sink_tokens)),
        )
