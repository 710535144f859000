"""Builds rows from documents laid end to end.

Letters: T context length. A row is T + 1 tokens, and its last token is the first of the next row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from models.span import GIVEN, PADDING, TEXT
from trainer.data.batch import Batch
from trainer.data.corpus import Corpus


class PackedRow(NamedTuple):
    """One packed row: four [T+1] int64 arrays; `doc` is PADDING where there is no token."""

    tokens: np.ndarray
    doc: np.ndarray
    pos: np.ndarray
    role: np.ndarray


class DocumentSlice(NamedTuple):
    """Consecutive tokens of one document.

    Attributes:
        document: its number.
        start: position of the first of the tokens in it.
        tokens: [n].
        given: [n] bool, True = the token is not a target; None = every token is one.
    """

    document: int
    start: int
    tokens: np.ndarray
    given: np.ndarray | None = None


def lay_out(pieces: Sequence[DocumentSlice], length: int, *, goes_on: bool) -> PackedRow:
    """Lays slices end to end into a row of `length` tokens, with padding at the end.

    Args:
        pieces: the slices, at most `length` tokens together.
        length: T + 1.
        goes_on: True keeps the slices' own document numbers and positions, for a memory that has
            seen the tokens before them. False numbers documents from 0, and the first one, if it
            was cut, starts again at position 0.
    """
    row = PackedRow(
        tokens=np.zeros(length, np.int64),
        doc=np.full(length, PADDING, np.int64),
        pos=np.zeros(length, np.int64),
        role=np.full(length, TEXT, np.int64),
    )
    # numpy cannot concatenate an empty list.
    if not pieces:
        return row
    counts = np.array([len(piece.tokens) for piece in pieces])
    filled = int(counts.sum())
    if goes_on:
        numbers = [piece.document for piece in pieces]
        starts = [piece.start for piece in pieces]
    else:
        numbers = list(range(len(pieces)))
        starts = [0] * len(pieces)
    # Position in the row minus this offset is the position in the document.
    offsets = np.cumsum(counts) - counts - np.array(starts, np.int64)
    row.tokens[:filled] = np.concatenate([piece.tokens for piece in pieces])
    row.doc[:filled] = np.repeat(np.array(numbers, np.int64), counts)
    row.pos[:filled] = np.arange(filled) - np.repeat(offsets, counts)
    start = 0
    for piece in pieces:
        stop = start + len(piece.tokens)
        if piece.given is not None:
            row.role[start:stop] = np.where(piece.given, GIVEN, TEXT)
        start = stop
    return row


def stack(rows: Sequence[PackedRow]) -> Batch:
    """Stacks rows of one length into a batch."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    doc = torch.from_numpy(np.stack([row.doc for row in rows]))
    pos = torch.from_numpy(np.stack([row.pos for row in rows]))
    role = torch.from_numpy(np.stack([row.role for row in rows]))
    return Batch(tokens, doc, pos, role)


class Concatenation:
    """Documents of a corpus laid end to end in an order; row n is the T + 1 tokens from n * T on.

    Rows overlap by one token, so that every token but a document's first is predicted exactly once;
    the last row is padded. Nothing is packed in advance: a binary search in the cumulative lengths
    finds a row.

    Args:
        corpus: the documents.
        order: their numbers in the corpus.
        context_length: T.
        first_number: number of the first document where numbers continue from row to row.
    """

    def __init__(
        self, corpus: Corpus, order: np.ndarray, context_length: int, *, first_number: int = 0
    ):
        self.corpus = corpus
        self.order = order
        self.context_length = context_length
        self.first_number = first_number
        self.ends = np.cumsum(corpus.lengths[order])

    def row(self, number: int, *, goes_on: bool) -> PackedRow:
        """Returns row `number`, or a row of padding after the last; `goes_on` as for `lay_out`."""
        length = self.context_length + 1
        total = int(self.ends[-1])
        position = number * self.context_length
        stop = min(position + length, total)
        pieces = []
        # The first document that ends behind `position`.
        index = int(np.searchsorted(self.ends, position, "right"))
        while position < stop:
            document = int(self.order[index])
            document_end = int(self.ends[index])
            document_begin = document_end - int(self.corpus.lengths[document])
            until = min(stop, document_end)
            start = position - document_begin
            tokens = self.corpus.tokens(document, start, until - document_begin)
            given = self.corpus.given(document, start, until - document_begin)
            pieces.append(DocumentSlice(self.first_number + index, start, tokens, given))
            position = until
            index += 1
        return lay_out(pieces, length, goes_on=goes_on)

    def documents(self, numbers: np.ndarray, *, goes_on: bool) -> np.ndarray:
        """Counts the documents of rows by their lengths alone.

        Args:
            numbers: of the rows, [n] int64.
            goes_on: as for `lay_out`.

        Returns:
            One more than the largest number of a document in the row, [n] int64; 0 for padding.
        """
        begin = numbers * self.context_length
        stop = np.minimum(begin + self.context_length + 1, self.ends[-1])
        last = np.searchsorted(self.ends, stop - 1, "right")
        first = -self.first_number if goes_on else np.searchsorted(self.ends, begin, "right")
        return np.where(begin < stop, last + 1 - first, 0)

    def row_tokens(self, number: int) -> int:
        """Counts the tokens of row `number` that a model reads."""
        begin = number * self.context_length
        return int(max(0, min(self.context_length, self.ends[-1] - begin)))


def rows_of(tokens: int, context_length: int) -> int:
    """Counts the rows that a number of tokens make; the very first token is not a target."""
    return -(-(tokens - 1) // context_length)
