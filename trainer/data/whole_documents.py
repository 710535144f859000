"""Builds rows of whole documents, so that no answer is read without what was asked.

Letters: T context length. A row holds T + 1 tokens; its last is only a target.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from trainer.data.corpus import Corpus
from trainer.data.packing import DocumentSlice, PackedRow, lay_out
from trainer.data.split import arrange, mix


class Extent(NamedTuple):
    """The tokens of a document that a row holds together, from `start` up to, without, `stop`."""

    document: int
    start: int
    stop: int


class Cuts(NamedTuple):
    """Documents cut to the length of a row.

    Attributes:
        extents: in the order of the documents.
        cut: number of documents that are longer than a row.
        within: of those, the ones of which a single turn is.
        left_out: tokens of pieces with nothing to predict.
    """

    extents: list[Extent]
    cut: int
    within: int
    left_out: int

    def text(self) -> str:
        """Returns one phrase for the log; empty where no document was cut."""
        if not self.cut:
            return ""
        words = f"{self.cut} documents longer than a row are cut at turns"
        if self.within:
            words += f", {self.within} of them within a turn that is longer itself"
        if self.left_out:
            words += f"; left out {self.left_out} tokens of pieces without an answer"
        return words


def cut_at_turns(corpus: Corpus, documents: np.ndarray, context_length: int) -> Cuts:
    """Cuts documents into pieces of at most T + 1 tokens, between turns where that is possible.

    A turn that is longer than a row is cut at its last token that fits. The next piece begins with
    that token, which is then read and not predicted again, as where rows of plain text meet.

    Args:
        corpus: has the documents.
        documents: their numbers.
        context_length: T.
    """
    length = context_length + 1
    extents: list[Extent] = []
    cut = 0
    within = 0
    left_out = 0
    for document in documents.tolist():
        whole = int(corpus.lengths[document])
        if whole <= length:
            extents.append(Extent(document, 0, whole))
            continue
        cut += 1
        pieces, is_within = _pieces(corpus.turns(document), document, whole, length)
        within += is_within
        for piece in pieces:
            given = corpus.given(piece.document, piece.start, piece.stop)
            if given is not None and given[1:].all():
                left_out += piece.stop - piece.start
            else:
                extents.append(piece)
    return Cuts(extents, cut, within, left_out)


def _pieces(turns: np.ndarray, document: int, whole: int, length: int) -> tuple[list[Extent], bool]:
    """Returns the pieces of a long document, and whether it was cut within a turn."""
    borders = [*turns.tolist(), whole]
    pieces: list[Extent] = []
    within = False
    start = 0
    while start < whole:
        # The last border that the row reaches.
        number = bisect_left(borders, start + length + 1) - 1
        if number >= 0 and borders[number] > start:
            stop = borders[number]
            pieces.append(Extent(document, start, stop))
            start = stop
        else:
            within = True
            stop = start + length
            pieces.append(Extent(document, start, stop))
            start = stop - 1
    return pieces, within


class WholeDocuments:
    """Documents of a corpus packed whole into rows, in an order of the epoch.

    Best-fit decreasing: the longest first, each into the fullest row that has room for it. The
    number of rows is the same in every epoch, because it depends on the lengths alone; which
    documents of one length share a row differs.

    Source: Ding et al. 2024 (arXiv:2404.10830); theirs cuts long documents into chunks of the row's
    length, ours at turns.

    Args:
        corpus: the documents.
        extents: what is packed.
        context_length: T.
        seed, epoch: of the order.
    """

    def __init__(
        self,
        corpus: Corpus,
        extents: list[Extent],
        context_length: int,
        *,
        seed: int,
        epoch: int,
    ):
        self.corpus = corpus
        self.context_length = context_length
        places = np.arange(len(extents), dtype=np.uint64)
        order = arrange(mix(places), seed, epoch)
        lengths = np.array([extent.stop - extent.start for extent in extents], np.int64)
        # Stable, so that the epoch's order decides among documents of one length.
        order = order[np.argsort(-lengths[order], kind="stable")]
        self.extents = extents
        self.bins = best_fit(lengths[order].tolist(), context_length + 1)
        self.order = order

    def documents(self, numbers: np.ndarray, *, goes_on: bool) -> np.ndarray:
        """See trainer.data.packing.Concatenation.documents; each row numbers its own from 0."""
        assert not goes_on, "lanes read no whole documents"
        counts = [len(self.bins[number]) if number < len(self.bins) else 0 for number in numbers]
        return np.array(counts, np.int64)

    def row_tokens(self, number: int) -> int:
        """Counts the tokens of row `number` that a model reads."""
        extents = [self.extents[int(self.order[place])] for place in self.bins[number]]
        return min(self.context_length, sum(extent.stop - extent.start for extent in extents))

    def row(self, number: int, *, goes_on: bool) -> PackedRow:
        """Returns row `number`, or a row of padding after the last; `goes_on` as for `lay_out`."""
        pieces: list[DocumentSlice] = []
        for place in self.bins[number] if number < len(self.bins) else []:
            extent = self.extents[int(self.order[place])]
            tokens = self.corpus.tokens(*extent)
            given = self.corpus.given(*extent)
            pieces.append(DocumentSlice(extent.document, extent.start, tokens, given))
        return lay_out(pieces, self.context_length + 1, goes_on=goes_on)


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Packs items into bins.

    Args:
        lengths: of the items, the largest first, none above `room`.
        room: of a bin.

    Returns:
        The numbers of the items in each bin.
    """
    bins: list[list[int]] = []
    left: list[int] = []  # different amounts of room that are left in any bin, ascending
    with_left: dict[int, list[int]] = {}
    for item, length in enumerate(lengths):
        place = bisect_left(left, length)
        if place == len(left):
            number = len(bins)
            bins.append([])
            rest = room - length
        else:
            fullest = left[place]
            number = with_left[fullest].pop()
            if not with_left[fullest]:
                del with_left[fullest]
                left.pop(place)
            rest = fullest - length
        bins[number].append(item)
        if rest not in with_left:
            insort(left, rest)
            with_left[rest] = []
        with_left[rest].append(number)
    return bins
