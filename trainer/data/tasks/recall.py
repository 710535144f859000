"""Multi-query associative recall: pairs of a key and a value, then the keys again, scattered, each
to be answered."""

import numpy as np

from models.loss import IGNORE
from models.ranges import Count, Many
from trainer.data.errors import DataError
from trainer.data.tasks.base import Example, SyntheticTask, bounds, whole


class RecallTask(SyntheticTask):
    """Some pairs, then every key once more among blanks; at the key its value is to be said,
    elsewhere nothing.

    Args:
        pairs: of a key and a value in an example, at most; no key twice.
        min_pairs: pairs in an example, at least, every number as often; None = always as many as
            `pairs`. A mixture is learned sooner, because the easy examples say what is wanted.
        keys, values: different ones that there are.
        length: tokens of an example, the pairs included.
        nearness: a query stands d places behind the pairs with a weight of d^(nearness - 1); 1 =
            anywhere alike.
        held_out, per_row: as in SyntheticTask.

    Source: Arora et al. 2023 (arXiv:2312.04927), with their nearness of 0.01. Theirs leaves a place
    free behind every query and can fill the blanks with random tokens; here queries may touch and
    blanks are one token of their own.
    """

    aimed = True

    def __init__(
        self,
        *,
        pairs: Many = 8,
        min_pairs: int | None = None,
        keys: Many = 64,
        values: Many = 64,
        length: Count = 64,
        nearness: float = 0.01,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        self.pairs = bounds(
            pairs if min_pairs is None else min_pairs,
            pairs,
            names=("pairs" if min_pairs is None else "min_pairs", "pairs"),
        )
        self.keys = whole("keys", keys, 1)
        self.values = whole("values", values, 2)
        self.longest = whole("length", length, 1)
        if pairs > keys:
            raise DataError(
                f"data.pairs={pairs} need as many different keys, but data.keys={keys}; use"
                f" data.keys={pairs} or more"
            )
        if length < 3 * pairs:
            raise DataError(
                f"data.length={length} has no room for {pairs} pairs and {pairs} queries; "
                f"use data.length={3 * pairs} or more, or data.pairs={max(1, length // 3)}"
            )
        if (
            isinstance(nearness, bool)
            or not isinstance(nearness, int | float)
            or not 0 < nearness <= 1
        ):
            raise DataError(
                f"data.nearness={nearness} is no number above 0 and up to 1; 0.01 favours near"
                " queries, 1 none"
            )
        self.nearness = float(nearness)
        self.vocabulary = 1 + keys + values
        named = [
            f"{letter}{number}"
            for letter, count in (("k", keys), ("v", values))
            for number in range(count)
        ]
        self.words = ["_", *named]

    def example(self, random: np.random.Generator) -> Example:
        pairs = int(random.integers(*self.pairs, endpoint=True))
        keys = 1 + random.permutation(self.keys)[:pairs]
        values = 1 + self.keys + random.integers(0, self.values, pairs)
        tokens = np.zeros(self.longest, np.int64)
        targets = np.full(self.longest, IGNORE, np.int64)
        begin = 2 * pairs
        tokens[0:begin:2] = keys
        tokens[1:begin:2] = values
        weights = np.arange(1, self.longest - begin + 1) ** (self.nearness - 1)
        places = begin + random.choice(
            len(weights), pairs, replace=False, p=weights / weights.sum()
        )
        tokens[places] = keys
        targets[places] = values
        return Example(tokens, np.ones(self.longest, bool), targets)
