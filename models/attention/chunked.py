"""Chunked attention: causal inside chunks that do not see each other."""

from models.attention.full import CAUSAL, Attention
from models.masks.basic import SameChunk
from models.positions.base import Position


class Chunked(Attention):
    """Shows a token the earlier tokens of its own chunk, counted from the document's start.

    Args:
        size: tokens in a chunk.

    Source: Llama 4 (Meta 2025), whose chunked layers alternate with full ones: alone, no
    information passes between chunks.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position, *, size: int):
        super().__init__(width, heads, kv_heads, position, mask=CAUSAL & SameChunk(size))
