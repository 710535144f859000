"""Batches of local documents, packed into rows without padding between them."""

import hashlib
from typing import Any

import numpy as np

from trainer.data.batch import Batch
from trainer.data.cache import corpus_of
from trainer.data.corpus import Corpus
from trainer.data.errors import NONE_HELD_OUT, ONE_DOCUMENT, DataError, ReadReport
from trainer.data.packing import Concatenation, PackedRow, rows_of, stack
from trainer.data.sources.base import Local
from trainer.data.split import arrange, divide
from trainer.data.streams.base import Cursor, Stream
from trainer.data.whole_documents import Cuts, WholeDocuments, cut_at_turns
from trainer.errors import BAD_CONFIG

NOTHING_LEARNED = (
    "context_length={}: no row of the conversations holds a token of an answer; use a larger"
    " context_length"
)


class PackedStream(Stream):
    """Rows of local documents, one epoch after another in an order of its own, without end.

    Documents are laid end to end in the epoch's order, and the rows of that are read in a second
    order of the epoch: otherwise the rows of one long document would fill whole batches. Under
    `lanes` rows continue where rows ended instead. Documents of which a part is given, such as
    conversations, are packed whole.

    Held-out documents keep one order under every seed, are read once, and are followed by rows of
    padding: the first N batches are the same in every evaluation of every run.

    Args:
        source: the documents.
        context_length, rows, seed, split, lanes: see open_stream.

    Raises:
        ValueError: there is no document in the split, or data that cannot be read.
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
        self.endless = split == "train"
        apart = source.apart()
        self.corpus: Corpus = corpus_of(
            source if apart is None or self.endless else apart, self.tokenizer
        )
        self.report = ReadReport.of(self.corpus.facts["report"])
        self.context_length = context_length
        self.rows = rows
        self.seed = seed
        self.lanes = lanes
        if apart is None:
            train, held_out = divide(self.corpus.hashes, source.held_out)
            self.documents = train if self.endless else held_out
        else:
            self.documents = np.arange(len(self.corpus.hashes))
        if not len(self.documents):
            raise DataError(ONE_DOCUMENT if source.held_out else NONE_HELD_OUT, BAD_CONFIG)
        self.tokens = int(self.corpus.lengths[self.documents].sum())
        # A memory has read what came before in the document, so its rows need no whole ones.
        self.cuts: Cuts | None = None
        if self.corpus.learns_part and not lanes:
            self.cuts = self._cut()
            self.epoch_rows = len(self._whole(0).bins)
        else:
            self.epoch_rows = rows_of(self.tokens, context_length)
        self.batches = -(-self.epoch_rows // rows)
        if not self.epoch_rows:
            raise DataError(NOTHING_LEARNED.format(context_length), BAD_CONFIG)
        self.vocabulary = self.tokenizer.vocabulary
        # None for settings without influence on the rows, so that a change of them is no other
        # data.
        order_seed = seed if self.endless else None
        lane_count = rows if lanes else None
        fraction = source.held_out if apart is None else None
        shape = (split, fraction, context_length, order_seed, lane_count)
        identity = f"{self.corpus.facts['fingerprint']} {shape}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
        self._epochs: dict[int, Concatenation | WholeDocuments] = {}
        self._orders: dict[int, np.ndarray] = {}

    def start(self) -> Cursor:
        """See Stream.start."""
        return {"rows": 0, "fingerprint": self.fingerprint}

    def read(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """See Stream.read."""
        self.admit(cursor)
        first = cursor["rows"]
        read_row = self._lane_row if self.lanes else self._row
        batch = self._stack([read_row(number) for number in range(first, first + self.rows)])
        return batch, {"rows": first + self.rows, "fingerprint": self.fingerprint}

    def _cut(self) -> Cuts:
        """Returns the pieces of documents that rows hold whole."""
        return cut_at_turns(self.corpus, self.documents, self.context_length)

    def _stack(self, rows: list[PackedRow]) -> Batch:
        """Returns rows as a batch."""
        return stack(rows)

    @property
    def _order_seed(self) -> int:
        return self.seed if self.endless else 0

    def _row(self, number: int) -> PackedRow:
        """Returns row `number` of the run, in the order of its epoch."""
        epoch = 0
        if self.endless:
            epoch, number = divmod(number, self.epoch_rows)
        # Rows behind the last of held-out data are padding and have no order.
        if number < self.epoch_rows:
            number = int(self._order(epoch)[number])
        return self._epoch(epoch).row(number, goes_on=False)

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the order in which an epoch's rows are read, [epoch_rows]."""
        if epoch not in self._orders:
            rows = np.arange(self.epoch_rows, dtype=np.uint64)
            order = arrange(rows, self._order_seed, epoch)
            self._orders = _with_epoch(self._orders, epoch, order)
        return self._orders[epoch]

    def _lane_row(self, number: int) -> PackedRow:
        """Returns row `number` of the run where lanes continue.

        Lane i reads the i-th part of an epoch's rows, one after another; a shorter part ends in
        padding.
        """
        step, lane = divmod(number, self.rows)
        epoch = 0
        if self.endless:
            epoch, step = divmod(step, self.batches or 1)
        first = self.epoch_rows * lane // self.rows
        stop = self.epoch_rows * (lane + 1) // self.rows
        row = first + step
        if row >= stop:
            row = self.epoch_rows + 1
        return self._epoch(epoch).row(row, goes_on=True)

    def _whole(self, epoch: int) -> WholeDocuments:
        """Returns whole documents in the rows of an epoch."""
        assert self.cuts is not None, "only such documents are cut"
        return WholeDocuments(
            self.corpus,
            self.cuts.extents,
            self.context_length,
            seed=self._order_seed,
            epoch=epoch,
        )

    def _epoch(self, epoch: int) -> Concatenation | WholeDocuments:
        """Returns the documents in the epoch's order."""
        if epoch not in self._epochs and self.cuts is not None:
            self._epochs = _with_epoch(self._epochs, epoch, self._whole(epoch))
        elif epoch not in self._epochs:
            order = arrange(self.corpus.hashes[self.documents], self._order_seed, epoch)
            # Numbers continue from epoch to epoch: a memory must not take a document that is read
            # again for the same one.
            documents = Concatenation(
                self.corpus,
                self.documents[order],
                self.context_length,
                first_number=epoch * len(order),
            )
            self._epochs = _with_epoch(self._epochs, epoch, documents)
        return self._epochs[epoch]

    def describe(self, steps: int | None = None) -> str:
        """See Stream.describe."""
        kind = "training" if self.endless else "held-out"
        words = [f"{len(self.documents)} {kind} documents, {self.tokens} tokens"]
        words.append(
            f"{self.epoch_rows} rows of {self.context_length} ({self.batches} batches of"
            f" {self.rows})"
        )
        if steps is not None and self.endless:
            words.append(f"{steps} steps read them {steps * self.rows / self.epoch_rows:.2f} times")
        if self.cuts is not None:
            words.append("whole documents in every row")
            words.append(self.cuts.text())
        words += [self.report.text(), self.tokenizer.remark]
        words = [word for word in words if word]
        return "; ".join(words)


def _with_epoch(cache: dict[int, Any], epoch: int, value: Any) -> dict[int, Any]:
    """Returns a cache with `epoch` added, and of the others only the one before it."""
    # A batch may span two epochs; older ones would pile up over a long run.
    recent: dict[int, Any] = {}
    if epoch - 1 in cache:
        recent[epoch - 1] = cache[epoch - 1]
    recent[epoch] = value
    return recent
