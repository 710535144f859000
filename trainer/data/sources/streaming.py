"""Documents of streamed data one after another, with a state from which reading goes on exactly."""

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from trainer.data.errors import DataError, ReadReport
from trainer.data.sources.base import Source
from trainer.data.sources.readers import Unread, reason, sound, too_large
from trainer.data.split import digest, is_held_out

SAMPLED = 1000  # documents in which a first one with text is looked for


class Examples(Protocol):
    """A data set that is read in order and can go on where it was (`datasets.IterableDataset` is
    one)."""

    def __iter__(self) -> Iterator[dict[str, Any] | Unread]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class StreamingSource(Source, ABC):
    """Data too large to be tokenised first: read as it comes, in a fixed order."""

    text_field = "text"

    @abstractmethod
    def open(self) -> Examples:
        """The data set at its beginning. Raises ValueError where it cannot be had."""

    def leave_out(self, report: ReadReport) -> None:
        """Count in the report what the data leaves out by its nature."""

    @abstractmethod
    def identity(self) -> str:
        """The name of the data in messages."""

    def content(self) -> str:
        """Identifies the data by its content, wherever it lies; part of a cursor's fingerprint."""
        return self.identity()

    def sample(self) -> str:
        """A digest of the first document, which tells data of one name apart. Raises ValueError
        where there is none."""
        report = ReadReport("skip")
        for _, text in itertools.islice(self.texts(report), SAMPLED):
            if text is not None:
                return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        raise DataError(
            f"{self.identity()} has no text in the field {self.text_field!r} of its first documents"
            f" (at most {SAMPLED} were looked at; {report.text() or 'there is none'}); name the"
            " field with data.text_field, or give other data"
        )

    def texts(
        self, report: ReadReport, examples: Examples | None = None, first: int = 0
    ) -> Iterator[tuple[int, str | None]]:
        """(number, text) of every document from `first` on; no text where it is empty or was left
        out."""
        examples = examples if examples is not None else self.open()
        number = first
        try:
            for number, example in enumerate(examples, first):
                yield number, self._text(example, number, report)
        except DataError:
            raise
        except Exception as error:  # readers, decoders and networks each have errors of their own
            said = f"{type(error).__name__}: {reason(error)}"
            raise DataError(
                f"{self.identity()} cannot be read on behind document {number} ({said}); check the"
                " data or the network, then run the same command again: it goes on from the last"
                " checkpoint"
            ) from error

    def _text(
        self, example: dict[str, Any] | Unread, number: int, report: ReadReport
    ) -> str | None:
        place = f"{self.identity()} document {number}"
        field = self.text_field
        if isinstance(example, Unread):
            report.fault(*example)
        elif field not in example:
            names = ", ".join(example)
            report.fault(
                "documents without text",
                f"{place} has no field {field!r} (it has: {names}); see data.text_field",
            )
        elif not isinstance(example[field], str):
            kind = type(example[field]).__name__
            report.fault(
                "documents without text", f"{place}: field {field!r} is not text but {kind}"
            )
        elif not sound(example[field]):
            report.fault(
                "documents not in UTF-8", f"{place}: field {field!r} holds half a surrogate pair"
            )
        elif len(example[field]) > self.max_document_bytes:
            report.fault(*too_large(place, len(example[field]), self.max_document_bytes))
        elif not example[field]:
            report.empty += 1
        else:
            return example[field]
        return None


class DocumentReader:
    """The documents of one split, in order; training documents begin again after the last.

    Attributes:
        dealt: documents given out so far, over all epochs.
        read: documents looked at since the last `state`.
    """

    def __init__(
        self, source: StreamingSource, split: str, report: ReadReport, state: dict[str, Any]
    ):
        self.source = source
        self.split = split
        self.report = report
        self.epoch = state["epoch"]
        self.number = state["number"]
        self.dealt = state["dealt"]
        self.fresh = state["fresh"]  # documents given out in this epoch
        self.read = 0
        self.examples = source.open()
        self.beginning = _plain(self.examples.state_dict())
        self._go_to(state["state"])

    @staticmethod
    def start() -> dict[str, Any]:
        """The state before the first document."""
        return {"epoch": 0, "number": 0, "dealt": 0, "fresh": 0, "state": None}

    def _go_to(self, state: dict[str, Any] | None) -> None:
        """Read on from a state of the data set; None = its beginning."""
        try:
            self.examples.load_state_dict(self.beginning if state is None else state)
        except (
            Exception
        ) as error:  # each library has errors of its own for a state that it did not give
            reason = f"{type(error).__name__}: {error}"
            raise DataError(
                f"{self.source.identity()} cannot be read on from the state in the checkpoint"
                f" ({reason}); name another checkpoint, or begin again in another run_dir"
            ) from error
        self.texts = self.source.texts(self.report, self.examples, self.number)

    def next(self) -> str | None:
        """The next document; None behind the last held-out one. Raises DataError where an epoch
        holds none."""
        while True:
            for number, text in self.texts:
                self.number = number + 1
                self.read = self.read + 1
                if text is not None and self._belongs(number):
                    self.dealt = self.dealt + 1
                    self.fresh = self.fresh + 1
                    return text
            if self.split == "held_out":
                return None
            if not self.fresh:
                left_out = self.report.text() or "all of it is held out"
                raise DataError(
                    f"{self.source.identity()} holds no document to train on ({left_out}); give"
                    " other data"
                )
            self.epoch = self.epoch + 1
            self.number = 0
            self.fresh = 0
            self._go_to(None)

    def _belongs(self, number: int) -> bool:
        hashes = np.array([digest(f"document {number}")], np.uint64)
        return bool(is_held_out(hashes, self.source.held_out)[0]) == (self.split == "held_out")

    def state(self) -> dict[str, Any]:
        """Returns the place at which the next document begins, as JSON can hold it."""
        self.read = 0
        state = _plain(self.examples.state_dict()) if self.number else None
        found = {
            "epoch": self.epoch,
            "number": self.number,
            "dealt": self.dealt,
            "fresh": self.fresh,
        }
        return found | {"state": state}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A copy as JSON would give it back."""
    return json.loads(json.dumps(state))
