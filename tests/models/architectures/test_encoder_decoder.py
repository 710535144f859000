"""The encoder-decoder Transformer: exactness over ranks with sources of other lengths."""

from functools import partial

import pytest

from tests.support.pool import ranks
from tests.support.two_streams import SHORT, batch_of, difference, transformer

CASES = [
    ("rope", "before", "ring", 3, "zigzag"),
    ("rope", "both", "ring", 4, "contiguous"),
    ("t5", "before", "allgather", 3, "contiguous"),
    ("learned", "after", "ulysses", 2, "zigzag"),
    ("t5", "before", "ulysses", 4, "zigzag"),
    ("learned", "after", "ring", 2, "contiguous"),
]


@pytest.mark.parametrize(("position", "place", "method", "size", "policy"), CASES)
def test_both_streams_over_ranks_change_nothing(position, place, method, size, policy):
    build = partial(transformer, position, place)
    assert max(ranks(size, difference, build, method, policy, batch_of())) < 1e-11


@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
def test_a_source_shorter_than_the_ranks_changes_nothing(method):
    batch = batch_of(targets=[[3, 1], [2]], sources=SHORT, tokens=5, source_tokens=2)
    assert max(ranks(4, difference, transformer, method, "contiguous", batch)) < 1e-11
