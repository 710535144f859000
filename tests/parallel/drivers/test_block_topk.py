"""A store over ranks: what is picked, brought and best is what one device has, whatever the cut;
and what it sends."""

import pytest
import torch

from models.masks.basic import Causal, SameDocument, SlidingWindow
from models.primitives.block_topk import BlockEnds, BlockTopK, find, take
from parallel.collectives import Communicator
from parallel.drivers.block_topk import ShardedBlockTopK
from parallel.layout import POLICIES, layouts
from parallel.sharding import shard_span
from tests.support.parity import packed
from tests.support.pool import ranks

CAUSAL = Causal() & SameDocument()


def _here(env, policy):
    span = packed()
    return (
        span,
        shard_span(span, layouts(policy, span, env.size), env.rank),
        ShardedBlockTopK(BlockTopK(), Communicator(env.group)),
    )


def _score(query, keys):
    return torch.einsum("btc,bsc->bts", query[0], keys[0]).relu()  # many ties at zero


def _best(env, policy):
    """(found by this rank, what one device finds for the same queries)."""
    span, here, store = _here(env, policy)
    q, k = (
        torch.randn(*span.shape, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        for s in (0, 1)
    )
    one, ends = BlockTopK(), BlockEnds(3)
    whole, mine = one.pick(span, ends), store.pick(here, ends)
    want = one.best(
        _score, (q,), (take(k, whole.index),), CAUSAL, span=span, kv_span=whole.span, count=3
    )[1]
    part = [here.sharding.shard(x, 0) for x in (q, k)]
    got = store.best(
        _score,
        (part[0],),
        (take(part[1], mine.index),),
        CAUSAL,
        span=here,
        kv_span=mine.span,
        count=3,
    )[1]
    valid = here.valid()
    return got[valid].tolist(), here.sharding.shard(want, -1)[valid].tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_best_are_those_of_one_device_also_where_many_are_equal(policy):
    for got, want in ranks(3, _best, policy):
        assert got == want


def _brought(env):
    """Every token brings the two before it, weighted, and gives their gradients home."""
    inner_span, here, store = _here(env, "zigzag")
    x = torch.randn(
        *inner_span.shape, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    mask = CAUSAL & SlidingWindow(3)

    def mixed(x, span, store):
        (all_x,), among = store.bring((x,), mask, span=span, kv_span=span)
        index, there = find(span.map(lambda t: t), among)
        assert torch.equal(there, span.valid())
        return (take(all_x, index).square() * there[..., None]).sum() + (
            all_x * among.pos[..., None] * among.valid()[..., None]
        ).sum()

    part = here.sharding.shard(x, 0).requires_grad_()
    mixed(part, here, store).backward()
    readers = torch.zeros(inner_span.shape)
    for rank in range(env.size):  # ranks that bring a token, its own among them
        span = here.sharding.spans[rank]
        seen = (
            mask.dense(span, inner_span)[:, 0]
            & span.valid()[:, :, None]
            & inner_span.valid()[:, None]
        )
        readers += seen.any(1)
    want = (2 * x + (readers * inner_span.pos)[..., None]) * inner_span.valid()[..., None]
    return (
        part.grad - here.sharding.shard(want, 0)
    ).abs().max().item(), store.communicator.bytes_sent


def test_gradients_of_what_was_brought_come_home_from_every_rank():
    for error, _ in ranks(3, _brought):
        assert error < 1e-13


def test_only_what_can_be_seen_is_sent():
    sent = [sent["lookup"] for _, sent in ranks(3, _brought)]
    assert all(
        0 < s <= 2 * 4 * 2 * 16 for s in sent
    )  # rows x borders x tokens before a border x bytes of a token


def _sizes(env):
    _, here, store = _here(env, "zigzag")
    picked = store.pick(here, BlockEnds(3))
    assert store.pick(here, BlockEnds(3)) is picked
    return picked.span.shape[1], picked.joint.sharding.whole.shape[1]


def test_every_rank_has_a_store_of_the_same_size():
    sizes = ranks(3, _sizes)
    assert len(set(sizes)) == 1 and sizes[0][1] == 3 * (17 + 1 + sizes[0][0])
