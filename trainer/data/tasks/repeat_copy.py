"""Repeat copy: repeat the sequence that was shown a given number of times, then stop."""

import numpy as np

from models.ranges import Few, Many
from trainer.data.tasks.base import Example, bounds
from trainer.data.tasks.vectors import MARKS, Vectors


class RepeatCopy(Vectors):
    """A sequence of random vectors and a number of times to repeat it, followed by END.

    Args:
        min_length, max_length: vectors in a sequence.
        min_repeats, max_repeats: repetitions.
        bits: of a vector.
        held_out, per_row: as in SyntheticTask.

    Source: Graves et al. 2014 (arXiv:1410.5401), section 4.2. There the number is a real one on a
    channel of its own; here each number is a mark, up to `max_repeats`.
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
        """See SyntheticTask.example."""
        length = int(random.integers(*self.sizes, endpoint=True))
        shown = self.vectors(random, length)
        times = int(random.integers(*self.times, endpoint=True))
        times_mark = 2**self.bits + MARKS + times - 1
        return self.answered([*shown, times_mark], shown * times + [self.end])
