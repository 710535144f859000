"""Attention sinks: a sliding window and the first tokens of the document."""

from models.attention.full import CAUSAL, Attention
from models.masks.basic import FirstTokens, SlidingWindow
from models.positions.base import Position


class Sinks(Attention):
    """Shows a token the last `window` tokens and the first `sink_tokens` of its document.

    Args:
        window: tokens of the window; it counts the query itself.
        sink_tokens: tokens that stay visible at any distance; 4 are enough for a model that was
            trained without sinks.

    Source: Xiao et al. 2023, StreamingLLM (arXiv:2309.17453). Positions are those in the text;
    theirs are those inside the cache, for decoding past the trained length.
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
                f"sink_tokens={sink_tokens} leaves no token as a sink; use 1 or more, or"
                " mixer=sliding"
            )
        mask = CAUSAL & (SlidingWindow(window) | FirstTokens(sink_tokens))
        super().__init__(width, heads, kv_heads, position, mask=mask)
