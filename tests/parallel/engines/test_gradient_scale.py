"""The factor that stays on a device scales gradients as the one that was read does."""

import pytest
import torch
from torch import nn

from parallel.engines.gradients import clip_gradients, scale_unread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_an_unread_factor_scales_as_the_one_that_was_read(dtype, max_norm):
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(5, 3, dtype=dtype)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.randn(5, 3, generator=draw).to(dtype)
    unread = [parameter.grad.clone() for parameter in parameters]
    norm = clip_gradients(parameters, max_norm, torch.device("cpu"))
    scale_unread(unread, norm, max_norm)
    for parameter, scaled in zip(parameters, unread, strict=True):
        assert torch.equal(parameter.grad, scaled)
    assert norm.dtype == torch.float64 and norm.shape == ()
