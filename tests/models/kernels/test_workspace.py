"""Memory that blocks use again: any size and dtype, and always what was asked for."""

import pytest
import torch

from models.kernels.workspace import Workspace


def test_a_name_has_one_memory_that_grows():
    work = Workspace(torch.device("cpu"))
    large = work.take("a", (4, 5), torch.float32)
    small = work.take("a", (3, 2), torch.float32)
    assert small.data_ptr() == large.data_ptr()
    assert small.shape == (3, 2) and small.is_contiguous()
    assert work.take("b", (3, 2), torch.float32).data_ptr() != large.data_ptr()
    assert work.take("a", (6, 5), torch.float32).shape == (6, 5)
    assert work.take("a", (2,), torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_gathers_and_products_of_any_size(dtype, index_dtype):
    work = Workspace(torch.device("cpu"))
    rows = torch.randn(7, 4).to(dtype)
    for shape in ((2, 3), (5, 6), (1, 1), (0, 3)):
        index = torch.randint(7, shape, dtype=index_dtype)
        gathered = work.gather("rows", rows, index, torch.float32)
        assert torch.equal(gathered, rows.float()[index.long()])
        product = work.product("product", gathered, gathered.transpose(1, 2))
        torch.testing.assert_close(product, gathered @ gathered.transpose(1, 2))
