"""Associative recall: given an item of a list again, predict the one that came after it."""

import numpy as np

from models.ranges import Few, Many
from trainer.data.errors import DataError
from trainer.data.tasks.base import Example, bounds, whole
from trainer.data.tasks.vectors import MARKS, Vectors


class Associative(Vectors):
    """A list of items, each some vectors behind a mark; then one of them, but not the last: the
    next item is wanted.

    Args:
        min_items, max_items: items in the list.
        vectors_each: vectors of an item.
        bits: of a vector.
        held_out, per_row: as in SyntheticTask.

    No two items of a list are the same. Source: Graves et al. 2014 (arXiv:1410.5401), section 4.3.
    """

    def __init__(
        self,
        *,
        min_items: Many = 2,
        max_items: Many = 6,
        vectors_each: Few = 3,
        bits: int = 6,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(bits=bits, more=2, held_out=held_out, per_row=per_row)
        self.sizes = bounds(min_items, max_items, least=2, names=("min_items", "max_items"))
        self.each = whole("vectors_each", vectors_each, 1)
        if 2 ** (bits * vectors_each) < 2 * max_items:
            raise DataError(
                f"data.max_items={max_items} items of {vectors_each} x {bits} bits cannot all"
                " differ; give more bits"
            )
        self.item = 2**bits + MARKS
        self.asked = 2**bits + MARKS + 1
        self.longest = (max_items + 1) * (vectors_each + 1) + 1 + vectors_each

    def example(self, random: np.random.Generator) -> Example:
        wanted = int(random.integers(*self.sizes, endpoint=True))
        items = []
        while len(items) < wanted:
            item = self.vectors(random, self.each)
            if item not in items:
                items.append(item)
        place = int(random.integers(0, wanted - 1))
        shown = [token for item in items for token in (self.item, *item)]
        return self.answered([*shown, self.asked, *items[place]], items[place + 1])
