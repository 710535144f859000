"""Tasks that are made up as they are read: what an example is, and how a model's answers to it are
graded.

Letters: n tokens of an example, N tokens that were predicted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.loss import IGNORE
from trainer.data.errors import DataError
from trainer.data.sources.base import Source

Grades = dict[str, tuple[int, int]]  # {what is counted: (how many, of how many)}


class Example(NamedTuple):
    """One document of a task.

    Attributes: tokens: [n] int64. given: [n] bool, True = nobody has to predict this token. Counts
        only where there are no targets. targets: [n] int64, what is to be said at each token,
        IGNORE = nothing; None = the next token, unless it is given.
    """

    tokens: np.ndarray
    given: np.ndarray
    targets: np.ndarray | None = None


class SyntheticTask(Source):
    """A source whose documents are drawn from random numbers: the parent of all tasks.

    Args:
        held_out: share of all possible examples kept for evaluation: they are never trained on.
        per_row: examples in a row; None = as many as fit, which favours short ones at the end of a
            row.

    Attributes:
        vocabulary: token numbers are below it.
        longest: tokens of the longest example.
        opens: the token that a generated sample begins with where there is no prompt, and ends at.
        words: how tokens are shown; None = as numbers.
        aimed: whether examples have targets of their own. All of a task do, or none.

    Settings that are kept as attributes must be plain data: they are part of the fingerprint of the
    data.
    """

    vocabulary: int
    longest: int
    opens: int = 0
    words: Sequence[str] | None = None
    aimed: bool = False

    def __init__(self, *, held_out: float, per_row: int | None):
        super().__init__(tokenizer="numbers", held_out=held_out, on_error="raise")
        if per_row is not None:
            whole("per_row", per_row, 1)
        self.per_row = per_row

    def example(self, random: np.random.Generator) -> Example:
        """An example, drawn from these random numbers and nothing else."""
        raise NotImplementedError

    def identity(self, example: Example) -> bytes:
        """What decides whether an example is held out: examples that are equal in it fall on the
        same side."""
        return example.tokens.tobytes()

    def grade(self, predicted: np.ndarray, target: np.ndarray) -> Grades:
        """Count what is right, or wrong, in predicted tokens [N] whose targets [N] are known; the
        names never vary."""
        return {"accuracy": (int((predicted == target).sum()), len(target))}

    def tokenizer(self) -> "Numbers":
        return Numbers(self.vocabulary, self.opens, self.words)


class Numbers:
    """The tokens of a task as text: their numbers, or the task's words for them, with blanks
    between."""

    remark = ""

    def __init__(self, vocabulary: int, opens: int, words: Sequence[str] | None = None):
        self.vocabulary = vocabulary
        self.end_of_text = opens
        self.words = [str(number) for number in range(vocabulary)] if words is None else list(words)
        self.fingerprint = f"numbers/{vocabulary}"

    def encode(self, text: str) -> np.ndarray:
        """Raises ValueError for what is none of the task's words."""
        numbers = {word: number for number, word in enumerate(self.words)}
        if unknown := [word for word in text.split() if word not in numbers]:
            few = " ".join(self.words[:3])
            raise ValueError(
                f"{unknown[0]!r} is no token of this task; write its tokens with blanks between, as"
                f" in {few!r}"
            )
        return np.array([numbers[word] for word in text.split()], np.int64)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(self.words[int(i)] for i in ids)


def whole(name: str, value: object, least: int) -> int:
    """The setting data.NAME, which must be a whole number of at least `least`; else a DataFault
    that says so."""
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
    """Two settings that bound a size, the second no less than the first; else a DataFault that says
    so."""
    low = whole(names[0], minimum, least)
    high = whole(names[1], maximum, least)
    if low > high:
        raise DataError(
            f"data.{names[0]}={low} is above data.{names[1]}={high}; use data.{names[1]}={low} or"
            " more"
        )
    return low, high


def aimed(tokens: Sequence[int], targets: Sequence[int]) -> Example:
    """An example with targets of its own."""
    return Example(
        np.array(tokens, np.int64), np.ones(len(tokens), bool), np.array(targets, np.int64)
    )


def nothing(count: int) -> list[int]:
    """The targets of tokens at which nothing is to be said."""
    return [IGNORE] * count
