"""The interface of every stream of batches."""

from abc import ABC, abstractmethod
from typing import Any

from trainer.data.batch import Batch
from trainer.data.tokenizers import Tokenizer

Cursor = dict[str, Any]


class Stream(ABC):
    """Batches as a pure function of cursors.

    Attributes: fingerprint: of the data, the tokenizer and all that shapes the rows; equal where
        batches are equal. vocabulary: token numbers are below it. rows: of a batch. pauses: whether
        a whole batch may have nothing to predict, because examples go on over several rows.
        batches: how many batches there are before padding (held-out data) or before an epoch has
        been read (training
            data); None where nobody knows.
    """

    fingerprint: str
    vocabulary: int
    rows: int
    tokenizer: Tokenizer
    batches: int | None
    pauses: bool = False

    @abstractmethod
    def start(self) -> Cursor:
        """The cursor of the first batch."""

    @abstractmethod
    def read(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The batch at a cursor and the cursor of the next. Raises ValueError for a cursor of other
        data."""

    @abstractmethod
    def describe(self, steps: int | None = None) -> str:
        """One line for the log: how much there is, what was left out, how often `steps` batches
        read it."""

    def admit(self, cursor: Cursor) -> None:
        """Raises ValueError unless the cursor belongs to this stream."""
        if cursor.get("fingerprint") != self.fingerprint:
            raise ValueError(
                "the place to go on from belongs to other data (fingerprint"
                f" {cursor.get('fingerprint')}, this data has {self.fingerprint}): documents,"
                " tokenizer, seed, context_length or data settings were changed; set them back, or"
                " begin anew in another run_dir"
            )
