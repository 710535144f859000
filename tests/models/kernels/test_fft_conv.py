"""Convolution by FFT equals the sum that it stands for, in outputs and gradients, for stretches
that lie apart too."""

import pytest
import torch

from models.kernels import fft_conv
from models.kernels.fft_conv import convolve
from tests.support.parity import relative


def direct(x, taps, shift):
    """y_i = sum_j taps_(shift + i - j) x_j, taps outside of which there are any being 0."""
    length = x.shape[1]
    lag = shift + torch.arange(length)[:, None] - torch.arange(length)
    there = (lag >= 0) & (lag < len(taps))
    matrix = torch.where(there[..., None], taps[lag.clamp(0, len(taps) - 1)], 0)
    return torch.einsum("ijc,gjc->gic", matrix, x)


CASES = [(1, 1, 0), (1, 4, 3), (6, 6, 0), (6, 9, 2), (6, 30, 6), (6, 30, 17), (8, 10, 4)]


@pytest.mark.every_case
@pytest.mark.parametrize("block", [3, 4096])
@pytest.mark.parametrize(
    "length, taps, shift",
    [(1, 1, 0), (1, 4, 3), (6, 6, 0), (6, 9, 2), (6, 30, 6), (6, 30, 17), (8, 10, 4)],
)
def test_it_is_the_sum(length, taps, shift, block, monkeypatch):
    monkeypatch.setattr(fft_conv, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    given = (
        torch.randn(2, length, 3, generator=generator, dtype=torch.float64),
        torch.randn(taps, 3, dtype=torch.float64),
    )
    weight = torch.randn(2, length, 3, generator=generator, dtype=torch.float64)
    answers = []
    for run in (convolve, direct):
        x, written = (t.clone().requires_grad_() for t in given)
        out = run(x, written, shift)
        answers.append([out, *torch.autograd.grad((out * weight).sum(), [x, written])])
    assert max(map(relative, *answers)) < 1e-13


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_either_may_need_no_gradient(wanted):
    x, taps = (
        torch.randn(1, 5, 2).requires_grad_(wanted[0]),
        torch.randn(5, 2).requires_grad_(wanted[1]),
    )
    convolve(x, taps, 0).sum().backward()
    assert (x.grad is not None, taps.grad is not None) == wanted
