"""State tracking: a permutation at every token; the target is the product of all so far,
at every token."""

from itertools import permutations

import numpy as np

from models.ranges import Few, Many
from trainer.data.errors import DataError
from trainer.data.tasks.base import Example, SyntheticTask, bounds, whole

MOST = 6  # elements: 720 permutations, whose products make a table of half a million entries


class Permutations(SyntheticTask):
    """The word problem of a symmetric group: which permutation have these, one after another, led
    to?

    Args:
        elements: that are permuted; of 3 there are 6 permutations, of 5 there are 120.
        min_length, maximum: tokens of an example.
        swaps: let tokens be swaps of two elements, or none, and not every permutation; their
            products are still any.
        held_out, per_row: as in SyntheticTask.

    A layer whose state transitions are diagonal and positive cannot keep the product over any
    length, and from 5 elements on no fixed number of softmax layers can. A swap is a reflection,
    which a state with one correction a token can follow in a single layer; a rotation takes two.
    Source: Merrill et al. 2024 (arXiv:2404.08819); with swaps as in Grazzi et al. 2024
    (arXiv:2411.12537).
    """

    aimed = True

    def __init__(
        self,
        *,
        elements: Few = 3,
        min_length: Many = 16,
        max_length: Many = 32,
        swaps: bool = False,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        if whole("elements", elements, 2) > MOST:
            raise DataError(
                f"data.elements={elements} have too many permutations for a vocabulary; use at most"
                f" {MOST}"
            )
        self.elements = elements
        self.sizes = bounds(min_length, max_length)
        self.longest = max_length
        every = list(permutations(range(elements)))
        self.vocabulary = len(every)
        self.words = ["".join(map(str, each)) for each in every]
        moved = [sum(place != element for place, element in enumerate(each)) for each in every]
        self.used = [number for number, count in enumerate(moved) if count <= 2 or not swaps]

    def example(self, random: np.random.Generator) -> Example:
        tokens = np.array(self.used)[
            random.integers(0, len(self.used), int(random.integers(*self.sizes, endpoint=True)))
        ]
        return Example(tokens, np.ones(len(tokens), bool), products(tokens, self.elements))


def products(tokens: np.ndarray, elements: int) -> np.ndarray:
    """[n] int64: at each token the number of the permutation that all so far make, the first
    applied first."""
    every = list(permutations(range(elements)))
    number = {each: place for place, each in enumerate(every)}
    state = tuple(range(elements))
    found = []
    for token in tokens.tolist():
        state = tuple(every[token][element] for element in state)
        found.append(number[state])
    return np.array(found, np.int64)
