"""A segmented memory against its equations written token by token, and its summaries against
running from a state."""

import pytest
import torch

from models.carried_state import CarriedState
from models.primitives.compressive import CompressiveScan
from models.span import PADDING, Span
from tests.support.parity import packed, relative

RULES = ["linear", "delta"]


def tensors(span: Span, rule: str, seed: int = 0) -> list[torch.Tensor]:
    """q of 4 heads, k and v of 2, and under the delta rule what a token takes away."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*span.shape, *shape, generator=generator, dtype=torch.float64)

    weight = [noise(2).sigmoid() / 4] if rule == "delta" else []
    return [noise(4, 3), noise(2, 3), noise(2, 5), *weight]


def spelled(x, span: Span, segment, states=None):
    """(outputs, [row][head] (closed, pending)) by the definition, token by token."""
    q, k, v, *weight = x
    out, after = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), []
    for row in range(len(q)):
        after.append([])
        for head in range(k.shape[2]):
            closed, pending = (torch.zeros(3, v.shape[3], dtype=q.dtype) for _ in range(2))
            if states is not None:
                closed, pending = states[row][head]
            for t in range(span.shape[1]):
                pos = int(span.pos[row, t])
                if span.doc[row, t] == PADDING:
                    continue
                if pos == 0:
                    closed, pending = torch.zeros_like(closed), torch.zeros_like(pending)
                elif segment and pos % segment == 0:
                    closed, pending = closed + pending, torch.zeros_like(pending)
                for reader in (2 * head, 2 * head + 1):
                    out[row, t, reader] = q[row, t, reader] @ closed
                taken = weight[0][row, t, head] * (k[row, t, head] @ closed) if weight else 0
                pending = pending + torch.outer(k[row, t, head], v[row, t, head] - taken)
            after[-1].append((closed, pending))
    return out, after


@pytest.mark.parametrize("segment", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_its_recurrence_in_outputs_and_gradients(rule, segment):
    span = packed()
    leaves = [x.requires_grad_() for x in tensors(span, rule)]
    got, want = (
        CompressiveScan(segment)(leaves[:1], leaves[1:], span=span),
        spelled(leaves, span, segment)[0],
    )
    assert relative(got, want) < 1e-13
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    grads = [
        torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True) for y in (got, want)
    ]
    for x, *pair in zip(leaves, *grads):
        a, b = (
            torch.zeros_like(x) if grad is None else grad for grad in pair
        )  # None: nothing reads it
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_summaries_say_what_runs_do_to_any_state(rule):
    span, leaf = packed(), CompressiveScan(4)
    x = tensors(span, rule)
    runs = [[5, 0, 20, 1, 25], [13, 13, 13, 12, 0]]
    work = leaf.open(x[:1], x[1:], span=span, runs=runs)
    states = torch.randn(
        work.blank().shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    keep, gain, _ = work.summarise()
    assert relative(keep @ states + gain, work.final_states(states)) < 1e-13
    read = work.read(states)
    for row, lengths in enumerate(runs):
        start = 0
        for run, length in enumerate(lengths):
            part = slice(start, start + length)
            q_span = span.map(lambda t, r=row, p=part: t[r : r + 1, p])
            state = [[tuple(h.view(2, 3, 5)) for h in states[row, run]]]
            want, after = spelled([t[row : row + 1, part] for t in x], q_span, 4, state)
            assert relative(read[row : row + 1, part], want) < 1e-13
            left = torch.stack([torch.stack(pair) for pair in after[0]]).view_as(states[row, run])
            assert relative(work.final_states(states)[row, run], left) < 1e-13
            start += length


@pytest.mark.every_case
@pytest.mark.parametrize("segment", [None, 4])
@pytest.mark.parametrize("rule", RULES)
def test_row_by_row_with_its_past_is_the_whole_at_once(rule, segment):
    tokens, edges = 24, [0, 5, 8, 17, 24]  # rows of a lane, cut inside segments too
    pos = torch.cat([torch.arange(11), torch.arange(13)])[None]
    span = Span.of(pos, (torch.arange(tokens)[None] >= 11).long())
    x, leaf, past = tensors(span, rule), CompressiveScan(segment), CarriedState()
    leaf.place = "memory"
    closing = torch.zeros(tokens, dtype=torch.bool)
    closing[edges[:-1]] = True
    whole = spelled(x, span, segment)[0] if segment else by_rows(x, span, closing)
    for a, b in zip(edges[:-1], edges[1:]):
        row = past.attach(Span.of(pos[:, a:b], span.doc[:, a:b] - span.doc[:, a : a + 1]))
        assert (
            relative(leaf([x[0][:, a:b]], [t[:, a:b] for t in x[1:]], span=row), whole[:, a:b])
            < 1e-13
        )
        past.advance()


def by_rows(x, span: Span, closing):
    """As `spelled` where a segment is what a row holds of a document: one segment after another,
    each by itself."""
    states, out = None, []
    edges = [*closing.nonzero()[:, 0].tolist(), len(closing)]
    for a, b in zip(edges[:-1], edges[1:]):
        part, states = spelled(
            [t[:, a:b] for t in x], span.map(lambda t, p=slice(a, b): t[:, p]), None, states
        )
        out.append(part)
        states = [[(c + p, torch.zeros_like(p)) for c, p in row] for row in states]
    return torch.cat(out, 1)


def test_rows_of_nothing_but_padding_give_zeros_and_keep_the_state():
    span = Span.of(torch.zeros(1, 6, dtype=torch.long), torch.full((1, 6), PADDING))
    x, leaf = tensors(span, "delta"), CompressiveScan(2)
    work = leaf.open(x[:1], x[1:], span=span)
    states = torch.randn(work.blank().shape, dtype=torch.float64)
    assert work.read(states).eq(0).all() and torch.equal(work.final_states(states), states)
    assert torch.equal(work.summarise().keep[0, 0, 0], torch.eye(6, dtype=torch.float64))
