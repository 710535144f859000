"""The blocks of a ring, computed in turn on one device, join to what one call computes."""

import pytest
import torch

from scripts.benchmarks.ring_blocks import measure

CPU = torch.device("cpu")


def test_blocks_of_every_size_join_to_the_undivided_attention():
    rows = list(measure(CPU, torch.float32, 64, (2, 4), 1))
    assert [row["ranks"] for row in rows] == [1, 2, 4]
    assert all(row["exact"] and row["apart"] < 1e-5 and row["seconds"] > 0 for row in rows)


def test_tokens_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match="tokens=60 does not divide among 4 ranks; use a multiple of 8"
    ):
        next(measure(CPU, torch.float32, 60, (4,), 1))
