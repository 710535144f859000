"""Layouts as lists of integers: who holds which tokens, whatever the length, the ranks and the
documents."""

from dataclasses import replace

import pytest
import torch

from models.span import PADDING, Span
from parallel.layout import POLICIES, layout, layouts
from parallel.sharding import shard_span
from tests.support.parity import packed


def held(policy, tokens, ranks, heads=1):
    found = layout(policy, tokens, ranks, heads)
    return [found.index(rank).tolist() for rank in range(ranks)]


def test_contiguous_gives_stretches():
    assert held("contiguous", 7, 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_zigzag_gives_an_early_and_a_late_stretch():
    assert held("zigzag", 12, 3) == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert held("zigzag", 5, 2) == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_balanced_deals_the_heaviest_chunk_to_whoever_has_least():
    # chunks of one token; a causal token i sees i + 1 keys: 8 7 | 6 5 | 4 3 | 2 1 are dealt back
    # and forth
    assert held("balanced", 8, 2) == [[0, 3, 4, 7], [1, 2, 5, 6]]


def test_balanced_looks_at_each_rows_own_documents():
    span = packed([[5, 3], [8]], 8)
    rows = layouts("balanced", span, 2)
    assert [[row.index(r).tolist() for r in range(2)] for row in rows] == [
        [[4, 5, 6, 7], [0, 1, 2, 3]],
        [[0, 3, 4, 7], [1, 2, 5, 6]],
    ]


def test_under_usp_each_part_of_the_ring_is_cut_again():
    assert held("zigzag", 16, 4, heads=2) == [
        [0, 1, 2, 3],
        [12, 13, 14, 15],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    assert held("zigzag", 16, 4, heads=4) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]


def test_ranks_that_trade_heads_hold_what_the_ring_says():
    for policy in POLICIES:
        whole, parts = layout(policy, 48, 3), layout(policy, 48, 6, heads=2)
        for rank in range(3):
            assert torch.equal(parts.grouped(2).index(rank), whole.index(rank)), policy


@pytest.mark.every_case
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_token_has_one_place_and_ranks_hold_equally_many(policy, heads):
    for tokens in (1, 2, 5, 51, 1000):
        for ranks in (heads, 2 * heads, 4 * heads):
            parts = held(policy, tokens, ranks, heads)
            assert len({len(part) for part in parts}) == 1
            places = sorted(place for part in parts for place in part)
            assert places == list(range(len(places))), "each place of the axis once"
            x = torch.arange(tokens)
            found = layout(policy, tokens, ranks, heads)
            assert (
                found.unshard([found.shard(x, r, -1) for r in range(ranks)]).tolist() == x.tolist()
            )


def test_a_group_of_ranks_sees_the_cut_of_the_ring():
    span = packed()
    for policy in POLICIES:
        parts = [shard_span(span, layouts(policy, span, 6, heads=2), r) for r in range(6)]
        groups = [part.sharding.grouped(2).whole for part in parts]
        for rank, group in enumerate(groups):
            ends = [parts[rank // 2 * 2].doc, parts[rank // 2 * 2 + 1].doc]
            assert torch.equal(group.doc, torch.cat(ends, 1))
            assert (group.sharding.rank, group.sharding.ranks) == (rank // 2, 3)
            assert torch.equal(group.sharding.whole.pos[:, : span.shape[1]], span.pos)
        assert parts[0].sharding.grouped(2) is parts[0].sharding.grouped(2), (
            "plans kept on it must be found again"
        )


def test_wishes_that_cannot_be_met_are_refused():
    with pytest.raises(
        ValueError, match=r"unknown parallel.layout=spiral; choose one of contiguous"
    ):
        layout("spiral", 8, 2)
    with pytest.raises(ValueError, match=r"parallel.ulysses=3 does not divide the 4 ranks"):
        layouts("balanced", Span.line(1, 8), 4, heads=3)


@pytest.mark.every_case
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_joined_rows_lie_one_behind_the_other_with_all_padding_at_the_end(policy, size):
    before, row = packed([[3, 2], [1]], 5), packed([[9, 4], [13]], 13)
    first = shard_span(before, layouts("contiguous", before, size), 0)
    for rank in range(size):
        here = first.sharding.spans[rank]
        held = here.with_sharding(replace(first.sharding, rank=rank)).join(
            shard_span(row, layouts(policy, row, size), rank)
        )
        assert torch.equal(held.pos[:, : here.shape[1]], here.pos), (
            "a rank's own parts lie end to end"
        )
        cut = held.sharding
        assert all(joined.tokens == 18 for joined in cut.layouts) and torch.equal(
            cut.spans[rank].pos, held.pos
        )
        for name in ("pos", "doc"):
            want = torch.cat([getattr(before, name), getattr(row, name)], 1)
            assert torch.equal(getattr(cut.whole, name)[:, :18], want)
        assert (cut.whole.doc[:, 18:] == PADDING).all()
        for joined in cut.layouts:
            places = torch.cat([joined.index(other) for other in range(size)])
            assert torch.equal(places.sort().values, torch.arange(joined.length)), (
                "every place once"
            )
        order = torch.arange(2 * cut.whole.shape[1]).view(2, -1)
        assert torch.equal(cut.to_global_order(cut.to_rank_order(order)), order)
