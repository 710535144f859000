"""Random masks for hypothesis: any of the algebra, and those of a few kinds joined."""

from hypothesis import strategies as some

from models.masks.algebra import Mask
from models.masks.basic import Causal, FirstTokens, SameChunk, SameDocument, SlidingWindow
from models.masks.roles import GlobalKey, GlobalQuery, PrefixTokens, RoleKey, RoleQuery
from models.masks.segments import PreviousTokens, SegmentRecurrence
from models.masks.sparse import DilatedWindow, NeighborBlocks, RandomBlocks
from models.span import READ

SIZES = some.integers(1, 9)


def joined(simple: some.SearchStrategy[Mask]) -> some.SearchStrategy[Mask]:
    """Masks of up to four simple ones under and, or, not."""
    return some.recursive(
        simple,
        lambda inner: some.one_of(
            some.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
            some.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
            inner.map(lambda mask: ~mask),
        ),
        max_leaves=4,
    )


SIMPLE = some.one_of(
    some.sampled_from([Mask(), Causal(), SameDocument(), PrefixTokens(), RoleKey(READ)]),
    some.just(RoleQuery(READ)),
    SIZES.map(SlidingWindow),
    some.integers(0, 9).map(FirstTokens),
    SIZES.map(SameChunk),
    some.builds(GlobalKey, some.integers(0, 3), some.integers(0, 4)),
    some.builds(GlobalQuery, some.integers(0, 3), some.integers(0, 4)),
    some.builds(PreviousTokens, SIZES, SIZES),
    some.builds(SegmentRecurrence, SIZES, SIZES),
    some.builds(DilatedWindow, SIZES, some.sampled_from([(1,), (3,), (1, 2), (4, 3), (2, 1, 5)])),
    some.builds(NeighborBlocks, SIZES, some.integers(0, 2)),
    some.builds(
        RandomBlocks,
        some.integers(1, 3),
        some.integers(0, 1),
        some.integers(0, 1),
        some.integers(0, 2),
        some.integers(0, 5),
        some.just(0),
        some.integers(1, 3),
        some.booleans(),
    ),
)
# Kernels have programs for all of them.
ALL_MASKS = joined(SIMPLE)
