"""Hyena against its definition with explicit Toeplitz matrices, order 3."""

import pytest
import torch

from models.convolution.hyena import Hyena, HyenaFilter
from models.init import initialise
from models.span import Span
from tests.support.parity import relative


def test_hyena_is_gates_between_toeplitz_matrices():
    tokens, width = 12, 5
    layer = initialise(Hyena(width, 20, order=3, filter_width=8, bands=2), 1).double()
    x = torch.randn(1, tokens, width, dtype=torch.float64)
    span = Span.line(1, tokens)
    first, second, third, value = layer.short(layer.inner(x), span).chunk(4, -1)
    apart = torch.arange(tokens)[:, None] - torch.arange(tokens)
    for gate, taps, bias in zip((third, second), layer.filter().split(width, -1), layer.bias):
        matrix = torch.where((apart >= 0)[..., None], taps[apart.clamp_min(0)], 0)
        value = gate * value
        value = torch.einsum("tsc,bsc->btc", matrix, value) + bias * value
    assert relative(layer(x, span), layer.out(first * value)) < 1e-12


def test_a_document_longer_than_the_filters_is_refused():
    layer = initialise(Hyena(4, 8), 1)
    with pytest.raises(ValueError, match="raise context_length"):
        layer(torch.ones(1, 9, 4), Span.line(1, 9))


def test_an_order_without_a_long_filter_is_refused():
    with pytest.raises(ValueError, match="order=1"):
        Hyena(4, 8, order=1)


def test_a_filter_of_bfloat16_weights_tells_far_distances_apart():
    want = initialise(HyenaFilter(8, 2048, 64, 16, 10.0), 1)()
    got = initialise(HyenaFilter(8, 2048, 64, 16, 10.0), 1).bfloat16()()
    assert got.dtype == torch.float32 and relative(got, want) < 0.05
    assert (got[1000] != got[1001]).all()
