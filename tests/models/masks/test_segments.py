"""The mask of segment recurrence: what it shows, and that its three evaluations agree."""

import pytest
import torch

from models.masks.algebra import EMPTY, EMPTY_BAND, FULL, FULL_BAND
from models.masks.basic import Causal
from models.masks.segments import STALE, PreviousTokens, SegmentRecurrence
from models.span import READ, TEXT, Span
from tests.models.masks.test_algebra import box

MASKS = [
    SegmentRecurrence(4, 6),
    SegmentRecurrence(5, 1),
    SegmentRecurrence(1, 3),
    SegmentRecurrence(7, 0),
    Causal() & SegmentRecurrence(3, 8),
    ~SegmentRecurrence(4, 2),
    PreviousTokens(4, 6),
    PreviousTokens(5, 1),
]


def keys(first: int, roles: list[int]) -> Span:
    """A stretch of one document."""
    role = torch.tensor(roles)[None]
    pos = torch.arange(first, first + role.shape[1])[None]
    return Span(pos, torch.zeros_like(pos), role)


def test_a_query_sees_its_segment_and_the_tokens_before_it():
    mask, q = SegmentRecurrence(4, 3), keys(8, [TEXT] * 4)
    for role, want in ((TEXT, range(8, 12)), (STALE, range(5, 8)), (READ, range(5, 20))):
        seen = mask.dense(q, keys(0, [role] * 20))
        assert all(row.nonzero()[:, 0].tolist() == list(want) for row in seen[0, 0])


def test_a_query_finds_only_what_lies_before_its_segment():
    seen = PreviousTokens(4, 3).dense(keys(8, [TEXT] * 4), keys(0, [TEXT] * 20))
    assert all(row.nonzero()[:, 0].tolist() == [5, 6, 7] for row in seen[0, 0])


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_outlook_and_band_agree_with_the_dense_mask(mask):
    generator = torch.Generator().manual_seed(0)
    decided = mixed = 0
    for turn in range(600):
        first, count, begin, size = (
            int(torch.randint(n, (), generator=generator)) for n in (30, 9, 30, 9)
        )
        if turn % 2:
            roles = [
                int(r)
                for r in torch.tensor([TEXT, READ, STALE, 5])[
                    torch.randint(4, (size + 1,), generator=generator)
                ]
            ]
        else:
            roles = [[TEXT, READ, STALE][turn // 2 % 3]] * (size + 1)
        q, k = keys(first, [TEXT] * (count + 1)), keys(begin, roles)
        seen, look = mask.dense(q, k), mask.coverage(box(q), box(k))
        assert look != EMPTY or not seen.any()
        assert look != FULL or seen.all()
        decided += look in (EMPTY, FULL) and not turn % 2
        mixed += look in (EMPTY, FULL) and len(set(roles)) > 1
        band = mask.band(box(q), box(k))
        if band is not None:
            apart = q.pos[0][:, None] - k.pos[0][None]
            assert torch.equal(seen[0, 0], (apart >= band[0]) & (apart <= band[1]))
    assert decided > 60 and mixed > 15  # an outlook that never decides would skip nothing


@pytest.mark.parametrize("role", [TEXT, READ, STALE])
def test_an_outlook_is_decided_within_a_segment_and_far_from_it(role):
    mask, q = SegmentRecurrence(4, 6), keys(8, [TEXT] * 4)
    for first in range(20):
        k = keys(first, [role])
        assert mask.coverage(box(q), box(k)) == (FULL if mask.dense(q, k).all() else EMPTY)
        assert mask.band(box(q), box(k)) == (FULL_BAND if mask.dense(q, k).all() else EMPTY_BAND)
