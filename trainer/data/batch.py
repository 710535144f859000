"""Tokens of one optimizer step with their addresses.

Letters: R rows of all ranks, T context length.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.loss import IGNORE
from models.span import GIVEN, TEXT, Span


class Batch(NamedTuple):
    """All rows of one step, on the CPU, the same on every rank.

    A row holds T + 1 tokens, of which the model reads the first T.

    Attributes:
        tokens: [R, T+1] int64, or [R, T+1, ...] where a token has columns; 0 for padding.
        doc: [R, T+1] int64, number of the document within its row; -1 = padding.
        pos: [R, T+1] int64, position in the document.
        role: [R, T+1] int64, a role of models.span; GIVEN = the token is not a target.
        aims: [R, T+1] int64, the target at each token, IGNORE for none; None = the next token.
        source: a second stream of as many rows, of a length of its own, that the model reads beside
            these; a document of the row and its source have equal numbers. None = there is none.
    """

    tokens: Tensor
    doc: Tensor
    pos: Tensor
    role: Tensor
    aims: Tensor | None = None
    source: "Batch | None" = None

    def tensors(self) -> Iterator[Tensor]:
        """Yields every tensor, those of the source too."""
        for column in self:
            if isinstance(column, Batch):
                yield from column.tensors()
            elif column is not None:
                yield column

    def inputs(self) -> Tensor:
        """Returns the tokens that the model reads, [R, T] int64."""
        return self.tokens[:, :-1]

    def span(self) -> Span:
        """Returns the addresses of the inputs, [R, T]."""
        role = self.role[:, :-1]
        # GIVEN only matters for targets; to a model such a token is ordinary text.
        model_role = torch.where(role == GIVEN, TEXT, role)
        return Span(pos=self.pos[:, :-1], doc=self.doc[:, :-1], role=model_role)

    def targets(self) -> Tensor:
        """Returns the target at each input, [R, T] int64; IGNORE where there is none.

        It is the aim, or else the next token of the same document unless that is GIVEN.
        """
        if self.aims is not None:
            return self.aims[:, :-1]
        doc = self.doc[:, :-1]
        next_doc = self.doc[:, 1:]
        next_is_given = self.role[:, 1:] == GIVEN
        has_target = (next_doc == doc) & (doc >= 0) & ~next_is_given
        return torch.where(has_target, self.tokens[:, 1:], IGNORE)

    def predictions(self) -> int:
        """Counts the valid targets of the whole step."""
        return int((self.targets() != IGNORE).sum())

    def numbered(self) -> "Batch":
        """Renumbers the documents so that no two rows share a number.

        Every token of the step then has an address of its own, whatever rank reads its row. A
        document and its source keep equal numbers.
        """
        return self.raised(self.first_numbers(0, len(self.doc)))

    def first_numbers(self, first: int, last: int) -> Tensor:
        """Returns what `numbered` adds to the documents of rows first .. last - 1, [rows, 1].

        It is 0 for rows that the batch does not have.
        """
        # PADDING is -1, so a row of padding alone counts no document.
        counts = self.doc.amax(1, keepdim=True) + 1
        if self.source is not None:
            counts = torch.maximum(counts, self.source.doc.amax(1, keepdim=True) + 1)
        return first_numbers(counts, first, last)

    def raised(self, first_numbers: Tensor) -> "Batch":
        """Adds to the numbers of the documents of each row, [R, 1], and of its source."""
        doc = torch.where(self.doc < 0, self.doc, self.doc + first_numbers)
        source = None if self.source is None else self.source.raised(first_numbers)
        return self._replace(doc=doc, source=source)

    def part(self, first: int, last: int) -> "Batch":
        """Returns rows first .. last - 1, with rows of padding where the batch has fewer."""
        missing = last - first - len(self.tokens[first:last])

        def rows(columns: Tensor, fill: int) -> Tensor:
            selected = columns[first:last]
            if missing <= 0:
                return selected
            padding = selected.new_full((missing, *selected.shape[1:]), fill)
            return torch.cat([selected, padding])

        return Batch(
            tokens=rows(self.tokens, 0),
            doc=rows(self.doc, -1),
            pos=rows(self.pos, 0),
            role=rows(self.role, 0),
            aims=None if self.aims is None else rows(self.aims, IGNORE),
            source=None if self.source is None else self.source.part(first, last),
        )


def first_numbers(counts: Tensor, first: int, last: int) -> Tensor:
    """Returns how many documents lie before each of rows first .. last - 1, [rows, 1] int64.

    Args:
        counts: [R, 1], of the documents of each row.
        first, last: of the rows; those behind R have no document and get 0.
    """
    before = (counts.cumsum(0) - counts)[first:last]
    missing = before.new_zeros(last - first - len(before), 1)
    return torch.cat([before, missing])
