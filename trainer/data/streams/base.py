"""Interface of all streams of batches."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.tokenizers import Tokenizer

Cursor = dict[str, Any]


class OwnRows(NamedTuple):
    """Some rows of a batch, which one data rank computes.

    Attributes:
        batch: the rows, with rows of padding where the batch has fewer.
        cursor: of the next batch.
        first_numbers: [rows, 1] int64, added to the numbers of a row's documents: then no two rows
            of the step share one, and a row's are the same whoever reads it.
        whole: the batch that they were cut from, where all of it was read; None where it was not.
    """

    batch: Batch
    cursor: Cursor
    first_numbers: Tensor
    whole: Batch | None = None


class RowSize(NamedTuple):
    """The size of a row that was not read.

    Attributes:
        tokens: that a model would read, without padding.
        documents: one more than the largest number of a document, among targets too.
        cursor: behind the row.
    """

    tokens: int
    documents: int
    cursor: Cursor


class Stream(ABC):
    """Batches as a pure function of cursors.

    A cursor is a small dict that JSON can hold. It counts rows of the whole run, so it is valid for
    any number of ranks, any context degree and any micro-batch.

    Attributes:
        fingerprint: of the data, the tokenizer and all settings that shape the rows; equal where
            batches are equal.
        vocabulary: token numbers are below it.
        rows: of a batch.
        tokenizer: of the data.
        batches: number of batches before padding (held-out data) or in an epoch (training data);
            None if unknown.
        by_source: of held-out data that is mixed, the same documents by the name of their source.
        pauses: True if a whole batch may have nothing to predict, because examples extend over
            several rows.
    """

    fingerprint: str
    vocabulary: int
    rows: int
    tokenizer: Tokenizer
    batches: int | None
    pauses: bool = False
    by_source: Mapping[str, "Stream"] = MappingProxyType({})

    @abstractmethod
    def start(self) -> Cursor:
        """Returns the cursor of the first batch."""

    @abstractmethod
    def read(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """Returns the batch at a cursor and the cursor of the next one.

        Raises:
            ValueError: the cursor belongs to other data.
        """

    def read_rows(self, cursor: Cursor, first: int, last: int) -> OwnRows:
        """Returns rows first .. last - 1 of the batch at a cursor, as a data rank trains on them.

        This reads the batch and cuts it, which is right for every stream. One that finds a row
        without the rows before it is a StreamOfRows. Not so streamed documents, since the place of
        the next batch depends on the tokens of all lanes.

        Raises:
            ValueError: the cursor belongs to other data.
        """
        whole, following = self.read(cursor)
        batch = whole.part(first, last)
        return OwnRows(batch, following, whole.first_numbers(first, last), whole)

    def row_size(self, cursor: Cursor) -> RowSize | None:
        """Returns the size of the row at a cursor, of a stream of one row a batch.

        None where that is not known without reading it.
        """
        return None

    @abstractmethod
    def describe(self, steps: int | None = None) -> str:
        """Returns one line for the log: the amount of data, what was left out, and the epochs.

        Args:
            steps: of the run, for the number of epochs; None leaves it out.
        """

    def follow(self, cursor: Cursor) -> Cursor:
        """Returns the cursor of the first batch behind rows of another stream.

        Args:
            cursor: where the other stream ended.
        """
        return self.start()

    def progress(self, cursor: Cursor) -> str:
        """Returns one line for the log about what was read up to a cursor; empty for none."""
        return ""

    def admit(self, cursor: Cursor) -> None:
        """Checks that a cursor belongs to this stream.

        Raises:
            ValueError: it does not.
        """
        if cursor.get("fingerprint") != self.fingerprint:
            raise ValueError(
                "the place to go on from belongs to other data (fingerprint"
                f" {cursor.get('fingerprint')}, this data has {self.fingerprint}): documents,"
                " tokenizer, seed, context_length or data settings were changed; set them back, or"
                " begin anew in another run_dir"
            )


class StreamOfRows(Stream):
    """A stream that finds a row without the rows before it.

    A rank's reading then does not grow with the number of ranks: local documents are found by their
    lengths, and rows of synthetic tasks are functions of their numbers. A mixture reads the rows of
    others as far as its sources do not know their sizes.
    """

    def read(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """See Stream.read."""
        rows = self.read_rows(cursor, 0, self.rows)
        return rows.batch, rows.cursor

    @abstractmethod
    def read_rows(self, cursor: Cursor, first: int, last: int) -> OwnRows:
        """See Stream.read_rows."""
