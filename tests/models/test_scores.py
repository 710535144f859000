"""Positions that shape the scores: ALiBi, T5's buckets, Transformer-XL's relative terms."""

from math import floor, log

import pytest
import torch
from torch.nn import functional as F

from models.init import initialise
from models.positions import relative
from models.positions.alibi import Alibi, slopes
from models.positions.relative import Relative, distances
from models.positions.sinusoidal import sinusoid
from models.positions.t5 import T5
from models.span import Span
from tests.support.parity import packed

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_slopes_are_those_of_the_paper():
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]
    assert len(set(slopes(12))) == 12


def test_alibi_takes_slope_times_distance_whichever_heads_are_at_hand():
    score, params = Alibi().score(8, 4)
    assert params is None
    span = packed()
    whole = score.bias(span, span, torch.arange(8), F64)
    assert whole[0, 0, 20, 17] == -0.5 * 3
    assert whole[0, 7, 17, 20] == -3 / 256
    assert torch.equal(score.bias(span, span, torch.tensor([5, 2]), F64), whole[:, [5, 2]])


def bucket(distance: int, buckets: int, reach: int) -> int:
    """T5's rule for one distance that is not negative, by its own formula."""
    single = buckets // 2
    if distance < single:
        return distance
    return min(
        buckets - 1,
        single + floor(1e-9 + log(distance / single) / log(reach / single) * (buckets - single)),
    )


@pytest.mark.parametrize(
    ("buckets", "reach"), [(32, 128), (32, 256), (8, 20), (16, 1024), (2, 5), (5, 9)]
)
def test_distances_fall_into_t5s_buckets(buckets, reach):
    score, _ = T5(buckets, reach).score(2, 4)
    span, kv_span = (
        Span.of(torch.tensor([[2 * reach]]), torch.tensor([[0]])),
        Span.line(1, 2 * reach + 9),
    )
    want = [bucket(max(0, 2 * reach - k), buckets, reach) for k in range(2 * reach + 9)]
    assert score.bucket(span, kv_span)[0, 0].tolist() == want


def test_t5_both_ways_gives_later_keys_buckets_of_their_own():
    score, _ = T5(16, 32, bidirectional=True).score(2, 4)
    span, kv_span = Span.of(torch.tensor([[40]]), torch.tensor([[0]])), Span.line(1, 81)
    got = score.bucket(span, kv_span)[0, 0]
    assert got[:41].tolist() == [bucket(40 - k, 8, 32) for k in range(41)]
    assert got[41:].tolist() == [8 + bucket(k - 40, 8, 32) for k in range(41, 81)]


def test_t5_adds_its_bias_to_scaled_or_unscaled_products():
    q, k, span = draw(2, 51, 6, 4), draw(2, 51, 3, 4, seed=1), packed()
    for scale, want in ((None, 0.5), (1.0, 1.0)):
        score, params = T5(8, 20, scale=scale).score(6, 4)
        table = initialise(params, seed=1).double()()
        got = score.logits((q,), (k, k), table, span, span, torch.arange(6))
        plain = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * want
        bias = table[0][score.bucket(span, span)].permute(0, 3, 1, 2)
        assert (got - plain - bias).abs().max() < 1e-12


def shifted(q, k, u, v, table, base=10_000.0):
    """Transformer-XL's own way, for one unbroken document: a matrix over decreasing distances,
    shifted by one a row."""
    tokens, heads, width = q.shape[1], q.shape[2], table.shape[2]
    distance = torch.arange(tokens - 1, -1, -1, dtype=F64)
    r = torch.einsum("nw,hdw->nhd", torch.cat(sinusoid(distance, width, base), -1), table)
    far = F.pad(torch.einsum("bthd,nhd->bhtn", q + v, r), (1, 0))
    far = far.reshape(q.shape[0], heads, tokens + 1, tokens)[:, :, 1:]
    near = torch.einsum("bthd,bshd->bhts", q + u, k)
    return (near + far.reshape(near.shape)) * q.shape[-1] ** -0.5


def test_relative_scores_are_transformer_xls_shifted_matrix():
    score, tables = Relative().score(2, 4)
    tables = initialise(tables, seed=1).double()
    for parameter in tables.parameters():
        parameter.data *= 30
    q, k, span = draw(2, 11, 2, 4), draw(2, 11, 2, 4, seed=1), Span.line(2, 11)
    got = score.logits((q,), (k, k), tables(), span, span, torch.arange(2))
    seen = torch.ones(11, 11, dtype=torch.bool).tril()
    assert ((got - shifted(q, k, *tables())) * seen).abs().max() < 1e-12
    plain = torch.einsum("bthd,bshd->bhts", q, k) / 2
    assert ((got - plain) * seen).abs().max() > 0.1


def test_relative_scores_of_a_later_stretch_are_those_of_an_earlier_one():
    score, tables = Relative().score(2, 4)
    params = initialise(tables, seed=1).double()()
    q, k = draw(1, 5, 2, 4), draw(1, 7, 2, 4, seed=1)
    results = []
    for shift in (0, 10_000):
        span, kv_span = (
            Span.of(torch.arange(n)[None] + shift, torch.zeros(1, n, dtype=torch.long))
            for n in (5, 7)
        )
        results.append(score.logits((q,), (k, k), params, span, kv_span, torch.arange(2)))
    assert torch.equal(*results)


@pytest.mark.every_case
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (5, 1), (5, 7), (7, 5)])
@pytest.mark.parametrize("clamp", [None, 3])
@pytest.mark.parametrize("strip", [2, 128])
def test_unbroken_runs_score_as_pairs_looked_up_one_by_one(
    monkeypatch, queries, keys, clamp, strip
):
    monkeypatch.setattr(relative, "STRIP", strip)
    score, tables = Relative(clamp).score(2, 4)
    params = initialise(tables, seed=1).double()()
    span, kv_span = (Span.line(2, n).map(lambda pos, n=n: pos + 10 * n) for n in (queries, keys))
    q, k = draw(2, queries, 2, 4).requires_grad_(), draw(2, keys, 2, 4, seed=1)
    found = []
    for look in (relative.evenly, lambda span, kv_span: None):
        monkeypatch.setattr(relative, "evenly", look)
        logits = score.logits((q,), (k, k), params, span, kv_span, torch.arange(2))
        weight = draw(*logits.shape, seed=2)
        found.append((logits, *torch.autograd.grad((logits * weight).sum(), (q, *params))))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*found, strict=True))


def test_broken_runs_and_rows_that_differ_are_looked_up_pair_by_pair():
    line, broken = Span.line(2, 6), packed()
    assert relative.evenly(line, line) == 0
    assert relative.evenly(line.map(lambda a: a + 4), line.map(lambda a: a[:, :3])) == 4
    assert relative.evenly(line, broken) is None and relative.evenly(broken, line) is None
    assert relative.evenly(line, line.map(lambda a: a + torch.tensor([[0], [1]]))) is None
    assert relative.evenly(line.map(lambda a: a[:, :0]), line) is None


def test_clamped_distances_all_look_alike():
    (free, tables), (clamped, _) = Relative().score(2, 4), Relative(clamp=3).score(2, 4)
    params = initialise(tables, seed=1).double()()
    q, k, span = draw(1, 9, 2, 4), draw(1, 1, 2, 4, seed=1).expand(1, 9, 2, 4), Span.line(1, 9)
    a, b = (
        score.logits((q,), (k, k), params, span, span, torch.arange(2))[:, :, 8]
        for score in (clamped, free)
    )
    assert (a[..., :5] - a[..., 5:6]).abs().max() < 1e-12, "distances 8 to 4 count as 3"
    assert (b[..., :5] - b[..., 5:6]).abs().max() > 1e-6
    assert (a[..., 5:] - b[..., 5:]).abs().max() < 1e-12


def test_each_different_distance_is_listed_once():
    span, kv_span = (
        Span.of(torch.tensor([[900, 3], [0, 4]]), torch.zeros(2, 2, dtype=torch.long)),
        Span.line(2, 3),
    )
    distance, where = distances(span, kv_span)
    assert distance.tolist() == [-2, -1, 0, 1, 2, 3, 4, 898, 899, 900]
    assert torch.equal(distance[where], span.pos[:, :, None] - kv_span.pos[:, None])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: T5(1), "2 or more"),
        (lambda: T5(7, bidirectional=True), "even number"),
        (lambda: T5(32, 16), "more than that"),
        (lambda: Relative(clamp=0), "1 or more"),
        (lambda: Relative(theta=0.5), "above 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
