"""Sparse masks: what they show, that their three evaluations agree, and that random blocks are what
they promise."""

import pytest
import torch

from models.counter_rng import hash_words
from models.kernels.block_plan import LEAF, RowTokens
from models.masks.algebra import EMPTY, FULL
from models.masks.basic import Causal
from models.masks.roles import GlobalKey, GlobalQuery, RoleKey
from models.masks.sparse import DilatedWindow, NeighborBlocks, RandomBlocks
from models.span import GLOBAL, Span

HEADS = torch.arange(3)
MASKS = [
    GlobalKey(2),
    GlobalKey(0, 5),
    GlobalQuery(1, 7),
    ~GlobalQuery(3),
    DilatedWindow(4),
    DilatedWindow(3, (1, 2, 4)),
    Causal() & (DilatedWindow(4) | GlobalKey(2)),
    NeighborBlocks(3, 1),
    RoleKey(GLOBAL),
    RoleKey(GLOBAL) | DilatedWindow(4),
    RandomBlocks(3, 1, 1, 2, seed=1, layer=0, patterns=3),
    RandomBlocks(2, 0, 0, 1, seed=4, layer=2, both=True),
]


def _row(generator: torch.Generator) -> Span:
    """A stretch of one document, sometimes with a hole, some tokens global by role."""
    start, size = (int(torch.randint(n, (), generator=generator)) for n in (30, 12))
    pos = torch.arange(start, start + size + 1)
    if torch.rand((), generator=generator) < 0.3:
        pos = pos[torch.rand(len(pos), generator=generator) < 0.6] if len(pos) > 3 else pos
        pos = pos if len(pos) else torch.tensor([start])
    role = torch.where(torch.rand(len(pos), generator=generator) < 0.1, GLOBAL, 0)
    return Span(pos[None], torch.zeros_like(pos)[None], role[None])


def _box(span: Span):
    tokens = RowTokens([t[0].numpy() for t in (span.pos, span.doc, span.role)], LEAF)
    return tokens.box(0, span.shape[1])


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_outlook_and_band_agree_with_the_dense_mask(mask):
    generator = torch.Generator().manual_seed(0)
    decided = 0
    for _ in range(300):
        q, k = _row(generator), _row(generator)
        seen, q_box, k_box = mask.dense(q, k, HEADS), _box(q), _box(k)
        look = mask.coverage(q_box, k_box)
        assert look != EMPTY or not seen.any()
        assert look != FULL or seen.all()
        decided += look in (EMPTY, FULL)
        band = mask.band(q_box, k_box) if q_box.run and k_box.run else None
        if band is not None:
            apart = q.pos[0, :, None] - k.pos[0, None, :]
            assert torch.equal(seen, ((apart >= band[0]) & (apart <= band[1])).expand_as(seen))
    assert decided > 30  # an outlook that never decides would skip nothing


def test_a_dilated_window_has_holes_on_its_own_heads_only():
    span = Span.line(1, 9)
    seen = (Causal() & DilatedWindow(3, (1, 2, 4))).dense(span, span, HEADS)
    assert [seen[0, head, 8].nonzero()[:, 0].tolist() for head in range(3)] == [
        [6, 7, 8],
        [4, 6, 8],
        [0, 4, 8],
    ]


def test_random_blocks_are_different_and_lie_between_the_first_and_the_window():
    mask = RandomBlocks(4, 2, 1, 3, seed=0, layer=1, patterns=5)
    drawn = mask.drawn(torch.arange(50), torch.arange(5))
    for block in range(50):
        for head in range(5):
            found = [b for b in drawn[head, block].tolist() if b >= 0]
            assert len(found) == len(set(found)) == min(3, max(0, block - 3))
            assert all(1 <= b < block - 2 for b in found)


def test_random_blocks_depend_on_seed_layer_and_head_and_nothing_else():
    block = torch.arange(200)

    def draw(head: int, seed: int = 0, layer: int = 0):
        return RandomBlocks(4, 1, 1, 2, seed, layer, patterns=4).drawn(block, torch.tensor([head]))

    assert torch.equal(draw(1), draw(1))
    for other in (draw(2), draw(1, seed=1), draw(1, layer=1)):
        assert (draw(1) != other).float().mean() > 0.5


def test_random_blocks_are_drawn_evenly():
    mask = RandomBlocks(1, 0, 0, 1, seed=0, layer=0, patterns=4000)
    counts = mask.drawn(torch.tensor([10]), torch.arange(4000)).flatten().bincount(minlength=10)
    assert counts.min() > 300 and counts.max() < 500


def test_scrambled_words_are_the_same_on_every_machine():
    assert [int(hash_words(1, 2)), int(hash_words(torch.tensor([2]), 1))] == [
        hash_words(1, 2).item(),
        hash_words(2, 1).item(),
    ]
    assert int(hash_words(1, 2)) != int(hash_words(2, 1))
    assert int(hash_words(0)) == PINNED


PINNED = 2459150361376443823


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DilatedWindow(0), "window is a number of tokens"),
        (lambda: DilatedWindow(2, (1, 0)), "distances in tokens"),
        (lambda: GlobalKey(-1), "0 or more"),
        (lambda: NeighborBlocks(0, 1), "block=0"),
    ],
)
def test_impossible_masks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
