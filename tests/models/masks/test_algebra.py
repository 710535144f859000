"""A mask says the same thing three ways, and the plan made of it covers exactly what is visible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from models.kernels import block_plan as planning
from models.masks.algebra import EMPTY, FAR, FULL, Bounds, Mask, visible
from models.masks.basic import Causal, FirstTokens, SameChunk, SameDocument, SlidingWindow
from models.masks.roles import PrefixTokens
from models.span import PREFIX, READ, TEXT, Span
from tests.support.random_masks import SIZES, joined

SIMPLE = some.one_of(
    some.sampled_from([Mask(), Causal(), SameDocument(), PrefixTokens()]),
    SIZES.map(SlidingWindow),
    some.integers(0, 9).map(FirstTokens),
    SIZES.map(SameChunk),
)
MASKS = joined(SIMPLE)
RUNS = some.tuples(
    some.integers(-1, 3), some.integers(0, 20), some.sampled_from([TEXT, PREFIX, READ]), SIZES
)
ROWS = some.lists(RUNS, min_size=1, max_size=4)


def row(runs) -> Span:
    """One row of runs (document, first position, role, tokens)."""
    pos, doc, role = (
        torch.cat(parts)[None]
        for parts in zip(
            *(
                (torch.arange(p, p + n), torch.full((n,), d), torch.full((n,), r))
                for d, p, r, n in runs
            ),
            strict=True,
        )
    )
    return Span(pos, doc, role)


def box(span: Span) -> Bounds:
    """Bounds of one row, worked out here and not by the planner."""
    pos, doc, role = (x[0].tolist() for x in (span.pos, span.doc, span.role))
    run = len(set(doc)) == 1 and all(b - a == 1 for a, b in zip(pos, pos[1:]))
    return Bounds(min(pos), max(pos), min(doc), max(doc), min(role), max(role), run)


@given(MASKS, ROWS, ROWS)
@settings(max_examples=400, deadline=None)
def test_an_outlook_never_contradicts_the_dense_mask(mask, queries, keys):
    q, k = row(queries), row(keys)
    dense, look = mask.dense(q, k), mask.coverage(box(q), box(k))
    assert dense.shape == (1, 1, q.shape[1], k.shape[1])
    assert look != EMPTY or not dense.any()
    assert look != FULL or dense.all()


@given(MASKS, RUNS, RUNS)
@settings(max_examples=400, deadline=None)
def test_a_band_between_two_runs_is_the_dense_mask(mask, queries, keys):
    q, k = row([queries]), row([keys])
    band = mask.band(box(q), box(k))
    if band is not None:
        apart = (q.pos[0][:, None] - k.pos[0][None])[None, None]
        assert torch.equal(mask.dense(q, k), (apart >= band[0]) & (apart <= band[1]))


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        SameDocument(),
        PrefixTokens(),
        SlidingWindow(4),
        FirstTokens(3),
        SameChunk(4),
        Causal() & SlidingWindow(4),
    ],
)
def test_an_outlook_is_decided_where_one_token_meets_another(mask):
    for queries in ((0, 5, TEXT, 1), (0, 2, PREFIX, 1), (1, 9, READ, 1)):
        for keys in ((0, 5, TEXT, 1), (0, 1, PREFIX, 1), (1, 6, TEXT, 1)):
            q, k = row([queries]), row([keys])
            assert mask.coverage(box(q), box(k)) == (FULL if mask.dense(q, k).item() else EMPTY)


def test_a_causal_window_is_one_band():
    q, k = box(row([(0, 8, TEXT, 5)])), box(row([(0, 0, TEXT, 9)]))
    assert (Causal() & SameDocument() & SlidingWindow(4)).band(q, k) == (0, 3)
    assert (Causal() | FirstTokens(20)).band(q, k) == (-FAR, FAR)
    assert (Causal() & SameChunk(64)).band(q, k) == (0, FAR)


@given(MASKS, ROWS, ROWS)
@settings(max_examples=200, deadline=None)
def test_a_plan_covers_what_is_visible_once_and_nothing_else_unmasked(mask, queries, keys):
    q, k = row(queries), row(keys)
    seen = visible(mask, q, k)[0, 0]
    covered = torch.zeros_like(seen, dtype=torch.long)
    before, planning.LEAF = planning.LEAF, 4
    try:
        blocks = planning.plan_tiles(mask, q, k)
    finally:
        planning.LEAF = before
    for block in blocks:
        part = slice(block.q0, block.q1), slice(block.k0, block.k1)
        if block.kind == planning.FULL_TILE:
            assert seen[part].all()
        if block.kind == planning.CAUSAL_TILE:
            assert torch.equal(seen[part], torch.ones_like(seen[part]).tril())
        covered[part] += 1
    assert covered.max() <= 1
    assert (covered[seen] == 1).all()


@pytest.mark.parametrize(
    "wrong", [lambda: SlidingWindow(0), lambda: FirstTokens(-1), lambda: SameChunk(0)]
)
def test_a_size_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="want"):
        wrong()
