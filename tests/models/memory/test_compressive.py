"""Infini-attention on one device: against the paper's equations, head by head and segment by
segment."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.bidirectional import Bidirectional
from models.attention.full import Attention
from models.attention.gated import Gated
from models.attention.latent import LatentAttention
from models.attention.qk_norm import QKNorm
from models.attention.sinks import Sinks
from models.carried_state import CarriedState, name_stateful_modules
from models.init import initialise
from models.memory.compressive import Compressive, CompressiveMemory
from models.positions.alibi import Alibi
from models.positions.learned import Learned
from models.positions.relative import Relative
from models.positions.rope import Rope
from models.recurrent.retention import Retention
from models.span import Span
from tests.support.parity import relative

WIDTH, HEADS, GROUPS, TOKENS = 16, 4, 2, 45
LENGTHS = [[20, 1, 24], [37, 8]]
RULES = ["linear", "delta"]
MIXERS = {
    "full": lambda: Attention(WIDTH, HEADS, GROUPS, Rope()),
    "alibi": lambda: Attention(WIDTH, HEADS, GROUPS, Alibi()),
    "relative": lambda: Attention(WIDTH, HEADS, GROUPS, Relative()),
    "sinks": lambda: Sinks(WIDTH, HEADS, GROUPS, Rope(), window=2, sink_tokens=1),
    "gated": lambda: Gated(WIDTH, HEADS, GROUPS, Rope()),
    "qk_norm": lambda: QKNorm(WIDTH, HEADS, GROUPS, Rope()),
}


def rows(start: int = 0, stop: int = TOKENS) -> Span:
    """A stretch of two lanes, documents numbered from the stretch's first."""
    pos = torch.stack([torch.cat([torch.arange(n) for n in lane]) for lane in LENGTHS])
    doc = torch.stack(
        [torch.cat([torch.full((n,), i) for i, n in enumerate(lane)]) for lane in LENGTHS]
    )
    return Span.of(pos[:, start:stop], (doc - doc[:, start : start + 1])[:, start:stop])


def content() -> Tensor:
    return 3 * torch.randn(
        len(LENGTHS), TOKENS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )


def build(mixer: nn.Module, rule: str, segment: int | None) -> Any:
    """With gates that differ, and weights large enough that no head is blunt."""
    model = initialise(Compressive(rule=rule, segment=segment).around(mixer), seed=1).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
            )
    name_stateful_modules(model)
    return model


def spelled(model, x: Tensor, rule: str, segment: int) -> Tensor:
    """The paper's equations (1) to (10) of arXiv:2404.07143 for every document and head, one
    segment after another."""
    out = torch.zeros(*x.shape[:2], HEADS, WIDTH // HEADS, dtype=x.dtype)
    gates = model.beside.gate.sigmoid()
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            for head in range(HEADS):
                channels = slice(4 * head, 4 * head + 4)
                shared = slice(4 * (head // 2), 4 * (head // 2) + 4)
                memory, lse = torch.zeros(4, 4, dtype=x.dtype), torch.zeros(4, dtype=x.dtype)
                for first in range(0, length, segment):
                    part = slice(begin + first, begin + min(length, first + segment))
                    q, k, v = (
                        F.linear(x[row, part], weight)
                        for weight in (
                            model.q.weight[channels],
                            model.k.weight[shared],
                            model.v.weight[shared],
                        )
                    )
                    span = Span.line(1, length).map(lambda t, f=first: t[:, f : f + segment])
                    q_turned, k_turned = (
                        Rope().rotate(y[None, :, None], span)[0, :, 0] for y in (q, k)
                    )
                    scores = (q_turned @ k_turned.T / 2).masked_fill(
                        torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf
                    )
                    local, q, k = scores.softmax(-1) @ v, F.elu(q) + 1, F.elu(k) + 1
                    if first:
                        recalled = (q @ memory) / (q @ lse)[:, None]
                        out[row, part, head] = gates[head] * recalled + (1 - gates[head]) * local
                        known = (k @ memory) / (k @ lse)[:, None]
                    else:
                        out[row, part, head], known = local, 0
                    memory = memory + k.T @ (v - known if rule == "delta" else v)
                    lse = lse + k.sum(0)
            begin += length
    return F.linear(out.flatten(2), model.out.weight)


@pytest.mark.parametrize("segment", [1, 4, 10])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_equations_of_the_paper_in_outputs_and_gradients(rule, segment):
    model, x = build(MIXERS["full"](), rule, segment), content().requires_grad_()
    leaves = [x, *model.parameters()]
    got, want = model(x, rows()), spelled(model, x, rule, segment)
    assert relative(got, want) < 1e-12
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want))):
        assert relative(a, b) < 1e-11


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("rule", RULES)
def test_rows_with_their_past_are_the_whole_wherever_they_are_cut(rule, name):
    model, x, past = build(MIXERS[name](), rule, 5), content(), CarriedState()
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


@pytest.mark.parametrize("rule", RULES)
def test_where_a_row_is_a_segment_it_reads_the_rows_before(rule):
    """With `segment` the length of a row, rows of one document are the same thing."""
    x = content()[:1]
    by_address, by_row = (build(MIXERS["full"](), rule, segment) for segment in (9, None))
    line = Span.line(1, TOKENS)
    want, past = by_address(x, line), CarriedState()
    for start in range(0, TOKENS, 9):
        part = line.map(lambda t, s=start: t[:, s : s + 9])
        assert (
            relative(by_row(x[:, start : start + 9], past.attach(part)), want[:, start : start + 9])
            < 1e-12
        )
        past.advance()
    assert past.bytes() == 8 * GROUPS * (
        2 * 4 * 5 if rule == "linear" else 2 * 4 * 4 + 2 * 4 * 1
    )  # whatever was read


@pytest.mark.parametrize("rule", RULES)
def test_nothing_reaches_back_in_time_or_into_another_document(rule):
    model, x = build(MIXERS["full"](), rule, 4), content().requires_grad_()
    span = rows()
    for t in (0, 3, 4, 19, 20, 21, 30, 44):
        (grad,) = torch.autograd.grad(model(x, span)[0, t].sum(), x)
        reached = grad[0].abs().sum(-1) > 0
        want = (span.doc[0] == span.doc[0, t]) & (torch.arange(TOKENS) <= t)
        assert torch.equal(reached, want)


@pytest.mark.parametrize("rule", RULES)
def test_in_a_first_segment_there_is_local_attention_alone(rule):
    model, x = build(MIXERS["full"](), rule, 100), content()
    plain = MIXERS["full"]().double()
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("beside")}
    )
    got = model(x, rows())
    assert relative(got, plain(x, rows())) < 1e-13
    got.sum().backward()
    assert model.beside.gate.grad.eq(0).all() and all(
        p.grad.isfinite().all() for p in model.parameters()
    )


def test_the_delta_rule_overwrites_where_the_linear_rule_averages():
    """A key is bound twice, a segment each; what is then answered holds the first value, or does
    not."""
    key, line = torch.randn(1, 1, 1, 4, dtype=torch.float64), Span.line(1, 3)
    q = k = key.expand(1, 3, 1, 4)
    v = torch.eye(4, dtype=torch.float64)[None, :3, None]
    for rule, old in (("linear", 0.5), ("delta", 0.0)):
        memory = CompressiveMemory(1, rule, 1).double()
        nn.init.constant_(memory.gate, 100.0)
        answer = memory(q, k, v, torch.zeros_like(v), line)[0, 2, 0]
        assert torch.allclose(
            answer, torch.tensor([old, 0.5, 0, 0], dtype=torch.float64), atol=1e-12
        )


def test_what_has_no_exact_form_is_refused_by_name():
    for mixer, word in (
        (Bidirectional(WIDTH, HEADS, GROUPS, Rope()), "bidirectional"),
        (LatentAttention(WIDTH, HEADS, Rope()), "LatentAttention"),
        (Attention(WIDTH, HEADS, GROUPS, Learned(99)), "99"),
    ):
        with pytest.raises(ValueError, match=f"memory=compressive.*{word}"):
            Compressive().around(mixer)
    wrong: list[dict[str, Any]] = [{"rule": "gated"}, {"segment": 0}, {"length": 7}]
    for settings in wrong:
        with pytest.raises(ValueError, match=f"memory.{next(iter(settings))}="):
            Compressive(**settings)


def test_a_layer_without_a_softmax_stays_as_it_is_but_one_layer_must_have_the_memory():
    memory, scan, attention = (
        Compressive(),
        Retention(WIDTH, HEADS),
        Attention(WIDTH, HEADS, GROUPS, Rope()),
    )
    left = [memory.around(scan), memory.around(attention)]
    assert left == [scan, attention] and attention.beside is not None
    memory.validate_mixers(left)
    with pytest.raises(
        ValueError,
        match="memory=compressive stands beside the heads of attention, and no layer has any",
    ):
        memory.validate_mixers([scan])
