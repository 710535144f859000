"""A plan holds every visible pair once, calls blocks by their right kind, and costs what is
visible."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kernels import block_plan as planning
from models.kernels.block_plan import (
    CAUSAL_TILE,
    FULL_TILE,
    PARTIAL_TILE,
    plan_rows,
    plan_tiles,
    split_tile,
)
from models.masks.algebra import FAR, Mask, Not, coverage_of, distance, visible
from models.masks.basic import Causal, SameDocument, SlidingWindow
from models.span import Span


@dataclass(frozen=True)
class FromDistance(Mask):
    """Shows keys from a distance on: 1 hides the query itself, -1 shows one token ahead."""

    least: int

    def dense(self, query, key, heads=None):
        return distance(query, key) >= self.least

    def coverage(self, query, key):
        nearest = query.pos_low - key.pos_high
        farthest = query.pos_high - key.pos_low
        return coverage_of(farthest < self.least, nearest >= self.least)

    def band(self, query, key):
        return self.least, FAR


MASKS = {
    "strictly before": FromDistance(1) & SameDocument(),
    "one ahead": FromDistance(-1) & SameDocument(),
    "causal": Causal() & SameDocument(),
    "sliding": Causal() & SameDocument() & SlidingWindow(5),
    "documents": SameDocument(),
    "causal without documents": Causal(),
    "two bands": Causal() & SameDocument() & (SlidingWindow(3) | Not(SlidingWindow(9))),
    "everything": Mask(),
}


def row(lengths, padding=0):
    pos = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.long)])
    doc = torch.cat(
        [torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)]
    )
    return pos, doc


def painted(blocks, mask, span, kv_span):
    """[B, T, S] how often each pair is computed and seen."""
    seen = visible(mask, span, kv_span)[:, 0].expand(-1, span.shape[1], kv_span.shape[1])
    count = torch.zeros(span.shape[0], span.shape[1], kv_span.shape[1], dtype=torch.long)
    for b in blocks:
        part = (slice(b.r0, b.r1), slice(b.q0, b.q1), slice(b.k0, b.k1))
        whole = torch.ones_like(count[part], dtype=torch.bool)
        kind = {FULL_TILE: whole, CAUSAL_TILE: whole.tril(), PARTIAL_TILE: seen[part]}[b.kind]
        assert b.kind != CAUSAL_TILE or b.q1 - b.q0 == b.k1 - b.k0
        count[part] += kind
    return count, seen


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=3),
    mask=st.sampled_from(sorted(MASKS)),
    leaf=st.sampled_from([1, 4, 16]),
    mixed=st.sampled_from([0, 8, 128]),
    cut=st.integers(0, 60),
    side=st.sampled_from([3, 1000]),
    stretches=st.integers(1, 4),
)
def test_every_visible_pair_is_computed_once_and_no_other(
    lengths, mask, leaf, mixed, cut, side, stretches
):
    before, planning.LEAF = planning.LEAF, leaf
    before_mixed, planning.MIXED = planning.MIXED, {"cpu": mixed}
    try:
        size = max(map(sum, lengths))
        rows = [row(some, size - sum(some)) for some in lengths]
        span = Span.of(torch.stack([p for p, _ in rows]), torch.stack([d for _, d in rows]))
        # Every second stretch, as a layout gives a rank.
        width = max(1, size // (2 * stretches))
        kept = [token for token in range(size) if token // width % 2 == 0 or stretches == 1]
        span = span.map(lambda t: t[:, kept])
        size = len(kept)
        queries, keys = span.map(lambda t: t[:, cut:]), span.map(lambda t: t[:, : size - cut // 2])
        blocks = [
            part
            for block in plan_tiles(MASKS[mask], queries, keys)
            for part in split_tile(block, side)
        ]
        count, seen = painted(blocks, MASKS[mask], queries, keys)
        assert torch.equal(count, seen.long())
    finally:
        planning.LEAF = before
        planning.MIXED = before_mixed


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=8, max_size=20),
    mask=st.sampled_from(sorted(MASKS)),
    leaf=st.sampled_from([16, 128, 512]),
    cut=st.integers(0, 30),
)
def test_many_short_rows_taken_together_hold_the_same_pairs(lengths, mask, leaf, cut):
    before, planning.LEAF = planning.LEAF, leaf
    try:
        size = max(map(sum, lengths))
        rows = [row(some, size - sum(some)) for some in lengths]
        span = Span.of(torch.stack([p for p, _ in rows]), torch.stack([d for _, d in rows]))
        queries, keys = span.map(lambda t: t[:, cut:]), span.map(lambda t: t[:, : size - cut // 2])
        blocks = plan_rows(MASKS[mask], queries, keys)
        count, seen = painted(blocks, MASKS[mask], queries, keys)
        assert torch.equal(count, seen.long())
        assert len(blocks) <= max(len(plan_tiles(MASKS[mask], queries, keys)), 1)
    finally:
        planning.LEAF = before


def test_many_short_rows_are_one_block_and_few_or_long_ones_are_not():
    def span(rows, tokens):
        spans = [row([1 + i, tokens - 1 - i]) for i in range(rows)]
        return Span.of(torch.stack([p for p, _ in spans]), torch.stack([d for _, d in spans]))

    many, few, long = span(8, 128), span(7, 128), span(8, 129)
    mask = MASKS["causal"]
    assert plan_rows(mask, many, many) == [(0, 8, 0, 128, 0, 128, PARTIAL_TILE)] and plan_rows(
        mask, many, many
    ) is plan_rows(mask, many, many)
    for other in (few, long):
        assert plan_rows(mask, other, other) == plan_tiles(mask, other, other)
    past = Span.of(torch.arange(9).expand(8, 9).contiguous(), torch.zeros(8, 9, dtype=torch.long))
    after = Span.of(
        (9 + torch.arange(5)).expand(8, 5).contiguous(), torch.zeros(8, 5, dtype=torch.long)
    )
    assert plan_rows(mask, after, past) == [(0, 8, 0, 5, 0, 9, FULL_TILE)]


def test_zigzag_runs_of_one_document_need_neither_mask_nor_waste():
    pos = torch.cat([torch.arange(0, 1024), torch.arange(3072, 4096)])[None]
    here = Span.of(pos, torch.zeros_like(pos))
    there = Span.of(torch.arange(1024, 3072)[None], torch.zeros(1, 2048, dtype=torch.long))
    mask = MASKS["causal"]
    assert [b[2:] for b in plan_tiles(mask, here, here)] == [(0, 2048, 0, 2048, CAUSAL_TILE)]
    assert [b[2:] for b in plan_tiles(mask, here, there)] == [(1024, 2048, 0, 2048, FULL_TILE)]


def zigzag_of_documents(lengths):
    """Tokens of rank 0 of two, which holds the first and the last quarter of a row."""
    pos, doc = (x[None] for x in row(lengths))
    quarter = sum(lengths) // 4
    kept = torch.cat([torch.arange(quarter), torch.arange(3 * quarter, 4 * quarter)])
    return Span.of(pos[:, kept], doc[:, kept])


@pytest.mark.parametrize("planned_for", ["cpu", "cuda"])
def test_documents_on_a_cpu_are_triangles_and_squares_of_their_own(planned_for, monkeypatch):
    here = zigzag_of_documents([700, 900, 448])
    if planned_for == "cuda":
        monkeypatch.setattr(planning, "MIXED", {})
    blocks = plan_tiles(MASKS["causal"], here, here)
    area = sum((b.q1 - b.q0) * (b.k1 - b.k0) for b in blocks)
    kinds = {b.kind for b in blocks}
    documents = [512, 64, 448]
    if planned_for == "cpu":
        assert kinds == {CAUSAL_TILE}
        assert area == sum(tokens**2 for tokens in documents)
    else:
        # A call for 512 pairs of tokens is cheaper there than three without a mask.
        assert kinds == {CAUSAL_TILE, PARTIAL_TILE}
        assert area == 512**2 + 512**2


def test_a_document_that_lies_in_many_stretches_is_one_triangle():
    stretches = [torch.arange(start, start + 150) for start in (0, 400, 900, 2000)]
    pos = torch.cat([*stretches, torch.arange(300)])[None]
    doc = torch.cat([torch.zeros(600), torch.ones(300)])[None].long()
    span = Span.of(pos, doc)
    tiles = [(0, 1, 0, 600, 0, 600, CAUSAL_TILE), (0, 1, 600, 900, 600, 900, CAUSAL_TILE)]
    assert plan_tiles(MASKS["causal"], span, span) == tiles
    # Under a window a key is hidden behind a gap that is no triangle's.
    assert plan_tiles(MASKS["causal"] & SlidingWindow(1000), span, span) != tiles
    backwards = span.map(lambda x: x.flip(1))
    kinds = {b.kind for b in plan_tiles(MASKS["causal"], backwards, backwards)}
    assert CAUSAL_TILE not in kinds


ALIKE = {
    "others within the same bounds": ([0, 1, 2, 7, 8, 9], [0] * 6, [0, 1, 6, 7, 8, 9], [0] * 6),
    "a document behind another": ([0, 1, 2, 5, 6], [0, 0, 0, 1, 1]) * 2,
    "a document in two stretches": ([0, 1, 2, 5, 6], [0] * 5) * 2,
    "a padded end": ([0, 1, 2, 5, 6], [0, 0, 0, -1, -1]) * 2,
}


@pytest.mark.parametrize("case", ALIKE)
@pytest.mark.parametrize("mask", MASKS)
def test_tokens_in_stretches_are_a_triangle_only_where_the_mask_says_so(case, mask, monkeypatch):
    monkeypatch.setattr(planning, "MIXED", {"cpu": 1})
    q_pos, q_doc, k_pos, k_doc = (torch.tensor([numbers]) for numbers in ALIKE[case])
    queries, keys = Span.of(q_pos, q_doc), Span.of(k_pos, k_doc)
    count, seen = painted(plan_tiles(MASKS[mask], queries, keys), MASKS[mask], queries, keys)
    assert torch.equal(count, seen.long())


@pytest.mark.parametrize("tokens", [8192, 32768])
def test_a_window_costs_in_proportion_to_its_length(tokens):
    span = Span.line(1, tokens)
    mask = Causal() & SameDocument() & SlidingWindow(512)
    area = sum((b.q1 - b.q0) * (b.k1 - b.k0) for b in plan_tiles(mask, span, span))
    assert area <= 2.1 * tokens * 512


def test_an_empty_pair_costs_nothing():
    early, late = (
        Span.line(1, 700),
        Span.of(torch.arange(700, 900)[None], torch.zeros(1, 200, dtype=torch.long)),
    )
    other = Span.of(torch.arange(700)[None], torch.ones(1, 700, dtype=torch.long))
    assert plan_tiles(MASKS["causal"], early, late) == []
    assert plan_tiles(MASKS["causal"], late, other) == []


def test_layers_with_equal_masks_share_a_plan():
    span = Span.line(1, 64)
    assert plan_tiles(Causal() & SameDocument(), span, span) is plan_tiles(
        Causal() & SameDocument(), span, span
    )
