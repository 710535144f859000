"""A task of one's own, whose examples are drawn as they are read:

python -m trainer data._target_=examples.own.task.RunningSum data.base=5
"""

import numpy as np

from models.ranges import Many
from trainer.data.tasks.base import Example, SyntheticTask, whole


class RunningSum(SyntheticTask):
    """Digits, and at each of them the sum of all so far modulo `base`: a state to keep track of.

    Args:
        base: the number of digits.
        length: digits of an example.
        held_out, per_row: as in SyntheticTask.
    """

    def __init__(
        self,
        *,
        base: Many = 5,
        length: Many = 16,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        self.base = whole("base", base, 2)
        # Attributes that the stream reads.
        self.vocabulary = base
        self.longest = whole("length", length, 1)
        self.aimed = True

    def example(self, random: np.random.Generator) -> Example:
        """Draws digits; the targets are no tokens of the row, so every one is given."""
        digits = random.integers(self.base, size=self.longest)
        sums = digits.cumsum() % self.base
        return Example(digits, np.ones(self.longest, bool), sums)
