"""A convolution as long as the sequence equals the explicit Toeplitz matrix, document by
document."""

import pytest
import torch

from models.primitives.long_conv import LongConv, _padded
from models.span import Span
from tests.support.parity import packed, relative


def toeplitz(x, taps, span, kv_span):
    """The plain truth: [B, T, S, C] all filter taps, masked to one document and to the past."""
    apart = span.pos[:, :, None] - kv_span.pos[:, None]
    heard = (span.doc[:, :, None] == kv_span.doc[:, None]) & (apart >= 0) & span.valid()[:, :, None]
    matrix = torch.where(heard[..., None], taps[apart.clamp_min(0)], 0)
    return torch.einsum("btsc,bsc->btc", matrix, x)


def case():
    span = packed()
    return (
        span,
        torch.randn(*span.shape, 3, dtype=torch.float64),
        torch.randn(span.shape[1], 3, dtype=torch.float64),
    )


def test_fft_equals_toeplitz_with_gradients():
    span, x, taps = case()
    leaves = x.requires_grad_(), taps.requires_grad_()
    got, want = LongConv()((x,), (taps,), span=span), toeplitz(x, taps, span, span)
    assert relative(got, want) < 1e-13
    weight = torch.randn_like(want)
    pairs = zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
    )
    assert max(relative(a, b) for a, b in pairs) < 1e-13


@pytest.mark.parametrize("order", ["forward", "scattered"])
def test_contributions_of_stretches_add_up(order):
    span, x, taps = case()
    index = (
        torch.arange(51)
        if order == "forward"
        else torch.cat([torch.arange(a, a + 17) for a in (34, 0, 17)])
    )
    parts = index.split([20, 0, 31])
    total = torch.zeros_like(x)
    for mine in parts:
        q_span = span.map(lambda s, i=mine: s[:, i])
        for theirs in parts:
            kv_span = span.map(lambda s, i=theirs: s[:, i])
            total[:, mine] += LongConv().partial(
                (x[:, theirs],), (taps,), span=q_span, kv_span=kv_span
            )
    assert relative(total, toeplitz(x, taps, span, span)) < 1e-13


def test_a_stretch_within_another_gives_to_what_is_after_it():
    span, x, taps = case()
    kv_span = span.map(lambda s: s[:, 5:20])
    got = LongConv().partial((x[:, 5:20],), (taps,), span=span, kv_span=kv_span)
    assert relative(got, toeplitz(x[:, 5:20], taps, span, kv_span)) < 1e-13


def test_poison_of_other_documents_stays_there():
    span, x, taps = case()
    bad = torch.where((span.doc == 2)[..., None], x, torch.nan)
    want = LongConv()((x,), (taps,), span=span)[span.doc == 2]
    assert torch.equal(LongConv()((bad,), (taps,), span=span)[span.doc == 2], want)


def test_padded_lengths_are_quick_ones_and_large_enough():
    assert [_padded(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 25)] == [
        1,
        2,
        3,
        4,
        6,
        6,
        8,
        12,
        16,
        32,
    ]


def test_a_document_longer_than_the_filter_is_refused():
    with pytest.raises(ValueError, match="the filter has 5 taps"):
        LongConv()((torch.ones(1, 6, 1),), (torch.ones(5, 1),), span=Span.line(1, 6))
