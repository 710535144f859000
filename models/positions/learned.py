"""Learned positions: a vector for each, added to the token embeddings."""

from torch import Tensor, nn

from models.positions.base import Position
from models.span import Span


class Learned(Position):
    """A table of vectors; a document may not be longer than the table, which the config check holds
    against the context.

    Args:
        context_length: tokens in a row, and so in a document.
        max_length: rows of the table; null: context_length.

    Source: Gehring et al. 2017 (arXiv:1705.03122), Radford et al. 2019 (GPT-2). Positions never
    trained say nothing: reading further needs another scheme.
    """

    def __init__(self, context_length: int, max_length: int | None = None):
        length = context_length if max_length is None else max_length
        if length < context_length:
            raise ValueError(
                f"position.max_length={length} is shorter than context_length={context_length}; "
                f"use position.max_length={context_length}, or null"
            )
        self.max_length = length

    def embedding(self, width: int) -> nn.Module | None:
        """A module (span) -> [B, T, width] with one parameter."""
        return PositionTable(self.max_length or 0, width)


class PositionTable(nn.Module):
    """(span) -> [B, T, width]: the vector of every token's position."""

    def __init__(self, max_length: int, width: int):
        super().__init__()
        self.max_length = max_length
        self.table = nn.Embedding(max_length, width)

    def forward(self, span: Span) -> Tensor:
        return self.table(span.pos)
