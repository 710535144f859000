"""Batches of local documents, packed into rows without padding between them."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.batch import Batch, first_numbers
from trainer.data.cache import corpus_of
from trainer.data.corpus import Corpus
from trainer.data.errors import NONE_HELD_OUT, ONE_DOCUMENT, DataError, ReadReport
from trainer.data.packing import Concatenation, PackedRow, rows_of, stack
from trainer.data.sources.base import Local
from trainer.data.split import arrange, divide
from trainer.data.streams.base import Cursor, OwnRows, RowSize, StreamOfRows
from trainer.data.whole_documents import Cuts, WholeDocuments, cut_at_turns
from trainer.errors import BAD_CONFIG

NOTHING_LEARNED = (
    "context_length={}: no row of the conversations holds a token of an answer; use a larger"
    " context_length"
)


class PackedStream(StreamOfRows):
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

    def read_rows(self, cursor: Cursor, first: int, last: int) -> OwnRows:
        """See Stream.read_rows; of the other rows only the lengths of documents are looked at."""
        self.admit(cursor)
        begin = cursor["rows"]
        stop = min(last, self.rows)
        # A rank without rows reads one to know how its padding looks.
        start = min(first, stop - 1)
        epochs, numbers = self._places(np.arange(begin, begin + stop))
        rows = [
            self._epoch(epoch).row(number, goes_on=self.lanes)
            for epoch, number in zip(epochs[start:].tolist(), numbers[start:].tolist())
        ]
        batch = self._stack(rows).part(first - start, last - start)
        counts = self._documents(epochs, numbers)
        following = {"rows": begin + self.rows, "fingerprint": self.fingerprint}
        return OwnRows(batch, following, first_numbers(counts, first, last))

    def row_size(self, cursor: Cursor) -> RowSize | None:
        """See Stream.row_size."""
        if self.lanes:
            return None
        self.admit(cursor)
        epochs, numbers = self._places(np.arange(cursor["rows"], cursor["rows"] + 1))
        # Rows behind the last of held-out data, which have no tokens, are not asked for.
        tokens = self._epoch(int(epochs[0])).row_tokens(int(numbers[0]))
        following = {"rows": cursor["rows"] + 1, "fingerprint": self.fingerprint}
        return RowSize(tokens, int(self._documents(epochs, numbers)), following)

    def _documents(self, epochs: np.ndarray, numbers: np.ndarray) -> Tensor:
        """Counts the documents of rows of epochs, [n, 1] int64."""
        counts = np.zeros(len(numbers), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            counts[here] = self._epoch(epoch).documents(numbers[here], goes_on=self.lanes)
        return torch.from_numpy(counts)[:, None]

    def _cut(self) -> Cuts:
        """Returns the pieces of documents that rows hold whole."""
        return cut_at_turns(self.corpus, self.documents, self.context_length)

    def _stack(self, rows: list[PackedRow]) -> Batch:
        """Returns rows as a batch."""
        return stack(rows)

    @property
    def _order_seed(self) -> int:
        return self.seed if self.endless else 0

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the epochs of rows of the run, and their numbers in these, [n] int64 each."""
        if self.lanes:
            return self._lane_places(numbers)
        epochs = numbers // self.epoch_rows if self.endless else np.zeros_like(numbers)
        places = numbers - epochs * self.epoch_rows
        for epoch in np.unique(epochs).tolist():
            # Rows behind the last of held-out data are padding and have no order.
            here = (epochs == epoch) & (places < self.epoch_rows)
            places[here] = self._order(epoch)[places[here]]
        return epochs, places

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the order in which an epoch's rows are read, [epoch_rows]."""
        if epoch not in self._orders:
            rows = np.arange(self.epoch_rows, dtype=np.uint64)
            order = arrange(rows, self._order_seed, epoch)
            self._orders = _with_epoch(self._orders, epoch, order)
        return self._orders[epoch]

    def _lane_places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `_places` does where lanes continue.

        Lane i reads the i-th part of an epoch's rows, one after another; a shorter part ends in
        padding.
        """
        steps, lanes = np.divmod(numbers, self.rows)
        epochs = np.zeros_like(numbers)
        if self.endless:
            epochs, steps = np.divmod(steps, self.batches or 1)
        places = self.epoch_rows * lanes // self.rows + steps
        stops = self.epoch_rows * (lanes + 1) // self.rows
        return epochs, np.where(places < stops, places, self.epoch_rows + 1)

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
