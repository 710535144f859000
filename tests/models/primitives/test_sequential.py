"""A Relay reads piece after piece: how rows are cut, what is handed on, and how far gradients go
back."""

import pytest
import torch
from torch import nn

from models.init import initialise
from models.primitives.sequential import (
    SequentialScan,
    misfits,
    segments_by_document,
    segments_by_row,
    sequential_modules,
)
from models.span import Span
from tests.support.parity import packed, relative
from tests.support.recurrent_scan import Lstm, Summing

ROWS = [[7, 1, 10], [3, 12]]


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def lstm(**settings):
    return initialise(Lstm(5, 6, **settings), seed=1).double()


def summing(**settings):
    return initialise(Summing(5, **settings), seed=1).double()


def test_documents_are_cut_where_they_begin_and_every_so_many_tokens_from_there():
    index = segments_by_document(packed([[5, 1, 4], [7]], 12), 3, 1)
    assert index[0].tolist() == [[0, 1, 2], [3, 4, -1], [5, -1, -1], [6, 7, 8], [9, -1, -1]]
    assert index[1].tolist() == [[0, 1, 2], [3, 4, 5], [6, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    whole = segments_by_document(packed([[5, 1, 4], [7]], 12), None, 4)
    assert whole[0].tolist()[1:] == [[5, *[-1] * 6], [6, 7, 8, 9, -1, -1, -1]] and whole[
        1, 0
    ].tolist() == [*range(7)]
    assert segments_by_document(packed([[]], 4), 3, 1).tolist() == [[[-1]]]


def test_a_row_that_begins_inside_a_document_begins_a_piece():
    span = packed([[5, 7]], 12).map(lambda t: t[:, 2:])
    assert segments_by_document(span, 4, 1)[0].tolist() == [
        [0, 1, 2, -1],
        [3, 4, 5, 6],
        [7, 8, 9, -1],
    ]


def test_rows_are_cut_into_equal_pieces():
    assert segments_by_row(Span.line(1, 5), 2, 1)[0].tolist() == [[0, 1], [2, 3], [4, -1]]
    assert segments_by_row(Span.line(1, 5), None, 1).shape == (1, 1, 5) and segments_by_row(
        Span.line(2, 5), None, 3
    ).shape == (2, 3, 2)
    assert SequentialScan().pieces(Span.line(1, 5), 2, 4).index.shape == (1, 4, 2)


@pytest.mark.parametrize("size", [None, 1, 4, 100])
def test_an_lstm_is_torchs_whatever_the_pieces(size):
    """Each document alone through torch's own."""
    model, span, x = lstm(size=size), packed(ROWS, 20), noise(2, 20, 5)
    theirs = nn.LSTM(5, 6, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for name, part in (("ih", slice(0, 5)), ("hh", slice(5, 11))):
            i, f, o, new = model.cell.gates.weight[:, part].chunk(4)
            getattr(theirs, f"weight_{name}_l0").copy_(torch.cat([i, f, new, o]))
            getattr(theirs, f"bias_{name}_l0").zero_()
        y, (h, _) = model(x, span)
        for row, lengths in enumerate(ROWS):
            start = 0
            for length in lengths:
                want = theirs(x[row : row + 1, start : start + length])[0][0]
                assert relative(y[row, start : start + length], want) < 1e-12
                start += length
            assert y[row, start:].abs().max() == 0 and relative(h[row], want[-1]) < 1e-12


@pytest.mark.parametrize("build", [lstm, summing])
def test_piece_by_piece_with_the_state_before_is_the_whole_at_once(build):
    """Outputs, the last state, and gradients of everything; documents end at 7 and 8, pieces are
    cut at 8 and 16."""
    model, span, x = build(size=4), packed([[7, 1, 10], [8, 12]], 20), noise(2, 20, 5)
    grads, outs = [], []
    for cuts in ([0, 20], [0, 8, 16, 20]):
        inputs, state, found = x.clone().requires_grad_(), None, []
        for a, b in zip(cuts[:-1], cuts[1:]):
            y, state = model(inputs[:, a:b], span.map(lambda t, a=a, b=b: t[:, a:b]), state)
            found.append(y)
        model.zero_grad()
        (torch.cat(found, 1).square().sum() + sum(s.sum() for s in state)).backward()
        outs.append([torch.cat(found, 1), *state])
        grads.append([inputs.grad, *(p.grad.clone() for p in model.parameters())])
    assert all(relative(a, b) < 1e-12 for some in (outs, grads) for a, b in zip(*some))


def test_a_row_whose_pieces_are_used_up_keeps_its_state_and_its_gradient():
    """The last states of a short row beside a long one are those of the short row alone, also where
    gradients are cut."""
    model, x = summing(size=4, depth=1), noise(2, 20, 5)
    both, (found,) = model(x, packed([[18], [6]], 20))
    both_grad = torch.autograd.grad(found[1].sum(), model.write.parameters())
    alone, (want,) = model(x[1:], packed([[6]], 20))
    alone_grad = torch.autograd.grad(want.sum(), model.write.parameters())
    assert relative(both[1], alone[0]) < 1e-12 and relative(found[1], want[0]) < 1e-12
    assert (
        max(relative(a, b) for a, b in zip(both_grad, alone_grad)) < 1e-12
        and alone_grad[0].abs().max() > 0
    )


@pytest.mark.every_case
@pytest.mark.parametrize("build", [lstm, summing])
@pytest.mark.parametrize("depth", [1, 2, 3, None])
def test_no_gradient_goes_back_over_more_than_depth_pieces(build, depth):
    model, x = build(size=4, depth=depth), noise(1, 20, 5).requires_grad_()
    y, _ = model(x, Span.line(1, 20))
    for piece in range(5):
        (d_x,) = torch.autograd.grad(y[0, 4 * piece : 4 * piece + 4].sum(), x, retain_graph=True)
        reached = [d_x[0, 4 * i : 4 * i + 4].abs().max() > 0 for i in range(5)]
        assert reached == [
            (i // (depth or 5) == piece // (depth or 5)) and i <= piece for i in range(5)
        ]


def test_what_does_not_carry_a_row_is_refused():
    with pytest.raises(ValueError, match="a segment of 0 tokens is empty"):
        lstm(size=0)(noise(1, 4, 5), Span.line(1, 4))
    with pytest.raises(ValueError, match="rows=0"):
        SequentialScan(rows=0)


class Owner(nn.Module):
    """Steps through what stands beside it."""

    def sequential_parts(self, parent):
        return [parent.blocks]


def test_the_owner_says_what_runs_inside_its_steps():
    model = nn.Module()
    model.outer = nn.Module()
    model.outer.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.outer.owner, model.head = Owner(), nn.Linear(2, 2)
    assert sequential_modules(model) == {model.outer.blocks, *model.outer.blocks}
    assert misfits(model) == []
    model.outer.blocks[1].auxiliary = model.head.auxiliary = {}
    (said,) = misfits(model)
    assert said.startswith("outer.blocks.1 (Linear) leaves a loss of its own at each pass")
