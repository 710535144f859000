"""Retrieval beyond the window: keys and values are shown in the first segment, and asked for segments later."""

import numpy as np

from trainer.data.faults import DataFault
from trainer.data.tasks.task import Example, Task, bounds, whole


class Retrieval(Task):
    """Pairs of key and value, then segments of nothing to the point, then the keys again: after each, its value is wanted.

    Args:
        segment: tokens of a segment; the pairs lie in the first, the questions in the last.
        near, far: segments between the two.
        pairs: keys that are shown, all of them different, and asked in another order.
        keys, values, fillers: different tokens of each kind.
        held_out, per_row: as in Task.

    Values are drawn with replacement and each key is asked once, so that nothing is won by elimination or by what was said
    before: without the first segment the best is one of `values`. A model that sees `segment` tokens cannot do better.
    """

    def __init__(
        self,
        *,
        segment: int = 32,
        near: int = 0,
        far: int = 1,
        pairs: int = 4,
        keys: int = 32,
        values: int = 16,
        fillers: int = 16,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        self.gaps, self.segment, self.pairs = bounds(near, far, least=0, names=("near", "far")), segment, pairs
        self.keys, self.values = whole("keys", keys, whole("pairs", pairs, 1)), whole("values", values, 2)
        self.fillers = whole("fillers", fillers, 1)
        if whole("segment", segment, 2) < 2 * pairs:
            raise DataFault(f"data.pairs={pairs} take {2 * pairs} tokens, data.segment={segment}; use segment={2 * pairs}")
        self.vocabulary = keys + values + fillers
        self.longest = (far + 1) * segment + 2 * pairs
        self.opens = keys + values

    def example(self, random: np.random.Generator) -> Example:
        gap = int(random.integers(*self.gaps, endpoint=True))
        asked_at = (gap + 1) * self.segment
        tokens = random.integers(self.keys + self.values, self.vocabulary, asked_at + 2 * self.pairs)
        keys = random.permutation(self.keys)[: self.pairs]
        values = random.integers(self.keys, self.keys + self.values, self.pairs)
        order = random.permutation(self.pairs)
        shown, asked = tokens[: 2 * self.pairs], tokens[asked_at:]
        shown[0::2], shown[1::2] = keys, values
        asked[0::2], asked[1::2] = keys[order], values[order]
        given = np.ones(len(tokens), bool)
        given[asked_at + 1 :: 2] = False
        return Example(tokens, given)
