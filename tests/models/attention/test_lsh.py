"""LSH attention against a loop over rounds, and the two things it promises: causality, and full
attention in the limit."""

import pytest
import torch

from models.attention import lsh
from models.attention.lsh import ALONE, LSHAttention
from models.init import initialise
from models.kernels.pairs import readings
from models.positions.none import NoPosition
from models.positions.rope import Rope
from models.positions.t5 import T5
from models.span import Span


def _layer(position=None, **settings) -> LSHAttention:
    return initialise(
        LSHAttention(12, 3, position or NoPosition(), 0, 5, 32, **settings), seed=0
    ).double()


def _two_documents() -> Span:
    pos = torch.cat([torch.arange(19), torch.arange(9), torch.zeros(2, dtype=torch.long)])
    doc = torch.cat([torch.zeros(19), torch.ones(9), torch.full((2,), -1.0)]).long()
    return Span.of(pos[None], doc[None])


def _loop(layer: LSHAttention, x: torch.Tensor, span: Span) -> torch.Tensor:
    """Round by round over sets of keys, merged by mass with shared keys counted once, as the paper
    writes it."""
    q, v = layer.qk(x).unflatten(-1, (3, 4))[0], layer.v(x).unflatten(-1, (3, 4))[0]
    bucket, out = layer.hashed(q[None])[0], torch.zeros_like(q)
    pos, doc = span.pos[0].tolist(), span.doc[0].tolist()
    for h in range(3):
        for t in range(len(pos)):
            if doc[t] < 0:
                continue
            shown = []
            for n in range(bucket.shape[-1]):
                mates = [
                    s
                    for s in range(len(pos))
                    if doc[s] == doc[t] and bucket[s, h, n] == bucket[t, h, n]
                ]
                mine = mates.index(t) // layer.chunk_size
                shown.append(
                    {
                        s
                        for i, s in enumerate(mates)
                        if pos[s] <= pos[t] and i // layer.chunk_size in (mine, mine - 1)
                    }
                )
            masses, means = [], []
            for keys in map(sorted, shown):
                times = torch.tensor([sum(s in other for other in shown) for s in keys]).double()
                logits = torch.stack(
                    [q[t, h] @ q[s, h] / q[s, h].norm() + (ALONE if s == t else 0) for s in keys]
                )
                logits = logits - times.log()
                masses.append(logits.logsumexp(0))
                means.append((logits.softmax(0)[:, None] * v[keys, h]).sum(0))
            out[t, h] = (torch.stack(masses).softmax(0)[:, None] * torch.stack(means)).sum(0)
    return layer.out(out.flatten(-2))[None]


def test_it_is_the_papers_merge_of_rounds():
    layer, span = _layer(chunk_size=2, hashes=3, buckets=4), _two_documents()
    x = torch.randn(1, 30, 12, dtype=torch.float64) * 3
    valid = span.valid()[..., None]
    torch.testing.assert_close(
        layer(x, span) * valid, _loop(layer, x, span) * valid, rtol=0, atol=1e-12
    )


def test_a_token_that_sees_nothing_else_gives_its_own_value():
    layer, span = _layer(chunk_size=4), Span.line(2, 1)
    x = torch.randn(2, 1, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x, span), layer.out(layer.v(x)), rtol=0, atol=1e-14)


def test_a_later_token_never_pushes_an_earlier_key_out_of_sight():
    layer, span = _layer(Rope(), chunk_size=2, hashes=2, buckets=4), Span.line(1, 32)
    x = torch.randn(1, 32, 12, dtype=torch.float64) * 3
    before = layer(x, span)
    for moved in (8, 20, 31):
        y = x.clone()
        y[:, moved] = torch.randn(12, dtype=torch.float64) * 3
        # Others in a tile may change, and with them the order of sums.
        torch.testing.assert_close(layer(y, span)[:, :moved], before[:, :moved], rtol=0, atol=1e-14)
        assert not torch.equal(layer(y, span)[:, moved:], before[:, moved:])


def test_more_rounds_come_nearer_to_full_attention():
    x, span = torch.randn(8, 64, 12, dtype=torch.float64) * 20, Span.line(8, 64)
    full = _layer(chunk_size=64, hashes=40, buckets=2)(x, span)
    errors = [
        (_layer(chunk_size=64, hashes=r, buckets=16)(x, span) - full).norm().item()
        for r in (1, 4, 16)
    ]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_hashes_depend_on_seed_and_layer():
    q = torch.randn(1, 50, 3, 4, dtype=torch.float64)
    settings = {"chunk_size": 4, "buckets": 8}
    one, same = (
        LSHAttention(12, 3, NoPosition(), 0, 5, 32, **settings).hashed(q) for _ in range(2)
    )
    assert torch.equal(one, same)
    for layer, seed in ((1, 5), (0, 6)):
        assert (
            LSHAttention(12, 3, NoPosition(), layer, seed, 32, **settings).hashed(q) != one
        ).float().mean() > 0.5


@pytest.mark.parametrize("most", [1, 200, 1 << 20])
def test_a_hash_is_the_nearest_of_the_directions_and_their_opposites(most, monkeypatch):
    monkeypatch.setitem(readings.SCORES, "cpu", most)
    layer = _layer(chunk_size=4, hashes=3, buckets=6)
    query = torch.randn(2, 50, 3, 4, dtype=torch.float64)
    query[0, 7] = 0  # as far from each: the first
    drawn = lsh.rotations(*layer.rotation_key).clone()
    drawn[..., 2] = -drawn[..., 0]  # as far as the first, which counts
    monkeypatch.setattr(lsh, "rotations", lambda *key: drawn)
    products = torch.einsum("bthd,rhdn->bthrn", query, drawn)
    size = products.abs()
    nearest = ((size == size.amax(-1, keepdim=True)).cumsum(-1) == 0).sum(-1, keepdim=True)
    is_opposite = products.gather(-1, nearest) < 0
    expected = (nearest + 3 * is_opposite)[..., 0]
    assert torch.equal(layer.hashed(query), expected)


@pytest.mark.parametrize(
    ("position", "settings", "message"),
    [
        (T5(), {}, "T5 shapes scores; use position=rope"),
        (Rope(), {"buckets": 5}, "even number"),
        (Rope(), {"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_what_cannot_be_is_refused(position, settings, message):
    with pytest.raises(ValueError, match=message):
        LSHAttention(12, 3, position, 0, 0, 32, **settings)
