"""Copy: repeat the sequence that was shown."""

import numpy as np

from models.ranges import Many
from trainer.data.tasks.base import Example, bounds
from trainer.data.tasks.vectors import Vectors


class CopyTask(Vectors):
    """A sequence of random vectors, to be repeated once it has ended.

    Args:
        min_length, max_length: vectors in a sequence.
        bits: of a vector.
        held_out, per_row: as in SyntheticTask.

    Source: Graves et al. 2014 (arXiv:1410.5401), section 4.1.
    """

    def __init__(
        self,
        *,
        min_length: Many = 1,
        max_length: Many = 20,
        bits: int = 8,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(bits=bits, more=0, held_out=held_out, per_row=per_row)
        self.sizes = bounds(min_length, max_length)
        self.longest = 2 * max_length + 1

    def example(self, random: np.random.Generator) -> Example:
        """See SyntheticTask.example."""
        length = int(random.integers(*self.sizes, endpoint=True))
        shown = self.vectors(random, length)
        return self.answered(shown, shown)
