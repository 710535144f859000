"""Sums over rows and documents, and what lies before a token, against loops that are written
out."""

import pytest
import torch

from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.primitives.segment_sum import SegmentSum
from models.span import Span
from tests.support.parity import packed
from tests.support.pieces import addresses, cut, piece_span, taken

SPAN = packed([[4, 1, 3], [2, 5, 1, 1], [9]], 11)
HOLED = Span.of(  # padding before, inside and after documents, as a rank may hold it
    torch.tensor([[0, 0, 1, 0, 2, 0, 0, 1, 0]]), torch.tensor([[-1, 0, 0, -1, 0, -1, 1, 1, -1]])
)


def spelled(x, span, over, before):
    """Token by token."""
    out = torch.zeros_like(x)
    for b in range(span.shape[0]):
        for t in range(span.shape[1]):
            for s in range(t if before else span.shape[1]):
                same = over == "row" or span.doc[b, s] == span.doc[b, t]
                if same and span.doc[b, s] >= 0:
                    out[b, t] += x[b, s]
    return out


def numbers(span, *features):
    return torch.randint(
        -9, 9, (*span.shape, *features), generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.every_case
@pytest.mark.parametrize("span", [SPAN, HOLED], ids=["packed", "holed"])
@pytest.mark.parametrize("over", ["row", "document"])
@pytest.mark.parametrize("features", [(), (3,)], ids=["plain", "features"])
def test_sums_are_those_of_a_loop(span, over, features):
    x, valid = numbers(span, *features), span.valid()
    total = SegmentSum().total(x, span, over)
    assert total.shape[1] == (1 if over == "row" else span.shape[1])
    assert torch.equal(total.expand_as(x)[valid], spelled(x, span, over, False)[valid])
    assert torch.equal(
        SegmentSum().before(x, span, over)[valid], spelled(x, span, over, True)[valid]
    )


@pytest.mark.parametrize("over", ["row", "document"])
def test_gradients_are_those_of_a_loop(over):
    x = numbers(SPAN, 2).double().requires_grad_()
    weight = (
        torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        * SPAN.valid()[..., None]
    )
    for got, before in (
        (SegmentSum().total(x, SPAN, over), False),
        (SegmentSum().before(x, SPAN, over), True),
    ):
        (want,) = torch.autograd.grad((spelled(x, SPAN, over, before) * weight).sum(), x)
        (have,) = torch.autograd.grad((got * weight).sum(), x)
        torch.testing.assert_close(have, want, rtol=0, atol=1e-12)


def test_sums_over_something_else_are_refused():
    with pytest.raises(ValueError, match="choose one of row, document"):
        SegmentSum().total(numbers(SPAN), SPAN, "sentence")


def test_running_sums_continue_their_rows():
    span = addresses()
    x = torch.arange(span.pos.numel()).view(span.shape) % 7
    for over in ("row", "document"):
        leaf = SegmentSum()
        truth = leaf.before(x, span, over)
        state = DecodingState(Contiguous())
        for index in cut(span):
            part = leaf.before(taken(x, index, 99), state.attach(piece_span(span, index)), over)
            state.advance()
            there = index >= 0
            assert torch.equal(part[there], taken(truth, index, 0)[there])
        with pytest.raises(ValueError, match="later tokens"):
            leaf.total(x, state.attach(span), over)
