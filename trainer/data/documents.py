"""Documents as tokens, with what is known of each token, and how plain text becomes one."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from trainer.data.errors import ReadReport
from trainer.data.tokenizers import Tokenizer, ended


class EncodedDocument(NamedTuple):
    """One document.

    Attributes:
        tokens: [n], its end among them.
        given: [n] bool, True = the token is read and never a target; None = every token is one.
        turns: numbers of the tokens, from 1 to n - 1, before which it may be cut; None where any
            place is as good.
    """

    tokens: np.ndarray
    given: np.ndarray | None = None
    turns: np.ndarray | None = None


class DocumentEncoder(Protocol):
    """Turns the texts that a source reads into documents.

    Attributes:
        fingerprint: equal where equal texts give equal documents.
        learns_part: whether documents have tokens that are given, and turns.
    """

    fingerprint: str
    learns_part: bool

    def encode_all(
        self, names: Sequence[str], texts: Sequence[str], report: ReadReport
    ) -> Iterator[EncodedDocument | None]:
        """Yields the document of each text; None where it has none, which the report counts."""
        ...

    def inspect(self, name: str, text: str, report: ReadReport) -> None:
        """Reports why a text has no document, as far as that is known without its tokens."""
        ...


class PlainText:
    """A text is a document, with its end; every token is learned."""

    learns_part = False

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.fingerprint = tokenizer.fingerprint

    def encode_all(
        self, names: Sequence[str], texts: Sequence[str], report: ReadReport
    ) -> Iterator[EncodedDocument | None]:
        """See DocumentEncoder.encode_all."""
        for tokens in self.tokenizer.encode_many(texts):
            if len(tokens):
                yield EncodedDocument(ended(tokens, self.tokenizer.end_of_text))
            else:
                report.silent += 1
                yield None

    def inspect(self, name: str, text: str, report: ReadReport) -> None:
        """See DocumentEncoder.inspect: any text is a document."""
