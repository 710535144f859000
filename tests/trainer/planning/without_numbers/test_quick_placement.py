"""Parameters are cut for the ranks of FSDP2 as FSDP2 cuts them."""

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param

from trainer.planning.without_numbers.quick_placement import CUT, LazyChunks, placed_without_numbers


@pytest.mark.parametrize("count", [1, 3, 4, 5, 10, 11, 24])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_parts_are_those_of_torch(count, dim):
    tensor = torch.arange(110.0).view(10, 11)
    want = getattr(_fsdp_param, CUT)(tensor, count, dim)
    got = LazyChunks(tensor, count, dim)
    assert len(got) == len(want) == count
    for part, expected in zip(got, want, strict=True):
        assert torch.equal(part, expected)
    with placed_without_numbers():
        assert getattr(_fsdp_param, CUT) is LazyChunks
    assert getattr(_fsdp_param, CUT) is not LazyChunks
