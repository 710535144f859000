"""Batches of pairs: rows of several targets, and beside each a row of their sources.

Letters: T context length, S tokens in a row of sources.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from trainer.data.batch import Batch
from trainer.data.corpus import Corpus
from trainer.data.errors import DataError
from trainer.data.packing import DocumentSlice, PackedRow, lay_out, stack
from trainer.data.sources.pairs import Pairs
from trainer.data.split import arrange, mix
from trainer.data.streams.packed import PackedStream
from trainer.data.whole_documents import Cuts, Extent, WholeDocuments
from trainer.errors import BAD_CONFIG

OPEN_ROWS = 64  # rows that are looked at for a pair: more would fill them little better
NO_LANES = (
    "memory: rows go on from row to row under it, but a pair is read with its source; use"
    " memory=none"
)


class PairRow(NamedTuple):
    """A row of targets and a row of their sources; documents have equal numbers on both sides."""

    target: PackedRow
    source: PackedRow


class PairStream(PackedStream):
    """Rows of whole pairs, one epoch after another in an order of its own, without end.

    Args:
        source: the pairs.
        context_length, rows, seed, split, lanes: see open_stream.

    Raises:
        DataError: lanes, or a pair that is longer than a row where data.on_error=raise.
    """

    def __init__(
        self,
        source: Pairs,
        *,
        context_length: int,
        rows: int,
        seed: int,
        split: str = "train",
        lanes: bool = False,
    ):
        if lanes:
            raise DataError(NO_LANES, BAD_CONFIG)
        self.source_length = source.source_length or context_length
        self.source_is_set = source.source_length is not None
        self.on_error = source.on_error
        self.too_long = 0
        super().__init__(
            source, context_length=context_length, rows=rows, seed=seed, split=split, lanes=lanes
        )
        identity = f"{self.fingerprint} {self.source_length} {self.too_long}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()

    def describe(self, steps: int | None = None) -> str:
        """See Stream.describe."""
        words = f"{super().describe(steps)}; rows of sources of {self.source_length}"
        if self.too_long:
            words += f"; left out {self.too_long} pairs that are longer than a row"
        return words

    def _cut(self) -> Cuts:
        """Returns the pairs that fit in a row; the others are a fault."""
        extents: list[Extent] = []
        longest = [0, 0]
        for document in self.documents.tolist():
            sizes = sizes_of(self.corpus, document)
            longest = [max(pair) for pair in zip(longest, sizes, strict=True)]
            # The last token of a row is only a target.
            if sizes[0] > self.source_length or sizes[1] > self.context_length + 1:
                self.too_long += 1
                continue
            extents.append(Extent(document, 0, sum(sizes)))
        if self.too_long and self.on_error == "raise":
            raise DataError(self._complaint(longest), BAD_CONFIG)
        if not extents:
            raise DataError(self._complaint(longest), BAD_CONFIG)
        return Cuts(extents, 0, 0, 0)

    def _complaint(self, longest: list[int]) -> str:
        """Returns the message about pairs that are longer than a row."""
        source, target = longest[0], longest[1] - 1
        facts = []
        remedies = []
        if target > self.context_length:
            facts.append(f"context_length={self.context_length}: a target takes {target} tokens")
            remedies.append(f"context_length={target}")
        if source > self.source_length:
            key = "data.source_length" if self.source_is_set else "context_length"
            facts.append(f"{key}={self.source_length}: a source takes {source} tokens")
            remedies.append(f"data.source_length={source}")
        return (
            f"{', and '.join(facts)}; {self.too_long} pairs are longer than a row; use"
            f" {' '.join(remedies)}, or leave them out with data.on_error=skip"
        )

    def _whole(self, epoch: int) -> WholeDocuments:
        """Returns whole pairs in the rows of an epoch."""
        assert self.cuts is not None, "pairs are never in lanes"
        return WholePairs(
            self.corpus,
            self.cuts.extents,
            self.context_length,
            self.source_length,
            seed=self._order_seed,
            epoch=epoch,
        )

    def _stack(self, rows: list) -> Batch:
        """Returns rows as a batch with its sources."""
        targets = stack([row.target for row in rows])
        return targets._replace(source=stack([row.source for row in rows]))


class WholePairs(WholeDocuments):
    """Pairs of a corpus packed whole into rows, in an order of the epoch.

    The longest first, each into the first of the last OPEN_ROWS rows that has room for both of its
    sides. The number of rows depends on the lengths alone, so it is the same in every epoch; pairs
    of equal lengths change places.

    Args:
        corpus: the pairs.
        extents: what is packed.
        context_length, source_length: T and S.
        seed, epoch: of the order.
    """

    def __init__(
        self,
        corpus: Corpus,
        extents: list[Extent],
        context_length: int,
        source_length: int,
        *,
        seed: int,
        epoch: int,
    ):
        self.corpus = corpus
        self.context_length = context_length
        self.source_length = source_length
        self.extents = extents
        places = np.arange(len(extents), dtype=np.uint64)
        order = arrange(mix(places), seed, epoch)
        sizes = np.array([sizes_of(corpus, extent.document) for extent in extents])[order]
        # Stable in both keys, so that the epoch's order decides among pairs of equal lengths.
        by_length = np.lexsort((-sizes[:, 0], -sizes[:, 1]))
        self.order = order[by_length]
        self.bins = first_fit(sizes[by_length].tolist(), (source_length, context_length + 1))

    def row(self, number: int, *, goes_on: bool) -> PairRow:  # pyright: ignore
        """Returns row `number`, or a row of padding after the last."""
        targets: list[DocumentSlice] = []
        sources: list[DocumentSlice] = []
        for place in self.bins[number] if number < len(self.bins) else []:
            document = self.extents[int(self.order[place])].document
            source, target = sizes_of(self.corpus, document)
            sources.append(DocumentSlice(document, 0, self.corpus.tokens(document, 0, source)))
            tokens = self.corpus.tokens(document, source, source + target)
            targets.append(DocumentSlice(document, 0, tokens))
        # A row of sources has a token more than is read, as every row of a Batch.
        return PairRow(
            lay_out(targets, self.context_length + 1, goes_on=False),
            lay_out(sources, self.source_length + 1, goes_on=False),
        )


def sizes_of(corpus: Corpus, document: int) -> tuple[int, int]:
    """Returns the tokens of a pair's source and of its target."""
    source = int(corpus.turns(document)[0])
    return source, int(corpus.lengths[document]) - source


def first_fit(sizes: list[list[int]], room: tuple[int, int]) -> list[list[int]]:
    """Packs items of two sizes into bins.

    Args:
        sizes: of the items, none above `room`.
        room: of a bin.

    Returns:
        The numbers of the items in each bin.
    """
    bins: list[list[int]] = []
    left: list[list[int]] = []
    for item, size in enumerate(sizes):
        chosen = None
        for number in range(max(0, len(bins) - OPEN_ROWS), len(bins)):
            if all(need <= free for need, free in zip(size, left[number], strict=True)):
                chosen = number
                break
        if chosen is None:
            chosen = len(bins)
            bins.append([])
            left.append(list(room))
        bins[chosen].append(item)
        left[chosen] = [free - need for need, free in zip(size, left[chosen], strict=True)]
    return bins
