"""Scans and layers against the plain-torch forms of flash-linear-attention (float32, so 1e-5)."""

from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

from models.primitives.scan import Scan
from models.recurrent.linear import weighted_mean
from models.recurrent.retention import fading
from models.span import Span
from tests.support.parity import relative
from tests.support.scan_inputs import inputs

T, HEADS, D, E = 70, 3, 8, 6
SPAN = Span.line(2, T)
CLOSE = 1e-5


def theirs(module, name):
    """A function of fla, which takes longer to import than all these tests to run."""
    return getattr(import_module(f"fla.ops.{module}"), name)


def given(kind):
    return inputs(kind, SPAN, heads=HEADS, keys=D, values=E, dtype=torch.float32, strength=0.3)


def first(x):
    """Heads first, as some of the references want it."""
    return x.transpose(1, 2)


def linear():
    (q,), (k, v, _) = given("none")
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (
        weighted_mean(Scan(), q, k, v, SPAN),
        theirs("linear_attn.naive", "naive_recurrent_linear_attn")(q, k, v, normalize=True)[0],
    )


def retention():
    (q,), (k, v, _) = given("none")
    fade = torch.tensor(fading(HEADS)).expand(2, T, HEADS)
    return Scan()((q * D**-0.5,), (k, v, fade), span=SPAN), first(
        theirs("retention.naive", "naive_retention")(first(q), first(k), first(v))
    )


def scalar_gate():
    (q,), (k, v, decay) = given("scalar")
    return Scan()((q,), (k, v, decay), span=SPAN), theirs(
        "simple_gla.naive", "naive_recurrent_simple_gla"
    )(q, k, v, decay, scale=1.0)


def vector_gate():
    (q,), (k, v, decay) = given("vector")
    return Scan()((q * D**-0.5,), (k, v, decay), span=SPAN), theirs(
        "gla.naive", "naive_recurrent_gla"
    )(q, k, v, decay)[0]


def rwkv6():
    (q,), (k, v, decay) = given("vector")
    bonus = torch.randn(HEADS, D)
    want = theirs("rwkv6.recurrent_naive", "naive_recurrent_rwkv6")(
        *map(first, (q, k, v, decay)), bonus, scale=1.0
    )[0]
    now = (q * bonus * k).sum(-1, keepdim=True) * v
    return Scan(before=True)((q,), (k, v, decay), span=SPAN) + now, first(want)


def delta():
    (q,), (k, v, decay) = given("none")
    step = torch.rand(2, T, HEADS)
    want = theirs("delta_rule.naive", "delta_rule_recurrence")(*map(first, (q, k, v)), first(step))[
        0
    ]
    got = Scan()(
        (q * D**-0.5,), (k, step[..., None] * v, decay, k, -step[..., None] * k), span=SPAN
    )
    return got, first(want)


def low_rank():
    (q,), (k, v, decay, a, b) = given("vector delta")
    want = theirs("generalized_delta_rule.dplr.naive", "dplr_recurrence")(
        *map(first, (q, k, v, a, b, decay))
    )[0]
    return Scan()((q * D**-0.5,), (k, v, decay, a, b), span=SPAN), first(want)


CASES = [linear, retention, scalar_gate, vector_gate, rwkv6, delta, low_rank]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_scan_equals_the_reference(case):
    got, want = case()
    want = want[0] if isinstance(want, tuple) else want
    assert got.shape == want.shape and relative(got, want) < CLOSE
