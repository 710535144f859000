"""Pairs of a source and a target as tokens: one document each, its source first.

A pair travels from its file to the token cache as the JSON of two texts.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.data.documents import EncodedDocument
from trainer.data.errors import ReadReport
from trainer.data.sources.readers import Unread, sound
from trainer.data.tokenizers import Tokenizer, ended

NO_TARGET = "pairs without a target"
NO_SOURCE = "pairs without a source"
MALFORMED = "malformed pairs"


def pair_of(row: Any, fields: tuple[str, str], place: str) -> str | Unread:
    """Returns the JSON of a pair, or why a row is none.

    Args:
        row: names and values, such as an object of JSON.
        fields: names of the source and of the target.
        place: where the row lies, for messages.
    """
    if not isinstance(row, dict):
        return Unread(MALFORMED, f"{place} is not an object but {type(row).__name__}")
    texts = []
    for field, cause in zip(fields, (NO_SOURCE, NO_TARGET), strict=True):
        text = row.get(field)
        if text is None or text == "":
            return Unread(cause, f"{place} has no text in the field {field}")
        if not isinstance(text, str):
            return Unread(MALFORMED, f"{place}: {field} is not a text but {type(text).__name__}")
        if not sound(text):
            return Unread(
                MALFORMED,
                f"{place}: {field} holds half a surrogate pair, which is no character",
            )
        texts.append(text)
    return json.dumps(texts, ensure_ascii=False)


class PairEncoder:
    """Turns pairs into documents: the source and its end, then a start, the target and its end.

    Tokens of the source are marked as given, and the one cut between turns is where the row begins.
    The start is the end of text, which stands before any document.

    Args:
        tokenizer: of both texts.

    Attributes:
        fingerprint, learns_part: see DocumentEncoder.
    """

    learns_part = True

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        identity = f"pairs/1 {tokenizer.fingerprint}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def inspect(self, name: str, text: str, report: ReadReport) -> None:
        """See DocumentEncoder.inspect: a pair was checked where it was read."""

    def encode_all(
        self, names: Sequence[str], texts: Sequence[str], report: ReadReport
    ) -> Iterator[EncodedDocument | None]:
        """See DocumentEncoder.encode_all; texts are as `pair_of` returns them."""
        end = self.tokenizer.end_of_text
        for text in texts:
            parts = [self.tokenizer.encode(part) for part in json.loads(text)]
            if not all(len(part) for part in parts):
                report.silent += 1
                yield None
                continue
            source, target = (ended(part, end) for part in parts)
            start = np.array([end], target.dtype)
            tokens = np.concatenate([source, start, target])
            given = np.arange(len(tokens)) < len(source)
            yield EncodedDocument(tokens, given, np.array([len(source)], np.int64))
