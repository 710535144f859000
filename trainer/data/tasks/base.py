"""Base class of synthetic tasks, whose examples are drawn as they are read, and their grading.

Letters: n tokens of an example, N tokens that were predicted.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.loss import IGNORE
from trainer.data.errors import DataError
from trainer.data.sources.base import Source
from trainer.data.split import is_held_out

Grades = dict[str, tuple[int, int]]  # {name of the count: (count, number of cases)}


class Example(NamedTuple):
    """One document of a task, or several that stay together in a row.

    Attributes:
        tokens: [n] int64, or [n, ...] where a token has columns.
        given: [n] bool, True = the token is not a target; used only without `targets`.
        targets: [n] int64, the target at each token, IGNORE = none; None = the next token, unless
            it is given.
        source: [s] int64, the tokens that a model reads beside these; None = the task has no second
            stream.
        documents: [n] int64, the document of each token, rising from 0; None = there is one.
        roles: [n] int64, roles of models.span; None = text, or GIVEN where `given` says so.
    """

    tokens: np.ndarray
    given: np.ndarray
    targets: np.ndarray | None = None
    source: np.ndarray | None = None
    documents: np.ndarray | None = None
    roles: np.ndarray | None = None


class SyntheticTask(Source, ABC):
    """Source whose documents are drawn from random numbers.

    Attributes that hold settings must be plain data: they are part of the fingerprint of the data.

    Args:
        held_out: share of all possible examples that are for evaluation and never trained on.
        per_row: examples in a row; None = as many as fit, which favours short ones at the end of a
            row.

    Attributes:
        vocabulary: token numbers are below it.
        longest: tokens of the longest example.
        opens: the token that begins a generated sample without a prompt, and that ends a sample.
        words: text of each token; None = its number.
        columns: sizes of what a token is made of, such as (5,); () = one number.
        aimed: True if the examples have targets of their own, which all of a task have, or none.
        longest_source: tokens of the longest source; 0 = examples have none.
        source_length: tokens in a row of sources; None = as many as in a row.
    """

    vocabulary: int
    longest: int
    opens: int = 0
    words: Sequence[str] | None = None
    columns: tuple[int, ...] = ()
    longest_source: int = 0
    source_length: int | None = None

    def __init__(self, *, held_out: float, per_row: int | None):
        super().__init__(tokenizer="numbers", held_out=held_out, on_error="raise")
        if per_row is not None:
            whole("per_row", per_row, 1)
        self.per_row = per_row

    @property
    def sets_targets(self) -> bool:
        """See Source.sets_targets."""
        return True

    @property
    def has_source(self) -> bool:
        """See Source.has_source."""
        return self.longest_source > 0

    @abstractmethod
    def example(self, random: np.random.Generator) -> Example:
        """Draws an example, as a pure function of the random numbers."""

    def drawn(self, random: np.random.Generator, split: str) -> Example | None:
        """Draws an example, or returns None where it belongs to the other split."""
        example = self.example(random)
        hashed = hashlib.blake2b(self.identity(example), digest_size=8).digest()
        number = np.array([int.from_bytes(hashed, "little")], np.uint64)
        held_out = bool(is_held_out(number, self.held_out)[0])
        return example if held_out == (split == "held_out") else None

    def identity(self, example: Example) -> bytes:
        """Returns the bytes whose hash decides if an example is held out.

        Examples with equal bytes are in the same split.
        """
        source = b"" if example.source is None else example.source.tobytes()
        return example.tokens.tobytes() + source

    def grade(self, predicted: np.ndarray, target: np.ndarray) -> Grades:
        """Counts right or wrong predictions.

        Args:
            predicted: [N] tokens.
            target: [N] tokens.

        Returns:
            Counts under names that are the same for every batch and rank.
        """
        return {"accuracy": (int((predicted == target).sum()), len(target))}

    def tokenizer(self) -> "Numbers":
        """Returns the tokenizer of the task's words."""
        return Numbers(self.vocabulary, self.opens, self.words)


class Numbers:
    """Tokenizer of a task: its words, or the numbers of its tokens, separated by blanks."""

    remark = ""

    def __init__(self, vocabulary: int, opens: int, words: Sequence[str] | None = None):
        self.vocabulary = vocabulary
        self.tokens = vocabulary
        self.end_of_text = opens
        self.words = [str(number) for number in range(vocabulary)] if words is None else list(words)
        self.fingerprint = f"numbers/{vocabulary}"

    def encode(self, text: str) -> np.ndarray:
        """Returns the token numbers of a text.

        Raises:
            ValueError: a word that the task does not have.
        """
        numbers = {word: number for number, word in enumerate(self.words)}
        tokens = []
        for word in text.split():
            if word not in numbers:
                example = " ".join(self.words[:3])
                raise ValueError(
                    f"{word!r} is no token of this task; write its tokens with blanks between, as"
                    f" in {example!r}"
                )
            tokens.append(numbers[word])
        return np.array(tokens, np.int64)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token numbers of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the words of tokens, separated by blanks."""
        return " ".join(self.words[int(i)] for i in ids)


def whole(name: str, value: object, least: int) -> int:
    """Checks that the setting data.NAME is a whole number of at least `least`, and returns it.

    Raises:
        DataError: it is not.
    """
    # Python counts True as the number 1.
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(
            f"data.{name}={value} is no whole number from {least} on; give {least} or more"
        )
    return value


def bounds(
    minimum: int,
    maximum: int,
    least: int = 1,
    names: tuple[str, str] = ("min_length", "max_length"),
) -> tuple[int, int]:
    """Checks two settings that bound a size, and returns them.

    Raises:
        DataError: one is no whole number from `least` on, or the first is above the second.
    """
    low = whole(names[0], minimum, least)
    high = whole(names[1], maximum, least)
    if low > high:
        raise DataError(
            f"data.{names[0]}={low} is above data.{names[1]}={high}; use data.{names[1]}={low} or"
            " more"
        )
    return low, high


def aimed(tokens: Sequence[int], targets: Sequence[int]) -> Example:
    """Builds an example with targets of its own."""
    given = np.ones(len(tokens), bool)
    return Example(np.array(tokens, np.int64), given, np.array(targets, np.int64))


def nothing(count: int) -> list[int]:
    """Returns the targets of tokens at which nothing is predicted."""
    return [IGNORE] * count
