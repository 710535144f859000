"""A store of some of a row's tokens: what is picked, found and best."""

from unittest import mock

import torch

from models.masks.basic import Causal, SameDocument
from models.primitives.block_topk import SUMMARY, BlockEnds, BlockTopK, best_of, find, moved, take
from models.primitives.block_topk import _best_by_rank as by_rank_of_lines
from models.span import Span


def _rows() -> Span:
    pos = torch.tensor([[0, 1, 2, 3, 0, 1, 0], [0, 1, 0, 1, 2, 0, 0]])
    doc = torch.tensor([[0, 0, 0, 0, 1, 1, -1], [0, 0, 1, 1, 1, -1, -1]])
    return Span.of(pos, doc)


def test_picked_tokens_keep_their_addresses_and_rows_are_filled_up():
    picked = BlockTopK().pick(_rows(), BlockEnds(2))
    assert picked.index.tolist() == [[1, 3, 5], [1, 3, 0]]
    assert picked.span.pos.tolist() == [[1, 3, 1], [1, 1, 0]]
    assert picked.span.doc.tolist() == [[0, 0, 1], [0, 1, -1]]
    assert (picked.span.role == SUMMARY).all()
    assert picked.joint.shape == (2, 10) and torch.equal(picked.joint.pos[:, 7:], picked.span.pos)


def test_a_row_without_a_complete_block_has_an_empty_store():
    picked = BlockTopK().pick(Span.line(1, 3), BlockEnds(4))
    assert picked.span.doc.tolist() == [[-1]]


def test_tokens_are_found_by_address_in_any_order():
    among = _rows().map(lambda t: t.flip(1))
    index, there = find(_rows(), among)
    assert torch.equal(there, _rows().valid())
    assert torch.equal(take(among.pos, index)[there], _rows().pos[there])
    assert not find(moved(_rows(), 10), among)[1].any()


def _score(query, keys):
    return torch.einsum("btc,bsc->bts", query[0], keys[0])


def test_the_best_are_the_best_and_ties_go_to_the_earlier():
    span, store = _rows(), BlockTopK()
    q, k = (torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    k[0, 2] = k[0, 0]  # two keys alike
    scores, found = store.best(
        _score, (q,), (k,), Causal() & SameDocument(), span=span, kv_span=span, count=3
    )
    for b in range(2):
        for t in range(7):
            mates = [s for s in range(t + 1) if span.doc[b, s] == span.doc[b, t] >= 0]
            mates.sort(key=lambda s, b=b, t=t: -(q[b, t].double() @ k[b, s].double()).item())
            want = sorted(span.pos[b, s].item() for s in mates[:3])
            assert found[b, t].tolist() == want + [-1] * (3 - len(want))
            assert (scores[b, t, len(want) :] == -torch.inf).all()


def test_rows_of_documents_are_searched_as_under_any_mask():
    """A stretch of entries that lie side by side is masked at its ends alone."""
    pos = torch.cat([torch.arange(40), torch.arange(3), torch.arange(50), torch.zeros(7)]).long()
    doc = torch.tensor([1] * 40 + [2] * 3 + [5] * 50 + [-1] * 7)
    span = Span.of(torch.stack([pos, torch.arange(100)]), torch.stack([doc, torch.full((100,), 7)]))
    q, k = (torch.randn(2, 100, 3) for _ in range(2))
    by_stretches = Causal() & SameDocument()
    for most in (200, 3000):
        with mock.patch("models.primitives.block_topk.CHUNK_SCORES_CPU", most):
            got = BlockTopK().best(
                _score, (q,), (k,), by_stretches, span=span, kv_span=span, count=4
            )
            want = BlockTopK().best(
                _score, (q,), (k,), by_stretches & Causal(), span=span, kv_span=span, count=4
            )
        assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])


def test_a_choice_does_not_depend_on_how_many_queries_are_looked_at_together(monkeypatch):
    span, store = Span.line(2, 33), BlockTopK()
    q, k = (torch.randn(2, 33, 3) for _ in range(2))
    want = store.best(_score, (q,), (k,), Causal(), span=span, kv_span=span, count=4)
    monkeypatch.setattr("models.primitives.block_topk.CHUNK_SCORES_CPU", 200)
    got = store.best(_score, (q,), (k,), Causal(), span=span, kv_span=span, count=4)
    assert torch.equal(got[1], want[1])


def test_of_rows_of_padding_nothing_is_brought_and_nothing_is_needed():
    """Under a balanced layout a row of padding lies nowhere: zeros are looked up in it, with the
    graph of the others."""
    what = Span.of(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), -1))
    nothing = what.map(lambda t: t[:, :0])
    index, there = find(what, nothing)
    assert index.shape == (2, 3) and not there.any()
    x = torch.zeros(2, 0, 4, requires_grad=True)
    y = take(x, index)
    assert y.shape == (2, 3, 4) and y.eq(0).all() and y.requires_grad
    assert take(torch.zeros(2, 0, 4, dtype=torch.int32), index).dtype == torch.int32


def test_best_of_is_a_stable_sort_in_order_of_place_whatever_is_equal():
    scores = torch.randint(0, 4, (50, 40)).double()  # ties at every rank
    scores[7, 3:] = -torch.inf
    scores[8] = torch.randn(40, dtype=torch.float64)
    scores[9] = -torch.inf
    for count in (3, 30, 60):
        ranked = scores.sort(dim=-1, descending=True, stable=True)
        is_one = ranked.values[:, :count] > -torch.inf
        want = ranked.indices[:, :count].masked_fill(~is_one, 40).sort(-1).values
        for value, index in (best_of(scores, count), by_rank_of_lines(scores, min(count, 40))):
            index = index.masked_fill(value == -torch.inf, 40)
            assert torch.equal(index, want)
            found = torch.cat([scores, torch.full((50, 1), -torch.inf)], 1).gather(-1, want)
            assert torch.equal(value, found)
