"""Longformer against a loop over queries that spells out which projections each reads."""

import pytest
import torch

from models.attention.longformer import Longformer
from models.init import initialise
from models.positions.none import NoPosition
from models.span import GLOBAL, Span


def _loop(layer, x, span, gaps, reach, first, every, symmetric):
    """One query at a time: global ones through the global projections, over everything."""
    heads, width = len(gaps), layer.head_width
    every_projection = [layer.q, layer.k, layer.v, layer.global_q, layer.global_k, layer.global_v]
    q, k, v, gq, gk, gv = (p(x).unflatten(-1, (heads, width)) for p in every_projection)
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        pos, doc = span.pos[b].tolist(), span.doc[b].tolist()
        important = [
            r == GLOBAL or p < first or (every and p % every == 0)
            for p, r in zip(pos, span.role[b].tolist())
        ]
        for t in range(x.shape[1]):
            for h in range(heads):
                keys = []
                for s in range(x.shape[1]):
                    apart = abs(pos[t] - pos[s])
                    near = apart % gaps[h] == 0 and apart // gaps[h] < reach
                    if (
                        doc[t] == doc[s]
                        and (symmetric or pos[s] <= pos[t])
                        and (near or important[s] or important[t])
                    ):
                        keys.append(s)
                one = (gq, gk, gv) if important[t] else (q, k, v)
                logits = torch.stack([one[0][b, t, h] @ one[1][b, s, h] for s in keys]) / width**0.5
                out[b, t, h] = sum(w * one[2][b, s, h] for w, s in zip(logits.softmax(0), keys))
    return layer.out(out.flatten(-2))


@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_what_the_loop_computes(symmetric):
    gaps = [1, 2, 3]
    settings = {"window": 3, "dilation": gaps, "first": 1, "every": 6, "symmetric": symmetric}
    layer = initialise(Longformer(12, 3, 3, NoPosition(), 0, 1, **settings), seed=0).double()
    pos = torch.cat([torch.arange(11), torch.arange(7)])[None]
    doc = (torch.arange(18) >= 11).long()[None]
    span = Span.of(pos, doc, torch.where(torch.arange(18) == 4, GLOBAL, 0)[None])
    x = torch.randn(1, 18, 12, dtype=torch.float64) * 3
    want = _loop(layer, x, span, gaps, 3, 1, 6, symmetric)
    torch.testing.assert_close(layer(x, span), want, rtol=0, atol=1e-13)


def test_every_layer_may_have_a_reach_of_its_own():
    x, span = torch.randn(1, 20, 12, dtype=torch.float64), Span.line(1, 20)
    moved = x.clone()
    moved[:, 10] += 1
    for layer, reach in enumerate([2, 5]):
        one = initialise(
            Longformer(12, 3, 3, NoPosition(), layer, 2, window=[2, 5], first=0), seed=0
        ).double()
        touched = (one(x, span) != one(moved, span)).any(-1)[0].nonzero()[:, 0].tolist()
        assert touched == list(range(10, 10 + reach))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": [1, 2, 3]}, "model.layers=2"),
        ({"window": 4, "dilation": [1, 2]}, "model.heads=3"),
    ],
)
def test_lists_of_the_wrong_length_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Longformer(12, 3, 3, NoPosition(), 0, 2, **settings)
