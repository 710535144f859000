"""Repeat copy: say again what was shown, as many times as asked, then stop."""

import numpy as np

from models.ranges import Few, Many
from trainer.data.tasks.base import Example, bounds
from trainer.data.tasks.vectors import MARKS, Vectors


class RepeatCopy(Vectors):
    """A sequence of random vectors and a number; the sequence is to be said so many times, then
    END.

    Args:
        min_length, maximum: vectors in a sequence.
        min_repeats, most: times that it is to be said.
        bits: of a vector.
        held_out, per_row: as in Task.

    Source: Graves et al. 2014 (arXiv:1410.5401), section 4.2. There the number is a real one on a
    channel of its own; here each number is a mark, so that none beyond `most` can be asked.
    """

    def __init__(
        self,
        *,
        min_length: Many = 1,
        max_length: Many = 10,
        min_repeats: Few = 1,
        max_repeats: Few = 10,
        bits: int = 8,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        self.times = bounds(min_repeats, max_repeats, names=("min_repeats", "max_repeats"))
        super().__init__(bits=bits, more=max_repeats, held_out=held_out, per_row=per_row)
        self.sizes = bounds(min_length, max_length)
        self.longest = max_length + 3 + max_repeats * max_length

    def example(self, random: np.random.Generator) -> Example:
        shown = self.vectors(random, int(random.integers(*self.sizes, endpoint=True)))
        times = int(random.integers(*self.times, endpoint=True))
        return self.answered([*shown, 2**self.bits + MARKS + times - 1], shown * times + [self.end])
