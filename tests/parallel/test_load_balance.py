"""Chunks are dealt so that every rank works as hard as any other, on whatever was packed."""

import random

import torch

from models.attention.full import CAUSAL
from models.masks.algebra import Mask
from models.masks.basic import SameDocument, SlidingWindow
from models.span import Span
from parallel.layout import balanced, layout
from parallel.load_balance import assign_chunks, chunk_tokens, chunk_work, imbalance, visible_keys
from tests.support.parity import packed


def test_deal_is_a_list_of_integers():
    assert assign_chunks([9, 1, 8, 2, 7, 3], 3) == [[0, 1], [2, 3], [4, 5]]
    assert assign_chunks([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]


def test_a_rank_that_is_full_gets_no_more_however_little_it_does():
    assert [len(chunks) for chunks in assign_chunks([100, 90, 1, 1, 1, 1], 2)] == [3, 3]


def test_chunks_are_an_eighth_of_a_ranks_share_and_no_longer_than_512():
    assert [chunk_tokens(n, 4) for n in (1, 32, 33, 1000, 10**6)] == [1, 1, 2, 32, 512]
    assert chunk_tokens(1000, 4, step=3) == 33


def test_visible_keys_are_what_the_mask_shows():
    span = packed()
    for mask in (CAUSAL, CAUSAL & SlidingWindow(5), SameDocument(), Mask()):
        look = (
            mask.dense(span, span) & span.valid()[:, None, :, None] & span.valid()[:, None, None, :]
        )
        assert torch.equal(visible_keys(span, mask), look[:, 0].sum(-1)), mask
    assert torch.equal(visible_keys(span), visible_keys(span, CAUSAL))


def test_a_chunk_beyond_the_row_has_no_work():
    assert chunk_work(torch.tensor([1, 2, 3, 4, 5]), 2, 4) == [3, 7, 5, 0]


def rows(count, tokens=65536):
    """Lengths as packed text has them: lognormal, a few long documents and many short ones."""
    chance = random.Random(0)
    for _ in range(count):
        keys, left = [], tokens
        while left:
            length = min(left, max(64, int(chance.lognormvariate(7.5, 1.5))))
            keys.append(torch.arange(1, length + 1))
            left -= length
        yield torch.cat(keys)


def work(found, keys):
    return [int(keys[found.index(rank)].sum()) for rank in range(found.ranks)]


def test_two_hundred_packings_are_balanced():
    worst, zigzags = 0.0, []
    for keys in rows(200):
        worst = max(worst, imbalance(work(balanced(len(keys), 8, keys=keys), keys)))
        zigzags.append(imbalance(work(layout("zigzag", len(keys), 8), keys)))
    assert worst <= 1.05
    assert sum(zigzags) / len(zigzags) > 1.5, (
        "the figure would be no feat if a fixed cut had it too"
    )


def test_one_long_document_is_balanced():
    keys = visible_keys(Span.line(1, 65536))[0]
    assert imbalance(work(layout("balanced", 65536, 8), keys)) <= 1.05
    assert imbalance(work(layout("zigzag", 65536, 8), keys)) <= 1.001
    assert imbalance(work(layout("contiguous", 65536, 8), keys)) > 1.8
