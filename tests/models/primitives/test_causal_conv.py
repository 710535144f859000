"""A window reads the few tokens just before, of its own document."""

import torch

from models.primitives.causal_conv import CausalConv
from models.span import Span
from tests.models.primitives.test_scan import holes
from tests.support.parity import packed, relative


def test_a_window_is_its_loop():
    span = packed()
    x, taps = (
        torch.randn(*span.shape, 3, dtype=torch.float64),
        torch.randn(4, 3, dtype=torch.float64),
    )
    want = torch.zeros_like(x)
    for b in range(2):
        for t in range(span.shape[1]):
            for j in range(4):
                if span.doc[b, t] >= 0 and j <= span.pos[b, t]:
                    want[b, t] += taps[j] * x[b, t - j]
    assert relative(CausalConv()((x,), (taps,), span=span), want) < 1e-14


def test_token_by_token_equals_the_row_at_once():
    span = packed()
    x, taps = (
        torch.randn(*span.shape, 3, dtype=torch.float64),
        torch.randn(4, 3, dtype=torch.float64),
    )
    tail, tail_at = (
        x.new_full((2, 3, 3), torch.nan),
        Span(*(torch.full((2, 3), v) for v in (0, -1, 0))),
    )
    out = []
    for t in range(span.shape[1]):
        here = span.map(lambda s, t=t: s[:, t : t + 1])
        y, tail = CausalConv().recur(
            (x[:, t : t + 1],), (taps,), span=here, tail=tail, tail_at=tail_at
        )
        both = (
            torch.cat(ends, 1)[:, -3:]
            for ends in zip(*((s.pos, s.doc, s.role) for s in (tail_at, here)))
        )
        tail_at = Span(*both)
        out.append(y)
    assert relative(torch.cat(out, 1), CausalConv()((x,), (taps,), span=span)) < 1e-14


def test_a_document_that_goes_on_from_an_earlier_row_does_not_hear_the_one_before_it():
    """The second document stands just where the first would go on."""
    span = Span.of(torch.arange(8)[None], torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]))
    x, taps = torch.randn(1, 8, 3), torch.randn(4, 3)
    alone = CausalConv()((x[:, 4:],), (taps,), span=span.map(lambda s: s[:, 4:]))
    assert torch.equal(CausalConv()((x,), (taps,), span=span)[:, 4:], alone)


def test_poison_of_other_documents_and_padding_stays_there():
    span = holes()
    x, taps = torch.randn(*span.shape, 3), torch.randn(4, 3)
    bad = torch.where((span.doc == 2)[..., None], x, torch.nan).requires_grad_()
    seen = CausalConv()((bad,), (taps,), span=span)[span.doc == 2]
    assert torch.equal(seen, CausalConv()((x,), (taps,), span=span)[span.doc == 2])
    seen.sum().backward()
    assert bad.grad is not None and not bad.grad[span.doc != 2].any()
