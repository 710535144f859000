"""Retrieval beyond the window: keys and values are shown in the first segment, and asked for
segments later."""

import numpy as np

from models.loss import IGNORE
from models.ranges import Many
from trainer.data.errors import DataError
from trainer.data.tasks.base import Example, SyntheticTask, bounds, whole


class Retrieval(SyntheticTask):
    """Pairs of key and value, then segments of nothing to the point, then the keys again: at each,
    its value is to be said.

    Args:
        segment: tokens of a segment; the pairs lie in the first, the questions in the last.
        min_distance, max_distance: segments between the two; -1: the questions follow the pairs at
            once, in the same segment, which is an easy beginning.
        pairs: keys that are shown, all of them different, and asked in another order.
        keys, values, fillers: different tokens of each kind.
        held_out, per_row: as in SyntheticTask.

    Answers are nowhere in the row, so nothing is won by elimination: who only knows which values
    were shown is right once in `pairs`, and who does not see the first segment once in `values`.
    """

    aimed = True

    def __init__(
        self,
        *,
        segment: Many = 32,
        min_distance: int = 0,
        max_distance: int = 1,
        pairs: Many = 4,
        keys: Many = 32,
        values: Many = 16,
        fillers: Many = 16,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        self.gaps = bounds(
            min_distance, max_distance, least=-1, names=("min_distance", "max_distance")
        )
        self.segment = segment
        self.pairs = pairs
        self.keys = whole("keys", keys, whole("pairs", pairs, 1))
        self.values = whole("values", values, 2)
        self.fillers = whole("fillers", fillers, 1)
        tokens = (3 if min_distance < 0 else 2) * pairs
        if whole("segment", segment, 2) < tokens:
            raise DataError(
                f"data.pairs={pairs} take {tokens} tokens, data.segment={segment}; use"
                f" segment={tokens}"
            )
        self.vocabulary = keys + values + fillers
        self.longest = self._asked(max_distance) + pairs
        self.opens = keys + values

    def example(self, random: np.random.Generator) -> Example:
        gap = int(random.integers(*self.gaps, endpoint=True))
        asked_at = self._asked(gap)
        tokens = random.integers(self.keys + self.values, self.vocabulary, asked_at + self.pairs)
        keys = random.permutation(self.keys)[: self.pairs]
        values = random.integers(self.keys, self.keys + self.values, self.pairs)
        order = random.permutation(self.pairs)
        tokens[0 : 2 * self.pairs : 2] = keys
        tokens[1 : 2 * self.pairs : 2] = values
        targets = np.full(len(tokens), IGNORE, np.int64)
        tokens[asked_at:] = keys[order]
        targets[asked_at:] = values[order]
        return Example(tokens, np.ones(len(tokens), bool), targets)

    def _asked(self, gap: int) -> int:
        """The place of the first question."""
        return (gap + 1) * self.segment if gap >= 0 else 2 * self.pairs
