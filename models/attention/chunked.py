"""Chunked attention: causal inside chunks that do not see one another."""

from models.attention.full import CAUSAL, Attention
from models.masks.basic import SameChunk
from models.positions.base import Position


class Chunked(Attention):
    """See what came before in one's own chunk; chunks are counted from the document's first token.

    Args:
        size: tokens in a chunk.

    Source: Llama 4 (Meta 2025), whose chunked layers alternate with full ones: alone, no chunk
    learns of another.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position, *, size: int):
        super().__init__(width, heads, kv_heads, position, mask=CAUSAL & SameChunk(size))
