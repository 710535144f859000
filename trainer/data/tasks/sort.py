"""Priority sort: vectors with priorities, to be repeated from the highest priority down."""

import numpy as np

from models.ranges import Many
from trainer.data.errors import DataError
from trainer.data.tasks.base import Example, bounds, whole
from trainer.data.tasks.vectors import MARKS, Vectors


class Sort(Vectors):
    """Random vectors behind marks of distinct priorities; the answer is the highest ones in order.

    Args:
        min_length, max_length: vectors to sort.
        kept: number of vectors in the answer; null = all.
        levels: number of priorities.
        bits: of a vector.
        held_out, per_row: as in SyntheticTask.

    Source: Graves et al. 2014 (arXiv:1410.5401), section 4.5: 20 vectors, the 16 highest. There a
    priority is a real number between -1 and 1 on a channel of its own.
    """

    def __init__(
        self,
        *,
        min_length: Many = 2,
        max_length: Many = 8,
        kept: int | None = None,
        levels: Many = 64,
        bits: int = 8,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(
            bits=bits, more=whole("levels", levels, 1), held_out=held_out, per_row=per_row
        )
        self.sizes = bounds(min_length, max_length)
        self.levels = levels
        self.kept = kept
        if max_length > levels:
            raise DataError(
                f"data.max_length={max_length} vectors cannot all have one of data.levels={levels};"
                f" use levels={max_length}"
            )
        if kept is not None and whole("kept", kept, 1) > min_length:
            raise DataError(
                f"data.kept={kept} of data.min_length={min_length} vectors cannot be said; use"
                f" kept={min_length}, or null"
            )
        self.longest = 2 * max_length + 1 + (max_length if kept is None else kept)

    def example(self, random: np.random.Generator) -> Example:
        """See SyntheticTask.example."""
        count = int(random.integers(*self.sizes, endpoint=True))
        priorities = random.permutation(self.levels)[:count].tolist()
        shown = self.vectors(random, count)
        question: list[int] = []
        for priority, vector in zip(priorities, shown):
            question += [2**self.bits + MARKS + priority, vector]
        ranked = [vector for _, vector in sorted(zip(priorities, shown), reverse=True)]
        return self.answered(question, ranked[: self.kept])
