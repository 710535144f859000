"""Every mixer, cut over ranks, gives the outputs and gradients that it gives on one device."""

import pytest
import torch

from parallel.layout import POLICIES
from parallel.spread import METHODS
from tests.parallel.parity import compare
from tests.pool import ranks
from tests.variants import VARIANTS


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_cut_is_invisible(name, method, policy, size):
    assert max(ranks(size, compare, name, method, policy, torch.float64)) < 1e-11
    assert max(ranks(size, compare, name, method, policy, torch.float32)) < 2e-5
