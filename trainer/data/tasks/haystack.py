"""Needles in a haystack of tokens: pairs of key and value in one place of a long filler, and the
keys again at its end."""

import math

import numpy as np

from models.loss import IGNORE
from models.ranges import Many
from trainer.data.errors import DataError
from trainer.data.tasks.base import Example, SyntheticTask, bounds, whole


class HaystackTask(SyntheticTask):
    """Filler in which some pairs of key and value stand side by side, then the keys in another
    order: at each, its value is to be said.

    Args:
        length: tokens of an example, at most.
        min_length: and at least, short ones as often as long ones by the logarithm, because what is
            near is learned sooner; None = always `length`.
        depth: place of the pairs in the filler: 0 = at the very beginning, 1 = right before the
            questions; None = any.
        pairs: keys that are hidden, all of them different, each asked once.
        keys, values, fillers: different tokens of each kind.
        held_out, per_row: as in SyntheticTask.

    Values may come twice. Who only knows which were hidden is right as often as the commonest of
    them comes, once in `pairs` or more, and who finds nothing once in `values`.

    Source: the needle of Kamradt 2023 with the keys and values of multi-query associative recall,
    Arora et al. 2023 (arXiv:2312.04927). Theirs scatters the queries; here the distance is wanted.
    """

    aimed = True

    def __init__(
        self,
        *,
        length: Many = 64,
        min_length: int | None = None,
        depth: float | None = None,
        pairs: Many = 4,
        keys: Many = 32,
        values: Many = 16,
        fillers: Many = 16,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        self.pairs = pairs
        self.keys = whole("keys", keys, whole("pairs", pairs, 1))
        self.values = whole("values", values, 2)
        self.fillers = whole("fillers", fillers, 1)
        self.longest = whole("length", length, 1)
        self.shortest = self.longest
        if min_length is not None:
            self.shortest, _ = bounds(min_length, length, names=("min_length", "length"))
        if self.shortest < 3 * pairs:
            setting = "length" if min_length is None else "min_length"
            raise DataError(
                f"data.{setting}={self.shortest} has no room for {pairs} pairs and their keys; use"
                f" data.{setting}={3 * pairs} or more, or data.pairs={max(1, self.shortest // 3)}"
            )
        if depth is not None and not 0 <= depth <= 1:
            raise DataError(
                f"data.depth={depth} is no share of the filler; give 0 (its beginning) to 1"
            )
        self.depth = depth
        self.vocabulary = keys + values + fillers
        self.opens = keys + values

    def example(self, random: np.random.Generator) -> Example:
        length = self._length(random)
        tokens = random.integers(self.keys + self.values, self.vocabulary, length)
        keys = random.permutation(self.keys)[: self.pairs]
        values = random.integers(self.keys, self.keys + self.values, self.pairs)
        asked_at = length - self.pairs
        room = asked_at - 2 * self.pairs
        # Drawn at every depth, so that examples of two depths differ in it alone.
        anywhere = int(random.integers(0, room, endpoint=True))
        begin = anywhere if self.depth is None else round(self.depth * room)
        tokens[begin : begin + 2 * self.pairs : 2] = keys
        tokens[begin + 1 : begin + 2 * self.pairs : 2] = values
        order = random.permutation(self.pairs)
        targets = np.full(length, IGNORE, np.int64)
        tokens[asked_at:] = keys[order]
        targets[asked_at:] = values[order]
        return Example(tokens, np.ones(length, bool), targets)

    def _length(self, random: np.random.Generator) -> int:
        """Draws the length of an example."""
        if self.shortest == self.longest:
            return self.longest
        drawn = math.exp(random.uniform(math.log(self.shortest), math.log(self.longest + 1)))
        return min(int(drawn), self.longest)
