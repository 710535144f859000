"""Batches of a run, step after step: `open_stream` gives a stream, a stream turns a cursor into a
batch and a cursor.

A cursor is a small dict that JSON can hold. It speaks of rows of the whole run, so it is valid for
any number of ranks, any context degree and any micro-batch; a fingerprint of the data and of what
shapes the rows guards it.
"""

import hashlib

import numpy as np

from trainer.data.batch import Batch
from trainer.data.cache import corpus_of
from trainer.data.corpus import Corpus
from trainer.data.errors import NONE_HELD_OUT, ONE_DOCUMENT, DataError, ReadReport
from trainer.data.packing import Concatenation, PackedRow, rows_of, stack
from trainer.data.sources.base import Local
from trainer.data.split import arrange, divide
from trainer.data.streams.base import Cursor, Stream
from trainer.errors import BAD_CONFIG


class PackedStream(Stream):
    """Rows of local documents: an epoch after an epoch, each in an order of its own, without end.

    Documents are laid end to end in the epoch's order and the rows of that are dealt in another
    order of the epoch: else the rows of one long document would fill whole batches. Under `lanes`
    rows go on where rows ended instead.

    Held-out documents keep one order whatever the seed, are read once, and are followed by rows of
    padding: the first N batches are the same in every evaluation of every run.
    """

    def __init__(
        self,
        source: Local,
        *,
        context_length: int,
        rows: int,
        seed: int,
        split: str = "train",
        lanes: bool = False,
    ):
        self.tokenizer = source.tokenizer()
        self.corpus: Corpus = corpus_of(source, self.tokenizer)
        self.report = ReadReport.of(self.corpus.facts["report"])
        self.context_length = context_length
        self.rows = rows
        self.seed = seed
        self.lanes = lanes
        self.endless = split == "train"
        train, held_out = divide(self.corpus.hashes, source.held_out)
        self.documents = train if self.endless else held_out
        if not len(self.documents):
            raise DataError(ONE_DOCUMENT if source.held_out else NONE_HELD_OUT, BAD_CONFIG)
        self.tokens = int(self.corpus.lengths[self.documents].sum())
        self.epoch_rows = rows_of(self.tokens, context_length)
        self.batches = -(-self.epoch_rows // rows)
        self.vocabulary = self.tokenizer.vocabulary
        shape = (
            split,
            source.held_out,
            context_length,
            seed if self.endless else None,
            rows if lanes else None,
        )
        said = f"{self.corpus.facts['fingerprint']} {shape}"
        self.fingerprint = hashlib.blake2b(said.encode(), digest_size=12).hexdigest()
        self._epochs: dict[int, Concatenation] = {}
        self._orders: dict[int, np.ndarray] = {}

    def start(self) -> Cursor:
        return {"rows": 0, "fingerprint": self.fingerprint}

    def read(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        self.admit(cursor)
        first = cursor["rows"]
        pick = self._lane_row if self.lanes else self._row
        batch = stack([pick(row) for row in range(first, first + self.rows)])
        return batch, {"rows": first + self.rows, "fingerprint": self.fingerprint}

    def _row(self, number: int) -> PackedRow:
        epoch, row = divmod(number, self.epoch_rows) if self.endless else (0, number)
        if row < self.epoch_rows:
            row = int(self._order(epoch)[row])
        return self._epoch(epoch).row(row, goes_on=False)

    def _order(self, epoch: int) -> np.ndarray:
        """[epoch_rows] the order in which an epoch's rows are read."""
        if epoch not in self._orders:
            rows = np.arange(self.epoch_rows, dtype=np.uint64)
            kept = {number: self._orders[number] for number in self._orders if number == epoch - 1}
            self._orders = kept | {epoch: arrange(rows, self.seed if self.endless else 0, epoch)}
        return self._orders[epoch]

    def _lane_row(self, number: int) -> PackedRow:
        """Lane i of an epoch's rows reads an i-th part of them, one after another; a shorter part
        ends in padding."""
        step, lane = divmod(number, self.rows)
        epoch, step = divmod(step, self.batches or 1) if self.endless else (0, step)
        first, last = (self.epoch_rows * i // self.rows for i in (lane, lane + 1))
        return self._epoch(epoch).row(
            first + step if first + step < last else self.epoch_rows + 1, goes_on=True
        )

    def _epoch(self, epoch: int) -> Concatenation:
        """Documents in the epoch's order; numbered on from epoch to epoch, so that a memory never
        mixes two up."""
        if epoch not in self._epochs:
            order = arrange(
                self.corpus.hashes[self.documents], self.seed if self.endless else 0, epoch
            )
            laid = Concatenation(
                self.corpus,
                self.documents[order],
                self.context_length,
                first_number=epoch * len(order),
            )
            kept = {number: self._epochs[number] for number in self._epochs if number == epoch - 1}
            self._epochs = kept | {epoch: laid}
        return self._epochs[epoch]

    def describe(self, steps: int | None = None) -> str:
        kind = "training" if self.endless else "held-out"
        words = [f"{len(self.documents)} {kind} documents, {self.tokens} tokens"]
        words.append(
            f"{self.epoch_rows} rows of {self.context_length} ({self.batches} batches of"
            f" {self.rows})"
        )
        if steps is not None and self.endless:
            words.append(f"{steps} steps read them {steps * self.rows / self.epoch_rows:.2f} times")
        words += [remark for remark in (self.report.text(), self.tokenizer.remark) if remark]
        return "; ".join(words)
