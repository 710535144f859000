"""Sets: several elements in no order, and one answer for all of them."""

import unicodedata
from typing import Literal

import numpy as np

from models.loss import IGNORE
from models.ranges import Many
from trainer.data.errors import DataError
from trainer.data.tasks.base import Example, SyntheticTask, bounds, whole

TASKS = ("distinct", "max", "characters")
LATIN = range(0x41, 0x250)  # basic Latin to Latin Extended-B


class Sets(SyntheticTask):
    """A document is a set, and a question about it is answered at its first token.

    Args:
        task: distinct: how many different elements there are. max: which element is the largest.
            characters: how many different letters there are, where an element is a Latin letter of
            either case, with any accent or none, and only the letter counts.
        min_size, max_size: elements of a set, drawn with repetition.
        symbols: different elements of distinct and max.
        held_out, per_row: as in SyntheticTask. Two orders of a set are the same set.

    Source: Lee et al. 2019 (arXiv:1810.00825), sections 5.1 and 5.2: the largest of real numbers,
    and different characters among images of handwriting; here elements are tokens.
    """

    aimed = True

    def __init__(
        self,
        *,
        task: Literal["distinct", "max", "characters"] = "distinct",
        min_size: Many = 6,
        max_size: Many = 10,
        symbols: Many = 64,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        if task not in TASKS:
            raise DataError(f"data.task={task} is unknown; use {', '.join(TASKS)}")
        self.task = task
        if min_size == 0:
            raise DataError("data.min_size=0: a set of nothing has no answer; use 1 or more")
        self.sizes = bounds(min_size, max_size, names=("min_size", "max_size"))
        self.longest = max_size
        self.letters: list[int] = []
        elements = whole("symbols", symbols, 2)
        if task == "characters":
            characters, self.letters = latin_letters()
            elements = len(characters)
        self.elements = elements
        # A number of elements is a token too.
        self.vocabulary = max(elements, max_size + 1)
        if task == "characters":
            more = [str(number) for number in range(elements, self.vocabulary)]
            self.words = [*characters, *more]

    def example(self, random: np.random.Generator) -> Example:
        size = int(random.integers(*self.sizes, endpoint=True))
        tokens = random.integers(0, self.elements, size)
        targets = np.full(size, IGNORE, np.int64)
        targets[0] = self.answer(tokens)
        return Example(tokens.astype(np.int64), np.ones(size, bool), targets)

    def answer(self, tokens: np.ndarray) -> int:
        """Returns the answer of a set, as a token."""
        if self.task == "max":
            return int(tokens.max())
        if self.task == "characters":
            tokens = np.array(self.letters)[tokens]
        return len(np.unique(tokens))

    def identity(self, example: Example) -> bytes:
        """See SyntheticTask: that of the set, whatever its order."""
        return np.sort(example.tokens).tobytes()


def latin_letters() -> tuple[list[str], list[int]]:
    """Returns Latin characters, and for each the number of its letter, 0 for A to 25 for Z."""
    characters = []
    letters = []
    for code in LATIN:
        character = chr(code)
        base = unicodedata.normalize("NFD", character)[0].lower()
        if character.isalpha() and "a" <= base <= "z":
            characters.append(character)
            letters.append(ord(base) - ord("a"))
    return characters, letters
