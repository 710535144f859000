"""Sums of gradients over ranks: of any layout and number, in buckets or alone."""

import pytest
import torch
from torch import nn

from parallel.engines import gradients
from tests.support.pool import ranks

SHAPES = [(3, 4), (5,), (2, 2, 2), (40, 3), ()]


def drawn(rank):
    generator = torch.Generator().manual_seed(rank)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    found[3] = torch.randn(3, 40, generator=generator, dtype=torch.float64).T  # strides of its own
    return found


def summed(env, limit):
    """(sums of this rank, whether strides stayed, whether the unused one stays without)."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    for parameter, grad in zip(parameters, drawn(env.rank)):
        parameter.grad = grad.clone(memory_format=torch.preserve_format)
    if env.rank == 1:
        parameters[1].grad = None  # 0 on this rank
    unused = nn.Parameter(torch.zeros(2))
    before = [None if p.grad is None else p.grad.stride() for p in parameters]
    plain = gradients.buckets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "buckets", lambda tensors: plain(tensors, limit))
        gradients.all_reduce_gradients([*parameters, unused], env.group)
    strides = [
        was is None or p.grad.stride() == was for p, was in zip(parameters, before, strict=True)
    ]
    return [p.grad for p in parameters], all(strides), unused.grad is None


@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
def test_every_rank_has_the_sum_of_all_in_the_layout_of_its_own(limit):
    each = [drawn(rank) for rank in range(3)]
    each[1][1].zero_()
    expected = [sum(parts) for parts in zip(*each)]
    for got, kept, unused in ranks(3, summed, limit):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
        assert kept and unused
