"""Partial attentions add up: merged in any order, over any blocks, in any dtype, they are the
attention over all keys."""

import torch

from models.attention.full import CAUSAL
from models.kernels import blockwise
from models.primitives.softmax import attention_spec, incoming_gradients
from models.scores import Score
from models.span import Span

RANKS, TOKENS, HEADS, WIDTH = 16, 1024, 2, 32


def test_merging_is_safe_where_one_side_or_both_saw_nothing_or_masses_are_far_apart():
    mean, nothing = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    lse, never = torch.full((1, 1, 1), 200.0), torch.full((1, 1, 1), -torch.inf)
    for a, b in (
        ((mean, lse), (nothing, never)),
        ((nothing, never), (mean, lse)),
        ((mean, lse), (-mean, -lse)),
    ):
        got = blockwise.merge_partials(a, b)
        torch.testing.assert_close(got[0], mean)
        torch.testing.assert_close(got[1], lse)
    got = blockwise.merge_partials((nothing, never), (nothing, never))
    assert not got[0].any() and (got[1] == -torch.inf).all()


def simulated(q, k, v, d_out, ranks):
    """Attention as `ranks` ranks of a ring compute it, block after block in one process: (mean,
    gradients), cast once."""
    each = TOKENS // ranks
    parts = [slice(i * each, (i + 1) * each) for i in range(ranks)]
    whole = Span.line(1, TOKENS)
    spans = [whole.map(lambda t, p=p: t[:, p]) for p in parts]
    what = attention_spec(CAUSAL, Score(), (q,), None)
    mean, d_q = torch.empty_like(q), torch.empty_like(q)
    sums = blockwise.Gradients.zeros((), (k, v), ()).payload
    for mine in range(ranks):
        here = (q[:, parts[mine]],)
        total = blockwise.empty_partial(here, HEADS, WIDTH)
        order = [(mine - step) % ranks for step in range(ranks)]
        for other in order:
            blockwise.forward(
                what,
                here,
                (k[:, parts[other]], v[:, parts[other]]),
                (),
                spans[mine],
                spans[other],
                total,
            )
        mean[:, parts[mine]] = total[0].to(q.dtype)
        grad, delta, total = incoming_gradients(
            d_out[:, parts[mine]], None, mean[:, parts[mine]], total[1]
        )
        into = blockwise.Gradients.zeros(here, (), ())
        for other in order:
            there = k[:, parts[other]], v[:, parts[other]]
            into.payload = [s[:, parts[other]] for s in sums]
            blockwise.backward(
                what,
                here,
                there,
                (),
                spans[mine],
                spans[other],
                d_out=grad,
                total=total,
                delta=delta,
                into=into,
            )
        d_q[:, parts[mine]] = into.query[0].to(q.dtype)
    return mean, d_q, *(s.to(q.dtype) for s in sums)


def error(got, want):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want)]


def test_sixteen_ranks_in_bfloat16_are_no_worse_than_one_device():
    torch.manual_seed(0)
    low = [torch.randn(1, TOKENS, HEADS, WIDTH).bfloat16() for _ in range(4)]
    truth = simulated(*(x.double() for x in low), 1)
    one, many = error(simulated(*low, 1), truth), error(simulated(*low, RANKS), truth)
    assert all(e > 1e-4 for e in one), "bfloat16 has to show, or the comparison says nothing"
    assert all(b <= 1.5 * a for a, b in zip(one, many)), (one, many)


def test_in_float64_any_number_of_ranks_is_the_same():
    torch.manual_seed(0)
    wide = [torch.randn(1, TOKENS, HEADS, WIDTH, dtype=torch.float64) for _ in range(4)]
    assert max(error(simulated(*wide, RANKS), simulated(*wide, 1))) < 1e-13
