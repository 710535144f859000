"""The Memorizing Transformer on one device: against a sort of all that is kept, and row by row
against the whole."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.chunked import Chunked
from models.attention.full import Attention
from models.attention.latent import LatentAttention
from models.attention.qk_norm import QKNorm
from models.carried_state import CarriedState, name_stateful_modules
from models.init import initialise
from models.memory.lookup import Memorizing
from models.positions.alibi import Alibi
from models.positions.rope import Rope
from models.recurrent.retention import Retention
from models.span import PADDING, Span
from tests.models.memory.test_compressive import (
    GROUPS,
    HEADS,
    LENGTHS,
    TOKENS,
    WIDTH,
    content,
    rows,
)
from tests.support.parity import relative

MIXERS = {
    "full": lambda: Attention(WIDTH, HEADS, GROUPS, Rope()),
    "alibi": lambda: Attention(WIDTH, HEADS, GROUPS, Alibi()),
    "qk_norm": lambda: QKNorm(WIDTH, HEADS, GROUPS, Rope()),
}


def build(mixer: nn.Module, memory: Memorizing) -> Any:
    """With gates and scales that differ, and weights large enough that no head is blunt."""
    model = initialise(memory.around(mixer, layer=0, layers=1), seed=1).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
            )
    name_stateful_modules(model)
    return model


def spelled(model, x: Tensor, segment: int, length: int, count: int) -> Tensor:
    """Query by query: sort what was kept of its document, take the best, two softmaxes, a gate."""
    out = torch.zeros(*x.shape[:2], HEADS, WIDTH // HEADS, dtype=x.dtype)
    gates, scales = model.beside.gate.sigmoid(), model.beside.scale
    q, k, v = (project(x).unflatten(-1, (-1, 4)) for project in (model.q, model.k, model.v))
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for tokens in lengths:
            span = Span.line(1, tokens)
            part = slice(begin, begin + tokens)
            q_turned, k_turned = (Rope().rotate(y[row : row + 1, part], span)[0] for y in (q, k))
            for t in range(tokens):
                start = t // segment * segment
                for head in range(HEADS):
                    scores = k_turned[start : t + 1, head // 2] @ q_turned[t, head] / 2
                    mean = scores.softmax(0) @ v[row, begin + start : begin + t + 1, head // 2]
                    first = max(0, start - length)
                    if first < start:
                        kept = slice(begin + first, begin + start)
                        keys = F.normalize(k[row, kept, head // 2].detach(), dim=-1)
                        products = keys @ F.normalize(q[row, begin + t, head], dim=-1)
                        best = products.argsort(descending=True)[:count]
                        found = (scales[head] * products[best]).softmax(0) @ v[
                            row, kept, head // 2
                        ].detach()[best]
                        mean = gates[head] * found + (1 - gates[head]) * mean
                    out[row, begin + t, head] = mean
            begin += tokens
    return F.linear(out.flatten(2), model.out.weight)


@pytest.mark.parametrize("segment, length, count", [(4, 9, 3), (10, 100, 2), (7, 8, 50), (2, 5, 2)])
def test_it_is_its_definition_in_outputs_and_gradients(segment, length, count):
    model, x = (
        build(MIXERS["full"](), Memorizing(length, segment=segment, count=count)),
        content().requires_grad_(),
    )
    leaves = [x, *model.parameters()]
    got, want = model(x, rows()), spelled(model, x, segment, length, count)
    assert relative(got, want) < 1e-12
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want))):
        assert relative(a, b) < 1e-11


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("name", MIXERS)
def test_rows_with_their_past_are_the_whole_wherever_they_are_cut(name, device):
    for length, segment in ((9, 5), (60, 4), (3, 1)):
        model, x, past = (
            build(MIXERS[name](), Memorizing(length, segment=segment, count=3, device=device)),
            content(),
            CarriedState(),
        )
        want = model(x, rows())
        for cuts in (
            [10, 20],
            [20, 21, 37],
            [8, 9, 22, 30],
        ):  # where segments end, where documents end, anywhere
            edges, got = [0, *cuts, TOKENS], []
            for start, stop in zip(edges[:-1], edges[1:]):
                got.append(model(x[:, start:stop], past.attach(rows(start, stop))))
                past.advance()
            assert relative(torch.cat(got, 1), want) < 1e-12


def test_where_a_row_is_a_segment_it_finds_the_rows_before():
    x, line, past = content()[:1], Span.line(1, TOKENS), CarriedState()
    by_address, by_row = (
        build(MIXERS["full"](), Memorizing(18, segment=s, count=4)) for s in (9, None)
    )
    with torch.no_grad():  # scales start where the number of kept tokens says
        by_row.beside.scale.copy_(by_address.beside.scale)
    want = by_address(x, line)
    for start in range(0, TOKENS, 9):
        part = line.map(lambda t, s=start: t[:, s : s + 9])
        assert (
            relative(by_row(x[:, start : start + 9], past.attach(part)), want[:, start : start + 9])
            < 1e-12
        )
        past.advance()


def test_nothing_is_learned_through_the_store():
    """A token learns from its own segment alone, and of no other document, though its output
    depends on more."""
    model, x = (
        build(MIXERS["full"](), Memorizing(100, segment=4, count=3)),
        content().requires_grad_(),
    )
    span = rows()
    out = model(x, span)
    for t in (0, 3, 4, 19, 20, 21, 30, 44):
        (grad,) = torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)
        same = (span.doc[0] == span.doc[0, t]) & (span.pos[0] // 4 == span.pos[0, t] // 4)
        assert torch.equal(grad[0].abs().sum(-1) > 0, same & (torch.arange(TOKENS) <= t))
    moved = content()
    moved[0, 22:25] += 1  # positions 1 to 3 of the third document
    change = (model(moved, span) - out).abs().sum(-1)[0] > 1e-9
    assert change[25:].any() and not change[:22].any()
    moved = content()
    moved[0, 30] += 1
    assert not ((model(moved, span) - out).abs().sum(-1)[0] > 0)[:30].any()


def test_the_end_of_a_document_and_padding_clear_the_store():
    model, x = build(MIXERS["full"](), Memorizing(30, count=3)), content()[:1, :8]
    line = Span.line(1, 24)
    first, second = (line.map(lambda t, s=s: t[:, s : s + 8]) for s in (0, 8))
    past = CarriedState()

    def read(span: Span, past: CarriedState) -> Tensor:
        out = model(x, past.attach(span))
        past.advance()
        return out

    alone = read(second, CarriedState())  # nothing was kept
    start, joined, fresh = read(first, past), read(second, past), read(first, past)
    assert relative(joined, alone) > 1e-2 and relative(fresh, start) == 0
    two = Span.of(
        torch.cat([second.pos[:, :3], first.pos[:, :5]], 1), (torch.arange(8) > 2).long()[None]
    )
    after, without = read(two, past), read(two, CarriedState())
    assert (
        relative(after[:, :3], without[:, :3]) > 1e-2
        and relative(after[:, 3:], without[:, 3:]) == 0
    )
    read(first, past)
    read(Span.of(first.pos, torch.where(first.pos < 5, 0, PADDING)), past)
    assert relative(read(second, past), alone) == 0


def test_stores_stand_three_quarters_up_or_where_they_are_wanted():
    assert [Memorizing(9).chosen(n)[0] for n in (1, 2, 4, 8, 12)] == [0, 1, 2, 5, 8]
    memory = Memorizing(9, layers=[0, 3], segment=4)
    mixers: list[Any] = [
        memory.around(MIXERS["full"](), layer=layer, layers=4) for layer in range(4)
    ]
    assert [mixer.beside is not None for mixer in mixers] == [True, False, False, True]
    assert all(
        mixer.mix.mask == Chunked(WIDTH, 4, 2, Rope(), size=4).mix.mask for mixer in mixers
    )  # all see a segment only
    other = LatentAttention(WIDTH, HEADS, Rope())
    assert (
        Memorizing(9, layers=[1]).around(other, layer=0, layers=2) is other
    )  # no segments: it sees the row, as ever


def test_what_has_no_exact_form_is_refused_by_name():
    memory = Memorizing(9, layers=[0], segment=4)
    for layer, mixer, word in (
        (0, Retention(WIDTH, HEADS), "Retention"),
        (1, LatentAttention(WIDTH, HEADS, Rope()), "LatentAttention"),
    ):
        with pytest.raises(ValueError, match=f"memory=lookup.*{word}"):
            memory.around(mixer, layer=layer, layers=2)
    assert isinstance(memory.around(Retention(WIDTH, HEADS), layer=1, layers=2), Retention)
    with pytest.raises(ValueError, match=r"memory.layers=\[4\]"):
        Memorizing(9, layers=[4]).around(MIXERS["full"](), layer=0, layers=2)
    for settings in ({"length": 0}, {"segment": 0}, {"count": 0}, {"device": "disk"}):
        with pytest.raises(ValueError, match=f"memory.{next(iter(settings))}="):
            Memorizing(**{"length": 9, **settings})
