"""Rows out of documents laid end to end. Legend: T context length; a row is T + 1 tokens, its last
the next's first."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from models.span import PADDING, TEXT
from trainer.data.batch import Batch
from trainer.data.corpus import Corpus


class PackedRow(NamedTuple):
    """One packed row: three [T+1] int64 arrays; PADDING as the document where there is no token."""

    tokens: np.ndarray
    doc: np.ndarray
    pos: np.ndarray


class DocumentSlice(NamedTuple):
    """Consecutive tokens of one document: the document's number, the place of the first token in
    it, the tokens."""

    document: int
    start: int
    tokens: np.ndarray


def lay_out(pieces: Sequence[DocumentSlice], length: int, *, goes_on: bool) -> PackedRow:
    """Lay pieces end to end into a row of `length` tokens, padded behind.

    goes_on: False = documents are numbered from 0 and the first one, if cut, starts again at pos 0;
    True = numbers and positions are those of the pieces, for a memory that has seen what came
    before.
    """
    row = PackedRow(
        np.zeros(length, np.int64), np.full(length, PADDING, np.int64), np.zeros(length, np.int64)
    )
    if pieces:
        counts = np.array([len(piece.tokens) for piece in pieces])
        filled = int(counts.sum())
        numbers = [piece.document for piece in pieces] if goes_on else range(len(pieces))
        starts = [piece.start if goes_on else 0 for piece in pieces]
        row.tokens[:filled] = np.concatenate([piece.tokens for piece in pieces])
        row.doc[:filled] = np.repeat(np.array(numbers, np.int64), counts)
        row.pos[:filled] = np.arange(filled) - np.repeat(
            np.cumsum(counts) - counts - np.array(starts, np.int64), counts
        )
    return row


def stack(rows: Sequence[PackedRow]) -> Batch:
    """A batch of rows of one length."""
    tokens, doc, pos = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows))
    return Batch(tokens, doc, pos, torch.full_like(tokens, TEXT))


class Concatenation:
    """Some documents of a corpus laid end to end in an order: row n is the T + 1 tokens from n * T
    on.

    Rows overlap by one token, so that every token but a document's first is predicted exactly once;
    the last row is padded. Nothing is packed: a row is found by a search in the sums of lengths.

    Args:
        order: numbers of the corpus's documents.
        first_number: the number that the first document gets where numbers go on.
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
        """Row `number`, or one of padding behind the last."""
        length = self.context_length + 1
        total = int(self.ends[-1])
        here = number * self.context_length
        stop = min(number * self.context_length + length, total)
        pieces = []
        place = int(np.searchsorted(self.ends, here, "right"))
        while here < stop:
            document = int(self.order[place])
            begin = int(self.ends[place] - self.corpus.lengths[document])
            until = min(stop, int(self.ends[place]))
            tokens = self.corpus.tokens(document, here - begin, until - begin)
            pieces.append(DocumentSlice(self.first_number + place, here - begin, tokens))
            here = until
            place = place + 1
        return lay_out(pieces, length, goes_on=goes_on)


def rows_of(tokens: int, context_length: int) -> int:
    """How many rows so many tokens make: the first token of all is predicted by nobody."""
    return -(-(tokens - 1) // context_length)
