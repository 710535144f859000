"""Reads the numbers that decide how chosen pairs are cut into blocks.

A plan of a step, whose tensors have shapes and no numbers, puts expected ones in their place
(trainer/planning/without_numbers/expected_pairs.py); nothing else of this folder differs there.

Letters: B rows, t queries, n tiles.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.kernels.pairs.block_lookup import BlockLookup

Group = TypeVar("Group")

# Scores of the blocks computed together: on a CPU they stay in the cache of a core.
SCORES = {"cpu": 1 << 18}
MANY_SCORES = 1 << 24


def has_numbers(tensors: Iterable[Tensor]) -> bool:
    """Returns whether pairs can be told by the numbers in tensors."""
    return not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)


def scores_together(device: torch.device) -> int:
    """Returns the number of scores that are computed together."""
    return SCORES.get(device.type, MANY_SCORES)


def widths_of(widths: Tensor) -> list[int]:
    """Returns the numbers [n] of keys that tiles span."""
    return widths.tolist()


def counts_of(counts: Tensor, asked: int, lookup: BlockLookup, part: slice) -> tuple[int, int]:
    """Returns the least and the most of the numbers [B, t] of chosen blocks that are at hand.

    Args:
        counts: as they were found.
        asked: numbers of a query.
        lookup: that found them.
        part: which queries asked.
    """
    fewest, most = counts.aminmax()
    return int(fewest), int(most)


def visited(groups: Sequence[Group]) -> Iterable[Group]:
    """Returns the groups of blocks that are computed one after the other: all of them."""
    return groups
