"""The forms of a scan are one thing, in outputs and gradients."""

import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.primitives.scan import Scan
from models.span import Span
from tests.support.parity import packed, relative
from tests.support.scan_inputs import KINDS, inputs


def holes() -> Span:
    """Documents with padding in their midst, at the start and at the end."""
    span = packed([[13, 1, 24, 9], [3, 40, 1, 1]], 51)
    pos, doc = torch.full((2, 60), 0), torch.full((2, 60), -1)
    there = torch.tensor([t for t in range(60) if t not in (0, 7, 8, 9, 20, 41, 42, 59)])[:51]
    pos[:, there], doc[:, there] = span.pos, span.doc
    return Span.of(pos, doc)


def both(run, query, payload):
    """Outputs, and the gradients of all inputs under one random weighting of the outputs."""
    leaves = [x.clone().requires_grad_() for x in (*query, *payload)]
    out = run(leaves[:1], leaves[1:])
    weight = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    ).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks_equal_the_recurrence(kind, before, chunk):
    span = holes()
    query, payload = inputs(kind, span)
    leaf = Scan(before=before, chunk=chunk)
    want = both(lambda q, p: leaf.recur(q, p, span=span)[0], query, payload)
    got = both(lambda q, p: leaf(q, p, span=span), query, payload)
    assert max(map(relative, got, want)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_in_runs_equals_the_row_at_once(kind):
    span, leaf = holes(), Scan(chunk=4)
    query, payload = inputs(kind, span)
    lengths = [[5, 0, 30, 25], [1, 21, 8, 30]]  # not the same in both rows, one empty

    def by_runs(q, p):
        work = leaf.open(q, p, span=span, runs=lengths)
        keep, gain, opened = work.summarise()
        states = [torch.zeros_like(gain[:, 0])]
        for r in range(3):
            passed = (
                keep[:, r] @ states[r] if keep.dim() == 5 else keep[:, r, ..., None] * states[r]
            )
            states.append(passed + gain[:, r])
        assert not keep[opened].any()
        return work.read(torch.stack(states, 1))

    got, want = (
        both(by_runs, query, payload),
        both(lambda q, p: leaf(q, p, span=span), query, payload),
    )
    assert max(map(relative, got, want)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_goes_on_from_its_past(kind):
    span, leaf = Span.line(2, 40), Scan(chunk=8)
    query, payload = inputs(kind, span)
    want, last = leaf.recur(query, payload, span=span)
    first, then = slice(0, 23), slice(23, 40)
    past = leaf.recur(
        [x[:, first] for x in query],
        [x[:, first] for x in payload],
        span=span.map(lambda x: x[:, first]),
    )
    rest = [x[:, then] for x in query], [x[:, then] for x in payload]
    work = leaf.open(*rest, span=span.map(lambda x: x[:, then]))
    assert relative(work.read(past[1][:, None]), want[:, then]) < 1e-11
    assert relative(work.final_states(past[1][:, None])[:, 0], last) < 1e-11


@pytest.mark.short("vector")
@pytest.mark.parametrize(
    "kind",
    [
        "vector",
        "scalar delta",
        pytest.param("scalar", marks=pytest.mark.full),
        pytest.param("vector delta", marks=pytest.mark.full),
    ],
)
def test_float32_stands_strong_decay_over_8192_tokens(kind):
    """Log decays of about -30 at every fourth token underflow a product of gates; the others keep
    almost all."""
    span, leaf = Span.line(1, 8192), Scan()
    query, payload = inputs(kind, span, heads=1, keys=8, values=8)
    decay = payload[2]
    payload[2][:] = torch.where(
        (torch.arange(8192) % 4 == 0).view(1, -1, *[1] * (decay.dim() - 2)),
        30 * decay,
        decay / 1000,
    )
    want = both(lambda q, p: leaf.recur(q, p, span=span)[0], query, payload)
    single = [x.float() for x in query], [x.float() for x in payload]
    got = both(lambda q, p: leaf(q, p, span=span), *single)
    assert all(x.isfinite().all() for x in got)
    assert max(relative(a.double(), b) for a, b in zip(got, want)) < 1e-4


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_forgetting_all_is_allowed(kind):
    span, leaf = Span.line(1, 24), Scan(chunk=8)
    query, payload = inputs(kind, span)
    payload[2][:, 9] = -math.inf
    want, got = leaf.recur(query, payload, span=span)[0], leaf(query, payload, span=span)
    assert got.isfinite().all() and relative(got, want) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_other_documents_and_padding_may_be_poison(kind):
    span, leaf = holes(), Scan(chunk=8)
    query, payload = inputs(kind, span)
    poison = (span.doc != 2) & ~((span.doc == 1) & (torch.arange(2) == 1)[:, None])
    bad = [
        torch.where(poison.view(*poison.shape, *[1] * (x.dim() - 2)), torch.nan, x)
        for x in (*query, *payload)
    ]
    want = both(lambda q, p: leaf(q, p, span=span)[~poison], query, payload)
    got = both(lambda q, p: leaf(q, p, span=span)[~poison], bad[:1], bad[1:])
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a[~poison], b[~poison]) for a, b in zip(got[1:], want[1:]))
    assert not leaf(query, payload, span=span)[span.doc < 0].any()


def flops(kind, tokens):
    span = Span.line(1, tokens)
    query, payload = inputs(kind, span)
    leaves = [x.requires_grad_() for x in (*query, *payload)]
    with FlopCounterMode(display=False) as counter:
        Scan(chunk=16)(leaves[:1], leaves[1:], span=span).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_eight_times_the_tokens_cost_eight_times_the_products(kind):
    few, many = flops(kind, 128), flops(kind, 1024)
    assert few > 0 and many <= 8.1 * few


@pytest.mark.full
def test_chunks_take_less_than_a_fifth_of_the_time_of_the_recurrence():
    """Processor time of one thread, forward and backward, 2,048 tokens of 8 heads of 64; measured
    16 at 8,192 tokens."""
    span, leaf = Span.line(1, 2048), Scan()
    query, payload = inputs(
        "scalar", span, heads=8, keys=64, values=64, dtype=torch.float32, strength=0.1
    )
    leaves = [x.requires_grad_() for x in (*query, *payload)]

    def seconds(run):
        taken = []
        for _ in range(3):
            start = time.process_time()
            run(leaves[:1], leaves[1:]).sum().backward()
            taken.append(time.process_time() - start)
        return min(taken)

    assert 5 * seconds(lambda q, p: leaf(q, p, span=span)) < seconds(
        lambda q, p: leaf.recur(q, p, span=span)[0]
    )
