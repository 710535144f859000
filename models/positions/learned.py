"""Learned positions: one vector per position, added to the token embeddings."""

from torch import Tensor, nn

from models.layer import Layer
from models.positions.base import Position
from models.span import Span


class Learned(Position):
    """Looks positions up in a table of vectors; no document may be longer than the table.

    Args:
        context_length: tokens in a row, and therefore the longest document.
        max_length: rows of the table; null: context_length.

    Source: Gehring et al. 2017 (arXiv:1705.03122), Radford et al. 2019 (GPT-2). Rows of the table
    that were never trained are noise: reading further needs another scheme.
    """

    def __init__(self, context_length: int, max_length: int | None = None):
        if max_length is None:
            max_length = context_length
        if max_length < context_length:
            raise ValueError(
                f"position.max_length={max_length}: a row of {context_length} tokens, or of a"
                f" source, is longer; use position.max_length={context_length} or more, or null"
            )
        self.max_length = max_length

    def embedding(self, width: int) -> nn.Module | None:
        """A module (span) -> [B, T, width] with one parameter."""
        return PositionTable(self.max_length or 0, width)


class PositionTable(Layer):
    """(span) -> [B, T, width]: the vector of every token's position."""

    def __init__(self, max_length: int, width: int):
        super().__init__()
        self.max_length = max_length
        self.table = nn.Embedding(max_length, width)

    def forward(self, span: Span) -> Tensor:
        """[B, T, width]."""
        return self.table(span.pos)
